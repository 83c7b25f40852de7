"""The keys of `adapter_model.safetensors`, and the arrays of an adapter that they stand for."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
from jpeft._config import PeftConfig, TunerConfig
from jpeft._params import Adapter
from jpeft._paths import BIAS_NAMES, last_name, parent
from jpeft._targets import saved_modules

from ._family import Family
from ._listed import listed
from ._orientation import from_torch, refuse_stacks, to_torch, torch_layouts, torch_shape

PREFIX = "base_model.model."

# Parameters that are the weight of a small layer in PyTorch; the others are parameters of the adapted layer itself.
LAYERS = ("lora_A", "lora_B")

# PEFT writes the base weights of these too, where a list of targets names them or an expression means them.
EMBEDDINGS = ("embed_tokens", "lm_head")

_COPIES = re.compile(r"(?P<module>.+?)\.(?P<which>original_module|modules_to_save)\.(?P<rest>.+)")


@dataclass(frozen=True)
class Slot:
    """The place of one tensor in an adapter: `weights[path][name]`, `shared[name]`, or `replaced[path]`.

    shape: the tensor's, in the file. layout: how a replaced leaf is turned to have it. leaf_shape: the leaf's.
    """

    group: str
    path: str
    name: str
    shape: tuple[int, ...]
    layout: str | None = None
    leaf_shape: tuple[int, ...] = ()

    def take(self, adapter: Adapter) -> jax.Array:
        """The tensor as it is in the file."""
        if self.group == "weights":
            return adapter.weights[self.path][self.name]
        return adapter.shared[self.name] if self.group == "shared" else to_torch(adapter.replaced[self.path], self.layout)

    def turned(self, tensor: Any) -> jax.Array:
        """The array of the adapter for a tensor of a file."""
        return from_torch(tensor, self.layout, self.leaf_shape)


def slots(adapter: Adapter, leaves: Mapping[str, Any], family: Family, layouts: Mapping[str, str]) -> dict[str, Slot]:
    """{key: slot} of all the arrays that an adapter has; the adapter may be abstract.

    Raises ValueError for stacks of modules, kernels of unknown layout, and arrays that would have the same key.
    """
    refuse_stacks(path for path, site in adapter.sites.items() if site.stack)
    entries = [
        (_weight_key(family, path, name), Slot("weights", path, name, tuple(array.shape)))
        for path, arrays in adapter.weights.items()
        for name, array in arrays.items()
    ]
    entries += [
        (f"base_model.{name}", Slot("shared", "", name, tuple(array.shape))) for name, array in adapter.shared.items()
    ]
    entries += leaf_slots(adapter.replaced, adapter, leaves, family, layouts).items()
    table = dict(entries)
    if len(table) < len(entries):
        keys = [key for key, _ in entries]
        twice = [key for key in table if keys.count(key) > 1]
        raise ValueError(f"several arrays would have the same key in the file: {listed(twice)}; rename their modules")
    return table


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
    return {
        _leaf_key(family, path, adapter): Slot(
            "replaced",
            path,
            "",
            torch_shape(tuple(leaves[path].shape), leaves[path].dtype, layout),
            layout,
            tuple(leaves[path].shape),
        )
        for path, layout in found.items()
    }


def _weight_key(family: Family, path: str, name: str) -> str:
    return f"{PREFIX}{family.module(path)}.{name}{'.weight' if name in LAYERS else ''}"


def _leaf_key(family: Family, path: str, adapter: Adapter) -> str:
    module, names = parent(path), [family.leaf(last_name(path))]
    if module in adapter.sites:
        names.insert(0, "base_layer")
    if module:
        names.insert(0, family.module(module))
    return PREFIX + ".".join(names)


def written_embeddings(adapter: Adapter) -> list[str]:
    """The leaves of adapted embeddings and output layers whose base weights PEFT writes beside the adapter's."""
    targets = getattr(adapter.config, "target_modules", None) or ()
    adapted = [site for path, site in adapter.sites.items() if last_name(path) in EMBEDDINGS]
    if not isinstance(targets, str) and not any(name in targets for name in EMBEDDINGS):
        return []
    return [site.leaf for site in adapted if site.leaf not in adapter.replaced]


def possible_embeddings(leaves: Mapping[str, Any]) -> list[str]:
    """Leaves that a file may hold in full without the config saying so: PEFT writes embeddings that were resized."""
    return [
        path
        for path, leaf in leaves.items()
        if len(leaf.shape) == 2 and ("embed" in last_name(path) or last_name(parent(path)) in EMBEDDINGS)
    ]


def original_biases(config: PeftConfig, paths: Iterable[str], replaced: Iterable[str]) -> dict[str, tuple[str, str]]:
    """{leaf path: (module, rest)} for the biases of modules saved in full of which PEFT keeps the original, too.

    It does so with bias="all", which writes every tensor whose name ends in "bias".
    """
    if not isinstance(config, TunerConfig) or config.bias != "all":
        return {}
    modules = saved_modules(paths, config)
    return {
        leaf: (module, leaf[len(module) + 1 :])
        for leaf in replaced
        for module in modules
        if last_name(leaf) in BIAS_NAMES and leaf.startswith(f"{module}.")
    }


def original_key(family: Family, module: str, rest: str) -> str:
    """The key under which PEFT writes the original of a bias."""
    inner, name = parent(rest), family.leaf(last_name(rest))
    return ".".join(filter(None, [PREFIX + family.module(module), "original_module", inner, name]))


def copy_of(key: str, family: Family, expected: Iterable[str]) -> str | None:
    """The key of which this one is a second copy in the file, if it is one.

    PEFT writes the biases of a module saved in full twice when bias is "all", and tied tensors by each of their names.

    >>> from ._family import FAMILIES
    >>> keys = ["base_model.model.head.bias"]
    >>> copy_of("base_model.model.head.modules_to_save.bias", FAMILIES["hf"], keys)
    'base_model.model.head.bias'
    """
    candidates = [
        PREFIX + other
        for pair in family.tied
        for one, other in (pair, pair[::-1])
        if key == PREFIX + one
    ]
    if (found := _COPIES.fullmatch(key)) and found["which"] == "modules_to_save" and key.endswith(".bias"):
        rest = found["rest"]
        # In a module of modules the name of the adapter is still there.
        candidates += [f"{found['module']}.{rest}", f"{found['module']}.{rest.partition('.')[2]}"]
    return next((name for name in candidates if name in expected), None)
