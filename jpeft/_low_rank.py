"""The two factors of plain LoRA as matrices, and matrices as the best product of two thin factors.

Shapes, behind the stack axes: a (rank, inputs), b (outputs, rank), where the inputs of a convolution are those of its
whole window; the change of the weight is the transpose of b a.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from ._config import PeftConfig, PeftType
from ._contract import EMBEDDING, Site, is_plain, method_of


def is_lora(config: PeftConfig) -> bool:
    """Whether an adapter is LoRA or one of its variants."""
    return config.peft_type == PeftType.LORA


def is_plain_lora(config: PeftConfig) -> bool:
    """Whether an adapter is LoRA whose change is its two factors and nothing else."""
    return is_lora(config) and is_plain(method_of(config))


def factor_names(site: Site) -> tuple[str, str]:
    """What LoRA calls its two arrays at a site."""
    return ("lora_embedding_A", "lora_embedding_B") if site.kind == EMBEDDING else ("lora_A", "lora_B")


def as_matrices(arrays: Mapping[str, Any], site: Site) -> tuple[jax.Array, jax.Array]:
    """(a, b) of one site, without its scaling.

    >>> site = Site("conv", "conv.kernel", None, "..io", (3, 3, 4, 6), "float32")
    >>> a, b = as_matrices({"lora_A": jnp.ones((2, 4, 3, 3)), "lora_B": jnp.ones((6, 2, 1, 1))}, site)
    >>> a.shape, b.shape
    ((2, 36), (6, 2))
    """
    name_a, name_b = factor_names(site)
    a, b, axes = jnp.asarray(arrays[name_a]), jnp.asarray(arrays[name_b]), len(site.stack)
    return a.reshape(*a.shape[: axes + 1], -1), b.reshape(*b.shape[: axes + 2])


def as_arrays(a: jax.Array, b: jax.Array, site: Site) -> dict[str, jax.Array]:
    """The inverse of `as_matrices`."""
    name_a, name_b = factor_names(site)
    ones = (1 for _ in site.window)
    return {
        name_a: a.reshape(*a.shape[:-1], site.in_features, *site.window),
        name_b: b.reshape(*b.shape, *ones),
    }


def padded(a: jax.Array, b: jax.Array, rank: int) -> tuple[jax.Array, jax.Array]:
    """The same product of factors of a higher rank: rows and columns of zeros are added.

    >>> a, b = padded(jnp.ones((2, 5)), jnp.ones((3, 2)), 4)
    >>> a.shape, b.shape
    ((4, 5), (3, 4))
    """
    missing = rank - a.shape[-2]
    stack = [(0, 0)] * (a.ndim - 2)
    return jnp.pad(a, [*stack, (0, missing), (0, 0)]), jnp.pad(b, [*stack, (0, 0), (0, missing)])


def product_svd(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The thin singular value decomposition (u, s, vh) of b a, which is not built: only its core of the rank's size is.

    >>> u, s, vh = product_svd(jnp.array([[3.0, 4.0, 0.0]]), jnp.array([[2.0], [0.0]]))
    >>> u.shape, s.shape, vh.shape, round(float(s[0]), 4)
    ((2, 1), (1,), (1, 3), 10.0)
    """
    q_a, r_a = jnp.linalg.qr(jnp.swapaxes(a, -1, -2))
    q_b, r_b = jnp.linalg.qr(b)
    u, s, vh = jnp.linalg.svd(r_b @ jnp.swapaxes(r_a, -1, -2), full_matrices=False)
    return q_b @ u, s, vh @ jnp.swapaxes(q_a, -1, -2)


def truncated(u: jax.Array, s: jax.Array, vh: jax.Array, rank: int) -> tuple[jax.Array, jax.Array]:
    """(a, b) of at most the given rank from a singular value decomposition; b has the singular values, as in PEFT."""
    return vh[..., :rank, :], u[..., :, :rank] * s[..., None, :rank]


def largest_rank(site: Site) -> int:
    """The rank that a change of the site's weight can have."""
    return min(site.in_features * math.prod(site.window), site.out_features)
