"""Writing a checkpoint: config.json and safetensors files that `transformers` loads."""

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jpeft._quantized import as_dense, is_quantized, taken

from .._files import write_tensors
from ._leaves import Leaf
from ._parameters import Piece
from ._pieces import tensor_size

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
        shards = _shards(leaves, arrays, max_shard_bytes)
        for file, pieces in shards.items():
            write_tensors(staging / file, {piece.name: _tensor(arrays[path], piece) for path, piece in pieces})
        if len(shards) > 1:
            weight_map = {piece.name: file for file, pieces in shards.items() for _, piece in pieces}
            total = sum(array.size * array.dtype.itemsize for array in arrays.values())
            _write_json(staging / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
        _write_json(staging / "config.json", raw)
        written = sorted(file.name for file in staging.iterdir())
        for file in written:
            os.replace(staging / file, directory / file)
    for file in stale - set(written):
        (directory / file).unlink(missing_ok=True)


def _tensor(array: Any, piece: Piece) -> np.ndarray:
    """The tensor that a piece of a leaf is in a checkpoint."""
    index = piece.index
    while is_quantized(array) and isinstance(index[0], int):
        array, index = taken(array, index[0]), index[1:]  # One layer at a time becomes dense.
    array, whole = as_dense(array), all(at == slice(None) for at in index)
    tensor = np.asarray(array if whole else array[index]).transpose(np.argsort(piece.axes))
    return np.array(tensor, order="C", copy=None)  # In order now, so that nothing keeps the slice.


def _shards(
    leaves: Mapping[str, Leaf], arrays: Mapping[str, jax.Array], max_bytes: int
) -> dict[str, list[tuple[str, Piece]]]:
    """Which pieces, with the paths of their leaves, each file holds."""
    groups: list[list[tuple[str, Piece]]] = [[]]
    size = 0
    for path, array in arrays.items():
        for piece in leaves[path].alternatives[0]:
            needed = tensor_size(piece, leaves[path].shape) * array.dtype.itemsize
            if groups[-1] and size + needed > max_bytes:
                groups.append([])
                size = 0
            groups[-1].append((path, piece))
            size += needed
    if len(groups) == 1:
        return {WEIGHTS: groups[0]}
    return {f"model-{i:05}-of-{len(groups):05}.safetensors": group for i, group in enumerate(groups, 1)}


def _weights_in(directory: Path) -> set[str]:
    index = directory / INDEX
    shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values() if index.is_file() else ()
    return {WEIGHTS, INDEX, *(shard for shard in shards if Path(shard).name == shard)}


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
