"""Whisper in the table of families; what is its alone is in test_whisper.py."""

import numpy as np
import transformers

from tests.interop.models.family_case import Case

SIZES = {
    "vocab_size": 40,
    "num_mel_bins": 7,
    "d_model": 24,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 3,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 44,
    "decoder_ffn_dim": 36,
    "max_source_positions": 9,
    "max_target_positions": 13,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 3,
    "suppress_tokens": [],
    "begin_suppress_tokens": [],
}


def speech():
    """Frames of sound, and a decoder's input: without a mask, and with one."""
    rng = np.random.default_rng(0)
    features = rng.normal(size=(3, 7, 18)).astype(np.float32)
    ids = rng.integers(3, 40, (3, 6))
    mask = np.ones((3, 6), np.int64)
    mask[-1, -2:] = 0
    unmasked = {"input_features": features, "decoder_input_ids": ids}
    return [unmasked, {**unmasked, "decoder_attention_mask": mask}]


CASES = [
    Case(
        "whisper",
        lambda: transformers.WhisperConfig(**SIZES, scale_embedding=True),
        ("base", "speech-seq2seq"),
        inputs=speech,
        tokens="decoder_attention_mask",
        generates=True,
    ),
    Case(
        "whisper-relu",
        lambda: transformers.WhisperConfig(**SIZES, activation_function="relu"),
        ("base",),
        inputs=speech,
        tokens="decoder_attention_mask",
        full=False,
    ),
]
