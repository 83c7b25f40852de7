"""What encoder-decoders share: how they are called, their attention to the encoder, their layers and heads.

A call takes the encoder's input and `attention_mask`, or `encoder_last_hidden_state` in place of running the encoder,
and `decoder_input_ids`. With `cache_length` it returns a cache that holds the keys and values of the encoder's output,
too; a later call takes the cache, the new `decoder_input_ids` and the encoder's `attention_mask`. A prefix is the
decoder's: what its attention to its own tokens finds before them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from ._activations import activation
from ._attention import Context, attend, bidirectional_mask, remember, split_heads
from ._cache import Cache, Memory
from ._call import DecoderCall, begin, cache_after, context_of
from ._family import Options
from ._heads import Backbone
from ._layers import LayerNorm, Linear
from ._outputs import (
    BaseModelOutput,
    ClassifierOutput,
    QuestionAnsweringOutput,
    Seq2SeqLMOutput,
    Seq2SeqModelOutput,
)
from ._prefix import Past, too_long
from ._stack import run

SELF, CROSS = "self", "cross"
"""Kinds of attention, by which a context has masks: within a sequence, and of the decoder to the encoder's output."""

SOURCE = ("input_ids", "attention_mask", "inputs_embeds")
TARGET = ("decoder_input_ids", "decoder_attention_mask", "decoder_inputs_embeds", "encoder_last_hidden_state")
"""The inputs of a text encoder, and those of every decoder."""

ENCODER_DECODER = {"is_encoder_decoder": (True,)}
"""The value that config.json must hold, if it says anything of it."""

Embedding = Callable[[jax.Array | None, jax.Array | None], jax.Array]
"""`(ids or None, embeddings or None) -> (batch, length, features)`."""

Encoder = Callable[..., BaseModelOutput]
"""`(attention_mask, output_hidden_states, **its inputs) -> BaseModelOutput`."""


class Decoder(Protocol):
    """The layers of a decoder and what is before and after them."""

    def __call__(
        self, x: jax.Array, call: DecoderCall, context: Context, *, collect: bool
    ) -> tuple[jax.Array, Mapping[str, Memory], tuple[jax.Array, ...]]:
        """The last hidden state, the layers' memories, and if `collect` what went into every layer."""
        ...


def encode_and_decode(
    encoder: Encoder,
    embedding: Embedding,
    decoder: Decoder,
    *,
    attention_mask: jax.Array | None = None,
    decoder_input_ids: jax.Array | None = None,
    decoder_attention_mask: jax.Array | None = None,
    decoder_inputs_embeds: jax.Array | None = None,
    encoder_last_hidden_state: jax.Array | None = None,
    past_key_values: Past | None = None,
    cache_length: int | None = None,
    output_hidden_states: bool = False,
    **source: jax.Array,
) -> Seq2SeqModelOutput:
    """A call of an encoder-decoder; `source` is the encoder's input, `embedding` that of the decoder.

    Raises ValueError for inputs that contradict one another, or the cache.
    """
    if (decoder_input_ids is None) == (decoder_inputs_embeds is None):
        given = "neither" if decoder_input_ids is None else "both"
        raise ValueError(f"expected one of decoder_input_ids and decoder_inputs_embeds, got {given}")
    encoded, encoder_states = encoder_last_hidden_state, None
    if isinstance(past_key_values, Cache):
        if given := [*source, *(() if encoded is None else ("encoder_last_hidden_state",))]:
            raise ValueError(
                "past_key_values holds what the decoder needs of the encoder: give attention_mask and "
                f"decoder_input_ids beside it, without {', '.join(given)}"
            )
    elif encoded is None:
        output = encoder(attention_mask, output_hidden_states, **source)
        encoded, encoder_states = output.last_hidden_state, output.hidden_states
    x = embedding(decoder_input_ids, decoder_inputs_embeds)
    encoded = None if encoded is None else encoded.astype(x.dtype)
    _check_shapes(x, decoder_attention_mask, encoded)
    call = begin(x.shape[0], x.shape[1], decoder_attention_mask, None, past_key_values, cache_length)
    context = _with_encoder(context_of(call, {SELF: None}), call, encoded, attention_mask)
    x, memories, entered = decoder(x, call, context, collect=output_hidden_states)
    decoder_states = (*entered, x) if output_hidden_states else None
    return Seq2SeqModelOutput(x, encoded, cache_after(call, memories), decoder_states, encoder_states)


