"""What a checkpoint is of: model, adapters and arrays in words, so that another model or config is refused by name."""

import dataclasses
import enum
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from ._config import PeftConfig
from ._params import Adapter, PeftParams
from ._paths import leaves_by_path

LISTED = 8
"""Differences that a message lists; it counts the others."""

_ABOUT_FILES = ("extra", "inference_mode", "peft_version", "auto_mapping")
"""Fields of a config that say nothing of what is trained."""

_NAMES_OF_BASE = ("base_model_name_or_path", "revision")
"""Fields that count where both sides have them."""


def fingerprint(params: PeftParams, arrays: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """A JSON object that says what parameters and arrays are, without any value of theirs.

    arrays: {group: {name: leaf}} of what is stored. Works on abstract trees.

    >>> import jax.numpy as jnp
    >>> fingerprint(PeftParams({"query": {"kernel": jnp.ones((4, 6))}}, {}, ()), {})["base"]
    {'query.kernel': 'float32 (4, 6)'}
    """
    described = {
        "base": {path: kind(leaf) for path, leaf in leaves_by_path(params.base).items()},
        "adapters": {name: _described(adapter) for name, adapter in params.adapters.items()},
        "arrays": {group: {name: kind(leaf) for name, leaf in own.items()} for group, own in arrays.items()},
    }
    return json.loads(json.dumps(described, default=repr))


def kind(leaf: Any) -> str:
    """The dtype and the shape of a leaf in words.

    >>> kind(np.zeros((2, 3), np.int8)), kind(0.5)
    ('int8 (2, 3)', 'float ()')
    """
    return f"{getattr(leaf, 'dtype', type(leaf).__name__)} {tuple(np.shape(leaf))}"


def differences(saved: Mapping[str, Any], given: Mapping[str, Any]) -> list[str]:
    """How a checkpoint's fingerprint differs from that of what it is to go into, a line each; empty if it does not.

    >>> differences({"base": {"query.kernel": "float32 (4, 6)"}}, {"base": {"query.kernel": "float32 (4, 8)"}})
    ["base leaf 'query.kernel' is float32 (4, 6) in the checkpoint, float32 (4, 8) here"]
    """
    theirs, ours = _entries(saved), _entries(given)
    untouched = _untouched(saved) | _untouched(given)
    groups = saved.get("arrays", {}).keys() & given.get("arrays", {}).keys()
    found = []
    for name in [*theirs, *(name for name in ours if name not in theirs)]:
        group, field = name[0], name[-1]
        if group == "array" and name[1] not in groups:
            continue
        if field in _NAMES_OF_BASE and None in (theirs.get(name), ours.get(name)):
            continue
        if name in untouched and not (name in theirs and name in ours):
            continue  # A field that another version of this package does not have.
        if theirs.get(name, _ABSENT) != ours.get(name, _ABSENT):
            found.append(_said(name, theirs.get(name, _ABSENT), ours.get(name, _ABSENT)))
    return found


_ABSENT = object()


def listed(lines: list[str]) -> str:
    more = [f"and {len(lines) - LISTED} other differences"] if len(lines) > LISTED else []
    return "\n".join(f"  {line}" for line in [*lines[:LISTED], *more])


def _described(adapter: Adapter) -> dict[str, Any]:
    fields = _config_fields(adapter.config)
    return {
        "config": {"class": type(adapter.config).__name__, **fields},
        "untouched": [name for name, default in _defaults(adapter.config).items() if fields.get(name) == default],
        "sites": {path: f"{site.leaf} {site.layout} {site.dtype} {site.shape}" for path, site in adapter.sites.items()},
    }


def _config_fields(config: PeftConfig) -> dict[str, Any]:
    names = [field.name for field in dataclasses.fields(config) if field.name not in _ABOUT_FILES]
    return {name: _plain(getattr(config, name)) for name in names}


def _defaults(config: PeftConfig) -> dict[str, Any]:
    return {
        field.name: _plain(field.default if field.default_factory is dataclasses.MISSING else field.default_factory())
        for field in dataclasses.fields(config)
    }


def _plain(value: Any) -> Any:
    if isinstance(value, enum.Enum):
        return value.value
    if dataclasses.is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        # A list, as the order of a pattern's keys counts.
        return [[_plain(name), _plain(entry)] for name, entry in value.items()]
    return [_plain(entry) for entry in value] if isinstance(value, (list, tuple)) else value


def _entries(described: Mapping[str, Any]) -> dict[tuple[str, ...], Any]:
    """{what it is of and its name: value} of every fact of a fingerprint; what tells most comes first."""
    found: dict[tuple[str, ...], Any] = {("base leaf", path): k for path, k in described.get("base", {}).items()}
    for name, adapter in described.get("adapters", {}).items():
        found["adapter", name] = "there"
        found.update({("config of adapter", name, field): value for field, value in adapter["config"].items()})
        found.update({("site of adapter", name, path): value for path, value in adapter["sites"].items()})
    for group, own in described.get("arrays", {}).items():
        found.update({("array", group, name): value for name, value in own.items()})
    return found


def _untouched(described: Mapping[str, Any]) -> set[tuple[str, ...]]:
    """The names, as in `_entries`, of config fields that have their defaults."""
    return {
        ("config of adapter", name, field)
        for name, adapter in described.get("adapters", {}).items()
        for field in adapter["untouched"]
    }


def _said(name: tuple[str, ...], theirs: Any, ours: Any) -> str:
    what = f"{name[1]} array {name[2]}" if name[0] == "array" else f"{name[0]} {name[1]!r}"
    what += f", {name[2]}" if name[0] != "array" and len(name) > 2 else ""
    if theirs is _ABSENT:
        return f"{what} is not in the checkpoint, and here {ours}"
    if ours is _ABSENT:
        return f"{what} is {theirs} in the checkpoint, and not here"
    return f"{what} is {theirs} in the checkpoint, {ours} here"
