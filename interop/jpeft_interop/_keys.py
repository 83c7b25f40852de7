"""The keys of `adapter_model.safetensors`, and the arrays of an adapter that they stand for."""

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jpeft._arrays import ordered_sites, shared_names
from jpeft._config import PromptLearningConfig, TunerConfig
from jpeft._contract import Site, method_of
from jpeft._order import uncertain
from jpeft._parameters import is_parameter
from jpeft._params import Adapter
from jpeft._paths import last_name, parent
from jpeft._targets import targeted_holder

from ._experts_layout import experts_from_file, experts_shape, experts_to_file, nesting
from ._family import Family
from ._fields import Format, format_of
from ._listed import listed
from ._orientation import from_torch, refuse_stacks, to_torch, torch_layouts, torch_shape

PREFIX = "base_model.model."
BARE_PREFIX = "base_model."
"""Of modules that are saved in full beside a prompt, whose own keys have no prefix at all."""

DELTA = "trainable_tokens_delta"
TOKENS = f"token_adapter.{DELTA}"
COPIES = "ln_tuning_layers"


@dataclass(frozen=True)
class Slot:
    """The place of one tensor in an adapter: `weights[path][name]`, `shared[name]`, `replaced[path]` or `rows[path]`.

    shape: the tensor's, in the file. layout: how a replaced leaf is turned to have it. leaf_shape: the leaf's.
    experts: how many of them the array stacks, if it is that of a stacked parameter. integers: the tensor's dtype, if
    it is wider than the array's.
    """

    group: str
    path: str
    name: str
    shape: tuple[int, ...]
    layout: str | None = None
    leaf_shape: tuple[int, ...] = ()
    experts: int | None = None
    integers: str | None = None

    def take(self, adapter: Adapter) -> Any:
        """The tensor as it is in the file."""
        if self.group == "weights":
            array = adapter.weights[self.path][self.name]
            return self._wide(array) if self.experts is None else experts_to_file(array, self.name)
        if self.group == "shared":
            return self._wide(adapter.shared[self.name])
        if self.group == "rows":
            return adapter.rows[self.path].values
        return to_torch(adapter.replaced[self.path], self.layout)

    def turned(self, tensor: Any) -> jax.Array:
        """The array of the adapter for a tensor of a file."""
        if self.experts is not None:
            return experts_from_file(tensor, self.name, self.experts)
        return from_torch(tensor, self.layout, self.leaf_shape)

    def _wide(self, array: Any) -> Any:
        return array if self.integers is None else np.asarray(array).astype(self.integers)


def slots(adapter: Adapter, leaves: Mapping[str, Any], family: Family, layouts: Mapping[str, str]) -> dict[str, Slot]:
    """{key: slot} of all the arrays that an adapter has; the adapter may be abstract.

    Raises ValueError for stacks of modules, kernels of unknown layout, and arrays that would have the same key.
    """
    refuse_stacks(path for path, site in adapter.sites.items() if site.stack and not _is_expert_stack(site))
    # Arrays of some methods are those of modules that they do not adapt themselves.
    holders = dict.fromkeys((*adapter.sites, *adapter.weights))
    modules = {path: family.module(path) for path in holders} | nesting(adapter.sites, family)
    method, form = method_of(adapter.config), format_of(adapter.config)
    if method.ordered(adapter.config):
        _warn_of_order(adapter)
    entries = [
        (_weight_key(modules[path], name, form), _weight_slot(path, adapter.sites, name, tuple(array.shape), form))
        for path, arrays in adapter.weights.items()
        for name, array in arrays.items()
        if method.in_files(name, adapter.config)
    ]
    entries += _shared_slots(adapter, modules, form)
    entries += [
        (
            f"{PREFIX}{family.module(part.site.path)}.{TOKENS if method.has_sites else DELTA}",
            Slot("rows", leaf, "", tuple(part.values.shape)),
        )
        for leaf, part in adapter.rows.items()
    ]
    entries += leaf_slots(adapter.replaced, adapter, leaves, family, layouts).items()
    return _table(entries)


