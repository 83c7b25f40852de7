"""Cartridges (Eyuboglu et al., 2025, https://arxiv.org/abs/2506.06266).

    attention(q, [K; k], [V; v])   in every layer, K and V (n, kv_heads, head_dim) a cache that is trained

`prompt_embeddings (n, layers 2 token_dim)` in files, as of prefix tuning. In training the first num_frozen_tokens rows
are an array of their own, `frozen_embedding`, as attention looks to the first tokens of a text whatever they are; the
others are `trainable_embedding`. A cartridge may begin as the cache of a text
(`jpeft.initialize_kv_prefix_from_past_key_values`), and cartridges may follow one another
(`jpeft.compose_cartridges`). Costs what a cache of n tokens costs.
"""

import dataclasses

import jax
import jax.numpy as jnp

from .._begin import Beginning, Tree
from .._config import PeftType, PromptLearningConfig
from .._contract import Arrays, beside, fold_in_name, register
from ._prefixes import checked_sizes, in_layers, rows_shape

ROWS, FROZEN, TRAINED = "prompt_embeddings", "frozen_embedding", "trainable_embedding"


@dataclasses.dataclass(frozen=True, kw_only=True)
class CartridgeConfig(PromptLearningConfig):
    """PEFT's fields and defaults.

    num_frozen_tokens: how many virtual tokens, the first ones, do not train. token_dim: key and value heads times their
    size; num_attention_heads: the number of key and value heads.

    >>> import jax.numpy as jnp, jpeft
    >>> config = CartridgeConfig(num_virtual_tokens=3, token_dim=8, num_attention_heads=2, num_layers=5)
    >>> wrapped = jpeft.wrap({"query": {"kernel": jnp.ones((8, 8))}}, config)
    >>> {name: array.shape for name, array in wrapped.adapters["default"].shared.items()}
    {'frozen_embedding': (1, 80), 'trainable_embedding': (2, 80)}
    """

    peft_type: PeftType | None = PeftType.CARTRIDGE
    num_frozen_tokens: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        frozen, count = self.num_frozen_tokens, self.num_virtual_tokens
        if not isinstance(frozen, int) or frozen < 0 or (count is not None and frozen > count):
            most = "num_virtual_tokens" if count is None else f"num_virtual_tokens={count}"
            raise ValueError(f"num_frozen_tokens is {frozen!r}; expected a whole number from 0 to {most}")


def begin(key: jax.Array, tree: Tree, config: CartridgeConfig) -> Beginning:
    config = checked_sizes(config)
    whole = {ROWS: jax.random.normal(fold_in_name(key, ROWS), rows_shape(config))}
    return Beginning(config, shared=whole if config.inference_mode else unfolded(whole, config))


def rows(p: Arrays, config: CartridgeConfig) -> jax.Array:
    """(n, layers * 2 * token_dim), frozen and trained."""
    return p[ROWS] if ROWS in p else jnp.concatenate([p[name] for name in (FROZEN, TRAINED) if name in p])


def unfolded(p: Arrays, config: CartridgeConfig) -> dict[str, jax.Array]:
    count = config.num_frozen_tokens
    return {**({FROZEN: p[ROWS][:count]} if count else {}), TRAINED: p[ROWS][count:]}


CARTRIDGE = register(
    beside(
        what="a cartridge",
        config=CartridgeConfig,
        begin=begin,
        prefix=lambda p, config: in_layers(rows(p, config), config),
        folded=lambda p, config: {ROWS: rows(p, config)},
        unfolded=unfolded,
        frozen=frozenset({FROZEN}),
    )
)
