"""Rules for operations that only move a weight about: the adapted weight moves with it."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .._config import FrozenMapping
from .._contract import EMBEDDING, INPUT, STACK
from ._codes import carrier, moved, put_together, viewed
from ._jaxpr import Equation, beside, make_varying, run_equation
from ._record import LOOKUP
from ._walk import Context, Rule
from ._weight import (
    REPEATED,
    AdaptedWeight,
    Axis,
    Term,
    Unsupported,
    drop,
    is_adapted,
    materialize,
    narrow,
    split_axis,
)


def _weight_of(inputs: list[Any]) -> AdaptedWeight:
    if any(is_adapted(value) for value in inputs[1:]) or not is_adapted(inputs[0]):
        raise Unsupported("the weight is not the operand")
    return inputs[0]


def _run(equation: Equation, weight: AdaptedWeight, inputs: list[Any]) -> Any:
    return moved(equation, weight.base, *inputs[1:])[0]


def same(context: Context, equation: Equation, inputs: list[Any], needed: list[bool]) -> list[Any]:
    """Casts, copies and constraints on the weight: the base alone takes part."""
    weight = _weight_of(inputs)
    return [weight.with_base(_run(equation, weight, inputs))]


def resharded(context: Context, equation: Equation, inputs: list[Any], needed: list[bool]) -> list[Any]:
    """The base is sharded anew; the arrays of the terms move only if the types of the mesh's axes change."""
    (weight,) = same(context, equation, inputs, needed)
    return [weight.map_terms(lambda term: jax.tree.map(lambda array: beside(array, carrier(weight.base)), term))]


def convert(context: Context, equation: Equation, inputs: list[Any], needed: list[bool]) -> list[Any]:
    codes = is_adapted(inputs[0]) and inputs[0].scaled is False
    if not codes and not jnp.issubdtype(equation.params["new_dtype"], jnp.floating):
        raise Unsupported("cast to a type that is not floating")
    return same(context, equation, inputs, needed)


def stop_gradient(context: Context, equation: Equation, inputs: list[Any], needed: list[bool]) -> list[Any]:
    return [jax.tree.map(lax.stop_gradient, inputs[0])]


def optimization_barrier(context: Context, equation: Equation, inputs: list[Any], needed: list[bool]) -> list[Any]:
    return list(lax.optimization_barrier(tuple(inputs)))


def pvary(context: Context, equation: Equation, inputs: list[Any], needed: list[bool]) -> list[Any]:
    return jax.tree.map(lambda array: make_varying(array, equation.params["axes"]), inputs)


def scale(context: Context, equation: Equation, inputs: list[Any], needed: list[bool]) -> list[Any]:
    """A quantised leaf times its scale is the weight; the terms act on that, the base alone takes part."""
    weight, base = _dequantised(equation, inputs)
    if weight.scaled and weight.terms:
        raise ValueError(
            f"{weight.leaf!r} is quantised and multiplied twice, so that it does not show which of the two makes the "
            "weight that the adapter acts on; expected one scale: multiply the scales with each other first"
        )
    return [dataclasses.replace(weight, base=base, scaled=True)]


def shift(context: Context, equation: Equation, inputs: list[Any], needed: list[bool]) -> list[Any]:
    """The zero point of a quantised leaf."""
    weight, base = _dequantised(equation, inputs)
    return [weight.with_base(base)]


def _dequantised(equation: Equation, inputs: list[Any]) -> tuple[AdaptedWeight, jax.Array]:
    """The quantised leaf among two operands of its shape, and what becomes of its base."""
    first, second = inputs
    weight = first if is_adapted(first) else second
    reverse = equation.primitive.name in ("sub", "div") and weight is second
    if weight.scaled is None or reverse or (is_adapted(first) and is_adapted(second)):
        raise Unsupported("no rule")
    base = run_equation(equation, [value.base if is_adapted(value) else value for value in inputs])[0]
    if base.shape != weight.base.shape:
        raise Unsupported("no rule")
    return weight, base


def transpose(context: Context, equation: Equation, inputs: list[Any], needed: list[bool]) -> list[Any]:
    weight = _weight_of(inputs)
    axes = (weight.axes[index] for index in equation.params["permutation"])
    return [weight.with_base(_run(equation, weight, inputs), axes)]


def squeeze(context: Context, equation: Equation, inputs: list[Any], needed: list[bool]) -> list[Any]:
    weight, gone = _weight_of(inputs), equation.params["dimensions"]
    base = _run(equation, weight, inputs)
    for axis in (axis for position in gone for axis in weight.axes[position]):
        context.record.role(weight, axis, STACK)
        weight = drop(weight, axis)
    return [weight.with_base(base, (group for index, group in enumerate(weight.axes) if index not in gone))]


