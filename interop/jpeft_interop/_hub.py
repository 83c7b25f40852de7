"""From what a user names an adapter by, a folder or a Hub id, to a local folder."""

import contextlib
import os
import re
import warnings
from pathlib import Path
from typing import Any, TypedDict

from jpeft._contract import method_of

from ._config_json import read_config
from ._extra_file import STATE_NAME
from ._pair import CONFIG_NAME, PICKLE_NAME, WEIGHTS_NAME

_HUB_ID = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")


class HubOptions(TypedDict, total=False):
    """Of what is fetched from the Hub: revision and subfolder of the repository, and `hf_hub_download`'s arguments."""

    revision: str | None
    subfolder: str | None
    token: str | bool | None
    cache_dir: str | os.PathLike[str] | None
    local_files_only: bool
    force_download: bool


def adapter_folder(
    name_or_path: str | os.PathLike[str],
    *,
    weights: bool = True,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
) -> Path:
    """The folder itself, or that of the adapter with this Hub id, downloaded if it is not in the cache.

    weights: whether they are wanted too, or the config alone. revision: of the Hub's repository. subfolder: in which
    the adapter is, there or here. The rest: as for `hf_hub_download`. With HF_HUB_OFFLINE=1 only the cache is used.
    Raises FileNotFoundError for what is neither a folder nor an id that can be had, ValueError for an adapter of the
    Hub whose weights are pickled, and ImportError if `huggingface_hub` is needed and not installed.
    """
    folder, name = existing_folder(name_or_path), os.fspath(name_or_path)
    if folder is not None:
        return folder if subfolder is None else folder / subfolder
    hub = hub_library(name)
    options = {
        "revision": revision, "subfolder": subfolder, "token": token, "cache_dir": cache_dir,
        "local_files_only": local_files_only or None, "force_download": force_download or None,
    }  # fmt: skip
    where = {name: value for name, value in options.items() if value is not None}
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    wanted = CONFIG_NAME
    try:
        found = Path(hub.hf_hub_download(name, CONFIG_NAME, **where)).parent
        wanted = WEIGHTS_NAME
        if not weights:
            return found
        if _keeps_more(found / CONFIG_NAME):
            with contextlib.suppress(EntryNotFoundError):
                hub.hf_hub_download(name, STATE_NAME, **where)
        return Path(hub.hf_hub_download(name, WEIGHTS_NAME, **where)).parent
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


def fetched_file(
    name_or_path: str | os.PathLike[str], filename: str, revision: str | None, subfolder: str | None
) -> Path | None:
    """A file of a Hub repository, or None if it has none; warns (UserWarning) if the Hub cannot be asked."""
    hub = hub_library(os.fspath(name_or_path))
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        return Path(hub.hf_hub_download(os.fspath(name_or_path), filename, revision=revision, subfolder=subfolder))
    except (OSError, ValueError, EntryNotFoundError) as error:
        absent = isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError)
        if not absent and not hub.constants.HF_HUB_OFFLINE:
            warnings.warn(f"the Hub could not be asked for {filename} of {name_or_path}: {error}", stacklevel=4)
        return None


def cached_file(name: str, filename: str) -> Path | None:
    """A file of a Hub repository that was fetched before, or None; nothing is fetched."""
    try:
        import huggingface_hub

        found = huggingface_hub.try_to_load_from_cache(name, filename)
    except (ImportError, ValueError):
        return None
    return Path(found) if isinstance(found, str) else None


def hub_library(name: str) -> Any:
    """`huggingface_hub`, to fetch `name` with; raises ImportError if it is not installed."""
    try:
        import huggingface_hub
    except ImportError as error:
        raise ImportError(
            f"{name!r} is no folder here; to fetch it from the Hub: pip install huggingface_hub"
        ) from error
    return huggingface_hub


def _keeps_more(config: Path) -> bool:
    """Whether the method of a config keeps arrays beside PEFT's files; False for a config that is refused later."""
    try:
        with warnings.catch_warnings(action="ignore"):  # It is read again, and warns then.
            return bool(method_of(read_config(config)).precious)
    except (TypeError, ValueError):
        return False


def _has_pickle(name: str) -> bool:
    from huggingface_hub import file_exists

    return file_exists(name, PICKLE_NAME)
