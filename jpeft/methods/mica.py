"""MiCA: Minor Component Adaptation (2026, https://arxiv.org/abs/2604.01694).

    W' = W + s A B,   B the left singular vectors of W (out, in) of the r smallest singular values, kept as they are

LoRA's arrays; A is zero at first and trains alone. Asked for by init_lora_weights="mica".
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from .._contract import EMBEDDING, LINEAR, Site, low_rank, register, wide_dtype
from .lora import LORA, LoraConfig, factors, rank_of, scaling


def init(key: jax.Array, site: Site, config: LoraConfig, weight: Callable[[], Any]) -> dict[str, jax.Array]:
    rank, most = rank_of(site, config), min(site.in_features, site.out_features)
    if rank > most:
        raise ValueError(
            f"init_lora_weights='mica' at {site.path!r}: r is {rank}; expected at most {most}, as the weight has "
            f"{site.in_features} inputs and {site.out_features} outputs"
        )
    w = weight()
    _, _, vectors = jnp.linalg.svd(w.astype(wide_dtype(w.dtype)), full_matrices=False)
    a, b = jnp.zeros((rank, site.in_features)), vectors[-rank:].T
    return dict(zip(_NAMES[site.kind], (a, b), strict=True))


_NAMES = {LINEAR: ("lora_A", "lora_B"), EMBEDDING: ("lora_embedding_A", "lora_embedding_B")}

MICA = register(
    low_rank(
        config=LoraConfig,
        init=init,
        factors=factors,
        scaling=scaling,
        dropout=LORA.dropout,
        ties=LORA.ties,
        kinds=frozenset(_NAMES),
        frozen=frozenset(names[1] for names in _NAMES.values()),
    ),
    applies=lambda config: config.init_lora_weights == "mica",
)
