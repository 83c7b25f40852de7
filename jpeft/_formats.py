"""The number formats of quantised weights: from an array to codes and scales, block by block."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ._quantized import NF4, Quantized, by_blocks

F32 = jnp.float32


@dataclasses.dataclass(frozen=True)
class Format:
    """qtype: qwix's name of the codes. block: numbers to a scale along the input, None: all. double: scales, too."""

    qtype: Any
    block: int | None
    double: bool


FORMATS: Mapping[str, Format] = {
    "int8": Format(jnp.int8, None, False),
    "int4": Format(jnp.int4, 64, False),
    "nf4": Format("nf4", 64, True),
    "fp8": Format(jnp.float8_e4m3fn, None, False),
}

SCALES = 256
"""To a block of doubly quantised scales."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """How an array is quantised. scale, inner, offset: the shapes of its scales, and doubly quantised of theirs."""

    qtype: Any
    dtype: Any
    scale: tuple[int, ...]
    inner: tuple[int, ...] | None = None
    offset: tuple[int, ...] | None = None
    table: tuple[float, ...] | None = None
    scale_table: tuple[float, ...] | None = None


def plan_of(leaf: Quantized) -> Plan:
    """How a leaf was quantised."""
    scale, double = leaf.array.scale, hasattr(leaf.array.scale, "qvalue")
    return Plan(
        qtype=leaf.array.qtype,
        dtype=leaf.dtype,
        scale=tuple(scale.shape),
        inner=tuple(scale.scale.shape) if double else None,
        offset=None if leaf.offset is None else tuple(leaf.offset.shape),
        table=leaf.table,
        scale_table=leaf.scale_table,
    )


def encoded(array: jax.Array, plan: Plan) -> Quantized:
    """An array quantised; raises ImportError if qwix, which holds what comes out, is not installed."""
    values = array.astype(F32)
    table = NF4 if plan.qtype == "nf4" and plan.table is None else plan.table
    codes = _codes(values, plan.qtype, table, plan.scale)
    scale, offset = codes.scale, None
    if plan.inner is not None:
        if plan.offset is not None:
            offset = over_blocks(jnp.mean, scale, plan.offset)
            scale = by_blocks(jnp.subtract, scale, offset)
        scale = _codes(scale, jnp.int8, plan.scale_table, plan.inner)
    return Quantized(dataclasses.replace(codes, scale=scale), plan.dtype, offset, plan.table, plan.scale_table)


def _codes(values: jax.Array, qtype: Any, table: tuple[float, ...] | None, counts: tuple[int, ...]) -> Any:
    """A QArray of float32 values with as many scales along each axis as counts says."""
    qwix = imported_qwix()
    if table is None:
        tiles = {axis: size // count for axis, (size, count) in enumerate(zip(values.shape, counts, strict=True))}
        array = qwix.quantize(values, qtype, tiled_axes=tiles, scale_dtype=F32)
        return dataclasses.replace(array, qtype=array.qvalue.dtype)
    # Not by qwix, which makes one long array of it, whatever its sharding.
    largest = over_blocks(lambda blocks, axis: jnp.abs(blocks).max(axis), values, counts)
    scale = jnp.where(largest > 0, largest, 1) / max(map(abs, table))
    codes = _nearest(by_blocks(jnp.divide, values, scale), table)
    return qwix.QArray(codes, scale, None, codes.dtype if qtype is None else qtype)


def _nearest(values: jax.Array, table: tuple[float, ...]) -> jax.Array:
    """The indices of the entries of a table that are nearest to values, of two that are as near the lower one."""
    order = np.argsort(np.asarray(table), kind="stable")
    rising = np.asarray(table)[order]
    middles = ((rising[1:] + rising[:-1]) / 2).astype(np.float32)
    small = len(table) <= 16
    dtype = jnp.uint4 if small else jnp.uint8
    if small:
        places = sum((values > middle).astype(jnp.int32) for middle in middles)
    else:
        places = jnp.searchsorted(jnp.asarray(middles), values)
    if (order == np.arange(len(table))).all():
        return jnp.asarray(places).astype(dtype)
    return jnp.asarray(order, jnp.int32)[places].astype(dtype)


def over_blocks(function: Any, array: jax.Array, counts: Sequence[int]) -> jax.Array:
    """`function(blocks, axis=...)` of each block: an array of shape `counts`."""
    split = [part for size, count in zip(array.shape, counts, strict=True) for part in (count, size // count)]
    return function(array.reshape(split), axis=tuple(range(1, len(split), 2)))


def double_plan(plan: Plan, order: Sequence[int], stack: Sequence[int]) -> Plan:
    """The plan with scales in 8 bits, in blocks over the axes in this order; offsets for each of a stack."""
    tiles = dict.fromkeys(range(len(plan.scale)), 1)
    room = SCALES
    for axis in order:
        tiles[axis] = max(divisor for divisor in divisors(plan.scale[axis]) if divisor <= room)
        room //= tiles[axis]
    inner = tuple(size // tiles[axis] for axis, size in enumerate(plan.scale))
    offset = tuple(size if axis in stack else 1 for axis, size in enumerate(plan.scale))
    return dataclasses.replace(plan, inner=inner, offset=offset)


def divisors(size: int) -> list[int]:
    """
    >>> divisors(12)
    [1, 2, 3, 4, 6, 12]
    """
    low = [divisor for divisor in range(1, math.isqrt(size) + 1) if size % divisor == 0]
    return sorted({*low, *(size // divisor for divisor in low)})


def imported_qwix() -> Any:
    try:
        import qwix
    except ImportError as error:
        raise ImportError(
            "quantised weights are kept in qwix's arrays, and qwix is not installed; expected "
            "`pip install 'jpeft[quantize]'`"
        ) from error
    return qwix
