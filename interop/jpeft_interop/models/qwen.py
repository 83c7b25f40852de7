"""Qwen 2 (https://arxiv.org/abs/2407.10671) and Qwen 3 (https://arxiv.org/abs/2505.09388): causal decoders."""

from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

from ._decoder import FULL, SLIDING, Attention, Decoder, DecoderConfig, PreNormLayer, gated_mlp, read_decoder
from ._heads import class_names, decoder_family
from ._layers import RMSNorm
from ._mirror import mirror_decoder, mirror_divided
from .llama import LlamaModel

_QWEN2_DEFAULTS = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
}
_QWEN3_DEFAULTS = {**_QWEN2_DEFAULTS, "head_dim": 128}
_WINDOW_KEYS = ("use_sliding_window", "max_window_layers")
_ACCEPTED = {"mlp_bias": (False,), "use_mrope": (False,)}


def _windows(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The window of a Qwen's config.json and the layers that have it: by default from `max_window_layers` on."""
    window = raw["sliding_window"] if raw["use_sliding_window"] else None
    first = raw["num_hidden_layers"] if window is None else raw["max_window_layers"]
    types = [SLIDING if number >= first else FULL for number in range(raw["num_hidden_layers"])]
    return {"sliding_window": window, "layer_types": raw.get("layer_types") or types}


def read_qwen2(raw: Mapping[str, Any], ignore: Collection[str] = ()) -> DecoderConfig:
    """The config of a Qwen 2's config.json. Raises ValueError for what is not implemented, by name."""
    raw = {**_QWEN2_DEFAULTS, **raw}
    return read_decoder(
        raw,
        ignore,
        defaults=_QWEN2_DEFAULTS,
        accepted={**_ACCEPTED, "attention_bias": (True,)},
        known=_WINDOW_KEYS,
        derived={**_windows(raw), "attention_bias": True},
    )


def read_qwen3(raw: Mapping[str, Any], ignore: Collection[str] = ()) -> DecoderConfig:
    """The config of a Qwen 3's config.json. Raises ValueError for what is not implemented, by name."""
    raw = {**_QWEN3_DEFAULTS, **raw}
    return read_decoder(
        raw,
        ignore,
        defaults=_QWEN3_DEFAULTS,
        accepted=_ACCEPTED,
        known=_WINDOW_KEYS,
        derived={**_windows(raw), "attention_output_bias": raw.get("attention_bias", False)},
    )


def layer(config: DecoderConfig, number: int) -> PreNormLayer:
    """A layer of Qwen 3."""
    norm = partial(RMSNorm, eps=config.rms_norm_eps)
    return PreNormLayer(config, Attention(config, config.layer_types[number], norm=norm), gated_mlp(config))


QWEN2 = decoder_family("qwen2", read_qwen2, LlamaModel, class_names("Qwen2"), mirror=mirror_divided)
QWEN3 = decoder_family("qwen3", read_qwen3, partial(Decoder, layer=layer), class_names("Qwen3"), mirror=mirror_decoder)
