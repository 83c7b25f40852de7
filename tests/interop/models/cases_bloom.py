"""BLOOM in the table of families; what is its alone is in test_bloom.py."""

import transformers

from tests.interop.models.family_case import Case

TASKS = ("base", "causal-lm", "sequence-classification", "token-classification", "question-answering")
SIZES = {
    "vocab_size": 40,
    "hidden_size": 24,
    "n_layer": 4,
    "n_head": 4,
    "layer_norm_epsilon": 1e-2,
    "num_labels": 3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def config(**changes):
    return transformers.BloomConfig(**{**SIZES, **changes})


CASES = [
    Case("bloom", config, TASKS, generates=True),
    Case(
        "bloom-normed-residual-untied",
        lambda: config(apply_residual_connection_post_layernorm=True, tie_word_embeddings=False),
        TASKS[1:2],
        full=False,
    ),
    *(
        Case(
            f"bloom-{heads}-heads",
            lambda heads=heads: config(hidden_size=2 * heads, n_head=heads),
            TASKS[1:2],
            full=False,
        )
        for heads in (1, 3, 6, 14)
    ),
]