def _warn_of_order(adapter: Adapter) -> None:
    groups = uncertain(ordered_sites(adapter.sites))
    if groups:
        name = adapter.config.peft_type
        warnings.warn(
            f"{name} goes by the order in which the PyTorch model has its modules. Their names do not tell it for "
            f"{'; '.join(listed(group) for group in groups[:3])}, which are taken to come in this order: "
            f"{listed(list(ordered_sites(adapter.sites)))}. If PyTorch has another one, the adapter means something "
            "else there",
            stacklevel=2,
        )


def _shared_slots(adapter: Adapter, modules: Mapping[str, str], form: Format) -> list[tuple[str, Slot]]:
    method, config = method_of(adapter.config), adapter.config
    used = {
        (path, name): places[0]
        for path, names in shared_names(adapter).items()
        for name, places in names.items()
        if name in form.copies | form.both and method.in_files(name, config)
    }
    entries = [(_weight_key(modules[path], name, form), place) for (path, name), place in used.items()]
    copied = {place for (_, name), place in used.items() if name in form.copies}
    prefix = "" if isinstance(config, PromptLearningConfig) else "base_model."
    entries += [
        (f"{prefix}{name}", name) for name in adapter.shared if name not in copied and method.in_files(name, config)
    ]
    return [(key, _shared_slot(place, tuple(adapter.shared[place].shape), form)) for key, place in entries]


def _shared_slot(name: str, shape: tuple[int, ...], form: Format) -> Slot:
    return Slot("shared", "", name, shape, integers=form.integers.get(name.partition(".")[0]))


def leaf_slots(
    paths: Iterable[str],
    adapter: Adapter,
    leaves: Mapping[str, Any],
    family: Family,
    layouts: Mapping[str, str],
) -> dict[str, Slot]:
    """{key: slot} of leaves of the base tree that are written in full."""
    known = {**layouts, **{site.leaf: site.layout for site in adapter.sites.values()}}
    found = torch_layouts(leaves, paths, known)
    entries = [
        (_leaf_key(family, path, adapter), _leaf_slot(path, leaves[path], layout)) for path, layout in found.items()
    ]
    return _table(entries)


def _leaf_slot(path: str, leaf: Any, layout: str | None) -> Slot:
    shape = tuple(leaf.shape)
    return Slot("replaced", path, "", torch_shape(shape, leaf.dtype, layout), layout, shape)


def _table(entries: list[tuple[str, Slot]]) -> dict[str, Slot]:
    table = dict(entries)
    if len(table) < len(entries):
        keys = [key for key, _ in entries]
        twice = [key for key in table if keys.count(key) > 1]
        raise ValueError(f"several arrays would have the same key in the file: {listed(twice)}; rename their modules")
    return table


def _is_expert_stack(site: Site) -> bool:
    return is_parameter(site) and len(site.stack) == 1


def _weight_slot(path: str, sites: Mapping[str, Site], name: str, shape: tuple[int, ...], form: Format) -> Slot:
    stack = sites[path].stack if path in sites else ()
    if not stack:
        return Slot("weights", path, name, shape, integers=form.integers.get(name))
    return Slot("weights", path, name, experts_shape(shape, name), experts=stack[0])


def _weight_key(module: str, name: str, form: Format) -> str:
    return f"{PREFIX}{module}.{name}{'.weight' if form.is_layer(name) else ''}"


def _leaf_key(family: Family, path: str, adapter: Adapter) -> str:
    config = adapter.config
    if isinstance(config, TunerConfig) and method_of(config).in_full:
        if (target := targeted_holder(path, config)) is not None:
            return f"{PREFIX}{family.module(target)}.{COPIES}.{_inside(family, path, target)}"
    module, names = parent(path), [family.leaf(last_name(path))]
    names[:0] = ["base_layer" for site in adapter.sites.values() if parent(site.leaf) == module]
    if module:
        names.insert(0, family.module(module))
    prefix = BARE_PREFIX if isinstance(config, PromptLearningConfig) else PREFIX
    return prefix + ".".join(names)


def _inside(family: Family, path: str, target: str) -> str:
    """The name of a leaf in the copy of its target; in that of a module of modules the adapter's name is left in."""
    name, module = family.leaf(last_name(path)), parent(path)
    if module == target:
        return name
    return f"default.{family.module(module).removeprefix(f'{family.module(target)}.')}.{name}"
