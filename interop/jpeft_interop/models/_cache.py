"""The key-value cache of a decoder: arrays of a fixed length, so that one compiled step serves every token."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jpeft._stacks import stacked_numbers

Memory = dict[str, jax.Array]
"""What one layer keeps: `key` and `value (batch, capacity, kv_heads, head_dim)`, and more in an encoder-decoder."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cache:
    """Keys and values of the tokens so far, in slots `0 .. length - 1` of `capacity`.

    `layers`: a `Memory` for every layer, or stack of layers, by its name. `mask (batch, capacity)`: whether a slot
    holds a token that later ones may see (padding may not be seen). `length`: int32 scalar. `absent (batch, 1)`: how
    many slots there are before the prefixes of the rows, where these are not equally long; None: none. `before`: the
    cache of another run of the model, which comes before this one for each token (X-LoRA).
    """

    layers: Mapping[str, Memory]
    mask: jax.Array
    length: jax.Array
    absent: jax.Array | None = None
    before: "Cache | None" = None

    @property
    def capacity(self) -> int:
        """How many tokens there is room for. A token written beyond it would overwrite the last ones."""
        return self.mask.shape[1]


def take_rows(cache: Cache, rows: jax.Array) -> Cache:
    """The cache whose row `i` is row `rows[i]` of the given one: what a beam search does to it."""
    layers = {
        name: {key: jnp.take(array, rows, axis=batch_axis(name)) for key, array in memory.items()}
        for name, memory in cache.layers.items()
    }
    absent = None if cache.absent is None else jnp.take(cache.absent, rows, axis=0)
    before = None if cache.before is None else take_rows(cache.before, rows)
    return Cache(layers, jnp.take(cache.mask, rows, axis=0), cache.length, absent, before)


def batch_axis(name: str) -> int:
    """The axis of the batch in the arrays of a layer, or stack of layers, of that name."""
    return 0 if stacked_numbers(name) is None else 1


def padded_to(array: jax.Array, capacity: int) -> jax.Array:
    """`(batch, length, ...) -> (batch, capacity, ...)`, zeros at the end."""
    widths: Any = [(0, 0), (0, capacity - array.shape[1]), *[(0, 0)] * (array.ndim - 2)]
    return jnp.pad(array, widths)
