"""Products with trained vectors, entry by entry."""

import jax

from .._contract import wider


# Keeps its inputs for the backward pass as they are, not in the wider type of the product.
@jax.checkpoint
def multiplied(x: jax.Array, by: jax.Array) -> jax.Array:
    """x * by in x's type; `by`, which broadcasts, is not rounded to it first, as steps of training are smaller.

    >>> import jax.numpy as jnp
    >>> multiplied(jnp.full(2, 2, jnp.bfloat16), jnp.array([1.0, 0.5])).tolist()
    [2.0, 1.0]
    """
    wide = wider(x.dtype, by.dtype)
    return (x.astype(wide) * by.astype(wide)).astype(x.dtype)
