"""The rule for products with a weight.

The base product runs as traced. A low-rank term is two thin products beside it, `(x a) b`, left to JAX to
differentiate: on one CPU device their operands are made two-dimensional, which autodiff then keeps (measured: as fast
as a hand-written backward pass), elsewhere they keep their axes, which suits sharding and rematerialisation.
"""

import dataclasses
import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .._config import FrozenMapping
from .._contract import EMBEDDING, INPUT, OUTPUT, STACK, Base, project
from .._remat import named_hidden, named_output
from . import _labels as lab
from ._codes import as_array, carrier, densified, recomputed
from ._dropout import dropped, use_key
from ._jaxpr import Equation, explicit_sharding, make_varying, on_one_cpu, run_equation, unsharded, varying_axes
from ._record import LOW_RANK, TRANSFORMED
from ._walk import Context, Rule
from ._weight import (
    RANK,
    REPEATED,
    AdaptedWeight,
    Axis,
    Term,
    Unsupported,
    is_adapted,
    of_role,
    over_stack,
    role_name,
    sizes,
)


@dataclasses.dataclass(frozen=True)
class Product:
    """The axes of a dot_general of x with a weight, all named: an axis of x, and of the result y, a group of labels."""

    x_groups: tuple[lab.Group, ...]
    y_groups: tuple[lab.Group, ...]
    batch: tuple[Axis, ...]
    contracted: tuple[Axis, ...]
    free: tuple[Axis, ...]
    sizes: FrozenMapping

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
    x, weight, weight_left = _sides(inputs)
    product = _named(equation, x, weight, weight_left)
    _learn_roles(context, weight, product)
    base = functools.partial(recomputed, functools.partial(_base_product, equation, weight_left), x, weight.base)
    if not weight.terms:
        return [base()]
    backwards = _is_backwards(product)
    if backwards and weight.terms[0].site.kind == EMBEDDING:
        return [_tied(context, equation, product, x, weight, base())]
    if all(term.low_rank for term in weight.terms):
        y = _beside(context, equation, product, backwards, x, weight, base)
    else:
        like = base()
        whole = unsharded(functools.partial(_general, context, equation, product, backwards), like)
        y = recomputed(lambda x, weight: whole(x, densified(weight)), x, weight).astype(like.dtype)
        context.use(weight, TRANSFORMED, equation)
    return [named_output(y) if context.named else y]


def _beside(
    context: Context,
    equation: Equation,
    product: Product,
    backwards: bool,
    x: jax.Array,
    weight: AdaptedWeight,
    base: Callable[[], jax.Array],
) -> jax.Array:
    """The base product, and beside it each term's part.

    The parts come first in the program: the compiler for TPUs, which follows it, then holds less at once (a Llama's
    step: temporaries 6 % smaller). Only where types tell shardings is the base product first, for they follow it.
    """
    explicit = any(explicit_sharding(array) is not None for array in (x, carrier(weight.base)))
    y = base() if explicit else None
    parts = []
    for term in weight.terms:
        context.use(weight, LOW_RANK, equation, only=term)
        part = functools.partial(_low_rank, context, equation, product, equation.outvars[0].aval.dtype, backwards)
        parts.append((part if y is None else unsharded(part, y))(x, term))
    return functools.reduce(jnp.add, parts, base() if y is None else y)


def _base_product(equation: Equation, weight_left: bool, x: jax.Array, base: Any) -> jax.Array:
    w = as_array(base)
    return run_equation(equation, [w, x] if weight_left else [x, w])[0]


def _tied(context: Context, equation: Equation, product: Product, x: Any, weight: AdaptedWeight, y: Any) -> Any:
    """The output product of a lookup table. As in PEFT most adapters of the table act on the lookup alone."""
    for term in weight.terms:
        if term.low_rank and term.method.ties(term.config):
            context.use(weight, LOW_RANK, equation, only=term)
            change = functools.partial(_low_rank, context, equation, product, y.dtype, True)
            y = y + unsharded(change, y)(x, term)
        elif term.method.tied is not None:
            context.use(weight, TRANSFORMED, equation, only=term)
            y = unsharded(functools.partial(_tied_by_method, product, weight.flat_axes, term), y)(x, y)
        else:
            warnings.warn(
                f"{term.site.path!r} is the output layer too, and adapter {term.adapter!r} acts on the lookup alone, "
                "as in PEFT; merged, it would act on both: ensure_weight_tying=True makes it do so from the start",
                stacklevel=2,
            )
    return y


