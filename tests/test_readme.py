"""README's table of methods says what the registry says; `python -m tests.test_readme` prints it."""

import re
from pathlib import Path

import pytest

import jpeft
from jpeft._contract import CONVOLUTION, EMBEDDING, LINEAR, config_classes, method_of
from tests.cases import METHODS

ROOT = Path(jpeft.__file__).parent
README = ROOT.parent / "README.md"
HEAD = "| method | config | layers | merges | paper |\n|---|---|---|---|---|"
HEAD_BESIDE = "| method | config | what it adds | paper |\n|---|---|---|---|"
LAYERS = {LINEAR: "linear", CONVOLUTION: "convolution", EMBEDDING: "lookup"}
WITHOUT_SITES = {
    jpeft.LNTuningConfig: "modules of any kind, in full",
    jpeft.TrainableTokensConfig: "rows of lookups and output layers",
}
BESIDE = {
    jpeft.PromptTuningConfig: "tokens before the text",
    jpeft.PromptEncoderConfig: "tokens before the text, made by an MLP or LSTM",
    jpeft.MultitaskPromptTuningConfig: "tokens before the text, the shared ones times those of a task",
    jpeft.CPTConfig: "tokens of a context before the text, moved within a ball",
    jpeft.PrefixTuningConfig: "keys and values before those of the text in every layer",
    jpeft.CartridgeConfig: "keys and values that begin as those of a long text",
    jpeft.AdaptionPromptConfig: "attention to a prompt in the last layers, behind a gate",
    jpeft.ShadowConfig: "a small decoder beside the model, with a state that enters every block",
    jpeft.XLoraConfig: "a router among LoRA adapters, for each token and layer",
}


def table():
    return "\n".join([HEAD, *map(line, kinds(beside=False))])


def table_beside():
    return "\n".join([HEAD_BESIDE, *map(line_beside, kinds(beside=True))])


def kinds(beside):
    """Those that choose their own place, or the others, LoRA first."""
    found = [kind for kind, cls in config_classes().items() if (cls in BESIDE) is beside]
    return sorted(found, key=lambda kind: (kind != jpeft.PeftType.LORA, str(kind)))


def line(kind):
    cls, name, text = described(kind)
    return f"| {name} | `{cls.__name__}` | {layers(cls)} | {merges(cls)} | {paper(text)} |"


def line_beside(kind):
    cls, name, text = described(kind)
    return f"| {name} | `{cls.__name__}` | {BESIDE[cls]} | {paper(text)} |"


def described(kind):
    """Its config class, its name, and the beginning of its file."""
    text = paragraph(ROOT / "methods" / f"{kind.value.lower()}.py")
    return config_classes()[kind], re.split(r"[:,(]", text)[0].strip(), text


def paragraph(path):
    return " ".join(path.read_text().removeprefix('"""').partition('"""')[0].split())


def plain_row(cls):
    return next(row for row in METHODS if row.file and row.config is cls)


def layers(cls):
    if cls in WITHOUT_SITES:
        return WITHOUT_SITES[cls]
    row = plain_row(cls)
    kinds = method_of(row.config(**row.options)).kinds
    return ", ".join(name for kind, name in LAYERS.items() if kind in kinds)


def merges(cls):
    if cls in WITHOUT_SITES:
        return "yes"
    row = plain_row(cls)
    return "layers with a bias" if row.biased else "yes" if row.mergeable else "no"


def paper(text):
    """The first work that a method's file names, as a link."""
    number = re.search(r"(?:arXiv:|arxiv\.org/abs/)(\d+\.\d+)", text)
    other = re.search(r"https://[^\s);,]+", text)
    link = f"https://arxiv.org/abs/{number[1]}" if number else other[0] if other else None
    assert link, f"no paper in {text[:80]!r}"
    authors = re.search(r"\(([A-Z][^():]*?, (?:\w+ )?\d{4})", text)
    words = authors[1] if authors else f"arXiv {number[1]}" if number else "PEFT"
    return f"[{words}]({link})"


def missing():
    """The methods that PEFT has and this package does not, by PEFT's names."""
    peft = pytest.importorskip("peft")
    return [str(kind.value) for kind in peft.PeftType if kind.value not in jpeft.PeftType.__members__]


def test_the_table_of_methods_is_that_of_the_registry():
    text = README.read_text().partition("## Methods\n")[2].partition("\n## ")[0]
    given = [row for row in text.splitlines() if row.startswith("|")]
    # What was measured stands in further columns.
    pairs = list(zip(given, [*table().splitlines(), *table_beside().splitlines()], strict=True))
    lacking = [wanted for row, wanted in pairs if not row.startswith(wanted)]
    assert not lacking, (
        f"python -m tests.test_readme prints README's table, but for what is measured; lacking: {lacking}"
    )


def test_the_methods_that_are_missing_are_named():
    names = re.search(r"Not here yet: ([^(.]*)", README.read_text())
    assert (re.findall(r"\w+", names[1]) if names else []) == missing()


def test_every_config_of_a_method_is_public():
    assert all(getattr(jpeft, cls.__name__) is cls for cls in config_classes().values())


if __name__ == "__main__":
    print(f"{table()}\n\n{table_beside()}")
    print(f"\nNot here yet: {', '.join(missing())}")
