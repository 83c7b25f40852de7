"""Layers stacked in one leaf: what the name of a stack says, its layers one by one, and put together again.

A module whose name is the slice of its layers' numbers is a stack: `layers.0:12.q_proj.kernel` of shape (12, in, out)
stands for `layers.0.q_proj.kernel` to `layers.11.q_proj.kernel`, each (in, out). Everything that is decided about a
stack is decided about its layers, by their own paths, and has to be the same for all of them.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from typing import Any, TypeVar

import numpy as np

from ._contract import STACK, Site

T = TypeVar("T")

_NUMBERS = r"(\d+):(\d+)(?::([1-9]\d*))?"
# Where such a name is a whole name of a path, or of a regular expression for paths.
_NAME = re.compile(rf"(?:^|(?<=\.)){_NUMBERS}(?=\.|\\\.|\\?$)")


def stacked_numbers(name: str) -> range | None:
    """The numbers of the layers that a module of this name stacks, or None for the name of a single module.

    >>> stacked_numbers("0:12:3"), stacked_numbers("7")
    (range(0, 12, 3), None)
    """
    found = re.fullmatch(_NUMBERS, name)
    return None if found is None else range(int(found[1]), int(found[2]), int(found[3] or 1)) or None


def layer_paths(path: str) -> list[str] | None:
    """The paths of the layers that a path in a stack stands for, or None for one that is in no stack.

    Raises ValueError for a path with two stacks.

    >>> layer_paths("layers.1:6:2.norm.scale")
    ['layers.1.norm.scale', 'layers.3.norm.scale', 'layers.5.norm.scale']
    """
    return None if _place(path) is None else list(placed_layers(path).values())


def placed_layers(path: str) -> dict[tuple[int, ...], str]:
    """The paths of the single layers that a path stands for, by their places in its stacks; `()` if it is in none.

    >>> placed_layers("layers.1:4:2.kernel"), placed_layers("norm.scale")
    ({(0,): 'layers.1.kernel', (1,): 'layers.3.kernel'}, {(): 'norm.scale'})
    """
    names = path.split(".")
    stacks = {at: numbers for at, name in enumerate(names) if (numbers := stacked_numbers(name)) is not None}
    paths = {}
    for places in product(*(range(len(numbers)) for numbers in stacks.values())):
        named = {at: str(numbers[place]) for (at, numbers), place in zip(stacks.items(), places, strict=True)}
        paths[places] = ".".join(named.get(at, name) for at, name in enumerate(names))
    return paths


def _place(path: str) -> int | None:
    # Most paths are in no stack, and this is asked of every path.
    places = [i for i, name in enumerate(path.split(".")) if stacked_numbers(name)] if ":" in path else []
    if len(places) > 1:
        raise ValueError(
            f"{path!r} has {len(places)} names that are slices of layers' numbers; expected one stack at most: stack "
            "the leaf along one axis, or give the other names that are no slices"
        )
    return places[0] if places else None


def _numbers(path: str) -> range:
    return next(numbers for numbers in map(stacked_numbers, path.split(".")) if numbers)


def _renamed(path: str, place: int, name: str) -> str:
    names = path.split(".")
    return ".".join([*names[:place], name, *names[place + 1 :]])


@dataclasses.dataclass(frozen=True)
class Layer:
    """One layer of a stacked leaf, sliced only when its values are asked for.

    stack: the path of the stacked leaf. leaf: all of it, an array or anything with shape and dtype.
    """

    stack: str
    leaf: Any
    index: int

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.leaf.shape[1:])

    @property
    def dtype(self) -> Any:
        return self.leaf.dtype

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(np.asarray(self.leaf)[self.index], dtype, copy=copy)

    def stacked_path(self, path: str) -> str:
        """The path in the stack of a module or leaf of this layer."""
        place = _place(self.stack)
        assert place is not None
        return _renamed(path, place, self.stack.split(".")[place])

    def first_path(self, path: str) -> str:
        """The path in the stack's first layer of a module or leaf of this layer."""
        place = _place(self.stack)
        assert place is not None
        return _renamed(path, place, str(_numbers(self.stack)[0]))


