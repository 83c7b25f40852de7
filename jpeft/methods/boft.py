"""BOFT: Orthogonal Butterfly (Liu et al., 2023, https://arxiv.org/abs/2311.06243).

    W' = B_m ... B_1 W diag(s),   B_i = P_i diag(R_1, ..., R_D) P_i^T,   R = (1 - Q)(1 + Q)^-1, Q = (A - A^T) / 2

`boft_R` (m, D, size, size) holds the A; `boft_s` (out, 1), or (1, out) of a convolution. P_i pairs halves of blocks
that are 2^(i-1) half blocks apart: an exchange of two axes, without indices; m = boft_n_butterfly_factor, and 1 is OFT.
Costs m in size + out parameters, 2 m in size FLOPs and m in numbers of memory for each token; a convolution is done
twice, with W and with (B - 1) W. PEFT makes m = 1 of any m where its CUDA extension is not built, which makes its
files smaller than their configs say: they are refused here, by the shapes; for m = 1 it agrees.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from .._contract import CONVOLUTION, LINEAR, Arrays, Base, Method, Site, register, wide_dtype
from ._elementwise import multiplied
from ._oft_config import BOFTConfig as BOFTConfig
from ._rotations import as_rows, cayley, convolved, rotated_blocks, rotated_size, with_identities


def init(key: jax.Array, site: Site, config: BOFTConfig, weight: Callable[[], Any]) -> dict[str, jax.Array]:
    features, factors = rotated_size(site, "BOFT"), config.boft_n_butterfly_factor
    field = "boft_block_size" if config.boft_block_size else "boft_block_num"
    given = getattr(config, field)
    if features % given:
        raise ValueError(f"{field} is {given} at {site.path!r}; expected a divisor of its {features} features")
    other = features // given
    size, number = (given, other) if config.boft_block_size else (other, given)
    if factors > 1 and (size % 2 or number % 2 ** (factors - 1)):
        raise ValueError(
            f"boft_n_butterfly_factor is {factors} at {site.path!r}, with {number} blocks of {size}; expected an even "
            f"size, and a number of blocks that is a multiple of {2 ** (factors - 1)}"
        )
    shape, scales = (factors, number, size, size), (site.out_features, 1)
    key_r, key_s = jax.random.split(key)
    scales = scales[::-1] if site.kind == CONVOLUTION else scales
    if config.init_weights:
        return {"boft_R": jnp.zeros(shape), "boft_s": jnp.ones(scales)}
    return {
        "boft_R": 0.1 * jax.random.normal(key_r, shape),
        "boft_s": 1 + 0.1 * jax.random.normal(key_s, scales),
    }


def factored(x: jax.Array, blocks: jax.Array, level: int) -> jax.Array:
    """x B for x (..., in) and the blocks (D, size, size) of the factor B of this level, from 0."""
    if level == 0:
        return rotated_blocks(x, blocks)
    apart = x.reshape(*x.shape[:-1], -1, 2, 2**level, blocks.shape[-1] // 2)
    paired = apart.swapaxes(-2, -3)
    turned = rotated_blocks(paired.reshape(x.shape), blocks).reshape(paired.shape)
    return turned.swapaxes(-2, -3).reshape(x.shape)


def rotated(x: jax.Array, blocks: jax.Array) -> jax.Array:
    """x B_m ... B_1 for x (..., in) and blocks (m, D, size, size)."""
    for level in reversed(range(blocks.shape[0])):
        x = factored(x, blocks[level], level)
    return x


def rotated_kernel(w: jax.Array, blocks: jax.Array) -> jax.Array:
    """B_m ... B_1 W for a weight (in, *window, out): its transpose times the transposed factors in order."""
    columns = as_rows(w).T
    for level, own in enumerate(blocks.swapaxes(-1, -2)):
        columns = factored(columns, own, level)
    return columns.T.reshape(w.shape)


def blocks_of(p: Arrays) -> jax.Array:
    a = p["boft_R"].astype(wide_dtype(p["boft_R"].dtype))
    return cayley((a - a.swapaxes(-1, -2)) / 2)


def forward(p: Arrays, x: jax.Array, base: Base, site: Site, context: Mapping[str, Any]) -> jax.Array:
    blocks, scale = blocks_of(p), p["boft_s"].reshape(-1)
    if "rng" in context:
        key_factor, key_blocks = jax.random.split(context["rng"])
        level = jax.random.randint(key_factor, (), 0, blocks.shape[0])
        dropped = with_identities(key_blocks, blocks[level], context["config"].boft_dropout)
        blocks = blocks.at[level].set(dropped)
    if site.kind == CONVOLUTION:
        w = base.weight().astype(blocks.dtype)
        return multiplied(convolved(base, x, rotated_kernel(w, blocks) - w), scale)
    return multiplied(base(rotated(x, blocks)), scale)


def merge(p: Arrays, w: jax.Array, b: jax.Array | None, site: Site) -> tuple[jax.Array, jax.Array | None]:
    blocks, scale = blocks_of(p), p["boft_s"].reshape(-1).astype(w.dtype)
    if site.kind == CONVOLUTION:
        own = p["base"].astype(w.dtype)
        return (w + rotated_kernel(own, blocks) - own) * scale, b
    return rotated_kernel(w, blocks) * scale, b


BOFT = register(
    Method(
        config=BOFTConfig,
        init=init,
        forward=forward,
        merge=merge,
        kinds=frozenset({LINEAR, CONVOLUTION}),
        noisy=lambda config: config.boft_dropout > 0,
        needs_base=True,
    )
)
