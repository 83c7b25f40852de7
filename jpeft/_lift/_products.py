"""Rules for the operations that consume a weight: products, convolutions, lookups, grouped products.

The base product runs as traced. A low-rank term is two thin products beside it, `(x a) b`, left to JAX to
differentiate: on CPU their operands are made two-dimensional, which autodiff then keeps (measured: as fast as a
hand-written backward pass), elsewhere they keep their axes, which suits sharding and rematerialisation.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .._contract import EMBEDDING, INPUT, OUTPUT, STACK, VOCABULARY, WINDOW, Base
from . import _labels as lab
from ._dropout import dropped
from ._jaxpr import Equation, make_varying, platform, run_equation, unsharded, varying_axes
from ._record import LOOKUP, LOW_RANK, TRANSFORMED
from ._walk import Context, Rule
from ._weight import (
    RANK,
    REPEATED,
    UNKNOWN,
    AdaptedWeight,
    Axis,
    Term,
    Unsupported,
    is_adapted,
    of_role,
    over_stack,
    sizes,
)


@dataclasses.dataclass(frozen=True)
class Product:
    """A dot_general of x with a weight, all axes named. x, y: arrays with one axis a group of labels."""

    equation: Equation
    x: jax.Array
    x_groups: tuple[lab.Group, ...]
    y_groups: tuple[lab.Group, ...]
    batch: tuple[Axis, ...]
    contracted: tuple[Axis, ...]
    free: tuple[Axis, ...]
    sizes: dict[lab.Label, int]

    @property
    def x_labels(self) -> tuple[lab.Label, ...]:
        return tuple(label for group in self.x_groups for label in group)

    @property
    def y_labels(self) -> tuple[lab.Label, ...]:
        return tuple(label for group in self.y_groups for label in group)

    @property
    def rows(self) -> tuple[lab.Label, ...]:
        """The axes of x that the weight knows nothing of."""
        return tuple(label for label in self.x_labels if not isinstance(label, Axis))


def dot_general(context: Context, equation: Equation, inputs: list[Any], needed: list[bool]) -> list[Any]:
    weight, product = _named(equation, *_sides(inputs))
    _learn_roles(context, weight, product)
    x_first = not is_adapted(inputs[0])
    base = run_equation(equation, [product.x, weight.base] if x_first else [weight.base, product.x])[0]
    if not weight.terms:
        return [base]
    backwards = _is_backwards(product)
    if backwards and weight.terms[0].site.kind == EMBEDDING:
        # As in PEFT: an adapter of the table acts on the lookup, not on a tied output product.
        return [base]
    if all(term.low_rank for term in weight.terms):
        for term in weight.terms:
            context.use(weight, LOW_RANK, equation, only=term)
            change = unsharded(functools.partial(_low_rank, context, product, base.dtype, backwards), base)
            base = base + change(product.x, term)
        return [base]
    y = unsharded(functools.partial(_general, context, product, backwards), base)(product.x, weight)
    context.use(weight, TRANSFORMED, equation)
    return [y.astype(base.dtype)]


def _sides(inputs: list[Any]) -> tuple[Any, AdaptedWeight, bool]:
    """(x, weight, whether the weight is on the left); of two weights the right one is merged."""
    left, right = inputs
    if is_adapted(left) and is_adapted(right):
        raise Unsupported("product of two adapted weights")
    return (right, left, True) if is_adapted(left) else (left, right, False)


def _named(equation: Equation, x: Any, weight: AdaptedWeight, weight_left: bool) -> tuple[AdaptedWeight, Product]:
    (left, right), (left_batch, right_batch) = equation.params["dimension_numbers"]
    w_sum, x_sum, w_batch, x_batch = (
        (left, right, left_batch, right_batch) if weight_left else (right, left, right_batch, left_batch)
    )
    x_groups: list[lab.Group] = [(f"x{index}",) for index in range(x.ndim)]
    for w_axis, x_axis in zip((*w_sum, *w_batch), (*x_sum, *x_batch), strict=True):
        x_groups[x_axis] = weight.axes[w_axis]
    taken = {*w_sum, *w_batch}
    w_free = [index for index in range(len(weight.axes)) if index not in taken]
    x_free = [x_groups[index] for index in range(x.ndim) if index not in (*x_sum, *x_batch)]
    batch_groups = [weight.axes[index] for index in w_batch]
    free_groups = [weight.axes[index] for index in w_free]
    y_groups = (*batch_groups, *free_groups, *x_free) if weight_left else (*batch_groups, *x_free, *free_groups)
    known = sizes(weight.flat_axes)
    known.update({f"x{index}": size for index, size in enumerate(x.shape)})  # type: ignore[dict-item]
    product = Product(
        equation=equation,
        x=x,
        x_groups=tuple(x_groups),
        y_groups=tuple(y_groups),
        batch=tuple(axis for group in batch_groups for axis in group),
        contracted=tuple(axis for index in w_sum for axis in weight.axes[index]),
        free=tuple(axis for group in free_groups for axis in group),
        sizes=known,
    )
    return weight, product


def _learn_roles(context: Context, weight: AdaptedWeight, product: Product) -> None:
    for axes, role in ((product.contracted, INPUT), (product.batch, STACK), (product.free, OUTPUT)):
        for axis in axes:
            context.record.role(weight, axis, role)


def _is_backwards(product: Product) -> bool:
    """Whether the product is with the transposed weight; raises Unsupported if it is with neither."""
    summed = {axis.role for axis in product.contracted}
    free = {axis.role for axis in product.free} - {STACK, REPEATED}
    if summed <= {INPUT} and free <= {OUTPUT}:
        return False
    if summed <= {OUTPUT} and free <= {INPUT}:
        return True
    raise Unsupported("contracts " + " and ".join(_ROLE_NAMES.get(role, role) for role in sorted(summed)) + " axes")


_ROLE_NAMES = {INPUT: "input", OUTPUT: "output", STACK: "stack", WINDOW: "window", REPEATED: "repeated"}


def _low_rank(context: Context, product: Product, dtype: Any, backwards: bool, x: jax.Array, term: Term) -> jax.Array:
    """The term's part of the product, shaped like its result: (x a) b, or (x bᵀ) aᵀ for the transposed weight."""
    first, second = ("b", "a") if backwards else ("a", "b")
    x = dropped(context, product.equation, term, x)
    x = lab.split(x, product.x_groups, product.sizes)
    factors = {name: term.arrays[name].astype(x.dtype) for name in (first, second)}
    labels = {name: term.labels[name] for name in factors}
    x_labels, rows = product.x_labels, product.rows
    if _is_plain(product, labels[first], labels[second]) and platform() == "cpu":
        summed, free = tuple(sorted(product.contracted)), tuple(sorted(product.free))
        x, x_labels = lab.arrange(x, x_labels, [rows, summed], product.sizes), (rows, summed)
        known = {**product.sizes, **lab.sizes_of(factors[first], labels[first])}
        for name, axes in ((first, summed), (second, free)):
            factors[name] = lab.arrange(factors[name], labels[name], [(RANK,), axes], known)
            labels[name] = (RANK, axes)
    summed_labels = [label for label in labels[first] if label in x_labels and label not in product.batch]
    precision = product.equation.params["precision"]
    h, h_labels = lab.contract(x, x_labels, factors[first], labels[first], summed_labels, precision=precision)
    out, out_labels = lab.contract(
        h, h_labels, factors[second], labels[second], [RANK], precision=precision, out_dtype=dtype
    )
    if out_labels and isinstance(out_labels[0], tuple):
        out, out_labels = lab.split(out, out_labels, product.sizes), tuple(x for group in out_labels for x in group)
    return _to_y(out, out_labels, product)


