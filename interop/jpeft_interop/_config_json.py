"""`adapter_config.json`: read into a config, and written from one so that PEFT has the same settings."""

import dataclasses
import enum
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jpeft
from jpeft.methods.lora import INITIALIZATIONS

from ._fields import PEFT_VERSION, Format, formats, is_replayed, stand_in

SECOND_NAMES = "jpeft_interop:second_names"
"""In `config.extra`, not in the file: {second key: key} of tensors that the file the config came from holds twice."""


def read_config(path: Path) -> jpeft.PeftConfig:
    """The config of a file; fields that only a newer PEFT knows are kept in `extra`, with a UserWarning.

    Raises ValueError for a file that is no JSON object, a method that is not implemented, settings that change what
    the adapter computes and are not implemented, all of them by name, and values out of range.
    """
    raw = _parsed(path)
    peft_type = raw.get("peft_type")
    known = formats()
    if not isinstance(peft_type, str) or peft_type not in known:
        raise ValueError(f"{path}: peft_type is {peft_type!r}; the methods implemented here are: {', '.join(known)}")
    form = known[peft_type]
    _refuse(path, raw, form)
    own = {field.name for field in dataclasses.fields(form.config)} - {"extra"}
    unknown = sorted(raw.keys() - own - form.defaults().keys())
    if unknown:
        warnings.warn(
            f"{path} has fields that PEFT {PEFT_VERSION} does not have, perhaps of a newer one: {', '.join(unknown)}; "
            "they are ignored, and written back when the adapter is saved",
            stacklevel=4,
        )
    values = {name: stand_in(name, value) for name, value in raw.items() if name in own}
    extra = {name: value for name, value in raw.items() if name not in own or values[name] != value}
    try:
        return form.config(**{**values, "peft_type": jpeft.PeftType(peft_type)}, extra=extra)
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path}: {error}") from error


def config_dict(config: jpeft.PeftConfig) -> dict[str, Any]:
    """The JSON object of a config, complete with the fields that only PEFT has.

    Raises ValueError for a config of a method that is not implemented here, and for one that uses a field that PEFT
    does not have for its method.

    >>> config_dict(jpeft.LoraConfig(r=4, target_modules=["query"]))["use_dora"]
    False
    """
    form = formats().get(getattr(config.peft_type, "value", ""))
    if form is None:
        raise ValueError(f"config is {config!r}; expected the config of one of the methods: {', '.join(formats())}")
    _refuse_what_peft_lacks(config, form)
    names = {field.name for field in dataclasses.fields(config)} - {"extra"} - form.lacks - form.unwritten
    own = {name: getattr(config, name) for name in names}
    own.update(inference_mode=True, peft_version=config.peft_version or PEFT_VERSION)
    kept = {
        name: value
        for name, value in config.extra.items()
        if name != SECOND_NAMES and (name not in own or own[name] == stand_in(name, value))
    }
    return {name: _plain(value) for name, value in {**form.defaults(), **own, **kept}.items()}


def to_json(entries: Mapping[str, Any]) -> str:
    """The text of a config file, laid out as PEFT lays it out, but for experts, whose order counts."""
    return json.dumps(_sorted(entries), indent=2, default=lambda value: value.item())


def _sorted(entries: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: _sorted(entry) if isinstance(entry := entries[name], Mapping) and name != "adapters" else entry
        for name in sorted(entries)
    }


def _parsed(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON file: {error}; copy or download it again") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{path} holds a JSON {type(raw).__name__}; expected an object with the fields of a config")
    return raw


def _refuse(path: Path, raw: Mapping[str, Any], form: Format) -> None:
    refused = [
        f"{name}={raw[name]!r} (expected {neutral[0]!r})"
        for name, neutral in form.neutral.items()
        if name in raw and raw[name] not in neutral
    ]
    if refused:
        raise ValueError(f"{path} asks for what is not implemented here: {', '.join(refused)}")
    how = raw.get("init_lora_weights", True)
    known = stand_in("init_lora_weights", how)
    if known not in INITIALIZATIONS or not is_replayed(known):
        raise ValueError(
            f"{path}: init_lora_weights is {how!r}. Expected an initialisation that leaves the base as it is, or that "
            "the base alone tells again ('pissa', 'olora'); others train an adapter for changed base weights, which "
            "the file does not hold. PyTorch PEFT makes a plain LoRA "
            "of it with save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        )


def _refuse_what_peft_lacks(config: jpeft.PeftConfig, form: Format) -> None:
    fields = {field.name: field for field in dataclasses.fields(config) if field.name in form.lacks}
    values = {name: getattr(config, name) for name, field in fields.items() if getattr(config, name) != field.default}
    used = ", ".join(f"{name}={value!r}" for name, value in values.items())
    if used:
        raise ValueError(
            f"{type(config).__name__} has {used}, which PEFT does not have for this method, so that its files cannot "
            "say it; expected the default: name the modules in target_modules instead"
        )


def _plain(value: Any) -> Any:
    if isinstance(value, enum.Enum):
        return value.value
    if dataclasses.is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {name: _plain(entry) for name, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, (list, tuple)) else value
