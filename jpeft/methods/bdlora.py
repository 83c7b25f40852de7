"""BD-LoRA: Block-Diagonal LoRA for tensor-parallel serving (Wang et al., 2025, https://arxiv.org/abs/2510.23346).

    W' = W + s A B with A or B block-diagonal, so that each device needs its own block alone

`lora_A (r, in / nblocks)` or `lora_B (out, r / nblocks)`: the blocks below each other; the other factor is LoRA's.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from .._contract import LINEAR, Arrays, Site, low_rank, register
from .lora import LORA, LoraConfig, factors as lora_factors, init as init_lora, rank_of, scaling


def init(key: jax.Array, site: Site, config: LoraConfig, weight: Callable[[], Any]) -> dict[str, jax.Array]:
    settings: Any = config.use_bdlora
    arrays, side, blocks = init_lora(key, site, config, weight), block_diagonal(site, settings), settings.nblocks
    rank = rank_of(site, config)
    if side is None:
        return arrays
    sizes = {"r": rank, **({"in": site.in_features} if side == "lora_A" else {"out": site.out_features})}
    if any(size % blocks for size in sizes.values()):
        raise ValueError(
            f"use_bdlora at {site.path!r}: {sizes} cannot be cut into nblocks={blocks}; expected a number that divides "
            "both"
        )
    if side == "lora_B":
        return {**arrays, "lora_B": jnp.zeros((site.out_features, rank // blocks))}
    inputs = site.in_features // blocks
    bound = math.sqrt(6 / inputs)
    return {**arrays, "lora_A": jax.random.uniform(key, (rank, inputs), minval=-bound, maxval=bound)}


def block_diagonal(site: Site, blocks: Any) -> str | None:
    """The factor of a module that is block-diagonal; as in PEFT its name has to hold one of those that are listed."""
    name = site.path.rpartition(".")[2]
    listed = {"lora_A": blocks.target_modules_bd_a or (), "lora_B": blocks.target_modules_bd_b or ()}
    sides = [side for side, parts in listed.items() if any(part in name for part in parts)]
    if len(sides) > 1 or (blocks.match_strict and not sides):
        raise ValueError(
            f"use_bdlora: {site.path!r} is meant by {'both' if sides else 'neither'} of target_modules_bd_a="
            f"{blocks.target_modules_bd_a!r} and target_modules_bd_b={blocks.target_modules_bd_b!r}; expected one of "
            "them" + ("" if sides else ", or match_strict=False for plain LoRA")
        )
    return sides[0] if sides else None


def factors(p: Arrays, site: Site) -> tuple[jax.Array, jax.Array]:
    a, b = p["lora_A"], p["lora_B"]
    return lora_factors({**p, "lora_A": spread(a, site.in_features), "lora_B": spread(b, a.shape[0])}, site)


def spread(blocks: jax.Array, columns: int) -> jax.Array:
    """The matrix with so many columns of which the blocks, below each other, are the diagonal."""
    count, (rows, width) = columns // blocks.shape[1], blocks.shape
    diagonal = jnp.eye(count, dtype=blocks.dtype)[:, None, :, None]
    return (blocks.reshape(count, rows // count, 1, width) * diagonal).reshape(rows, columns)


BDLORA = register(
    low_rank(
        config=LoraConfig,
        init=init,
        factors=factors,
        scaling=scaling,
        dropout=LORA.dropout,
        kinds=frozenset({LINEAR}),
    ),
    applies=lambda config: config.use_bdlora is not None,
)
