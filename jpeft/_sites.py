"""From a tree of leaves to the modules that a method could act on, and their canonical shapes."""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from ._contract import INPUT, OUTPUT, STACK, VOCABULARY, WINDOW, Site, is_quantised
from ._paths import BIAS_NAMES, WEIGHT_NAMES, last_name, parent
from ._patterns import checked_regex
from ._quantized import as_dense
from ._stacks import Layer

# The gains and statistics of normalisation layers; stacked over layers they have the two axes of a kernel.
NORMALIZATION_NAMES = ("scale", "offset", "gamma", "beta", "mean", "var", "average")

# Above it a leading axis of a 4-D or 5-D leaf is a stack of layers or an embedding, not a convolution's window.
LARGEST_WINDOW = 64


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A leaf that could be adapted. layout is None where the shape alone does not tell it.

    explicit: whether the layout was given rather than read off the shape.
    """

    path: str
    leaf: str
    bias: str | None
    layout: str | None
    shape: tuple[int, ...]
    dtype: str
    bias_shape: tuple[int, ...] | None
    explicit: bool = False

    @property
    def kind(self) -> str | None:
        return None if self.layout is None else self._site(self.layout).kind

    def _site(self, layout: str) -> Site:
        return Site(self.path, self.leaf, self.bias, layout, self.shape, self.dtype)

    def site(self) -> Site:
        """The site of this leaf; raises ValueError if its layout is unknown or does not fit its bias."""
        if self.layout is None:
            raise ValueError(_unknown_layout(self))
        site = self._site(self.layout)
        expected = math.prod(site.stack) * site.out_features
        if self.bias_shape is not None and math.prod(self.bias_shape) != expected:
            raise ValueError(
                f"{self.leaf!r} of shape {self.shape} has layout {self.layout!r}, so that its bias should have "
                f"{expected} entries, but {self.bias!r} has shape {self.bias_shape}: pass the right layout as "
                f"layouts={{{self.leaf!r}: ...}}"
            )
        return site


def candidates(leaves: Mapping[str, Any], layouts: Mapping[str, str] | None = None) -> dict[str, Candidate]:
    """The adaptable modules of a tree by module path, in the tree's order.

    leaves: {leaf path: array, or anything with shape and dtype}, stacks of layers taken apart by `unstacked`.
    layouts: {leaf or module path, or a regular expression that matches one in full: layout}; for a layer of a stack
    the paths in the stack and in its first layer count. Raises ValueError for a layout that does not fit its leaf.

    >>> import jax.numpy as jnp
    >>> found = candidates({"dense.kernel": jnp.ones((3, 4)), "dense.bias": jnp.ones(4)})
    >>> found["dense"].layout, found["dense"].bias
    ('io', 'dense.bias')
    """
    layouts = {} if layouts is None else layouts
    for key in layouts:
        if key not in leaves:
            checked_regex(key)
    weights: dict[str, list[str]] = {}
    for path, leaf in leaves.items():
        if len(getattr(leaf, "shape", ())) >= 2 and last_name(path) not in BIAS_NAMES + NORMALIZATION_NAMES:
            weights.setdefault(parent(path), []).append(path)
    containers = {ancestor for path in leaves for ancestor in _ancestors(parent(path))}
    found: dict[str, Candidate] = {}
    for path in leaves:
        siblings = weights.get(parent(path), [])
        if path in siblings:
            # The parameter of a module that holds other modules (a class token) is no module's one weight.
            bare = parent(path) in containers and last_name(path) not in WEIGHT_NAMES
            module = path if bare else _module(path, siblings)
            found[module] = _candidate(path, module, leaves, layouts)
    return found


def _ancestors(path: str) -> list[str]:
    names = path.split(".")
    return [".".join(names[:count]) for count in range(1, len(names))]


def _module(path: str, siblings: list[str]) -> str:
    named = [sibling for sibling in siblings if last_name(sibling) in WEIGHT_NAMES]
    alone = siblings == [path] or named == [path]
    return parent(path) if parent(path) and alone else path


def _candidate(path: str, module: str, leaves: Mapping[str, Any], layouts: Mapping[str, str]) -> Candidate:
    above, leaf = parent(path), leaves[path]
    bias = None
    if module == above or (not above and last_name(path) in WEIGHT_NAMES):
        names = (f"{above}.{name}".lstrip(".") for name in BIAS_NAMES)
        bias = next((name for name in names if hasattr(leaves.get(name), "shape")), None)
    shape = tuple(leaf.shape)
    if isinstance(leaf, Layer):
        explicit = _explicit_layout_of_layer(path, module, leaf, layouts)
    else:
        explicit = _explicit_layout(path, module, layouts)
    if explicit is not None:
        _check_layout(path, shape, explicit)
    layout = _default_layout(path, shape) if explicit is None else explicit
    bias_shape = None if bias is None else tuple(leaves[bias].shape)
    return Candidate(module, path, bias, layout, shape, str(leaf.dtype), bias_shape, explicit is not None)


def _explicit_layout(path: str, module: str, layouts: Mapping[str, str]) -> str | None:
    for name in (path, module):
        if name in layouts:
            return layouts[name]
    return next((v for k, v in layouts.items() if re.fullmatch(k, path) or re.fullmatch(k, module)), None)


def _explicit_layout_of_layer(path: str, module: str, layer: Layer, layouts: Mapping[str, str]) -> str | None:
    # One for the whole stack, with or without the letter of its first axis.
    explicit = _explicit_layout(layer.stacked_path(path), layer.stacked_path(module), layouts)
    if explicit is None:
        explicit = _explicit_layout(layer.first_path(path), layer.first_path(module), layouts)
    if isinstance(explicit, str) and len(explicit) == len(layer.shape) + 1:
        if not explicit.startswith(STACK):
            raise ValueError(
                f"layout {explicit!r} of {layer.stack!r}, whose shape is {tuple(layer.leaf.shape)}, does not begin "
                f"with {STACK!r}; expected it, for by its name the first axis is a stack of layers"
            )
        return explicit[1:]
    return explicit


def _default_layout(path: str, shape: tuple[int, ...]) -> str | None:
    if len(shape) == 2:
        return VOCABULARY + OUTPUT if "embed" in last_name(path) else INPUT + OUTPUT
    window = shape[:-2]
    if len(shape) in (4, 5) and max(window) <= LARGEST_WINDOW and "einsum" not in path:
        return WINDOW * len(window) + INPUT + OUTPUT
    return None


def _check_layout(path: str, shape: tuple[int, ...], layout: str) -> None:
    given = f"layout {layout!r} of {path!r}, whose shape is {shape},"
    if not isinstance(layout, str) or set(layout) - set(INPUT + OUTPUT + VOCABULARY + WINDOW + STACK):
        raise ValueError(f"{given} has letters other than i, o, v, b and '.'; see jpeft.wrap for their meaning")
    if len(layout) != len(shape):
        raise ValueError(f"{given} has {len(layout)} letters; expected one for each of the {len(shape)} axes")
    if OUTPUT not in layout or not (INPUT in layout or VOCABULARY in layout):
        raise ValueError(f"{given} lacks an axis; expected at least one 'o' and one 'i' (or 'v' for a lookup table)")
    if VOCABULARY in layout and (layout.count(VOCABULARY) > 1 or INPUT in layout or WINDOW in layout):
        raise ValueError(f"{given} mixes 'v' with other inputs; expected one 'v' beside 'o' and 'b' only")


def _unknown_layout(candidate: Candidate) -> str:
    guess = {3: "ioo", 4: "iboo", 5: "biioo"}.get(len(candidate.shape), "b" * (len(candidate.shape) - 2) + "io")
    return (
        f"the layout of {candidate.leaf!r} is unknown: its shape is {candidate.shape}, and which of its "
        f"{len(candidate.shape)} axes are inputs (i), outputs (o) or a stack (b) does not show. Say it in one of three "
        f"ways: wrap(..., layouts={{{candidate.leaf!r}: {guess!r}}}) with the right letters; the table of the model's "
        "family (family= in jpeft_interop); or wrap(..., layouts=jpeft.infer_layouts(apply_fn, params, *inputs))"
    )


def bias_layout(site: Site) -> str:
    """The layout of the site's bias: its axes are the weight's stack and output axes in the same order."""
    return "".join(letter for letter in site.layout if letter in STACK + OUTPUT)


def bias_sizes(site: Site) -> tuple[int, ...]:
    return tuple(size for letter, size in zip(site.layout, site.shape, strict=True) if letter in STACK + OUTPUT)


def canonical(leaf: Any, layout: str) -> jax.Array:
    """A leaf as `(*stack, in, *window, out)`: its axes sorted by role, several inputs or outputs made one.

    >>> import jax.numpy as jnp
    >>> canonical(jnp.ones((8, 3, 2, 4)), "iboo").shape
    (3, 8, 8)
    """
    array = jnp.asarray(as_dense(leaf))
    groups = _groups(layout)
    order = [axis for group in groups for axis in group]
    return array.transpose(order).reshape([math.prod(array.shape[axis] for axis in group) for group in groups])


def restored(array: jax.Array, layout: str, shape: tuple[int, ...]) -> jax.Array:
    """The inverse of `canonical`: a leaf of the given shape.

    >>> import jax.numpy as jnp
    >>> restored(jnp.ones((3, 8, 8)), "iboo", (8, 3, 2, 4)).shape
    (8, 3, 2, 4)
    """
    order = [axis for group in _groups(layout) for axis in group]
    inverse = [order.index(axis) for axis in range(len(order))]
    return array.reshape([shape[axis] for axis in order]).transpose(inverse)


def checked_weight(leaf: Any, site: Site) -> Any:
    """The leaf of a site, for a method that reads the weight; raises ValueError for a quantised one."""
    if is_quantised(leaf.dtype):
        raise ValueError(
            f"the method of {site.path!r} reads the weight, but {site.leaf!r} is quantised: its dtype is {leaf.dtype}; "
            "expected a floating-point one of 16 bits or more: wrap the tree with this weight dequantised, and then "
            "put the quantised tree in its place by dataclasses.replace(wrapped, base=quantised)"
        )
    return leaf


def _groups(layout: str) -> list[list[int]]:
    def axes(letters: str) -> list[int]:
        return [axis for axis, letter in enumerate(layout) if letter in letters]

    merged_in, merged_out = axes(INPUT + VOCABULARY), axes(OUTPUT)
    groups = [*([axis] for axis in axes(STACK)), merged_in, *([axis] for axis in axes(WINDOW)), merged_out]
    return [group for group in groups if group]
