"""One quantised weight of a checkpoint: its codes, its scales and its values, any part of them without the rest."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import gcd
from pathlib import Path

import numpy as np

from jpeft._quantized import NF4

from ._tensors import Index, Tensor, everything

FP4 = tuple(float(np.float32(v) / np.float32(12)) for v in (0, 0.0625, 8, 12, 4, 6, 2, 3))
TABLES: Mapping[str, np.ndarray] = {
    "nf4": np.array(NF4, np.float32),
    "fp4": np.array((*FP4, *(0.0 - value for value in FP4)), np.float32),
}
"""What each code of 4 bits stands for, before its scale."""


@dataclass(frozen=True)
class Nested:
    """How the scales of blocks are quantised themselves: `table[code] * absmax[of its block] + offset`."""

    table: Tensor
    absmax: Tensor
    blocksize: int
    offset: float

    def values(self) -> tuple[float, ...]:
        """The table."""
        return tuple(map(float, self.table.read(everything(self.table))))


@dataclass(frozen=True)
class QuantisedTensor:
    """A weight `(out, in)` that is stored as codes, each block of `blocksize` of them with a scale.

    `dtype` is that of the weight it stands for. `codes`: bytes of two codes each, or `(rows, in)` int8. `above`: the
    number of rows that the codes hold before those of this weight.
    """

    shape: tuple[int, ...]
    dtype: str
    kind: str
    codes: Tensor
    absmax: Tensor
    blocksize: int
    nested: Nested | None = None
    above: int = 0

    @property
    def file(self) -> Path:
        return self.codes.file

    @property
    def itemsize(self) -> int:
        return 4

    @property
    def group(self) -> int:
        """The longest piece of a row, of which rows are made up, that never has two scales."""
        return gcd(self.shape[1], self.blocksize)

    def rows(self, first: int, number: int) -> "QuantisedTensor":
        """Some of its rows, as a weight of their own."""
        return replace(self, shape=(number, self.shape[1]), above=self.above + first)

    def read(self, index: Index) -> np.ndarray:
        """`weight[index]`, in float32, as `bitsandbytes.functional.dequantize_4bit` computes it."""
        rows, columns = index
        codes = Codes(self).read(index)
        values = codes.astype(np.float32) if self.kind == "int8" else TABLES[self.kind][codes]
        first, last = columns.start // self.group, -(-columns.stop // self.group)
        factors = Scales(self, self.group, scales).read((rows, slice(first, last))).repeat(self.group, axis=1)
        skipped = columns.start - first * self.group
        return values * factors[:, skipped : skipped + columns.stop - columns.start]


@dataclass(frozen=True)
class Codes:
    """The codes of a weight `(out, in)`: int8, or 4 bits in a byte each."""

    weight: QuantisedTensor

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape

    @property
    def itemsize(self) -> int:
        return 1

    def read(self, index: Index) -> np.ndarray:
        above, width, codes = self.weight.above, self.weight.shape[1], self.weight.codes
        rows, columns = slice(index[0].start + above, index[0].stop + above), index[1]
        if self.weight.kind == "int8":
            return codes.read((rows, columns))
        if width % 2:  # A row may begin within a byte.
            start, stop = rows.start * width, rows.stop * width
            packed = codes.read((slice(start // 2, -(-stop // 2)),))
            flat = _unpacked(packed)[start % 2 :][: stop - start]
            return flat.reshape(-1, width)[:, columns]
        table = replace(codes, shape=(codes.shape[0] // (width // 2), width // 2))
        packed = table.read((rows, slice(columns.start // 2, -(-columns.stop // 2))))
        return _unpacked(packed)[:, columns.start % 2 :][:, : columns.stop - columns.start]


def _unpacked(packed: np.ndarray) -> np.ndarray:
    """Two codes for each byte: its high half comes first."""
    both = np.empty((*packed.shape, 2), np.uint8)
    np.right_shift(packed, 4, out=both[..., 0])
    np.bitwise_and(packed, 15, out=both[..., 1])
    return both.reshape(*packed.shape[:-1], -1)


Values = Callable[["QuantisedTensor", int, int], np.ndarray]
"""`(weight, first, last) -> one value for each of these blocks`, counted from the first that the file has."""


@dataclass(frozen=True)
class Scales:
    """What the blocks of a weight `(out, in)` have, as `(out, in / group)`: a value for `group` neighbours in a row."""

    weight: QuantisedTensor
    group: int
    values: Values

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.weight.shape[0], self.weight.shape[1] // self.group)

    @property
    def itemsize(self) -> int:
        return 8  # Of the number of a block.

    def read(self, index: Index) -> np.ndarray:
        rows, columns = (np.arange(part.start, part.stop) for part in index)
        starts = (rows[:, None] + self.weight.above) * self.weight.shape[1] + columns * self.group
        blocks = starts // self.weight.blocksize
        if not blocks.size:
            return np.empty(blocks.shape, np.float32)
        first = int(blocks[0, 0])
        return self.values(self.weight, first, int(blocks[-1, -1]) + 1)[blocks - first]


def scales(weight: QuantisedTensor, first: int, last: int) -> np.ndarray:
    """The scales of some blocks, in float32, with the roundings of bitsandbytes."""
    stored = scale_codes(weight, first, last)
    if weight.kind == "int8":
        return stored.astype(np.float32) * np.float32(1 / 127)
    if weight.nested is None:
        return stored.astype(np.float32)
    table = np.array(weight.nested.values(), np.float32)
    return table[stored] * scales_of_scales(weight, first, last) + np.float32(weight.nested.offset)


def scale_codes(weight: QuantisedTensor, first: int, last: int) -> np.ndarray:
    """What the file has of the scales of some blocks: codes, if they are quantised."""
    return weight.absmax.read((slice(first, last),))


def scales_of_scales(weight: QuantisedTensor, first: int, last: int) -> np.ndarray:
    """By what the quantised scales of some blocks are scaled themselves."""
    assert weight.nested is not None
    outer = np.arange(first, last) // weight.nested.blocksize
    stored = weight.nested.absmax.read((slice(int(outer[0]), int(outer[-1]) + 1),))
    return stored.astype(np.float32)[outer - outer[0]]
