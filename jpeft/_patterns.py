"""How names and regular expressions select modules: PEFT's three matching rules."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ._stacks import layer_paths, spelled_layers


def checked_regex(pattern: str) -> str:
    """The pattern itself; raises ValueError if it is not a regular expression.

    >>> checked_regex(r".*\\.query")
    '.*\\\\.query'
    """
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern!r} is not a regular expression: {error}; escape its special characters") from error
    return pattern


def matches(path: str, names_or_regex: str | Sequence[str]) -> bool:
    """Whether a module is meant: by one regular expression for the whole path, or by a list of names.

    A name means the path that equals it and every path that ends in `.name`. Raises ValueError for a string
    that is not a regular expression.

    >>> matches("encoder.layer.0.query", ["query", "value"])
    True
    >>> matches("encoder.layer.0.query", "query")
    False
    """
    if isinstance(names_or_regex, str):
        return re.fullmatch(checked_regex(names_or_regex), path) is not None
    return any(path == name or path.endswith(f".{name}") for name in names_or_regex)


def key_matches(path: str, key: str) -> bool:
    """Whether a key of `rank_pattern` or `alpha_pattern` means a module; raises ValueError if it is no pattern.

    >>> key_matches("encoder.layer.0.query", "query"), key_matches("encoder.layer.0.subquery", "query")
    (True, False)
    """
    return re.match(rf"(.*\.)?({checked_regex(key)})$", path) is not None


def value_for(path: str, pattern: Mapping[str, Any], default: Any) -> Any:
    """The value of the first key of `pattern` that matches the end of the path, whole names only, or `default`.

    For a path in a stack the layers' paths count. Raises ValueError for a key that is not a regular expression, and
    for layers of one stack that have different values.

    >>> value_for("encoder.layer.11.query", {r"layer\\.1\\d\\.query": 16, "query": 4}, 8)
    16
    """

    def of_layer(layer: str) -> Any:
        return next((value for key, value in pattern.items() if key_matches(layer, key)), default)

    return same_for_layers(path, of_layer, f"the pattern {dict(pattern)!r}")


def found_in(path: str, key: str) -> bool:
    """Whether a regular expression is found anywhere in a path; raises ValueError if it is none.

    >>> found_in("encoder.layer.0.query", "er.0")
    True
    """
    return re.search(checked_regex(key), path) is not None


def search_value(path: str, pattern: Mapping[str, Any], default: Any) -> Any:
    """The value of the first key of `pattern` that is found anywhere in the path, or `default`; else as `value_for`.

    >>> search_value("encoder.layer.11.query", {r"layer\\.1": 4}, 8)
    4
    """

    def of_layer(layer: str) -> Any:
        return next((value for key, value in pattern.items() if found_in(layer, key)), default)

    return same_for_layers(path, of_layer, f"the pattern {dict(pattern)!r}")


def same_for_layers(path: str, of_layer: Callable[[str], Any], what: str) -> Any:
    """The value that a function gives each layer of a stack, or the one module that a path is otherwise.

    what: what gives the values, for the message. Raises ValueError for layers of one stack that have different values.

    >>> same_for_layers("layers.0:2.up", lambda path: path.endswith("up"), "feedforward_modules")
    True
    """
    layers = layer_paths(path) or [path]
    values = [of_layer(layer) for layer in layers]
    if any(value != values[0] for value in values):
        of = {value: [layer for layer, own in zip(layers, values, strict=True) if own == value] for value in values}
        given = "; ".join(f"{value!r} to {spelled_layers(path, own)}" for value, own in of.items())
        raise ValueError(
            f"{what} gives different values to the layers of the stack {path!r}: {given}. "
            "Layers stacked in one leaf are adapted alike: load the model with scan_layers=False, or give all layers "
            "of the stack the same value"
        )
    return values[0]
