"""OPT in the table of families; what is its alone is in test_opt.py."""

import transformers

from tests.interop.models.family_case import Case

TASKS = ("base", "causal-lm", "sequence-classification", "question-answering")
SIZES = {
    "vocab_size": 40,
    "hidden_size": 24,
    "ffn_dim": 44,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
    "max_position_embeddings": 50,
    "num_labels": 3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def config(**changes):
    return transformers.OPTConfig(**{**SIZES, **changes})


CASES = [
    Case("opt", config, TASKS, generates=True),
    Case(
        "opt-narrow-embeddings-norms-after",
        lambda: config(do_layer_norm_before=False, word_embed_proj_dim=20),
        TASKS,
        generates=True,
    ),
    Case(
        "opt-narrow-embeddings-untied-without-bias",
        lambda: config(word_embed_proj_dim=28, enable_bias=False, tie_word_embeddings=False),
        TASKS[1:2],
        full=False,
    ),
    Case(
        "opt-plain-norms",
        lambda: config(layer_norm_elementwise_affine=False, activation_function="gelu"),
        TASKS[1:2],
        full=False,
    ),
    Case(
        "opt-plain-norms-after",
        lambda: config(layer_norm_elementwise_affine=False, do_layer_norm_before=False),
        TASKS[1:2],
        full=False,
    ),
    Case("opt-without-last-norm", lambda: config(_remove_final_layer_norm=True), TASKS[1:2], full=False),
]
