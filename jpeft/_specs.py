"""Partitions of leaves over a mesh: rules that give them by path, and the check that they fit."""

import re
from collections.abc import Callable, Sequence
from typing import Any

from jax.sharding import PartitionSpec

from ._partitions import AnyMesh, axis_names, parts_of
from ._stacks import placed_layers

Rules = Sequence[tuple[str, PartitionSpec]] | Callable[[str, tuple[int, ...]], PartitionSpec]
"""`(regular expression of a path, spec)` pairs of which the first that fits counts, or `(path, shape) -> spec`."""


def is_rules(value: Any) -> bool:
    """Whether a value is rules rather than a tree of specs.

    >>> is_rules([("kernel$", PartitionSpec("x"))]), is_rules([PartitionSpec("x")]), is_rules({"kernel": None})
    (True, False, False)
    """
    if isinstance(value, (list, tuple)) and not isinstance(value, PartitionSpec):
        return bool(value) and all(isinstance(r, tuple) and len(r) == 2 and isinstance(r[0], str) for r in value)
    return callable(value)


def spec_by_rule(rules: Rules, path: str, shape: tuple[int, ...]) -> Any:
    """What the rules give for a leaf. A pair counts for a path in which its expression is found, or, where the path
    names a stack of layers (`layers.0:12.mlp.kernel`), in that of its first layer: its spec is that of one layer, and
    the stack is not split. A leaf that fits no pair is whole; a callable gives the spec of the whole leaf.

    >>> spec_by_rule([(r"layers.0.kernel", PartitionSpec("x"))], "layers.0:12.kernel", (12, 4, 6))
    P(None, 'x')
    """
    if callable(rules):
        return rules(path, shape)
    stacked, layer = stack_of(path)
    for pattern, spec in rules:
        if re.search(pattern, path) or re.search(pattern, layer):
            return PartitionSpec(*[None] * stacked, *spec) if isinstance(spec, PartitionSpec) else spec
    return PartitionSpec()


def stack_of(path: str) -> tuple[int, str]:
    """The number of a leaf's leading axes that stack layers, and the path of the first layer.

    >>> stack_of("layers.4:12.kernel"), stack_of("norm.scale")
    ((1, 'layers.4.kernel'), (0, 'norm.scale'))
    """
    places, layer = next(iter(placed_layers(path).items()))
    return len(places), layer


def check_spec(spec: Any, mesh: AnyMesh, path: str, shape: tuple[int, ...], source: str) -> None:
    """Raise unless a spec is one, and fits the leaf and the mesh. source: who gives it, for the message.

    TypeError for what is no PartitionSpec; ValueError for more entries than axes, mesh axes that are not there or
    there twice, and sizes that they do not divide.
    """
    if not isinstance(spec, PartitionSpec):
        raise TypeError(f"{source} of {path} gives {spec!r}, expected a jax.sharding.PartitionSpec")
    where = f"{source} of {path} {shape} gives {spec}, but"
    if len(spec) > len(shape):
        raise ValueError(f"{where} the parameter has {len(shape)} axes: give no more entries than that")
    used: set[str] = set()
    for axis, entry in enumerate(spec):
        names = axis_names(entry)
        if unknown := [name for name in names if name not in mesh.axis_names]:
            raise ValueError(f"{where} the mesh has no axis {unknown[0]!r}; its axes are {dict(mesh.shape)}")
        if twice := used.intersection(names):
            raise ValueError(f"{where} the mesh axis {sorted(twice)[0]!r} can split one axis only: name it once")
        used.update(names)
        parts = parts_of(entry, mesh)
        if shape[axis] % parts:
            raise ValueError(
                f"{where} axis {axis} of size {shape[axis]} cannot be split into {parts} equal parts; the axes of the "
                f"mesh are {dict(mesh.shape)}. Give None for that axis"
            )
