"""Llama 2 and 3 (https://arxiv.org/abs/2407.21783) and Mistral (https://arxiv.org/abs/2310.06825): causal decoders."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from ._attention import (
    AttentionMask,
    attend,
    causal_mask,
    check_position_ids,
    split_heads,
)
from ._config import number_of_labels, read_fields
from ._family import Architecture, Family
from ._layers import (
    Embed,
    Linear,
    RMSNorm,
    activation,
    embed_tokens,
    in_order,
    numbered,
)
from ._outputs import BaseModelOutput, LMOutput, SequenceClassifierOutput
from ._rotary import Rope, apply_rotary, read_rope, rotary_tables


@dataclass(frozen=True)
class LlamaConfig:
    """The keys of a config.json that decide what is computed, with the defaults of `transformers` for Llama."""

    rope: Rope
    head_dim: int
    num_key_value_heads: int
    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    attention_bias: bool = False
    mlp_bias: bool = False
    sliding_window: int | None = None
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    pad_token_id: int | None = None
    num_labels: int = 2


def read_llama(raw: Mapping[str, Any], ignore: Collection[str] = ()) -> LlamaConfig:
    """The `LlamaConfig` of a Llama's config.json. Raises ValueError for what is not implemented, by name."""
    return _read(raw, ignore, accepted={"sliding_window": (None,), **_ROTATION})


def read_mistral(raw: Mapping[str, Any], ignore: Collection[str] = ()) -> LlamaConfig:
    """The `LlamaConfig` of a Mistral's config.json. Raises ValueError for what is not implemented, by name."""
    accepted = {"attention_bias": (False,), "mlp_bias": (False,), **_ROTATION}
    return _read({**_MISTRAL_DEFAULTS, **raw}, ignore, accepted=accepted)


_ROTATION = {"rope_interleaved": (False,), "is_causal": (True,)}
_MISTRAL_DEFAULTS = {
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 4096 * 32,
    "sliding_window": 4096,
}
_ROPE_KEYS = ("rope_parameters", "rope_theta", "rope_scaling", "partial_rotary_factor")
_NO_EFFECT = ("is_llama_config", "max_sequence_length")


def _read(raw: Mapping[str, Any], ignore: Collection[str], accepted: Mapping[str, tuple[Any, ...]]) -> LlamaConfig:
    given = read_fields(LlamaConfig, raw, implemented=accepted, known=(*_ROPE_KEYS, *_NO_EFFECT), ignore=ignore)
    hidden, heads = given.get("hidden_size", 4096), given.get("num_attention_heads", 32)
    groups = given.get("num_key_value_heads") or heads
    head_dim = given.get("head_dim") or hidden // heads
    if hidden % heads and not given.get("head_dim"):
        raise ValueError(
            f"hidden_size {hidden} is not a multiple of num_attention_heads {heads}, and head_dim is unset"
        )
    if heads % groups:
        raise ValueError(f"num_attention_heads {heads} is not a multiple of num_key_value_heads {groups}")
    activation(given.get("hidden_act", "silu"))
    rope = read_rope(raw, head_dim=head_dim, max_positions=given.get("max_position_embeddings", 2048))
    derived = {"rope": rope, "head_dim": head_dim, "num_key_value_heads": groups, "num_labels": number_of_labels(raw)}
    return LlamaConfig(**{**given, **derived})


class Attention(nnx.Module):
    def __init__(self, config: LlamaConfig):
        hidden, head_dim, bias = config.hidden_size, config.head_dim, config.attention_bias
        self.q_proj = Linear(hidden, config.num_attention_heads * head_dim, bias=bias)
        self.k_proj = Linear(hidden, config.num_key_value_heads * head_dim, bias=bias)
        self.v_proj = Linear(hidden, config.num_key_value_heads * head_dim, bias=bias)
        self.o_proj = Linear(config.num_attention_heads * head_dim, hidden, bias=bias)
        self.head_dim = head_dim

    def __call__(self, x: jax.Array, rotary: tuple[jax.Array, jax.Array], mask: AttentionMask) -> jax.Array:
        query, key, value = (split_heads(layer(x), self.head_dim) for layer in (self.q_proj, self.k_proj, self.v_proj))
        return self.o_proj(attend(apply_rotary(query, *rotary), apply_rotary(key, *rotary), value, mask))


