"""The shape of a full tensor in PyTorch: (out, in, *window) where a Flax kernel is (*window, in, out)."""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jpeft._contract import STACK, VOCABULARY
from jpeft._paths import BIAS_NAMES, WEIGHT_NAMES, last_name, parent
from jpeft._sites import bias_layout, candidates, canonical, restored

from ._listed import listed


def torch_layouts(leaves: Mapping[str, Any], paths: Iterable[str], layouts: Mapping[str, str]) -> dict[str, str | None]:
    """{path: layout} for those of the tree's leaves that are to be written in full; None: shaped alike in PyTorch.

    Raises ValueError for a kernel whose layout is unknown, and for leaves that hold a stack of modules.

    >>> torch_layouts({"dense.kernel": jnp.ones((2, 3)), "norm.scale": jnp.ones(3)}, ["dense.kernel"], {})
    {'dense.kernel': 'io'}
    """
    paths = list(paths)
    modules = candidates(leaves, layouts) if paths else {}
    by_leaf = {candidate.leaf: candidate for candidate in modules.values()}
    found: dict[str, str | None] = {}
    for path in paths:
        name, candidate, module = last_name(path), by_leaf.get(path), modules.get(parent(path))
        if candidate is not None and (name in WEIGHT_NAMES or path in layouts):
            found[path] = candidate.site().layout
        elif name in BIAS_NAMES and len(leaves[path].shape) > 1:
            found[path] = STACK if module is None or module.layout is None else bias_layout(module.site())
        else:
            found[path] = None
    refuse_stacks(path for path, layout in found.items() if STACK in (layout or ""))
    return found


def refuse_stacks(paths: Iterable[str]) -> None:
    """Raise ValueError if there are any of these leaves or modules, which hold several modules of the PyTorch model."""
    paths = list(paths)
    if paths:
        raise ValueError(
            f"these hold a stack (layers, experts or fused parts), which is several modules in PyTorch: "
            f"{listed(paths)}; expected a family whose table says how the stack is taken apart, or unstacked parameters"
        )


def to_torch(leaf: Any, layout: str | None) -> jax.Array:
    """A leaf as PyTorch has it.

    >>> to_torch(jnp.ones((3, 3, 8, 4)), "..io").shape
    (4, 8, 3, 3)
    """
    if layout is None:
        return jnp.asarray(leaf)
    array = canonical(leaf, layout)
    return array if VOCABULARY in layout or array.ndim == 1 else jnp.moveaxis(array, -1, 0)


def from_torch(array: Any, layout: str | None, shape: tuple[int, ...]) -> jax.Array:
    """The inverse of `to_torch`: a leaf of the given shape.

    >>> from_torch(jnp.ones((4, 8, 3, 3)), "..io", (3, 3, 8, 4)).shape
    (3, 3, 8, 4)
    """
    array = jnp.array(array, copy=True)
    if layout is None:
        return array
    if VOCABULARY not in layout and array.ndim > 1:
        array = jnp.moveaxis(array, 0, -1)
    return restored(array, layout, shape)


def torch_shape(shape: tuple[int, ...], dtype: Any, layout: str | None) -> tuple[int, ...]:
    """The shape that `to_torch` gives, without doing it.

    >>> torch_shape((2, 3), jnp.float32, "io")
    (3, 2)
    """
    return jax.eval_shape(lambda leaf: to_torch(leaf, layout), jax.ShapeDtypeStruct(shape, dtype)).shape
