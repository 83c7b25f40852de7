"""How activations are split over a mesh of the axes "data", "fsdp" and "tp".

Rows of the batch over "data" and "fsdp": a compiler that knows it brings the weights of one layer together at a time,
where it might otherwise leave them split and sum activations over the devices.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ._default_rules import DATA, FSDP, TENSOR
from ._outputs import LMOutput, Seq2SeqLMOutput


def spread(x: Any, mesh: Mesh | None, *, features: bool = False) -> Any:
    """The arrays `(batch, length, features)` of a tree, their rows split over "data" and "fsdp".

    `features`: whether these are split over "tp", as the scores of a vocabulary are; else each device has all of them.
    Arrays stay as they are without a mesh, where the rows cannot be split evenly, as when one text is generated, and
    inside `jax.shard_map` or another mesh, where it is not for a model to say.
    """
    if mesh is None or not _is_in_use(mesh):
        return x
    return jax.tree.map(lambda array: _constrained(array, mesh, features), x)


def spread_lookup(lookup: Callable[[jax.Array], jax.Array], ids: jax.Array, mesh: Mesh | None) -> jax.Array:
    """`lookup(ids)` for ids `(batch, length)`, spread.

    In a table whose features are split over "fsdp" each device looks up its features for the rows of all of them, and
    then they exchange what they found: neither the table nor the whole batch is ever in one place.
    """
    if mesh is None or not _is_in_use(mesh) or FSDP not in mesh.axis_names or not _divides(ids, mesh):
        return spread(lookup(ids), mesh)
    rows = DATA if DATA in mesh.axis_names else None
    x = lookup(jax.lax.with_sharding_constraint(ids, NamedSharding(mesh, PartitionSpec(rows))))
    features = None if x.shape[-1] % mesh.shape[FSDP] else FSDP
    return spread(jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(rows, None, features))), mesh)


def spread_scores(output: Any, mesh: Mesh | None) -> Any:
    """What a network gives, the scores of its vocabulary, if it has one, split over "tp"."""
    if mesh is None or not isinstance(output, (LMOutput, Seq2SeqLMOutput)):
        return output
    return dataclasses.replace(output, logits=spread(output.logits, mesh, features=True))


def _is_in_use(mesh: Mesh) -> bool:
    current = jax.sharding.get_abstract_mesh()
    return current.empty or (
        current.axis_names == mesh.axis_names and all(kind == AxisType.Auto for kind in current.axis_types)
    )


def _rows(mesh: Mesh) -> tuple[str, ...]:
    return tuple(name for name in (DATA, FSDP) if name in mesh.axis_names)


def _divides(x: jax.Array, mesh: Mesh) -> bool:
    return x.shape[0] % math.prod(mesh.shape[name] for name in _rows(mesh)) == 0


def _constrained(x: jax.Array, mesh: Mesh, features: bool) -> jax.Array:
    if x.ndim != 3 or not _divides(x, mesh):
        return x
    last = TENSOR if features and TENSOR in mesh.axis_names and x.shape[-1] % mesh.shape[TENSOR] == 0 else None
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(_rows(mesh) or None, None, last)))
