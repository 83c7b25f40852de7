"""Gemma, Gemma 2 and Gemma 3 in the table of families."""

import transformers

from tests.interop.models.family_case import TINY, Case

TASKS = ("base", "causal-lm", "sequence-classification", "token-classification")
ROPE = {"rope_type": "default", "rope_theta": 700.0}
UNUSUAL = {**TINY, "head_dim": 12, "rms_norm_eps": 1e-3, "num_labels": 3}
SCORES = {"query_pre_attn_scalar": 7, "sliding_window": 4}
LINEAR = {
    "full_attention": {"rope_type": "linear", "rope_theta": 700.0, "factor": 3.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 90.0},
}


def gemma(**changes):
    return lambda: transformers.GemmaConfig(**{**UNUSUAL, "rope_parameters": ROPE, **changes})


def gemma2(**changes):
    caps = {"final_logit_softcapping": 6.0, "attn_logit_softcapping": 1.5}
    return lambda: transformers.Gemma2Config(**{**UNUSUAL, **SCORES, **caps, "rope_parameters": ROPE, **changes})


def gemma3(**changes):
    return lambda: transformers.Gemma3TextConfig(**{**UNUSUAL, **SCORES, "rope_parameters": LINEAR, **changes})


def variant(name, make, layers=2, **changes):
    return Case(name, make(num_hidden_layers=layers, **changes), ("causal-lm",), full=False)


CASES = [
    Case("gemma", gemma(), TASKS, generates=True),
    variant("gemma-untied-bias", gemma, tie_word_embeddings=False, attention_bias=True, num_key_value_heads=1),
    variant("gemma-legacy-gelu", gemma, hidden_act="gelu", head_dim=6),
    variant("gemma-silu", gemma, hidden_act="silu"),
    # Two periods of two kinds of layers, and a layer more.
    Case("gemma2", gemma2(num_hidden_layers=5), TASKS, generates=True),
    variant("gemma2-uncapped", gemma2, final_logit_softcapping=None, attn_logit_softcapping=None),
    variant("gemma2-bias-gelu", gemma2, attention_bias=True, hidden_activation="gelu", num_key_value_heads=4),
    variant("gemma2-layer-types", gemma2, layers=3, layer_types=["full_attention"] * 2 + ["sliding_attention"]),
    # A period of three layers, and a layer more: too few to be stacked by their places in it.
    Case("gemma3", gemma3(sliding_window_pattern=3), TASKS[:3], generates=True),
    variant("gemma3-one-kind", gemma3),
    variant("gemma3-bias-silu", gemma3, attention_bias=True, hidden_activation="silu", sliding_window_pattern=2),
    variant("gemma3-capped-untied", gemma3, final_logit_softcapping=6.0, tie_word_embeddings=False),
    variant("gemma3-default-rope", gemma3, rope_parameters=None, sliding_window_pattern=2),
]
