"""Quantising a model while it is read: one layer's weight is dense at a time, never the model."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

import jpeft
from jpeft._formats import Plan, plan_of
from jpeft._quantize import quantised_by
from jpeft._quantized import Quantized, gathered_over, is_quantized
from jpeft._stacks import placed_layers

from ._assembly import Pieced, place
from ._default_rules import FSDP
from ._leaves import flatten, nest

Quantise = Callable[[Any], Any]
"""`parameters -> the same, with quantised leaves`."""


def quantiser(given: str | Quantise | None, layouts: Mapping[str, str]) -> Quantise | None:
    """What `from_pretrained` is given to quantise by, as a function: a format of `jpeft.quantize`, or such a function.

    Raises TypeError for anything else.
    """
    if isinstance(given, str):
        return partial(jpeft.quantize, format=given, layouts=layouts)
    if given is None or callable(given):
        return given
    raise TypeError(
        f'quantize is {given!r}; expected a format of jpeft.quantize, such as "nf4", or a function of the parameters, '
        'such as functools.partial(jpeft.quantize, format="nf4", block=32)'
    )


def plans_of(quantise: Quantise, shapes: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, Plan]:
    """How each leaf that is to be quantised is, by path; of all `shapes` nothing but these is needed."""
    found = dict(flatten(quantise(nest(shapes))))
    return {path: plan_of(leaf) for path, leaf in found.items() if is_quantized(leaf)}


def quantised_while_read(
    path: str, pieces: Pieced, shape: tuple[int, ...], dtype: Any, sharding: NamedSharding | None, plan: Plan
) -> Quantized:
    """A quantised leaf: of a stack of layers one after another, if neither the file nor the mesh holds it otherwise."""
    stacked = len(next(iter(placed_layers(path))))
    apart = sharding is None or not any(sharding.spec[:stacked])
    if not stacked or not apart or not all(isinstance(at, int) for piece, _ in pieces for at in piece.index[:stacked]):
        return quantised_by(place(pieces, shape, dtype, sharding), plan, donate=True)
    counts = (plan.scale, plan.inner, plan.offset)
    if any(count[:stacked] != shape[:stacked] for count in counts if count is not None):
        return quantised_by(place(pieces, shape, dtype, sharding), plan, donate=True)
    scale, inner, offset = (None if count is None else _one(count, stacked) for count in counts)
    layer_plan = replace(plan, scale=scale, inner=inner, offset=offset)
    layers = []
    for places in placed_layers(path):
        own = tuple(
            (replace(piece, index=(*(0,) * stacked, *piece.index[stacked:])), source)
            for piece, source in pieces
            if piece.index[:stacked] == places
        )
        dense = place(own, _one(shape, stacked), dtype, sharding)
        layers.append(jax.block_until_ready(quantised_by(dense, layer_plan, donate=True)))

    def stack(*arrays: jax.Array) -> jax.Array:
        return jnp.concatenate(arrays).reshape(*shape[:stacked], *arrays[0].shape[stacked:])

    return jax.tree.map(stack, *layers)


def as_codes_between_devices(leaves: Mapping[str, Any], mesh: Mesh | None) -> dict[str, Any]:
    """The leaves, of which quantised ones on a mesh with an axis "fsdp" are brought together over it as codes."""
    axes = () if mesh is None else tuple(name for name in (FSDP,) if name in mesh.axis_names)
    return {path: gathered_over(leaf, axes) if is_quantized(leaf) else leaf for path, leaf in leaves.items()}


def _one(sizes: tuple[int, ...], stacked: int) -> tuple[int, ...]:
    return (*(1,) * stacked, *sizes[stacked:])
