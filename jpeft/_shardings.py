"""Where everything of wrapped parameters goes on a mesh: the base as its owner says, adapters along with it."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from ._array_axes import OTHER, axes_of_shared, axes_of_weights, users_of_shared
from ._base_specs import base_shardings, shape_of
from ._contract import EMBEDDING, INPUT, OUTPUT, STACK, VOCABULARY, Site
from ._params import Adapter, PeftParams
from ._partitions import AnyMesh, axis_names, placed_along
from ._paths import leaf_path, leaves_by_path
from ._quantized import is_quantized
from ._tokens import TokenRows
from ._wrap import checked_params

TINY = 4096
"""Entries for one module below which an array is not worth a split."""

Entries = list[Any]
"""Of a PartitionSpec: for each axis the mesh axes that split it, or None."""


@dataclasses.dataclass(frozen=True)
class Partition:
    """How a weight is split: over its stack axes, over all of its inputs as one axis, and over its outputs.

    Each is an entry of a PartitionSpec.
    """

    stack: tuple[Any, ...]
    inputs: Any
    outputs: Any

    def of(self, letter: str) -> Any:
        return {INPUT: self.inputs, OUTPUT: self.outputs}.get(letter)


def shardings(wrapped: PeftParams, mesh: AnyMesh, base: Any = None, *, tiny: int = TINY) -> PeftParams:
    """The same tree with a `NamedSharding` at each leaf, for `jax.device_put` and for `in_shardings` of `jax.jit`.

    The base is split as its owner says, and adapters follow it. `lora_A` is split as the inputs of its module's weight
    are, `lora_B` as the outputs, and so is every array of every method: an axis that is all of the inputs or all of
    the outputs has their partition, a stack axis (layers, experts) that of the weight's, all other axes are whole.
    Several input axes in one array's axis (heads, head_dim) have the partition of the first, if the others are whole.
    Arrays that several modules share follow them where these agree, full copies their leaf, rows that train their
    table. Scalings, what `with_context` brings and arrays of less than `tiny` entries a module are on every device.

    wrapped: parameters of any kind, `jax.ShapeDtypeStruct`s and `Quantized` leaves too; a scale's axis is split as its
    codes' where its size allows. mesh: of `Auto` or `Explicit` axes; it need not be the one that the base is on.
    base: None reads the base's own shardings; or a tree of its paths with a NamedSharding, PartitionSpec, None (whole),
    array, or leaf annotated by Flax (linen's `Partitioned`, an NNX variable) at each; or `(regular expression, spec)`
    pairs of which the first found in a path counts; or `(path, shape) -> spec`. Logical axis names have to be made
    mesh axes first (`flax.linen.logical_to_mesh_sharding`).
    Raises TypeError if `wrapped` does not come from `wrap`, or for a mesh or an entry that is none, and ValueError for
    a tree of other paths, unknown mesh axes, more entries than axes, and sizes that the mesh does not divide.

    >>> import jax, jax.numpy as jnp, jpeft
    >>> from jax.sharding import PartitionSpec as P
    >>> params = {"query": {"kernel": jax.ShapeDtypeStruct((1024, 2048), jnp.bfloat16)}}
    >>> wrapped = jpeft.wrap(params, jpeft.LoraConfig(r=8, target_modules=["query"]))
    >>> mesh = jax.sharding.AbstractMesh((4, 2), ("fsdp", "tp"))
    >>> placed = shardings(wrapped, mesh, [("kernel$", P("fsdp", "tp"))])
    >>> own = placed.adapters["default"].weights["query"]
    >>> own["lora_A"].spec == P(None, "fsdp"), own["lora_B"].spec == P("tp")
    (True, True)
    """
    checked_params(wrapped)
    if not isinstance(mesh, (Mesh, AbstractMesh)):
        raise TypeError(f"mesh is {mesh!r}; expected a jax.sharding.Mesh, such as jax.make_mesh((8,), ('fsdp',))")
    of_base = base_shardings(wrapped.base, base, mesh)
    entries = {
        path: _padded(of_base[path].spec, len(shape_of(leaf))) for path, leaf in leaves_by_path(wrapped.base).items()
    }

    def of_leaf(key_path: tuple[Any, ...], leaf: Any) -> Any:
        own = of_base[leaf_path(key_path)]
        return jax.tree.map(lambda part: _of_part(part, own, leaf.ndim), leaf) if is_quantized(leaf) else own

    return dataclasses.replace(
        wrapped,
        base=jax.tree_util.tree_map_with_path(of_leaf, wrapped.base, is_leaf=is_quantized),
        adapters={name: _of_adapter(adapter, entries, mesh, tiny) for name, adapter in wrapped.adapters.items()},
        context=_whole(wrapped.context, mesh),
    )


def _whole(tree: Any, mesh: AnyMesh) -> Any:
    return jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), tree)


def _of_part(part: Any, dense: NamedSharding, ndim: int) -> NamedSharding:
    """The sharding of one array of a quantised leaf, whose sizes divide those of the dense weight."""
    if part.ndim != ndim:
        return NamedSharding(dense.mesh, PartitionSpec(), memory_kind=dense.memory_kind)
    own = placed_along(dense, part)
    return NamedSharding(own.mesh, _spec([*own.spec]), memory_kind=own.memory_kind)


def _of_adapter(adapter: Adapter, entries: Mapping[str, Entries], mesh: AnyMesh, tiny: int) -> Adapter:
    """entries: of the base leaves' specs, one an axis, by path."""
    partitions = {path: _partition(site, entries[site.leaf]) for path, site in adapter.sites.items()}
    letters, letters_of_shared = axes_of_weights(adapter), axes_of_shared(adapter)
    users = users_of_shared(adapter)

    def of(array: Any, letters: str, partition: Partition) -> NamedSharding:
        return NamedSharding(mesh, _following(array.shape, letters, partition, tiny))

    def of_rows(rows: TokenRows, partition: Partition) -> TokenRows:
        letters = OTHER + (OUTPUT if rows.site.kind == EMBEDDING else INPUT)
        return dataclasses.replace(rows, values=of(rows.values, letters, partition))

    return dataclasses.replace(
        adapter,
        weights={
            path: {
                name: of(array, letters[path][name], partitions.get(path, _agreed([])))
                for name, array in arrays.items()
            }
            for path, arrays in adapter.weights.items()
        },
        shared={
            name: of(array, letters_of_shared[name], _agreed([partitions[site.path] for site in users[name]]))
            for name, array in adapter.shared.items()
        },
        replaced={
            # Mixtures and populations stack copies along axes before the leaf's own.
            path: NamedSharding(mesh, _spec([None] * (len(copy.shape) - len(entries[path])) + entries[path]))
            for path, copy in adapter.replaced.items()
        },
        scaling=_whole(adapter.scaling, mesh),
        rows={path: of_rows(rows, _partition(rows.site, entries[path])) for path, rows in adapter.rows.items()},
    )


def _padded(spec: PartitionSpec, ndim: int) -> Entries:
    return [*spec, *[None] * (ndim - len(spec))]


def _partition(site: Site, entries: Entries) -> Partition:
    def axes(letters: str) -> list[tuple[Any, int]]:
        found = zip(site.layout, entries, site.shape, strict=True)
        return [(entry, size) for letter, entry, size in found if letter in letters]

    stack = tuple(entry for entry, _ in axes(STACK))
    return Partition(stack, _as_one(axes(INPUT + VOCABULARY)), _as_one(axes(OUTPUT)))


def _as_one(axes: Sequence[tuple[Any, int]]) -> Any:
    """The partition of several axes made one: that of the first, if only that is split."""
    first, *others = [entry for entry, size in axes if size > 1] or [None]
    return first if all(entry is None for entry in others) else None


def _agreed(partitions: Sequence[Partition]) -> Partition:
    def one(entries: set[Any]) -> Any:
        return entries.pop() if len(entries) == 1 else None

    return Partition((), one({p.inputs for p in partitions}), one({p.outputs for p in partitions}))


def _following(shape: Sequence[int], letters: str, partition: Partition, tiny: int) -> PartitionSpec:
    """letters: of the last axes of an array, which are those of one module; before them come its stack axes."""
    own = len(shape) - len(letters)
    lead = own - len(partition.stack)
    if lead < 0 or math.prod(shape[own:]) < tiny:
        return PartitionSpec()
    return _spec([*[None] * lead, *partition.stack, *map(partition.of, letters)])


def _spec(entries: Entries) -> PartitionSpec:
    """Entries as a spec; a mesh axis splits the first axis that asks for it."""
    used: set[Any] = set()
    kept: Entries = []
    for entry in entries:
        kept.append(None if used.intersection(axis_names(entry)) else entry)
        used.update(axis_names(entry))
    while kept and kept[-1] is None:
        kept.pop()
    return PartitionSpec(*kept)
