"""T5 (https://arxiv.org/abs/1910.10683), T5 v1.1, Flan-T5 (https://arxiv.org/abs/2210.11416) and mT5, mT0
(https://arxiv.org/abs/2010.11934): encoder-decoders whose positions are a bias of the attention scores.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from ._activations import activation
from ._attention import Context, attend, split_heads
from ._cache import Memory
from ._call import DecoderCall
from ._config import number_of_labels, read_fields
from ._family import Architecture, Family, Options
from ._heads import TokenClassification
from ._layers import Embed, Linear, RMSNorm, embed_tokens
from ._outputs import BaseModelOutput, QuestionAnsweringOutput, Seq2SeqLMOutput, Seq2SeqModelOutput
from ._parameters import Initialiser, normal, parameter, whole
from ._seq2seq import (
    CROSS,
    SELF,
    SOURCE,
    TARGET,
    SequenceClassification,
    encode_and_decode,
    encoder_context,
    keys_and_values,
    last_states,
    pre_norm,
    run_layers,
    scored,
    shifted,
    spans,
    with_aliases,
)
from ._stack import layers


@dataclass(frozen=True)
class T5Config:
    """The keys of a T5 config.json that decide what is computed, with the defaults of `transformers`.

    `dense_act_fn` and `is_gated_act` follow from `feed_forward_proj`, unless the file has them, too.
    `scale_decoder_outputs`: whether the logits are divided by the root of `d_model`.
    """

    vocab_size: int = 32128
    d_model: int = 512
    d_kv: int = 64
    d_ff: int = 2048
    num_layers: int = 6
    num_decoder_layers: int = 6
    num_heads: int = 8
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    dense_act_fn: str = "relu"
    is_gated_act: bool = False
    scale_decoder_outputs: bool = True
    tie_word_embeddings: bool = True
    initializer_factor: float = 1.0
    pad_token_id: int | None = 0
    eos_token_id: int | None = 1
    decoder_start_token_id: int | None = None
    num_labels: int = 2

    @property
    def hidden_size(self) -> int:
        """The width of the model, by its usual name."""
        return self.d_model

    @property
    def initializer_range(self) -> float:
        """The standard deviation of the embedding's initial values; that of each weight is a multiple of it."""
        return self.initializer_factor


_MT5_DEFAULTS = {
    "vocab_size": 250112,
    "d_ff": 1024,
    "num_layers": 8,
    "num_heads": 6,
    "feed_forward_proj": "gated-gelu",
    "decoder_start_token_id": 0,
}
_ALIASES = {"hidden_size": "d_model", "num_hidden_layers": "num_layers", "num_attention_heads": "num_heads"}
_NO_EFFECT = ("feed_forward_proj", "dropout_rate", "n_positions")


def read_t5(raw: Mapping[str, Any], ignore: Collection[str] = ()) -> T5Config:
    """The `T5Config` of a config.json. Raises ValueError for what is not implemented, by name."""
    # The first T5 divides its logits and ties its embeddings, T5 v1.1 does neither; files say both with this one key.
    return _read({"scale_decoder_outputs": raw.get("tie_word_embeddings") is not False, **raw}, ignore)


def read_mt5(raw: Mapping[str, Any], ignore: Collection[str] = ()) -> T5Config:
    """The `T5Config` of an mT5's config.json. Raises ValueError for what is not implemented, by name."""
    return _read({**_MT5_DEFAULTS, "scale_decoder_outputs": False, **raw}, ignore, {"scale_decoder_outputs": (False,)})


def _read(raw: Mapping[str, Any], ignore: Collection[str], accepted: Mapping[str, tuple[Any, ...]] = {}) -> T5Config:
    raw, aliases = with_aliases(raw, _ALIASES)
    # False in the config of an encoder that was saved by itself.
    accepted = {"is_encoder_decoder": (True, False), **aliases, **accepted}
    given = read_fields(T5Config, raw, implemented=accepted, known=_NO_EFFECT, ignore=ignore)
    gated, act = _feed_forward(raw.get("feed_forward_proj", "relu"))
    depth = given.get("num_layers", T5Config.num_layers)
    config = T5Config(
        **{
            "is_gated_act": gated,
            "dense_act_fn": act,
            **given,
            "num_decoder_layers": given.get("num_decoder_layers") or depth,
            "num_labels": number_of_labels(raw),
        }
    )
    activation(config.dense_act_fn)
    return config


def _feed_forward(name: str) -> tuple[bool, str]:
    """Whether a `feed_forward_proj` is gated, and its activation.

    >>> _feed_forward("relu"), _feed_forward("gated-gelu"), _feed_forward("gated-silu")
    ((False, 'relu'), (True, 'gelu_new'), (True, 'silu'))
    """
    gate, dash, act = name.rpartition("-")
    if dash and gate != "gated":
        raise ValueError(f"feed_forward_proj is {name!r}; expected an activation, or 'gated-' and an activation")
    return bool(dash), "gelu_new" if name == "gated-gelu" else act