def unstacked(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The leaves of a tree by path, a `Layer` for each layer of a stacked one, the others as they are.

    Raises ValueError for a leaf that has not as many layers as its name says, and for a layer that is there twice.

    >>> list(unstacked({"layers.0:2.norm.scale": np.ones((2, 4)), "head.bias": np.ones(3)}))
    ['layers.0.norm.scale', 'layers.1.norm.scale', 'head.bias']
    """
    found: dict[str, Any] = {}
    for path, leaf in leaves.items():
        layers = layer_paths(path)
        if layers is not None:
            _check_size(path, leaf, len(layers))
        own = {path: leaf} if layers is None else {layer: Layer(path, leaf, i) for i, layer in enumerate(layers)}
        if twice := [layer for layer in own if layer in found]:
            raise ValueError(
                f"{path!r} holds {twice[0]!r}, which the tree holds already; expected each layer in one stack, or as "
                "a module by itself"
            )
        found.update(own)
    return found


def _check_size(path: str, leaf: Any, count: int) -> None:
    shape = getattr(leaf, "shape", None)
    if shape is not None and tuple(shape[:1]) != (count,):
        raise ValueError(
            f"the name of {path!r} says that its first axis stacks {count} layers, but its shape is {tuple(shape)}; "
            "rename the module, or stack all of its layers along the first axis"
        )


def restacked(chosen: Mapping[str, T], layers: Mapping[str, Any], what: str) -> dict[str, list[T]]:
    """{path of a leaf in the tree: what was chosen for it}, one entry, or one for each layer of a stack.

    chosen: {leaf path, layer by layer: anything}. layers: what `unstacked` gave. what: "... selects", for the message.
    Raises ValueError if only some layers of a stack are chosen.

    >>> layers = unstacked({"layers.0:2.norm.scale": np.ones((2, 4)), "head.bias": np.ones(3)})
    >>> restacked({"head.bias": 5, "layers.1.norm.scale": 4, "layers.0.norm.scale": 3}, layers, "the table names")
    {'head.bias': [5], 'layers.0:2.norm.scale': [3, 4]}
    """
    found: dict[str, list[T]] = {}
    for path in chosen:
        stack = layers[path].stack if isinstance(layers.get(path), Layer) else path
        if stack in found:
            continue
        together = layer_paths(stack) or [path]
        if absent := [layer for layer in together if layer not in chosen]:
            present = [layer for layer in together if layer in chosen]
            raise ValueError(
                f"{what} {spelled_layers(stack, present)} of the stack {stack!r}, but not "
                f"{spelled_layers(stack, absent)}; layers stacked in one leaf are adapted alike: load the model with "
                "scan_layers=False, or choose all layers of the stack"
            )
        found[stack] = [chosen[layer] for layer in together]
    return found


def spelled_layers(stack: str, layers: Iterable[str]) -> str:
    """The numbers of some layers of a stack, by their paths.

    >>> spelled_layers("layers.0:3.norm", ["layers.0.norm", "layers.2.norm"])
    'layers 0, 2'
    """
    wanted = set(layers)
    numbers = [n for n, path in zip(_numbers(stack), layer_paths(stack) or (), strict=True) if path in wanted]
    return f"layer{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"


def stacked_site(leaf: str, sites: Sequence[Site]) -> Site:
    """The one site of the sites of a leaf's layers; `leaf` is its path in the tree.

    >>> stacked_site("layers.0:2.q.kernel", [Site(f"layers.{i}.q", f"layers.{i}.q.kernel", None, "io", (4, 6), "f4")
    ...                                      for i in range(2)])
    Site(path='layers.0:2.q', leaf='layers.0:2.q.kernel', bias=None, layout='bio', shape=(2, 4, 6), dtype='f4')
    """
    first = sites[0]
    if layer_paths(leaf) is None:
        return first
    layer = Layer(leaf, None, 0)
    return Site(
        path=layer.stacked_path(first.path),
        leaf=leaf,
        bias=None if first.bias is None else layer.stacked_path(first.bias),
        layout=STACK + first.layout,
        shape=(len(sites), *first.shape),
        dtype=first.dtype,
    )


def layer_sites(site: Site) -> list[Site] | None:
    """The inverse of `stacked_site`: the sites of the layers, or None for a site in no stack."""
    paths, leaves, biases = layer_paths(site.path), layer_paths(site.leaf), layer_paths(site.bias or "")
    if paths is None or leaves is None:
        return None
    return [
        Site(path, leaf, bias, site.layout[1:], site.shape[1:], site.dtype)
        for path, leaf, bias in zip(paths, leaves, biases or [None] * len(paths), strict=True)
    ]


def spelled_out(names_or_regex: Any) -> Any:
    """Names with the paths of layers in the place of a stack's; in a regular expression, all their numbers.

    >>> spelled_out(("layers.0:2.q", "k")), spelled_out(r"layers\\.0:2\\.q")
    (('layers.0.q', 'layers.1.q', 'k'), 'layers\\\\.(?:0|1)\\\\.q')
    """
    if names_or_regex is None:
        return None
    if isinstance(names_or_regex, str):
        numbers = lambda found: stacked_numbers(found[0]) or [found[0]]  # noqa: E731
        return _NAME.sub(lambda found: f"(?:{'|'.join(map(str, numbers(found)))})", names_or_regex)
    return tuple(path for name in names_or_regex for path in layer_paths(name) or [name])
