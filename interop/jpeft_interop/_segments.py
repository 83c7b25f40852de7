"""AdaMSS's files: the two factors of each group of outputs as tensors of their own, as PEFT has them."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jpeft

A, B, LABELS, RANKS = "adamss_A", "adamss_B", "adamss_labels", "adamss_ranks"
_PART = re.compile(rf"(?P<module>.*)\.(?P<name>{A}|{B})\.(?P<group>\d+)")


def has_segments(config: jpeft.PeftConfig) -> bool:
    return isinstance(config, jpeft.AdamssConfig)


def split(arrays: Mapping[str, Any], kept: Mapping[str, Any], config: Any) -> dict[str, Any]:
    """The tensors of a file: of each module the factors of each group, without the ranks that it does not have.

    arrays: {key: array} of a file with one array for all groups. kept: {key: array} with the groups of each module.
    """
    if not has_segments(config):
        return dict(arrays)
    found: dict[str, Any] = {}
    for key, array in arrays.items():
        module, _, name = key.rpartition(".")
        if name not in (A, B):
            found[key] = array
            continue
        ranks = np.asarray(kept[f"{module}.{RANKS}"])
        sizes = np.bincount(kept[f"{module}.{LABELS}"], minlength=len(ranks))
        parts = np.split(np.asarray(array), np.cumsum(sizes)[:-1]) if name == B else np.asarray(array)
        for group, (part, rank) in enumerate(zip(parts, ranks, strict=True)):
            own = part[:, :rank] if name == B else part[:rank]
            found[f"{key}.{group}"] = np.ascontiguousarray(own)
    return found


def joined(path: Path, tensors: Mapping[str, np.ndarray], config: Any) -> dict[str, np.ndarray]:
    """The inverse of `split`. Raises ValueError if a tensor has more ranks than the config's, or none of a matrix.

    path: the file's, for messages.
    """
    if not has_segments(config):
        return dict(tensors)
    found = {key: tensor for key, tensor in tensors.items() if not _PART.fullmatch(key)}
    for key, parts in _parts(tensors).items():
        axis, padded = (1 if key.endswith(B) else 0), []
        for tensor in parts:
            if tensor.ndim != 2 or tensor.shape[axis] > config.subspace_rank:
                raise ValueError(
                    f"{path}: {key} has a part of shape {tensor.shape}; expected a matrix of at most "
                    f"subspace_rank={config.subspace_rank} {'columns' if axis else 'rows'}"
                )
            missing = [(0, 0), (0, 0)]
            missing[axis] = (0, config.subspace_rank - tensor.shape[axis])
            padded.append(np.pad(tensor, missing))
        found[key] = np.concatenate(padded) if axis else np.stack(padded)
    return found


def check_segments(path: Path, tensors: Mapping[str, np.ndarray], kept: Mapping[str, Any], config: Any) -> None:
    """Raise ValueError if the groups of a module are not those that the file's tensors were trained for.

    kept: {key: array} with the groups of each module.
    """
    if not has_segments(config):
        return
    for key, parts in _parts(tensors).items():
        module, _, name = key.rpartition(".")
        if name != B or isinstance(kept[f"{module}.{LABELS}"], jax.ShapeDtypeStruct):
            continue
        ranks = np.asarray(kept[f"{module}.{RANKS}"]).tolist()
        sizes = np.bincount(kept[f"{module}.{LABELS}"], minlength=len(ranks)).tolist()
        given = [tensor.shape for tensor in parts]
        if given != list(zip(sizes, ranks, strict=True)):
            raise ValueError(
                f"{path}: the groups of {module} have (outputs, rank) {given}, but the base's weight gives "
                f"{list(zip(sizes, ranks, strict=True))}. Expected the base that the adapter was trained on; if it is "
                "that, the groups came out otherwise on this machine, and only the file that jpeft writes beside "
                "PEFT's tells them"
            )


def _parts(tensors: Mapping[str, np.ndarray]) -> dict[str, list[np.ndarray]]:
    """{key without the group: the tensors of its groups in order}."""
    found: dict[str, dict[int, np.ndarray]] = {}
    for key, tensor in tensors.items():
        part = _PART.fullmatch(key)
        if part is not None:
            found.setdefault(f"{part['module']}.{part['name']}", {})[int(part["group"])] = tensor
    return {key: [parts[group] for group in sorted(parts)] for key, parts in found.items()}
