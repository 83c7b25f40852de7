"""Phi-3 and OLMo 2 in the table of families; what is theirs alone is in test_phi.py and test_olmo.py."""

import numpy as np
import transformers

from tests.interop.models.family_case import TINY, Case, Inputs

LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 100.0,
    "partial_rotary_factor": 0.75,
    "short_factor": [1.1, 1.5, 2.0],
    "long_factor": [1.3, 3.0, 9.0],
}


def phi(**changes):
    return transformers.Phi3Config(**{**TINY, "rms_norm_eps": 1e-3, **changes})


def longrope(**changes):
    return phi(original_max_position_embeddings=16, rope_parameters={**LONGROPE, **changes})


def short_and_long() -> list[Inputs]:
    ids = np.random.default_rng(1).integers(3, 40, (2, 40))
    return [{"input_ids": ids[:, :length]} for length in (16, 17, 40)]


def olmo(**changes):
    return transformers.Olmo2Config(**{**TINY, "rms_norm_eps": 1e-3, **changes})


PARTIAL = {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5}
PHI_TASKS = ("base", "sequence-classification", "token-classification", "causal-lm")

CASES = [
    Case("phi3", lambda: phi(sliding_window=5, rope_parameters=dict(PARTIAL)), PHI_TASKS, generates=True),
    Case("phi3-longrope", longrope, ("causal-lm",), short_and_long, full=False),
    Case(
        "phi3-longrope-factors",
        lambda: longrope(factor=3.0, attention_factor=1.7),
        ("causal-lm",),
        short_and_long,
        full=False,
    ),
    Case(
        "phi3-variants",
        lambda: phi(num_key_value_heads=None, hidden_act="gelu", tie_word_embeddings=True),
        ("causal-lm",),
        full=False,
    ),
    Case("olmo2", lambda: olmo(), ("base", "sequence-classification", "causal-lm"), generates=True),
    Case(
        "olmo2-variants",
        lambda: olmo(
            attention_bias=True,
            hidden_act="gelu",
            tie_word_embeddings=True,
            rope_parameters={"rope_type": "linear", "rope_theta": 100.0, "factor": 4.0},
        ),
        ("causal-lm",),
        full=False,
    ),
]
