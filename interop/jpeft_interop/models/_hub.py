"""From what a user names a model by, a folder path or a Hub id, to a local folder."""

import re
from pathlib import Path

WANTED = ["config.json", "*.safetensors", "*.safetensors.index.json"]
"""Files of a Hub repository that are downloaded: no pickles."""

_HUB_ID = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")


def local_folder(name_or_path: str | Path, *, revision: str | None = None) -> Path:
    """The folder itself, or the snapshot of the Hub repository of that id, downloaded if it is not in the cache.

    With HF_HUB_OFFLINE=1 only the cache is used. Raises FileNotFoundError for what is neither a folder nor can be an
    id, and for an id that cannot be had; ImportError if `huggingface_hub` is needed and not installed.
    """
    folder = Path(name_or_path).expanduser()
    if folder.is_dir():
        return folder
    name = str(name_or_path)
    if not _HUB_ID.fullmatch(name):
        raise FileNotFoundError(f"there is no folder {name!r}, and this cannot be a Hub id (expected 'owner/name')")
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ImportError(
            f"{name!r} is not a folder here; to fetch it from the Hub: pip install huggingface_hub"
        ) from error
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=WANTED))
    except (OSError, ValueError) as error:
        raise FileNotFoundError(f"{name!r} is neither a folder here nor a model that the Hub gave: {error}") from error
