"""How the leaves of a base tree are split over a mesh, in whichever way the caller says it."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from ._partitions import AnyMesh
from ._paths import leaves_by_path
from ._quantized import is_quantized
from ._specs import check_spec, is_rules, spec_by_rule

LISTED = 8
"""How many paths a message names."""


def base_shardings(base: Any, given: Any, mesh: AnyMesh) -> dict[str, NamedSharding]:
    """{leaf path: its sharding on the mesh}, of the dense weight where a leaf is quantised.

    base: the tree of parameters. given: as `jpeft.shardings` takes it. Raises TypeError for what says nothing of a
    partition, ValueError for a tree of other paths and for partitions that do not fit.
    """
    leaves = leaves_by_path(base)
    if is_rules(given):
        named, source = {path: spec_by_rule(given, path, shape_of(leaf)) for path, leaf in leaves.items()}, "the rule"
    elif given is None:
        named, source = leaves, "the sharding"
    else:
        named, source = _of_tree(given, leaves), "base, the entry"
    return {path: _sharding(named[path], mesh, path, shape_of(leaf), source) for path, leaf in leaves.items()}


def _of_tree(given: Any, leaves: Mapping[str, Any]) -> dict[str, Any]:
    named = leaves_by_path(given, is_leaf=_says_a_partition)
    missing = [path for path in leaves if path not in named]
    unexpected = [path for path in named if path not in leaves]
    if missing or unexpected:
        raise ValueError(
            f"base does not have the paths of the wrapped base tree: missing {_listed(missing)}; unexpected "
            f"{_listed(unexpected)}. Give an entry for each of its {len(leaves)} leaves, with None for one that is "
            "whole, or rules such as [('kernel$', PartitionSpec(...))]"
        )
    return named


def _listed(paths: list[str]) -> str:
    more = f" and {len(paths) - LISTED} more" if len(paths) > LISTED else ""
    return (", ".join(paths[:LISTED]) or "none") + more


def _says_a_partition(node: Any) -> bool:
    known = node is None or isinstance(node, (PartitionSpec, Sharding)) or is_quantized(node)
    return known or hasattr(node, "get_partition_spec") or _annotation(node) is not None


def _annotation(node: Any) -> Any:
    """The names in the metadata of an NNX variable, if they say how it is split; newer Flax calls them out_sharding."""
    if not hasattr(node, "get_metadata"):
        return None
    metadata = node.get_metadata()
    return next((metadata[key] for key in ("out_sharding", "sharding", "sharding_names") if metadata.get(key)), None)


def _sharding(item: Any, mesh: AnyMesh, path: str, shape: tuple[int, ...], source: str) -> NamedSharding:
    said = _said(item)
    if isinstance(said, NamedSharding):
        check_spec(said.spec, mesh, path, shape, source)
        return said if said.mesh == mesh else NamedSharding(mesh, said.spec, memory_kind=said.memory_kind)
    if not isinstance(said, PartitionSpec):
        raise TypeError(
            f"{source} of {path} is {said!r}; expected a PartitionSpec, a NamedSharding, None, or an array (or "
            "jax.ShapeDtypeStruct) that has a NamedSharding"
        )
    check_spec(said, mesh, path, shape, source)
    return NamedSharding(mesh, said)


def _said(item: Any) -> Any:
    """The partition that an entry says, a NamedSharding or a PartitionSpec; else what it is instead."""
    if item is None or isinstance(item, SingleDeviceSharding):
        return PartitionSpec()
    if isinstance(item, (PartitionSpec, Sharding)):
        return item
    if hasattr(item, "get_partition_spec"):
        return item.get_partition_spec()
    if (names := _annotation(item)) is not None:
        return names.spec if isinstance(names, NamedSharding) else PartitionSpec(*names)
    if is_quantized(item):
        return _said(item.array.qvalue)
    if isinstance(item, (jax.Array, jax.ShapeDtypeStruct)):
        return _said(item.sharding)
    return PartitionSpec() if hasattr(item, "shape") or isinstance(item, (bool, int, float, complex)) else item


def shape_of(leaf: Any) -> tuple[int, ...]:
    return tuple(leaf.shape) if hasattr(leaf, "shape") else jnp.shape(leaf)
