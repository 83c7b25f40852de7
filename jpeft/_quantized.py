"""The leaf that stands for a quantised weight: codes, their scales, and the dense weight that they mean."""

import dataclasses
import functools
import math
from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec

from ._partitions import axis_names, placed_along

# The 4-bit normal floats (https://arxiv.org/abs/2305.14314, appendix E), as the paper's own code rounds them.
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Quantized:
    """A quantised weight, which stands where a leaf of the base tree stood; `jpeft.quantize` makes them.

    array: a `qwix.QArray`. Its `qvalue` holds the codes in the dense shape. Its `scale` has as many axes, of sizes that
    divide the dense ones: one scale for each block. Doubly quantised, the scale is a `QArray` of its own.
    dtype (static): of the dense weight.
    offset: of doubly quantised scales, what is added to them once they are dequantised; shaped to broadcast by blocks.
    table, scale_table (static): what the codes of the weight and of its scales stand for, as indices, if their qtype
    ("nf4", int8, ...) does not say it.
    gather (static): how the last axes of the codes are split, as a PartitionSpec, where the dense weight is made of
    them; None leaves it to the compiler. It counts on a mesh whose axes are all `Auto`.
    The weight is `((table[codes] - zero point) * scale).astype(dtype)`. Codes of four bits take half a byte each on
    devices; `.nbytes` of such an array says one.

    >>> import jax, jpeft
    >>> params = {"dense": {"kernel": jax.random.normal(jax.random.key(0), (128, 8))}}
    >>> leaf = jpeft.quantize(params, "nf4")["dense"]["kernel"]
    >>> leaf.shape, leaf.array.qvalue.dtype, leaf.array.scale.shape
    ((128, 8), dtype(uint4), (2, 8))
    """

    array: Any
    dtype: Any = dataclasses.field(metadata={"static": True})
    offset: Any = None
    table: tuple[float, ...] | None = dataclasses.field(default=None, metadata={"static": True})
    scale_table: tuple[float, ...] | None = dataclasses.field(default=None, metadata={"static": True})
    gather: PartitionSpec | None = dataclasses.field(default=None, metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.array.qvalue.shape)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def sharding(self) -> Any:
        """Of the codes; None where they have none, such as abstract ones."""
        return getattr(self.array.qvalue, "sharding", None)


def is_quantized(value: Any) -> bool:
    return isinstance(value, Quantized)


def is_abstract(leaf: Any) -> bool:
    """Whether a leaf, quantised or not, has shapes and no values."""
    return any(isinstance(array, jax.ShapeDtypeStruct) for array in jax.tree.leaves(leaf))


@functools.partial(jax.jit, inline=True)
def dense(leaf: Quantized) -> jax.Array:
    """The weight that a quantised leaf stands for, sharded as its codes; no gradient reaches its scales."""
    leaf = jax.tree.map(lax.stop_gradient, leaf)
    sharding = jax.typeof(leaf.array.qvalue).sharding
    explicit = sharding.mesh.explicit_axes
    if not explicit:
        return _dense(leaf)
    # Axes in the types of arrays: the compiler sees to blocks that meet the edges of shards.
    computed: Any = jax.sharding.auto_axes(_dense, axes=explicit, out_sharding=sharding)
    return computed(leaf)


def as_dense(leaf: Any) -> Any:
    """A leaf, quantised or not and abstract or not, as the weight that it stands for."""
    if not is_quantized(leaf):
        return leaf
    if is_abstract(leaf):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
    return dense(leaf)


def gathered_over(leaf: Quantized, axes: Collection[str]) -> Quantized:
    """The leaf whose codes are brought together over these mesh axes before they are made dense.

    What devices exchange is then codes, and no weights. A leaf that lies on no mesh stays as it is, and so does one
    under `jit`, of which that is not known.
    """
    sharding = None if isinstance(leaf.array.qvalue, Tracer) else leaf.sharding
    if not axes or not isinstance(sharding, NamedSharding):
        return leaf
    entries = (*sharding.spec, *(None,) * (leaf.ndim - len(sharding.spec)))
    kept = [tuple(name for name in axis_names(entry) if name not in axes) for entry in entries]
    return dataclasses.replace(leaf, gather=PartitionSpec(*(names or None for names in kept)))