def _is_plain(product: Product, first: Sequence[lab.Label], second: Sequence[lab.Label]) -> bool:
    """Whether the product is a matrix product of two-dimensional views: no batch, stack or repeated axes."""
    return not product.batch and set(first) == {RANK, *product.contracted} and set(second) == {RANK, *product.free}


def _to_y(out: jax.Array, labels: Sequence[lab.Label], product: Product) -> jax.Array:
    present = [label for label in product.y_labels if label in labels]
    out = lab.transpose(out, labels, present)
    if len(present) < len(product.y_labels):
        # Axes of a repeated weight: every repetition has the same term.
        kept = [index for index, label in enumerate(product.y_labels) if label in labels]
        shape = tuple(product.sizes[label] for label in product.y_labels)
        out = lax.broadcast_in_dim(out, shape, kept)
    return lab.join(out, product.y_groups, product.sizes)


def _general(context: Context, product: Product, backwards: bool, x: jax.Array, weight: AdaptedWeight) -> jax.Array:
    """All terms through the methods' own `forward`, on canonical x and W, mapped over stack axes."""
    axes = weight.flat_axes
    mapped = (*product.batch, *(axis for axis in product.free if axis.role in (STACK, REPEATED)))
    if any(axis.role in (INPUT, OUTPUT) for axis in mapped):
        raise Unsupported("batches over input or output axes")
    inputs, outputs = of_role(axes, INPUT), of_role(axes, OUTPUT)
    x_mapped = [axis for axis in mapped if axis in product.x_labels]
    summed, made = (outputs, inputs) if backwards else (inputs, outputs)
    x_order = [*((axis,) for axis in x_mapped), *((row,) for row in product.rows), summed]
    x = lab.arrange(lab.split(x, product.x_groups, product.sizes), product.x_labels, x_order, product.sizes)
    w_order = [*((axis,) for axis in mapped), inputs, outputs]
    w = lab.arrange(lab.split(weight.base, weight.axes, product.sizes), axes, w_order, product.sizes)
    params = product.equation.params
    numbers = {"precision": params["precision"], "preferred_element_type": params["preferred_element_type"]}

    def apply(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return lax.dot_general(x, kernel.astype(x.dtype), (((x.ndim - 1,), (0,)), ((), ())), **numbers)

    def forwards(x: jax.Array, w: jax.Array, arrays: list[dict[str, jax.Array]]) -> jax.Array:
        call = lambda x: apply(x, w)  # noqa: E731
        for term, own in zip(weight.terms, arrays, strict=True):
            call = _chained(context, product.equation, term, own, Base(call, apply))
        return call(x)

    def one(x: jax.Array, w: jax.Array, arrays: list[dict[str, jax.Array]]) -> jax.Array:
        if not backwards:
            return forwards(x, w, arrays)
        # What is transposed has to vary over the devices as the product does, or JAX sums over them.
        axes = frozenset().union(*map(varying_axes, jax.tree.leaves((x, w, arrays))))
        zeros = make_varying(jnp.zeros((*x.shape[:-1], w.shape[0]), x.dtype), sorted(axes))
        return jax.vjp(lambda z: forwards(z, w, arrays), zeros)[1](x)[0]

    y = _mapped(one, weight.terms, mapped, x_mapped)(x, w)
    y_order = [*((axis,) for axis in mapped), *((row,) for row in product.rows), made]
    labels = [label for group in y_order for label in group]
    return _to_y(lab.split(y, y_order, product.sizes), labels, product)


def _mapped(one: Any, terms: Sequence[Term], mapped: Sequence[Axis], x_mapped: Sequence[Axis]) -> Any:
    arrays_of, places_of = [], []
    for term in terms:
        _, arrays = over_stack(lambda arrays: arrays, term, mapped, ())
        arrays_of.append(arrays)
        places_of.append({name: [axis for axis in mapped if axis in term.labels[name]] for name in arrays})
    for axis in reversed(mapped):
        in_axes = (
            0 if axis in x_mapped else None,
            0,
            [{name: 0 if axis in own else None for name, own in places.items()} for places in places_of],
        )
        one = jax.vmap(one, in_axes=in_axes)
    return lambda x, w: one(x, w, arrays_of)


def _chained(context: Context, equation: Equation, term: Term, arrays: dict[str, jax.Array], base: Base) -> Any:
    if not term.low_rank:
        site = term.site
        rng = {"rng": arrays["key"]} if "key" in arrays else {}
        own = {name: array for name, array in arrays.items() if name != "key"}
        return lambda x: term.method.forward(own, x, base, site, rng)
    a, b = (arrays[name].reshape(arrays[name].shape[0], -1) for name in "ab")

    def call(x: jax.Array) -> jax.Array:
        y = base(x)
        h = base.apply(dropped(context, equation, term, x), a.T)
        return y + (h @ b.astype(h.dtype)).astype(y.dtype)

    return call


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
        raise Unsupported("a method without factors")
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


def gather(context: Context, equation: Equation, inputs: list[Any], needed: list[bool]) -> list[Any]:
    weight, ids = inputs
    if not is_adapted(weight) or is_adapted(ids):
        raise Unsupported("the weight is not the operand")
    position, ids = _looked_up(equation, weight, ids)
    row = weight.single(position, "gather of axes that were reshaped together")
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
        raise Unsupported("gather along " + _ROLE_NAMES.get(row.role, row.role) + " axes")
    if not all(term.low_rank for term in weight.terms):
        raise Unsupported("a method without factors")
    for term in weight.terms:
        context.use(weight, LOOKUP, equation, only=term)
        change = unsharded(functools.partial(_lookup, equation, weight.axes, position, row, base.shape), base)
        base = base + change(ids, term).astype(base.dtype)
    return [base]


def _lookup(
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
    names = (*(f"x{index}" for index in range(h.ndim - 1)), RANK)
    out, labels = lab.contract(h, names, term.arrays["b"].astype(h.dtype), term.labels["b"], [RANK])
    groups = _gathered(equation, axes, position, len(shape), names[:-1])
    known = {**sizes(axis for group in axes for axis in group), **lab.sizes_of(h, names)}
    return lab.arrange(out, labels, groups, known)


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


PRODUCTS: dict[str, Rule] = {
    "dot_general": dot_general,
    "conv_general_dilated": conv_general_dilated,
    "gather": gather,
    "ragged_dot_general": ragged_dot_general,
}
