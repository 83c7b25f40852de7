"""A network without parameters, and its call with some."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from flax import nnx

from ._family import Architecture, Family, Options
from ._leaves import Leaf, check_paths, leaves_of

Params = dict[str, Any]
"""Nested dict of arrays: the modules of the `transformers` class, then `kernel`, `bias`, `embedding` or `scale`."""


# Compared by identity, so that a compiled program can be kept for it.
@dataclass(frozen=True, eq=False)
class Blueprint:
    """A network without parameters: what `FlaxModel` is made of."""

    family: Family
    architecture: Architecture
    config: Any
    graphdef: Any = field(repr=False)
    leaves: Mapping[str, Leaf] = field(repr=False)
    options: Options = Options()


def blueprint(family: Family, architecture: Architecture, config: Any, options: Options) -> Blueprint:
    """Build the network of a config; allocates nothing."""
    graphdef, state = nnx.split(architecture.module(config, options))
    return Blueprint(family, architecture, config, graphdef, leaves_of(state), options)


def run_network(blueprint: Blueprint, params: Params, given: Mapping[str, Any]) -> Any:
    """Call the network with these parameters. Raises ValueError if they are not structured as the model's."""
    check_paths(params, blueprint.leaves)
    return nnx.merge(blueprint.graphdef, params)(**given)
