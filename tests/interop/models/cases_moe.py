"""Mixtral and Qwen3-MoE in the table of families; what is theirs alone is in test_moe.py."""

import transformers

from tests.interop.models.cases_llama import DECODER
from tests.interop.models.family_case import TINY, Case


def mixtral(**changes):
    sizes = {**TINY, "num_local_experts": 5, "num_experts_per_tok": 2, "rms_norm_eps": 1e-3}
    return transformers.MixtralConfig(**{**sizes, **changes})


def qwen(**changes):
    sizes = {**TINY, "num_experts": 5, "num_experts_per_tok": 3, "moe_intermediate_size": 28, "rms_norm_eps": 1e-3}
    return transformers.Qwen3MoeConfig(**{**sizes, "head_dim": 12, **changes})


CASES = [
    Case("mixtral", lambda: mixtral(sliding_window=5), DECODER, generates=True),
    Case(
        "mixtral-variants",
        lambda: mixtral(head_dim=12, num_local_experts=3, num_experts_per_tok=1, hidden_act="gelu"),
        ("causal-lm",),
        full=False,
    ),
    Case("qwen3_moe", lambda: qwen(attention_bias=True), DECODER, generates=True),
    Case(
        "qwen3_moe-dense-layers",
        lambda: qwen(decoder_sparse_step=2, mlp_only_layers=[3], norm_topk_prob=True, hidden_act="gelu"),
        DECODER[:2],
        full=False,
    ),
    Case(
        "qwen3_moe-window",
        lambda: qwen(use_sliding_window=True, sliding_window=5, mlp_only_layers=[0], tie_word_embeddings=True),
        ("causal-lm",),
        full=False,
    ),
]
