"""Prefix tuning (Li & Liang, 2021, https://arxiv.org/abs/2101.00190).

    attention(q, [K; k], [V; v])   in every layer, K and V (n, kv_heads, head_dim) trained, or made by
    E -> tanh(E W_0 + b_0) W_2 + b_2   of rows E (n, token_dim), if prefix_projection

`prompt_embeddings (n, layers 2 token_dim)`, a row a virtual token: layer by layer, keys, then values, head by head.
With a projection the arrays of the encoder train, and files hold the rows that it makes, without it.
The model's tokens have the positions from n on. Costs n more keys and values in every layer, and no tokens.

In an encoder-decoder the decoder's attention to itself has the prefix. There PEFT gives some layers the keys and values
of others (`_prefixes.places`), and so do we, as its files mean that. PEFT does not take checkpointed gradients, a
decoder deeper than its encoder, or, unless told, keys of another width than the model (T5 by its d_kv).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from .._begin import Beginning, Tree
from .._config import PeftType, PromptLearningConfig
from .._contract import Arrays, beside, fold_in_name, register
from ._prefixes import checked_sizes, in_layers, rows_shape

ROWS = "prompt_embeddings"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrefixTuningConfig(PromptLearningConfig):
    """PEFT's fields and defaults.

    encoder_hidden_size: width of the projection's hidden layer; None: token_dim. prefix_projection: whether an encoder
    makes the keys and values while they are learned. init_weights: None for normal numbers, "zero" for zeros.
    token_dim: key and value heads times their size; num_attention_heads: the number of key and value heads.

    >>> import jax.numpy as jnp, jpeft
    >>> config = PrefixTuningConfig(num_virtual_tokens=3, token_dim=8, num_attention_heads=2, num_layers=5)
    >>> wrapped = jpeft.wrap({"query": {"kernel": jnp.ones((8, 8))}}, config)
    >>> {name: array.shape for name, array in wrapped.adapters["default"].shared.items()}
    {'prompt_embeddings': (3, 80)}
    """

    peft_type: PeftType | None = PeftType.PREFIX_TUNING
    encoder_hidden_size: int | None = None
    prefix_projection: bool = False
    init_weights: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init_weights not in (None, "zero"):
            raise ValueError(f"init_weights is {self.init_weights!r}; expected None (normal numbers) or 'zero'")
        size = self.encoder_hidden_size
        if size is not None and (not isinstance(size, int) or size < 1):
            raise ValueError(f"encoder_hidden_size is {size!r}; expected a whole number of at least 1, or None")


def begin(key: jax.Array, tree: Tree, config: PrefixTuningConfig) -> Beginning:
    config = checked_sizes(config)
    config = dataclasses.replace(config, encoder_hidden_size=config.encoder_hidden_size or config.token_dim)
    return Beginning(config, shared=initial(key, config))


def initial(key: jax.Array, config: Any) -> dict[str, jax.Array]:
    """The arrays that train: the rows, or the encoder's, under PEFT's names and in its orientation (out, in)."""
    zero, (count, size) = config.init_weights == "zero", rows_shape(config)
    width, hidden = config.token_dim, config.encoder_hidden_size

    def normal(name: str, *shape: int) -> jax.Array:
        return jax.random.normal(fold_in_name(key, name), shape)

    def uniform(name: str, inputs: int, *shape: int) -> jax.Array:
        return jax.random.uniform(fold_in_name(key, name), shape, minval=-(inputs**-0.5), maxval=inputs**-0.5)

    if not config.prefix_projection or config.inference_mode:
        return {ROWS: jnp.zeros((count, size)) if zero else normal(ROWS, count, size)}
    last = {
        "transform.2.weight": uniform("transform.2.weight", hidden, size, hidden),
        "transform.2.bias": uniform("transform.2.bias", hidden, size),
    }
    return {
        "embedding.weight": normal("embedding.weight", count, width),
        "transform.0.weight": uniform("transform.0.weight", width, hidden, width),
        "transform.0.bias": uniform("transform.0.bias", width, hidden),
        **(jax.tree.map(jnp.zeros_like, last) if zero else last),
    }


def rows(p: Arrays, config: PrefixTuningConfig) -> jax.Array:
    """(n, layers * 2 * token_dim), by the encoder if there is one."""
    if ROWS in p:
        return p[ROWS]
    hidden = jnp.tanh(p["embedding.weight"] @ p["transform.0.weight"].T + p["transform.0.bias"])
    return hidden @ p["transform.2.weight"].T + p["transform.2.bias"]


PREFIX_TUNING = register(
    beside(
        what="a prefix",
        config=PrefixTuningConfig,
        begin=begin,
        prefix=lambda p, config: in_layers(rows(p, config), config),
        folded=lambda p, config: {ROWS: rows(p, config)},
    )
)
