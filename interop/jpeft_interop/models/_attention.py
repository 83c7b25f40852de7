"""Attention and the masks it takes, from the inputs that a Hugging Face model is called with."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class AttentionMask:
    """Who may look at whom. `allowed` is a bool array that broadcasts to `(batch, heads, queries, keys)`, or None.

    `causal` and `window` (a query sees itself and the `window - 1` keys before it) stay static, so that a fused
    attention kernel can use them and no `(queries, keys)` array is built for them.
    """

    allowed: jax.Array | None = None
    causal: bool = False
    window: int | None = None


def bidirectional_mask(attention_mask: jax.Array | None, batch: int, length: int) -> AttentionMask:
    """Every token sees every token that `attention_mask (batch, length)` marks with a nonzero value."""
    return AttentionMask(_padding(attention_mask, batch, length))


def causal_mask(
    attention_mask: jax.Array | None,
    position_ids: jax.Array | None,
    batch: int,
    length: int,
    *,
    window: int | None = None,
) -> AttentionMask:
    """A token sees itself and what comes before it, within `window` tokens if that is given.

    Without an `attention_mask`, `position_ids` that do not rise by one start a new sequence packed into the same
    row, and sequences do not see one another: the rule of `transformers` where it keeps no cache, as in training.
    """
    if attention_mask is None and position_ids is not None:
        return AttentionMask(_same_sequence(position_ids), causal=True, window=window)
    return AttentionMask(_padding(attention_mask, batch, length), causal=True, window=window)


def _padding(attention_mask: jax.Array | None, batch: int, length: int) -> jax.Array | None:
    if attention_mask is None:
        return None
    if attention_mask.shape != (batch, length):
        raise ValueError(
            f"attention_mask must be (batch, length) = {(batch, length)}, nonzero where there is a token; "
            f"got {attention_mask.shape}"
        )
    return attention_mask.astype(bool)[:, None, None, :]


def _same_sequence(position_ids: jax.Array) -> jax.Array:
    starts = jnp.diff(position_ids, axis=-1) != 1
    sequence = jnp.pad(jnp.cumsum(starts, axis=-1), ((0, 0), (1, 0)))
    return (sequence[:, :, None] == sequence[:, None, :])[:, None]


def check_position_ids(position_ids: jax.Array | None, batch: int, length: int) -> None:
    """Raise ValueError unless `position_ids` is None or `(batch, length)` or `(1, length)`."""
    if position_ids is not None and position_ids.shape not in ((batch, length), (1, length)):
        raise ValueError(f"position_ids must be {(batch, length)} or {(1, length)}, got {position_ids.shape}")


def split_heads(x: jax.Array, head_dim: int) -> jax.Array:
    """`(batch, length, heads * head_dim) -> (batch, length, heads, head_dim)`."""
    return x.reshape(*x.shape[:-1], -1, head_dim)


def attend(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: AttentionMask, *, scale: float | None = None
) -> jax.Array:
    """Scaled dot-product attention, softmax in float32; the heads come back joined.

    Shapes: query `(batch, length, heads, head_dim)`, key and value `(batch, length, kv_heads, head_dim)` where
    `kv_heads` divides `heads`; the result is `(batch, length, heads * head_dim)`. `scale` defaults to
    `head_dim ** -0.5`. A query that may see nothing (a padding token) gets some finite value.
    """
    # JAX's own code mixes bfloat16 and float32 here, which a caller's strict promotion would refuse.
    with jax.numpy_dtype_promotion("standard"):
        output = jax.nn.dot_product_attention(
            query,
            key,
            value,
            mask=mask.allowed,
            scale=scale,
            is_causal=mask.causal,
            local_window_size=None if mask.window is None else (mask.window - 1, 0),
        )
    return output.reshape(*output.shape[:-2], -1)
