"""The interpreter's private value: a base weight, what its axes mean, and the methods that act on it.

It stands where the traced function has one array. Operations that only move a weight about (transposes, casts,
slices of a stack) act on it here; products consume it (`_products.py`); anything else gets the merged weight.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
from jax import lax

from .._config import FrozenMapping, PeftConfig
from .._contract import EMBEDDING, INPUT, OUTPUT, STACK, WINDOW, Method, Site, merged as one_merged, wide_dtype
from . import _labels as lab
from ._codes import densified
from ._jaxpr import unsharded

REPEATED, UNKNOWN = "n", "?"

_ROLE_NAMES = {INPUT: "input", OUTPUT: "output", STACK: "stack", WINDOW: "window", REPEATED: "repeated"}


def role_name(role: str) -> str:
    return _ROLE_NAMES.get(role, role)


# A lookup table that is trained in full. Like every adapter of a table it acts on the lookup, not on a tied output
# product: PEFT's modules_to_save leaves that with the original weight.
FULL_COPY = Method(
    config=PeftConfig,
    init=lambda key, site, config, weight: {"full": weight()},
    merge=lambda p, w, b, site: (p["full"].astype(w.dtype), b),
    forward=lambda p, x, base, site, context: base.apply(x, p["full"]),
    kinds=frozenset({EMBEDDING}),
)


class Unsupported(Exception):
    """A use that no rule covers; its text is the reason that `explain` shows."""


@dataclasses.dataclass(frozen=True, order=True)
class Axis:
    """One axis of a weight, or a part of one: its role, its place in the leaf (refined when split), its size."""

    role: str
    place: tuple[int, ...]
    size: int


RANK, KEY = "rank", "key"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Term:
    """What one adapter does to a weight.

    arrays: for a low-rank method `a` (*stack, rank, *input) and `b` (*stack, rank, *output), else the method's own
    arrays (*stack, ...); with dropout also `key`. labels: for each array a label an axis; `None` is private to it.
    stored: whether a low-rank method's arrays are still its own, of which the factors are to be made.
    """

    arrays: dict[str, jax.Array]
    labels: FrozenMapping = dataclasses.field(metadata={"static": True})
    method: Method = dataclasses.field(metadata={"static": True})
    config: Any = dataclasses.field(metadata={"static": True})
    adapter: str = dataclasses.field(metadata={"static": True})
    sites: tuple[Site, ...] = dataclasses.field(metadata={"static": True})
    stored: bool = dataclasses.field(default=False, metadata={"static": True})

    @property
    def low_rank(self) -> bool:
        return self.method.factors is not None

    @property
    def site(self) -> Site:
        return self.sites[0]

    def map_axis(self, axis: Axis, change: Callable[[jax.Array, int], jax.Array], *new: Axis) -> "Term":
        """Apply `change(array, position)` to every array that has `axis`, which becomes the axes `new`."""
        arrays, labels = dict(self.arrays), dict(self.labels)
        for name, array in self.arrays.items():
            if axis in labels[name]:
                at = labels[name].index(axis)
                arrays[name] = change(array, at)
                labels[name] = (*labels[name][:at], *new, *labels[name][at + 1 :])
        return dataclasses.replace(self, arrays=arrays, labels=FrozenMapping(labels))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AdaptedWeight:
    """A view of a base weight with the terms that act on it. axes: for each axis of `base` the axes it is made of.

    base: of a `Quantized` leaf, its `Codes`. scaled: of a leaf of bare codes, whether its scale has been applied, so
    that `base` is the weight; else None.
    """

    base: Any
    terms: tuple[Term, ...]
    axes: tuple[tuple[Axis, ...], ...] = dataclasses.field(metadata={"static": True})
    leaf: str = dataclasses.field(metadata={"static": True})
    scaled: bool | None = dataclasses.field(default=None, metadata={"static": True})

    @property
    def flat_axes(self) -> tuple[Axis, ...]:
        return tuple(axis for group in self.axes for axis in group)

    def with_base(self, base: Any, axes: Iterable[tuple[Axis, ...]] | None = None) -> "AdaptedWeight":
        return dataclasses.replace(self, base=base, axes=self.axes if axes is None else tuple(axes))

    def map_terms(self, change: Callable[[Term], Term]) -> "AdaptedWeight":
        return dataclasses.replace(self, terms=tuple(change(term) for term in self.terms))

    def single(self, position: int, why: str) -> Axis:
        """The one axis of the leaf at a position of the base; raises Unsupported if it is not one."""
        if len(self.axes[position]) != 1:
            raise Unsupported(why)
        return self.axes[position][0]


def is_adapted(value: Any) -> bool:
    return isinstance(value, AdaptedWeight)


def weight_axes(site_layout: str, shape: Sequence[int]) -> tuple[tuple[Axis, ...], ...]:
    """The axes of a leaf as its layout reads; the rows of a lookup table are its input."""
    roles = site_layout.replace("v", INPUT)
    return tuple((Axis(role, (place,), size),) for place, (role, size) in enumerate(zip(roles, shape, strict=True)))


def of_role(axes: Iterable[Axis], role: str) -> tuple[Axis, ...]:
    return tuple(sorted(axis for axis in axes if axis.role == role))


def sizes(axes: Iterable[Axis]) -> dict[lab.Label, int]:
    return {axis: axis.size for axis in axes}


def split_axis(weight: AdaptedWeight, axis: Axis, parts: Sequence[int]) -> AdaptedWeight:
    """The same weight with one axis read as several, major first."""
    new = tuple(Axis(axis.role, (*axis.place, index), size) for index, size in enumerate(parts))

    def change(array: jax.Array, at: int) -> jax.Array:
        return lab.reshape(array, (*array.shape[:at], *parts, *array.shape[at + 1 :]))

    axes = tuple(tuple(part for a in group for part in (new if a == axis else (a,))) for group in weight.axes)
    return weight.with_base(weight.base, axes).map_terms(lambda term: term.map_axis(axis, change, *new))


def narrow(weight: AdaptedWeight, axis: Axis, size: int, cut: Callable[[jax.Array, int], jax.Array]) -> AdaptedWeight:
    """The terms of a slice of `axis`, taken by `cut(array, position)`; the caller has sliced the base."""
    new = Axis(axis.role, axis.place, size)
    if axis.role in (INPUT, OUTPUT, WINDOW) and not all(term.low_rank for term in weight.terms):
        raise Unsupported("slice of an input or output axis")
    axes = tuple(tuple(new if a == axis else a for a in group) for group in weight.axes)
    return weight.with_base(weight.base, axes).map_terms(lambda term: term.map_axis(axis, cut, new))


def drop(weight: AdaptedWeight, axis: Axis) -> AdaptedWeight:
    """The terms of a weight whose axis of size 1 is gone from the base."""
    return weight.map_terms(lambda term: term.map_axis(axis, lambda array, at: lax.squeeze(array, (at,))))


def check_scaled(weight: AdaptedWeight, used_by: str) -> None:
    """Raise ValueError if the weight is still the codes of a quantised leaf: adapters act on what codes stand for."""
    if weight.scaled is False and weight.terms:
        raise ValueError(
            f"{weight.leaf!r} is quantised and used by {used_by} before its scale is applied, so that its adapter "
            "would be scaled, too; expected it dequantised first, as in `x @ (kernel.astype(x.dtype) * scale)` (a zero "
            "point is subtracted before; without a scale, multiply by 1)"
        )


def materialize(weight: AdaptedWeight) -> jax.Array:
    """The merged weight, in the dtype and the view of the base; computed in float32 at least."""
    weight = densified(weight)
    if not weight.terms:
        return weight.base
    check_scaled(weight, "a function with derivatives of its own")
    return unsharded(_merged, weight.base)(weight)


def _merged(weight: AdaptedWeight) -> jax.Array:
    flat = weight.flat_axes
    stack = tuple(sorted(axis for axis in flat if axis.role in (STACK, REPEATED)))
    inputs, window, outputs = (of_role(flat, role) for role in (INPUT, WINDOW, OUTPUT))
    groups = [*((axis,) for axis in stack), inputs, *((axis,) for axis in window), outputs]
    merged = lab.arrange(lab.split(weight.base, weight.axes, sizes(flat)), flat, groups, sizes(flat))
    wide = wide_dtype(weight.base.dtype)
    own = merged = merged.astype(wide)
    for term in weight.terms:
        if term.low_rank:
            merged = _merge_low_rank(merged, term, stack, inputs, window, outputs)
        else:
            merged = _merge_general(merged, own, term, stack)
    order = [axis for group in groups for axis in group]
    split = lab.transpose(lab.split(merged, groups, sizes(flat)), order, flat)
    return lab.join(split, weight.axes, sizes(flat)).astype(weight.base.dtype)


def _merge_low_rank(
    merged: jax.Array,
    term: Term,
    stack: tuple[Axis, ...],
    inputs: tuple[Axis, ...],
    window: tuple[Axis, ...],
    outputs: tuple[Axis, ...],
) -> jax.Array:
    a, b = (term.arrays[name].astype(merged.dtype) for name in "ab")
    change, labels = lab.contract(a, term.labels["a"], b, term.labels["b"], [RANK])
    own = [axis for axis in stack if axis in labels]
    known = dict(zip(labels, change.shape, strict=True))
    # A repeated weight has axes that its factors lack: they broadcast.
    groups = [*((axis,) if axis in own else () for axis in stack), inputs, *((axis,) for axis in window), outputs]
    return merged + lab.arrange(change, labels, groups, known)


def _merge_general(merged: jax.Array, own: jax.Array, term: Term, stack: tuple[Axis, ...]) -> jax.Array:
    def one(arrays: dict[str, jax.Array], w: jax.Array, base: jax.Array) -> jax.Array:
        p = {**arrays, "base": base} if term.method.needs_base else arrays
        return one_merged(term.method, term.config, p, w, None, term.site)[0]

    function, arrays = over_stack(one, term, stack, ((0,) * len(stack), (0,) * len(stack)))
    return function(arrays, merged, own)


def over_stack(
    function: Callable[..., Any], term: Term, stack: Sequence[Axis], in_axes: Sequence[Sequence[int | None]]
) -> tuple[Callable[..., Any], dict[str, jax.Array]]:
    """Map `function(arrays of one module, *others)` over stack axes, the first one outermost.

    in_axes: for each other argument, for each stack axis, where it stands (leading axes: 0) or None.
    """
    arrays, orders = {}, {}
    for name, array in term.arrays.items():
        labels = term.labels[name]
        own = [axis for axis in stack if axis in labels]
        private = [index for index, label in enumerate(labels) if label not in own]
        arrays[name] = lax.transpose(array, (*(labels.index(axis) for axis in own), *private))
        orders[name] = own
    for depth in reversed(range(len(stack))):
        own_axes = {name: 0 if stack[depth] in orders[name] else None for name in arrays}
        function = jax.vmap(function, in_axes=(own_axes, *(places[depth] for places in in_axes)))
    return function, arrays
