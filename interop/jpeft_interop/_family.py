"""What a model family calls its modules and leaves in Hugging Face's files: data, one table a family."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Family:
    """How the names and shapes of a parameter tree lead to those of the PyTorch model.

    modules: (regular expression, replacement) pairs; the first one that matches a module path in full gives its
    Hugging Face path, and a path that none matches keeps its name. leaves: names of leaves. layouts: {path or regular
    expression: layout}, as for `jpeft.wrap`. tied: (name, name) pairs that the PyTorch model has for one tensor.
    """

    name: str
    modules: tuple[tuple[str, str], ...] = ()
    leaves: Mapping[str, str] = field(default_factory=dict)
    layouts: Mapping[str, str] = field(default_factory=dict)
    tied: tuple[tuple[str, str], ...] = ()

    def module(self, path: str) -> str:
        for pattern, replacement in self.modules:
            if found := re.fullmatch(pattern, path):
                return found.expand(replacement)
        return path

    def leaf(self, name: str) -> str:
        return self.leaves.get(name, name)


FLAX_LEAVES = {
    "kernel": "weight",
    "embedding": "weight",
    "embeddings": "weight",
    "scale": "weight",
    "w": "weight",
    "b": "bias",
}

FAMILIES: Mapping[str, Family] = {
    "hf": Family(
        "hf",
        leaves=FLAX_LEAVES,
        tied=(("cls.predictions.bias", "cls.predictions.decoder.bias"),),
    )
}
"""Families by name. "hf": trees whose modules are named as in `transformers`, such as `jpeft_interop`'s own models."""


def family_of(family: str) -> Family:
    """The family of that name; raises ValueError for a name that is not known.

    >>> family_of("hf").leaf("kernel")
    'weight'
    """
    if family not in FAMILIES:
        raise ValueError(f"family is {family!r}; expected one of: {', '.join(FAMILIES)}")
    return FAMILIES[family]
