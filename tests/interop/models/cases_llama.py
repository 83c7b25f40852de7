"""Llama, Mistral and BERT in the table of families; what is theirs alone is in test_llama.py and test_bert.py."""

import transformers

from tests.interop.models.family_case import TINY, Case

DECODER = ("base", "causal-lm", "sequence-classification", "token-classification", "question-answering")
BERT_SIZES = {key: value for key, value in TINY.items() if key != "num_key_value_heads"}

CASES = [
    Case("llama", lambda: transformers.LlamaConfig(**TINY), DECODER, generates=True),
    Case("mistral", lambda: transformers.MistralConfig(**TINY, sliding_window=5), DECODER, generates=True),
    Case(
        "bert",
        lambda: transformers.BertConfig(**BERT_SIZES, type_vocab_size=2),
        ("base", "sequence-classification", "token-classification", "question-answering", "masked-lm"),
    ),
]
