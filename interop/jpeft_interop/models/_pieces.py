"""Pieces of a parameter: where the tensors of a checkpoint lie in it, and which parts of them a device needs.

An axis of a parameter, or of a part of it, is given by the range of its positions.
"""

from collections.abc import Sequence
from math import prod
from typing import TypeVar

from jpeft._stacks import placed_layers

from ._parameters import Piece, Pieces

Item = TypeVar("Item")
Part = tuple[range, ...]


def absolute(pieces: Pieces, path: str) -> Pieces:
    """Pieces of one layer, named from its module, as pieces of the leaf at `path`, named from the model."""
    found = []
    for places, layer in placed_layers(path).items():
        module, dot, _ = layer.rpartition(".")
        found += [Piece(f"{module}{dot}{piece.name}", (*places, *piece.index), piece.axes) for piece in pieces]
    return tuple(found)


def whole_part(shape: Sequence[int]) -> Part:
    """All positions of a parameter."""
    return tuple(range(size) for size in shape)


def filled(piece: Piece, shape: Sequence[int]) -> Part:
    """The positions of a parameter of this shape that a piece fills.

    >>> filled(Piece("w3.weight", (2, slice(None), slice(4, None)), (1, 0)), (8, 3, 6))
    (range(2, 3), range(0, 3), range(4, 6))
    """
    return tuple(
        range(size)[at] if isinstance(at, slice) else range(at, at + 1)
        for size, at in zip(shape, piece.index, strict=True)
    )


def tensor_shape(piece: Piece, shape: Sequence[int]) -> tuple[int, ...]:
    """The shape of a piece's tensor, in its own order of axes.

    >>> tensor_shape(Piece("w3.weight", (2, slice(None), slice(4, None)), (1, 0)), (8, 3, 6))
    (2, 3)
    """
    return _to_tensor(piece, [len(positions) for positions in _sliced(piece, filled(piece, shape))])


def tensor_size(piece: Piece, shape: Sequence[int]) -> int:
    """The number of a piece's elements."""
    return prod(tensor_shape(piece, shape))


def overlap(piece: Piece, shape: Sequence[int], part: Part) -> tuple[tuple[slice, ...], tuple[slice | int, ...]] | None:
    """What of a piece lies in a part of its parameter: the index of its tensor, and the index of an array of the part.

    None if nothing does. `part` has no steps.

    >>> w3 = Piece("w3.weight", (2, slice(None), slice(4, None)), (1, 0))
    >>> overlap(w3, (8, 3, 6), (range(8), range(1, 3), range(6)))
    ((slice(0, 2, None), slice(1, 3, None)), (2, slice(0, 2, 1), slice(4, 6, 1)))
    """
    theirs, ours = [], []
    for positions, wanted, at in zip(filled(piece, shape), part, piece.index, strict=True):
        step = positions.step
        first = max(0, -(-(wanted.start - positions.start) // step))
        last = min(len(positions), -(-(wanted.stop - positions.start) // step))
        if first >= last:
            return None
        start = positions.start + first * step - wanted.start
        ours.append(slice(start, start + (last - first - 1) * step + 1, step) if isinstance(at, slice) else start)
        theirs.append(slice(first, last))
    return _to_tensor(piece, _sliced(piece, theirs)), tuple(ours)


def _sliced(piece: Piece, items: Sequence[Item]) -> list[Item]:
    return [item for item, at in zip(items, piece.index, strict=True) if isinstance(at, slice)]


def _to_tensor(piece: Piece, items: Sequence[Item]) -> tuple[Item, ...]:
    """Items in the order of the parameter's axes, in the order of the tensor's."""
    return tuple(items[piece.axes.index(axis)] for axis in range(len(piece.axes)))
