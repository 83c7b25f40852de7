"""Qwen3-MoE (https://arxiv.org/abs/2505.09388): Qwen3 with mixtures of experts in all or some of its layers."""

from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

from ._decoder import Attention, Decoder, DecoderConfig, PreNormLayer, gated_mlp, read_decoder
from ._experts import EXPERT_LAYOUTS, MixtureOfExperts, number_of_experts
from ._heads import class_names, decoder_family
from ._layers import RMSNorm

_DEFAULTS = {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 24,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "norm_topk_prob": False,
    "decoder_sparse_step": 1,
    "mlp_only_layers": (),
}
_KNOWN = (
    "num_local_experts",
    "decoder_sparse_step",
    "mlp_only_layers",
    "use_sliding_window",
    "max_window_layers",  # of the Qwen2 that the config comes from
    "output_router_logits",
    "router_aux_loss_coef",
)


def read_qwen3_moe(raw: Mapping[str, Any], ignore: Collection[str] = ()) -> DecoderConfig:
    """The config of a Qwen3-MoE's config.json. Raises ValueError for what is not implemented, by name."""
    raw = {**_DEFAULTS, **raw}
    derived = {
        "mlp_types": _mlp_types(raw),
        "num_experts": number_of_experts(raw),
        "sliding_window": raw["sliding_window"] if raw["use_sliding_window"] else None,
        "attention_output_bias": raw.get("attention_bias", False),
    }
    accepted = {"mlp_bias": (False,)}
    return read_decoder(raw, ignore, defaults=_DEFAULTS, accepted=accepted, known=_KNOWN, derived=derived)


def _mlp_types(raw: Mapping[str, Any]) -> tuple[str, ...]:
    step = raw["decoder_sparse_step"] if number_of_experts(raw) else raw["num_hidden_layers"] + 1
    dense = raw["mlp_only_layers"] or ()
    numbers = range(raw["num_hidden_layers"])
    return tuple("dense" if number in dense or (number + 1) % step else "sparse" for number in numbers)


def layer(config: DecoderConfig, number: int) -> PreNormLayer:
    """A layer of Qwen3-MoE."""
    attention = Attention(config, config.layer_types[number], norm=partial(RMSNorm, eps=config.rms_norm_eps))
    if config.mlp_types[number] == "dense":
        return PreNormLayer(config, attention, gated_mlp(config))
    return PreNormLayer(config, attention, MixtureOfExperts(config, ("gate_proj", "up_proj", "down_proj")))


Qwen3MoeModel = partial(Decoder, layer=layer)

QWEN3_MOE = decoder_family(
    "qwen3_moe",
    read_qwen3_moe,
    Qwen3MoeModel,
    class_names("Qwen3Moe"),
    layouts=EXPERT_LAYOUTS,
)
