"""Entries of PartitionSpecs: what each splits an axis into, and whether a size allows it."""

from math import prod
from typing import Any

from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

AnyMesh = Mesh | AbstractMesh


def axis_names(entry: Any) -> tuple[Any, ...]:
    """The mesh axes over which one entry of a spec splits an axis."""
    return entry if isinstance(entry, tuple) else () if entry is None else (entry,)


def parts_of(entry: Any, mesh: AnyMesh) -> int:
    """Into how many parts one entry of a spec splits an axis."""
    return prod(mesh.shape[name] for name in axis_names(entry))


def placed_along(sharding: Any, array: Any) -> Any:
    """The sharding of an array that goes along with another, which has as many axes: where its sizes do not divide into
    that one's parts, an axis is whole. What is no NamedSharding counts for both.

    >>> import jax
    >>> mesh = AbstractMesh((2,), ("x",))
    >>> placed_along(NamedSharding(mesh, PartitionSpec("x", None)), jax.ShapeDtypeStruct((1, 6), float)).spec
    P(None, None)
    """
    if not isinstance(sharding, NamedSharding):
        return sharding
    entries = (*sharding.spec, *(None,) * (array.ndim - len(sharding.spec)))
    pairs = zip(array.shape, entries, strict=True)
    own = (entry if size % parts_of(entry, sharding.mesh) == 0 else None for size, entry in pairs)
    return NamedSharding(sharding.mesh, PartitionSpec(*own), memory_kind=sharding.memory_kind)
