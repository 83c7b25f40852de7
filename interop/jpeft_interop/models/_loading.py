"""Reading a checkpoint: from the safetensors files of a folder to a model's parameters, tensor by tensor."""

import json
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding
from jax.typing import DTypeLike
from safetensors import SafetensorError, safe_open

from ._family import Architecture, Family
from ._leaves import Leaf, initial_value, listed

Item = TypeVar("Item")
Shardings = Sharding | Callable[[str, tuple[int, ...]], Sharding | None] | None
"""Where parameters go: one sharding for all, or `(path, shape) -> sharding`, or None for the default device."""

READABLE = ("F64", "F32", "F16", "BF16")
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
class Tensor:
    """A tensor in a safetensors file: nothing of it has been read but the header."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Match:
    """Which tensor fills which leaf (both by path), and the leaves that none fills and that may be new."""

    found: Mapping[str, Tensor]
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
    """The tensors of some safetensors files, by name."""
    tensors = {}
    for file in files:
        with _opened(file) as handle:
            for name in sorted(handle.keys()):
                view = handle.get_slice(name)
                tensors[name] = Tensor(file, name, tuple(view.get_shape()), view.get_dtype())
    return tensors


def match(
    leaves: Mapping[str, Leaf],
    tensors: Mapping[str, Tensor],
    family: Family,
    architecture: Architecture,
    *,
    ignore_mismatched_sizes: bool = False,
) -> Match:
    """Find the tensor of every leaf.

    Raises one ValueError that lists all tensors which are missing, unexpected, misshapen or of an unreadable dtype.
    """
    wanted = {leaf.checkpoint_name: leaf for leaf in leaves.values()}
    given = _renamed(tensors, wanted, family.prefix)
    given = _untied(given, wanted, architecture.tied)
    lacking = [leaf for name, leaf in wanted.items() if name not in given]
    misshapen = [leaf for name, leaf in wanted.items() if name in given and _misshapen(leaf, given[name])]
    new = [leaf for leaf in lacking if _within(leaf.path, family.new_heads)]
    if ignore_mismatched_sizes:
        new += [leaf for leaf in misshapen if _within(leaf.path, family.new_heads)]
    dropped = [name for name in given if name not in wanted and _within(name, family.heads)]
    problems = {
        "missing": [leaf.checkpoint_name for leaf in lacking if leaf not in new],
        "unexpected": [name for name in given if not (name in wanted or name in dropped or name.endswith(BUFFERS))],
        "misshapen": [
            f"{leaf.checkpoint_name} {given[leaf.checkpoint_name].shape}, expected {leaf.checkpoint_shape}"
            for leaf in misshapen
            if leaf not in new
        ],
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
    fresh = {leaf.path for leaf in new}
    return Match({leaf.path: given[name] for name, leaf in wanted.items() if leaf.path not in fresh}, tuple(new))


def _mismatch(problems: Mapping[str, list[str]], name: str) -> str:
    lines = [f"  {kind} ({len(names)}): {listed(names)}" for kind, names in problems.items() if names]
    return "\n".join([f"the checkpoint does not fit {name}:", *lines, _MEND])


def _within(path: str, modules: tuple[str, ...]) -> bool:
    return not set(modules).isdisjoint(path.split("."))


def _misshapen(leaf: Leaf, tensor: Tensor) -> bool:
    return tensor.shape != leaf.checkpoint_shape


def _renamed(tensors: Mapping[str, Tensor], wanted: Mapping[str, Any], prefix: str) -> dict[str, Tensor]:
    """The tensors under the names that the class would give them: legacy names mended, prefix added or removed."""
    given = {name if name in wanted else _modern(name): tensor for name, tensor in tensors.items()}
    start = f"{prefix}."
    wants, has = (any(name.startswith(start) for name in names) for names in (wanted, given))
    if wants and not has:
        return {name if name in wanted else start + name: tensor for name, tensor in given.items()}
    if has and not wants:
        return {name.removeprefix(start): tensor for name, tensor in given.items()}
    return given


def _modern(name: str) -> str:
    for old, new in LEGACY:
        if name.endswith(old):
            return name.removesuffix(old) + new
    return name


def _untied(given: Mapping[str, Tensor], wanted: Mapping[str, Any], tied: Mapping[str, str]) -> dict[str, Tensor]:
    """The tensors without those that only repeat a tied weight. Raises ValueError if one is not the same weight."""
    kept = dict(given)
    for alias, source in tied.items():
        if alias in wanted or alias not in kept:
            continue
        repeated = kept.pop(alias)
        if source not in kept:
            kept[source] = repeated
        elif not np.array_equal(_read(repeated), _read(kept[source])):
            raise ValueError(
                f"config.json ties {alias} to {source}, but the checkpoint holds two different tensors: "
                "set tie_word_embeddings to false in the config"
            )
    return kept


def _read(tensor: Tensor) -> np.ndarray:
    with _opened(tensor.file) as handle:
        return handle.get_tensor(tensor.name)


def load(
    matched: Match,
    leaves: Mapping[str, Leaf],
    *,
    param_dtype: DTypeLike | None,
    shardings: Shardings,
    rng: jax.Array,
    std: float,
) -> dict[str, jax.Array]:
    """The arrays of all leaves, by path: read one at a time, or only the parts that each device holds.

    `param_dtype` None keeps each tensor's dtype. New heads are drawn from `rng` with standard deviation `std`, and
    a UserWarning names them.
    """
    by_file: dict[Path, list[Leaf]] = {}
    for path, tensor in matched.found.items():
        by_file.setdefault(tensor.file, []).append(leaves[path])

    def arrays() -> Iterator[tuple[str, jax.Array]]:
        for file in sorted(by_file):
            with _opened(file) as handle:
                for leaf in by_file[file]:
                    name = matched.found[leaf.path].name
                    yield leaf.path, _place(handle, name, leaf, param_dtype, _sharding_of(leaf, shardings))

    large = len(by_file) > 1 or sum(file.stat().st_size for file in by_file) > LARGE
    placed = dict(_with_progress(arrays(), len(matched.found)) if large else arrays())
    if matched.new:
        names = [leaf.checkpoint_name for leaf in matched.new]
        warnings.warn(f"not in the checkpoint, newly initialised: {listed(names)}; train them", stacklevel=3)
    dtype = param_dtype or next((array.dtype for array in placed.values()), jnp.float32)
    for leaf in matched.new:
        value = initial_value(leaf, rng, dtype, std)
        placed[leaf.path] = jax.device_put(value, _sharding_of(leaf, shardings))
    return {path: placed[path] for path in leaves}


def _place(handle: Any, name: str, leaf: Leaf, param_dtype: DTypeLike | None, sharding: Sharding | None) -> jax.Array:
    def ours(array: np.ndarray) -> np.ndarray:
        dtype = jax.dtypes.canonicalize_dtype(param_dtype or array.dtype)
        return array.astype(dtype, copy=False).transpose(leaf.stored.axes)

    if sharding is None:
        return jnp.asarray(ours(handle.get_tensor(name)))
    view = handle.get_slice(name)

    def part(index: Any) -> np.ndarray:
        theirs = tuple(index[leaf.stored.axes.index(axis)] for axis in range(len(index)))
        return ours(view[theirs])

    return jax.make_array_from_callback(leaf.shape, sharding, part)


def _sharding_of(leaf: Leaf, shardings: Shardings) -> Sharding | None:
    return shardings(leaf.path, leaf.shape) if callable(shardings) else shardings


def _with_progress(items: Iterable[Item], total: int) -> Iterable[Item]:
    try:
        from tqdm import tqdm
    except ImportError:
        return items
    return tqdm(items, total=total, desc="Reading weights", unit="tensor")