def _tied_by_method(product: Product, axes: Sequence[Axis], term: Term, x: jax.Array, y: jax.Array) -> jax.Array:
    if product.batch:
        raise Unsupported("batches over axes of a table")
    assert term.method.tied is not None
    rows = [(row,) for row in product.rows]
    x_order, y_order = [*rows, of_role(axes, OUTPUT)], [*rows, of_role(axes, INPUT)]
    x = lab.arrange(lab.split(x, product.x_groups, product.sizes), product.x_labels, x_order, product.sizes)
    y = lab.arrange(lab.split(y, product.y_groups, product.sizes), product.y_labels, y_order, product.sizes)
    changed = term.method.tied(term.arrays, x, y, term.site)
    return _to_y(lab.split(changed, y_order, product.sizes), [n for group in y_order for n in group], product)


def _sides(inputs: list[Any]) -> tuple[Any, AdaptedWeight, bool]:
    """(x, weight, whether the weight is on the left); of two weights the right one is merged."""
    left, right = inputs
    if is_adapted(left) and is_adapted(right):
        raise Unsupported("product of two adapted weights")
    return (right, left, True) if is_adapted(left) else (left, right, False)


def _named(equation: Equation, x: Any, weight: AdaptedWeight, weight_left: bool) -> Product:
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
    return Product(
        x_groups=tuple(x_groups),
        y_groups=tuple(y_groups),
        batch=tuple(axis for group in batch_groups for axis in group),
        contracted=tuple(axis for index in w_sum for axis in weight.axes[index]),
        free=tuple(axis for group in free_groups for axis in group),
        sizes=FrozenMapping(known),
    )


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
    raise Unsupported("contracts " + " and ".join(map(role_name, sorted(summed))) + " axes")


def _low_rank(
    context: Context, equation: Equation, product: Product, dtype: Any, backwards: bool, x: jax.Array, term: Term
) -> jax.Array:
    """The term's part of the product, shaped like its result: (x a) b, or (x bᵀ) aᵀ for the transposed weight."""
    first, second = ("b", "a") if backwards else ("a", "b")
    x = dropped(context, equation, term, x)
    factors = [term.arrays[name].astype(x.dtype) for name in (first, second)]
    labels = (term.labels[first], term.labels[second])
    flat = _is_plain(product, *labels) and on_one_cpu(x, *factors)
    named, precision = context.named, equation.params["precision"]
    return _two_products(x, *factors, product, labels, flat, named, precision, dtype)


# Under jit for the sake of tracing: what JAX does to differentiate it, it does once for all layers of one form.
@functools.partial(jax.jit, static_argnums=(3, 4, 5, 6, 7, 8), inline=True)
def _two_products(
    x: jax.Array,
    first: jax.Array,
    second: jax.Array,
    product: Product,
    labels: tuple[tuple[lab.Label, ...], tuple[lab.Label, ...]],
    flat: bool,
    named: bool,
    precision: Any,
    dtype: Any,
) -> jax.Array:
    """x times both factors. flat: all operands are made two-dimensional."""
    (first_labels, second_labels), x_labels, known = labels, product.x_labels, product.sizes
    x = lab.split(x, product.x_groups, known)
    if flat:
        rows, summed, free = product.rows, tuple(sorted(product.contracted)), tuple(sorted(product.free))
        x, x_labels = lab.arrange(x, x_labels, [rows, summed], known), (rows, summed)
        ranks = {**known, RANK: first.shape[first_labels.index(RANK)]}
        first, first_labels = lab.arrange(first, first_labels, [(RANK,), summed], ranks), (RANK, summed)
        second, second_labels = lab.arrange(second, second_labels, [(RANK,), free], ranks), (RANK, free)
    summed_labels = [label for label in first_labels if label in x_labels and label not in product.batch]
    h, h_labels = lab.contract(x, x_labels, first, first_labels, summed_labels, precision=precision)
    h = named_hidden(h) if named else h
    out, out_labels = lab.contract(h, h_labels, second, second_labels, [RANK], precision=precision, out_dtype=dtype)
    if flat:
        out, out_labels = lab.split(out, out_labels, known), tuple(label for group in out_labels for label in group)
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


