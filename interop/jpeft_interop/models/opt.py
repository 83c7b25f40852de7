"""OPT (https://arxiv.org/abs/2205.01068) and Galactica (https://arxiv.org/abs/2211.09085): causal decoders.

The positions are learned and count the tokens that are not padding. The 350m model has its norms after the blocks and
embeddings that are narrower than its layers.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ._activations import activation
from ._attention import Context, check_position_ids, split_heads
from ._cache import Memory
from ._call import DecoderCall, begin, context_of
from ._causal import FULL, check_length, look_back, through, token_numbers
from ._config import check_heads, number_of_labels, read_fields, translated
from ._family import Options
from ._heads import class_names, decoder_family
from ._layers import Embed, LayerNorm, Linear, embed_tokens, normalised
from ._outputs import BaseModelOutput
from ._prefix import Past
from ._stack import layers

EPSILON = 1e-5
"""Of the layer norms: the default of torch."""

OFFSET = 2
"""The row of the first position in the table: what comes before belongs to padding."""


@dataclass(frozen=True)
class OPTConfig:
    """The keys of an OPT's config.json that decide what is computed, with the defaults of `transformers`."""

    vocab_size: int = 50272
    hidden_size: int = 768
    word_embed_proj_dim: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "relu"
    max_position_embeddings: int = 2048
    do_layer_norm_before: bool = True
    remove_final_layer_norm: bool = False
    enable_bias: bool = True
    layer_norm_elementwise_affine: bool = True
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True
    pad_token_id: int | None = 1
    num_labels: int = 2


_NAMES = {
    "ffn_dim": "intermediate_size",
    "activation_function": "hidden_act",
    "init_std": "initializer_range",
    "_remove_final_layer_norm": "remove_final_layer_norm",
}
_ACCEPTED = {"learned_embeddings": (True,), "scale_embeddings": (False,)}
"""Of Galactica, which `transformers` does not read."""


def read_config(raw: Mapping[str, Any], ignore: Collection[str] = ()) -> OPTConfig:
    """The `OPTConfig` of a config.json. Raises ValueError for what is not implemented, by name."""
    given = read_fields(OPTConfig, translated(raw, _NAMES), implemented=_ACCEPTED, known=("layerdrop",), ignore=ignore)
    width = given.get("word_embed_proj_dim") or given.get("hidden_size", OPTConfig.hidden_size)
    config = OPTConfig(**{**given, "word_embed_proj_dim": width, "num_labels": number_of_labels(raw)})
    check_heads(config.hidden_size, config.num_attention_heads)
    activation(config.hidden_act)
    return config


class PlainLayerNorm(nnx.Module):
    """Layer normalisation without scale and bias."""

    def __call__(self, x: jax.Array) -> jax.Array:
        """`(..., features) -> (..., features)`."""
        wide = x.astype(jnp.float32)
        return normalised(wide - wide.mean(-1, keepdims=True), EPSILON).astype(x.dtype)


def layer_norm(config: OPTConfig) -> nnx.Module:
    """The layer norm of a config."""
    affine = config.layer_norm_elementwise_affine
    return LayerNorm(config.hidden_size, eps=EPSILON) if affine else PlainLayerNorm()


class Attention(nnx.Module):
    def __init__(self, config: OPTConfig):
        hidden, bias = config.hidden_size, config.enable_bias
        self.k_proj = Linear(hidden, hidden, bias=bias)
        self.v_proj = Linear(hidden, hidden, bias=bias)
        self.q_proj = Linear(hidden, hidden, bias=bias)
        self.out_proj = Linear(hidden, hidden, bias=bias)
        self.head_dim = hidden // config.num_attention_heads

    def __call__(self, x: jax.Array, context: Context, memory: Memory | None) -> tuple[jax.Array, Memory | None]:
        projections = (self.q_proj, self.k_proj, self.v_proj)
        query, key, value = (split_heads(layer(x), self.head_dim) for layer in projections)
        y, memory = look_back(query, key, value, context, memory)
        return self.out_proj(y), memory


