"""Where parameters go: from a mesh, and rules that say how it splits them, to one sharding for each."""

from collections.abc import Callable
from math import prod
from typing import Any

from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jpeft._specs import Rules as Rules, check_spec, spec_by_rule, stack_of

from ._default_rules import default_rules, has_meaning

Placement = Callable[[str, tuple[int, ...]], NamedSharding | None]
"""`(path, shape) -> sharding`; None is the default device."""

SMALL = 1 << 12
"""Elements of one layer's parameter below which it is not worth a split: each device holds all of it."""


def placement(mesh: Mesh | None, rules: Rules | None, config: Any = None) -> Placement:
    """Where the rules put each parameter on a mesh; without rules, as the names of its axes say.

    A rule of `(regular expression, spec)` counts for a path in which the expression is found, or, where the path
    names a stack of layers (`layers.0:12.mlp.kernel`), in that of its first layer (`layers.0.mlp.kernel`): the spec
    is that of one layer, and the stack is not split. A parameter that fits no rule is on every device. A callable
    gives the spec of the whole parameter. Without rules, axes that are called "data", "fsdp" or "tp" split a parameter
    by what its layer does in a model of this `config`. If any has another name, the largest axis of a parameter that
    the number of devices divides is split over all of them; a stack of layers is not, nor are parameters of less than
    4096 elements.

    The axes of the mesh become `AxisType.Auto`, whatever they are: the networks leave it to the compiler how their
    activations are split, where an explicit axis asks every operation for it.

    Raises ValueError for rules without a mesh, and TypeError or ValueError where a spec is used that is none, or that
    does not fit the parameter or the mesh.
    """
    if mesh is None:
        if rules is not None:
            raise ValueError("sharding_rules were given without a mesh: give mesh=jax.sharding.Mesh(...) as well")
        return lambda path, shape: None
    mesh = automatic(mesh)
    if rules is None and config is not None and has_meaning(mesh):
        rules = default_rules(mesh, config)

    def place(path: str, shape: tuple[int, ...]) -> NamedSharding:
        spec = _fully_sharded(mesh, path, shape) if rules is None else spec_by_rule(rules, path, shape)
        check_spec(spec, mesh, path, shape, "the sharding rule")
        return NamedSharding(mesh, spec)

    return place


def automatic(mesh: Mesh) -> Mesh:
    """The mesh with all axes left to the compiler."""
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))


def _fully_sharded(mesh: Mesh, path: str, shape: tuple[int, ...]) -> PartitionSpec:
    stacked, _ = stack_of(path)
    sizes = shape[stacked:]
    axes = [axis for axis, size in enumerate(sizes) if size % mesh.size == 0]
    if prod(sizes) < SMALL or not axes:
        return PartitionSpec()
    largest = max(axes, key=lambda axis: sizes[axis])
    return PartitionSpec(*[None] * (stacked + largest), tuple(mesh.axis_names))
