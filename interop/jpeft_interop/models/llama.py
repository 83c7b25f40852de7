"""Llama 2 and 3 (https://arxiv.org/abs/2407.21783) and Mistral (https://arxiv.org/abs/2310.06825): causal decoders."""

from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

from ._decoder import Attention, Decoder, DecoderConfig, PreNormLayer, gated_mlp, read_decoder
from ._heads import class_names, decoder_family
from ._mirror import mirror_decoder

LLAMA_DEFAULTS = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
}
_MISTRAL_DEFAULTS = {
    **LLAMA_DEFAULTS,
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 4096 * 32,
    "sliding_window": 4096,
}
_NO_EFFECT = ("is_llama_config", "max_sequence_length")


def read_llama(raw: Mapping[str, Any], ignore: Collection[str] = ()) -> DecoderConfig:
    """The config of a Llama's config.json. Raises ValueError for what is not implemented, by name."""
    bias = {"attention_output_bias": raw.get("attention_bias", False)}
    accepted = {"sliding_window": (None,)}
    return read_decoder(raw, ignore, defaults=LLAMA_DEFAULTS, accepted=accepted, known=_NO_EFFECT, derived=bias)


def read_mistral(raw: Mapping[str, Any], ignore: Collection[str] = ()) -> DecoderConfig:
    """The config of a Mistral's config.json. Raises ValueError for what is not implemented, by name."""
    accepted = {"attention_bias": (False,), "mlp_bias": (False,)}
    return read_decoder(raw, ignore, defaults=_MISTRAL_DEFAULTS, accepted=accepted, known=_NO_EFFECT)


def layer(config: DecoderConfig, number: int) -> PreNormLayer:
    """A layer of Llama."""
    return PreNormLayer(config, Attention(config, config.layer_types[number]), gated_mlp(config))


LlamaModel = partial(Decoder, layer=layer)

LLAMA = decoder_family(
    "llama", read_llama, LlamaModel, class_names("Llama"), adapted_attention="self_attn", mirror=mirror_decoder
)
MISTRAL = decoder_family(
    "mistral",
    read_mistral,
    LlamaModel,
    class_names("Mistral"),
    qa_prefix="model",
    adapted_attention="self_attn",
    mirror=mirror_decoder,
)
