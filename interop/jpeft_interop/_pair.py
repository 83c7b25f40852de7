"""The two files of an adapter, which change together or not at all.

A save writes both new files beside the old ones under hidden names, weights first. The moment at which the hidden
config gets its name is the commit: before it the folder holds the old adapter, after it the new one, whatever happens.
What is left is to move the new files to their places, and the next save does so if this one was killed. Readers
here look at the hidden files first. PyTorch PEFT, which does not know them, meets the old adapter or the new one, or,
killed in the midst of the moves and only if the config changed, no config at all: never one's config with the
other's weights. What is kept beside an adapter (`_extra_file.py`) comes and goes with its weights. Nothing else in the
folder is touched. One process may save to a folder at a time.
"""

import contextlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ._extra_file import NEXT_STATE, STATE_NAME, belongs, write_kept
from ._files import flush, write_tensors

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PICKLE_NAME = "adapter_model.bin"

_NEXT_CONFIG = f".{CONFIG_NAME}.next"
_NEXT_WEIGHTS = f".{WEIGHTS_NAME}.next"
_UNFINISHED = ".unfinished"


@dataclass(frozen=True)
class Pair:
    """Where the config and the weights of a folder's adapter are."""

    config: Path
    weights: Path


def find_config(folder: Path) -> Path:
    """The config of the folder's adapter; raises FileNotFoundError if there is none."""
    if (folder / _NEXT_CONFIG).is_file():
        return folder / _NEXT_CONFIG
    if (folder / CONFIG_NAME).is_file():
        return folder / CONFIG_NAME
    inside = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG_NAME}"))
    hint = f"; adapters are in its subfolders: {', '.join(inside)}" if inside else ""
    raise FileNotFoundError(f"{folder} holds no {CONFIG_NAME}, so it is not the folder of an adapter{hint}")


def find_pair(folder: Path) -> Pair:
    """Both files of the folder's adapter.

    Raises FileNotFoundError if one is absent, and ValueError if the weights are pickled.
    """
    config = find_config(folder)
    if config.name == _NEXT_CONFIG and (folder / _NEXT_WEIGHTS).is_file():
        return Pair(config, folder / _NEXT_WEIGHTS)
    if (folder / WEIGHTS_NAME).is_file():
        return Pair(config, folder / WEIGHTS_NAME)
    if (folder / PICKLE_NAME).is_file():
        raise ValueError(
            f"{folder} holds its weights in {PICKLE_NAME}, a pickle, which can run any code when it is read; expected "
            f"{WEIGHTS_NAME}. If you trust it, PyTorch PEFT converts it: load it there and call save_pretrained"
        )
    raise FileNotFoundError(f"{folder} holds {CONFIG_NAME} but no {WEIGHTS_NAME}; copy or download it again")


def is_unfinished(folder: Path) -> bool:
    """Whether a save was killed after its commit, so that PyTorch PEFT may not yet see the adapter."""
    return (folder / _NEXT_CONFIG).is_file()


def write_pair(
    folder: Path, config: str, tensors: Mapping[str, np.ndarray], kept: Mapping[str, np.ndarray] | None = None
) -> None:
    """Put a new adapter in the folder, in the place of the one that is there.

    kept: tensors for the file beside PEFT's, if there are any.
    Raises OSError if it cannot be written; then the folder holds the old adapter or the new one, whole.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _finish(folder)
    unfinished = folder / (_NEXT_CONFIG + _UNFINISHED)
    try:
        (folder / NEXT_STATE).unlink(missing_ok=True)
        write_tensors(folder / _NEXT_WEIGHTS, tensors)
        if kept:
            write_kept(folder / NEXT_STATE, kept, folder / _NEXT_WEIGHTS)
        unfinished.write_text(config, encoding="utf-8")
        flush(unfinished)
        flush(folder)
        os.replace(unfinished, folder / _NEXT_CONFIG)
        flush(folder)
        _finish(folder)
    except BaseException:
        with contextlib.suppress(OSError):
            _discard_uncommitted(folder)
            _finish(folder)
        raise


def write_if_absent(path: Path, text: str) -> None:
    """Write a text file in one step, unless there is one."""
    if path.exists():
        return
    unfinished = path.with_name(f".{path.name}{_UNFINISHED}")
    try:
        unfinished.write_text(text, encoding="utf-8")
        flush(unfinished)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def _discard_uncommitted(folder: Path) -> None:
    if not (folder / _NEXT_CONFIG).exists():
        (folder / _NEXT_WEIGHTS).unlink(missing_ok=True)
        (folder / NEXT_STATE).unlink(missing_ok=True)
        (folder / (_NEXT_CONFIG + _UNFINISHED)).unlink(missing_ok=True)


def _finish(folder: Path) -> None:
    next_config, next_weights, config = folder / _NEXT_CONFIG, folder / _NEXT_WEIGHTS, folder / CONFIG_NAME
    if not next_config.is_file():
        return
    if next_weights.is_file():
        # The old config must not be seen beside the new weights, unless it is the same.
        if config.is_file() and config.read_bytes() != next_config.read_bytes():
            config.unlink()
            flush(folder)
        os.replace(next_weights, folder / WEIGHTS_NAME)
        flush(folder)
    _finish_kept(folder)
    os.replace(next_config, config)
    flush(folder)


def _finish_kept(folder: Path) -> None:
    state = folder / STATE_NAME
    if (folder / NEXT_STATE).is_file():
        os.replace(folder / NEXT_STATE, state)
        flush(folder)
    elif state.is_file() and not _is_of(state, folder / WEIGHTS_NAME):
        state.unlink()


def _is_of(state: Path, weights: Path) -> bool:
    try:
        return belongs(state, weights)
    except ValueError:
        return False
