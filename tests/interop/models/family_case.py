"""A row of the table of model families: a tiny random configuration, and what it is called with."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

Inputs = Mapping[str, np.ndarray]

TINY = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""Sizes that most decoders take."""


def text_inputs(length: int = 11) -> list[Inputs]:
    """Three rows of tokens: without a mask, the last row padded on the left, and on the right.

    No batch has its longest row padded, and the padding's ids are 0, as tokenizers make them.
    """
    ids = np.random.default_rng(0).integers(3, 40, (3, length))
    left, right = np.ones((3, length), np.int64), np.ones((3, length), np.int64)
    left[-1, :4], right[-1, -4:] = 0, 0
    padded = [{"input_ids": ids * mask, "attention_mask": mask} for mask in (left, right)]
    return [{"input_ids": ids}, *padded]


@dataclass(frozen=True)
class Case:
    """One configuration of a family.

    `config()` makes the config of `transformers`, with at least four small layers if the family has layers, and
    random or unusual values where a default would hide a mistake. `tasks`: those of our `Family.architectures` that
    are compared; the PyTorch class is the one of the architecture's name. `inputs()`: the calls that are compared.
    `tokens`: the input that says which positions count, if any. `generates`: whether `generate` is compared, too.
    `atol`: the largest difference allowed, as a part of the largest value. `defaults`: whether an empty config.json
    of this model_type has to mean the same as the defaults of `transformers`. `full`: whether all laws are tried, or
    (for a further variant of a family that has a full row already) only that the outputs are equal.
    """

    name: str
    config: Callable[[], Any]
    tasks: tuple[str, ...]
    inputs: Callable[[], list[Inputs]] = text_inputs
    tokens: str | None = "attention_mask"
    generates: bool = False
    atol: float = 1e-4
    defaults: bool = True
    full: bool = True
