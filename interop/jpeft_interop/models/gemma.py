"""Gemma (https://arxiv.org/abs/2403.08295), Gemma 2 (https://arxiv.org/abs/2408.00118), and the text model of
Gemma 3 (https://arxiv.org/abs/2503.19786): causal decoders."""

from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ._attention import Context
from ._cache import Memory
from ._config import refuse
from ._decoder import FULL, SLIDING, Attention, Decoder, DecoderConfig, PreNormLayer, gated_mlp, read_decoder
from ._heads import class_names, decoder_family
from ._layers import normalised
from ._mirror import mirror_decoder
from ._parameters import parameter, whole, zeros

_GEMMA_DEFAULTS = {
    "vocab_size": 256000,
    "hidden_size": 3072,
    "intermediate_size": 24576,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192,
    "pad_token_id": 0,
    "tie_word_embeddings": True,
    "attention_bias": False,
}
_GEMMA2_DEFAULTS = {
    **_GEMMA_DEFAULTS,
    "layer_types": None,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
}
_GEMMA3_DEFAULTS = {
    **_GEMMA2_DEFAULTS,
    "vocab_size": 262208,
    "max_position_embeddings": 131072,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
}
_TRANSLATED = ("hidden_activation", "query_pre_attn_scalar", "cache_implementation")
_ACCEPTED = {"mlp_bias": (False,), "use_bidirectional_attention": (None, False)}
_ROPE_BASES = {FULL: ("rope_theta", 1e6), SLIDING: ("rope_local_base_freq", 1e4)}


def read_gemma(raw: Mapping[str, Any], ignore: Collection[str] = ()) -> DecoderConfig:
    """The config of a Gemma's config.json. Raises ValueError for what is not implemented, by name."""
    raw = {**_GEMMA_DEFAULTS, **raw}
    # The first releases say "gelu" and mean its approximation, which later ones say in a key that is gone again.
    act = "gelu_pytorch_tanh" if raw["hidden_act"] == "gelu" else raw["hidden_act"]
    return read_decoder(
        raw,
        ignore,
        defaults=_GEMMA_DEFAULTS,
        accepted={**_ACCEPTED, "hidden_activation": (None, act), "sliding_window": (None,)},
        derived={**_common(raw), "hidden_act": act},
    )


def read_gemma2(raw: Mapping[str, Any], ignore: Collection[str] = ()) -> DecoderConfig:
    """The config of a Gemma 2's config.json. Raises ValueError for what is not implemented, by name."""
    raw = {**_GEMMA2_DEFAULTS, **raw}
    return read_decoder(
        raw,
        ignore,
        defaults=_GEMMA2_DEFAULTS,
        accepted={**_ACCEPTED, "sliding_window_size": (None, raw["sliding_window"])},
        known=_TRANSLATED,
        derived={**_common(raw), **_alternating(raw, 2)},
    )


def read_gemma3(raw: Mapping[str, Any], ignore: Collection[str] = ()) -> DecoderConfig:
    """The config of a Gemma 3's text model. Raises ValueError for what is not implemented, by name."""
    raw = {**_GEMMA3_DEFAULTS, **raw}
    raw |= {"rope_parameters": _ropes(raw), "rope_scaling": None, "rope_theta": None}
    return read_decoder(
        raw,
        ignore,
        defaults=_GEMMA3_DEFAULTS,
        # transformers has a place for the cap of the scores, but does not apply it.
        accepted={**_ACCEPTED, "attn_logit_softcapping": (None,)},
        known=(*_TRANSLATED, "sliding_window_pattern", "rope_local_base_freq"),
        derived={**_common(raw), **_alternating(raw, raw.get("sliding_window_pattern") or 6)},
    )


def _common(raw: Mapping[str, Any]) -> dict[str, Any]:
    return {"embedding_scale": raw["hidden_size"] ** 0.5, "attention_output_bias": raw["attention_bias"]}


