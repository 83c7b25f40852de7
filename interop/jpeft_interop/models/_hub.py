"""From what a user names a model by, a folder path or a Hub id, to a local folder."""

from pathlib import Path

from .._hub import existing_folder, hub_library

WANTED = ["config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json"]
"""Files of a Hub repository that are downloaded: no pickles."""


def local_folder(name_or_path: str | Path, *, revision: str | None = None) -> Path:
    """The folder itself, or the snapshot of the Hub repository of that id, downloaded if it is not in the cache.

    With HF_HUB_OFFLINE=1 only the cache is used. Raises FileNotFoundError for what is neither a folder nor can be an
    id, and for an id that cannot be had; ImportError if `huggingface_hub` is needed and not installed.
    """
    folder, name = existing_folder(name_or_path), str(name_or_path)
    if folder is not None:
        return folder
    hub = hub_library(name)
    try:
        return Path(hub.snapshot_download(name, revision=revision, allow_patterns=WANTED))
    except (OSError, ValueError) as error:
        raise FileNotFoundError(f"{name!r} is neither a folder here nor a model that the Hub gave: {error}") from error
