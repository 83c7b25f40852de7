"""Phi-3 (https://arxiv.org/abs/2404.14219): a decoder whose projections of one input are one matrix."""

from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ._activations import activation
from ._attention import Context, split_heads
from ._cache import Memory
from ._decoder import Decoder, DecoderConfig, PreNormLayer, RotaryAttention, read_decoder
from ._heads import class_names, decoder_family
from ._layers import Linear
from ._mirror import mirror_divided
from ._rotary import Rope, read_rope

_DEFAULTS = {
    "vocab_size": 32064,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 4096,
    "original_max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "pad_token_id": 32000,
}


def read_phi3(raw: Mapping[str, Any], ignore: Collection[str] = ()) -> DecoderConfig:
    """The config of a Phi-3's config.json. Raises ValueError for what is not implemented, by name."""
    accepted = {"attention_bias": (False,), "mlp_bias": (False,)}
    known = ("original_max_position_embeddings",)
    return read_decoder(raw, ignore, defaults=_DEFAULTS, accepted=accepted, known=known, rope=read_phi3_rope)


def read_phi3_rope(raw: Mapping[str, Any], **sizes: Any) -> Rope:
    """The rotary settings: the part of each head that is rotated is stated, and `longrope` once had other names."""
    stated = dict(raw.get("rope_scaling") or raw.get("rope_parameters") or {})
    part = stated.get("partial_rotary_factor") or raw.get("partial_rotary_factor") or 1.0
    if {stated.get("rope_type"), stated.get("type")} & {"su", "yarn"}:
        stated["rope_type"] = "longrope"
    return read_rope({**raw, "rope_scaling": stated}, **sizes, partial_rotary_factor=part)


class Attention(nnx.Module):
    """Self-attention with rotary positions; queries, keys and values come from one projection."""

    def __init__(self, config: DecoderConfig, kind: str):
        query, key = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
        self.qkv_proj = Linear(config.hidden_size, query + 2 * key, bias=False)
        self.o_proj = Linear(query, config.hidden_size, bias=False)
        self.rotated = RotaryAttention(config, kind)
        self.ends = (query, query + key)

    def __call__(self, x: jax.Array, context: Context, memory: Memory | None) -> tuple[jax.Array, Memory | None]:
        parts = jnp.split(self.qkv_proj(x), self.ends, axis=-1)
        query, key, value = (split_heads(part, self.rotated.head_dim) for part in parts)
        y, memory = self.rotated(query, key, value, context, memory)
        return self.o_proj(y), memory


class MLP(nnx.Module):
    """A gated feed-forward block; gate and up projection are one."""

    def __init__(self, config: DecoderConfig):
        self.gate_up_proj = Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.act = config.hidden_act

    def __call__(self, x: jax.Array) -> jax.Array:
        gate, up = jnp.split(self.gate_up_proj(x), 2, axis=-1)
        return self.down_proj(up * activation(self.act)(gate))


def layer(config: DecoderConfig, number: int) -> PreNormLayer:
    """A layer of Phi-3."""
    return PreNormLayer(config, Attention(config, config.layer_types[number]), MLP(config))


Phi3Model = partial(Decoder, layer=layer)

PHI3 = decoder_family(
    "phi3", read_phi3, Phi3Model, class_names("Phi3", without=("question-answering",)), mirror=mirror_divided
)
