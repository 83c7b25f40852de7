"""OFT: Orthogonal Finetuning (Qiu et al., 2023, https://arxiv.org/abs/2306.07280; v2: https://arxiv.org/abs/2506.19847).

    W' = R W,   R block-diagonal: blocks R_i (size, size), orthogonal, each of a skew-symmetric Q_i
    R_i = 1 + 2 Q + 2 Q^2 + ... + Q^(terms - 1)  (nearly orthogonal),  or exactly (1 - Q)(1 + Q)^-1

`oft_R` (blocks, size (size - 1) / 2) holds what is above the diagonals, or (1, ...) with block_share; on lookup tables
`oft_embedding_R`, with W' = W R. Costs in (size - 1) / 2 parameters, 2 in size FLOPs and in numbers of memory for each
token, 2 (terms - 2) in size^2 FLOPs once for each use; a convolution is done twice, with W and with (R - 1) W. There R
acts on in * height * width numbers, as in the paper; PEFT's own forward adds up patches that overlap, and disagrees
with its merged weights. PEFT never applies module_dropout, clips the arrays inside forward (here: `oft_projection`),
and has for three terms the series of four: so here, for its files. The exact form turns the other way, as in PEFT.
"""

import dataclasses
import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .._contract import CONVOLUTION, EMBEDDING, LINEAR, Arrays, Base, Method, Site, register, wide_dtype
from ._oft_config import OFTConfig as OFTConfig
from ._rotations import (
    as_rows,
    cayley,
    clipped,
    convolved,
    neumann,
    rotated_blocks,
    rotated_rows,
    rotated_size,
    skew,
    with_identities,
)


def init(key: jax.Array, site: Site, config: OFTConfig, weight: Callable[[], Any]) -> dict[str, jax.Array]:
    features = site.out_features if site.kind == EMBEDDING else rotated_size(site, "OFT")
    field = "r" if config.r else "oft_block_size"
    wanted = getattr(config, field)
    found = min((n for n in range(1, features + 1) if features % n == 0), key=lambda n: (abs(n - wanted), n))
    if found != wanted:
        warnings.warn(
            f"{field} is {wanted} at {site.path!r}, which does not divide its {features} features; {found} is taken",
            stacklevel=2,
        )
    blocks, size = (found, features // found) if config.r else (features // found, found)
    shape = (1 if config.block_share else blocks, size * (size - 1) // 2)
    values = jnp.zeros(shape) if config.init_weights else 0.1 * jax.random.normal(key, shape)
    return {"oft_embedding_R" if site.kind == EMBEDDING else "oft_R": values}


def blocks_of(p: Arrays, site: Site, config: OFTConfig) -> jax.Array:
    """The blocks of R (blocks or 1, size, size), in float32 or wider."""
    q = p["oft_embedding_R" if site.kind == EMBEDDING else "oft_R"]
    q = q.astype(wide_dtype(q.dtype))
    if config.coft:
        # As if they had been clipped after the last step: by what is cut off no gradient is changed.
        q = q + lax.stop_gradient(clipped(q, config.eps) - q)
    # Of size (size - 1) / 2 entries.
    size = (1 + math.isqrt(1 + 8 * q.shape[-1])) // 2
    q = skew(q, size)
    return neumann(q, config.num_cayley_neumann_terms) if config.use_cayley_neumann else cayley(q)


def forward(p: Arrays, x: jax.Array, base: Base, site: Site, context: Mapping[str, Any]) -> jax.Array:
    config = context["config"]
    blocks = blocks_of(p, site, config)
    if "rng" in context and not config.block_share:
        blocks = with_identities(context["rng"], blocks, config.module_dropout)
    if site.kind == EMBEDDING:
        return rotated_blocks(base(x), blocks)
    if site.kind == CONVOLUTION:
        return convolved(base, x, changed_kernel(base.weight(), blocks))
    return base(rotated_blocks(x, blocks))


def changed_kernel(w: jax.Array, blocks: jax.Array) -> jax.Array:
    """(R - 1) W for a kernel (in, *window, out)."""
    return rotated_rows(as_rows(w), blocks - jnp.eye(blocks.shape[-1], dtype=blocks.dtype)).reshape(w.shape)


def merge(p: Arrays, w: jax.Array, b: jax.Array | None, site: Site) -> tuple[jax.Array, jax.Array | None]:
    config: Any = p["config"]
    blocks = blocks_of(p, site, config)
    if site.kind == EMBEDDING:
        return rotated_blocks(w, blocks), b
    if site.kind == CONVOLUTION:
        return w + changed_kernel(p["base"].astype(w.dtype), blocks), b
    return rotated_rows(w, blocks), b


def oft_projection(wrapped: Any) -> Any:
    """The parameters with the arrays of every OFT adapter with `coft` clipped to |Q_i| <= eps / sqrt(blocks).

    wrapped: from `jpeft.wrap`. For use after each update, `oft_projection(optax.apply_updates(wrapped, updates))`: what
    is longer acts as if it had been clipped, but an optimizer would go on to make it longer. Works under jit.

    >>> import jax.numpy as jnp, jpeft
    >>> config = jpeft.OFTConfig(oft_block_size=2, coft=True, init_weights=False, target_modules=["q"])
    >>> wrapped = oft_projection(jpeft.wrap({"q": {"kernel": jnp.eye(4)}}, config))
    >>> bool(jnp.abs(wrapped.adapters["default"].weights["q"]["oft_R"]).max() <= 6e-5)
    True
    """

    def projected(adapter: Any) -> Any:
        config = adapter.config
        if not isinstance(config, OFTConfig) or not config.coft:
            return adapter
        weights = jax.tree.map(lambda q: clipped(q, config.eps), dict(adapter.weights))
        return dataclasses.replace(adapter, weights=weights)

    return dataclasses.replace(wrapped, adapters={name: projected(own) for name, own in wrapped.adapters.items()})


OFT = register(
    Method(
        config=OFTConfig,
        init=init,
        forward=forward,
        merge=merge,
        kinds=frozenset({LINEAR, EMBEDDING, CONVOLUTION}),
        noisy=lambda config: config.module_dropout > 0,
        needs_base=True,
        needs_config=True,
    )
)
