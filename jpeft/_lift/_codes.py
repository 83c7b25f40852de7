"""Quantised weights in the interpreter: codes and scales that views move about, made dense where they are used.

A product with a quantised weight keeps the codes for the backward pass and makes the dense weight anew there
(`recomputed`), so that a scanned stack of layers is never dense as a whole, nor is a layer twice.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from .._partitions import parts_of, placed_along
from .._quantized import Quantized, dense, with_leading
from ._jaxpr import Equation, explicit_sharding, has_effects, run_equation, with_dtype


class NotCodes(Exception):
    """A view that codes and scales do not have as such: it is taken of the dense weight. Its text says why."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Codes:
    """A view of a quantised leaf. casts: what the dense weight goes through before it is used, first to last.

    Casts act on single entries, so that slices of codes may come before them as well as after.
    """

    leaf: Quantized
    casts: tuple[tuple[Any, ...], ...] = dataclasses.field(default=(), metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        return self.leaf.shape

    @property
    def ndim(self) -> int:
        return self.leaf.ndim

    @property
    def dtype(self) -> Any:
        types = [cast[0] for cast in self.casts if len(cast) == 1]
        return types[-1] if types else self.leaf.dtype

    def dense(self) -> jax.Array:
        array = dense(self.leaf)
        for cast in self.casts:
            array = array.astype(cast[0]) if len(cast) == 1 else lax.reduce_precision(array, *cast)
        return array


def is_codes(value: Any) -> bool:
    return isinstance(value, Codes)


def as_array(value: Any) -> Any:
    """A base weight, or anything else, as an array."""
    return value.dense() if is_codes(value) else value


def densified(value: Any) -> Any:
    """Any value of a walk, with dense weights in place of codes."""
    return jax.tree.map(as_array, value, is_leaf=is_codes)


def has_codes(value: Any) -> bool:
    return any(map(is_codes, jax.tree.leaves(value, is_leaf=is_codes)))


def carrier(base: Any) -> Any:
    """The array whose type tells how a base weight is sharded: itself, or its codes."""
    return base.leaf.array.qvalue if is_codes(base) else base


def stand_in(base: Any) -> Any:
    """What a base weight is traced as: itself, or the type of the dense weight."""
    return with_dtype(carrier(base), base.dtype) if is_codes(base) else base


def recomputed(function: Callable[..., Any], *args: Any) -> Any:
    """`function(*args)`; where codes are among the arguments, what it makes of them is made anew in the backward pass.

    `jax.checkpoint` and no derivative rule of our own: forward mode stays, and the memory is the same.
    """
    return jax.checkpoint(function)(*args) if any(map(has_codes, args)) else function(*args)


def consumed(rule: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
    """A rule written for arrays, for codes as well."""

    def on_dense(context: Any, equation: Equation, inputs: list[Any], needed: list[bool]) -> list[Any]:
        if not any(map(has_codes, inputs)):
            return rule(context, equation, inputs, needed)

        def whole(*own: Any) -> list[Any]:
            return rule(context, equation, [densified(value) for value in own], needed)

        return whole(*inputs) if has_effects(equation) else jax.checkpoint(whole)(*inputs)

    return on_dense


def viewed(rule: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
    """A rule for a view, which `moved` takes of codes; where it cannot, the dense weight is made there."""

    def of_codes(context: Any, equation: Equation, inputs: list[Any], needed: list[bool]) -> list[Any]:
        try:
            return rule(context, equation, inputs, needed)
        except NotCodes:
            return rule(context, equation, [densified(value) for value in inputs], needed)

    return of_codes


def moved(equation: Equation, base: Any, *operands: Any) -> Any:
    """The results of a view of one base weight; raises NotCodes where codes have no such view."""
    if not is_codes(base):
        return run_equation(equation, [base, *operands])
    rule = _MOVES.get(equation.primitive.name)
    if rule is None:
        raise NotCodes(equation.primitive.name)
    return [dataclasses.replace(base, **result) for result in rule(equation, base, *operands)]


def put_together(equation: Equation, bases: Sequence[Any]) -> Any:
    """The result of stacking base weights of one form."""
    if not any(map(is_codes, bases)):
        return run_equation(equation, bases)[0]
    forms = [(jax.tree.structure(base), [array.shape for array in jax.tree.leaves(base)]) for base in bases]
    if any(form != forms[0] for form in forms):
        raise NotCodes("forms differ")
    if equation.primitive.name == "stack":
        return jax.tree.map(lambda *arrays: jnp.stack(arrays, equation.params["axis"]), *bases)
    return jax.tree.map(lambda *arrays: lax.concatenate(arrays, equation.params["dimension"]), *bases)


def with_leading_axis(base: Any) -> Any:
    """A base weight all of whose arrays have its leading axis, as a scan takes them."""
    return dataclasses.replace(base, leaf=with_leading(base.leaf)) if is_codes(base) else base


def constrained(base: Any, sharding: Any) -> Any:
    """A sharding constraint, which codes follow and small scales need not."""
    if not is_codes(base):
        return lax.with_sharding_constraint(base, sharding)
    return dataclasses.replace(base, leaf=_with_qvalue(base.leaf, lax.with_sharding_constraint(_codes(base), sharding)))


def divides(base: Any, spec: PartitionSpec, mesh: Any) -> bool:
    """Whether a partition of a base weight cuts between its blocks alone."""
    entries = (*spec, *(None,) * (base.ndim - len(spec)))
    arrays = jax.tree.leaves(base) if is_codes(base) else []
    sizes = [pair for array in arrays for pair in zip(array.shape, entries, strict=True)]
    return all(size == 1 or size % parts_of(entry, mesh) == 0 for size, entry in sizes)


def specs_like(base: Any, spec: PartitionSpec) -> Any:
    """The partition of a base weight's arrays that fits a partition of the weight: axes of size 1 are whole."""
    if not is_codes(base):
        return spec
    entries = (*spec, *(None,) * (base.ndim - len(spec)))

    def own(array: Any) -> PartitionSpec:
        return PartitionSpec(*(None if size == 1 else entry for size, entry in zip(array.shape, entries, strict=True)))

    return jax.tree.map(own, base)


def _codes(base: Codes) -> jax.Array:
    return base.leaf.array.qvalue


def _with_qvalue(leaf: Quantized, qvalue: jax.Array) -> Quantized:
    return dataclasses.replace(leaf, array=dataclasses.replace(leaf.array, qvalue=qvalue))


def _each(base: Codes, change: Callable[[jax.Array], jax.Array], *, reordered: bool = False) -> list[dict[str, Any]]:
    """reordered: whether the last axes are others than before."""
    leaf = jax.tree.map(change, base.leaf)
    return [{"leaf": dataclasses.replace(leaf, gather=None) if reordered else leaf}]


def _same(equation: Equation, base: Codes) -> list[dict[str, Any]]:
    return [{}]


def _convert(equation: Equation, base: Codes) -> list[dict[str, Any]]:
    return [{"casts": (*base.casts, (equation.params["new_dtype"],))}]


def _reduce_precision(equation: Equation, base: Codes) -> list[dict[str, Any]]:
    return [{"casts": (*base.casts, (equation.params["exponent_bits"], equation.params["mantissa_bits"]))}]


def _constraint(equation: Equation, base: Codes) -> list[dict[str, Any]]:
    return [{"leaf": _with_qvalue(base.leaf, run_equation(equation, [_codes(base)])[0])}]


def _resharded(equation: Equation, base: Codes) -> list[dict[str, Any]]:
    codes = run_equation(equation, [_codes(base)])[0]
    sharding = explicit_sharding(codes)
    if sharding is None:
        raise NotCodes("axes that are explicit no more")
    # Where a mesh axis would cut through a block, scales are whole.
    leaf = jax.tree.map(lambda array: jax.sharding.reshard(array, placed_along(sharding, array)), base.leaf)
    return [{"leaf": _with_qvalue(leaf, codes)}]


def _transpose(equation: Equation, base: Codes) -> list[dict[str, Any]]:
    return _each(base, lambda array: lax.transpose(array, equation.params["permutation"]), reordered=True)


def _squeeze(equation: Equation, base: Codes) -> list[dict[str, Any]]:
    axes = equation.params["dimensions"]
    return _each(base, lambda array: lax.squeeze(array, axes), reordered=set(axes) != set(range(len(axes))))


def _broadcast(equation: Equation, base: Codes) -> list[dict[str, Any]]:
    if explicit_sharding(_codes(base)) is not None:
        raise NotCodes("a broadcast of sharded arrays")
    shape, kept = equation.params["shape"], equation.params["broadcast_dimensions"]

    def change(array: jax.Array) -> jax.Array:
        # New axes are of size 1 in scales; in the codes they are what they are in the weight.
        sizes = [shape[axis] if array is _codes(base) else 1 for axis in range(len(shape))]
        for position, axis in enumerate(kept):
            sizes[axis] = array.shape[position]
        return lax.broadcast_in_dim(array, sizes, kept)

    return _each(base, change, reordered=True)


def _reshape(equation: Equation, base: Codes) -> list[dict[str, Any]]:
    if equation.params["dimensions"] is not None or explicit_sharding(_codes(base)) is not None:
        raise NotCodes("a reshape of sharded arrays, or one that transposes")
    new = equation.params["new_sizes"]
    return _each(base, lambda array: lax.reshape(array, _reshaped(base.shape, new, array.shape)), reordered=True)


def _reshaped(old: Sequence[int], new: Sequence[int], own: Sequence[int]) -> list[int]:
    """What the sizes of scales become when the weight's `old` sizes become `new`; raises NotCodes for blocks cut up."""
    blocks = [size // count for size, count in zip(old, own, strict=True)]
    counts: list[int] = []
    # Axes of the weight, last first; what is left of the one at hand, and of its blocks.
    rest = list(zip(old, blocks, strict=True))
    size, block = 1, 1
    for wanted in reversed(new):
        left, taken_block = wanted, 1
        while left > 1:
            while size == 1:
                size, block = rest.pop()
            step = min(size, left)
            if size % step or left % step:
                raise NotCodes("a reshape across axes")
            own_block = min(block, step)
            # Only whole axes below may lie in a block that goes on above.
            if step % own_block or block % own_block or (own_block > 1 and taken_block != wanted // left):
                raise NotCodes("a reshape that cuts blocks up")
            taken_block *= own_block
            size, block, left = size // step, block // own_block, left // step
        counts.append(wanted // taken_block)
    return counts[::-1]


def _slice(equation: Equation, base: Codes) -> list[dict[str, Any]]:
    params = equation.params
    strides = params["strides"] or (1,) * base.ndim
    ranges = list(zip(params["start_indices"], params["limit_indices"], strides, strict=True))

    def change(array: jax.Array) -> jax.Array:
        own = [_own_range(*cut, size, count) for cut, size, count in zip(ranges, base.shape, array.shape, strict=True)]
        return lax.slice(array, *zip(*own, strict=True))

    return _each(base, change)


def _own_range(start: int, limit: int, stride: int, size: int, count: int) -> tuple[int, int, int]:
    """The slice of an axis of `count` scales for a slice of the weight's axis."""
    block = size // count
    if count == 1:
        return 0, 1, 1
    if block == 1:
        return start, limit, stride
    if stride != 1 or start % block or limit % block:
        raise NotCodes("a slice that cuts blocks up")
    return start // block, limit // block, 1


def _dynamic_slice(equation: Equation, base: Codes, *starts: Any) -> list[dict[str, Any]]:
    sizes = equation.params["slice_sizes"]

    def change(array: jax.Array) -> jax.Array:
        own_starts, own_sizes = [], []
        for start, wanted, size, count in zip(starts, sizes, base.shape, array.shape, strict=True):
            if count not in (1, size) and wanted != size:
                raise NotCodes("a slice that may cut blocks up")
            own_starts.append(start if count == size else jnp.zeros_like(start))
            own_sizes.append(wanted if count == size else count)
        return lax.dynamic_slice(array, own_starts, own_sizes)

    return _each(base, change)


def _unstack(equation: Equation, base: Codes) -> list[dict[str, Any]]:
    axis, count = equation.params["axis"], base.shape[equation.params["axis"]]

    def at(index: int) -> Callable[[jax.Array], jax.Array]:
        return lambda array: lax.index_in_dim(array, index // (count // array.shape[axis]), axis, keepdims=False)

    return [{"leaf": jax.tree.map(at(index), base.leaf)} for index in range(count)]


_MOVES: dict[str, Callable[..., list[dict[str, Any]]]] = {
    **dict.fromkeys(("copy", "copy_p", "device_put", "name"), _same),
    "sharding_constraint": _constraint,
    **dict.fromkeys(("mesh_cast", "reshard"), _resharded),
    "convert_element_type": _convert,
    "reduce_precision": _reduce_precision,
    "transpose": _transpose,
    "squeeze": _squeeze,
    "broadcast_in_dim": _broadcast,
    "reshape": _reshape,
    "slice": _slice,
    "dynamic_slice": _dynamic_slice,
    "unstack": _unstack,
}
