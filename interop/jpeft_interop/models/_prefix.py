"""Keys and values that come before the first token: what prefix tuning and cartridges give a model to attend to."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jpeft
from jpeft._key_value_prefix import prefixed_names
from jpeft._mixed import BASE
from jpeft._stacks import stacked_numbers
from jpeft._virtual_tokens import names_of_rows

from ._cache import Cache, Memory


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KeyValuePrefix:
    """What a model takes as `past_key_values` in place of a cache, before the first token.

    `key`, `value (layers, rows or 1, n, kv_heads, head_dim)`; one row is that of every row of the batch. `mask (rows,
    n)`: bool, which of the n a row has, the last ones if not all; None: all. The tokens' positions begin after them.
    """

    key: jax.Array
    value: jax.Array
    mask: jax.Array | None = None

    @property
    def length(self) -> int:
        """The n of the longest row."""
        return self.key.shape[2]

    @property
    def starts(self) -> jax.Array | int:
        """The position of the first token, `(rows, 1)` if rows differ in it."""
        return self.length if self.mask is None else jnp.sum(self.mask, axis=1, keepdims=True, dtype=jnp.int32)

    def seen(self, tokens: jax.Array | None, length: int) -> jax.Array:
        """Which keys may be seen, bool `(rows or 1, n + length)`, `tokens (batch, length)` telling it of the tokens."""
        own = jnp.ones((1, self.length), bool) if self.mask is None else self.mask
        tokens = jnp.ones((1, length), bool) if tokens is None else tokens
        rows = max(own.shape[0], tokens.shape[0])
        return jnp.concatenate([jnp.broadcast_to(array, (rows, array.shape[1])) for array in (own, tokens)], axis=1)

    def memories(self, names: Iterable[str]) -> dict[str, Memory]:
        """What layers, or stacks of layers, of these names attend to; raises ValueError for another number of them."""
        numbers = {name: stacked_numbers(name) or [int(name)] for name in names}
        depth = max((max(own) + 1 for own in numbers.values()), default=0)
        if self.key.shape[0] != depth:
            raise ValueError(
                f"the prefix is for {self.key.shape[0]} layers, the model has {depth}; expected a prefix made for this "
                f"model: num_layers={depth}"
            )
        return {name: self._memory(name, own) for name, own in numbers.items()}

    def _memory(self, name: str, numbers: range | list[int]) -> Memory:
        if isinstance(numbers, range):
            own = slice(numbers.start, numbers.stop, numbers.step)
            return {"key": self.key[own], "value": self.value[own]}
        return {"key": self.key[int(name)], "value": self.value[int(name)]}


def spread_rows(prefix: KeyValuePrefix, rows: jax.Array) -> KeyValuePrefix:
    """The prefix whose row `i` is row `rows[i]` of the given one, or the one row of it."""
    if prefix.key.shape[1] == 1:
        return prefix
    mask = None if prefix.mask is None else prefix.mask[rows]
    return KeyValuePrefix(prefix.key[:, rows], prefix.value[:, rows], mask)


Past = Cache | KeyValuePrefix
"""What a decoder takes as `past_key_values`: what an earlier call kept, or what comes before the first."""


def after(memory: Memory, key: jax.Array, value: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Keys and values `(batch, length, kv_heads, head_dim)` with those of a layer's prefix before them.

    Raises ValueError for a prefix with other heads.
    """
    layout = key.shape[2:]
    for name, array in memory.items():
        if array.shape[2:] != layout:
            raise ValueError(
                f"the prefix has {name}s of {array.shape[2]} heads of {array.shape[3]}, the model's are of "
                f"{layout[0]} heads of {layout[1]}; expected a prefix made for this model: "
                f"num_attention_heads={layout[0]} and token_dim={layout[0] * layout[1]}"
            )
    return tuple(
        jnp.concatenate([jnp.broadcast_to(before, (new.shape[0], *before.shape[1:])).astype(new.dtype), new], axis=1)
        for before, new in ((memory["key"], key), (memory["value"], value))
    )  # type: ignore[return-value]


def prefix_of(
    params: jpeft.PeftParams, config: Any, rows: int, adapter_names: Sequence[str] | None = None
) -> KeyValuePrefix | None:
    """What the active adapters put before the tokens of a model of this config; None if none of them has a prefix.

    `adapter_names`: of each of the rows, where several do, "__base__" for none. Raises ValueError for names that are
    not those of active adapters with a prefix, or that are needed and not given.
    """
    active = prefixed_names(params)
    if not active:
        return None
    # PEFT has a prefix of the encoder's depth, of which a decoder with fewer layers takes the first ones.
    depth = getattr(config, "decoder_layers", getattr(config, "num_decoder_layers", None))
    if adapter_names is None:
        keys, values = jpeft.key_value_prefix(params)
        return KeyValuePrefix(keys[:depth, None], values[:depth, None])
    adapter_names = names_of_rows(adapter_names, rows, active, "the active adapters with a prefix")
    pairs = {name: jpeft.key_value_prefix(params, name) for name in active}
    return _by_rows({name: (keys[:depth], values[:depth]) for name, (keys, values) in pairs.items()}, adapter_names)


def _by_rows(pairs: Mapping[str, tuple[jax.Array, jax.Array]], names: Sequence[str]) -> KeyValuePrefix:
    """For each row the keys and values `(layers, n, kv_heads, head_dim)` of its name, the shorter ones at the end."""
    layouts = {name: (keys.shape[0], *keys.shape[2:]) for name, (keys, _) in pairs.items()}
    if len(set(layouts.values())) > 1:
        raise ValueError(f"the prefixes differ in (layers, kv_heads, head_dim): {layouts}; expected those of one model")
    longest = max(keys.shape[1] for keys, _ in pairs.values())

    def row(name: str, part: int) -> jax.Array:
        if name == BASE:
            return jnp.zeros_like(row(next(iter(pairs)), part))
        array = pairs[name][part]
        return jnp.pad(array, ((0, 0), (longest - array.shape[1], 0), (0, 0), (0, 0)))

    lengths = np.asarray([0 if name == BASE else pairs[name][0].shape[1] for name in names])
    mask = np.arange(longest)[None] >= longest - lengths[:, None]
    keys, values = (jnp.stack([row(name, part) for name in names], axis=1) for part in (0, 1))
    return KeyValuePrefix(keys, values, jnp.asarray(mask))


def check_rows(prefix: KeyValuePrefix, batch: int) -> None:
    """Raise ValueError for a prefix of another number of rows than the batch."""
    rows = {prefix.key.shape[1], prefix.value.shape[1], *(() if prefix.mask is None else (prefix.mask.shape[0],))}
    if rows - {1, batch}:
        raise ValueError(f"the prefix has {max(rows)} rows, the input {batch}; expected as many, or one for all")


def too_long(length: int, virtual: int, most: str) -> str:
    """What an error says of a text of so many tokens after so many virtual ones.

    >>> too_long(5, 4, "max_position_embeddings=8")
    '9 tokens, 4 of them virtual, exceed max_position_embeddings=8: truncate the input, or learn a shorter prefix'
    """
    if not virtual:
        return f"{length} tokens exceed {most}: truncate the input"
    return (
        f"{virtual + length} tokens, {virtual} of them virtual, exceed {most}: truncate the input, or learn a shorter "
        "prefix"
    )
