"""Qwen 2 and Qwen 3 in the table of families."""

import transformers

from tests.interop.models.family_case import TINY, Case

TASKS = ("base", "causal-lm", "sequence-classification", "token-classification", "question-answering")
LONG = {"rope_type": "yarn", "rope_theta": 300.0, "factor": 4.0, "original_max_position_embeddings": 16}
ROPE = {"rope_type": "default", "rope_theta": 700.0}
UNUSUAL = {**TINY, "num_key_value_heads": 1, "rms_norm_eps": 1e-3, "rope_parameters": ROPE}
ALTERNATE = ["sliding_attention", "full_attention"]
WINDOWS = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}


def qwen2(**changes):
    return lambda: transformers.Qwen2Config(**{**UNUSUAL, **changes})


def qwen3(**changes):
    return lambda: transformers.Qwen3Config(**{**UNUSUAL, "head_dim": 12, **changes})


def variant(name, config):
    return Case(name, config, ("causal-lm",), full=False)


CASES = [
    Case("qwen2", qwen2(**WINDOWS, num_labels=3), TASKS, generates=True),
    variant("qwen2-window-unused", qwen2(sliding_window=3, max_window_layers=0, num_hidden_layers=2)),
    variant("qwen2-layer-types", qwen2(**WINDOWS, layer_types=ALTERNATE, num_hidden_layers=2)),
    variant("qwen2-tied-yarn", qwen2(tie_word_embeddings=True, rope_parameters=LONG, num_hidden_layers=2)),
    Case("qwen3", qwen3(**{**WINDOWS, "max_window_layers": 2}, num_labels=3), TASKS, generates=True),
    variant("qwen3-bias-tied", qwen3(attention_bias=True, tie_word_embeddings=True, num_hidden_layers=2)),
    variant("qwen3-layer-types", qwen3(**WINDOWS, layer_types=ALTERNATE, num_hidden_layers=2)),
    variant("qwen3-yarn-gelu", qwen3(rope_parameters=LONG, hidden_act="gelu", num_hidden_layers=2)),
]
