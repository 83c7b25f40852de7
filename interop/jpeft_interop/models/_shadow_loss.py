"""What a shadow (ShadowPEFT) makes of the tokens by itself, and how wrong it is: a part of the loss."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from ._losses import causal_lm_loss, chunked_causal_lm_loss, classification_loss
from ._shadow import Shadow

SCORED = ("causal-lm", "sequence-classification")
"""Tasks whose models have the shadow predict, too, if they are given labels."""


def of_tokens(
    shadow: Shadow | None,
    state: jax.Array | None,
    scores: Callable[[jax.Array], jax.Array],
    labels: jax.Array | None,
    chunk_size: int | None,
) -> jax.Array | None:
    """The loss of the next tokens that the shadow's `state` predicts; None if it does not count.

    `scores`: those of the model's own output layer.
    """
    if shadow is None or state is None or labels is None or not shadow.scored:
        return None
    if chunk_size is not None:
        return chunked_causal_lm_loss(state, scores, labels, chunk_size)
    return causal_lm_loss(scores(state), labels)


def of_sequences(
    shadow: Shadow | None, state: jax.Array | None, attention_mask: jax.Array | None, labels: jax.Array | None
) -> jax.Array | None:
    """The loss of the classes that the shadow's head makes of the last token that the mask shows; None without one.

    As in PEFT the labels' own form says what loss it is, whatever the config's problem_type.
    """
    if shadow is None or state is None or labels is None or shadow.head is None or not shadow.scored:
        return None
    length = state.shape[1]
    seen = jnp.ones(state.shape[:2], bool) if attention_mask is None else attention_mask != 0
    last = jnp.max(jnp.where(seen, jnp.arange(length, dtype=jnp.int32), 0), axis=1)
    pooled = jnp.take_along_axis(state, last[:, None, None], axis=1)[:, 0]
    return classification_loss((pooled.astype(shadow.head.dtype) @ shadow.head.T).astype(state.dtype), labels)


def with_shadow_loss(output: Any, shadow: Shadow | None) -> Any:
    """The output with the loss of the shadow's own predictions, times its weight, in its loss, if it has both."""
    loss = getattr(output, "shadow_loss", None)
    if shadow is None or loss is None or output.loss is None:
        return output
    return replace(output, loss=output.loss + shadow.auxiliary_loss_weight * loss)
