"""LoKr's Kronecker product: the sizes of its parts, and its two ways to act."""

import functools
import math

import jax
import jax.numpy as jnp

from .._contract import Arrays, Base, Site


def factorization(size: int, factor: int) -> tuple[int, int]:
    """(small, large) whose product is the size: `factor` and the rest if it divides, else as PEFT looks for them.

    >>> factorization(128, -1), factorization(128, 4), factorization(12, 5)
    ((8, 16), (4, 32), (3, 4))
    """
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    most = size if factor == -1 else factor
    small = max(m for m in range(1, math.isqrt(size) + 1) if size % m == 0 and (m <= most or m == 1))
    return small, size // small


def left(p: Arrays) -> jax.Array:
    """s C: (g, m)."""
    c = p["lokr_w1"] if "lokr_w1" in p else p["lokr_w1_a"] @ p["lokr_w1_b"]
    return p["scaling"].astype(c.dtype) * c


def right(p: Arrays, site: Site) -> tuple[jax.Array, jax.Array | None]:
    """D as a kernel (n, *window, k), or as one (n, *window, r) and a matrix (r, k)."""
    if "lokr_w2" in p:
        return jnp.moveaxis(p["lokr_w2"], 0, -1), None
    a, b = p["lokr_w2_a"], p["lokr_w2_b"]
    if "lokr_t2" not in p:
        return b.reshape(b.shape[0], -1, *site.window).transpose(*range(1, 2 + len(site.window)), 0), a.T
    of_inputs = jnp.einsum("ijw,jn->nwi", p["lokr_t2"].reshape(*p["lokr_t2"].shape[:2], -1), b)
    return of_inputs.reshape(b.shape[1], *site.window, -1), a


def is_rearranged(p: Arrays, site: Site) -> bool:
    return "lokr_w2" in p and len(site.window) == 1


def delta(p: Arrays, site: Site) -> jax.Array:
    c, (d, last) = left(p), right(p, site)
    if is_rearranged(p, site):
        whole = jnp.kron(c, p["lokr_w2"]).reshape(site.out_features, site.in_features, *site.window)
        return jnp.moveaxis(whole, 0, -1)
    d = d if last is None else d @ last
    product = jnp.einsum("gm,nwk->mnwgk", c, d.reshape(d.shape[0], -1, d.shape[-1]))
    return product.reshape(site.in_features, *site.window, site.out_features)


def change_of(p: Arrays, x: jax.Array, base: Base, site: Site) -> jax.Array:
    c, (d, last) = left(p), right(p, site)
    (g, m), n = c.shape, d.shape[0]
    k = d.shape[-1] if last is None else last.shape[-1]
    of_right = d.size + (0 if last is None else last.size)

    def by_right(z: jax.Array) -> jax.Array:
        # Convolutions have one axis of rows: that of the parts joins it.
        h = base.apply(z.reshape(-1, *z.shape[2:]), d) if site.window else base.apply(z, d)
        h = h if last is None else h @ last.astype(h.dtype)
        return h.reshape(z.shape[0], -1, *h.shape[1:]) if site.window else h

    z = jnp.moveaxis(x.reshape(*x.shape[:-1], m, n), -2, 0)
    by_left = functools.partial(jnp.einsum, "gm,m...->...g")
    if m * of_right + m * g * k <= g * of_right + n * m * g:
        h = by_right(z)
        h = by_left(c.astype(h.dtype), h)
    else:
        h = jnp.moveaxis(by_right(jnp.moveaxis(by_left(c.astype(z.dtype), z), -1, 0)), 0, -1)
    h = jnp.swapaxes(h, -1, -2)
    return h.reshape(*h.shape[:-2], g * k)
