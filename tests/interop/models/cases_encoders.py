"""Encoders of text in the table of families; what is theirs alone is in test_roberta.py, test_deberta.py, ..."""

import numpy as np
import transformers

from tests.interop.models.family_case import Case, text_inputs

TASKS = ("base", "sequence-classification", "token-classification", "question-answering", "masked-lm")
SIZES = {
    "vocab_size": 40,
    "hidden_size": 24,
    "intermediate_size": 44,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
    "max_position_embeddings": 29,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-3,
    "pad_token_id": 0,
}


def from_the_first():
    """The inputs of `text_inputs` that begin with a token: what a class of the first token says of padding is noise."""
    plain, _, right = text_inputs()
    return [plain, right]


def with_types():
    """Token types, own positions, and embeddings in place of ids."""
    draw = np.random.default_rng(3)
    ids = draw.integers(3, 40, (2, 7))
    return [
        {"input_ids": ids, "token_type_ids": draw.integers(0, 2, (2, 7)), "position_ids": np.arange(7)[None] + 5},
        {"inputs_embeds": draw.normal(size=(2, 7, 24)).astype(np.float32)},
    ]


def roberta(**changes):
    return transformers.RobertaConfig(**{**SIZES, "pad_token_id": 2, "hidden_act": "relu", **changes})


def padded_with(pad_token_id):
    """Where padding is told by its id, that id in the places of padding."""

    def inputs():
        plain, *masked = from_the_first()
        ids = [np.where(row["attention_mask"] == 0, pad_token_id, row["input_ids"]) for row in masked]
        return [plain, *({**row, "input_ids": own} for row, own in zip(masked, ids, strict=True))]

    return inputs


def distilbert(**changes):
    sizes = {
        "vocab_size": 40,
        "dim": 24,
        "hidden_dim": 44,
        "n_layers": 4,
        "n_heads": 3,
        "max_position_embeddings": 29,
        "activation": "gelu_new",
        "sinusoidal_pos_embds": True,
    }
    return transformers.DistilBertConfig(**{**sizes, **changes})


def deberta(**changes):
    """As the v3 models are, but smaller: buckets that are reached within the eleven tokens of a test."""
    return transformers.DebertaV2Config(
        **{
            **SIZES,
            "type_vocab_size": 0,
            "relative_attention": True,
            "max_relative_positions": 19,
            "position_buckets": 6,
            "norm_rel_ebd": "layer_norm",
            "share_att_key": True,
            "pos_att_type": ["p2c", "c2p"],
            "position_biased_input": False,
            "pooler_hidden_act": "relu",
            **changes,
        }
    )


CASES = [
    Case("roberta", roberta, TASKS, padded_with(2)),
    Case("roberta-types", lambda: roberta(type_vocab_size=3), TASKS[:1], with_types, full=False),
    Case("xlm-roberta", lambda: transformers.XLMRobertaConfig(**SIZES), TASKS, from_the_first),
    Case("distilbert", distilbert, TASKS, from_the_first),
    Case("deberta", deberta, TASKS, from_the_first),
    Case(
        "deberta-v2",
        lambda: deberta(
            conv_kernel_size=3, conv_act="gelu", type_vocab_size=2, position_biased_input=True, share_att_key=False
        ),
        ("base", "masked-lm"),
        from_the_first,
    ),
    Case("deberta-types", lambda: deberta(type_vocab_size=3), TASKS[:1], with_types, full=False),
    Case(
        "deberta-c2p",
        lambda: deberta(pos_att_type="c2p", share_att_key=False, position_buckets=-1, max_relative_positions=4),
        TASKS[:1],
        full=False,
    ),
    Case(
        "deberta-p2c",
        lambda: deberta(pos_att_type="p2c", norm_rel_ebd="none", max_relative_positions=-1, position_buckets=9),
        TASKS[:1],
        full=False,
    ),
    Case("deberta-absolute", lambda: deberta(relative_attention=False), TASKS[:1], full=False),
    Case("deberta-no-terms", lambda: deberta(pos_att_type=None), TASKS[:1], full=False),
    Case(
        "deberta-narrow",
        lambda: deberta(embedding_size=14, conv_kernel_size=5, conv_groups=2, num_hidden_layers=1),
        ("base", "masked-lm"),
        full=False,
    ),
    Case("deberta-not-legacy", lambda: deberta(legacy=False, hidden_act="gelu_new"), TASKS[-1:], full=False),
]
