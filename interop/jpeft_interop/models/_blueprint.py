"""A network without parameters, and its call with some."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from flax import nnx

import jpeft
from jpeft._adaption import ADAPTION_PROMPTS
from jpeft._quantized import is_quantized

from ._adaption import by_layer
from ._family import Architecture, Family, Options
from ._leaves import Leaf, check_paths, flatten, leaves_of
from ._spread import spread_scores

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
    """Call the network with these parameters, of which quantised ones become weights where they are used.

    Raises ValueError if they are not structured as the model's, and what is wrong with adaption prompts.
    """
    check_paths(params, blueprint.leaves)
    if any(is_quantized(leaf) for _, leaf in flatten(params)):
        return jpeft.lift(partial(run_network, blueprint))(params, given)
    if ADAPTION_PROMPTS in given:
        prompts = by_layer(given[ADAPTION_PROMPTS], blueprint.leaves, blueprint.family, blueprint.config)
        given = {**given, ADAPTION_PROMPTS: prompts}
    return spread_scores(nnx.merge(blueprint.graphdef, params)(**given), blueprint.options.mesh)
