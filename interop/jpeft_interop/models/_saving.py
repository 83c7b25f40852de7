"""Writing a checkpoint: config.json and safetensors files that `transformers` loads."""

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from .._files import write_tensors
from ._leaves import Leaf

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


def write_checkpoint(
    directory: Path,
    raw: Mapping[str, Any],
    leaves: Mapping[str, Leaf],
    arrays: Mapping[str, jax.Array],
    max_shard_bytes: int,
) -> None:
    """Write config.json and the weights: one file, or shards with an index if they exceed `max_shard_bytes`.

    `leaves` and `arrays` are by path. One shard at a time is in the host's memory. Everything is written beside the
    old files and moved into place at the end; weights that were there under other names are then removed, for a
    reader might prefer them.
    """
    directory.mkdir(parents=True, exist_ok=True)
    stale = _weights_in(directory)
    with tempfile.TemporaryDirectory(dir=directory, prefix=".saving-") as name:
        staging = Path(name)
        shards = _shards(arrays, max_shard_bytes)
        for file, paths in shards.items():
            write_tensors(
                staging / file, {leaves[path].checkpoint_name: _theirs(arrays, leaves, path) for path in paths}
            )
        if len(shards) > 1:
            weight_map = {leaves[path].checkpoint_name: file for file, paths in shards.items() for path in paths}
            total = sum(array.nbytes for array in arrays.values())
            _write_json(staging / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
        _write_json(staging / "config.json", raw)
        written = sorted(file.name for file in staging.iterdir())
        for file in written:
            os.replace(staging / file, directory / file)
    for file in stale - set(written):
        (directory / file).unlink(missing_ok=True)


def _theirs(arrays: Mapping[str, jax.Array], leaves: Mapping[str, Leaf], path: str) -> np.ndarray:
    return np.asarray(arrays[path]).transpose(np.argsort(leaves[path].stored.axes))


def _shards(arrays: Mapping[str, jax.Array], max_bytes: int) -> dict[str, list[str]]:
    groups: list[list[str]] = [[]]
    size = 0
    for path, array in arrays.items():
        if groups[-1] and size + array.nbytes > max_bytes:
            groups.append([])
            size = 0
        groups[-1].append(path)
        size += array.nbytes
    if len(groups) == 1:
        return {WEIGHTS: groups[0]}
    return {f"model-{i:05}-of-{len(groups):05}.safetensors": group for i, group in enumerate(groups, 1)}


def _weights_in(directory: Path) -> set[str]:
    index = directory / INDEX
    shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values() if index.is_file() else ()
    return {WEIGHTS, INDEX, *(shard for shard in shards if Path(shard).name == shard)}


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
