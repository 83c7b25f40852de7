"""A `PeftModel`'s files: adapters read for it, and written with the model card."""

import dataclasses
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Unpack

import jpeft
from jpeft import PeftParams
from jpeft._params import Adapter

from ._base_model import BaseModel
from ._card import card_tags, model_card, updated_card
from ._config_json import read_config
from ._face import Face
from ._hub import HubOptions, adapter_folder
from ._inject import autocast_adapter
from ._load import load_adapter, load_pretrained
from ._pair import find_config
from ._processes import by_one_process
from ._save import CARD_NAME, save_pretrained
from ._surplus import written_embeddings
from ._tokenizer import vocabulary_changed


def config_of(name_or_path: str | os.PathLike[str], **hub: Unpack[HubOptions]) -> jpeft.PeftConfig:
    return read_config(find_config(adapter_folder(name_or_path, weights=False, **hub)))


def loaded(
    wrapped: PeftParams,
    base: BaseModel,
    name_or_path: str | os.PathLike[str],
    adapter_name: str,
    *,
    is_trainable: bool,
    config: jpeft.PeftConfig | None,
    autocast: bool,
    key_mapping: Mapping[str, str] | None,
    ignore_mismatched_sizes: bool,
    hub: HubOptions,
) -> PeftParams:
    """The parameters with one more adapter, from a folder or the Hub; perhaps the first one."""
    folder = adapter_folder(name_or_path, **hub)
    options: dict[str, Any] = {
        "is_trainable": is_trainable,
        "layouts": base.layouts,
        "config": config,
        "key_mapping": key_mapping,
        "ignore_mismatched_sizes": ignore_mismatched_sizes,
    }
    if wrapped.adapters:
        wrapped = load_adapter(wrapped, folder, adapter_name, **options)
    else:
        wrapped = load_pretrained(wrapped.base, folder, adapter_name=adapter_name, **options)
    return autocast_adapter(wrapped, adapter_name) if autocast else wrapped


def save_face(
    face: Face,
    directory: str | os.PathLike[str],
    *,
    selected_adapters: Sequence[str] | None,
    save_embedding_layers: bool | Literal["auto"],
    initial: str | os.PathLike[str] | bool | None,
) -> None:
    """Write adapters. initial: `path_initial_model_for_weight_conversion` of `save_pretrained`, with its arguments."""
    adapters = {name: _described(adapter, face.base) for name, adapter in face.wrapped.adapters.items()}
    asked = [selected_adapters] if isinstance(selected_adapters, str) else selected_adapters
    chosen = [name for name in adapters if asked is None or name in asked]
    embeddings = sorted({leaf for name in chosen for leaf in written_embeddings(adapters[name])})
    if embeddings and save_embedding_layers == "auto":
        warnings.warn(
            f"the base weights of {', '.join(embeddings)} are saved too, as adapters act on them: "
            "save_embedding_layers is 'auto'; say True or False",
            stacklevel=3,
        )
    if save_embedding_layers == "auto" and any(chosen_in(face, adapters[name]) is True for name in chosen):
        save_embedding_layers = True
    save_pretrained(
        dataclasses.replace(face.wrapped, adapters=adapters),
        directory,
        layouts=face.base.layouts,
        selected_adapters=selected_adapters,
        save_embedding_layers=save_embedding_layers,
        path_initial_model_for_weight_conversion=initial,
    )


def chosen_in(face: Face, adapter: Adapter) -> bool | Literal["auto"]:
    """What "auto" means of the embeddings: all of them if the vocabulary has another size than the base model's.

    Warns (UserWarning) then, and if the base model's config cannot be looked at.
    """
    if written_embeddings(adapter):
        return "auto"
    name = adapter.config.base_model_name_or_path or face.base.name_or_path
    if not vocabulary_changed(face.base, name):
        return "auto"
    warnings.warn(
        f"the embeddings are saved too, as the model has {face.base.config['vocab_size']} tokens and {name!r} another "
        "number: save_embedding_layers is 'auto'; say True or False",
        stacklevel=4,
    )
    return True


def _described(adapter: Adapter, base: BaseModel) -> Adapter:
    """The adapter whose config says of which class the model is, where it does not say of which task."""
    config = adapter.config
    if config.task_type is not None or base.library is None:
        return adapter
    mapping = {"base_model_class": base.class_name, "parent_library": base.library}
    return dataclasses.replace(adapter, config=dataclasses.replace(config, auto_mapping=mapping))


def check_safe(safe_serialization: bool) -> None:
    """Raise ValueError for what would be a pickle."""
    if not safe_serialization:
        raise ValueError(
            "safe_serialization is False; expected True: a pickle can run any code when it is read, and PyTorch PEFT "
            "reads safetensors as well"
        )


def write_card(face: Face, directory: str | os.PathLike[str], task: jpeft.TaskType | None) -> None:
    """Make the folder's README.md, or bring up to date what the Hub reads in the one that is there."""
    pipeline_tag = "text-generation" if task == jpeft.TaskType.CAUSAL_LM else None
    path = Path(directory).expanduser() / CARD_NAME
    names = face.wrapped.active or tuple(face.wrapped.adapters)
    config = face.wrapped.adapters[names[0]].config
    name = face.base.name_or_path or config.base_model_name_or_path
    tags = [*card_tags(config, name), *(["transformers"] if face.base.library else [])]

    def write() -> None:
        text = path.read_text(encoding="utf-8") if path.exists() else model_card(config, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(updated_card(text, tags=tags, pipeline_tag=pipeline_tag, base_model=name), encoding="utf-8")

    by_one_process(write)
