"""Matrices as sums of few products: the decompositions that initial factors are made of.

All take a matrix (in, out), or the transpose of PEFT's weight, in the precision it has, and a rank.
"""

import jax
import jax.numpy as jnp


def principal(matrix: jax.Array, rank: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The first `rank` terms of the singular value decomposition: (in, rank), (rank,) in falling order, (rank, out)."""
    u, s, vh = jnp.linalg.svd(matrix, full_matrices=False)
    return u[:, :rank], s[:rank], vh[:rank]


def principal_by_iteration(
    key: jax.Array, matrix: jax.Array, rank: int, iterations: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`principal`, nearly, by subspace iteration from random vectors (Halko et al., 2009, arXiv:0909.4061)."""
    with jax.default_matmul_precision("highest"):
        basis = _orthonormal(matrix @ jax.random.normal(key, (matrix.shape[1], rank), matrix.dtype))
        for _ in range(iterations):
            basis = _orthonormal(matrix @ _orthonormal(matrix.T @ basis))
        u, s, vh = principal(basis.T @ matrix, rank)
        return basis @ u, s, vh


def _orthonormal(matrix: jax.Array) -> jax.Array:
    return jnp.linalg.qr(matrix)[0]


def triangular(matrix: jax.Array, rank: int) -> tuple[jax.Array, jax.Array]:
    """(a, b) of the first `rank` terms of the decomposition Q R of the transpose: (rank, in) rows of R, (out, rank)."""
    q, r = jnp.linalg.qr(matrix.T)
    return r[:rank], q[:, :rank]
