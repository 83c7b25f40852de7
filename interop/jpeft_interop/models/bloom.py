"""BLOOM (https://arxiv.org/abs/2211.05100): a causal decoder with ALiBi (https://arxiv.org/abs/2108.12409).

Positions enter as a bias of the attention scores alone: for each head, a slope times the number of the key's token.
"""

import dataclasses
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ._attention import Context
from ._cache import Memory
from ._call import DecoderCall, begin, context_of
from ._causal import FULL, FeedForward, FusedAttention, through, token_numbers
from ._config import check_heads, number_of_labels, read_fields, translated
from ._family import Options
from ._heads import class_names, decoder_family
from ._layers import Embed, LayerNorm, embed_tokens
from ._outputs import BaseModelOutput
from ._prefix import Past
from ._stack import layers


@dataclass(frozen=True)
class BloomConfig:
    """The keys of a BLOOM's config.json that decide what is computed, with the defaults of `transformers`."""

    vocab_size: int = 250880
    hidden_size: int = 64
    num_hidden_layers: int = 2
    num_attention_heads: int = 8
    layer_norm_epsilon: float = 1e-5
    apply_residual_connection_post_layernorm: bool = False
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True
    pad_token_id: int | None = None
    num_labels: int = 2


_NAMES = {"n_embed": "hidden_size", "n_layer": "num_hidden_layers", "n_head": "num_attention_heads"}
_NO_EFFECT = (
    "attention_softmax_in_fp32",
    "bias_dropout_fusion",
    "masked_softmax_fusion",
    "offset_alibi",
    "seq_length",
    "skip_bias_add",
    "skip_bias_add_qkv",
)
"""Keys of the training code, which `transformers` does not read."""


def read_config(raw: Mapping[str, Any], ignore: Collection[str] = ()) -> BloomConfig:
    """The `BloomConfig` of a config.json. Raises ValueError for what is not implemented, by name."""
    accepted = {"n_inner": (None,), "slow_but_exact": (False,)}
    given = read_fields(BloomConfig, translated(raw, _NAMES), implemented=accepted, known=_NO_EFFECT, ignore=ignore)
    config = BloomConfig(**{**given, "num_labels": number_of_labels(raw)})
    check_heads(config.hidden_size, config.num_attention_heads)
    return config


def alibi_slopes(heads: int) -> np.ndarray:
    """The slope of each head: `2 ** (-8 i / heads)`; if `heads` is no power of two, every second one of more heads.

    >>> alibi_slopes(3).tolist()
    [0.0625, 0.00390625, 0.25]
    """
    power = 2 ** math.floor(math.log2(heads))
    slopes = [2.0 ** (-8.0 * number / power) for number in range(1, power + 1)]
    between = [2.0 ** (-4.0 * number / power) for number in range(1, 2 * power, 2)]
    return np.asarray([*slopes, *between][:heads], np.float32)


def alibi(call: DecoderCall, heads: int) -> jax.Array:
    """The bias of the scores, `(batch or 1, heads, 1, keys)`: the same for every query, as only differences count."""
    numbers = token_numbers(call).astype(jnp.float32)
    return jnp.asarray(alibi_slopes(heads))[None, :, None, None] * numbers[:, None, None, :]


class Block(nnx.Module):
    def __init__(self, config: BloomConfig):
        self.input_layernorm = LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.self_attention = FusedAttention(config.hidden_size, config.num_attention_heads)
        self.post_attention_layernorm = LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.mlp = FeedForward(config.hidden_size, 4 * config.hidden_size, "gelu_new")
        self.normed_residual = config.apply_residual_connection_post_layernorm

    def __call__(self, x: jax.Array, context: Context, memory: Memory | None) -> tuple[jax.Array, Memory | None]:
        normed = self.input_layernorm(x)
        y, memory = self.self_attention(normed, context, memory)
        x = y + (normed if self.normed_residual else x)
        normed = self.post_attention_layernorm(x)
        return self.mlp(normed) + (normed if self.normed_residual else x), memory


class BloomModel(nnx.Module):
    """The bare decoder. It takes no position_ids: tokens are counted by the attention mask."""

    def __init__(self, config: BloomConfig, options: Options):
        self.word_embeddings = Embed(config.vocab_size, config.hidden_size)
        self.word_embeddings_layernorm = LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.h = layers(lambda number: Block(config), ("layer",) * config.num_hidden_layers, options)
        self.ln_f = LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.options, self.heads = options, config.num_attention_heads

    @property
    def input_embedding(self) -> Embed:
        return self.word_embeddings

    def __call__(
        self,
        input_ids: jax.Array | None = None,
        attention_mask: jax.Array | None = None,
        inputs_embeds: jax.Array | None = None,
        past_key_values: Past | None = None,
        cache_length: int | None = None,
        output_hidden_states: bool = False,
    ) -> BaseModelOutput:
        x = embed_tokens(self.word_embeddings, input_ids, inputs_embeds, self.options)
        x = self.word_embeddings_layernorm(x)
        call = begin(x.shape[0], x.shape[1], attention_mask, None, past_key_values, cache_length)
        context = dataclasses.replace(context_of(call, {FULL: None}), bias=alibi(call, self.heads))
        return through(self.h, x, call, context, self.ln_f, options=self.options, collect=output_hidden_states)


BLOOM = decoder_family(
    "bloom",
    read_config,
    BloomModel,
    class_names("Bloom"),
    prefix="transformer",
    qa_prefix="transformer",
    embedding="word_embeddings",
    token_head="classifier",
    inputs=("input_ids", "attention_mask", "inputs_embeds"),
)