def _check_shapes(x: jax.Array, decoder_attention_mask: jax.Array | None, encoded: jax.Array | None) -> None:
    if decoder_attention_mask is not None and decoder_attention_mask.shape != x.shape[:2]:
        raise ValueError(
            f"decoder_attention_mask must have the shape of decoder_input_ids, {x.shape[:2]}; "
            f"got {decoder_attention_mask.shape}"
        )
    if encoded is not None and (encoded.ndim != 3 or encoded.shape[0] != x.shape[0]):
        raise ValueError(
            f"the encoder's output must be (batch, length, features) with the decoder's batch of {x.shape[0]}; "
            f"got {encoded.shape}"
        )


def _with_encoder(
    context: Context, call: DecoderCall, encoded: jax.Array | None, attention_mask: jax.Array | None
) -> Context:
    if encoded is None:
        assert call.cache is not None
        length = next(iter(call.cache.layers.values()))["cross_key"].shape[-3]
    else:
        length = encoded.shape[1]
    masks = {**context.masks, CROSS: bidirectional_mask(attention_mask, call.batch, length)}
    return replace(context, masks=masks, encoded=encoded)


Block = Callable[[jax.Array, Context, Memory | None], tuple[jax.Array, Memory | None]]
"""A part of a layer: `(x, context, memory) -> (x, memory)`."""

Residual = Callable[[Block, LayerNorm, jax.Array, Context, Memory | None], tuple[jax.Array, Memory | None]]
"""A block of a layer, added to its input, with the norm where the family has it."""


def pre_norm(
    block: Block, norm: Callable[[jax.Array], jax.Array], x: jax.Array, context: Context, memory: Memory | None
) -> tuple[jax.Array, Memory | None]:
    """The norm is of what goes into the block."""
    y, memory = block(norm(x), context, memory)
    return x + y, memory


def post_norm(
    block: Block, norm: Callable[[jax.Array], jax.Array], x: jax.Array, context: Context, memory: Memory | None
) -> tuple[jax.Array, Memory | None]:
    """The norm is of the sum."""
    y, memory = block(x, context, memory)
    return norm(x + y), memory


def keys_and_values(
    kind: str,
    project: Callable[[jax.Array], tuple[jax.Array, jax.Array]],
    x: jax.Array,
    context: Context,
    memory: Memory | None,
) -> tuple[jax.Array, jax.Array, Memory | None]:
    """What `x` attends to in this kind of attention, and the layer's memory with it.

    `project(states) -> (keys, values)` is called with `x`, or with the encoder's output if the memory lacks its keys.
    """
    if kind == SELF:
        return remember(memory, context, *project(x))
    if context.encoded is None:
        assert memory is not None
        return memory["cross_key"].astype(x.dtype), memory["cross_value"].astype(x.dtype), memory
    key, value = project(context.encoded)
    kept = None if context.capacity is None else {**(memory or {}), "cross_key": key, "cross_value": value}
    return key, value, kept


