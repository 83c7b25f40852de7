"""Names of leaves and modules: what a key path of any parameter tree is called here."""

import hashlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from ._quantized import is_quantized

WEIGHT_NAMES = ("kernel", "weight", "w", "embedding", "embeddings")
BIAS_NAMES = ("bias", "b")
# After one of these a `value` is the content of a variable, as checkpoints of NNX states spell it out.
LEAF_NAMES = (*WEIGHT_NAMES, *BIAS_NAMES, "scale")


def leaf_path(key_path: tuple[Any, ...]) -> str:
    """The dotted name of a leaf: linen's `params` root, NNX's `.value` and haiku's `~` are left out.

    >>> import jax
    >>> tree = {"params": {"dense": {"kernel": 0.0}}}
    >>> [leaf_path(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    ['dense.kernel']
    """
    names = [name for key in key_path for name in _key_name(key).split("/") if name not in ("~", "")]
    if len(names) > 1 and names[-1] == "value" and (hasattr(key_path[-1], "name") or names[-2] in LEAF_NAMES):
        names = names[:-1]
    if len(names) > 1 and names[0] == "params":
        names = names[1:]
    return ".".join(names)


def _key_name(key: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key).strip(".[]'\"")


def leaves_by_path(tree: Any, is_leaf: Any = is_quantized) -> dict[str, Any]:
    """Every leaf of a tree under its dotted name, in the tree's own order; a quantised weight is one leaf.

    Raises ValueError where two leaves would have the same name.
    """
    leaves: dict[str, Any] = {}
    for key_path, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf):
        path = leaf_path(key_path)
        if path in leaves:
            raise ValueError(
                f"two leaves of the parameter tree have the path {path!r}: rename one of them, "
                "or wrap the collections of variables one at a time"
            )
        leaves[path] = leaf
    return leaves


def map_leaves(function: Callable[[str, Any], Any], tree: Any) -> Any:
    """The tree with `function(dotted name, leaf)` in place of each leaf; a quantised weight is one leaf.

    >>> map_leaves(lambda path, leaf: path, {"dense": {"kernel": 0.0}})
    {'dense': {'kernel': 'dense.kernel'}}
    """
    return jax.tree_util.tree_map_with_path(
        lambda key_path, leaf: function(leaf_path(key_path), leaf), tree, is_leaf=is_quantized
    )


def parent(path: str) -> str:
    return path.rpartition(".")[0]


def last_name(path: str) -> str:
    return path.rpartition(".")[2]


def fold_in_name(key: jax.Array, name: str) -> jax.Array:
    """A key that depends on a name alone, never on the order in which names are visited."""
    digest = hashlib.sha256(name.encode()).digest()
    return _fold_in(key, np.uint32(int.from_bytes(digest[:4], "little")))


# One call instead of several operations: every module's initial values begin with it.
_fold_in = jax.jit(jax.random.fold_in)
