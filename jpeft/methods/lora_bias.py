"""LoRA with a bias on its second factor: the option `lora_bias` of PEFT, for LoRAs that were taken out of models.

    W' = W + s A B,   b' = b + s c      (LoRA: Hu et al., 2021, https://arxiv.org/abs/2106.09685)

Beside LoRA's arrays `lora_B.bias`: c (out), zero at first. A layer that has no bias computes s c all the same, but
cannot be merged.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from .._contract import CONVOLUTION, LINEAR, Arrays, Base, Method, Site, dropped, register
from .lora import LORA, LoraConfig, factors, init as init_lora, rank_of, scaling


def init(key: jax.Array, site: Site, config: LoraConfig, weight: Callable[[], Any]) -> dict[str, jax.Array]:
    arrays = init_lora(key, site, config, weight)
    shape, bound = (site.out_features,), 0 if config.init_lora_weights else 1 / math.sqrt(rank_of(site, config))
    drawn = jax.random.uniform(jax.random.fold_in(key, 2), shape, minval=-1, maxval=1)
    return {**arrays, "lora_B.bias": bound * drawn}


def forward(p: Arrays, x: jax.Array, base: Base, site: Site, context: Mapping[str, Any]) -> jax.Array:
    a, b = factors(p, site)
    y = base(x)
    h = base.apply(dropped(x, context), jnp.moveaxis(a, 0, -1))
    y = y + (h @ b.astype(h.dtype)).astype(y.dtype)
    # Where the layer has a bias, the engine puts the merged one in its place.
    return y if site.bias is not None else y + change(p).astype(y.dtype)


def change(p: Arrays) -> jax.Array:
    bias = p["lora_B.bias"]
    return p["scaling"].astype(bias.dtype) * bias


def merge(p: Arrays, w: jax.Array, b: jax.Array | None, site: Site) -> tuple[jax.Array, jax.Array | None]:
    if site.bias is None:
        raise ValueError(
            f"lora_bias=True at {site.path!r}: the layer has no bias to merge into; expected a base with one, or "
            "target_modules without this layer, or the adapter kept beside the weight"
        )
    w = w + jnp.tensordot(*factors(p, site), axes=(0, 0)).astype(w.dtype)
    return w, None if b is None else b + change(p).astype(b.dtype)


LORA_BIAS = register(
    Method(
        config=LoraConfig,
        init=init,
        forward=forward,
        merge=merge,
        scaling=scaling,
        dropout=LORA.dropout,
        kinds=frozenset({LINEAR, CONVOLUTION}),
        changes_bias=True,
    ),
    applies=lambda config: config.lora_bias,
)