class Attention(nnx.Module):
    """Attention of BART and what came of it; `kind` is `SELF` or `CROSS`."""

    def __init__(self, features: int, heads: int, kind: str, *, key_bias: bool):
        self.q_proj = Linear(features, features)
        self.k_proj = Linear(features, features, bias=key_bias)
        self.v_proj = Linear(features, features)
        self.out_proj = Linear(features, features)
        self.kind, self.head_dim = kind, features // heads

    def __call__(self, x: jax.Array, context: Context, memory: Memory | None) -> tuple[jax.Array, Memory | None]:
        key, value, memory = keys_and_values(self.kind, self._project, x, context, memory)
        query = split_heads(self.q_proj(x), self.head_dim)
        return self.out_proj(attend(query, key, value, context.masks[self.kind])), memory

    def _project(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        return split_heads(self.k_proj(x), self.head_dim), split_heads(self.v_proj(x), self.head_dim)


@dataclass(frozen=True)
class LayerSizes:
    """What the layers of BART's descendants differ in, and of an encoder from those of its decoder."""

    features: int
    heads: int
    hidden: int
    act: str
    residual: Residual
    key_bias: bool = True


class Layer(nnx.Module):
    """A layer of an encoder, or with `cross` of a decoder."""

    def __init__(self, sizes: LayerSizes, *, cross: bool):
        features = sizes.features

        def attention(kind: str) -> Attention:
            return Attention(features, sizes.heads, kind, key_bias=sizes.key_bias)

        self.self_attn = attention(SELF)
        self.self_attn_layer_norm = LayerNorm(features, eps=EPS)
        self.encoder_attn = attention(CROSS) if cross else None
        self.encoder_attn_layer_norm = LayerNorm(features, eps=EPS) if cross else None
        self.fc1 = Linear(features, sizes.hidden)
        self.fc2 = Linear(sizes.hidden, features)
        self.final_layer_norm = LayerNorm(features, eps=EPS)
        self.sizes = sizes

    def __call__(self, x: jax.Array, context: Context, memory: Memory | None) -> tuple[jax.Array, Memory | None]:
        residual = self.sizes.residual
        x, memory = residual(self.self_attn, self.self_attn_layer_norm, x, context, memory)
        if self.encoder_attn is not None and self.encoder_attn_layer_norm is not None:
            x, memory = residual(self.encoder_attn, self.encoder_attn_layer_norm, x, context, memory)
        return residual(self._feed_forward, self.final_layer_norm, x, context, memory)

    def _feed_forward(self, x: jax.Array, context: Context, memory: Memory | None) -> tuple[jax.Array, Memory | None]:
        return self.fc2(activation(self.sizes.act)(self.fc1(x))), memory


EPS = 1e-5
"""Of all layer norms here: PyTorch's default."""


def run_layers(
    modules: nnx.Dict,
    x: jax.Array,
    context: Context,
    options: Options,
    *,
    call: DecoderCall | None = None,
    collect: bool,
) -> tuple[jax.Array, dict[str, Memory], tuple[jax.Array, ...]]:
    """Put `x` through layers; also their memories, and what went into every layer if `collect`."""
    return run(
        modules,
        x,
        lambda layer, x, memory, own: layer(x, context, memory),
        memories=None if call is None else call.memories(modules),
        options=options,
        collect=collect,
    )


def encoder_context(x: jax.Array, attention_mask: jax.Array | None) -> Context:
    """What the layers of an encoder share."""
    return Context({SELF: bidirectional_mask(attention_mask, *x.shape[:2])})


def check_length(length: int, most: int, key: str, virtual: int = 0) -> None:
    """Raise ValueError if there are more tokens, with those of a prefix, than the table of positions has rows."""
    if virtual + length > most:
        raise ValueError(too_long(length, virtual, f"{key}={most}"))


def check_heads(config: Any) -> None:
    """Raise ValueError unless the width is a multiple of the numbers of heads."""
    for key in ("encoder_attention_heads", "decoder_attention_heads"):
        if config.d_model % getattr(config, key):
            raise ValueError(f"d_model {config.d_model} is not a multiple of {key} {getattr(config, key)}")


def shifted(inputs: Mapping[str, Any], start: int | None) -> dict[str, Any]:
    """The inputs of a call, with the `input_ids` shifted right for the decoder if it is given none.

    Raises ValueError if there are no `input_ids` either, or no `decoder_start_token_id` in the config.
    """
    if inputs.get("decoder_input_ids") is not None or inputs.get("decoder_inputs_embeds") is not None:
        return dict(inputs)
    ids = inputs.get("input_ids")
    if ids is None:
        raise ValueError("expected decoder_input_ids, decoder_inputs_embeds, or input_ids to shift for the decoder")
    if start is None:
        raise ValueError("the config has no decoder_start_token_id to shift input_ids with: give decoder_input_ids")
    first = jnp.full((ids.shape[0], 1), start, ids.dtype)
    return {**inputs, "decoder_input_ids": jnp.concatenate([first, ids[:, :-1]], axis=1)}


def last_states(output: Seq2SeqModelOutput, logits_to_keep: int | None) -> jax.Array:
    """The states that a language model scores: all, or the last `logits_to_keep`."""
    x = output.last_hidden_state
    return x if logits_to_keep is None else x[:, -logits_to_keep:]


def scored(output: Seq2SeqModelOutput, logits: jax.Array) -> Seq2SeqLMOutput:
    """The output of a language model."""
    return Seq2SeqLMOutput(
        logits,
        output.encoder_last_hidden_state,
        output.past_key_values,
        output.decoder_hidden_states,
        output.encoder_hidden_states,
    )


def spans(output: Seq2SeqModelOutput, scores: jax.Array) -> QuestionAnsweringOutput:
    """The output of question answering, from two scores of every token; its hidden states are the decoder's."""
    return QuestionAnsweringOutput(scores[..., 0], scores[..., 1], output.decoder_hidden_states)


class ClassificationHead(nnx.Module):
    """Two linear layers with a tanh between them; `linear(in, out)` makes them."""

    def __init__(self, config: Any, linear: Callable[[int, int], Linear]):
        self.dense = linear(config.hidden_size, config.hidden_size)
        self.out_proj = linear(config.hidden_size, config.num_labels)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.out_proj(jnp.tanh(self.dense(x)))


class SequenceClassification(nnx.Module):
    """The model and a head on the decoder's state at the input's last end-of-sequence token.

    A row without one gets NaN. The hidden states returned are the decoder's.
    """

    def __init__(
        self,
        config: Any,
        options: Options,
        *,
        backbone: Backbone,
        prefix: str,
        linear: Callable[[int, int], Linear] = Linear,
    ):
        setattr(self, prefix, backbone(config, options))
        self.classification_head = ClassificationHead(config, linear)
        self.prefix, self.config = prefix, config

    def __call__(self, **inputs: Any) -> ClassifierOutput:
        ids, end = inputs.get("input_ids"), self.config.eos_token_id
        if ids is None or not isinstance(end, int):
            raise ValueError(
                "the class is told at the last eos_token_id of input_ids: give input_ids, and one eos_token_id in the "
                f"config (it is {end!r})"
            )
        output = getattr(self, self.prefix)(**shifted(inputs, self.config.decoder_start_token_id))
        if output.last_hidden_state.shape[1] != ids.shape[1]:
            raise ValueError(
                f"the decoder's input has {output.last_hidden_state.shape[1]} tokens, input_ids {ids.shape[1]}; "
                "a sequence's class is told where they are as many"
            )
        ends = ids == end
        last = jnp.argmax(jnp.where(ends, jnp.arange(ids.shape[1]), -1), axis=1)
        x = jnp.take_along_axis(output.last_hidden_state, last[:, None, None], axis=1)[:, 0]
        logits = jnp.where(ends.any(axis=1)[:, None], self.classification_head(x), jnp.nan)
        return ClassifierOutput(logits, output.decoder_hidden_states)


def with_aliases(raw: Mapping[str, Any], names: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, tuple[Any, ...]]]:
    """A config with the values that it gives by a second name (alias -> name), and what the aliases may then hold.

    >>> with_aliases({"num_hidden_layers": 3}, {"num_hidden_layers": "encoder_layers"})
    ({'num_hidden_layers': 3, 'encoder_layers': 3}, {'num_hidden_layers': (None, 3)})
    """
    given = dict(raw)
    for alias, name in names.items():
        if raw.get(alias) is not None:
            given.setdefault(name, raw[alias])
    return given, {alias: (None, given[name]) for alias, name in names.items() if name in given}
