"""From what a user names an adapter by, a folder or a Hub id, to a local folder."""

import os
import re
from pathlib import Path
from typing import Any

from ._pair import CONFIG_NAME, PICKLE_NAME, WEIGHTS_NAME

_HUB_ID = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")


def adapter_folder(
    name_or_path: str | os.PathLike[str],
    *,
    weights: bool = True,
    revision: str | None = None,
    subfolder: str | None = None,
) -> Path:
    """The folder itself, or that of the adapter with this Hub id, downloaded if it is not in the cache.

    weights: whether they are wanted too, or the config alone. revision: of the Hub's repository. subfolder: in which
    the adapter is, there or here. With HF_HUB_OFFLINE=1 only the cache is used.
    Raises FileNotFoundError for what is neither a folder nor an id that can be had, ValueError for an adapter of the
    Hub whose weights are pickled, and ImportError if `huggingface_hub` is needed and not installed.
    """
    folder, name = existing_folder(name_or_path), os.fspath(name_or_path)
    if folder is not None:
        return folder if subfolder is None else folder / subfolder
    hub = hub_library(name)
    where = {name: value for name, value in (("revision", revision), ("subfolder", subfolder)) if value is not None}
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    wanted = CONFIG_NAME
    try:
        found = Path(hub.hf_hub_download(name, CONFIG_NAME, **where)).parent
        wanted = WEIGHTS_NAME
        return Path(hub.hf_hub_download(name, WEIGHTS_NAME, **where)).parent if weights else found
    except EntryNotFoundError as error:
        if not isinstance(error, LocalEntryNotFoundError) and wanted == WEIGHTS_NAME and _has_pickle(name):
            raise ValueError(
                f"the adapter {name!r} on the Hub holds its weights in {PICKLE_NAME}, a pickle, which can run any "
                f"code when it is read; expected {WEIGHTS_NAME}"
            ) from error
        raise FileNotFoundError(f"{name!r} is no folder here, and the Hub gave no {wanted} for it: {error}") from error
    except (OSError, ValueError) as error:
        raise FileNotFoundError(f"{name!r} is no folder here, and the Hub gave no {wanted} for it: {error}") from error


def existing_folder(name_or_path: str | os.PathLike[str]) -> Path | None:
    """The folder of that path, or None for what can be a Hub id; raises FileNotFoundError for what is neither."""
    folder, name = Path(name_or_path).expanduser(), os.fspath(name_or_path)
    if folder.is_dir():
        return folder
    if not _HUB_ID.fullmatch(name):
        raise FileNotFoundError(f"there is no folder {name!r}, and it cannot be a Hub id, which looks like owner/name")
    return None


def hub_library(name: str) -> Any:
    """`huggingface_hub`, to fetch `name` with; raises ImportError if it is not installed."""
    try:
        import huggingface_hub
    except ImportError as error:
        raise ImportError(
            f"{name!r} is no folder here; to fetch it from the Hub: pip install huggingface_hub"
        ) from error
    return huggingface_hub


def _has_pickle(name: str) -> bool:
    from huggingface_hub import file_exists

    return file_exists(name, PICKLE_NAME)
