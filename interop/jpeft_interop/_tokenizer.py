"""What the files beside an adapter say of its vocabulary: the tokenizer's size, and that of the base model."""

import json
import os
import warnings
from pathlib import Path
from typing import Any

from ._base_model import BaseModel
from ._hub import cached_file, existing_folder, fetched_file

TOKENIZER_CONFIG, TOKENIZER = "tokenizer_config.json", "tokenizer.json"


def tokenizer_size(
    name_or_path: str | os.PathLike[str], *, revision: str | None = None, subfolder: str | None = None
) -> int | None:
    """The number of tokens of the tokenizer that was saved with an adapter; None if there is none.

    Tokens of the vocabulary and added ones, as `len(tokenizer)` counts them. Warns (UserWarning) and returns None for
    a tokenizer without a tokenizer.json, whose size only its Python class knows, and if the Hub cannot be asked.
    """
    folder = existing_folder(name_or_path)
    if folder is None:
        found = [fetched_file(name_or_path, name, revision, subfolder) for name in (TOKENIZER_CONFIG, TOKENIZER)]
    else:
        inside = folder if subfolder is None else folder / subfolder
        found = [inside / name if (inside / name).is_file() else None for name in (TOKENIZER_CONFIG, TOKENIZER)]
    config, file = found
    if config is None:
        return None
    if file is None:
        warnings.warn(
            f"{os.fspath(name_or_path)!r} has a {TOKENIZER_CONFIG} but no {TOKENIZER}, so the size of its vocabulary "
            "cannot be told and the embedding is not resized; save the tokenizer again, or resize the base model with "
            "jpeft_interop.models.resize_token_embeddings and load the adapter onto it",
            stacklevel=3,
        )
        return None
    return len(_tokens(json.loads(file.read_text("utf-8")), json.loads(config.read_text("utf-8"))))


def _tokens(tokenizer: dict[str, Any], config: dict[str, Any]) -> set[str]:
    vocabulary = tokenizer["model"]["vocab"]
    # Of a Unigram model it is a list of (token, score) pairs.
    tokens = vocabulary if isinstance(vocabulary, dict) else [token for token, _ in vocabulary]
    added = [*tokenizer.get("added_tokens", ()), *config.get("added_tokens_decoder", {}).values()]
    return {*tokens, *(token["content"] for token in added)}


def vocabulary_changed(base: BaseModel, base_model_name_or_path: str | None) -> bool:
    """Whether the model's vocabulary has another size than that of the base model's config.json.

    Only files that are here are looked at. Warns (UserWarning) if there is none; then it is taken for unchanged.
    """
    size = base.config.get("vocab_size")
    if size is None or not base_model_name_or_path:
        return False
    folder = Path(base_model_name_or_path).expanduser()
    file = folder / "config.json" if folder.is_dir() else cached_file(base_model_name_or_path, "config.json")
    if file is None or not file.is_file():
        warnings.warn(
            f"there is no config.json of the base model {base_model_name_or_path!r} here; its vocabulary is taken for "
            "unchanged, so that its embeddings are not saved: save_embedding_layers=True saves them, False is silent",
            stacklevel=3,
        )
        return False
    written = json.loads(file.read_text("utf-8")).get("vocab_size")
    return written is not None and written != size
