"""Safetensors: the one place that writes them, and that reads small ones whole."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors to a file, have it on the disk before returning, and compare what it then holds.

    metadata: what its header says besides that the tensors are in PyTorch's format.
    Raises OSError if it cannot be written or does not hold what was given.
    """
    # A transposed view must be copied: safetensors writes the memory behind a view as if it were in order.
    ordered = {name: np.array(tensor, order="C", copy=None) for name, tensor in tensors.items()}
    try:
        save_file(ordered, path, metadata={"format": "pt", **(metadata or {})})
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}") from error
    flush(path)
    with opened(path) as file:
        same = set(file.keys()) == set(ordered) and all(
            _same(file.get_tensor(name), tensor) for name, tensor in ordered.items()
        )
    if not same:
        raise OSError(f"{path} does not hold what was written to it; check the disk, and save again")


def _same(first: np.ndarray, second: np.ndarray) -> bool:
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    return np.array_equal(first.reshape(-1).view(np.uint8), second.reshape(-1).view(np.uint8))


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """Every tensor of a file, bfloat16 ones included.

    Raises ValueError if the file is truncated, damaged or no safetensors file, FileNotFoundError if there is none.
    """
    with opened(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}


def read_metadata(path: Path) -> dict[str, str]:
    """What the header of a file says besides its tensors; raises what `read_tensors` raises."""
    with opened(path) as file:
        return dict(file.metadata() or {})


def opened(path: Path) -> Any:
    """A file to read tensors from one by one; raises ValueError for one that is damaged."""
    try:
        return safe_open(path, framework="np")
    except SafetensorError as error:
        raise ValueError(
            f"{path} ({path.stat().st_size} bytes) is truncated, damaged, or no safetensors file: {error}. "
            "Copy or download it again"
        ) from error


def flush(path: Path) -> None:
    """Have a file, or a folder's list of names, on the disk and not only in the system's memory."""
    if path.is_dir() and not hasattr(os, "O_DIRECTORY"):
        return  # Windows cannot open folders, and writes their lists of names by itself.
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