def expand_dims(context: Context, equation: Equation, inputs: list[Any], needed: list[bool]) -> list[Any]:
    weight, new = _weight_of(inputs), equation.params["dimensions"]
    old = iter(weight.axes)
    ndim = len(weight.axes) + len(new)
    return [
        weight.with_base(_run(equation, weight, inputs), (() if index in new else next(old) for index in range(ndim)))
    ]


def _fresh(weights: list[AdaptedWeight], role: str, size: int) -> Axis:
    """A new axis that comes before every axis that the weights or their leaves have."""
    first = min((axis.place[0] for weight in weights for axis in weight.flat_axes), default=0)
    return Axis(role, (min(first, 0) - 1,), size)


def broadcast_in_dim(context: Context, equation: Equation, inputs: list[Any], needed: list[bool]) -> list[Any]:
    weight = _weight_of(inputs)
    shape, kept = equation.params["shape"], equation.params["broadcast_dimensions"]
    axes: list[tuple[Axis, ...]] = []
    fresh = weight
    for index, size in enumerate(shape):
        source = kept.index(index) if index in kept else None
        if source is not None and weight.base.shape[source] == size:
            axes.append(weight.axes[source])
        elif source is not None:
            raise Unsupported("broadcast of an axis of size 1")
        else:
            new = () if size == 1 else (_fresh([fresh], REPEATED, size),)
            fresh = fresh.with_base(fresh.base, (*fresh.axes, new))
            axes.append(new)
    return [weight.with_base(_run(equation, weight, inputs), axes)]


