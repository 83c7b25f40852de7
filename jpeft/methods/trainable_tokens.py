"""Trainable tokens: single rows of a table that train (PEFT, https://huggingface.co/docs/peft).

    E'[t_j] = delta_j,   every other row as it is;   E (vocabulary, features), delta (k, features)

`trainable_tokens_delta (k, features)`: values, which stand in the place of the table's, not differences. Where the
table is the output layer too, they act there as well. Costs k features parameters; k features of memory besides, a
search among k numbers for each token of a lookup, and 2 k features FLOPs for each token of an output layer.
PEFT's forward fails if targets name a tied output layer beside its table; here that name is left out, being implied.
"""

import dataclasses

from .._config import PeftType, TunerConfig
from .._contract import register, without_sites


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainableTokensConfig(TunerConfig):
    """Which rows of which tables train; PEFT's fields and defaults.

    token_indices: the rows, from 0 on, each of them once. target_modules: tables, and linear layers whose outputs are
    tokens; None for the input embedding. init_weights: whether the rows begin as the table's; else they are normal.

    >>> import jax.numpy as jnp, jpeft
    >>> params = {"embed_tokens": {"embedding": jnp.ones((9, 4))}}
    >>> adapter = jpeft.wrap(params, TrainableTokensConfig(token_indices=[7, 8])).adapters["default"]
    >>> adapter.rows["embed_tokens.embedding"].values.shape, adapter.config.target_modules
    ((2, 4), 'embed_tokens')
    """

    peft_type: PeftType | None = PeftType.TRAINABLE_TOKENS
    token_indices: tuple[int, ...] | list[int] = ()
    init_weights: bool = True


TRAINABLE_TOKENS = register(
    without_sites(config=TrainableTokensConfig, rows=lambda config: tuple(config.token_indices))
)