class Layer(nnx.Module):
    """Attention and a feed-forward block, each added to its input, with the norm before the block or after the sum."""

    def __init__(self, config: OPTConfig):
        self.self_attn = Attention(config)
        self.self_attn_layer_norm = layer_norm(config)
        self.fc1 = Linear(config.hidden_size, config.intermediate_size, bias=config.enable_bias)
        self.fc2 = Linear(config.intermediate_size, config.hidden_size, bias=config.enable_bias)
        self.final_layer_norm = layer_norm(config)
        self.act, self.before = config.hidden_act, config.do_layer_norm_before

    def __call__(self, x: jax.Array, context: Context, memory: Memory | None) -> tuple[jax.Array, Memory | None]:
        if self.before:
            y, memory = self.self_attn(self.self_attn_layer_norm(x), context, memory)
            x = x + y
            return x + self.feed_forward(self.final_layer_norm(x)), memory
        y, memory = self.self_attn(x, context, memory)
        x = self.self_attn_layer_norm(x + y)
        return self.final_layer_norm(x + self.feed_forward(x)), memory

    def feed_forward(self, x: jax.Array) -> jax.Array:
        return self.fc2(activation(self.act)(self.fc1(x)))


class Decoder(nnx.Module):
    def __init__(self, config: OPTConfig, options: Options):
        hidden, width = config.hidden_size, config.word_embed_proj_dim
        self.embed_tokens = Embed(config.vocab_size, width)
        self.embed_positions = Embed(config.max_position_embeddings + OFFSET, hidden)
        self.project_in = Linear(width, hidden, bias=False) if width != hidden else None
        self.project_out = Linear(hidden, width, bias=False) if width != hidden else None
        self.layers = layers(lambda number: Layer(config), ("layer",) * config.num_hidden_layers, options)
        normed = config.do_layer_norm_before and not config.remove_final_layer_norm
        self.final_layer_norm = layer_norm(config) if normed else None
        self.options, self.max_positions = options, config.max_position_embeddings

    def __call__(
        self,
        input_ids: jax.Array | None = None,
        attention_mask: jax.Array | None = None,
        position_ids: jax.Array | None = None,
        inputs_embeds: jax.Array | None = None,
        past_key_values: Past | None = None,
        cache_length: int | None = None,
        output_hidden_states: bool = False,
    ) -> BaseModelOutput:
        x = embed_tokens(self.embed_tokens, input_ids, inputs_embeds, self.options)
        # As in transformers, position_ids choose rows of the table and do not tell packed sequences apart.
        call = begin(x.shape[0], x.shape[1], attention_mask, None, past_key_values, cache_length)
        check_position_ids(position_ids, call.batch, call.length)
        check_length(call, position_ids, self.max_positions)
        x = x if self.project_in is None else self.project_in(x)
        positions = counted(call) if position_ids is None else position_ids
        x = x + self.embed_positions(positions + OFFSET, x.dtype)
        context = context_of(call, {FULL: None})
        return through(self.layers, x, call, context, self.finish, options=self.options, collect=output_hidden_states)

    def finish(self, x: jax.Array) -> jax.Array:
        x = x if self.final_layer_norm is None else self.final_layer_norm(x)
        return x if self.project_out is None else self.project_out(x)


def counted(call: DecoderCall) -> jax.Array:
    """The positions `(batch or 1, length)` of the tokens of a call by the attention mask, -1 for padding."""
    return jax.lax.dynamic_slice_in_dim(token_numbers(call), call.start, call.length, axis=1)


class OPTModel(nnx.Module):
    """The bare decoder, as wide at its end as the embedding of its tokens."""

    def __init__(self, config: OPTConfig, options: Options):
        self.decoder = Decoder(config, options)

    @property
    def input_embedding(self) -> Embed:
        return self.decoder.embed_tokens

    def __call__(self, **inputs: Any) -> BaseModelOutput:
        return self.decoder(**inputs)


OPT = decoder_family(
    "opt",
    read_config,
    OPTModel,
    class_names("OPT", without=("token-classification",)),
    qa_prefix="model",
    embedding="decoder.embed_tokens",
    features="word_embed_proj_dim",
)
