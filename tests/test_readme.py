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
LAYERS = {LINEAR: "linear", CONVOLUTION: "convolution", EMBEDDING: "lookup"}
WITHOUT_SITES = {
    jpeft.LNTuningConfig: "modules of any kind, in full",
    jpeft.TrainableTokensConfig: "rows of lookups and output layers",
}


def table():
    kinds = sorted(config_classes(), key=lambda kind: (kind != jpeft.PeftType.LORA, str(kind)))
    return "\n".join([HEAD, *map(line, kinds)])


def line(kind):
    cls = config_classes()[kind]
    text = paragraph(ROOT / "methods" / f"{kind.value.lower()}.py")
    name = re.split("[:,]", text)[0]
    return f"| {name} | `{cls.__name__}` | {layers(cls)} | {merges(cls)} | {paper(text)} |"


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
    pairs = list(zip(given, table().splitlines(), strict=True))
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
    print(table())
    print(f"\nNot here yet: {', '.join(missing())}")
