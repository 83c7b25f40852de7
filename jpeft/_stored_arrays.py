"""Leaves of a tree as what a checkpoint stores, and back, in the places that a template says.

A tree becomes a flat dictionary of arrays by their key paths: what holds them (a NamedTuple, a masked node, an absent
optimizer state) is the template's to say, not the file's. PRNG keys are stored as their numbers, arrays without
elements not at all. What each process has for itself, such as a counter, is stored once.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def flat(tree: Any) -> dict[str, Any]:
    """{key path: leaf}.

    >>> flat({"step": 3, "moments": (None, [2.0])})
    {"['moments'][1][0]": 2.0, "['step']": 3}
    """
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def unflat(template: Any, leaves: Mapping[str, Any]) -> Any:
    """The template with the leaves of a flat dictionary."""
    return jax.tree_util.tree_map_with_path(lambda path, _: leaves[jax.tree_util.keystr(path)], template)


def is_key(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def stored(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The arrays to write for these leaves."""
    numbers = {name: jax.random.key_data(leaf) if is_key(leaf) else leaf for name, leaf in leaves.items()}
    return {name: _global(leaf) for name, leaf in numbers.items() if np.size(leaf)}


def key_implementations(leaves: Mapping[str, Any]) -> dict[str, str]:
    """{name: implementation} of the leaves that are PRNG keys, by which their numbers become keys again."""
    return {name: str(jax.random.key_impl(leaf)) for name, leaf in leaves.items() if is_key(leaf)}


def wanted(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """For each array of a template that is to be read: its shape, dtype and sharding, or memory for it."""
    return {name: _wanted(leaf) for name, leaf in leaves.items() if _size(leaf)}


def restored(template: Any, found: Mapping[str, Any], implementations: Mapping[str, str]) -> Any:
    """The template with the arrays that were read; what they are made of may be abstract in the template."""
    leaves = flat(template)
    return unflat(
        template,
        {name: _restored(leaf, found.get(name), implementations.get(name)) for name, leaf in leaves.items()},
    )


def _size(leaf: Any) -> int:
    return int(np.prod(np.shape(leaf)))


def _global(leaf: Any) -> Any:
    """A leaf that every process knows how to write: an array of all devices, or one of numpy's, written by one."""
    if isinstance(leaf, jax.Array) and not _is_local(leaf.sharding):
        return leaf
    return np.array(leaf)


def _is_local(sharding: Any) -> bool:
    return jax.process_count() > 1 and sharding.is_fully_addressable


def _sharding(leaf: Any) -> Any:
    """Where an array is to be read to; None: to the host first."""
    sharding = getattr(leaf, "sharding", None)
    return None if not isinstance(sharding, jax.sharding.Sharding) or _is_local(sharding) else sharding


def _wanted(leaf: Any) -> Any:
    sharding = _sharding(leaf)
    if is_key(leaf):
        leaf = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
    if sharding is not None:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    return np.empty(np.shape(leaf), getattr(leaf, "dtype", None) or np.asarray(leaf).dtype)


def _restored(leaf: Any, array: Any, implementation: str | None) -> Any:
    if array is None:  # It has no elements.
        return jnp.zeros(leaf.shape, leaf.dtype, device=_sharding(leaf)) if _is_abstract(leaf) else leaf
    if is_key(leaf):
        return jax.random.wrap_key_data(_placed(array, leaf), impl=implementation)
    if isinstance(leaf, (bool, int, float, complex)):
        return type(leaf)(np.asarray(array).item())
    return array if isinstance(leaf, (np.ndarray, np.generic)) else _placed(array, leaf)


def _placed(array: Any, leaf: Any) -> Any:
    if isinstance(array, jax.Array):
        return array
    sharding = getattr(leaf, "sharding", None)
    return jnp.asarray(array) if sharding is None or _is_abstract(leaf) else jax.device_put(array, sharding)


def _is_abstract(leaf: Any) -> bool:
    return isinstance(leaf, jax.ShapeDtypeStruct)
