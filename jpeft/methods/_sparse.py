"""Products with a matrix of few entries, and the places of entries that a seed tells."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._contract import Base, wide_dtype, wider
from .._torch_random import randperm
from ._dense import changed_product


def product(
    x: jax.Array,
    values: jax.Array,
    inputs: Any,
    outputs: Any,
    features: int,
) -> jax.Array:
    """x (..., in) times the matrix (in, features) that has `values` at (inputs, outputs), in float32 or wider.

    Entries with an output of `features` or more do nothing.
    """
    values = values.astype(wide_dtype(wider(x.dtype, values.dtype)))
    rows = math.prod(x.shape[:-1])
    if is_dense(x, values, features):
        return jnp.matmul(x, scattered(values, inputs, outputs, (x.shape[-1], features))).astype(values.dtype)
    columns = x.reshape(rows, x.shape[-1]).T.astype(values.dtype)
    y = jnp.zeros((features, rows), values.dtype).at[outputs].add(columns[inputs] * values[:, None])
    return y.T.reshape(*x.shape[:-1], features)


def is_dense(x: jax.Array, values: jax.Array, features: int) -> bool:
    """Whether a dense matrix, made for each use, takes less time than to gather and scatter: measured on CPUs."""
    return 2 * math.prod(x.shape[:-1]) * values.size > x.shape[-1] * features


def sparsely_changed(x: jax.Array, base: Base, values: jax.Array, inputs: Any, outputs: Any) -> jax.Array:
    """x times the base weight (in, out) with `values` added at (inputs, outputs)."""
    n_in, n_out = base.weight().shape
    if is_dense(x, values, n_out):
        values = values.astype(wide_dtype(wider(x.dtype, values.dtype)))
        return changed_product(x, base, scattered(values, inputs, outputs, (n_in, n_out)))
    y = base(x)
    return y + product(x, values, inputs, outputs, n_out).astype(y.dtype)


def scattered(values: jax.Array, inputs: Any, outputs: Any, shape: tuple[int, int]) -> jax.Array:
    """The matrix (in, out) that has `values` at (inputs, outputs)."""
    return jnp.zeros(shape, values.dtype).at[inputs, outputs].add(values)


@functools.lru_cache(maxsize=64)
def drawn_places(in_features: int, out_features: int, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(inputs, outputs) of `count` distinct entries: those that PEFT draws for a weight of PyTorch's shape (out, in).

    >>> drawn_places(2, 5, 3, 0)
    (array([0, 1, 1], dtype=int32), array([2, 0, 3], dtype=int32))
    """
    flat = randperm(in_features * out_features, seed, count)
    return (flat % in_features).astype(np.int32), (flat // in_features).astype(np.int32)


def check_frequencies(config: Any, method: str) -> None:
    """Raise ValueError for numbers of frequencies below 1, a seed that is none, or a value of bias out of range."""
    own = {f"n_frequency_pattern[{key!r}]": count for key, count in config.n_frequency_pattern.items()}
    for where, count in {"n_frequency": config.n_frequency, **own}.items():
        if not isinstance(count, int) or count <= 0:
            raise ValueError(f"{where} is {count!r}; expected an integer of at least 1")
    check_seed("random_loc_seed", config.random_loc_seed)
    if config.bias not in ("none", "all", f"{method}_only"):
        raise ValueError(f"bias is {config.bias!r}; expected 'none', 'all' or '{method}_only'")


def check_seed(name: str, seed: Any) -> None:
    if not isinstance(seed, int) or not -(2**63) <= seed < 2**64:
        raise ValueError(f"{name} is {seed!r}; expected an integer of 64 bits, the seed of the places")


def check_count(name: str, count: int, path: str, in_features: int, out_features: int) -> None:
    """Raise ValueError for more entries than the weight has."""
    if count > in_features * out_features:
        raise ValueError(
            f"{name} at {path!r} is {count}; expected at most {in_features * out_features}, the entries of a weight "
            f"of {in_features} inputs and {out_features} outputs"
        )
