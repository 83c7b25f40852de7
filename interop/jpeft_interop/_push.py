"""Adapters to the Hub."""

import tempfile
from collections.abc import Callable
from typing import Any, TypedDict

from ._hub import hub_library


class PushOptions(TypedDict, total=False):
    """As `push_folder` has them."""

    commit_message: str | None
    private: bool | None
    token: str | bool | None
    revision: str | None
    create_pr: bool


def push_folder(
    write: Callable[[str], None],
    repo_id: str,
    *,
    commit_message: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> Any:
    """Write files into a folder that is made for it, and upload them to the Hub; returns what the Hub says of them.

    write(folder) makes the files. repo_id: "owner/name", made if there is none, private or not. revision: the branch.
    create_pr: propose the change instead of making it. Raises ImportError without `huggingface_hub`, and its errors.
    """
    api = hub_library(repo_id).HfApi(token=token)
    with tempfile.TemporaryDirectory() as folder:
        # First, so that nothing is made on the Hub for an adapter that cannot be saved.
        write(folder)
        repository = api.create_repo(repo_id, private=private, exist_ok=True)
        return api.upload_folder(
            repo_id=repository.repo_id,
            folder_path=folder,
            commit_message=commit_message or "Upload adapter",
            revision=revision,
            create_pr=create_pr,
        )
