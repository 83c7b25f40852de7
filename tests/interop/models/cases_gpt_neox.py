"""GPT-NeoX in the table of families; what is its alone is in test_gpt_neox.py."""

import transformers

from tests.interop.models.family_case import TINY, Case

TASKS = ("base", "causal-lm", "sequence-classification", "token-classification", "question-answering")
SIZES = {
    **{key: value for key, value in TINY.items() if key != "num_key_value_heads"},
    "hidden_size": 48,
    "layer_norm_eps": 1e-2,
    "num_labels": 3,
}


def config(**changes):
    rope = {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5}
    return transformers.GPTNeoXConfig(**{**SIZES, "rope_parameters": rope, **changes})


CASES = [
    Case("gpt_neox", config, TASKS, generates=True),
    Case(
        "gpt_neox-in-turn-without-bias",
        lambda: config(use_parallel_residual=False, attention_bias=False, tie_word_embeddings=True),
        TASKS[1:2],
        full=False,
    ),
    Case(
        "gpt_neox-linear-rope",
        lambda: config(
            hidden_act="gelu_new",
            rope_parameters={
                "rope_type": "linear",
                "factor": 2.0,
                "rope_theta": 100.0,
                "partial_rotary_factor": 0.25,
            },
        ),
        TASKS[1:2],
        full=False,
    ),
]
