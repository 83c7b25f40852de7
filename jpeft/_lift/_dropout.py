"""Dropout on the input of an adapter: another mask for each module, each use of it, and each device of a mesh."""

import dataclasses
import functools
from typing import Any

import jax
from jax import lax

from .. import _contract as contract
from ._jaxpr import Equation, varying_axes
from ._walk import Context
from ._weight import Term, is_adapted


def dropped(context: Context, equation: Equation, term: Term, x: jax.Array) -> jax.Array:
    """x with entries dropped at the term's rate and the rest scaled up; x itself without a key."""
    if "key" not in term.arrays:
        return x
    key = use_key(context, equation, term, term.arrays["key"].reshape(-1)[0], x)
    return contract.dropped(x, {"config": term.config, "rng": key})


def use_key(context: Context, equation: Equation, term: Term, key: Any, x: jax.Array) -> Any:
    """The key of one use of a module, from that of the module: another one on each device that has its own x."""
    key = jax.random.fold_in(key, context.dropout_index(term, equation))
    for axis in sorted(varying_axes(x) | set(context.spread)):
        key = jax.random.fold_in(key, lax.axis_index(axis))
    return key


def at_step(value: Any, step: Any) -> Any:
    """A weight inside a loop: the masks of each step are its own."""
    if not has_key(value):
        return value
    return value.map_terms(lambda term: _folded(term, step))


def _folded(term: Term, step: Any) -> Term:
    if "key" not in term.arrays:
        return term
    key = term.arrays["key"]
    fold = functools.partial(jax.random.fold_in, data=step)
    for _ in range(key.ndim):
        fold = jax.vmap(fold)
    return dataclasses.replace(term, arrays={**term.arrays, "key": fold(key)})


def has_key(value: Any) -> bool:
    return is_adapted(value) and any("key" in term.arrays for term in value.terms)


def without_key(value: Any) -> Any:
    """A weight whose products drop nothing."""
    if not has_key(value):
        return value
    return value.map_terms(
        lambda term: dataclasses.replace(term, arrays={n: a for n, a in term.arrays.items() if n != "key"})
    )
