"""Reading a checkpoint: from the safetensors files of a folder to a model's parameters, tensor by tensor."""

import logging
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.typing import DTypeLike

from ._assembly import place
from ._family import Architecture, Family
from ._leaves import Leaf, initial_value, listed
from ._parameters import Piece, Pieces
from ._pieces import tensor_shape
from ._quantised_leaves import all_quantised, quantised_leaf
from ._quantised_tensor import QuantisedTensor
from ._quantising import Quantise, plans_of, quantised_while_read
from ._tensors import READABLE, Tensor, equal

Item = TypeVar("Item")
Stored = Tensor | QuantisedTensor
Found = tuple[tuple[Piece, Stored], ...]
"""The pieces of a parameter, with their tensors."""

BUFFERS = ("position_ids", "token_type_ids", "rotary_emb.inv_freq")
"""Ends of names of tensors that old checkpoints hold and that no model learns."""

LEGACY = ((".gamma", ".weight"), (".beta", ".bias"))
"""Names that checkpoints converted from TensorFlow gave to the parameters of a layer norm."""

LARGE = 1 << 30
"""Bytes above which reading shows a progress bar."""

_MEND = (
    "Check that config.json and the weights belong together. If only a classification head differs, give the "
    "num_labels that it has, or ignore_mismatched_sizes=True for a new one"
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Match:
    """The pieces of each leaf (by path) with their tensors, and the leaves that none fill and that may be new."""

    found: Mapping[str, Found]
    new: tuple[Leaf, ...]


def match(
    leaves: Mapping[str, Leaf],
    tensors: Mapping[str, Stored],
    family: Family,
    architecture: Architecture,
    *,
    ignore_mismatched_sizes: bool = False,
) -> Match:
    """Find the tensors of every leaf: the first of its alternatives that the checkpoint has.

    Raises one ValueError that lists all tensors which are missing, unexpected, misshapen or of an unreadable dtype.
    """
    known = {piece.name for leaf in leaves.values() for pieces in leaf.alternatives for piece in pieces}
    tensors = _split(tensors, family.splits)
    given = _untied(_renamed(tensors, known, family, architecture), known, architecture.tied)
    chosen = {path: _oriented(path, _chosen(leaf, given), given) for path, leaf in leaves.items()}
    missing = {path: [p.name for p in pieces if p.name not in given] for path, pieces in chosen.items()}
    misshapen = {path: _misshapen(leaves[path], pieces, given) for path, pieces in chosen.items()}
    new = [path for path in leaves if missing[path] and _within(path, family.new_heads)]
    if ignore_mismatched_sizes:
        new += [path for path in leaves if misshapen[path] and _within(path, family.new_heads) and path not in new]
    wanted = {piece.name for pieces in chosen.values() for piece in pieces}
    spare = [name for name in given if name not in wanted]
    dropped = [name for name in spare if _within(name, family.heads)]
    problems = {
        "missing": [name for path in leaves if path not in new for name in missing[path]],
        "unexpected": [name for name in spare if not (name in dropped or _needless(name, family))],
        "misshapen": [text for path in leaves if path not in new for text in misshapen[path]],
        "unreadable": [
            f"{name} is stored as {tensor.dtype}, expected one of {', '.join(READABLE)}"
            for name, tensor in given.items()
            if name in wanted and tensor.dtype not in READABLE
        ],
    }
    if any(problems.values()):
        raise ValueError(_mismatch(problems, architecture.name))
    if dropped:
        logger.info("not loaded, %s has no such head: %s", architecture.name, listed(dropped))
    found = {path: tuple((p, given[p.name]) for p in pieces) for path, pieces in chosen.items() if path not in new}
    return Match(found, tuple(leaves[path] for path in new))


def _chosen(leaf: Leaf, given: Mapping[str, Stored]) -> Pieces:
    """The first of a leaf's alternatives whose tensors are all given, or else the one that comes nearest to it."""

    def distance(pieces: Pieces) -> tuple[bool, int]:
        lacking = sum(piece.name not in given for piece in pieces)
        return lacking == len(pieces), lacking  # One of which there is nothing is not what the checkpoint meant.

    return min(leaf.alternatives, key=distance)


def _oriented(path: str, pieces: Pieces, given: Mapping[str, Stored]) -> Pieces:
    """The pieces, those of quantised kernels turned to `(out, in)`, as which they are stored even for a `Conv1D`."""

    def turned(piece: Piece) -> Piece:
        quantised = isinstance(given.get(piece.name), QuantisedTensor)
        return replace(piece, axes=(1, 0)) if quantised and piece.axes == (0, 1) else piece

    return tuple(map(turned, pieces)) if path.endswith(".kernel") else pieces


def _misshapen(leaf: Leaf, pieces: Pieces, given: Mapping[str, Stored]) -> list[str]:
    expected = {piece.name: tensor_shape(piece, leaf.shape) for piece in pieces if piece.name in given}
    return [
        f"{name} {given[name].shape}, expected {shape}"
        for name, shape in expected.items()
        if given[name].shape != shape
    ]


def _mismatch(problems: Mapping[str, list[str]], name: str) -> str:
    lines = [f"  {kind} ({len(names)}): {listed(names)}" for kind, names in problems.items() if names]
    return "\n".join([f"the checkpoint does not fit {name}:", *lines, _MEND])


def _within(path: str, modules: tuple[str, ...]) -> bool:
    return not set(modules).isdisjoint(path.split("."))


def _needless(name: str, family: Family) -> bool:
    return name.endswith(BUFFERS) or any(re.search(pattern, name) for pattern in family.unused)


def _split(tensors: Mapping[str, Stored], splits: tuple[tuple[str, tuple[str, ...]], ...]) -> dict[str, Stored]:
    """The tensors; those that hold several of today's are cut into them."""
    found = dict(tensors)
    for pattern, replacements in splits:
        for name in [name for name in found if re.search(pattern, name) and found[name].dtype in READABLE]:
            tensor = found.pop(name)
            rows = tensor.shape[0] // len(replacements)
            for number, replacement in enumerate(replacements):
                found[re.sub(pattern, replacement, name)] = tensor.rows(number * rows, rows)
    return found


def _renamed(
    tensors: Mapping[str, Stored], known: set[str], family: Family, architecture: Architecture
) -> dict[str, Stored]:
    """The tensors under the names that the class would give them: old names mended, prefix added or removed."""
    modern = {name: name if name in known else _modern(name, family.renames) for name in tensors}
    prefix = family.prefix if architecture.prefix is None else architecture.prefix
    names = dict(zip(modern, _prefixed(list(modern.values()), known, prefix), strict=True))
    given: dict[str, str] = {}
    for old, new in names.items():
        if new in given:
            raise ValueError(
                f"the checkpoint holds both {given[new]} and {old}, which are two names of {new}: remove one of them"
            )
        given[new] = old
    return {new: tensors[old] for new, old in given.items()}


def _modern(name: str, renames: tuple[tuple[str, str], ...]) -> str:
    for old, new in LEGACY:
        if name.endswith(old):
            name = name.removesuffix(old) + new
    for pattern, replacement in renames:
        name = re.sub(pattern, replacement, name)
    return name


def _prefixed(names: list[str], known: set[str], prefix: str) -> list[str]:
    start = f"{prefix}."
    wants, has = (any(name.startswith(start) for name in some) for some in (known, names))
    if not prefix or wants == has:
        return names
    return [name if name in known else start + name if wants else name.removeprefix(start) for name in names]


def _untied(given: Mapping[str, Stored], known: set[str], tied: Mapping[str, str]) -> dict[str, Stored]:
    """The tensors without those that only repeat a tied weight. Raises ValueError if one is not the same weight."""
    kept = dict(given)
    for alias, source in tied.items():
        if alias in known or alias not in kept:
            continue
        repeated = kept.pop(alias)
        if source not in kept:
            kept[source] = repeated
        elif not equal(repeated, kept[source]):
            raise ValueError(
                f"config.json ties {alias} to {source}, but the checkpoint holds two different tensors: "
                "set tie_word_embeddings to false in the config"
            )
    return kept


def load(
    matched: Match,
    leaves: Mapping[str, Leaf],
    *,
    param_dtype: DTypeLike | None,
    shardings: Mapping[str, NamedSharding | None],
    rng: jax.Array,
    std: float,
    quantise: Quantise | None = None,
) -> dict[str, Any]:
    """The arrays of all leaves, by path: read one at a time, or only the parts that the devices here hold.

    `param_dtype` None keeps each tensor's dtype. `shardings` are by path; None is the default device. New heads are
    drawn from `rng` with standard deviation `std`, and a UserWarning names them. `quantise`: what makes some of
    the leaves quantised ones.
    """
    dtypes = {path: _dtype(pieces, param_dtype) for path, pieces in matched.found.items()}
    shapes = {path: jax.ShapeDtypeStruct(leaves[path].shape, dtype) for path, dtype in dtypes.items()}
    plans = {} if quantise is None else plans_of(quantise, shapes)

    def read(path: str) -> Any:
        pieces, shape, dtype = matched.found[path], leaves[path].shape, dtypes[path]
        weights, _ = all_quantised(shape, pieces)
        if weights:
            return quantised_leaf(shape, weights, dtype, shardings[path])
        if path in plans:
            return quantised_while_read(path, pieces, shape, dtype, shardings[path], plans[path])
        return place(pieces, shape, dtype, shardings[path])

    # The largest first: what reading needs besides comes on top of little that is there already.
    paths = sorted(matched.found, key=lambda path: prod(leaves[path].shape), reverse=True)
    arrays = ((path, read(path)) for path in paths)
    files = {tensor.file for pieces in matched.found.values() for _, tensor in pieces}
    large = len(files) > 1 or sum(file.stat().st_size for file in files) > LARGE
    placed = dict(_with_progress(arrays, len(paths)) if large else arrays)
    reasons = {path: all_quantised(leaves[path].shape, matched.found[path])[1] for path in leaves if path in placed}
    if dense := [f"{path} ({reason})" for path, reason in reasons.items() if reason]:
        warnings.warn(f"quantised in the checkpoint, and read as dense weights: {listed(dense)}", stacklevel=3)
    if matched.new:
        names = [piece.name for leaf in matched.new for piece in leaf.alternatives[0]]
        warnings.warn(f"not in the checkpoint, newly initialised: {listed(names)}; train them", stacklevel=3)
    dtype = param_dtype or next((placed[path].dtype for path in leaves if path in placed), jnp.float32)
    for leaf in matched.new:
        placed[leaf.path] = initial_value(leaf, rng, dtype, std, shardings[leaf.path])
    return {path: placed[path] for path in leaves}


def _dtype(pieces: Found, param_dtype: DTypeLike | None) -> jnp.dtype:
    chosen = param_dtype or _common_dtype({tensor.dtype for _, tensor in pieces})
    return jnp.dtype(jax.dtypes.canonicalize_dtype(chosen))


def _common_dtype(names: set[str]) -> Any:
    """The dtype that holds the values of all the given ones."""
    if len(names) == 1:
        return READABLE[next(iter(names))]
    return np.float64 if "F64" in names else np.float32


def _with_progress(items: Iterable[Item], total: int) -> Iterable[Item]:
    try:
        from tqdm import tqdm
    except ImportError:
        return items
    return tqdm(items, total=total, desc="Reading weights", unit="parameter")
