"""Where parameters go: from a mesh, and rules that say how it splits them, to one sharding for each."""

import re
from collections.abc import Callable, Sequence
from math import prod
from typing import Any

from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jpeft._stacks import placed_layers

Rules = Sequence[tuple[str, PartitionSpec]] | Callable[[str, tuple[int, ...]], PartitionSpec]
"""`(regular expression of a path, spec)` pairs of which the first that fits counts, or `(path, shape) -> spec`."""

Placement = Callable[[str, tuple[int, ...]], NamedSharding | None]
"""`(path, shape) -> sharding`; None is the default device."""

SMALL = 1 << 12
"""Elements of one layer's parameter below which it is not worth a split: each device holds all of it."""


def placement(mesh: Mesh | None, rules: Rules | None) -> Placement:
    """Where the rules put each parameter on a mesh; without rules, each is split over all devices (FSDP).

    A rule of `(regular expression, spec)` counts for a path in which the expression is found, or, where the path
    names a stack of layers (`layers.0:12.mlp.kernel`), in that of its first layer (`layers.0.mlp.kernel`): the spec
    is that of one layer, and the stack is not split. A parameter that fits no rule is on every device. A callable
    gives the spec of the whole parameter. Without rules, the largest axis of a parameter that the number of devices
    divides is split over all of them; a stack of layers is not, nor are parameters of less than 4096 elements.

    The axes of the mesh become `AxisType.Auto`, whatever they are: the networks leave it to the compiler how their
    activations are split, where an explicit axis asks every operation for it.

    Raises ValueError for rules without a mesh, and TypeError or ValueError where a spec is used that is none, or that
    does not fit the parameter or the mesh.
    """
    if mesh is None:
        if rules is not None:
            raise ValueError("sharding_rules were given without a mesh: give mesh=jax.sharding.Mesh(...) as well")
        return lambda path, shape: None
    mesh = Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))

    def place(path: str, shape: tuple[int, ...]) -> NamedSharding:
        if rules is None:
            spec = _fully_sharded(mesh, path, shape)
        elif callable(rules):
            spec = rules(path, shape)
        else:
            spec = _by_rule(rules, path)
        _check(spec, mesh, path, shape)
        return NamedSharding(mesh, spec)

    return place


def _stack(path: str) -> tuple[int, str]:
    """The number of a leaf's leading axes that stack layers, and the path of the first layer."""
    places, layer = next(iter(placed_layers(path).items()))
    return len(places), layer


def _fully_sharded(mesh: Mesh, path: str, shape: tuple[int, ...]) -> PartitionSpec:
    stacked, _ = _stack(path)
    sizes = shape[stacked:]
    axes = [axis for axis, size in enumerate(sizes) if size % mesh.size == 0]
    if prod(sizes) < SMALL or not axes:
        return PartitionSpec()
    largest = max(axes, key=lambda axis: sizes[axis])
    return PartitionSpec(*[None] * (stacked + largest), tuple(mesh.axis_names))


def _by_rule(rules: Sequence[tuple[str, PartitionSpec]], path: str) -> PartitionSpec:
    stacked, layer = _stack(path)
    for pattern, spec in rules:
        if re.search(pattern, path) or re.search(pattern, layer):
            return PartitionSpec(*[None] * stacked, *spec) if isinstance(spec, PartitionSpec) else spec
    return PartitionSpec()


def _check(spec: Any, mesh: Mesh, path: str, shape: tuple[int, ...]) -> None:
    if not isinstance(spec, PartitionSpec):
        raise TypeError(f"the sharding rule of {path} gives {spec!r}, expected a jax.sharding.PartitionSpec")
    where = f"the sharding rule of {path} {shape} gives {spec}, but"
    if len(spec) > len(shape):
        raise ValueError(f"{where} the parameter has {len(shape)} axes: give no more entries than that")
    for axis, entry in enumerate(spec):
        names = entry if isinstance(entry, tuple) else () if entry is None else (entry,)
        if unknown := [name for name in names if name not in mesh.axis_names]:
            raise ValueError(f"{where} the mesh has no axis {unknown[0]!r}; its axes are {dict(mesh.shape)}")
        parts = prod(mesh.shape[name] for name in names)
        if shape[axis] % parts:
            raise ValueError(
                f"{where} axis {axis} of size {shape[axis]} cannot be split into {parts} equal parts; the axes of the "
                f"mesh are {dict(mesh.shape)}. Give None for that axis"
            )
