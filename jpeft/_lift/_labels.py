"""Arrays with named axes: rearranging and contracting them by name, with nothing done where nothing changes.

A label is any hashable value. A group is a tuple of labels that share one axis, major first.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax import lax

Label = Any  # hashable
Group = tuple[Label, ...]


def split(array: jax.Array, groups: Sequence[Group], sizes: Mapping[Label, int]) -> jax.Array:
    """One axis a label: the groups' axes taken apart, axes of no label removed."""
    return reshape(array, tuple(sizes[label] for group in groups for label in group))


def join(array: jax.Array, groups: Sequence[Group], sizes: Mapping[Label, int]) -> jax.Array:
    """The inverse of `split`: one axis a group; an empty group becomes an axis of size 1."""
    return reshape(array, tuple(math.prod(sizes[label] for label in group) for group in groups))


def reshape(array: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return array if array.shape == shape else lax.reshape(array, shape)


def transpose(array: jax.Array, labels: Sequence[Label], wanted: Sequence[Label]) -> jax.Array:
    """Reorder the axes of an array that has one axis a label."""
    if tuple(labels) == tuple(wanted):
        return array
    return lax.transpose(array, tuple(labels.index(label) for label in wanted))


def arrange(
    array: jax.Array, labels: Sequence[Label], groups: Sequence[Group], sizes: Mapping[Label, int]
) -> jax.Array:
    """Reorder the axes into groups and give each group one axis."""
    return join(transpose(array, labels, [label for group in groups for label in group]), groups, sizes)


def sizes_of(array: jax.Array, labels: Sequence[Label]) -> dict[Label, int]:
    return dict(zip(labels, array.shape, strict=True))


def contract(
    left: jax.Array,
    left_labels: Sequence[Label],
    right: jax.Array,
    right_labels: Sequence[Label],
    summed: Sequence[Label],
    *,
    precision: Any = None,
    out_dtype: Any = None,
) -> tuple[jax.Array, tuple[Label, ...]]:
    """Multiply over the `summed` labels; other shared labels are batch axes. Returns (array, its labels)."""
    shared = [label for label in left_labels if label in right_labels]
    batch = [label for label in shared if label not in summed]
    numbers = (_positions(left_labels, summed), _positions(right_labels, summed))
    batches = (_positions(left_labels, batch), _positions(right_labels, batch))
    rest = [label for label in (*left_labels, *right_labels) if label not in shared]
    labels = (*batch, *rest)
    product = lax.dot_general(left, right, (numbers, batches), precision=precision, preferred_element_type=out_dtype)
    return product, labels


def _positions(labels: Sequence[Label], wanted: Sequence[Label]) -> tuple[int, ...]:
    return tuple(labels.index(label) for label in wanted)
