"""Quantised weights of a checkpoint as `jpeft.Quantized` leaves: codes and scales laid out as the parameter is."""

from dataclasses import replace
from math import gcd
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from jpeft._formats import imported_qwix
from jpeft._partitions import placed_along
from jpeft._quantized import Quantized

from ._assembly import Pieced, place
from ._parameters import Piece
from ._pieces import filled
from ._quantised_tensor import (
    TABLES,
    Codes,
    QuantisedTensor,
    Scales,
    Values,
    scale_codes,
    scales,
    scales_of_scales,
)
from ._tensors import READABLE

Weights = tuple[tuple[Piece, QuantisedTensor], ...]
"""The pieces of a parameter, all of which are quantised."""


def all_quantised(shape: tuple[int, ...], pieces: Pieced) -> tuple[Weights, str]:
    """The pieces, if the parameter can be a quantised leaf; else none, and why not, unless none is quantised at all."""
    weights = tuple((piece, tensor) for piece, tensor in pieces if isinstance(tensor, QuantisedTensor))
    if not weights:
        return (), ""
    if len(weights) < len(pieces):
        dense = next(piece.name for piece, tensor in pieces if not isinstance(tensor, QuantisedTensor))
        return (), f"{dense} is not quantised, unlike {weights[0][0].name}"
    if len(ways := {(tensor.kind, tensor.dtype) for _, tensor in weights}) > 1:
        return (), f"its tensors are quantised in several ways, {sorted(ways)}"
    axes = {_input_axis(piece) for piece, _ in weights}
    if len(axes) > 1 or any(filled(piece, shape)[axis].step > 1 for piece, _ in weights for axis in axes):
        return (), "the rows of its tensors do not lie along one axis"
    group, first = _group(shape, weights, axes.pop()), weights[0][1]
    bits = 8 * np.dtype(READABLE[first.dtype]).itemsize
    if (8 if first.kind == "int8" else 4) + 32 / group >= bits:
        return (), (
            f"rows of {first.shape[1]} in blocks of {first.blocksize} need a scale for each {group} numbers, with "
            f"which it would be no smaller than in {bits} bits"
        )
    return weights, ""


def _input_axis(piece: Piece) -> int:
    """The axis of the parameter along which the rows of a piece's tensor lie."""
    sliced = [axis for axis, at in enumerate(piece.index) if isinstance(at, slice)]
    return sliced[piece.axes.index(1)]


def _group(shape: tuple[int, ...], weights: Weights, axis: int) -> int:
    """How many neighbours along the input axis always have one scale."""
    spans = [filled(piece, shape)[axis] for piece, _ in weights]
    return gcd(*(weight.group for _, weight in weights), *(edge for span in spans for edge in (span.start, span.stop)))


def quantised_leaf(shape: tuple[int, ...], weights: Weights, dtype: Any, sharding: NamedSharding | None) -> Quantized:
    """The leaf of a parameter, from what `all_quantised` gives; `dtype` is that of the weight it stands for."""
    QArray = imported_qwix().QArray
    axis, kind = _input_axis(weights[0][0]), weights[0][1].kind
    group = _group(shape, weights, axis)

    def blocks(size: int, values: Values, type_: Any) -> jax.Array:
        """What `values` gives for groups of this size."""
        sizes = (*shape[:axis], shape[axis] // size, *shape[axis + 1 :])
        pieces = tuple((_by_groups(p, axis, size, shape), Scales(w, size, values)) for p, w in weights)
        return place(pieces, sizes, type_, placed_along(sharding, jax.ShapeDtypeStruct(sizes, type_)))

    codes = tuple((piece, Codes(weight)) for piece, weight in weights)
    if kind == "int8":
        return Quantized(QArray(place(codes, shape, jnp.int8, sharding), blocks(group, scales, np.float32)), dtype)
    qvalue = place(codes, shape, jnp.uint4, sharding, np.uint8)
    qtype, table = ("nf4", None) if kind == "nf4" else (jnp.uint4, tuple(map(float, TABLES[kind])))
    outer, scale_table = _doubly(weights, group)
    if scale_table is None:
        return Quantized(QArray(qvalue, blocks(group, scales, np.float32), None, qtype), dtype, None, table)
    scale: Any = QArray(blocks(group, scale_codes, np.uint8), blocks(outer, scales_of_scales, np.float32))
    return Quantized(QArray(qvalue, scale, None, qtype), dtype, _offsets(shape, weights, sharding), table, scale_table)


def _by_groups(piece: Piece, axis: int, size: int, shape: tuple[int, ...]) -> Piece:
    """A piece of the parameter as one of its scales, each of which is for `size` positions along an axis."""
    span = filled(piece, shape)[axis]
    groups = slice(span.start // size, span.stop // size)
    return replace(piece, index=(*piece.index[:axis], groups, *piece.index[axis + 1 :]))


def _doubly(weights: Weights, group: int) -> tuple[int, tuple[float, ...] | None]:
    """How many neighbours have one scale of their scales, and what codes of scales stand for.

    No table, unless keeping the scales as they are, quantised, is exact and smaller than to dequantise them.
    """
    nested = [weight.nested for _, weight in weights if weight.nested is not None and weight.blocksize == group]
    whole = all(at == slice(None) for piece, _ in weights for at in piece.index if isinstance(at, slice))
    tables = {one.values() for one in nested}
    if not whole or len(nested) < len(weights) or len(tables) > 1:
        return group, None
    together = gcd(weights[0][1].shape[1] // group, *(one.blocksize for one in nested))
    return group * together, tables.pop() if together > 1 else None


def _offsets(shape: tuple[int, ...], weights: Weights, sharding: NamedSharding | None) -> jax.Array:
    """The offset of each piece's scales, shaped to go with them."""
    sizes = [1 if isinstance(at, slice) else size for at, size in zip(weights[0][0].index, shape, strict=True)]
    values = np.empty(sizes, np.float32)
    for piece, weight in weights:
        if weight.nested is not None:
            values[piece.index] = weight.nested.offset
    return jax.device_put(values, placed_along(sharding, values))
