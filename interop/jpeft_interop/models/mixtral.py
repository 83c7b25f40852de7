"""Mixtral (https://arxiv.org/abs/2401.04088): a Mistral whose feed-forward blocks are mixtures of experts."""

from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

from ._decoder import Attention, Decoder, DecoderConfig, PreNormLayer, read_decoder
from ._experts import EXPERT_LAYOUTS, MixtureOfExperts, number_of_experts
from ._heads import class_names, decoder_family

_DEFAULTS = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 4096 * 32,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "num_experts": 8,
    "num_experts_per_tok": 2,
}
_ACCEPTED = {"attention_bias": (False,), "mlp_bias": (False,), "norm_topk_prob": (True,)}
_NO_EFFECT = ("num_local_experts", "output_router_logits", "router_aux_loss_coef", "router_jitter_noise")
"""The number of experts is read here; the others concern the loss, or training."""


def read_mixtral(raw: Mapping[str, Any], ignore: Collection[str] = ()) -> DecoderConfig:
    """The config of a Mixtral's config.json. Raises ValueError for what is not implemented, by name."""
    raw = {**_DEFAULTS, **raw}
    derived = {
        "mlp_types": ("sparse",) * raw["num_hidden_layers"],
        "num_experts": number_of_experts(raw),
        "moe_intermediate_size": raw["intermediate_size"],
    }
    return read_decoder(raw, ignore, defaults=_DEFAULTS, accepted=_ACCEPTED, known=_NO_EFFECT, derived=derived)


def layer(config: DecoderConfig, number: int) -> PreNormLayer:
    """A layer of Mixtral."""
    mlp = MixtureOfExperts(config, ("w1", "w3", "w2"))
    return PreNormLayer(config, Attention(config, config.layer_types[number]), mlp)


MixtralModel = partial(Decoder, layer=layer)

MIXTRAL = decoder_family(
    "mixtral",
    read_mixtral,
    MixtralModel,
    class_names("Mixtral"),
    qa_prefix="model",
    renames=((r"\.block_sparse_moe\.", ".mlp."),),
    layouts=EXPERT_LAYOUTS,
)
