"""Docstrings of Python's standard library as training data: read from its sources, split by module, encoded."""

import ast
import dataclasses
import random
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

PACKAGES = ("asyncio", "email", "http", "importlib", "logging", "multiprocessing", "unittest", "urllib", "xml")
LENGTH, BATCH = 64, 32  # One shape of batch everywhere, so that each function is compiled once.
SHORTEST = 30  # Characters: "Return the name." could come from anywhere.
HELD_OUT = 384  # Docstrings: more would cost more time than they add certainty.


@dataclasses.dataclass(frozen=True)
class Texts:
    """Encoded docstrings: what the model takes, (texts, LENGTH) each, and the index of each text's package."""

    inputs: dict[str, np.ndarray]
    labels: np.ndarray
    modules: int

    def first(self, count: int) -> "Texts":
        return dataclasses.replace(self, inputs=self.rows(np.s_[:count]), labels=self.labels[:count])

    def rows(self, index: Any) -> dict[str, np.ndarray]:
        return {name: array[index] for name, array in self.inputs.items()}


Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def docstrings(package: str, seen: set[str]) -> dict[str, list[tuple[str, Documented]]]:
    """The docstrings of a package, and what they are of, by source file, each text once; nothing is imported."""
    library = Path(sysconfig.get_paths()["stdlib"])
    found: dict[str, list[tuple[str, Documented]]] = {}
    for file in sorted((library / package).rglob("*.py")):
        if {"test", "tests"} & set(file.relative_to(library).parts):
            continue
        for node in ast.walk(ast.parse(file.read_bytes())):
            if isinstance(node, Documented):
                text = " ".join((ast.get_docstring(node) or "").split())
                if len(text) >= SHORTEST and text not in seen:
                    seen.add(text)
                    found.setdefault(str(file), []).append((text, node))
    if len(found) < 2:
        raise SystemExit(f"expected the sources of {package!r} in {library}; this Python has no docstrings of it there")
    return found


def read_texts(seed: int, folder: Path) -> tuple[Texts, Texts]:
    """Training and held-out texts; about 30% of each package are held out, and no module is on both sides."""
    rng, seen = random.Random(seed), set[str]()
    sides: tuple[list, list] = ([], [])
    for label, package in enumerate(PACKAGES):
        modules = docstrings(package, seen)
        room = 0.3 * sum(map(len, modules.values()))
        for name in rng.sample(sorted(modules), len(modules)):
            held_out = len(modules[name]) <= room
            room -= len(modules[name]) if held_out else 0
            sides[held_out].extend((text, label, name) for text, _ in modules[name])
    for side in sides:
        rng.shuffle(side)
    return encode(sides[0], folder), encode(sides[1][:HELD_OUT], folder)


def encode(rows: list[tuple[str, int, str]], folder: Path) -> Texts:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(LENGTH)
    tokenizer.enable_padding(length=LENGTH)
    encoded = tokenizer.encode_batch([text for text, _, _ in rows])
    inputs = {
        "input_ids": np.array([one.ids for one in encoded], np.int32),
        "attention_mask": np.array([one.attention_mask for one in encoded], np.int32),
    }
    return Texts(inputs, np.array([label for _, label, _ in rows]), len({name for _, _, name in rows}))


def in_batches(function: Callable[[dict[str, np.ndarray]], Any], texts: Texts) -> np.ndarray:
    """The function's values at all texts; the last batch is filled up with its last text, to keep its shape."""
    count = len(texts.labels)
    starts = range(0, count, BATCH)
    values = [function(texts.rows(np.minimum(np.arange(s, s + BATCH), count - 1))) for s in starts]
    return np.concatenate([np.asarray(value) for value in values])[:count]


def shuffled(count: int, steps: int, seed: int) -> Iterator[np.ndarray]:
    """The rows of each step's batch: one epoch after another, each in its own order."""
    rng, waiting = np.random.default_rng(seed), np.array([], int)
    for _ in range(steps):
        while len(waiting) < BATCH:
            waiting = np.concatenate([waiting, rng.permutation(count)])
        rows, waiting = waiting[:BATCH], waiting[BATCH:]
        yield rows
