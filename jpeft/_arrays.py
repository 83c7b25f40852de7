"""What a method gets as `p` at a module: its own arrays, its scaling, and those that it shares with other modules."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Set
from typing import Any

import jax
import jax.numpy as jnp

from ._contract import STACK, Method, Site, method_of
from ._order import module_order
from ._params import Adapter, Sites
from ._sites import canonical, checked_weight
from ._stacks import layer_sites

Weights = dict[str, dict[str, Any]]


def arrays_at(adapter: Adapter, path: str) -> tuple[dict[str, Any], frozenset[str]]:
    """The arrays of a module by the method's names for them, and which of them have no stack axes.

    Layers of a stack that use different shared arrays get them stacked.
    """
    own = {**adapter.weights.get(path, {}), "scaling": adapter.scaling[path]}
    alike: set[str] = set()
    for name, places in shared_names(adapter).get(path, {}).items():
        if len(set(places)) == 1:
            own[name] = adapter.shared[places[0]]
            alike.add(name)
        else:
            own[name] = _stacked([adapter.shared[place] for place in places], adapter.sites[path])
    return own, frozenset(alike)


def over_stack(function: Callable[..., Any], site: Site, alike: frozenset[str], *in_axes: int | None) -> Any:
    """`function(arrays of one module, ...)` for the whole stack of a site, whose arrays `arrays_at` gives.

    in_axes: whether the other arguments have the stack's axes (0) or not (None).
    """

    def mapped(arrays: Mapping[str, Any], *others: Any) -> Any:
        own = {name: None if name in alike else 0 for name in arrays}
        one = function
        for _ in site.stack:
            one = jax.vmap(one, in_axes=(own, *in_axes))
        return one(dict(arrays), *others)

    return mapped


def single_sites(site: Site) -> list[Site]:
    """The modules that a site stacks, each without stack axes: layers by their own paths, others numbered.

    >>> site = Site("qkv", "qkv.kernel", None, "bio", (3, 4, 6), "float32")
    >>> [single.path for single in single_sites(site)], single_sites(site)[0].shape
    (['qkv[0]', 'qkv[1]', 'qkv[2]'], (4, 6))
    """
    found: list[Site] = []
    for layer in layer_sites(site) or [site]:
        count = math.prod(layer.stack)
        kept = [(letter, size) for letter, size in zip(layer.layout, layer.shape, strict=True) if letter != STACK]
        layout, shape = "".join(letter for letter, _ in kept), tuple(size for _, size in kept)
        paths = [f"{layer.path}[{index}]" for index in range(count)] if layer.stack else [layer.path]
        found += [Site(path, layer.leaf, layer.bias, layout, shape, layer.dtype) for path in paths]
    return found


@functools.lru_cache(maxsize=64)
def ordered_sites(sites: Sites) -> dict[str, Site]:
    """The single modules of an adapter by path, in the order of the PyTorch model."""
    singles = {single.path: single for site in sites.values() for single in single_sites(site)}
    return {path: singles[path] for path in module_order(singles)}


def shared_names(adapter: Adapter) -> dict[str, dict[str, list[str]]]:
    """{site path: {the method's name: the shared array of each module of the stack}}."""
    return _shared_names(adapter.sites, adapter.config, tuple(adapter.shared))


@functools.lru_cache(maxsize=64)
def _shared_names(sites: Sites, config: Any, shared: tuple[str, ...]) -> dict[str, dict[str, list[str]]]:
    method = method_of(config)
    if not shared:
        return {}
    if method.uses is None:
        return {path: {name: [name] for name in shared} for path in sites}
    uses = method.uses(ordered_sites(sites), config)
    found: dict[str, dict[str, list[str]]] = {}
    for path, site in sites.items():
        singles = [uses[single.path] for single in single_sites(site)]
        found[path] = {name: [use[name] for use in singles] for name in singles[0]}
    return found


def initial_together(
    method: Method, key: jax.Array, sites: Sites, leaves: Mapping[str, Any], config: Any
) -> tuple[Weights, dict[str, Any]]:
    """The arrays of all modules and those that they share, of a method that begins with all of them at once.

    leaves: {site path: the base leaf}.
    """
    assert method.together is not None
    weights = {
        single.path: functools.partial(_weight, leaves[path], site, index)
        for path, site in sites.items()
        for index, single in enumerate(single_sites(site))
    }
    shared, arrays = method.together(key, ordered_sites(sites), config, weights)
    found: Weights = {}
    for path, site in sites.items():
        singles = [arrays[single.path] for single in single_sites(site)]
        found[path] = {name: _stacked([single[name] for single in singles], site) for name in singles[0]}
    return found, shared


def with_derivation(
    adapter: Adapter, leaves: Mapping[str, Any], lacking: Mapping[str, Set[str]] | None = None
) -> Adapter:
    """The adapter with the arrays that its method derives from the others and from the weights.

    leaves: {site path: the base leaf}. lacking: {site path: names} of those that are wanted; all by default.
    """
    method = method_of(adapter.config)
    derive = method.derive
    if derive is None:
        return adapter
    weights: Weights = {}
    for path, site in adapter.sites.items():
        own, alike = arrays_at(adapter, path)

        def one(p: Mapping[str, Any], w: jax.Array, site: Site = site) -> dict[str, jax.Array]:
            return derive(p, single_sites(site)[0], adapter.config, lambda: checked_weight(w, site))

        known = {name: array for name, array in own.items() if name not in method.derived}
        made = over_stack(one, site, alike, 0)(known, canonical(leaves[path], site.layout))
        wanted = made.keys() if lacking is None else lacking[path]
        weights[path] = {**adapter.weights[path], **{name: made[name] for name in made.keys() & wanted}}
    return dataclasses.replace(adapter, weights=weights)


def _weight(leaf: Any, site: Site, index: int) -> jax.Array:
    whole = canonical(checked_weight(leaf, site), site.layout)
    return whole.reshape(-1, *whole.shape[len(site.stack) :])[index] if site.stack else whole


def _stacked(arrays: list[Any], site: Site) -> Any:
    """The arrays of a site's single modules as that of the site."""
    if not site.stack:
        return arrays[0]

    def stack(arrays: list[Any]) -> jax.Array:
        return jnp.stack(arrays).reshape(*site.stack, *arrays[0].shape)

    return jax.eval_shape(stack, arrays) if isinstance(arrays[0], jax.ShapeDtypeStruct) else stack(arrays)
