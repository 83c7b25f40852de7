"""BEFT: Bias-Efficient Fine-Tuning of Language Models (Huang et al., 2025, https://arxiv.org/abs/2509.15974).

    y = x W + b + beta,   beta (out)

`beft_bias (1, out)`, zero at first; meant for the value projections. Costs out parameters and, as the layer adds its
bias anyway, no FLOPs for each token and no memory besides. A layer without a bias adds out FLOPs, and cannot be merged.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from .._config import PeftType, TunerConfig
from .._contract import LINEAR, Arrays, Base, Method, Site, register


@dataclasses.dataclass(frozen=True, kw_only=True)
class BeftConfig(TunerConfig):
    """What BEFT trains and where; PEFT's fields and defaults.

    init_weights: whether beta begins as zero; else it is normal.

    >>> BeftConfig(target_modules=["v_proj"]).init_weights
    True
    """

    peft_type: PeftType | None = PeftType.BEFT
    init_weights: bool = True


def init(key: jax.Array, site: Site, config: BeftConfig, weight: Callable[[], Any]) -> dict[str, jax.Array]:
    shape = (1, site.out_features)
    return {"beft_bias": jnp.zeros(shape) if config.init_weights else jax.random.normal(key, shape)}


def forward(p: Arrays, x: jax.Array, base: Base, site: Site, context: Mapping[str, Any]) -> jax.Array:
    y = base(x)
    # Where the layer has a bias, the engine puts the merged one in its place.
    return y if site.bias is not None else y + p["beft_bias"].reshape(-1).astype(y.dtype)


def merge(p: Arrays, w: jax.Array, b: jax.Array | None, site: Site) -> tuple[jax.Array, jax.Array | None]:
    if site.bias is None:
        raise ValueError(
            f"BEFT at {site.path!r}: the layer has no bias to merge into; expected a base with one, or "
            "target_modules without this layer, or the adapter kept beside the weight"
        )
    return w, None if b is None else b + p["beft_bias"].reshape(-1).astype(b.dtype)


BEFT = register(
    Method(
        config=BeftConfig,
        init=init,
        forward=forward,
        merge=merge,
        kinds=frozenset({LINEAR}),
        changes_bias=True,
    )
)
