"""The same parameters twice: layer by layer, and with layers stacked under the slice of their numbers."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jpeft
from jpeft._stacks import layer_paths

HIDDEN, VOCABULARY = 4, 7
STACKS = {"all": ("0:4",), "period 2": ("0:4:2", "1:4:2"), "all but one": ("0:3", "3")}


def layer_tree(dtype: Any = jnp.float32) -> dict[str, Any]:
    """Four layers with Hugging Face names, an embedding and a head; every leaf has values of its own."""

    def draw(seed: int, *shape: int) -> jax.Array:
        return jax.random.normal(jax.random.key(seed), shape).astype(dtype)

    blocks = {
        str(index): {
            "q_proj": {"kernel": draw(10 * index, HIDDEN, HIDDEN), "bias": draw(10 * index + 1, HIDDEN)},
            "v_proj": {"kernel": draw(10 * index + 2, HIDDEN, HIDDEN)},
            "norm": {"scale": draw(10 * index + 4, HIDDEN), "bias": draw(10 * index + 5, HIDDEN)},
        }
        for index in range(4)
    }
    head = {"kernel": draw(100, HIDDEN, 2), "bias": draw(101, 2)}
    return {"model": {"layers": blocks, "embed_tokens": {"embedding": draw(102, VOCABULARY, HIDDEN)}}, "score": head}


def stacked(tree: dict[str, Any], names: tuple[str, ...] = STACKS["all"]) -> dict[str, Any]:
    """The same tree with its layers in stacks of these names."""
    layers = tree["model"]["layers"]
    whole = {name: _stack([layers[path] for path in layer_paths(name) or [name]], name) for name in names}
    return {**tree, "model": {**tree["model"], "layers": whole}}


def _stack(layers: list[Any], name: str) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers) if layer_paths(name) else layers[0]


def forward(tree: dict[str, Any], ids: Any) -> jax.Array:
    """A model of either tree; the layers of a stack are run by `jax.lax.scan`."""

    def layer(x: Any, p: Any) -> Any:
        q = x @ p["q_proj"]["kernel"] + p["q_proj"]["bias"]
        return x + (jnp.tanh(q) @ p["v_proj"]["kernel"]) * p["norm"]["scale"] + p["norm"]["bias"]

    x = tree["model"]["embed_tokens"]["embedding"][ids]
    blocks = tree["model"]["layers"]
    if together := [blocks[name] for name in sorted(blocks) if layer_paths(name)]:
        x, _ = jax.lax.scan(lambda x, period: (functools.reduce(layer, period, x), None), x, together)
    for name in sorted(blocks):
        x = x if layer_paths(name) else layer(x, blocks[name])
    return x @ tree["score"]["kernel"] + tree["score"]["bias"]


def of_layers(arrays: dict[str, Any]) -> dict[str, Any]:
    """{path: arrays} of an adapter, stacks taken apart."""
    return {
        layer: jax.tree.map(lambda array, i=index, one=layer == path: array if one else array[i], own)
        for path, own in arrays.items()
        for index, layer in enumerate(layer_paths(path) or [path])
    }


def assert_same_adapter(stacked: jpeft.Adapter, single: jpeft.Adapter) -> None:
    """Bit for bit the same weights, replaced leaves and scalings, in trees of the same structure."""
    for field in ("weights", "replaced", "scaling"):
        assert_same_arrays(of_layers(getattr(stacked, field)), getattr(single, field))


def assert_same_arrays(first: Any, second: Any) -> None:
    assert jax.tree.structure(first) == jax.tree.structure(second)
    for one, other in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        assert one.dtype == other.dtype and np.asarray(one).tobytes() == np.asarray(other).tobytes()


def randomised(wrapped: jpeft.PeftParams, seed: int = 7) -> jpeft.PeftParams:
    """The same adapters with random values in every array; the scalings stay."""
    leaves, structure = jax.tree.flatten({n: (a.weights, a.replaced) for n, a in wrapped.adapters.items()})
    drawn = [jax.random.normal(jax.random.key(seed + i), leaf.shape, leaf.dtype) for i, leaf in enumerate(leaves)]
    values = jax.tree.unflatten(structure, drawn)
    adapters = {
        name: dataclasses.replace(adapter, weights=values[name][0], replaced=values[name][1])
        for name, adapter in wrapped.adapters.items()
    }
    return dataclasses.replace(wrapped, adapters=adapters)


def taken_apart(wrapped: jpeft.PeftParams, base: dict[str, Any], template: jpeft.PeftParams) -> jpeft.PeftParams:
    """The arrays of stacked adapters beside the base of single layers; template: the same configs, wrapped there."""
    adapters = {
        name: dataclasses.replace(
            template.adapters[name],
            **{field: of_layers(getattr(adapter, field)) for field in ("weights", "replaced", "scaling")},
        )
        for name, adapter in wrapped.adapters.items()
    }
    return dataclasses.replace(template, base=base, adapters=adapters)
