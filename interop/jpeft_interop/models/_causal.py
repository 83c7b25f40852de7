"""What decoders with layer norms share: attention to what came before, and the way through all layers."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ._activations import activation
from ._adaption import Prompt
from ._attention import Context, attend, remember, split_heads
from ._cache import Memory
from ._call import DecoderCall, cache_after
from ._family import Options
from ._hook import Hook
from ._layers import Linear
from ._outputs import BaseModelOutput
from ._prefix import too_long
from ._rotary import apply_rotary
from ._stack import run

FULL = "full_attention"
"""The only kind of attention in these families."""


def look_back(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    context: Context,
    memory: Memory | None,
    *,
    scale: float | None = None,
) -> tuple[jax.Array, Memory | None]:
    """Attention of `(batch, length, heads, head_dim)` to all that came before, the heads joined; the new memory."""
    key, value, memory = remember(memory, context, key, value)
    return attend(query, key, value, context.masks[FULL], scale=scale, bias=context.bias), memory


class FusedAttention(nnx.Module):
    """Attention whose queries, keys and values are one projection, head by head: that of Megatron-LM.

    Rotated if the context has rotary tables.
    """

    def __init__(self, features: int, heads: int, *, bias: bool = True):
        self.query_key_value = Linear(features, 3 * features, bias=bias)
        self.dense = Linear(features, features, bias=bias)
        self.head_dim = features // heads

    def __call__(self, x: jax.Array, context: Context, memory: Memory | None) -> tuple[jax.Array, Memory | None]:
        query, key, value = jnp.split(split_heads(self.query_key_value(x), 3 * self.head_dim), 3, axis=-1)
        if FULL in context.rotary:
            cos, sin = context.rotary[FULL]
            query, key = apply_rotary(query, cos, sin), apply_rotary(key, cos, sin)
        y, memory = look_back(query, key, value, context, memory)
        return self.dense(y), memory


class FeedForward(nnx.Module):
    """`dense_4h_to_h(act(dense_h_to_4h(x)))`: the feed-forward block of Megatron-LM, whatever `hidden` is."""

    def __init__(self, features: int, hidden: int, act: str):
        self.dense_h_to_4h = Linear(features, hidden)
        self.dense_4h_to_h = Linear(hidden, features)
        self.act = act

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.dense_4h_to_h(activation(self.act)(self.dense_h_to_4h(x)))


def through(
    modules: nnx.Dict,
    x: jax.Array,
    call: DecoderCall,
    context: Context,
    finish: Callable[[jax.Array], jax.Array],
    *,
    options: Options,
    collect: bool,
    adaption_prompts: Mapping[int, Prompt] | None = None,
    hook: Hook | None = None,
) -> BaseModelOutput:
    """Put the embedded input through all layers `(x, context, memory) -> (x, memory)`, and then through `finish`.

    `adaption_prompts`: what the context of single layers holds besides, by number. `hook`: in place of them, what acts
    around the layers.
    """

    def one(layer: Any, x: jax.Array, memory: Memory | None, own: Any) -> tuple[jax.Array, Memory | None]:
        return layer(x, context if own is None else replace(context, adaption=own), memory)

    if hook is not None and adaption_prompts is not None:
        raise ValueError("the layers are given adaption prompts and a shadow, which do not go together; expected one")
    x, memories, entered = run(
        modules,
        x if hook is None else (x, hook.state),
        one if hook is None else hook.around(one),
        memories=call.memories(modules),
        own=adaption_prompts if hook is None else hook.layers,
        options=options,
        collect=collect,
    )
    if hook is not None:
        (x, _), entered = x, tuple(x for x, _ in entered)
    x = finish(x)
    return BaseModelOutput(x, cache_after(call, memories), (*entered, x) if collect else None)


def token_numbers(call: DecoderCall) -> jax.Array:
    """The number of each token that can be looked at among those of its row that are not padding: 0, 1, 2, ...

    Of shape `(batch or 1, keys)`, with the slots of a cache as keys, and a prefix among them; -1 for padding.
    """
    seen = call.seen
    if seen is None:
        return jnp.arange(call.length, dtype=jnp.int32)[None]
    tokens = seen.astype(jnp.int32)
    return jnp.cumsum(tokens, axis=-1) * tokens - 1


def check_length(call: DecoderCall, position_ids: jax.Array | None, positions: int) -> None:
    """Raise ValueError for a text that, with a prefix before it, is longer than the table of its positions."""
    if (position_ids is None or call.virtual) and call.virtual + call.length > positions:
        raise ValueError(too_long(call.length, call.virtual, f"max_position_embeddings={positions}"))
