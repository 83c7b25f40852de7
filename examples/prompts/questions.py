"""Questions that docstrings of the standard library answer, with their texts and answers as training data.

An answer is a text, too: the model is to give a docstring a vector near that of the right answer to the question.
"""

import ast
import dataclasses
import random
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from quickstart.texts import PACKAGES, Documented, docstrings

LENGTH = 32  # Tokens of a text: one shape everywhere. A docstring says in its first line what it is about.


@dataclasses.dataclass(frozen=True)
class Question:
    """text: the question itself, which a prompt can begin as. answers: their texts.

    of(package, node) -> the index of the right one, None if the question does not apply.
    """

    name: str
    text: str
    answers: tuple[str, ...]
    of: Callable[[int, Documented], int | None]


def kind_of(package: int, node: Documented) -> int:
    if isinstance(node, ast.Module):
        return 2
    return 0 if isinstance(node, ast.ClassDef) else 1


def gives_back(package: int, node: Documented) -> int | None:
    if not isinstance(node, ast.FunctionDef):
        return None
    return int(any(isinstance(own, ast.Return) and own.value is not None for own in ast.walk(node)))


def raises(package: int, node: Documented) -> int | None:
    if not isinstance(node, ast.FunctionDef):
        return None
    return int(any(isinstance(own, ast.Raise) for own in ast.walk(node)))


PACKAGE = Question(
    "package",
    "Which package of Python's standard library is this from?",
    tuple(f"Python's {name} package" for name in PACKAGES),
    lambda package, node: package,
)
KIND = Question(
    "kind", "Is this about a class, a function or a module?", ("a class", "a function", "a module"), kind_of
)
RESULT = Question(
    "result", "Does this function return a value?", ("it changes something", "it returns a value"), gives_back
)
ERRORS = Question("errors", "Does this function raise an error?", ("it always works", "it raises an exception"), raises)


@dataclasses.dataclass(frozen=True)
class Examples:
    """Texts, encoded (texts, LENGTH), the task of each, and its answer: a number among the answers to all questions."""

    texts: tuple[str, ...]
    inputs: dict[str, np.ndarray]
    task_ids: np.ndarray
    labels: np.ndarray

    def rows(self, index: Any) -> dict[str, np.ndarray]:
        chosen = {name: array[index] for name, array in self.inputs.items()}
        return {**chosen, "task_ids": self.task_ids[index], "labels": self.labels[index]}

    def first(self, count: int) -> "Examples":
        return self.at(np.arange(min(count, len(self.labels))))

    def of_task(self, task: int) -> "Examples":
        return self.at(np.flatnonzero(self.task_ids == task))

    def at(self, own: np.ndarray) -> "Examples":
        inputs = {name: array[own] for name, array in self.inputs.items()}
        return Examples(tuple(self.texts[i] for i in own), inputs, self.task_ids[own], self.labels[own])


Encode = Callable[[Sequence[str]], dict[str, np.ndarray]]


def read_examples(
    questions: Sequence[Question], encode: Encode, seed: int, most: int, held_out: int
) -> tuple[Examples, Examples]:
    """Training examples and held-out ones, about 30% of each package; no module of Python is on both sides.

    Each answer to a question is as frequent as the others, as far as there are texts: at most `most`, and `held_out`,
    of a question.
    """
    rng, seen = random.Random(seed), set[str]()
    sides: tuple[list, list] = ([], [])
    for package, name in enumerate(PACKAGES):
        modules = docstrings(name, seen)
        room = 0.3 * sum(map(len, modules.values()))
        for module in rng.sample(sorted(modules), len(modules)):
            held = len(modules[module]) <= room
            room -= len(modules[module]) if held else 0
            sides[held].extend((text, package, node) for text, node in modules[module])
    return tuple(  # type: ignore[return-value]
        _examples(questions, encode, rng.sample(side, len(side)), count)
        for side, count in zip(sides, (most, held_out), strict=True)
    )


def _examples(
    questions: Sequence[Question], encode: Encode, side: Sequence[tuple[str, int, Documented]], count: int
) -> Examples:
    rows: list[tuple[str, int, int]] = []
    first = 0
    for task, question in enumerate(questions):
        left = dict.fromkeys(range(len(question.answers)), count // len(question.answers))
        for text, package, node in side:
            answer = question.of(package, node)
            if answer is not None and left[answer]:
                left[answer] -= 1
                rows.append((text, task, first + answer))
        first += len(question.answers)
    texts, tasks, labels = zip(*rows, strict=True)
    return Examples(texts, encode(texts), np.array(tasks, np.int32), np.array(labels, np.int32))


def allowed(questions: Sequence[Question]) -> np.ndarray:
    """Which of all answers are those of each question: (questions, answers)."""
    counts = [len(question.answers) for question in questions]
    return np.repeat(np.eye(len(questions), dtype=bool), counts, axis=1)


def encoder_of_words(folder: Path) -> Encode:
    """The tokenizer of a folder."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(LENGTH)
    tokenizer.enable_padding(length=LENGTH)

    def encode(texts: Sequence[str]) -> dict[str, np.ndarray]:
        encoded = tokenizer.encode_batch(list(texts))
        ids, masks = ([getattr(one, name) for one in encoded] for name in ("ids", "attention_mask"))
        return {"input_ids": np.array(ids, np.int32), "attention_mask": np.array(masks, np.int32)}

    return encode


def encoder_of_hashes(vocabulary: int) -> Encode:
    """For a model of no meaning: a word's token is a hash of it, and 0 is padding."""

    def encode(texts: Sequence[str]) -> dict[str, np.ndarray]:
        ids = np.zeros((len(texts), LENGTH), np.int32)
        for row, text in enumerate(texts):
            tokens = [1 + zlib.crc32(word.encode()) % (vocabulary - 1) for word in text.split()[:LENGTH]]
            ids[row, : len(tokens)] = tokens
        return {"input_ids": ids, "attention_mask": (ids != 0).astype(np.int32)}

    return encode