def reshape(context: Context, equation: Equation, inputs: list[Any], needed: list[bool]) -> list[Any]:
    weight = _weight_of(inputs)
    if equation.params["dimensions"] is not None:
        raise Unsupported("reshape that transposes")
    shape = equation.params["new_sizes"]
    # The leaf's axes in order are dealt out to the new axes; one that straddles two of them is split first.
    groups: list[tuple[Axis, ...]] = []
    rest = list(weight.flat_axes)
    for size in shape:
        group: list[Axis] = []
        left = size
        while left > 1:
            while rest and rest[0].size == 1:
                group.append(rest.pop(0))
            axis = rest.pop(0)
            if left % axis.size == 0:
                group.append(axis)
                left //= axis.size
                continue
            if axis.size % left:
                raise Unsupported("reshape across axes of the weight")
            parts = (left, axis.size // left)
            weight = split_axis(weight, axis, parts)
            first, second = (Axis(axis.role, (*axis.place, index), part) for index, part in enumerate(parts))
            group.append(first)
            rest.insert(0, second)
            left = 1
        if size == 1 and rest and rest[0].size == 1:
            group.append(rest.pop(0))
        groups.append(tuple(group))
    if rest and groups:
        groups[-1] = (*groups[-1], *rest)
    elif rest:
        raise Unsupported("reshape to a scalar")
    return [weight.with_base(_run(equation, weight, inputs), groups)]


def slice_(context: Context, equation: Equation, inputs: list[Any], needed: list[bool]) -> list[Any]:
    weight, params = _weight_of(inputs), equation.params
    base = _run(equation, weight, inputs)
    strides = params["strides"] or (1,) * base.ndim
    for position, (start, limit, stride) in enumerate(
        zip(params["start_indices"], params["limit_indices"], strides, strict=True)
    ):
        if (start, limit, stride) == (0, weight.base.shape[position], 1):
            continue
        axis = weight.single(position, "slice of axes that were reshaped together")
        cut = _cut(start, limit, stride)
        weight = narrow(weight, axis, base.shape[position], cut)
    return [weight.with_base(base)]


def _cut(start: int, limit: int, stride: int) -> Any:
    return lambda array, at: lax.slice_in_dim(array, start, limit, stride, at)


def dynamic_slice(context: Context, equation: Equation, inputs: list[Any], needed: list[bool]) -> list[Any]:
    """A layer or expert at a traced index; of a lookup table it is the lookup of one row."""
    weight = _weight_of(inputs)
    base = _run(equation, weight, inputs)
    for position, (start, size) in enumerate(zip(inputs[1:], equation.params["slice_sizes"], strict=True)):
        if size == weight.base.shape[position]:
            continue
        axis = weight.single(position, "slice of axes that were reshaped together")
        weight = narrow(weight, axis, size, _dynamic_cut(start, size))
    weight = weight.with_base(base)
    if _is_row(weight):
        context.use(weight, LOOKUP, equation)
        return [materialize(weight)]
    return [weight]


def _is_row(weight: AdaptedWeight) -> bool:
    tables = weight.terms and all(term.site.kind == EMBEDDING for term in weight.terms)
    return bool(tables) and all(axis.size == 1 for axis in weight.flat_axes if axis.role == INPUT)


def _dynamic_cut(start: Any, size: int) -> Any:
    return lambda array, at: lax.dynamic_slice_in_dim(array, start, size, at)


def split(context: Context, equation: Equation, inputs: list[Any], needed: list[bool]) -> list[Any]:
    weight, position = _weight_of(inputs), equation.params["axis"]
    axis = weight.single(position, "split of axes that were reshaped together")
    parts, start = [], 0
    for base in moved(equation, weight.base):
        size = base.shape[position]
        parts.append(narrow(weight, axis, size, _cut(start, start + size, 1)).with_base(base))
        start += size
    return parts


def unstack(context: Context, equation: Equation, inputs: list[Any], needed: list[bool]) -> list[Any]:
    weight, position = _weight_of(inputs), equation.params["axis"]
    axis = weight.single(position, "unstack of axes that were reshaped together")
    context.record.role(weight, axis, STACK)
    axes = (*weight.axes[:position], *weight.axes[position + 1 :])
    return [
        drop_at(weight, axis, index).with_base(base, axes) for index, base in enumerate(moved(equation, weight.base))
    ]


def drop_at(weight: AdaptedWeight, axis: Axis, index: int) -> AdaptedWeight:
    """The terms at one index of an axis."""

    def take(array: jax.Array, at: int) -> jax.Array:
        return lax.index_in_dim(array, index, at, keepdims=False)

    return weight.map_terms(lambda term: term.map_axis(axis, take))


def stack(context: Context, equation: Equation, inputs: list[Any], needed: list[bool]) -> list[Any]:
    """Several adapted weights of one form become one with a stack axis."""
    return [_stacked(inputs, put_together(equation, _bases(inputs)), equation.params["axis"], new=True)]


def concatenate(context: Context, equation: Equation, inputs: list[Any], needed: list[bool]) -> list[Any]:
    """Stacking spelled as a concatenation along an axis of size 1."""
    position = equation.params["dimension"]
    for value in inputs:
        if not is_adapted(value) or value.axes[position] != ():
            raise Unsupported("concatenation along an axis of the weight")
    return [_stacked(inputs, put_together(equation, _bases(inputs)), position, new=False)]


def _bases(inputs: list[Any]) -> list[Any]:
    if not all(is_adapted(value) for value in inputs):
        raise Unsupported("stack of adapted and plain weights")
    return [value.base for value in inputs]


def _stacked(weights: list[AdaptedWeight], base: jax.Array, position: int, *, new: bool) -> AdaptedWeight:
    first = weights[0]
    form = (first.axes, len(first.terms), first.scaled)
    if any((weight.axes, len(weight.terms), weight.scaled) != form for weight in weights):
        raise Unsupported("stack of weights of different form")
    axis = _fresh(weights, STACK, len(weights))
    terms = tuple(_stacked_term([weight.terms[index] for weight in weights], axis) for index in range(len(first.terms)))
    axes = list(first.axes)
    axes[position : position if new else position + 1] = [(axis,)]
    return dataclasses.replace(first, base=base, terms=terms, axes=tuple(axes))


def _stacked_term(terms: list[Term], axis: Axis) -> Term:
    first = terms[0]
    for term in terms[1:]:
        same_arrays = {k: v.shape for k, v in term.arrays.items()} == {k: v.shape for k, v in first.arrays.items()}
        if (term.method, term.config, term.adapter, term.labels) != (
            first.method,
            first.config,
            first.adapter,
            first.labels,
        ) or not same_arrays:
            raise Unsupported("stack of weights with different adapters or ranks")
    arrays = {name: jnp.stack([term.arrays[name] for term in terms]) for name in first.arrays}
    labels = FrozenMapping({name: (axis, *first.labels[name]) for name in arrays})
    sites = tuple(site for term in terms for site in term.sites)
    return Term(arrays, labels, first.method, first.config, first.adapter, sites)


_RULES: dict[str, Rule] = {
    **dict.fromkeys(("copy", "copy_p", "device_put", "sharding_constraint", "name"), same),
    **dict.fromkeys(("mesh_cast", "reshard"), resharded),
    "reduce_precision": same,
    "convert_element_type": convert,
    **dict.fromkeys(("mul", "div"), scale),
    **dict.fromkeys(("add", "sub"), shift),
    "stop_gradient": stop_gradient,
    "optimization_barrier": optimization_barrier,
    "pvary": pvary,
    "transpose": transpose,
    "squeeze": squeeze,
    "expand_dims": expand_dims,
    "broadcast_in_dim": broadcast_in_dim,
    "reshape": reshape,
    "slice": slice_,
    "dynamic_slice": dynamic_slice,
    "split": split,
    "unstack": unstack,
    "stack": stack,
    "concatenate": concatenate,
}

VIEWS: dict[str, Rule] = {name: viewed(rule) for name, rule in _RULES.items()}
