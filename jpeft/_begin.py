"""Adapters that select no modules by name: prompts, prefixes, side networks. Their method says where they begin."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from ._contract import EMBEDDING, Site, method_of
from ._order import module_order
from ._params import Adapter, Sites
from ._quantized import is_quantized
from ._sites import Candidate, canonical, checked_weight
from ._tokens import input_embedding


@dataclasses.dataclass(frozen=True)
class Tree:
    """The base as such a method sees it.

    leaves: {path: leaf}, stacks of layers whole. layers: the same, layer by layer. found: `candidates` of the layers.
    """

    leaves: Mapping[str, Any]
    layers: Mapping[str, Any]
    found: Mapping[str, Candidate]

    def token_table(self, what: str = "a prompt is more rows of") -> Site:
        """The lookup table of the tokens; raises ValueError if there is none, or if it is not known which one it is.

        what: it is for, for the messages.
        """
        tables = [path for path, candidate in self.found.items() if candidate.kind == EMBEDDING]
        if not tables:
            raise ValueError(
                f"{what} the model's table of tokens, and the tree has no table: none among "
                f"{', '.join(list(self.found)[:6]) or 'no modules at all'}; if one of them is, say so as "
                "layouts={its path: 'vo'}"
            )
        return self.found[input_embedding(self.found, "the prompt's place", "layouts={its path: 'vo'}")].site()

    def called(self, name: str) -> list[str]:
        """The paths of the modules of this name, layer by layer, in PyTorch's order."""
        paths = (leaf.split(".") for leaf in self.layers)
        modules = {".".join(path[: count + 1]) for path in paths for count, own in enumerate(path[:-1]) if own == name}
        return module_order(modules)

    def weight(self, site: Site) -> jax.Array:
        """The canonical weight of a site."""
        return canonical(checked_weight(self.leaves[site.leaf], site), site.layout)


@dataclasses.dataclass(frozen=True)
class Beginning:
    """What an adapter begins as.

    config: with what the tree tells filled in. sites: the adapted modules, perhaps none. weights, shared: as of
    `Adapter`; weights may be those of modules that are no sites.
    """

    config: Any
    sites: Mapping[str, Site] = dataclasses.field(default_factory=dict)
    weights: Mapping[str, Mapping[str, jax.Array]] = dataclasses.field(default_factory=dict)
    shared: Mapping[str, jax.Array] = dataclasses.field(default_factory=dict)


def begun(key: jax.Array, tree: Tree, config: Any, dtype: Any, abstract: bool) -> Adapter:
    """The adapter that a method of this kind begins with, of shapes alone if the base is abstract."""
    method, told = method_of(config), list[tuple[Any, Sites]]()
    arrays = {path: leaf for path, leaf in tree.leaves.items() if hasattr(leaf, "shape") or is_quantized(leaf)}
    of_stacks = {id(leaf): path for path, leaf in arrays.items()}

    def begin(key: jax.Array, arrays: Mapping[str, Any]) -> Any:
        layers = {
            path: dataclasses.replace(leaf, leaf=arrays[of_stacks[id(leaf.leaf)]])
            if id(getattr(leaf, "leaf", None)) in of_stacks
            else arrays.get(path, leaf)
            for path, leaf in tree.layers.items()
        }
        assert method.begin is not None
        beginning: Beginning = method.begin(key, Tree({**tree.leaves, **arrays}, layers, tree.found), config)
        told[:] = [(beginning.config, Sites(beginning.sites))]
        return jax.tree.map(
            functools.partial(_as_floating, dtype),
            ({path: dict(own) for path, own in beginning.weights.items()}, dict(beginning.shared)),
        )

    weights, shared = jax.eval_shape(begin, key, arrays) if abstract else begin(key, arrays)
    (config, sites) = told[0]
    make = jax.ShapeDtypeStruct if abstract else jnp.ones
    scaling = {path: make(site.stack, jnp.float32) for path, site in sites.items()}
    own = {**{path: {} for path in sites}, **weights}
    return Adapter(own, shared, {}, scaling, config, sites)


def _as_floating(dtype: Any, array: jax.Array) -> jax.Array:
    return array.astype(dtype) if jnp.issubdtype(array.dtype, jnp.inexact) else array
