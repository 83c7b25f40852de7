"""Dropout on the input of an adapter: another mask for each module, each use of it, and each device of a mesh."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from ._jaxpr import Equation, explicit_sharding, reshard, varying_axes
from ._walk import Context
from ._weight import Term


def dropped(context: Context, equation: Equation, term: Term, x: jax.Array) -> jax.Array:
    """x with entries dropped at the term's rate and the rest scaled up; x itself without a key."""
    rate = term.method.dropout(term.config)
    if "key" not in term.arrays or not rate:
        return x
    key: Any = term.arrays["key"].reshape(-1)[0]
    key = jax.random.fold_in(key, context.record.dropout_index(term, equation))
    for axis in varying_axes(x):
        key = jax.random.fold_in(key, lax.axis_index(axis))
    kept = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    sharding = explicit_sharding(x)
    if sharding is not None:
        kept = reshard(kept, PartitionSpec(*sharding.spec))
    return jnp.where(kept, x / jnp.asarray(1.0 - rate, x.dtype), jnp.zeros_like(x))
