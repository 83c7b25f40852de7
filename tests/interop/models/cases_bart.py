"""BART in the table of families; what is its alone is in test_bart.py."""

import transformers

from tests.interop.models.cases_t5 import with_decoder, without_decoder
from tests.interop.models.family_case import Case

SIZES = {
    "vocab_size": 40,
    "d_model": 24,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 3,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 44,
    "decoder_ffn_dim": 36,
    "max_position_embeddings": 17,
    "scale_embedding": True,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "decoder_start_token_id": 3,
    "forced_eos_token_id": None,
}
TASKS = ("base", "sequence-classification", "question-answering", "seq2seq-lm")

CASES = [
    Case(
        "bart",
        lambda: transformers.BartConfig(**SIZES),
        TASKS,
        inputs=lambda: with_decoder(11),
        tokens="decoder_attention_mask",
        generates=True,
    ),
    Case(
        "bart-shifted",
        lambda: transformers.BartConfig(**{**SIZES, "scale_embedding": False, "activation_function": "relu"}),
        TASKS,
        inputs=without_decoder,
        tokens=None,
        full=False,
    ),
    Case(
        "bart-lengths",
        lambda: transformers.BartConfig(**SIZES),
        ("seq2seq-lm",),
        inputs=lambda: with_decoder(7),
        tokens="decoder_attention_mask",
        full=False,
    ),
]
