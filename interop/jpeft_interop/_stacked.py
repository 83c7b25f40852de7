"""Files hold layers one by one: a tree with stacks of layers taken apart for a file, and put together from one."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jpeft._params import Adapter, Sites
from jpeft._stacks import Layer, layer_paths, layer_sites, restacked, spelled_layers, unstacked


def unstacked_adapter(adapter: Adapter) -> Adapter:
    """The same adapter of single layers; its arrays are slices that are not made before they are needed.

    >>> import jpeft
    >>> params = {"layers": {"0:2": {"q": {"kernel": jnp.ones((2, 4, 6))}}}}
    >>> wrapped = jpeft.wrap(params, jpeft.LoraConfig(r=3, target_modules=["q"]))
    >>> jax.tree.map(lambda array: array.shape, unstacked_adapter(wrapped.adapters["default"]).weights)
    {'layers.0.q': {'lora_A': (3, 4), 'lora_B': (6, 3)}, 'layers.1.q': {'lora_A': (3, 4), 'lora_B': (6, 3)}}
    """
    weights = {
        layer: {name: array if layer == path else Layer(path, array, index) for name, array in arrays.items()}
        for path, arrays in adapter.weights.items()
        for index, layer in enumerate(layer_paths(path) or [path])
    }
    sites = {site.path: site for whole in adapter.sites.values() for site in layer_sites(whole) or [whole]}
    return dataclasses.replace(
        adapter,
        weights=weights,
        replaced=unstacked(adapter.replaced),
        scaling=unstacked(adapter.scaling),
        sites=Sites(sites),
    )


def unstacked_layouts(layouts: Mapping[str, str], leaves: Mapping[str, Any]) -> dict[str, str]:
    """The layouts with those of stacked leaves, by the stack's path or its first layer's, for each of the layers.

    leaves: of the tree with its stacks.

    >>> unstacked_layouts({"layers.0:2.q": "bio"}, {"layers.0:2.q": jnp.ones((2, 4, 6))})
    {'layers.0:2.q': 'bio', 'layers.0.q': 'io', 'layers.1.q': 'io'}
    """
    own = dict(layouts)
    for path, leaf in leaves.items():
        layers = layer_paths(path)
        given = None if layers is None else layouts.get(path, layouts.get(layers[0]))
        if layers is not None and given is not None:
            own.update(dict.fromkeys(layers, given[1:] if len(given) == len(leaf.shape) else given))
    return own


def restacked_adapter(path: Path, adapter: Adapter, planned: Adapter, layers: Mapping[str, Any]) -> Adapter:
    """The inverse of `unstacked_adapter`, of an adapter read from the file at `path`.

    planned: the adapter of the tree with its stacks that the config asks for. layers: that tree's leaves, unstacked.
    Raises ValueError if some layers of a stack are in the file and not the others, or in other dtypes.
    """
    replaced = restacked(adapter.replaced, layers, f"{path} holds")
    return dataclasses.replace(
        adapter,
        weights={
            site: {
                name: _stacked(path, site, [adapter.weights[layer][name] for layer in _paths(site)])
                for name in adapter.weights[_paths(site)[0]]
            }
            for site in planned.weights
        },
        replaced={leaf: _stacked(path, leaf, arrays) for leaf, arrays in replaced.items()},
        scaling={
            site: _stacked(path, site, [adapter.scaling[layer] for layer in _paths(site)]) for site in planned.scaling
        },
        sites=planned.sites,
    )


def _paths(path: str) -> list[str]:
    return layer_paths(path) or [path]


def _stacked(path: Path, stack: str, arrays: list[jax.Array]) -> jax.Array:
    layers = layer_paths(stack)
    if layers is None:
        return arrays[0]
    dtypes = [str(array.dtype) for array in arrays]
    if len(set(dtypes)) > 1:
        of = {dtype: [layer for layer, own in zip(layers, dtypes, strict=True) if own == dtype] for dtype in dtypes}
        given = ", ".join(f"{dtype} in {spelled_layers(stack, own)}" for dtype, own in of.items())
        raise ValueError(
            f"{path} has other dtypes in other layers of the stack {stack!r}: {given}; expected one dtype: load the "
            "model with scan_layers=False"
        )
    return jnp.stack(arrays)


def is_abstract(leaf: Any) -> bool:
    """Whether a leaf, or the stack that it is a layer of, has no values."""
    return isinstance(leaf.leaf if isinstance(leaf, Layer) else leaf, jax.ShapeDtypeStruct)
