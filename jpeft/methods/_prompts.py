"""What the methods that learn a prompt have in common: sizes, and rows of the table that a prompt begins with."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from .._begin import Tree
from .._config import PromptLearningConfig
from .._contract import Site

OF_TEXT = ("prompt_tuning_init_text", "tokenizer_name_or_path")
"""The fields of a text that a prompt begins as."""

C = TypeVar("C", bound=PromptLearningConfig)


def checked_sizes(config: C, site: Site) -> C:
    """The config with the sizes that the table of tokens tells; raises ValueError where they contradict it."""
    if config.num_virtual_tokens is None:
        raise ValueError(f"num_virtual_tokens is None; expected the length of the prompt, in {type(config).__name__}")
    if config.token_dim not in (None, site.out_features):
        raise ValueError(
            f"token_dim is {config.token_dim}, but the rows of {site.leaf!r}, the model's table of tokens, have "
            f"{site.out_features} entries; expected {site.out_features}, or None"
        )
    return dataclasses.replace(config, token_dim=site.out_features, num_transformer_submodules=config.submodules)


def check_text(config: Any) -> None:
    """Raise ValueError if a prompt is to begin as a text that the config does not tell."""
    told = all(getattr(config, name) is not None for name in OF_TEXT)
    if config.prompt_tuning_init == "TEXT" and not told and config.prompt_tuning_init_ids is None:
        raise ValueError(
            "prompt_tuning_init is 'TEXT'; expected prompt_tuning_init_text and tokenizer_name_or_path, or "
            "prompt_tuning_init_ids"
        )


def as_begun(config: C, needs: Mapping[str, Sequence[str]]) -> C:
    """The config of a prompt that has begun, as files hold it: of `prompt_tuning_init` "RANDOM" if they tell no more.

    needs: {how it begins: fields that files tell it by}. PEFT reads a text, or a source, each time it loads the prompt.
    """
    own: Any = config
    told = all(getattr(own, name) is not None for name in needs.get(own.prompt_tuning_init, ()))
    return config if told else dataclasses.replace(own, prompt_tuning_init="RANDOM")


def repeated_ids(ids: Sequence[int], count: int, site: Site) -> list[int]:
    """So many ids: the first of those given, or all of them again and again."""
    wrong = [token for token in ids if not 0 <= token < site.in_features]
    if wrong or not ids:
        raise ValueError(
            f"the prompt begins with the tokens {list(ids)!r}, but {site.leaf!r} has {site.in_features} rows; expected "
            f"at least one token, each from 0 to {site.in_features - 1}"
        )
    return (list(ids) * math.ceil(count / len(ids)))[:count]


def token_rows(tree: Tree, site: Site, ids: jax.Array, scale: float) -> jax.Array:
    """The rows (n, dim) of the table that the ids name, as the model takes them up, in float32."""
    return tree.weight(site)[ids].astype(jnp.float32) * jnp.float32(scale)
