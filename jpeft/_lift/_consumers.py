"""Rules for the other operations that consume a weight: convolutions, lookups, grouped products.

As with products the base operation runs as traced, and the two thin ones beside it.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .._contract import INPUT, OUTPUT, STACK, VOCABULARY, WINDOW, Base, project
from . import _labels as lab
from ._codes import consumed
from ._dropout import dropped
from ._jaxpr import Equation, run_equation, unsharded
from ._products import chained
from ._prompts import is_prompt, known_ids, with_prompt, without_prompts
from ._record import LOOKUP, LOW_RANK, TRANSFORMED
from ._walk import Context, Rule, plain
from ._weight import (
    FULL_COPY,
    RANK,
    UNKNOWN,
    AdaptedWeight,
    Axis,
    Term,
    Unsupported,
    is_adapted,
    of_role,
    role_name,
    sizes,
)


def conv_general_dilated(context: Context, equation: Equation, inputs: list[Any], needed: list[bool]) -> list[Any]:
    x, weight = inputs
    if is_adapted(x) or not is_adapted(weight):
        raise Unsupported("the weight is not the kernel")
    params = equation.params
    numbers = params["dimension_numbers"]
    out_axis, in_axis, *window = numbers.rhs_spec
    for position, role in ((in_axis, INPUT), (out_axis, OUTPUT), *((axis, WINDOW) for axis in window)):
        for axis in weight.axes[position]:
            context.record.role(weight, axis, role)
    base = run_equation(equation, [x, weight.base])[0]
    if not weight.terms:
        return [base]
    if params["feature_group_count"] != 1 or params["batch_group_count"] != 1:
        raise Unsupported("grouped convolution")
    roles = [tuple(axis.role for axis in weight.axes[position]) for position in (in_axis, out_axis, *window)]
    if roles != [(INPUT,), (OUTPUT,), *((WINDOW,) for _ in window)]:
        raise Unsupported("the layout of the weight is not that of this convolution")
    if not all(term.low_rank for term in weight.terms):
        context.use(weight, TRANSFORMED, equation)
        change = unsharded(functools.partial(_convolved_by_methods, context, equation), base)
        return [change(x, weight).astype(base.dtype)]
    for term in weight.terms:
        context.use(weight, LOW_RANK, equation, only=term)
        kernel = (RANK, weight.axes[in_axis][0], *(weight.axes[axis][0] for axis in window))
        change = unsharded(functools.partial(_convolved, context, equation, kernel, base.dtype), base)
        base = base + change(x, term)
    return [base]


def _convolved(
    context: Context, equation: Equation, kernel: tuple[lab.Label, ...], dtype: Any, x: jax.Array, term: Term
) -> jax.Array:
    """The same convolution with the first factor as its kernel, then a product of features with the second."""
    params, numbers = equation.params, equation.params["dimension_numbers"]
    feature = numbers.out_spec[1]
    h = lax.conv_general_dilated(
        dropped(context, equation, term, x),
        lab.transpose(term.arrays["a"], term.labels["a"], kernel).astype(x.dtype),
        window_strides=params["window_strides"],
        padding=params["padding"],
        lhs_dilation=params["lhs_dilation"],
        rhs_dilation=params["rhs_dilation"],
        dimension_numbers=lax.ConvDimensionNumbers(numbers.lhs_spec, tuple(range(len(kernel))), numbers.out_spec),
        precision=params["precision"],
    )
    names = tuple(RANK if axis == feature else f"x{axis}" for axis in range(h.ndim))
    b = term.arrays["b"].astype(h.dtype)
    out, labels = lab.contract(h, names, b, term.labels["b"], [RANK], out_dtype=dtype)
    return jnp.moveaxis(out, len(labels) - 1, feature)


def _convolved_by_methods(context: Context, equation: Equation, x: jax.Array, weight: AdaptedWeight) -> jax.Array:
    """All terms through the methods' own `forward`, on x (batch, *space, in) and W (in, *window, out)."""
    params, numbers = equation.params, equation.params["dimension_numbers"]
    (x_batch, x_in, *x_space), (y_batch, y_out, *y_space) = numbers.lhs_spec, numbers.out_spec
    out_axis, in_axis, *window = numbers.rhs_spec
    last = x.ndim - 1
    spec, kernel_spec = (0, last, *range(1, last)), (last, 0, *range(1, last))

    def apply(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return lax.conv_general_dilated(
            x,
            kernel.astype(x.dtype),
            window_strides=params["window_strides"],
            padding=params["padding"],
            lhs_dilation=params["lhs_dilation"],
            rhs_dilation=params["rhs_dilation"],
            dimension_numbers=lax.ConvDimensionNumbers(spec, kernel_spec, spec),
            precision=params["precision"],
            preferred_element_type=params["preferred_element_type"],
        )

    w = lax.transpose(weight.base, (in_axis, *window, out_axis))
    base = Base(lambda x: apply(x, w), apply, lambda a: project(a, w), lambda: w)
    call = chained(context, equation, weight.terms, [term.arrays for term in weight.terms], base)
    y = call(lax.transpose(x, (x_batch, *x_space, x_in)))
    return jnp.moveaxis(y, range(y.ndim), (y_batch, *y_space, y_out))


def gather(context: Context, equation: Equation, inputs: list[Any], needed: list[bool]) -> list[Any]:
    weight, ids = inputs
    if not is_adapted(weight) or is_adapted(ids):
        raise Unsupported("the weight is not the operand")
    position, ids = _looked_up(equation, weight, ids)
    row = weight.single(position, "gather of axes that were reshaped together")
    if row.role == INPUT and any(map(is_prompt, weight.terms)):
        return [_with_prompts(context, equation, weight, inputs[1], ids, position)]
    base = run_equation(equation, [weight.base, inputs[1]])[0]
    if not weight.terms and len(weight.axes) == 2:
        for axis in weight.flat_axes:
            context.record.role(weight, axis, VOCABULARY if axis == row else OUTPUT, lookup=True)
        return [base]
    context.record.role(weight, row, STACK)
    if row.role in (STACK, UNKNOWN):
        return [_picked(weight, row, position, base, ids, equation)]
    outputs = [axis for axis in weight.flat_axes if axis != row]
    if row.role != INPUT or any(axis.role != OUTPUT for axis in outputs):
        raise Unsupported("gather along " + role_name(row.role) + " axes")
    if any(term.method is FULL_COPY for term in weight.terms):
        raise Unsupported("replaced as a whole")
    if not all(term.low_rank for term in weight.terms):
        context.use(weight, TRANSFORMED, equation)
        change = unsharded(functools.partial(_looked_up_by_methods, context, equation, position, row), base)
        return [change(base, ids, weight)]
    for term in weight.terms:
        context.use(weight, LOOKUP, equation, only=term)
        change = unsharded(functools.partial(_lookup, context, equation, weight.axes, position, row, base.shape), base)
        base = base + change(ids, term).astype(base.dtype)
    return [base]


def _with_prompts(
    context: Context, equation: Equation, weight: AdaptedWeight, columns: Any, ids: jax.Array, position: int
) -> jax.Array:
    """The lookup in the table, whatever else acts on it, and that of the prompts' ids in their rows."""
    prompts, rest = tuple(filter(is_prompt, weight.terms)), without_prompts(weight)
    column = equation.params["dimension_numbers"].start_index_map.index(position)
    at = jnp.arange(columns.shape[-1]) == column
    inputs = [rest, jnp.where(at, known_ids(columns, prompts), columns)]
    try:
        (found,) = gather(context, equation, inputs, [True])
    except Unsupported as unsupported:
        (found,) = run_equation(equation, [plain(context, equation, rest, str(unsupported)), inputs[1]])
    ids = ids[..., 0]
    names = tuple(f"x{index}" for index in range(ids.ndim))
    groups = _gathered(equation, weight.axes, position, found.ndim, names)
    for term in prompts:
        context.use(weight, LOOKUP, equation, only=term)
        change = functools.partial(with_prompt, axes=weight.flat_axes, groups=groups, names=names)
        found = unsharded(change, found)(found, ids, term)
    return found


def _lookup(
    context: Context,
    equation: Equation,
    axes: tuple[tuple[Axis, ...], ...],
    position: int,
    row: Axis,
    shape: tuple[int, ...],
    ids: jax.Array,
    term: Term,
) -> jax.Array:
    """The rows of the first factor, times the second."""
    h = _rows(lab.transpose(term.arrays["a"], term.labels["a"], (row, RANK)), ids, equation)
    if term.method.drops_lookups:
        h = dropped(context, equation, term, h)
    names = (*(f"x{index}" for index in range(h.ndim - 1)), RANK)
    out, labels = lab.contract(h, names, term.arrays["b"].astype(h.dtype), term.labels["b"], [RANK])
    groups = _gathered(equation, axes, position, len(shape), names[:-1])
    known = {**sizes(axis for group in axes for axis in group), **lab.sizes_of(h, names)}
    return lab.arrange(out, labels, groups, known)


def _looked_up_by_methods(
    context: Context,
    equation: Equation,
    position: int,
    row: Axis,
    found: jax.Array,
    ids: jax.Array,
    weight: AdaptedWeight,
) -> jax.Array:
    """All terms through the methods' own `forward`, on ids and a table (vocabulary, out)."""
    known = sizes(weight.flat_axes)
    outputs = of_role(weight.flat_axes, OUTPUT)
    table = lab.arrange(lab.split(weight.base, weight.axes, known), weight.flat_axes, [(row,), outputs], known)

    def apply(ids: jax.Array, table: jax.Array) -> jax.Array:
        return _rows(table, ids[..., None], equation)

    base = Base(lambda ids: apply(ids, table), apply, lambda a: project(a, table), lambda: table)
    call = chained(context, equation, weight.terms, [term.arrays for term in weight.terms], base)
    y = call(ids[..., 0])
    names = tuple(f"x{index}" for index in range(ids.ndim - 1))
    known = {**known, **lab.sizes_of(ids[..., 0], names)}
    groups = _gathered(equation, weight.axes, position, found.ndim, names)
    y = lab.arrange(lab.split(y, [*((n,) for n in names), outputs], known), (*names, *outputs), groups, known)
    if equation.params["mode"] != lax.GatherScatterMode.FILL_OR_DROP:
        return y.astype(found.dtype)
    inside = lab.arrange(
        apply(ids[..., 0], jnp.ones((row.size, 1), bool))[..., 0],
        names,
        [group if group and group[0] in names else () for group in groups],
        known,
    )
    return jnp.where(inside, y.astype(found.dtype), found)


def _looked_up(equation: Equation, weight: AdaptedWeight, ids: jax.Array) -> tuple[int, jax.Array]:
    """The axis that a gather takes single rows of, and the rows (..., 1); raises Unsupported if it does more."""
    numbers, slice_sizes = equation.params["dimension_numbers"], equation.params["slice_sizes"]
    collapsed, shape = numbers.collapsed_slice_dims, weight.base.shape
    cut = [axis for axis, size in enumerate(shape) if slice_sizes[axis] != size or axis in collapsed]
    if len(cut) != 1 or slice_sizes[cut[0]] != 1 or numbers.operand_batching_dims:
        raise Unsupported("gather that is not a lookup of rows")
    # An index into an axis that is taken whole can only be 0, except that filling looks at it.
    if len(numbers.start_index_map) > 1 and equation.params["mode"] == lax.GatherScatterMode.FILL_OR_DROP:
        raise Unsupported("gather that fills by several indices")
    column = numbers.start_index_map.index(cut[0])
    return cut[0], lax.slice_in_dim(ids, column, column + 1, axis=ids.ndim - 1)


def _gathered(
    equation: Equation, axes: Sequence[lab.Group], position: int, ndim: int, batch: Sequence[lab.Label]
) -> list[lab.Group]:
    """The axes of a lookup's result: the rows' own, and those of the ids."""
    numbers, names = equation.params["dimension_numbers"], iter(batch)
    kept = iter(
        () if axis == position else group for axis, group in enumerate(axes) if axis not in numbers.collapsed_slice_dims
    )
    return [next(kept) if axis in numbers.offset_dims else (next(names),) for axis in range(ndim)]


def _rows(table: jax.Array, ids: jax.Array, equation: Equation) -> jax.Array:
    """The same lookup in a table (rows, features): (..., features); where the base has filled, nothing is added."""
    numbers = lax.GatherDimensionNumbers(offset_dims=(ids.ndim - 1,), collapsed_slice_dims=(0,), start_index_map=(0,))
    return lax.gather(table, ids, numbers, (1, table.shape[1]), mode=equation.params["mode"], fill_value=0)


def _picked(
    weight: AdaptedWeight, row: Axis, position: int, base: jax.Array, ids: jax.Array, equation: Equation
) -> AdaptedWeight:
    """Entries of a stack chosen by ids: a weight stacked over the ids' axes."""
    batch = ids.shape[:-1]
    new = tuple(Axis(STACK, (*row.place, index), size) for index, size in enumerate(batch))

    def pick(array: jax.Array, at: int) -> jax.Array:
        moved = jnp.moveaxis(array, at, 0)
        rows = _rows(moved.reshape(moved.shape[0], -1), ids, equation).reshape(*batch, *moved.shape[1:])
        return jnp.moveaxis(rows, range(len(batch)), range(at, at + len(batch)))

    axes = _gathered(equation, weight.axes, position, base.ndim, new)
    return weight.with_base(base, axes).map_terms(lambda term: term.map_axis(row, pick, *new))


def ragged_dot_general(context: Context, equation: Equation, inputs: list[Any], needed: list[bool]) -> list[Any]:
    x, weight, group_sizes = inputs
    if is_adapted(x) or not is_adapted(weight):
        raise Unsupported("the weight is not the right operand")
    params = equation.params
    numbers = params["ragged_dot_dimension_numbers"]
    dims = numbers.dot_dimension_numbers
    (_, summed), batch = dims[0], dims[1]
    groups = tuple(numbers.rhs_group_dimensions)
    if len(groups) != 1 or len(summed) != 1 or any(batch) or x.ndim != 2 or weight.base.ndim != 3:
        raise Unsupported("grouped product that is not (rows, in) by (groups, in, out)")
    free = next(iter({0, 1, 2} - {groups[0], summed[0]}))
    for position, role in ((groups[0], STACK), (summed[0], INPUT), (free, OUTPUT)):
        for axis in weight.axes[position]:
            context.record.role(weight, axis, role)
    base = run_equation(equation, [x, weight.base, group_sizes])[0]
    if not weight.terms:
        return [base]
    roles = [{axis.role for axis in weight.axes[position]} for position in (groups[0], summed[0], free)]
    if roles != [{STACK}, {INPUT}, {OUTPUT}]:
        raise Unsupported("the layout of the weight is not that of this grouped product")
    if not all(term.low_rank for term in weight.terms):
        raise Unsupported("a method without factors")
    stack = weight.axes[groups[0]]
    contract_with = lax.RaggedDotDimensionNumbers((dims[0], batch), numbers.lhs_ragged_dimensions, groups)
    for term in weight.terms:
        context.use(weight, LOW_RANK, equation, only=term)
        known = {**sizes(weight.flat_axes), **lab.sizes_of(term.arrays["a"], term.labels["a"])}
        orders = {"a": [stack, weight.axes[summed[0]], (RANK,)], "b": [stack, (RANK,), weight.axes[free]]}
        a, b = (lab.arrange(term.arrays[n].astype(x.dtype), term.labels[n], orders[n], known) for n in "ab")
        a_order = sorted(range(3), key=lambda i: (groups[0], summed[0], free)[i])
        h = lax.ragged_dot_general(
            dropped(context, equation, term, x),
            lax.transpose(a, a_order),
            group_sizes,
            contract_with,
            precision=params["precision"],
        )
        out = lax.ragged_dot(h, b, group_sizes, precision=params["precision"], preferred_element_type=base.dtype)
        base = base + out.astype(base.dtype)
    return [base]


CONSUMERS: dict[str, Rule] = {
    "conv_general_dilated": consumed(conv_general_dilated),
    "gather": consumed(gather),
    "ragged_dot_general": consumed(ragged_dot_general),
}
