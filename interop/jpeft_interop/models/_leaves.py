"""The parameters of a model: their names here and in a checkpoint, their shapes, their initial values."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from jpeft._paths import fold_in_name

from ._layers import Initialiser, Stored


@dataclass(frozen=True)
class Leaf:
    """One parameter. `path` is its place in the tree of parameters, joined by dots."""

    path: str
    shape: tuple[int, ...]
    initial: Initialiser
    stored: Stored

    @property
    def checkpoint_name(self) -> str:
        """The key of the tensor in a checkpoint: `encoder.dense.kernel` is stored as `encoder.dense.weight`."""
        module, dot, _ = self.path.rpartition(".")
        return f"{module}{dot}{self.stored.name}"

    @property
    def checkpoint_shape(self) -> tuple[int, ...]:
        """The shape of the tensor in a checkpoint: `(out, in)` for a kernel `(in, out)`."""
        return tuple(self.shape[self.stored.axes.index(axis)] for axis in range(len(self.shape)))


def leaves_of(state: nnx.State) -> dict[str, Leaf]:
    """The parameters of a module's state, by path."""
    found = {}
    for names, variable in nnx.to_flat_state(state):
        path = ".".join(str(name) for name in names)
        metadata = variable.get_metadata()
        found[path] = Leaf(path, tuple(variable.shape), metadata["initial"], metadata["stored"])
    return found


def initial_value(leaf: Leaf, rng: jax.Array, dtype: DTypeLike, std: float) -> jax.Array:
    """A parameter's initial value; its key comes from its path, so no other parameter has a say in it."""
    return leaf.initial(fold_in_name(rng, leaf.path), leaf.shape, jnp.dtype(dtype), std)


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
