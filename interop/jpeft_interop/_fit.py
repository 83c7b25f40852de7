"""Whether the tensors of a file are those of an adapter: each key to its place, or one error that names them all."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jpeft._params import Adapter

from ._family import Family
from ._keys import Slot, leaf_slots, slots
from ._listed import listed
from ._orientation import to_torch
from ._stacked import is_abstract
from ._surplus import (
    first_name,
    original_biases,
    possible_embeddings,
    second_names,
    tied_copies,
    written_embeddings,
)
from ._tied import tied_tensors


@dataclass(frozen=True)
class Fitted:
    """slots: the place of each tensor that is kept. second_names: {key: first key} of tensors that the file repeats."""

    slots: dict[str, Slot]
    second_names: dict[str, str]


def fit(
    path: Path,
    tensors: Mapping[str, np.ndarray],
    adapter: Adapter,
    leaves: Mapping[str, Any],
    family: Family,
    layouts: Mapping[str, str],
) -> Fitted:
    """Find a place for every tensor of a file in an adapter that its config asks for, abstract as yet.

    path: the file's, for messages. leaves: of the base tree. Raises ValueError if tensors are missing, unexpected or
    misshapen, or if a tensor that the file holds twice differs.
    """
    expected = slots(adapter, leaves, family, layouts)
    originals = original_biases(adapter, family)
    whole = leaf_slots(possible_embeddings(leaves), adapter, leaves, family, layouts)
    second = {**_second_names(tensors, expected, family), **tied_copies(tensors, whole)}
    tied = tied_tensors(tensors, adapter, leaves, family)
    known = {*expected, *originals, *second, *tied}
    rest = [key for key in tensors if key not in known]
    embeddings = {key: slot for key, slot in whole.items() if key in rest}
    _refuse(
        path,
        missing=[f"{key} {slot.shape}" for key, slot in expected.items() if key not in tensors],
        unexpected=[f"{key} {tensors[key].shape}" for key in rest if key not in embeddings],
        misshapen=[
            f"{key} is {tensors[key].shape}, expected {slot.shape}"
            for key, slot in {**expected, **embeddings}.items()
            if key in tensors and tensors[key].shape != slot.shape
        ],
        different=[f"{key} and {first}" for key, first in second.items() if not _same(tensors[key], tensors[first])]
        + [key for key, tensor in tied.items() if key in tensors and not np.array_equal(tensors[key], tensor)],
    )
    written = written_embeddings(adapter)
    kept = {
        key: slot
        for key, slot in embeddings.items()
        if slot.path not in written or not _is_base(tensors[key], leaves[slot.path], slot)
    }
    usual = second_names(expected, family)
    return Fitted({**expected, **kept}, {key: first for key, first in second.items() if key not in usual})


def _second_names(tensors: Mapping[str, np.ndarray], expected: Mapping[str, Slot], family: Family) -> dict[str, str]:
    tied, found = second_names(expected, family), {}
    for key in tensors:
        first = tied.get(key) or first_name(key, expected)
        if key not in expected and first in tensors:
            found[key] = first
    return found


def _refuse(path: Path, **problems: list[str]) -> None:
    said = {
        "missing": "the config asks for tensors that are not there",
        "unexpected": "there are tensors that neither the config nor the model has a place for",
        "misshapen": "tensors have another shape than the model and the config ask for",
        "different": "tensors that should be the same differ",
    }
    found = [f"{said[kind]}: {listed(names)}" for kind, names in problems.items() if names]
    if found:
        raise ValueError(
            f"{path} does not fit the model and its config: {'; '.join(found)}. Expected an adapter of this very model"
        )


def _same(first: np.ndarray, second: np.ndarray) -> bool:
    return (first.dtype, first.shape) == (second.dtype, second.shape) and first.tobytes() == second.tobytes()


def _is_base(tensor: np.ndarray, leaf: Any, slot: Slot) -> bool:
    if is_abstract(leaf) or not hasattr(leaf, "__array__") or leaf.dtype != tensor.dtype:
        return False
    return _same(tensor, np.ascontiguousarray(to_torch(leaf, slot.layout)))
