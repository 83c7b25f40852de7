"""`xlora_scalings`: how much each expert counts for each token at each layer."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer

from ._xlora_config import XLoraConfig


def read_scalings(value: Any) -> jax.Array:
    array = value if isinstance(value, (Tracer, jax.ShapeDtypeStruct)) else jnp.asarray(value)
    if array.ndim != 4 or not jnp.issubdtype(array.dtype, jnp.floating):
        raise ValueError(
            f"xlora_scalings are {array.dtype} of shape {array.shape}; expected numbers (rows, tokens, layers or 1, "
            "experts), such as jpeft.xlora_scalings gives"
        )
    return array  # type: ignore[return-value]


def check_scalings(scalings: jax.Array, config: XLoraConfig) -> None:
    if scalings.shape[-1] != len(config.experts):
        raise ValueError(
            f"xlora_scalings are of shape {scalings.shape}, for {scalings.shape[-1]} experts; expected "
            f"{len(config.experts)}: {', '.join(config.adapters)}"
        )


def kept(scalings: jax.Array, config: XLoraConfig) -> jax.Array:
    """The weights (..., experts) of a token at a layer: of all experts, or of the largest alone."""
    if config.top_k_lora is not None:
        _, largest = lax.top_k(scalings, config.top_k_lora)
        scalings = scalings * jax.nn.one_hot(largest, scalings.shape[-1], dtype=scalings.dtype).sum(-2)
    if config.enable_softmax_topk:
        among = scalings != 0
        # Where there is none, a softmax of nothing would not be a number.
        logits = jnp.where(among, scalings, -jnp.inf)
        logits = jnp.where(among.any(-1, keepdims=True), logits, 0.0)
        scalings = jnp.where(among, jax.nn.softmax(logits), 0.0)
    return scalings