def _alternating(raw: Mapping[str, Any], period: int) -> dict[str, Any]:
    """What Gemma 2 and 3 have in common: windows in all but every `period`-th layer, and their names for two keys."""
    types = [SLIDING if number % period else FULL for number in range(1, raw["num_hidden_layers"] + 1)]
    return {
        "layer_types": raw.get("layer_types") or types,
        "hidden_act": raw["hidden_activation"],
        "attention_scale": raw["query_pre_attn_scalar"] ** -0.5,
    }


def _ropes(raw: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The rotary settings of each kind of layer, from those of transformers 5 or the keys of transformers 4."""
    given = raw.get("rope_parameters") or {}
    if strange := {key: value for key, value in given.items() if key not in _ROPE_BASES}:
        refuse("rope_parameters", strange, f"expected {' and '.join(_ROPE_BASES)}", "give them by kind of layer")
    by_kind = {FULL: {**(given.get(FULL) or {}), **(raw.get("rope_scaling") or {})}, SLIDING: given.get(SLIDING) or {}}
    return {kind: {"rope_theta": raw.get(key) or base, **by_kind[kind]} for kind, (key, base) in _ROPE_BASES.items()}


class RMSNorm(nnx.Module):
    """Root-mean-square normalisation in float32, scaled by `1 + scale` before the cast back."""

    def __init__(self, features: int, *, eps: float):
        self.scale = parameter((features,), zeros, whole("weight", (0,)))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        """`(..., features) -> (..., features)`."""
        return (normalised(x, self.eps) * (1.0 + self.scale[...].astype(jnp.float32))).astype(x.dtype)


class SandwichLayer(nnx.Module):
    """Attention and a feed-forward block, each between two norms."""

    def __init__(self, config: DecoderConfig, self_attn: Attention):
        norm = partial(RMSNorm, config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = self_attn
        self.mlp = gated_mlp(config)
        self.input_layernorm, self.post_attention_layernorm = norm(), norm()
        self.pre_feedforward_layernorm, self.post_feedforward_layernorm = norm(), norm()

    def __call__(self, x: jax.Array, context: Context, memory: Memory | None) -> tuple[jax.Array, Memory | None]:
        y, memory = self.self_attn(self.input_layernorm(x), context, memory)
        x = x + self.post_attention_layernorm(y)
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x))), memory


def gemma_layer(config: DecoderConfig, number: int) -> PreNormLayer:
    """A layer of Gemma."""
    return PreNormLayer(config, Attention(config, config.layer_types[number]), gated_mlp(config), norm=RMSNorm)


def gemma2_layer(config: DecoderConfig, number: int) -> SandwichLayer:
    """A layer of Gemma 2."""
    return SandwichLayer(config, Attention(config, config.layer_types[number]))


def gemma3_layer(config: DecoderConfig, number: int) -> SandwichLayer:
    """A layer of Gemma 3."""
    norm = partial(RMSNorm, eps=config.rms_norm_eps)
    return SandwichLayer(config, Attention(config, config.layer_types[number], norm=norm))


_GEMMA3_CLASSES = {
    "base": "Gemma3TextModel",
    "causal-lm": "Gemma3ForCausalLM",
    "sequence-classification": "Gemma3TextForSequenceClassification",
}
_WITHOUT = ("question-answering",)
_model = partial(Decoder, norm=RMSNorm)

GEMMA = decoder_family(
    "gemma",
    read_gemma,
    partial(_model, layer=gemma_layer),
    class_names("Gemma", without=_WITHOUT),
    mirror=mirror_decoder,
)
GEMMA2 = decoder_family(
    "gemma2",
    read_gemma2,
    partial(_model, layer=gemma2_layer),
    class_names("Gemma2", without=_WITHOUT),
    mirror=mirror_decoder,
)
GEMMA3 = decoder_family(
    "gemma3_text", read_gemma3, partial(_model, layer=gemma3_layer), _GEMMA3_CLASSES, mirror=mirror_decoder
)
