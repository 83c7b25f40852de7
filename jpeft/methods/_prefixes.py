"""What prefix tuning and cartridges have in common: the sizes of keys and values, and how a row holds them."""

import dataclasses
from typing import Any, TypeVar

import jax

from .._config import PromptLearningConfig

C = TypeVar("C", bound=PromptLearningConfig)

SIZES = ("num_virtual_tokens", "token_dim", "num_attention_heads", "num_layers")


def checked_sizes(config: C) -> C:
    """The config with `num_transformer_submodules` told; raises ValueError for sizes that are missing or do not fit."""
    missing = [name for name in SIZES if getattr(config, name) is None]
    if missing:
        raise ValueError(
            f"{type(config).__name__} lacks {', '.join(missing)}; expected the sizes of the model's keys and values: "
            "token_dim (key and value heads times their size), num_attention_heads (key and value heads), num_layers. "
            "jpeft_interop.get_peft_model takes these three from the model's config"
        )
    width, heads = width_of(config)
    if width % heads:
        raise ValueError(
            f"token_dim is {width}, no multiple of num_attention_heads {heads}; expected key and value heads times "
            "their size"
        )
    return dataclasses.replace(config, num_transformer_submodules=config.submodules)


def width_of(config: Any) -> tuple[int, int]:
    """What the keys of one layer have of features, and of heads."""
    return config.token_dim, config.num_attention_heads


def rows_shape(config: Any) -> tuple[int, int]:
    """A row for each virtual token, with its keys and values in all layers."""
    return config.num_virtual_tokens, config.num_layers * 2 * config.token_dim


def in_layers(rows: jax.Array, config: Any) -> jax.Array:
    """Rows (n, layers * 2 * token_dim) as (n, layers, 2, kv_heads, head_dim), in the order of the model's layers."""
    width, heads = width_of(config)
    return rows.reshape(rows.shape[0], config.num_layers, 2, heads, width // heads)[:, places(config)]


def places(config: Any) -> list[int]:
    """Which place in a row each layer of the model takes.

    Of an encoder-decoder it is every second one, and from the start again: PEFT writes the row down twice, cuts that
    into as many pieces as there are layers, and gives each layer the first keys and values of its piece. So of an even
    number of layers half of the row acts. A config with `num_transformer_submodules=1` gives every layer its own.
    """
    step = 2 if config.submodules == 2 else 1
    return [step * layer % config.num_layers for layer in range(config.num_layers)]
