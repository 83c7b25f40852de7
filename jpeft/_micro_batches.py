"""Gradient accumulation: the gradient of a batch from its parts, one after the other."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ._contract import wide_dtype
from ._params import PeftParams, Rng
from ._paths import leaf_path


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Gradient:
    """Of one batch: its loss, the metrics beside it, the gradient of the loss."""

    loss: jax.Array
    metrics: dict[str, jax.Array]
    grads: PeftParams


def averaged(
    gradient: Callable[[Rng | None, Any], Gradient],
    trainable: PeftParams,
    key: jax.Array | None,
    batch: Any,
    count: int,
    weight: Callable[[Any], jax.Array] | None,
) -> Gradient:
    """`gradient(rng, batch)` of a whole batch by `trainable`, from its `count` parts, each with a key of its own.

    weight(part) -> how much a part's means count for; one that weighs nothing may be NaN.
    """

    def of_part(number: Any, part: Any) -> Gradient:
        return gradient(None if key is None else Rng.of(jax.random.fold_in(key, number)), part)

    if count == 1:
        return of_part(0, batch)
    arrays, join = split(batch, count)

    def add(total: PeftParams, entry: tuple[jax.Array, list[jax.Array]]) -> tuple[PeftParams, Any]:
        number, own = entry
        part = join(own)
        found = of_part(number, part)
        share = jnp.ones(()) if weight is None else _share(weight(part))
        weighed = jax.tree.map(lambda leaf: _times(leaf, share), found.grads)
        return jax.tree.map(jnp.add, total, weighed), (found.loss, found.metrics, share)

    zeros = jax.tree.map(lambda leaf: jnp.zeros_like(leaf, dtype=wide_dtype(leaf.dtype)), trainable)
    numbers = jnp.arange(count, dtype=jnp.int32)
    total, (losses, metrics, shares) = lax.scan(add, zeros, (numbers, arrays))
    whole = shares.sum()

    def mean(values: jax.Array) -> jax.Array:
        if not jnp.issubdtype(values.dtype, jnp.inexact):
            return values.sum(0)
        return _divided(jax.vmap(_times)(values, shares).sum(0), whole)

    return Gradient(mean(losses), jax.tree.map(mean, metrics), jax.tree.map(lambda leaf: _divided(leaf, whole), total))


def split(batch: Any, count: int) -> tuple[list[jax.Array], Callable[[list[jax.Array]], Any]]:
    """The arrays of a batch as (count, rows, ...), and what makes a batch of one part's arrays.

    Row i is in part i mod count: a batch whose rows are spread over devices stays where it is. Raises ValueError if
    there is no array to split, or `count` does not divide the rows.

    >>> import numpy as np
    >>> split({"x": np.arange(6)}, 2)[0][0].tolist()
    [[0, 2, 4], [1, 3, 5]]
    """
    named, structure = jax.tree_util.tree_flatten_with_path(batch)
    rows = {leaf_path(path): jnp.shape(leaf)[0] for path, leaf in named if jnp.ndim(leaf)}
    if not rows:
        raise ValueError(f"the batch has no array with rows to make {count} micro-batches of; expected accumulate=1")
    if len(set(rows.values())) > 1:
        raise ValueError(f"the arrays of the batch have different numbers of rows: {rows}; expected one first axis")
    total = next(iter(rows.values()))
    if total % count:
        raise ValueError(f"a batch of {total} rows does not split into accumulate={count} equal micro-batches")
    leaves = [leaf for _, leaf in named]
    places = [index for index, leaf in enumerate(leaves) if jnp.ndim(leaf)]

    def join(arrays: list[jax.Array]) -> Any:
        entries = list(leaves)
        for index, array in zip(places, arrays, strict=True):
            entries[index] = array
        return jax.tree.unflatten(structure, entries)

    return [_in_parts(leaves[index], count) for index in places], join


def _in_parts(array: jax.Array, count: int) -> jax.Array:
    return jnp.reshape(array, (array.shape[0] // count, count, *array.shape[1:])).swapaxes(0, 1)


def _share(weight: Any) -> jax.Array:
    share = jnp.asarray(weight)
    if share.shape != () or not jnp.issubdtype(share.dtype, jnp.number):
        raise ValueError(f"weight returned {share.dtype} {share.shape}; expected a scalar: how many are averaged over")
    return share.astype(jnp.float32)


def _times(value: jax.Array, share: jax.Array) -> jax.Array:
    wide = value.astype(wide_dtype(value.dtype))
    return jnp.where(share == 0, jnp.zeros_like(wide), wide * share.astype(wide.dtype))


def _divided(value: jax.Array, whole: jax.Array) -> jax.Array:
    return value / whole.astype(value.dtype)
