"""What the methods that learn a prompt have in common: sizes, and rows of the table that a prompt begins with."""

import dataclasses
import math
from collections.abc import Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp

from .._begin import Tree
from .._config import PromptLearningConfig
from .._contract import Site

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


def repeated_ids(ids: Sequence[int], count: int, site: Site) -> list[int]:
    """So many ids: the first of those given, or all of them again and again."""
    wrong = [token for token in ids if not 0 <= token < site.in_features]
    if wrong or not ids:
        raise ValueError(
            f"the prompt begins with the tokens {list(ids)!r}, but {site.leaf!r} has {site.in_features} rows; expected "
            f"at least one token, each from 0 to {site.in_features - 1}"
        )
    return (list(ids) * math.ceil(count / len(ids)))[:count]


def token_rows(tree: Tree, site: Site, ids: jax.Array) -> jax.Array:
    """The rows (n, dim) of the table that the ids name, in float32."""
    return tree.weight(site)[ids].astype(jnp.float32)
