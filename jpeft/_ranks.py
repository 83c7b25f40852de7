"""Arrays of other ranks made alike: zeros beside a factor add nothing to the product, and their gradients are zero."""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

from ._contract import is_plain, method_of
from ._params import Adapter


def padded(array: Any, shape: tuple[int, ...]) -> Any:
    """The array with zeros after its entries, up to a shape that is at least as large along every axis.

    >>> padded(jnp.ones((1, 2)), (2, 2)).tolist()
    [[1.0, 1.0], [0.0, 0.0]]
    """
    if tuple(array.shape) == tuple(shape):
        return array
    if isinstance(array, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(shape, array.dtype)
    return jnp.pad(array, [(0, whole - own) for own, whole in zip(array.shape, shape, strict=True)])


def cut(array: Any, shape: tuple[int, ...]) -> Any:
    """The inverse of `padded`; axes in front of those of `shape` stay whole.

    >>> cut(jnp.ones((3, 2, 2)), (1, 2)).shape
    (3, 1, 2)
    """
    lead = tuple(array.shape[: len(array.shape) - len(shape)])
    if isinstance(array, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct((*lead, *shape), array.dtype)
    return array[(..., *(slice(0, size) for size in shape))]


def largest(shapes: Iterable[tuple[int, ...]]) -> tuple[int, ...]:
    """The smallest shape that all of them fit in; they have as many axes.

    >>> largest([(4, 6), (8, 6)])
    (8, 6)
    """
    return tuple(max(sizes) for sizes in zip(*shapes, strict=True))


def check_zeros_are_nothing(name: str, adapter: Adapter, what: str) -> None:
    """Raise ValueError unless arrays of zeros stand for no change at all, as they do for products of factors."""
    method = method_of(adapter.config)
    # Variants of a method may arrange their ranks in ways that zeros at the end do not keep.
    if method.factors is not None and not method.fixed and not adapter.shared and is_plain(method):
        return
    raise ValueError(
        f"adapter {name!r} ({type(adapter.config).__name__}) is no product of two thin factors of its own; {what} "
        "expects adapters that are, such as plain LoRA: not DoRA, nor methods that share or freeze arrays"
    )
