"""OLMo 2 (https://arxiv.org/abs/2501.00656): a decoder that norms what its blocks return, not what they are given."""

from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ._attention import Context, split_heads
from ._cache import Memory
from ._decoder import Decoder, DecoderConfig, RotaryAttention, gated_mlp, read_decoder
from ._heads import class_names, decoder_family
from ._layers import Linear, normalised
from ._mirror import mirror_divided
from ._parameters import ones, parameter, whole

_DEFAULTS = {
    "vocab_size": 50304,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "pad_token_id": 1,
}


def read_olmo2(raw: Mapping[str, Any], ignore: Collection[str] = ()) -> DecoderConfig:
    """The config of an OLMo 2's config.json. Raises ValueError for what is not implemented, by name."""
    accepted = {"mlp_bias": (False,), "sliding_window": (None,)}
    bias = {"attention_output_bias": raw.get("attention_bias", False)}
    return read_decoder(raw, ignore, defaults=_DEFAULTS, accepted=accepted, derived=bias)


class Norm(nnx.Module):
    """Root-mean-square normalisation that is scaled in float32, before the cast back."""

    def __init__(self, features: int, *, eps: float):
        self.scale = parameter((features,), ones, whole("weight", (0,)))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        return (normalised(x, self.eps) * self.scale[...].astype(jnp.float32)).astype(x.dtype)


class Attention(nnx.Module):
    """Self-attention that norms all heads' queries together, and their keys."""

    def __init__(self, config: DecoderConfig, kind: str):
        hidden, bias, eps = config.hidden_size, config.attention_bias, config.rms_norm_eps
        wide, narrow = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
        self.q_proj = Linear(hidden, wide, bias=bias)
        self.k_proj = Linear(hidden, narrow, bias=bias)
        self.v_proj = Linear(hidden, narrow, bias=bias)
        self.o_proj = Linear(wide, hidden, bias=config.attention_output_bias)
        self.q_norm = Norm(wide, eps=eps)
        self.k_norm = Norm(narrow, eps=eps)
        self.rotated = RotaryAttention(config, kind)

    def __call__(self, x: jax.Array, context: Context, memory: Memory | None) -> tuple[jax.Array, Memory | None]:
        flat = (self.q_norm(self.q_proj(x)), self.k_norm(self.k_proj(x)), self.v_proj(x))
        query, key, value = (split_heads(y, self.rotated.head_dim) for y in flat)
        y, memory = self.rotated(query, key, value, context, memory)
        return self.o_proj(y), memory


class Layer(nnx.Module):
    """Attention and a feed-forward block, each normed before it is added to its input."""

    def __init__(self, config: DecoderConfig, number: int):
        self.self_attn = Attention(config, config.layer_types[number])
        self.mlp = gated_mlp(config)
        self.post_attention_layernorm = Norm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_feedforward_layernorm = Norm(config.hidden_size, eps=config.rms_norm_eps)

    def __call__(self, x: jax.Array, context: Context, memory: Memory | None) -> tuple[jax.Array, Memory | None]:
        y, memory = self.self_attn(x, context, memory)
        x = x + self.post_attention_layernorm(y)
        return x + self.post_feedforward_layernorm(self.mlp(x)), memory


Olmo2Model = partial(Decoder, layer=Layer, norm=Norm)

OLMO2 = decoder_family(
    "olmo2",
    read_olmo2,
    Olmo2Model,
    class_names("Olmo2", without=("token-classification", "question-answering")),
    mirror=mirror_divided,
)
