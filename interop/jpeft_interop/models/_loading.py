"""Reading a checkpoint: from the safetensors files of a folder to a model's parameters, tensor by tensor."""

import json
import logging
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.typing import DTypeLike
from safetensors import SafetensorError, safe_open

from ._family import Architecture, Family
from ._leaves import Leaf, initial_value, listed
from ._parameters import Piece, Pieces
from ._pieces import Part, overlap, tensor_shape, whole_part

Item = TypeVar("Item")

READABLE: Mapping[str, Any] = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16}
BUFFERS = ("position_ids", "token_type_ids", "rotary_emb.inv_freq")
"""Ends of names of tensors that old checkpoints hold and that no model learns."""

LEGACY = ((".gamma", ".weight"), (".beta", ".bias"))
"""Names that checkpoints converted from TensorFlow gave to the parameters of a layer norm."""

LARGE = 1 << 30
"""Bytes above which reading shows a progress bar."""

SLAB = 1 << 24
"""Bytes of a file that are in memory at one time."""

BLOCK = 1 << 18
"""Bytes that are transposed at one time: they fit a cache, which halves the time."""

_MEND = (
    "Check that config.json and the weights belong together. If only a classification head differs, give the "
    "num_labels that it has, or ignore_mismatched_sizes=True for a new one"
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tensor:
    """A tensor in a safetensors file: nothing of it has been read but the header. `offset` is in bytes."""

    file: Path
    offset: int
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Match:
    """The pieces of each leaf (by path) with their tensors, and the leaves that none fill and that may be new."""

    found: Mapping[str, tuple[tuple[Piece, Tensor], ...]]
    new: tuple[Leaf, ...]


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder: `model.safetensors`, or the shards that its index names.

    Raises FileNotFoundError if there are none or a shard is absent, ValueError if there are pickles only.
    """
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if index.is_file():
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        if absent := [shard for shard in shards if not (folder / shard).is_file()]:
            raise FileNotFoundError(f"{index} names shards that are not in its folder: {listed(absent)}")
        return [folder / shard for shard in shards]
    if pickles := sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern)):
        raise ValueError(
            f"{folder} holds pickled weights only ({listed(pickles)}); a pickle can run any code when it is read, so "
            "none is read here. Where you trust it: transformers.AutoModel.from_pretrained(folder)"
            ".save_pretrained(folder) writes model.safetensors"
        )
    raise FileNotFoundError(
        f"{folder} holds neither model.safetensors nor model.safetensors.index.json; other formats are not read"
    )


def _opened(file: Path) -> Any:
    try:
        return safe_open(file, framework="numpy")
    except SafetensorError as error:
        raise ValueError(
            f"{file} ({file.stat().st_size} bytes) is truncated, damaged, or no safetensors file: {error}. "
            "Copy or download it again"
        ) from error


def catalogue(files: Iterable[Path]) -> dict[str, Tensor]:
    """The tensors of some safetensors files, by name.

    Raises ValueError if a file is truncated, damaged or no safetensors file.
    """
    tensors = {}
    for file in files:
        start, header = _header(file)
        for name, entry in sorted(header.items()):
            if name != "__metadata__":
                offset = start + entry["data_offsets"][0]
                tensors[name] = Tensor(file, offset, tuple(entry["shape"]), entry["dtype"])
    return tensors


def _header(file: Path) -> tuple[int, dict[str, Any]]:
    """Where the data of a file begin, and what it says of each tensor."""
    with _opened(file), file.open("rb") as stream:  # Opening it as safetensors checks the header against the file.
        length = int.from_bytes(stream.read(8), "little")
        return 8 + length, json.loads(stream.read(length))


def match(
    leaves: Mapping[str, Leaf],
    tensors: Mapping[str, Tensor],
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
    chosen = {path: _chosen(leaf, given) for path, leaf in leaves.items()}
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


def _chosen(leaf: Leaf, given: Mapping[str, Tensor]) -> Pieces:
    """The first of a leaf's alternatives whose tensors are all given, or else the one that comes nearest to it."""

    def distance(pieces: Pieces) -> tuple[bool, int]:
        lacking = sum(piece.name not in given for piece in pieces)
        return lacking == len(pieces), lacking  # One of which there is nothing is not what the checkpoint meant.

    return min(leaf.alternatives, key=distance)


def _misshapen(leaf: Leaf, pieces: Pieces, given: Mapping[str, Tensor]) -> list[str]:
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


def _split(tensors: Mapping[str, Tensor], splits: tuple[tuple[str, tuple[str, ...]], ...]) -> dict[str, Tensor]:
    """The tensors; those that hold several of today's are cut into them."""
    found = dict(tensors)
    for pattern, replacements in splits:
        for name in [name for name in found if re.search(pattern, name) and found[name].dtype in READABLE]:
            tensor = found.pop(name)
            rows = tensor.shape[0] // len(replacements)
            size = rows * prod(tensor.shape[1:]) * jnp.dtype(READABLE[tensor.dtype]).itemsize
            for number, replacement in enumerate(replacements):
                part = Tensor(tensor.file, tensor.offset + number * size, (rows, *tensor.shape[1:]), tensor.dtype)
                found[re.sub(pattern, replacement, name)] = part
    return found


def _renamed(
    tensors: Mapping[str, Tensor], known: set[str], family: Family, architecture: Architecture
) -> dict[str, Tensor]:
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


def _untied(given: Mapping[str, Tensor], known: set[str], tied: Mapping[str, str]) -> dict[str, Tensor]:
    """The tensors without those that only repeat a tied weight. Raises ValueError if one is not the same weight."""
    kept = dict(given)
    for alias, source in tied.items():
        if alias in known or alias not in kept:
            continue
        repeated = kept.pop(alias)
        if source not in kept:
            kept[source] = repeated
        elif not _equal(repeated, kept[source]):
            raise ValueError(
                f"config.json ties {alias} to {source}, but the checkpoint holds two different tensors: "
                "set tie_word_embeddings to false in the config"
            )
    return kept


def _equal(first: Tensor, second: Tensor) -> bool:
    everything = tuple(slice(0, size) for size in first.shape)
    return first.shape == second.shape and all(
        np.array_equal(_read_block(first, slab), _read_block(second, slab)) for slab in _slabs(first, everything)
    )


def load(
    matched: Match,
    leaves: Mapping[str, Leaf],
    *,
    param_dtype: DTypeLike | None,
    shardings: Mapping[str, NamedSharding | None],
    rng: jax.Array,
    std: float,
) -> dict[str, jax.Array]:
    """The arrays of all leaves, by path: read one at a time, or only the parts that the devices here hold.

    `param_dtype` None keeps each tensor's dtype. `shardings` are by path; None is the default device. New heads are
    drawn from `rng` with standard deviation `std`, and a UserWarning names them.
    """
    # The largest first: what reading needs besides comes on top of little that is there already.
    paths = sorted(matched.found, key=lambda path: prod(leaves[path].shape), reverse=True)
    arrays = ((path, _place(matched.found[path], leaves[path], param_dtype, shardings[path])) for path in paths)
    files = {tensor.file for pieces in matched.found.values() for _, tensor in pieces}
    large = len(files) > 1 or sum(file.stat().st_size for file in files) > LARGE
    placed = dict(_with_progress(arrays, len(paths)) if large else arrays)
    if matched.new:
        names = [piece.name for leaf in matched.new for piece in leaf.alternatives[0]]
        warnings.warn(f"not in the checkpoint, newly initialised: {listed(names)}; train them", stacklevel=3)
    dtype = param_dtype or next((placed[path].dtype for path in leaves if path in placed), jnp.float32)
    for leaf in matched.new:
        placed[leaf.path] = initial_value(leaf, rng, dtype, std, shardings[leaf.path])
    return {path: placed[path] for path in leaves}


def _place(
    pieces: tuple[tuple[Piece, Tensor], ...],
    leaf: Leaf,
    param_dtype: DTypeLike | None,
    sharding: NamedSharding | None,
) -> jax.Array:
    dtype = jax.dtypes.canonicalize_dtype(param_dtype or _common_dtype({tensor.dtype for _, tensor in pieces}))
    parts: dict[Part, np.ndarray] = {}

    def read(index: Any) -> np.ndarray:
        part = tuple(range(size)[at] for size, at in zip(leaf.shape, index, strict=True))
        if part not in parts:  # Several devices may hold the same part.
            parts[part] = _assemble(pieces, leaf.shape, part, dtype)
        return parts[part]

    if sharding is None:
        array = jax.device_put(_assemble(pieces, leaf.shape, whole_part(leaf.shape), dtype))
    else:
        array = jax.make_array_from_callback(leaf.shape, sharding, read, dtype=dtype)
    # Else the buffers of many leaves would wait in the host's memory for their turn.
    return jax.block_until_ready(array)


def _common_dtype(names: set[str]) -> Any:
    """The dtype that holds the values of all the given ones."""
    if len(names) == 1:
        return READABLE[next(iter(names))]
    return np.float64 if "F64" in names else np.float32


def _assemble(
    pieces: tuple[tuple[Piece, Tensor], ...], shape: tuple[int, ...], part: Part, dtype: np.dtype
) -> np.ndarray:
    """A part of a leaf, put together from what of each tensor lies in it."""
    buffer = _aligned(tuple(len(positions) for positions in part), dtype)
    for piece, tensor in pieces:
        if (common := overlap(piece, shape, part)) is not None:
            theirs, ours = common
            _copy(tensor, theirs, buffer[(*ours, ...)].transpose(np.argsort(piece.axes)))
    return buffer


def _copy(tensor: Tensor, index: tuple[slice, ...], target: np.ndarray) -> None:
    """Write `tensor[index]` to a view of a buffer, with a cast."""
    for slab in _slabs(tensor, index):
        block = _read_block(tensor, slab)
        if not index:
            target[...] = block
            continue
        place = target[slab[0].start - index[0].start : slab[0].stop - index[0].start]
        rows = max(1, BLOCK * len(block) // max(block.nbytes, 1))
        for first in range(0, len(block), rows):
            place[first : first + rows] = block[first : first + rows]


def _slabs(tensor: Tensor, index: tuple[slice, ...]) -> Iterator[tuple[slice, ...]]:
    """An index in steps along its first axis, of which none takes more of the file than a slab."""
    if not index:
        yield index
        return
    row = prod(tensor.shape[1:]) * jnp.dtype(READABLE[tensor.dtype]).itemsize
    rows = max(1, SLAB // max(row, 1))
    for first in range(index[0].start, index[0].stop, rows):
        yield slice(first, min(first + rows, index[0].stop)), *index[1:]


def _read_block(tensor: Tensor, index: tuple[slice, ...]) -> np.ndarray:
    """`tensor[index]`: a view of the file, whose pages leave the memory with it."""
    dtype = jnp.dtype(READABLE[tensor.dtype])
    if not index or 0 in tensor.shape:
        shape, skipped = tensor.shape, 0
    else:
        shape, skipped = (index[0].stop - index[0].start, *tensor.shape[1:]), index[0].start * prod(tensor.shape[1:])
    if 0 in shape:
        return np.empty(shape, dtype)
    file = np.memmap(tensor.file, dtype, "r", tensor.offset + skipped * dtype.itemsize, shape)
    return file[(slice(None), *index[1:])] if index else file


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An empty array at an address from which JAX can take it over on CPU without a copy."""
    size, line = prod(shape) * dtype.itemsize, 64
    memory = np.empty(size + line, np.uint8)
    start = -memory.ctypes.data % line
    return memory[start : start + size].view(dtype).reshape(shape)


def _with_progress(items: Iterable[Item], total: int) -> Iterable[Item]:
    try:
        from tqdm import tqdm
    except ImportError:
        return items
    return tqdm(items, total=total, desc="Reading weights", unit="parameter")
