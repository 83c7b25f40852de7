"""Configs that select given modules: for adapters that are made from other adapters and not by `wrap`."""

import dataclasses
import re
import warnings
from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from ._config import TunerConfig
from ._contract import Site, method_of
from ._params import PeftParams
from ._paths import leaves_by_path
from ._sites import candidates
from ._stacks import layer_paths, unstacked
from ._targets import select_sites

C = TypeVar("C", bound=TunerConfig)


def paths_by_layer(sites: Mapping[str, Site]) -> list[str]:
    """The paths of adapted modules, those of a stack's layers one by one."""
    return [layer for path in sites for layer in layer_paths(path) or [path]]


def selecting(config: C, sites: Mapping[str, Site], wrapped: PeftParams) -> C:
    """The config if it selects exactly these modules of the base tree; else one that names them, path by path.

    A file's keys have to be those that its config asks for: PEFT reads no more and no less.

    >>> import jpeft
    >>> wrapped = jpeft.wrap({"q": {"kernel": jnp.ones((4, 6))}}, jpeft.LoraConfig(r=2, target_modules=["q"]))
    >>> selecting(jpeft.LoraConfig(target_modules=["k"]), wrapped.adapters["default"].sites, wrapped).target_modules
    ('q',)
    """
    wanted = paths_by_layer(sites)
    plain = {"exclude_modules": None, "layers_to_transform": None, "layers_pattern": None}
    by_name = dataclasses.replace(config, **plain, target_modules=tuple(wanted))
    # A name also means what ends in it; only a regular expression means one path and no other.
    by_regex = dataclasses.replace(config, **plain, target_modules="|".join(f"({re.escape(path)})" for path in wanted))
    leaves = unstacked(leaves_by_path(wrapped.base))
    found = candidates(leaves, {site.leaf: site.layout for site in sites.values()})
    return next((each for each in (config, by_name) if _selected(each, leaves, found) == set(wanted)), by_regex)


def _selected(config: TunerConfig, leaves: Mapping[str, Any], found: Mapping[str, Any]) -> set[str]:
    if not config.target_modules:
        return set()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return set(select_sites(leaves, found, config, method_of(config)))
        except ValueError:
            return set()


def copied(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Copies of an adapter's arrays for another adapter: whoever donates both trees may donate a buffer only once."""

    def copy(leaf: Any) -> Any:
        return leaf if isinstance(leaf, jax.ShapeDtypeStruct) else jnp.array(leaf, copy=True)

    return jax.tree.map(copy, dict(leaves))
