"""What every decoder does before its first layer and after its last: positions, masks, cache."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp

from ._attention import Context, Rotary, cache_mask, cached_mask, causal_mask, check_position_ids, visible
from ._cache import Cache, Memory, padded_to
from ._prefix import KeyValuePrefix, check_rows


@dataclass(frozen=True)
class DecoderCall:
    """One call of a decoder. `positions (batch or 1, length)`: as given, or those that follow what is in the cache.

    `cache`: what came before, with the mask of its slots already that of the new tokens, too. `prefix`: in place of
    it, what comes before the first token. `capacity`: the length of the cache to be made, if one is.
    """

    batch: int
    length: int
    positions: jax.Array
    attention_mask: jax.Array | None
    position_ids: jax.Array | None
    cache: Cache | None = None
    prefix: KeyValuePrefix | None = None
    capacity: int | None = None

    @property
    def start(self) -> jax.Array | int:
        """How many keys there are before the first of these tokens, seen or not."""
        return self.virtual if self.cache is None else self.cache.length

    @property
    def virtual(self) -> int:
        """How many of them are of a prefix, which this call puts there."""
        return 0 if self.prefix is None else self.prefix.length

    @property
    def keys(self) -> int:
        """How many keys there is a place for."""
        return self.virtual + self.length if self.cache is None else self.cache.capacity

    @property
    def seen(self) -> jax.Array | None:
        """Which of the keys may be seen, bool `(batch or 1, keys)`; None: all."""
        if self.cache is not None:
            return self.cache.mask
        tokens = visible(self.attention_mask, self.batch, self.length)
        return tokens if self.prefix is None else self.prefix.seen(tokens, self.length)

    def memories(self, names: Iterable[str]) -> Mapping[str, Memory] | None:
        """What the layers of these names attend to besides the tokens."""
        if self.prefix is not None:
            return self.prefix.memories(names)
        return None if self.cache is None else self.cache.layers


def begin(
    batch: int,
    length: int,
    attention_mask: jax.Array | None,
    position_ids: jax.Array | None,
    past_key_values: Cache | KeyValuePrefix | None,
    cache_length: int | None,
) -> DecoderCall:
    """Check the inputs of a call. Raises ValueError for shapes that do not fit one another, the cache or the prefix."""
    check_position_ids(position_ids, batch, length)
    visible(attention_mask, batch, length)
    prefix = past_key_values if isinstance(past_key_values, KeyValuePrefix) else None
    cache = past_key_values if isinstance(past_key_values, Cache) else None
    if cache is not None and cache_length is not None:
        raise ValueError(
            "expected past_key_values or cache_length, got both: a cache keeps the length it was made with"
        )
    taken = length if prefix is None else prefix.length + length
    if cache_length is not None and cache_length < taken:
        virtual = "" if prefix is None else f", {prefix.length} of them virtual,"
        raise ValueError(f"cache_length is {cache_length}, but {taken} tokens{virtual} are to go into the cache")
    start = 0
    if prefix is not None:
        check_rows(prefix, batch)
        start = prefix.starts
    if cache is not None:
        if cache.mask.shape[0] != batch:
            raise ValueError(f"past_key_values has {cache.mask.shape[0]} rows, the input {batch}; expected as many")
        start = cache.length if cache.absent is None else cache.length - cache.absent
        cache = replace(cache, mask=cache_mask(cache, attention_mask, batch, length))
    positions = start + jnp.arange(length, dtype=jnp.int32)[None] if position_ids is None else position_ids
    return DecoderCall(batch, length, positions, attention_mask, position_ids, cache, prefix, cache_length)


def context_of(
    call: DecoderCall, windows: Mapping[str, int | None], rotary: Mapping[str, Rotary] | None = None
) -> Context:
    """What the layers share. `windows`: of each kind of attention, how far back it sees; None for all the way."""
    rotary = {} if rotary is None else rotary
    if call.cache is not None or call.prefix is not None:
        seen = call.seen
        assert seen is not None
        masks = {kind: cached_mask(seen, call.start, call.length, window=window) for kind, window in windows.items()}
        return Context(masks, rotary, start=None if call.cache is None else call.cache.length, capacity=call.capacity)
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
        return replace(call.cache, layers=memories, length=call.cache.length + call.length)
    if call.capacity is None:
        return None
    seen = call.seen
    mask = jnp.broadcast_to(True if seen is None else seen, (call.batch, call.keys))
    absent = None
    if call.prefix is not None and call.prefix.mask is not None:
        absent = jnp.asarray(call.virtual - call.prefix.starts)
    return Cache(memories, padded_to(mask, call.capacity), jnp.asarray(call.keys, jnp.int32), absent)
