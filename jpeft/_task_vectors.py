"""Task vectors: what several fine-tunings changed, pruned, voted on and summed up into one change.

    task arithmetic   sum_t w_t d_t                                            https://arxiv.org/abs/2212.04089
    TIES              keep the largest, elect a sign, mean of those that agree  https://arxiv.org/abs/2306.01708
    DARE              drop at random, scale up what is left                     https://arxiv.org/abs/2311.03099

Every function takes arrays or whole trees of them; each leaf is treated by itself. They are pure, differentiable in
arrays and weights, and work under `jit` and `vmap`; densities and methods are static.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

SIGN_METHODS = ("total", "frequency")
PRUNE_METHODS = ("magnitude", "random")


def prune(
    tensor: Any, density: float, method: str = "magnitude", rescale: bool = False, *, rng: jax.Array | None = None
) -> Any:
    """A tree with only a part of each leaf's entries kept and zeros in the place of the others.

    density: the part that is kept, in [0, 1]. method: "magnitude" keeps the `int(density * size)` largest entries of a
    leaf, "random" each entry with probability `density`. rescale: divide what random pruning keeps by `density`, so
    that the expected value stays. rng: key of the random choice, which "random" needs.
    Raises ValueError for a density out of range, an unknown method, or no key where one is needed.

    >>> prune(jnp.array([3.0, -1.0, 2.0, -4.0]), 0.5).tolist()
    [3.0, 0.0, 0.0, -4.0]
    """
    if not 0 <= density <= 1:
        raise ValueError(f"density is {density!r}; expected the part of the entries to keep, a number in [0, 1]")
    if method not in PRUNE_METHODS:
        raise ValueError(f"method is {method!r}; expected one of {', '.join(map(repr, PRUNE_METHODS))}")
    if method == "random" and rng is None:
        raise ValueError("method is 'random' and rng is None; expected a key from jax.random.key(seed)")
    if density == 1:
        return tensor
    leaves, structure = jax.tree.flatten(tensor)
    if method == "magnitude":
        kept = [_largest(leaf, density) for leaf in leaves]
    else:
        assert rng is not None
        keys = [jax.random.fold_in(rng, index) for index in range(len(leaves))]
        kept = [jax.random.bernoulli(key, density, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)]
    scale = density if method == "random" and rescale and density > 0 else 1.0
    pruned = [jnp.where(mask, leaf / scale, jnp.zeros_like(leaf)) for mask, leaf in zip(kept, leaves, strict=True)]
    return jax.tree.unflatten(structure, pruned)


def _largest(leaf: jax.Array, density: float) -> jax.Array:
    _, order = jax.lax.top_k(jnp.abs(leaf).ravel(), int(density * leaf.size))
    return jnp.zeros(leaf.size, bool).at[order].set(True).reshape(leaf.shape)


def calculate_majority_sign_mask(tensor: Any, method: str = "total") -> Any:
    """Where each task agrees with the sign that most of them have: a tree of bools.

    tensor: leaves of shape (tasks, ...). method: "total" takes the sign of the sum, "frequency" that of the number of
    signs; a tie counts as positive, and zeros agree with nobody. Raises ValueError for another method.

    >>> calculate_majority_sign_mask(jnp.array([[2.0, -1.0], [-1.0, -1.0], [-0.5, 0.0]])).tolist()
    [[True, True], [False, True], [False, False]]
    """
    if method not in SIGN_METHODS:
        raise ValueError(f"majority_sign_method is {method!r}; expected one of {', '.join(map(repr, SIGN_METHODS))}")

    def mask(leaf: jax.Array) -> jax.Array:
        sign = jnp.sign(leaf)
        total = (leaf if method == "total" else sign).sum(0)
        return sign == jnp.where(total >= 0, jnp.ones_like(total), -jnp.ones_like(total))

    return jax.tree.map(mask, tensor)


def disjoint_merge(task_tensors: Any, majority_sign_mask: Any) -> Any:
    """The mean over those tasks that the mask keeps, entry by entry; zero where it keeps none.

    task_tensors: leaves of shape (tasks, ...). majority_sign_mask: bools of the same structure and shapes.

    >>> disjoint_merge(jnp.array([[2.0, 4.0], [1.0, 8.0]]), jnp.array([[True, True], [False, True]])).tolist()
    [2.0, 6.0]
    """

    def mean(leaf: jax.Array, mask: jax.Array) -> jax.Array:
        count = mask.sum(0).astype(leaf.dtype)
        return jnp.where(mask, leaf, jnp.zeros_like(leaf)).sum(0) / jnp.maximum(count, jnp.ones_like(count))

    return jax.tree.map(mean, task_tensors, majority_sign_mask)


def task_arithmetic(task_tensors: Sequence[Any], weights: Any) -> Any:
    """The weighted sum of trees.

    task_tensors: at least one tree, all of the same structure and shapes. weights: one number for each of them.
    Raises ValueError if the numbers of trees and weights differ.

    >>> task_arithmetic([jnp.array([1.0, 2.0]), jnp.array([3.0, 4.0])], [1.0, -0.5]).tolist()
    [-0.5, 0.0]
    """
    return jax.tree.map(lambda leaf: leaf.sum(0), _weighted(_stacked(task_tensors), weights))


def magnitude_prune(task_tensors: Sequence[Any], weights: Any, density: float) -> Any:
    """The weighted sum of trees of which only the largest entries are kept; see `prune` and `task_arithmetic`.

    >>> magnitude_prune([jnp.array([1.0, 2.0]), jnp.array([3.0, -4.0])], [1.0, 1.0], 0.5).tolist()
    [0.0, -2.0]
    """
    return task_arithmetic([prune(tree, density) for tree in task_tensors], weights)


def ties(task_tensors: Sequence[Any], weights: Any, density: float, majority_sign_method: str = "total") -> Any:
    """TIES: trees pruned by magnitude, signs elected, and the mean of the weighted entries that have them.

    The vote is taken before the weights are applied. Arguments and errors as in `prune`, `task_arithmetic` and
    `calculate_majority_sign_mask`. https://arxiv.org/abs/2306.01708

    >>> ties([jnp.array([1.0, 2.0]), jnp.array([3.0, -4.0])], [1.0, 1.0], 1.0).tolist()
    [2.0, -4.0]
    """
    return _elected([prune(tree, density) for tree in task_tensors], weights, majority_sign_method)


def dare_linear(task_tensors: Sequence[Any], weights: Any, density: float, *, rng: jax.Array) -> Any:
    """DARE: the weighted sum of trees whose entries are dropped at random and scaled up where they are kept.

    rng: key; each tree and each leaf draws for itself. Arguments and errors as in `prune` and `task_arithmetic`.
    https://arxiv.org/abs/2311.03099

    >>> dare_linear([jnp.array([1.0, 2.0])], [0.5], 1.0, rng=jax.random.key(0)).tolist()
    [0.5, 1.0]
    """
    return task_arithmetic(_dropped(task_tensors, density, rng), weights)


def dare_ties(
    task_tensors: Sequence[Any],
    weights: Any,
    density: float,
    majority_sign_method: str = "total",
    *,
    rng: jax.Array,
) -> Any:
    """TIES with the random pruning of DARE in the place of that by magnitude; see `ties` and `dare_linear`.

    >>> dare_ties([jnp.array([1.0, 2.0]), jnp.array([3.0, -4.0])], [1.0, 1.0], 1.0, rng=jax.random.key(0)).tolist()
    [2.0, -4.0]
    """
    return _elected(_dropped(task_tensors, density, rng), weights, majority_sign_method)


def _dropped(trees: Sequence[Any], density: float, rng: jax.Array) -> list[Any]:
    keys = [jax.random.fold_in(rng, index) for index in range(len(trees))]
    return [prune(tree, density, "random", rescale=True, rng=key) for tree, key in zip(trees, keys, strict=True)]


def _elected(trees: Sequence[Any], weights: Any, method: str) -> Any:
    stacked = _stacked(trees)
    return disjoint_merge(_weighted(stacked, weights), calculate_majority_sign_mask(stacked, method))


def _stacked(trees: Sequence[Any]) -> Any:
    if not trees:
        raise ValueError("task_tensors is empty; expected at least one array or tree of arrays")
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def _weighted(stacked: Any, weights: Any) -> Any:
    weights = jnp.asarray(weights)
    count = len(jax.tree.leaves(stacked)[0])
    if weights.shape != (count,):
        raise ValueError(f"weights have shape {weights.shape}; expected ({count},), a number for each task tensor")
    return jax.tree.map(
        lambda leaf: leaf * weights.astype(leaf.dtype).reshape(-1, *(1 for _ in leaf.shape[1:])), stacked
    )
