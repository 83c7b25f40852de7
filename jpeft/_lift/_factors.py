"""The factors of low-rank methods: made where they are used.

Layers stacked in one leaf reach a product one by one. Until then their arrays stay as they are stored, so that neither
the factors of the whole stack nor gradients of such factors are ever there.
"""

import dataclasses
from typing import Any

import jax

from .._config import FrozenMapping
from .._contract import OUTPUT, STACK, WINDOW
from . import _labels as lab
from ._jaxpr import JIT_PRIMITIVES
from ._weight import RANK, AdaptedWeight, Term, is_adapted, of_role, over_stack, weight_axes

# What these do to a weight they do to its stack axes or to its base alone.
BY_LAYER = frozenset(
    {
        *(*JIT_PRIMITIVES, "remat2", "checkpoint", "scan", "while", "cond"),
        *("convert_element_type", "copy", "optimization_barrier", "sharding_constraint"),
    }
)


def factored(value: Any) -> Any:
    """A weight whose low-rank terms have their factors `a` and `b`; any other value as it is."""
    if not is_adapted(value) or not any(term.stored for term in value.terms):
        return value
    weight: AdaptedWeight = value
    return weight.map_terms(lambda term: with_factors(term) if term.stored else term)


def with_factors(term: Term) -> Term:
    """A low-rank term with its factors, their axes taken apart as the leaf's are, in place of the stored arrays."""
    method, site = term.method, term.site
    assert method.factors is not None
    axes = tuple(axis for group in weight_axes(site.layout, site.shape) for axis in group)
    outputs, windows = of_role(axes, OUTPUT), of_role(axes, WINDOW)
    inputs = tuple(axis for axis in axes if axis.role != STACK and axis not in (*outputs, *windows))
    own = {name: array for name, array in term.arrays.items() if name != "key"}
    stack = tuple(axis for axis in axes if any(axis in term.labels[name] for name in own))

    def one(arrays: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        assert method.factors is not None
        return method.factors(arrays, site)

    mapped, arrays = over_stack(one, dataclasses.replace(term, arrays=own), stack, ())
    a, b = mapped(arrays)
    sizes = {axis: axis.size for axis in axes}
    rank = a.shape[len(stack)]
    a = lab.reshape(a, (*a.shape[: len(stack)], rank, *(sizes[axis] for axis in (*inputs, *windows))))
    b = lab.reshape(b, (*b.shape[: len(stack)], rank, *(sizes[axis] for axis in outputs)))
    labels = {"a": (*stack, RANK, *inputs, *windows), "b": (*stack, RANK, *outputs)}
    kept = {name: array for name, array in term.arrays.items() if name == "key"}
    return dataclasses.replace(
        term,
        arrays={"a": a, "b": b, **kept},
        labels=FrozenMapping({**labels, **{name: term.labels[name] for name in kept}}),
        stored=False,
    )