@lru_cache
def _scaled(factor: float) -> Initialiser:
    """Normal values whose standard deviation is `factor` times that of the config."""

    def initial(key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike, std: float) -> jax.Array:
        return normal(key, shape, dtype, factor * std)

    return initial


def _linear(in_features: int, out_features: int, *, scale: float | None = None, bias: bool = False) -> Linear:
    """A linear layer whose initial values have the deviation `scale`; by default `in_features ** -0.5`."""
    layer = Linear(in_features, out_features, bias=bias)
    initial = _scaled(in_features**-0.5 if scale is None else scale)
    layer.kernel = parameter((in_features, out_features), initial, whole("weight", (1, 0)))
    return layer


def relative_buckets(distance: np.ndarray, *, bidirectional: bool, count: int, farthest: int) -> np.ndarray:
    """The bucket of each distance (place of the key minus that of the query), of `count` buckets.

    Near distances have a bucket of their own, those farther away share one with more and more others, and all from
    `farthest` on share the last one. `bidirectional`: half of the buckets are for keys after the query.
    """
    sides = np.where(distance > 0, count // 2, 0) if bidirectional else 0
    count = count // 2 if bidirectional else count
    distance = np.abs(distance) if bidirectional else -np.minimum(distance, 0)
    exact = count // 2
    ratio = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact))
    far = exact + (ratio / np.float32(math.log(farthest / exact)) * np.float32(count - exact)).astype(np.int64)
    return (sides + np.where(distance < exact, distance, np.minimum(far, count - 1))).astype(np.int32)


