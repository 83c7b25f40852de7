"""What every decoder does before its first layer and after its last: positions, masks, cache."""

from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from ._attention import Context, Rotary, cache_mask, cached_mask, causal_mask, check_position_ids, visible
from ._cache import Cache, Memory, padded_to


@dataclass(frozen=True)
class DecoderCall:
    """One call of a decoder. `positions (batch or 1, length)`: as given, or those that follow what is in the cache.

    `cache`: what came before, with the mask of its slots already that of the new tokens, too. `capacity`: the length
    of the cache to be made, if one is.
    """

    batch: int
    length: int
    positions: jax.Array
    attention_mask: jax.Array | None
    position_ids: jax.Array | None
    cache: Cache | None = None
    capacity: int | None = None


def begin(
    batch: int,
    length: int,
    attention_mask: jax.Array | None,
    position_ids: jax.Array | None,
    past_key_values: Cache | None,
    cache_length: int | None,
) -> DecoderCall:
    """Check the inputs of a call. Raises ValueError for shapes that do not fit one another or the cache."""
    check_position_ids(position_ids, batch, length)
    visible(attention_mask, batch, length)
    if past_key_values is not None and cache_length is not None:
        raise ValueError(
            "expected past_key_values or cache_length, got both: a cache keeps the length it was made with"
        )
    if cache_length is not None and cache_length < length:
        raise ValueError(f"cache_length is {cache_length}, but {length} tokens are to go into the cache")
    cache, start = past_key_values, 0
    if cache is not None:
        if cache.mask.shape[0] != batch:
            raise ValueError(f"past_key_values has {cache.mask.shape[0]} rows, the input {batch}; expected as many")
        start = cache.length
        cache = Cache(cache.layers, cache_mask(cache, attention_mask, batch, length), cache.length)
    positions = start + jnp.arange(length, dtype=jnp.int32)[None] if position_ids is None else position_ids
    return DecoderCall(batch, length, positions, attention_mask, position_ids, cache, cache_length)


def context_of(
    call: DecoderCall, windows: Mapping[str, int | None], rotary: Mapping[str, Rotary] | None = None
) -> Context:
    """What the layers share. `windows`: of each kind of attention, how far back it sees; None for all the way."""
    rotary = {} if rotary is None else rotary
    if call.cache is not None:
        masks = {
            kind: cached_mask(call.cache.mask, call.cache.length, call.length, window=window)
            for kind, window in windows.items()
        }
        return Context(masks, rotary, start=call.cache.length)
    masks = {
        # A cache is made for text that goes on: as in transformers, no packed sequences are looked for then.
        kind: causal_mask(
            call.attention_mask,
            call.position_ids if call.capacity is None else None,
            call.batch,
            call.length,
            window=window,
        )
        for kind, window in windows.items()
    }
    return Context(masks, rotary, capacity=call.capacity)


def cache_after(call: DecoderCall, memories: Mapping[str, Memory]) -> Cache | None:
    """The cache for the next call; None if none was asked for."""
    if call.cache is not None:
        return Cache(memories, call.cache.mask, call.cache.length + call.length)
    if call.capacity is None:
        return None
    seen = visible(call.attention_mask, call.batch, call.length)
    mask = padded_to(jnp.ones((call.batch, call.length), bool) if seen is None else seen, call.capacity)
    return Cache(memories, mask, jnp.asarray(call.length, jnp.int32))