def _general(
    context: Context, equation: Equation, product: Product, backwards: bool, x: jax.Array, weight: AdaptedWeight
) -> jax.Array:
    """All terms through the methods' own `forward`, on canonical x and W, mapped over stack axes."""
    axes = weight.flat_axes
    mapped = (*product.batch, *(axis for axis in product.free if axis.role in (STACK, REPEATED)))
    if any(axis.role in (INPUT, OUTPUT) for axis in mapped):
        raise Unsupported("batches over input or output axes")
    if backwards and not all(term.method.linear for term in weight.terms):
        raise Unsupported("the transposed weight of a method that is not linear")
    # As in `_low_rank`: on CPU the gradient of thin products of more axes is slow.
    flat = on_one_cpu(x, weight.base) and not any(term.method.row_inputs for term in weight.terms)
    inputs, outputs = of_role(axes, INPUT), of_role(axes, OUTPUT)
    x_mapped = [axis for axis in mapped if axis in product.x_labels]
    summed, made = (outputs, inputs) if backwards else (inputs, outputs)
    x_order = [*((axis,) for axis in x_mapped), *((row,) for row in product.rows), summed]
    x = lab.arrange(lab.split(x, product.x_groups, product.sizes), product.x_labels, x_order, product.sizes)
    w_order = [*((axis,) for axis in mapped), inputs, outputs]
    w = lab.arrange(lab.split(weight.base, weight.axes, product.sizes), axes, w_order, product.sizes)
    params = equation.params
    numbers = {"precision": params["precision"], "preferred_element_type": params["preferred_element_type"]}

    def apply(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return lax.dot_general(x, kernel.astype(x.dtype), (((x.ndim - 1,), (0,)), ((), ())), **numbers)

    def forwards(x: jax.Array, w: jax.Array, arrays: list[dict[str, jax.Array]]) -> jax.Array:
        base = Base(lambda x: apply(x, w), apply, lambda a: project(a, w), lambda: w)
        call = chained(context, equation, weight.terms, arrays, base)
        if not flat:
            return call(x)
        y = call(x.reshape(-1, x.shape[-1]))
        return y.reshape(*x.shape[:-1], y.shape[-1])

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


def chained(
    context: Context, equation: Equation, terms: Sequence[Term], arrays: Sequence[dict[str, jax.Array]], base: Base
) -> Callable[[jax.Array], jax.Array]:
    """The operation with all terms, each the base of the next. arrays: those of one module, without stack axes."""
    for term, own in zip(terms, arrays, strict=True):
        call = _low_rank_call if term.low_rank else _general_call
        base = dataclasses.replace(base, call=functools.partial(call, context, equation, term, own, base), alone=False)
    return base.call


def _general_call(
    context: Context, equation: Equation, term: Term, arrays: dict[str, jax.Array], base: Base, x: jax.Array
) -> jax.Array:
    asked = term.method.row_inputs
    own = {name: array for name, array in arrays.items() if name != "key" and name not in asked}
    given: dict[str, Any] = {"config": term.config, **{name: arrays[name] for name in asked}}
    if "key" in arrays:
        given["rng"] = use_key(context, equation, term, arrays["key"], x)
    return term.method.forward(own, x, base, term.site, given)


def _low_rank_call(
    context: Context, equation: Equation, term: Term, arrays: dict[str, jax.Array], base: Base, x: jax.Array
) -> jax.Array:
    y = base(x)
    a, b = arrays["a"], arrays["b"]
    a = jnp.moveaxis(a.reshape(a.shape[0], -1, *term.site.window), 0, -1)
    table = term.site.kind == EMBEDDING
    h = base.apply(x if table else dropped(context, equation, term, x), a)
    if table and term.method.drops_lookups:
        h = dropped(context, equation, term, h)
    return y + (h @ b.reshape(b.shape[0], -1).astype(h.dtype)).astype(y.dtype)


PRODUCTS: dict[str, Rule] = {"dot_general": dot_general}
