"""QA-LoRA: Quantization-Aware Low-Rank Adaptation (Xu et al., 2023, https://arxiv.org/abs/2309.14717).

    W' = W + s P A B,   P the means of groups of g inputs, times in / g

`lora_A (r, in / g)`, `lora_B (out, r)`, g = qalora_group_size. In PEFT for layers of GPTQ alone and without merging;
here for every linear layer whose inputs the groups divide.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from .._contract import LINEAR, Arrays, Site, low_rank, register
from .lora import LORA, LoraConfig, factors as lora_factors, init as init_lora, rank_of, scaling


def init(key: jax.Array, site: Site, config: LoraConfig, weight: Callable[[], Any]) -> dict[str, jax.Array]:
    groups, rest = divmod(site.in_features, config.qalora_group_size)
    if rest:
        raise ValueError(
            f"use_qalora at {site.path!r}: in_features is {site.in_features}; expected a multiple of "
            f"qalora_group_size={config.qalora_group_size}"
        )
    bound = 1 / math.sqrt(groups)
    a = jax.random.uniform(key, (rank_of(site, config), groups), minval=-bound, maxval=bound)
    return {**init_lora(key, site, config, weight), "lora_A": a}


def factors(p: Arrays, site: Site) -> tuple[jax.Array, jax.Array]:
    groups = p["lora_A"].shape[1]
    size = site.in_features // groups
    return lora_factors({**p, "lora_A": jnp.repeat(p["lora_A"], size, axis=1) * (groups / size)}, site)


QALORA = register(
    low_rank(
        config=LoraConfig,
        init=init,
        factors=factors,
        scaling=scaling,
        dropout=LORA.dropout,
        kinds=frozenset({LINEAR}),
    ),
    applies=lambda config: config.use_qalora,
)