class MLP(nnx.Module):
    def __init__(self, config: LlamaConfig):
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.act = config.hidden_act

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down_proj(activation(self.act)(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nnx.Module):
    def __init__(self, config: LlamaConfig):
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def __call__(self, x: jax.Array, rotary: tuple[jax.Array, jax.Array], mask: AttentionMask) -> jax.Array:
        x = x + self.self_attn(self.input_layernorm(x), rotary, mask)
        return x + self.mlp(self.post_attention_layernorm(x))


class LlamaModel(nnx.Module):
    """The decoder: embedding, layers, final norm."""

    def __init__(self, config: LlamaConfig, dtype: DTypeLike | None):
        self.embed_tokens = Embed(config.vocab_size, config.hidden_size)
        self.layers = numbered(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rope = config.rope
        self.window = config.sliding_window
        self.dtype = dtype

    def __call__(
        self,
        input_ids: jax.Array | None = None,
        attention_mask: jax.Array | None = None,
        position_ids: jax.Array | None = None,
        inputs_embeds: jax.Array | None = None,
    ) -> BaseModelOutput:
        x = embed_tokens(self.embed_tokens, input_ids, inputs_embeds, self.dtype)
        batch, length = x.shape[:2]
        check_position_ids(position_ids, batch, length)
        mask = causal_mask(attention_mask, position_ids, batch, length, window=self.window)
        rotary = rotary_tables(self.rope, jnp.arange(length)[None] if position_ids is None else position_ids, x.dtype)
        for layer in in_order(self.layers):
            x = layer(x, rotary, mask)
        return BaseModelOutput(self.norm(x))


class LlamaForCausalLM(nnx.Module):
    """The decoder and the scores of the next token, by `lm_head` or by the embedding if the config ties them."""

    def __init__(self, config: LlamaConfig, dtype: DTypeLike | None):
        self.model = LlamaModel(config, dtype)
        tied = config.tie_word_embeddings
        self.lm_head = None if tied else Linear(config.hidden_size, config.vocab_size, bias=False)

    def __call__(self, **inputs: jax.Array) -> LMOutput:
        x = self.model(**inputs).last_hidden_state
        return LMOutput(self.model.embed_tokens.attend(x) if self.lm_head is None else self.lm_head(x))


class LlamaForSequenceClassification(nnx.Module):
    """The decoder and a linear layer on the last token that is not padding."""

    def __init__(self, config: LlamaConfig, dtype: DTypeLike | None):
        self.model = LlamaModel(config, dtype)
        self.score = Linear(config.hidden_size, config.num_labels, bias=False)
        self.pad_token_id = config.pad_token_id

    def __call__(self, **inputs: jax.Array) -> SequenceClassifierOutput:
        x = self.model(**inputs).last_hidden_state
        last = _last_token(inputs.get("input_ids"), self.pad_token_id, *x.shape[:2])
        return SequenceClassifierOutput(self.score(jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0]))


def _last_token(input_ids: jax.Array | None, pad_token_id: int | None, batch: int, length: int) -> jax.Array:
    # By the token's id, whatever the attention mask says: the rule of transformers.
    if pad_token_id is None and batch > 1:
        raise ValueError(
            f"the config has no pad_token_id, so the ends of {batch} sequences cannot be found: set it in config.json"
        )
    if pad_token_id is None or input_ids is None:
        return jnp.full((batch,), length - 1)
    return jnp.argmax(jnp.where(input_ids != pad_token_id, jnp.arange(length), 0), axis=-1)


def _family(model_type: str, name: str, read_config: Any) -> Family:
    return Family(
        model_type=model_type,
        read_config=read_config,
        prefix="model",
        inputs=("input_ids", "attention_mask", "position_ids", "inputs_embeds"),
        architectures={
            "base": Architecture(f"{name}Model", LlamaModel),
            "causal-lm": Architecture(
                f"{name}ForCausalLM", LlamaForCausalLM, tied={"lm_head.weight": "model.embed_tokens.weight"}
            ),
            "sequence-classification": Architecture(f"{name}ForSequenceClassification", LlamaForSequenceClassification),
        },
        heads=("lm_head", "score", "qa_outputs"),
        new_heads=("score",),
    )


LLAMA = _family("llama", "Llama", read_llama)
MISTRAL = _family("mistral", "Mistral", read_mistral)
