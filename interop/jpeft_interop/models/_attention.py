"""Attention, who may look at whom in it, and the context that all layers of one call share."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp

from ._adaption import Prompt
from ._cache import Cache, Memory, padded_to
from ._prefix import after

Rotary = tuple[jax.Array, jax.Array]
"""Cosines and sines, as `rotary_tables` makes them."""


@dataclass(frozen=True)
class AttentionMask:
    """Who may look at whom. `allowed` is a bool array that broadcasts to `(batch, heads, queries, keys)`, or None.

    `causal` and `window` (a query sees itself and the `window - 1` keys before it) stay static, so that a fused
    attention kernel can use them and no `(queries, keys)` array is built for them.
    """

    allowed: jax.Array | None = None
    causal: bool = False
    window: int | None = None


@dataclass(frozen=True)
class Context:
    """What every layer of a call is given beside its input.

    `masks` and `rotary`: by kind of attention, for models whose layers differ in it. `start`: the slot of the cache
    that the first token goes to; None without a cache. `capacity`: the length of the cache to be made, if one is.
    `bias`: what is added to the scores of every layer, for models whose positions are there. `encoded`: the encoder's
    output, for a decoder that attends to it; None where the cache holds its keys and values. `adaption`: the adaption
    prompt of this layer alone.
    """

    masks: Mapping[str, AttentionMask]
    rotary: Mapping[str, Rotary] = field(default_factory=dict)
    start: jax.Array | None = None
    capacity: int | None = None
    bias: jax.Array | None = None
    encoded: jax.Array | None = None
    adaption: Prompt | None = None


def remember(
    memory: Memory | None, context: Context, key: jax.Array, value: jax.Array
) -> tuple[jax.Array, jax.Array, Memory | None]:
    """The keys and values to attend to, `(batch, keys, kv_heads, head_dim)`, and the layer's memory with them.

    A memory where the context has no `start` is a prefix.
    """
    if context.start is not None and memory is not None:
        at = (0, context.start, 0, 0)
        new = {
            "key": jax.lax.dynamic_update_slice(memory["key"], key.astype(memory["key"].dtype), at),
            "value": jax.lax.dynamic_update_slice(memory["value"], value.astype(memory["value"].dtype), at),
        }
        return new["key"].astype(key.dtype), new["value"].astype(value.dtype), {**memory, **new}
    if memory is not None:
        key, value = after(memory, key, value)
    if context.capacity is not None:
        return key, value, {"key": padded_to(key, context.capacity), "value": padded_to(value, context.capacity)}
    return key, value, None


def bidirectional_mask(attention_mask: jax.Array | None, batch: int, length: int) -> AttentionMask:
    """Every token sees every token that `attention_mask (batch, length)` marks with a nonzero value."""
    seen = visible(attention_mask, batch, length)
    return AttentionMask(None if seen is None else seen[:, None, None, :])


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
    seen = visible(attention_mask, batch, length)
    return AttentionMask(None if seen is None else seen[:, None, None, :], causal=True, window=window)


def cached_mask(mask: jax.Array, start: jax.Array | int, length: int, *, window: int | None = None) -> AttentionMask:
    """What `length` tokens, put into the cache from slot `start` on, see of its slots `mask (batch or 1, capacity)`."""
    queries = start + jnp.arange(length)[:, None]
    keys = jnp.arange(mask.shape[1])[None, :]
    allowed = keys <= queries
    if window is not None:
        allowed &= keys > queries - window
    return AttentionMask(allowed[None, None] & mask[:, None, None, :])


def cache_mask(cache: Cache, attention_mask: jax.Array | None, batch: int, length: int) -> jax.Array:
    """The mask of the cache's slots once `length` more tokens are in it; `attention_mask` is that of the new ones."""
    seen = visible(attention_mask, batch, length)
    seen = jnp.ones((batch, length), bool) if seen is None else seen
    return jax.lax.dynamic_update_slice(cache.mask, seen, (0, cache.length))


def visible(attention_mask: jax.Array | None, batch: int, length: int) -> jax.Array | None:
    """The attention mask as bool `(batch, length)`. Raises ValueError for another shape."""
    if attention_mask is None:
        return None
    if attention_mask.shape != (batch, length):
        raise ValueError(
            f"attention_mask must be (batch, length) = {(batch, length)}, nonzero where there is a token; "
            f"got {attention_mask.shape}"
        )
    return attention_mask.astype(bool)


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
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: AttentionMask,
    *,
    scale: float | None = None,
    bias: jax.Array | None = None,
    softcap: float | None = None,
) -> jax.Array:
    """Scaled dot-product attention, softmax in float32; the heads come back joined.

    Shapes: query `(batch, length, heads, head_dim)`, key and value `(batch, keys, kv_heads, head_dim)` where
    `kv_heads` divides `heads`; the result is `(batch, length, heads * head_dim)`. `scale` defaults to
    `head_dim ** -0.5`. `bias`, added to the scores, broadcasts to `(batch, heads, length, keys)`. `softcap` bounds
    the scores by `softcap * tanh(scores / softcap)`. A query that may see nothing gets some finite value.
    """
    if softcap is not None:
        return _attend_capped(query, key, value, mask, scale=scale, softcap=softcap)
    # JAX's own code mixes bfloat16 and float32 here, which a caller's strict promotion would refuse.
    with jax.numpy_dtype_promotion("standard"):
        output = jax.nn.dot_product_attention(
            query,
            key,
            value,
            bias=bias,
            mask=mask.allowed,
            scale=scale,
            is_causal=mask.causal,
            local_window_size=None if mask.window is None else (mask.window - 1, 0),
        )
    return output.reshape(*output.shape[:-2], -1)


def _attend_capped(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: AttentionMask, *, scale: float | None, softcap: float
) -> jax.Array:
    """`attend` written out, for jax.nn.dot_product_attention has no place for the cap."""
    groups = key.shape[2]
    grouped = query.reshape(*query.shape[:2], groups, -1, query.shape[-1])
    scores = jnp.einsum("bqgnd,bkgd->bgnqk", grouped, key).astype(jnp.float32)
    scores = scores * (query.shape[-1] ** -0.5 if scale is None else scale)
    scores = softcap * jnp.tanh(scores / softcap)
    allowed = _written_out(mask, query.shape[1], key.shape[1])
    if allowed is not None:
        allowed = jnp.broadcast_to(allowed, (allowed.shape[0], query.shape[2], *allowed.shape[2:]))
        allowed = allowed.reshape(allowed.shape[0], groups, -1, *allowed.shape[2:])
        scores = jnp.where(allowed, scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    output = jnp.einsum("bgnqk,bkgd->bqgnd", weights, value)
    return output.reshape(*query.shape[:2], -1)


def _written_out(mask: AttentionMask, queries: int, keys: int) -> jax.Array | None:
    distance = jnp.arange(queries)[:, None] - jnp.arange(keys)[None, :]
    allowed = mask.allowed
    if mask.causal:
        causal = (distance >= 0)[None, None]
        allowed = causal if allowed is None else allowed & causal
    if mask.window is not None:
        near = (distance < mask.window)[None, None]
        allowed = near if allowed is None else allowed & near
    return allowed
