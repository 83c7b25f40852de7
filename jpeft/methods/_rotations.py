"""Rotations of the inputs of a layer: of blocks of features, by reflections; and of the rows of a kernel."""

import math

import jax
import jax.numpy as jnp

from .._contract import CONVOLUTION, Base, Site


def rotated_size(site: Site, method: str) -> int:
    """How many numbers of the input one output sees: in, or in * height * width of a convolution over images.

    Raises ValueError for convolutions over other than two axes, as PEFT has none.
    """
    if site.kind == CONVOLUTION and len(site.window) != 2:
        raise ValueError(
            f"{method} at {site.path!r}: the convolution has a window of {site.window}; expected one over two axes, "
            "for PEFT has none over others"
        )
    size = site.in_features
    for length in site.window:
        size *= length
    return size


def as_rows(w: jax.Array) -> jax.Array:
    """A canonical weight (in, *window, out) as a matrix (in * window, out)."""
    return w.reshape(-1, w.shape[-1])


def convolved(base: Base, x: jax.Array, change: jax.Array) -> jax.Array:
    """A convolution whose kernel gets a change besides: what one output sees is no axis of x that could be rotated."""
    y = base(x)
    return y + base.apply(x, change.astype(y.dtype)).astype(y.dtype)


def skew(upper: jax.Array, size: int) -> jax.Array:
    """Skew-symmetric matrices (..., size, size) from their entries above the diagonal, row by row."""
    rows, columns = jnp.triu_indices(size, 1)
    zeros = jnp.zeros((*upper.shape[:-1], size, size), upper.dtype)
    half = zeros.at[..., rows, columns].set(upper)
    return half - half.swapaxes(-1, -2)


def clipped(q: jax.Array, eps: float) -> jax.Array:
    """The rows of q, each with its skew-symmetric matrix no longer than eps / sqrt(rows)."""
    length = jnp.sqrt(2 * jnp.sum(q * q, axis=-1, keepdims=True))
    most = jnp.asarray(eps / math.sqrt(q.shape[-2]), q.dtype)
    return jnp.where(length <= most, q, q * (most / jnp.where(length > 0, length, 1)))


def cayley(q: jax.Array) -> jax.Array:
    """(1 - Q)(1 + Q)^-1 for skew-symmetric Q (..., size, size): orthogonal, with the determinant one."""
    one = jnp.eye(q.shape[-1], dtype=q.dtype)
    # Both factors commute, so that solving from the left is the same.
    return jnp.linalg.solve(one + q, one - q)


def neumann(q: jax.Array, terms: int) -> jax.Array:
    """(1 + Q)(1 - Q)^-1 = 1 + 2Q + 2Q^2 + ... up to Q^(terms - 1), which counts once (up to Q^3 for three terms).

    >>> neumann(jnp.full((1, 1), 0.5), 5).tolist()  # 1 + 1 + 1/2 + 1/4 + 1/16
    [[2.8125]]
    """
    total, power = jnp.broadcast_to(jnp.eye(q.shape[-1], dtype=q.dtype), q.shape), q
    if terms == 2:
        return total + 2 * q
    # PEFT has the series of four terms for three, and files of it mean that.
    for _ in range(max(terms, 4) - 2 if terms > 2 else 0):
        total, power = total + 2 * power, jnp.matmul(power, q, precision="highest")
    return total + power if terms > 2 else total


def rotated_blocks(x: jax.Array, blocks: jax.Array) -> jax.Array:
    """x (..., D * size) with each block of it times its matrix of blocks (D, size, size), or the only one (1, ...)."""
    size = blocks.shape[-1]
    parts = x.reshape(*x.shape[:-1], -1, size)
    blocks = blocks.astype(x.dtype)
    if blocks.shape[0] == 1:
        return (parts @ blocks[0]).reshape(x.shape)
    return jnp.einsum("...dk,dkc->...dc", parts, blocks).reshape(x.shape)


def rotated_rows(w: jax.Array, blocks: jax.Array) -> jax.Array:
    """The matrix w (D * size, out) multiplied from the left with the block-diagonal matrix of the blocks."""
    parts = w.reshape(-1, blocks.shape[-1], w.shape[-1])
    return jnp.matmul(blocks.astype(w.dtype), parts, precision="highest").reshape(w.shape)


def with_identities(key: jax.Array, blocks: jax.Array, rate: float) -> jax.Array:
    """Multiplicative dropout: the part `rate` of the blocks (D, size, size), rounded down, replaced by identities."""
    count = blocks.shape[0]
    replaced = jax.random.permutation(key, count) < int(rate * count)
    return jnp.where(replaced[:, None, None], jnp.eye(blocks.shape[-1], dtype=blocks.dtype), blocks)
