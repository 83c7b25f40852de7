"""Putting a parameter together from pieces of a checkpoint, where its sharding wants it."""

from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from ._parameters import Piece
from ._pieces import Part, overlap
from ._tensors import Source, aligned, copy

Pieced = tuple[tuple[Piece, Source], ...]
"""The pieces of a parameter, and what each is read from."""


def place(
    pieces: Pieced, shape: tuple[int, ...], dtype: Any, sharding: NamedSharding | None, stored: Any = None
) -> jax.Array:
    """An array of this shape, of which each process reads what its devices hold.

    `stored`: the type in which it is put together, of as many bytes as `dtype`, which is then only another name for it.
    """
    dtype = np.dtype(dtype)
    parts: dict[Part, np.ndarray] = {}

    def read(index: Any) -> np.ndarray:
        part = tuple(range(size)[at] for size, at in zip(shape, index, strict=True))
        if part not in parts:  # Several devices may hold the same part.
            parts[part] = _assemble(pieces, shape, part, np.dtype(stored or dtype)).view(dtype)
        return parts[part]

    if sharding is None:
        array = jax.device_put(read((slice(None),) * len(shape)))
    else:
        array = jax.make_array_from_callback(shape, sharding, read, dtype=dtype)
    # Else the buffers of many leaves would wait in the host's memory for their turn.
    return jax.block_until_ready(array)


def _assemble(pieces: Pieced, shape: tuple[int, ...], part: Part, dtype: np.dtype) -> np.ndarray:
    """A part of a leaf, put together from what of each tensor lies in it."""
    buffer = aligned(tuple(len(positions) for positions in part), dtype)
    for piece, source in pieces:
        if (common := overlap(piece, shape, part)) is not None:
            theirs, ours = common
            copy(source, theirs, buffer[(*ours, ...)].transpose(np.argsort(piece.axes)))
    return buffer
