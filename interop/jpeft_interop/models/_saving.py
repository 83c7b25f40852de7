"""Writing a checkpoint: config.json and safetensors files that `transformers` loads."""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file

from ._leaves import Leaf


def write_config(directory: Path, raw: Mapping[str, Any]) -> None:
    """Write config.json."""
    text = json.dumps(raw, indent=2, sort_keys=True) + "\n"
    _replace(directory / "config.json", lambda path: path.write_text(text, encoding="utf-8"))


def write_weights(
    directory: Path, leaves: Mapping[str, Leaf], arrays: Mapping[str, jax.Array], max_shard_bytes: int
) -> None:
    """Write `model.safetensors`, or numbered shards and their index if the weights exceed `max_shard_bytes`.

    Both mappings are by path. One shard at a time is in the host's memory. Weights that the folder held before under
    the other of the two forms are removed: `transformers` would read them instead.
    """
    groups = _shards(arrays, max_shard_bytes)
    names = _shard_names(len(groups))
    for name, group in zip(names, groups, strict=True):
        # A kernel is a transposed view here, and safetensors writes the memory behind a view as if it were in order.
        tensors = {
            leaves[path].checkpoint_name: np.ascontiguousarray(_theirs(arrays[path], leaves[path])) for path in group
        }
        _replace(directory / name, lambda path, tensors=tensors: save_file(tensors, path, metadata={"format": "pt"}))
    index = directory / "model.safetensors.index.json"
    if len(groups) == 1:
        index.unlink(missing_ok=True)
        return
    weight_map = {
        leaves[path].checkpoint_name: name for name, group in zip(names, groups, strict=True) for path in group
    }
    total = sum(array.nbytes for array in arrays.values())
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2, sort_keys=True)
    _replace(index, lambda path: path.write_text(text + "\n", encoding="utf-8"))
    (directory / "model.safetensors").unlink(missing_ok=True)


def _theirs(array: jax.Array, leaf: Leaf) -> np.ndarray:
    return np.asarray(array).transpose(np.argsort(leaf.stored.axes))


def _shards(arrays: Mapping[str, jax.Array], max_bytes: int) -> list[list[str]]:
    groups: list[list[str]] = [[]]
    size = 0
    for path, array in arrays.items():
        if groups[-1] and size + array.nbytes > max_bytes:
            groups.append([])
            size = 0
        groups[-1].append(path)
        size += array.nbytes
    return groups


def _shard_names(count: int) -> Iterable[str]:
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]


def _replace(path: Path, write: Any) -> None:
    # A reader never sees half a file, and a run that dies while writing leaves the old one.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
