"""GPT-2 in the table of families; what is its alone is in test_gpt2.py."""

import transformers

from tests.interop.models.family_case import Case

TASKS = ("base", "causal-lm", "sequence-classification", "token-classification", "question-answering")
SIZES = {
    "vocab_size": 40,
    "n_embd": 24,
    "n_layer": 4,
    "n_head": 3,
    "n_inner": 44,
    "n_positions": 50,
    "layer_norm_epsilon": 1e-2,
    "num_labels": 3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def config(**changes):
    return transformers.GPT2Config(**{**SIZES, **changes})


CASES = [
    Case("gpt2", config, TASKS, generates=True),
    Case(
        "gpt2-scaled-by-layer",
        lambda: config(scale_attn_by_inverse_layer_idx=True, activation_function="relu", n_inner=None),
        TASKS[1:2],
        full=False,
    ),
    Case(
        "gpt2-unscaled-untied",
        lambda: config(scale_attn_weights=False, reorder_and_upcast_attn=True, tie_word_embeddings=False),
        TASKS[1:2],
        full=False,
    ),
]
