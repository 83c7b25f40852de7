"""What a parameter is before it has a value: its shape, its initial value, and where a checkpoint holds it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

Initialiser = Callable[[jax.Array, tuple[int, ...], Any, float], jax.Array]
"""`(key, shape, dtype, initializer_range of the config) -> array`."""


def normal(key: jax.Array, shape: tuple[int, ...], dtype: Any, std: float) -> jax.Array:
    """Normal values of standard deviation `std`, drawn in float32."""
    return (std * jax.random.normal(key, shape, jnp.float32)).astype(dtype)


def zeros(key: jax.Array, shape: tuple[int, ...], dtype: Any, std: float) -> jax.Array:
    """Zeros."""
    return jnp.zeros(shape, dtype)


def ones(key: jax.Array, shape: tuple[int, ...], dtype: Any, std: float) -> jax.Array:
    """Ones."""
    return jnp.ones(shape, dtype)


@dataclass(frozen=True)
class Piece:
    """One tensor of a checkpoint, and the block of a parameter that it fills: `leaf[index] = tensor.transpose(axes)`.

    `index` has an entry for each axis of the parameter: a `slice`, or an int for an axis that the tensor lacks.
    """

    name: str
    index: tuple[slice | int, ...]
    axes: tuple[int, ...]


Pieces = tuple[Piece, ...]
"""Pieces that together fill one parameter."""


def whole(name: str, axes: tuple[int, ...]) -> Pieces:
    """A parameter that is one tensor of the checkpoint: `leaf = tensor.transpose(axes)`."""
    return (Piece(name, (slice(None),) * len(axes), axes),)


def parameter(shape: tuple[int, ...], initial: Initialiser, *stored: Pieces) -> nnx.Param:
    """A parameter without a value, which knows its initial value and its place in a checkpoint.

    `stored`: the ways in which checkpoints hold it, names relative to the module; the first one is written.
    """
    return nnx.Param(jax.ShapeDtypeStruct(shape, jnp.float32), initial=initial, stored=stored)
