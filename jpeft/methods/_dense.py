"""Products with a weight and a change that is as large as the weight."""

import jax
import jax.numpy as jnp

from .._contract import Base


def changed_product(x: jax.Array, base: Base, change: jax.Array, kept: jax.Array | None = None) -> jax.Array:
    """x W + x change for a canonical change (in, *window, out). kept: what of x the change gets, if not all.

    Where nothing stands between the two it is one product, and with its gradients three instead of five: no dropout, no
    adapter before this one, and float32 or wider, as steps of training are smaller than what bfloat16 can add to a
    weight.
    """
    w = base.weight()
    if base.alone and (kept is None or kept is x) and min(map(_bits, (x, w))) >= 32:
        return base.apply(x, w + change.astype(w.dtype))
    y = base(x)
    return y + base.apply(x if kept is None else kept, change).astype(y.dtype)


def _bits(array: jax.Array) -> int:
    return jnp.finfo(array.dtype).bits if jnp.issubdtype(array.dtype, jnp.floating) else 0
