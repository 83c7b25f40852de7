"""`jpeft_state.safetensors`: what PEFT's files do not hold, and another machine may make otherwise.

Some methods make arrays anew out of the base's weights when an adapter is loaded: the first singular vectors, whose
signs differ from one linear algebra library to the next, although what was trained depends on them. They are kept here
beside PEFT's files, which stay as they are; PyTorch PEFT does not look at this one. It says which
`adapter_model.safetensors` it belongs to, by the SHA-256 of that file's bytes, and counts for no other.
"""

import dataclasses
import hashlib
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jpeft._contract import method_of
from jpeft._folded import folded, is_folded, unfolded
from jpeft._params import Adapter

from ._experts_layout import nesting
from ._family import Family
from ._files import read_metadata, read_tensors, write_tensors

STATE_NAME = "jpeft_state.safetensors"
NEXT_STATE = f".{STATE_NAME}.next"
"""What the file is called before the save that it is of is committed (`_pair.py`)."""

_BELONGS_TO = "adapter_model_sha256"


def write_kept(path: Path, tensors: Mapping[str, np.ndarray], weights: Path) -> None:
    """Write the file, bound to the weights, which are in their file already; raises OSError if it cannot be written."""
    write_tensors(path, tensors, {_BELONGS_TO: _digest(weights)})


def belongs(path: Path, weights: Path) -> bool:
    """Whether the file at `path` was written with the weights at `weights`; raises ValueError if it is damaged."""
    return path.is_file() and read_metadata(path).get(_BELONGS_TO) == _digest(weights)


def kept_arrays(adapter: Adapter, family: Family) -> dict[str, Any]:
    """{key: array} of those that the file is to hold, of an adapter of single layers; empty for most methods."""
    found = {key: adapter.weights[path][name] for key, path, name in _kept_weights(adapter, family)}
    return {**found, **{key: adapter.shared[name] for key, name in _kept_shared(adapter)}}


def kept_encoder(adapter: Adapter) -> dict[str, Any]:
    """{key: array} of those of which a prompt is made, unless they can be told from the prompt."""
    if is_folded(adapter):
        return {}
    again = unfolded(folded(adapter))
    if again is not None and all(np.array_equal(adapter.shared[name], array) for name, array in again.items()):
        return {}
    return dict(adapter.shared)


def with_encoder(adapter: Adapter, planned: Adapter, weights: Path) -> Adapter:
    """An adapter read from the file `weights` with the arrays to train on, of which its prompt is made.

    planned: the same adapter with them, abstract. Raises ValueError if no file here has them and they cannot be told.
    """
    if is_folded(planned):
        return adapter
    path = next((place for place in _places(weights) if belongs(place, weights)), None)
    held = {} if path is None else read_tensors(path)
    arrays = {name: jnp.asarray(held[name]) for name in planned.shared if name in held}
    if len(arrays) < len(planned.shared):
        found = unfolded(adapter)
        if found is None:
            raise ValueError(
                f"{weights} holds a prompt, and not the encoder that it was made of ({', '.join(planned.shared)}), "
                f"without which it cannot train on: there is no {STATE_NAME} beside it that belongs to it, which "
                "jpeft_interop.save_pretrained writes; load it with is_trainable=False"
            )
        arrays = dict(found)
    wrong = [f"{name} {array.shape}, not {planned.shared[name].shape}" for name, array in arrays.items()
             if array.shape != planned.shared[name].shape]  # fmt: skip
    if wrong:
        raise ValueError(f"{path or weights} does not fit the config: {'; '.join(wrong)}; expected its own")
    return dataclasses.replace(adapter, shared=arrays)


def with_kept(adapter: Adapter, planned: Adapter, weights: Path, family: Family) -> Adapter:
    """An adapter read from the file `weights`, with what is kept beside it.

    adapter, planned: of single layers, without and with the arrays that are to be kept. Warns (UserWarning) if there is
    no file that belongs to the weights, so that the arrays are left to be made anew; raises ValueError if one is
    damaged, or if its arrays have other shapes than the adapter needs.
    """
    own, shared = list(_kept_weights(planned, family)), list(_kept_shared(planned))
    if not own and not shared:
        return adapter
    needed = {key: planned.weights[path][name].shape for key, path, name in own}
    needed.update({key: planned.shared[name].shape for key, name in shared})
    tensors = _read(weights, needed)
    if tensors is None:
        return adapter
    arrays: dict[str, dict[str, Any]] = {path: dict(held) for path, held in adapter.weights.items()}
    for key, path, name in own:
        arrays[path][name] = jnp.asarray(tensors[key])
    others = {name: jnp.asarray(tensors[key]) for key, name in shared}
    return dataclasses.replace(adapter, weights=arrays, shared={**adapter.shared, **others})


def _read(weights: Path, needed: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray] | None:
    places = _places(weights)
    path = next((place for place in places if belongs(place, weights)), None)
    tensors = {} if path is None else read_tensors(path)
    if path is None or needed.keys() - tensors.keys():
        there = [place for place in places if place.is_file()]
        why = f"{there[0]} belongs to other weights" if there else f"there is no {STATE_NAME} beside {weights}"
        names = sorted({key.rpartition(".")[2] for key in needed})
        warnings.warn(
            f"{why}, so that {', '.join(names)} are made anew from the base. They may come out otherwise than on the "
            "machine that the adapter was trained on (by the signs of singular vectors, or where a choice hangs on "
            "rounding), and the adapter with them; PyTorch PEFT has no such file and the same risk",
            stacklevel=5,
        )
        return None
    wrong = [f"{key} {tensors[key].shape}, not {tuple(shape)}" for key, shape in needed.items()
             if tensors[key].shape != tuple(shape)]  # fmt: skip
    if wrong:
        raise ValueError(f"{path} does not fit the parameters: {'; '.join(wrong)}; expected the base it was made with")
    return tensors


def _places(weights: Path) -> list[Path]:
    return [weights.with_name(name) for name in (NEXT_STATE, STATE_NAME)]


def _kept_weights(adapter: Adapter, family: Family) -> Iterator[tuple[str, str, str]]:
    """(key, path, name) of each array that is kept in the file."""
    method, config = method_of(adapter.config), adapter.config
    modules = {path: family.module(path) for path in adapter.sites} | nesting(adapter.sites, family)
    for path, arrays in adapter.weights.items():
        for name in arrays:
            if method.is_kept_apart(name, config):
                yield f"base_model.model.{modules[path]}.{name}", path, name


def _kept_shared(adapter: Adapter) -> Iterator[tuple[str, str]]:
    method, config = method_of(adapter.config), adapter.config
    return ((f"base_model.{name}", name) for name in adapter.shared if method.is_kept_apart(name, config))


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
