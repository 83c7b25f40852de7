"""The parameters of a model: their names here and in a checkpoint, their shapes, their initial values."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Sharding
from jax.typing import DTypeLike

from jpeft._paths import fold_in_name
from jpeft._stacks import placed_layers

from ._parameters import Initialiser, Pieces
from ._pieces import absolute, tensor_shape, tensor_size


@dataclass(frozen=True)
class Leaf:
    """One parameter. `path` is its place in the tree of parameters, joined by dots.

    The leading axes of a parameter whose path names a stack of layers, such as `layers.0:12.mlp.kernel`, stack what
    `initial` draws for each of them. `alternatives`: the ways in which checkpoints hold it, with the names that the
    tensors have there; the first one is written.
    """

    path: str
    shape: tuple[int, ...]
    initial: Initialiser
    alternatives: tuple[Pieces, ...]


def leaves_of(state: nnx.State) -> dict[str, Leaf]:
    """The parameters of a module's state, by path.

    Raises ValueError if the tensors that `parameter` was given do not fill one.
    """
    found = {}
    for names, variable in nnx.to_flat_state(state):
        path = ".".join(str(name) for name in names)
        metadata = variable.get_metadata()
        alternatives = tuple(absolute(pieces, path) for pieces in metadata["stored"])
        leaf = Leaf(path, tuple(variable.shape), metadata["initial"], alternatives)
        _check_filled(leaf)
        found[path] = leaf
    return found


def _check_filled(leaf: Leaf) -> None:
    # What no tensor fills would be read as whatever the memory held before.
    for pieces in leaf.alternatives:
        filled = sum(tensor_size(piece, leaf.shape) for piece in pieces)
        if filled != prod(leaf.shape):
            raise ValueError(
                f"{leaf.path} {leaf.shape} has {prod(leaf.shape)} elements, but the tensors that `parameter` was given "
                f"fill {filled}: {listed([piece.name for piece in pieces])}"
            )


def tensors_of(leaf: Leaf) -> dict[str, tuple[int, ...]]:
    """The names and shapes of the tensors that a parameter is written as, e.g. `(out, in)` for a kernel `(in, out)`."""
    return {piece.name: tensor_shape(piece, leaf.shape) for piece in leaf.alternatives[0]}


def initial_value(
    leaf: Leaf, rng: jax.Array, dtype: DTypeLike, std: float, sharding: Sharding | None = None
) -> jax.Array:
    """A parameter's initial value; its key comes from its path, so no other parameter has a say in it.

    A stack of layers has the values that each layer would have by itself.
    """
    paths = placed_layers(leaf.path)
    keys = jnp.stack([fold_in_name(rng, path) for path in paths.values()])
    stack = leaf.shape[: len(next(iter(paths)))]
    return _sampler(leaf.initial, leaf.shape, len(stack), jnp.dtype(dtype), std, sharding)(keys)


@lru_cache(maxsize=128)
def _sampler(
    initial: Initialiser, shape: tuple[int, ...], stacked: int, dtype: Any, std: float, sharding: Sharding | None
) -> Any:
    """`keys of all layers -> value`, compiled: each device draws its own part."""

    def one(key: jax.Array) -> jax.Array:
        return initial(key, shape[stacked:], dtype, std)

    def draw(keys: jax.Array) -> jax.Array:
        return jax.lax.map(one, keys).reshape(shape) if stacked else one(keys[0])

    return jax.jit(draw, out_shardings=sharding)


def abstract_value(leaf: Leaf, dtype: DTypeLike, sharding: Sharding | None = None) -> jax.ShapeDtypeStruct:
    """A parameter's shape, dtype and sharding, in place of its value."""
    return jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype), sharding=sharding)


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The nested dict of values keyed by dotted paths.

    >>> nest({"layers.0.kernel": 1, "layers.0.bias": 2, "norm.scale": 3})
    {'layers': {'0': {'kernel': 1, 'bias': 2}}, 'norm': {'scale': 3}}
    """
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *modules, name = path.split(".")
        node = tree
        for module in modules:
            node = node.setdefault(module, {})
        node[name] = value
    return tree


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The `(dotted path, value)` pairs of a nested dict: the inverse of `nest`."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def check_paths(params: Mapping[str, Any], leaves: Mapping[str, Leaf]) -> None:
    """Raise ValueError unless `params` has exactly the paths of `leaves`."""
    given = {path for path, _ in flatten(params)}
    missing, unexpected = sorted(leaves.keys() - given), sorted(given - leaves.keys())
    if missing or unexpected:
        raise ValueError(
            f"the parameters do not have the structure of model.params: missing {listed(missing)}; "
            f"unexpected {listed(unexpected)}"
        )


def listed(names: list[str], most: int = 20) -> str:
    """Names for an error message: the first `most` of them, and how many more there are.

    >>> listed(["a", "b", "c"], most=2)
    'a, b (and 1 more)'
    """
    rest = f" (and {len(names) - most} more)" if len(names) > most else ""
    return (", ".join(names[:most]) or "none") + rest