class Attention(nnx.Module):
    """Attention without a scale of the scores; `relative` holds the bias of all layers of the stack."""

    def __init__(self, config: T5Config, kind: str, *, relative: bool = False):
        inner = config.num_heads * config.d_kv
        self.q = _linear(config.d_model, inner, scale=(config.d_model * config.d_kv) ** -0.5)
        self.k = _linear(config.d_model, inner)
        self.v = _linear(config.d_model, inner)
        self.o = _linear(inner, config.d_model)
        self.relative_attention_bias = _bias_table(config) if relative else None
        self.kind, self.head_dim = kind, config.d_kv

    def __call__(self, x: jax.Array, context: Context, memory: Memory | None) -> tuple[jax.Array, Memory | None]:
        key, value, memory = keys_and_values(self.kind, self._project, x, context, memory)
        query, bias = split_heads(self.q(x), self.head_dim), context.bias if self.kind == SELF else None
        return self.o(attend(query, key, value, context.masks[self.kind], scale=1.0, bias=bias)), memory

    def _project(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        return split_heads(self.k(x), self.head_dim), split_heads(self.v(x), self.head_dim)


def _bias_table(config: T5Config) -> Embed:
    shape = (config.relative_attention_num_buckets, config.num_heads)
    table = Embed(*shape)
    table.embedding = parameter(shape, _scaled(config.d_model**-0.5), whole("weight", (0, 1)))
    return table


class SelfAttentionLayer(nnx.Module):
    def __init__(self, config: T5Config, *, relative: bool):
        self.SelfAttention = Attention(config, SELF, relative=relative)
        self.layer_norm = RMSNorm(config.d_model, eps=config.layer_norm_epsilon)

    def __call__(self, x: jax.Array, context: Context, memory: Memory | None) -> tuple[jax.Array, Memory | None]:
        return pre_norm(self.SelfAttention, self.layer_norm, x, context, memory)


class CrossAttentionLayer(nnx.Module):
    def __init__(self, config: T5Config):
        self.EncDecAttention = Attention(config, CROSS)
        self.layer_norm = RMSNorm(config.d_model, eps=config.layer_norm_epsilon)

    def __call__(self, x: jax.Array, context: Context, memory: Memory | None) -> tuple[jax.Array, Memory | None]:
        return pre_norm(self.EncDecAttention, self.layer_norm, x, context, memory)


class Dense(nnx.Module):
    def __init__(self, config: T5Config):
        self.wi = _linear(config.d_model, config.d_ff)
        self.wo = _linear(config.d_ff, config.d_model)
        self.act = config.dense_act_fn

    def __call__(self, x: jax.Array, context: Context, memory: Memory | None) -> tuple[jax.Array, Memory | None]:
        return self.wo(activation(self.act)(self.wi(x))), memory


class GatedDense(nnx.Module):
    def __init__(self, config: T5Config):
        self.wi_0 = _linear(config.d_model, config.d_ff)
        self.wi_1 = _linear(config.d_model, config.d_ff)
        self.wo = _linear(config.d_ff, config.d_model)
        self.act = config.dense_act_fn

    def __call__(self, x: jax.Array, context: Context, memory: Memory | None) -> tuple[jax.Array, Memory | None]:
        return self.wo(activation(self.act)(self.wi_0(x)) * self.wi_1(x)), memory


class FeedForwardLayer(nnx.Module):
    def __init__(self, config: T5Config):
        self.DenseReluDense = GatedDense(config) if config.is_gated_act else Dense(config)
        self.layer_norm = RMSNorm(config.d_model, eps=config.layer_norm_epsilon)

    def __call__(self, x: jax.Array, context: Context, memory: Memory | None) -> tuple[jax.Array, Memory | None]:
        return pre_norm(self.DenseReluDense, self.layer_norm, x, context, memory)


class Block(nnx.Module):
    """A layer of the encoder, or with `cross` of the decoder."""

    def __init__(self, config: T5Config, *, relative: bool, cross: bool):
        parts = [SelfAttentionLayer(config, relative=relative)]
        parts += [CrossAttentionLayer(config)] if cross else []
        parts += [FeedForwardLayer(config)]
        self.layer = nnx.Dict({str(number): part for number, part in enumerate(parts)})

    def __call__(self, x: jax.Array, context: Context, memory: Memory | None) -> tuple[jax.Array, Memory | None]:
        for number in range(len(self.layer)):
            x, memory = self.layer[str(number)](x, context, memory)
        return x, memory


class Stack(nnx.Module):
    """The blocks of the encoder or, with `cross`, of the decoder, the bias that they share, and the final norm."""

    def __init__(self, config: T5Config, options: Options, *, depth: int, cross: bool):
        # Only the first block has the table of the bias, so that it cannot be stacked with the others.
        kinds = ("relative", *("plain",) * (depth - 1))
        self.block = layers(lambda number: Block(config, relative=number == 0, cross=cross), kinds, options)
        self.final_layer_norm = RMSNorm(config.d_model, eps=config.layer_norm_epsilon)
        self.config, self.options, self.cross = config, options, cross

    def encode(self, x: jax.Array, attention_mask: jax.Array | None, collect: bool) -> BaseModelOutput:
        """What an encoder does with its embedded input."""
        places = jnp.arange(x.shape[1])
        context = replace(encoder_context(x, attention_mask), bias=self._bias(places, x.shape[1], x.dtype))
        x, _, entered = run_layers(self.block, x, context, self.options, collect=collect)
        x = self.final_layer_norm(x)
        return BaseModelOutput(x, hidden_states=(*entered, x) if collect else None)

    def decode(
        self, x: jax.Array, call: DecoderCall, context: Context, *, collect: bool
    ) -> tuple[jax.Array, Mapping[str, Memory], tuple[jax.Array, ...]]:
        """What a decoder does with its embedded input."""
        places = call.start + jnp.arange(call.length)
        context = replace(context, bias=self._bias(places, call.keys, x.dtype))
        x, memories, entered = run_layers(self.block, x, context, self.options, call=call, collect=collect)
        return self.final_layer_norm(x), memories, entered

    def _bias(self, queries: jax.Array, keys: int, dtype: DTypeLike) -> jax.Array:
        """What is added to the scores, `(1, heads, queries, keys)`, for the places of the queries."""
        table = self.block["0"].layer["0"].SelfAttention.relative_attention_bias
        count, farthest = self.config.relative_attention_num_buckets, self.config.relative_attention_max_distance
        # All buckets are known beforehand: computed within, a logarithm rounded otherwise would move some distances.
        near = np.arange(-farthest, farthest + 1)
        buckets = relative_buckets(near, bidirectional=not self.cross, count=count, farthest=farthest)
        distance = jnp.clip(jnp.arange(keys)[None, :] - queries[:, None], -farthest, farthest)
        return table(jnp.asarray(buckets)[distance + farthest], dtype).transpose(2, 0, 1)[None]


Parts = tuple[Embed, Stack, Stack]
"""Embedding, encoder and decoder, which most of the PyTorch classes hold themselves."""


def _parts(config: T5Config, options: Options) -> Parts:
    return (
        Embed(config.vocab_size, config.d_model),
        Stack(config, options, depth=config.num_layers, cross=False),
        Stack(config, options, depth=config.num_decoder_layers, cross=True),
    )


def _run(parts: Parts, options: Options, **inputs: Any) -> Seq2SeqModelOutput:
    shared, encoder, decoder = parts

    def embedding(ids: jax.Array | None, embeds: jax.Array | None) -> jax.Array:
        return embed_tokens(shared, ids, embeds, options)

    def encode(
        mask: jax.Array | None,
        collect: bool,
        input_ids: jax.Array | None = None,
        inputs_embeds: jax.Array | None = None,
    ) -> BaseModelOutput:
        return encoder.encode(embedding(input_ids, inputs_embeds), mask, collect)

    return encode_and_decode(encode, embedding, decoder.decode, **inputs)


class T5Model(nnx.Module):
    """The bare encoder and decoder."""

    def __init__(self, config: T5Config, options: Options):
        self.shared, self.encoder, self.decoder = _parts(config, options)
        self.options = options

    def __call__(self, **inputs: Any) -> Seq2SeqModelOutput:
        return _run((self.shared, self.encoder, self.decoder), self.options, **inputs)


class T5ForConditionalGeneration(nnx.Module):
    """The scores of the decoder's next token, by the embedding unless the config unties them."""

    def __init__(self, config: T5Config, options: Options):
        self.shared, self.encoder, self.decoder = _parts(config, options)
        tied = config.tie_word_embeddings
        self.lm_head = None if tied else _linear(config.d_model, config.vocab_size, scale=1.0)
        self.scale = config.d_model**-0.5 if config.scale_decoder_outputs else 1.0
        self.options = options

    def __call__(self, *, logits_to_keep: int | None = None, **inputs: Any) -> Seq2SeqLMOutput:
        output = _run((self.shared, self.encoder, self.decoder), self.options, **inputs)
        x = last_states(output, logits_to_keep) * self.scale
        return scored(output, self.shared.attend(x) if self.lm_head is None else self.lm_head(x))


class T5ForQuestionAnswering(nnx.Module):
    """Two scores of every token of the decoder: that the answer starts there, and that it ends there."""

    def __init__(self, config: T5Config, options: Options):
        self.shared, self.encoder, self.decoder = _parts(config, options)
        self.qa_outputs = _linear(config.d_model, 2, bias=True)
        self.start, self.options = config.decoder_start_token_id, options

    def __call__(self, **inputs: Any) -> QuestionAnsweringOutput:
        output = _run((self.shared, self.encoder, self.decoder), self.options, **shifted(inputs, self.start))
        return spans(output, self.qa_outputs(output.last_hidden_state))


class T5EncoderModel(nnx.Module):
    """The encoder alone."""

    def __init__(self, config: T5Config, options: Options):
        self.shared = Embed(config.vocab_size, config.d_model)
        self.encoder = Stack(config, options, depth=config.num_layers, cross=False)
        self.options = options

    def __call__(
        self,
        input_ids: jax.Array | None = None,
        attention_mask: jax.Array | None = None,
        inputs_embeds: jax.Array | None = None,
        output_hidden_states: bool = False,
    ) -> BaseModelOutput:
        x = embed_tokens(self.shared, input_ids, inputs_embeds, self.options)
        return self.encoder.encode(x, attention_mask, output_hidden_states)


def _tied(prefix: str, *stacks: str) -> dict[str, str]:
    return {f"{prefix}{stack}.embed_tokens.weight": f"{prefix}shared.weight" for stack in stacks}


def _family(model_type: str, read_config: Any, name: str) -> Family:
    both = _tied("", "encoder", "decoder")
    return Family(
        model_type=model_type,
        read_config=read_config,
        prefix="",
        inputs=(*SOURCE, *TARGET),
        architectures={
            "base": Architecture(f"{name}Model", T5Model, both),
            "seq2seq-lm": Architecture(
                f"{name}ForConditionalGeneration",
                T5ForConditionalGeneration,
                {**both, "lm_head.weight": "shared.weight"},
            ),
            "sequence-classification": Architecture(
                f"{name}ForSequenceClassification",
                partial(
                    SequenceClassification,
                    backbone=T5Model,
                    prefix="transformer",
                    linear=partial(_linear, bias=True),
                ),
                _tied("transformer.", "encoder", "decoder"),
                "transformer",
            ),
            "token-classification": Architecture(
                f"{name}ForTokenClassification",
                partial(TokenClassification, backbone=T5EncoderModel, prefix="transformer", head="classifier"),
                _tied("transformer.", "encoder"),
                "transformer",
            ),
            "question-answering": Architecture(f"{name}ForQuestionAnswering", T5ForQuestionAnswering, both),
        },
        # Token classification has no decoder.
        heads=("lm_head", "classification_head", "classifier", "qa_outputs", "decoder"),
        new_heads=("classification_head", "classifier", "qa_outputs"),
        unused=(r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight$",),
        decodes=True,
    )


T5 = _family("t5", read_t5, "T5")
MT5 = _family("mt5", read_mt5, "MT5")
