"""Outputs of a weight in groups that use its inputs alike, as PEFT finds them: with torch.svd_lowrank and scikit-learn.

Singular vectors from random projections (Halko et al., 2009, arXiv:0909.4061) with PyTorch's random numbers, and
k-means by Lloyd's algorithm from rows that scikit-learn's generator chooses. Neither the signs of singular vectors nor
any turn of them changes the groups, so that they are PEFT's own unless an output is as far from two centres up to
rounding. With as many vectors as outputs every output is, and the groups are arbitrary, in PEFT as well.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .._torch_random import Generator

_SEED, _STEPS, _TOLERANCE = 123456789, 10, 1e-4


def approximate_vectors(matrix: jax.Array, rank: int, seed: int) -> tuple[jax.Array, jax.Array]:
    """Singular vectors (out, rank) and (in, rank) of a matrix (out, in), as torch.svd_lowrank(niter=2) finds them."""
    wide = matrix.shape[0] < matrix.shape[1]
    tall = matrix.T if wide else matrix
    drawn = jnp.asarray(Generator(seed).normal((tall.shape[1], rank), 0.0, 1.0), matrix.dtype)
    with jax.default_matmul_precision("highest"):
        basis = jnp.linalg.qr(tall @ drawn)[0]
        for _ in range(2):
            basis = jnp.linalg.qr(tall @ jnp.linalg.qr(tall.T @ basis)[0])[0]
        u, _, vh = jnp.linalg.svd(basis.T @ tall, full_matrices=False)
        u = basis @ u
    return (vh.T, u) if wide else (u, vh.T)


def clusters(rows: jax.Array, count: int) -> jax.Array:
    """The group (n,), int32, of each of the rows (n, features), by k-means; count: of groups, at most n."""
    n = rows.shape[0]
    even = np.ones(n, np.float32)
    first = np.random.RandomState(_SEED).choice(n, size=count, replace=False, p=even / even.sum())
    x = rows - rows.mean(0)
    tolerance = _TOLERANCE * jnp.var(x, axis=0).mean()

    def nearest(centers: jax.Array) -> jax.Array:
        with jax.default_matmul_precision("highest"):
            return jnp.argmin((centers**2).sum(1) - 2 * x @ centers.T, axis=1).astype(jnp.int32)

    def step(state: Any) -> Any:
        index, labels, centers, _ = state
        found = nearest(centers)
        moved = _means(x, _without_empty(x, found, centers), count)
        done = jnp.all(found == labels) | (((moved - centers) ** 2).sum() <= tolerance)
        return index + 1, found, moved, done

    start = (jnp.int32(0), jnp.full(n, -1, jnp.int32), x[first], jnp.asarray(False))
    _, _, centers, _ = lax.while_loop(lambda state: (state[0] < _STEPS) & ~state[3], step, start)
    return nearest(centers)


def _means(x: jax.Array, labels: jax.Array, count: int) -> jax.Array:
    of = (labels == jnp.arange(count, dtype=jnp.int32)[:, None]).astype(x.dtype)
    with jax.default_matmul_precision("highest"):
        return of @ x / jnp.maximum(of.sum(1), 1)[:, None]


def _without_empty(x: jax.Array, labels: jax.Array, centers: jax.Array) -> jax.Array:
    """The labels with the rows farthest from their centres put into groups that have none."""
    count = centers.shape[0]
    sizes = jnp.zeros(count, jnp.int32).at[labels].add(1)
    distances = ((x - centers[labels]) ** 2).sum(1)
    farthest = lax.top_k(distances, count)[1]
    place = jnp.cumsum(sizes == 0, dtype=jnp.int32) - 1
    target = jnp.where(sizes == 0, farthest[place], x.shape[0])
    return labels.at[target].set(jnp.arange(count, dtype=jnp.int32), mode="drop")
