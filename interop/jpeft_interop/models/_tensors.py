"""Tensors in safetensors files: which there are, and reading parts of them without the rest."""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Protocol

import jax.numpy as jnp
import numpy as np

from .._files import opened
from ._leaves import listed

READABLE: Mapping[str, Any] = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16}
"""Types of parameters, by their names in a safetensors file."""

TYPES: Mapping[str, Any] = {**READABLE, "I8": np.int8, "U8": np.uint8}
"""Types that are read at all."""

SLAB = 1 << 24
"""Bytes of a file that are in memory at one time."""

BLOCK = 1 << 18
"""Bytes that are transposed at one time: they fit a cache, which halves the time."""

Index = tuple[slice, ...]


class Source(Protocol):
    """What is read by an index: a tensor of a file, or what is made of such. `itemsize` is in bytes."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def itemsize(self) -> int: ...

    def read(self, index: Index) -> np.ndarray: ...


@dataclass(frozen=True)
class Tensor:
    """A tensor in a safetensors file: nothing of it has been read but the header. `offset` is in bytes."""

    file: Path
    offset: int
    shape: tuple[int, ...]
    dtype: str

    @property
    def itemsize(self) -> int:
        return jnp.dtype(TYPES[self.dtype]).itemsize

    def rows(self, first: int, number: int) -> "Tensor":
        """Some of its rows, as a tensor of their own."""
        skipped = first * prod(self.shape[1:]) * self.itemsize
        return Tensor(self.file, self.offset + skipped, (number, *self.shape[1:]), self.dtype)

    def read(self, index: Index) -> np.ndarray:
        """`tensor[index]`: a view of the file, whose pages leave the memory with it."""
        dtype = jnp.dtype(TYPES[self.dtype])
        if not index or 0 in self.shape:
            shape, skipped = self.shape, 0
        else:
            shape, skipped = (index[0].stop - index[0].start, *self.shape[1:]), index[0].start * prod(self.shape[1:])
        if 0 in shape:
            return np.empty(shape, dtype)
        file = np.memmap(self.file, dtype, "r", self.offset + skipped * dtype.itemsize, shape)
        return file[(slice(None), *index[1:])] if index else file


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder: `model.safetensors`, or the shards that its index names.

    Raises FileNotFoundError if there are none or a shard is absent, ValueError if there are pickles only.
    """
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if index.is_file():
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        if absent := [shard for shard in shards if not (folder / shard).is_file()]:
            raise FileNotFoundError(f"{index} names shards that are not in its folder: {listed(absent)}")
        return [folder / shard for shard in shards]
    if pickles := sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern)):
        raise ValueError(
            f"{folder} holds pickled weights only ({listed(pickles)}); a pickle can run any code when it is read, so "
            "none is read here. Where you trust it: transformers.AutoModel.from_pretrained(folder)"
            ".save_pretrained(folder) writes model.safetensors"
        )
    raise FileNotFoundError(
        f"{folder} holds neither model.safetensors nor model.safetensors.index.json; other formats are not read"
    )


def catalogue(files: Iterable[Path]) -> dict[str, Tensor]:
    """The tensors of some safetensors files, by name.

    Raises ValueError if a file is truncated, damaged or no safetensors file.
    """
    tensors = {}
    for file in files:
        start, header = _header(file)
        for name, entry in sorted(header.items()):
            if name != "__metadata__":
                offset = start + entry["data_offsets"][0]
                tensors[name] = Tensor(file, offset, tuple(entry["shape"]), entry["dtype"])
    return tensors


def _header(file: Path) -> tuple[int, dict[str, Any]]:
    """Where the data of a file begin, and what it says of each tensor."""
    with opened(file), file.open("rb") as stream:  # Opening it as safetensors checks the header against the file.
        length = int.from_bytes(stream.read(8), "little")
        return 8 + length, json.loads(stream.read(length))


def everything(source: Source) -> Index:
    """The index of all of it."""
    return tuple(slice(0, size) for size in source.shape)


def equal(first: Source, second: Source) -> bool:
    """Whether two hold the same numbers."""
    return first.shape == second.shape and all(
        np.array_equal(first.read(slab), second.read(slab)) for slab in _slabs(first, everything(first))
    )


def copy(source: Source, index: Index, target: np.ndarray) -> None:
    """Write `source[index]` to a view of a buffer, with a cast."""
    for slab in _slabs(source, index):
        block = source.read(slab)
        if not index:
            target[...] = block
            continue
        place = target[slab[0].start - index[0].start : slab[0].stop - index[0].start]
        rows = max(1, BLOCK * len(block) // max(block.nbytes, 1))
        for first in range(0, len(block), rows):
            place[first : first + rows] = block[first : first + rows]


def _slabs(source: Source, index: Index) -> Iterator[Index]:
    """An index in steps along its first axis, of which none takes more of the file than a slab."""
    if not index:
        yield index
        return
    row = prod(source.shape[1:]) * source.itemsize
    rows = max(1, SLAB // max(row, 1))
    for first in range(index[0].start, index[0].stop, rows):
        yield slice(first, min(first + rows, index[0].stop)), *index[1:]


def aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An empty array at an address from which JAX can take it over on CPU without a copy."""
    size, line = prod(shape) * dtype.itemsize, 64
    memory = np.empty(size + line, np.uint8)
    start = -memory.ctypes.data % line
    return memory[start : start + size].view(dtype).reshape(shape)