def _brought_together(leaf: Quantized) -> Quantized:
    mesh = jax.typeof(leaf.array.qvalue).sharding.mesh
    if leaf.gather is None or mesh.empty or not mesh.are_all_axes_auto:
        return leaf
    # Of a layer of a stack, the axes that are left.
    entries = tuple(leaf.gather)[len(leaf.gather) - leaf.ndim :]
    if len(entries) != leaf.ndim or not {name for entry in entries for name in axis_names(entry)} <= {*mesh.axis_names}:
        return leaf
    together = NamedSharding(mesh, PartitionSpec(*entries))
    return jax.tree.map(lambda array: lax.with_sharding_constraint(array, placed_along(together, array)), leaf)


def _dense(leaf: Quantized) -> jax.Array:
    leaf = _brought_together(leaf)
    scale = _scale(leaf.array.scale, leaf.offset, leaf.scale_table)
    values = _values(leaf.array, leaf.table, scale.dtype)
    return by_blocks(jnp.multiply, values, scale).astype(leaf.dtype)


def _scale(scale: Any, offset: Any, table: tuple[float, ...] | None) -> jax.Array:
    if isinstance(scale, jax.Array):
        return scale
    values = by_blocks(jnp.multiply, _values(scale, table, scale.scale.dtype), scale.scale)
    return values if offset is None else by_blocks(jnp.add, values, offset)


def _values(array: Any, table: tuple[float, ...] | None, dtype: Any) -> jax.Array:
    """What the codes stand for before they are scaled."""
    if table is None and array.qtype == "nf4":
        table = NF4
    values = array.qvalue.astype(dtype) if table is None else _looked_up(array.qvalue, table, dtype)
    if array.zero_point is None:
        return values
    return by_blocks(jnp.subtract, values, array.zero_point.astype(dtype))


def _looked_up(codes: jax.Array, table: tuple[float, ...], dtype: Any) -> jax.Array:
    """The entries of a table at codes; on TPUs, whose gathers are slow, of a small table by choices."""
    codes = codes.astype(jnp.int32)
    taken = functools.partial(_gathered, table=table, dtype=dtype)
    if len(table) != 16:
        return taken(codes)
    return lax.platform_dependent(codes, tpu=functools.partial(_chosen, table=table, dtype=dtype), default=taken)


def _gathered(codes: jax.Array, table: tuple[float, ...], dtype: Any) -> jax.Array:
    return jnp.take(jnp.asarray(table, dtype), codes, mode="clip")


def _chosen(codes: jax.Array, table: tuple[float, ...], dtype: Any) -> jax.Array:
    """Bit by bit: half of the values are left after each."""
    values: list[Any] = [jnp.asarray(value, dtype) for value in table]
    for bit in range(4):
        odd = (codes & (1 << bit)) != 0
        values = [jnp.where(odd, high, low) for low, high in zip(values[::2], values[1::2], strict=True)]
    return values[0]


def by_blocks(function: Callable[[jax.Array, jax.Array], jax.Array], x: jax.Array, scale: jax.Array) -> jax.Array:
    """`function` of an array and of another whose sizes divide its own, each entry of which is for a block.

    >>> by_blocks(jnp.multiply, jnp.ones((4, 2)), jnp.asarray([[1.0], [5.0]]))[:, 0].tolist()
    [1.0, 1.0, 5.0, 5.0]
    """
    if all(own in (1, size) for own, size in zip(scale.shape, x.shape, strict=True)):
        return function(x, scale)
    split = [(size, 1) if own == size else (own, size // own) for own, size in zip(scale.shape, x.shape, strict=True)]
    blocks = x.reshape([part for pair in split for part in pair])
    return function(blocks, scale.reshape([part for own in scale.shape for part in (own, 1)])).reshape(x.shape)


def taken(leaf: Quantized, index: Any) -> Quantized:
    """One entry of the leading axis, codes and scales; index: an integer, traced or not."""
    count = leaf.shape[0]
    return jax.tree.map(lambda array: array[index // (count // array.shape[0])], leaf)


def with_leading(leaf: Quantized) -> Quantized:
    """The same leaf with scales of their own for each entry of the leading axis, so that all arrays have that axis."""
    count = leaf.shape[0]
    return jax.tree.map(
        lambda array: array if array.shape[0] == count else jnp.repeat(array, count // array.shape[0], axis=0), leaf
    )
