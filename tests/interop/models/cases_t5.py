"""T5, Flan-T5 and mT5 in the table of families; what is theirs alone is in test_t5.py."""

import numpy as np
import transformers

from tests.interop.models.family_case import Case, text_inputs

EOS = 1
SIZES = {
    "vocab_size": 40,
    "d_model": 24,
    "d_kv": 10,
    "d_ff": 44,
    "num_layers": 4,
    "num_decoder_layers": 3,  # More than the encoder's, and transformers cannot generate: its cache is too short.
    "num_heads": 4,
    "relative_attention_num_buckets": 6,
    "relative_attention_max_distance": 9,
    "layer_norm_epsilon": 1e-3,
    "decoder_start_token_id": 0,
}
SMALL = {**SIZES, "num_layers": 2, "num_decoder_layers": 2}


def with_decoder(length):
    """The encoder's inputs with two ends of sequence in each row, and a decoder's of some length, padded at the end."""
    calls = []
    for number, call in enumerate(text_inputs()):
        ids = np.array(call["input_ids"])
        ids[:, 4:7:2] = EOS
        targets = np.random.default_rng(number).integers(3, 40, (3, length))
        mask = np.ones((3, length), np.int64)
        mask[-1, -2:] = 0
        decoder = {"decoder_input_ids": targets, "decoder_attention_mask": mask} if number else {}
        calls.append({**call, "input_ids": ids, "decoder_input_ids": targets, **decoder})
    return calls


def without_decoder():
    return [{name: call[name] for name in call if "decoder" not in name} for call in with_decoder(11)]


def case(name, config, tasks, **changes):
    return Case(name, config, tasks, **{"tokens": "decoder_attention_mask", **changes})


CASES = [
    case(
        "t5",
        lambda: transformers.T5Config(**SIZES, num_labels=2),
        ("base", "sequence-classification", "question-answering", "seq2seq-lm"),
        inputs=lambda: with_decoder(11),
        generates=True,
    ),
    case(
        "t5-encoder",
        lambda: transformers.T5Config(**SIZES, num_labels=5),
        ("token-classification",),
        inputs=without_decoder,
        tokens="attention_mask",
    ),
    case(
        "t5-v1.1",
        lambda: transformers.T5Config(**SMALL, feed_forward_proj="gated-gelu", tie_word_embeddings=False),
        ("seq2seq-lm",),
        inputs=lambda: with_decoder(7),
        generates=True,
        full=False,
    ),
    case(
        "t5-gated-silu",
        lambda: transformers.T5Config(**SMALL, feed_forward_proj="gated-silu", is_gated_act=True),
        ("seq2seq-lm",),
        inputs=lambda: with_decoder(13),
        full=False,
    ),
    case(
        "t5-gelu",
        lambda: transformers.T5Config(**SMALL, feed_forward_proj="gelu"),
        ("base",),
        inputs=lambda: with_decoder(7),
        full=False,
    ),
    case(
        "t5-shifted",
        lambda: transformers.T5Config(**SMALL),
        ("sequence-classification", "question-answering"),
        inputs=without_decoder,
        full=False,
    ),
    case(
        "mt5",
        lambda: transformers.MT5Config(**{**SIZES, "decoder_start_token_id": 3}),
        ("base", "sequence-classification", "question-answering", "seq2seq-lm"),
        inputs=lambda: with_decoder(11),
        generates=True,
    ),
    case(
        "mt5-encoder",
        lambda: transformers.MT5Config(**SMALL, feed_forward_proj="relu"),
        ("token-classification",),
        inputs=without_decoder,
        tokens="attention_mask",
        full=False,
    ),
]
