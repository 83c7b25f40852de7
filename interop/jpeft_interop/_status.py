"""How a `PeftModel` stands: `get_layer_status`, `get_model_status`, with the fields of PEFT's."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import jax
from jax.core import Tracer

import jpeft
from jpeft._config import TunerConfig
from jpeft._contract import method_of
from jpeft._params import Adapter
from jpeft._paths import parent
from jpeft._stacks import layer_paths
from jpeft._targets import module_paths, saved_modules, targeted_holder

from ._face import Face, trained

if TYPE_CHECKING:
    from ._peft_model import PeftModel

KINDS = {"linear": "Linear", "embedding": "Embedding", "convolution": "Conv{}d"}
"""What PEFT calls its layers, by what they adapt."""


@dataclass(frozen=True)
class TunerLayerStatus:
    """One adapted layer, or one module that is trained in full.

    name: as PEFT gives it, with `model.` before the module's path. devices: platforms, "abstract" of shapes alone.
    """

    name: str
    module_type: str
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, bool | Literal["irregular"]]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None


@dataclass(frozen=True)
class TunerModelStatus:
    """All of a model's layers together. requires_grad: "irregular" where an adapter trains in part."""

    base_model_type: str
    adapter_model_type: str
    peft_types: dict[str, str]
    trainable_params: int
    total_params: int
    num_adapter_layers: int
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, bool | Literal["irregular"]]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None


def get_layer_status(model: "PeftModel") -> list[TunerLayerStatus]:
    """The status of each adapted layer and of each module that is trained in full; stacked layers one by one.

    >>> import jax.numpy as jnp, jpeft
    >>> from jpeft_interop import get_peft_model
    >>> base = (lambda params, x: x @ params["q"]["kernel"], {"q": {"kernel": jnp.ones((4, 6))}})
    >>> [status.name for status in get_layer_status(get_peft_model(base, jpeft.LoraConfig(target_modules=["q"])))]
    ['model.q']
    """
    return layer_status(model.face)


def get_model_status(model: "PeftModel") -> TunerModelStatus:
    """The status of all layers together.

    >>> import jax.numpy as jnp, jpeft
    >>> from jpeft_interop import get_peft_model
    >>> base = (lambda params, x: x @ params["q"]["kernel"], {"q": {"kernel": jnp.ones((4, 6))}})
    >>> get_model_status(get_peft_model(base, jpeft.LoraConfig(target_modules=["q"]))).num_adapter_layers
    1
    """
    return model_status(model.face)


def layer_status(face: Face) -> list[TunerLayerStatus]:
    adapters = face.wrapped.adapters
    masks = jpeft.trainable_mask(trained(face)).adapters
    arrays: dict[str, dict[str, list[Any]]] = {}
    trains: dict[str, dict[str, list[bool]]] = {}
    types: dict[str, str] = {}
    for name, adapter in adapters.items():
        for (path, kind, own), (_, _, mask) in zip(_layers(adapter), _layers(adapter, masks[name]), strict=True):
            for layer in layer_paths(path) or [path]:
                types.setdefault(layer, kind)
                arrays.setdefault(layer, {})[name] = own
                trains.setdefault(layer, {})[name] = mask
    active, merged = list(face.wrapped.active), face.merged
    return [
        TunerLayerStatus(
            name=f"model.{layer}",
            module_type=types[layer],
            enabled=face.enabled,
            active_adapters=active,
            merged_adapters=[name for name in merged if name in own],
            requires_grad={name: _all_or_none(trains[layer][name]) for name in own},
            available_adapters=sorted(own),
            devices={name: _platforms(held) for name, held in own.items()},
            quantization_backend=None,
        )
        for layer, own in arrays.items()
    ]


def model_status(face: Face) -> TunerModelStatus:
    layers, configs = layer_status(face), {name: a.config for name, a in face.wrapped.adapters.items()}
    trainable, total = jpeft.count_parameters(trained(face))
    first = next(iter(configs.values()), None)
    return TunerModelStatus(
        base_model_type=face.base.class_name,
        adapter_model_type="None" if first is None else f"{type(first).__name__.removesuffix('Config')}Model",
        peft_types={name: str(getattr(config.peft_type, "value", "")) for name, config in configs.items()},
        trainable_params=trainable,
        total_params=total,
        num_adapter_layers=len(layers),
        enabled=face.enabled,
        active_adapters=list(face.wrapped.active),
        merged_adapters=sorted(face.merged),
        requires_grad={
            name: _all_or_none([s.requires_grad[name] for s in layers if name in s.requires_grad]) for name in configs
        },
        available_adapters=sorted(configs),
        devices={name: sorted({d for s in layers for d in s.devices.get(name, ())}) for name in configs},
        quantization_backend=None,
    )


def _layers(adapter: Adapter, tree: Adapter | None = None) -> list[tuple[str, str, list[Any]]]:
    """(path, kind, leaves) of each module that an adapter has arrays for; the leaves may be another tree's."""
    held = adapter if tree is None else tree
    method = str(getattr(adapter.config.peft_type, "value", "adapter")).lower()
    if method_of(adapter.config).begin is not None:
        return [*_beside(adapter, held, method), *_in_full(adapter, held.replaced)]
    found = [
        (path, f"{method}.{KINDS[site.kind].format(len(site.window))}", jax.tree.leaves(held.weights[path]))
        for path, site in adapter.sites.items()
    ]
    found += [
        (path, method, jax.tree.leaves(arrays)) for path, arrays in held.weights.items() if path not in adapter.sites
    ]
    beside = ".token_adapter" if method_of(adapter.config).has_sites else ""
    rows = [
        (f"{parent(leaf)}{beside}", "TrainableTokensLayer", jax.tree.leaves(held.rows[leaf])) for leaf in adapter.rows
    ]
    return [*found, *rows, *_in_full(adapter, held.replaced)]


def _beside(adapter: Adapter, held: Adapter, method: str) -> list[tuple[str, str, list[Any]]]:
    """The modules that a prompt, a prefix or a side network has arrays for; what is of none is a module by itself."""
    kind = f"{method}.{type(adapter.config).__name__.removesuffix('Config')}"
    own = [(path, kind, jax.tree.leaves(held.weights[path])) for path, arrays in adapter.weights.items() if arrays]
    return [*own, *([(method, kind, jax.tree.leaves(held.shared))] if adapter.shared else [])]


def _in_full(adapter: Adapter, replaced: Mapping[str, Any]) -> Iterable[tuple[str, str, list[Any]]]:
    taken: set[str] = set()
    if isinstance(adapter.config, TunerConfig) and method_of(adapter.config).in_full:
        targets = {leaf: targeted_holder(leaf, adapter.config) for leaf in replaced}
        for path in dict.fromkeys(target for target in targets.values() if target is not None):
            inside = [leaf for leaf, target in targets.items() if target == path]
            taken.update(inside)
            yield path, "ln_tuning.LNTuningLayer", [replaced[leaf] for leaf in inside]
    for path in saved_modules(module_paths(replaced, {}), adapter.config):
        inside = [leaf for leaf in replaced if leaf.startswith(f"{path}.") and leaf not in taken]
        taken.update(inside)
        if inside:
            yield path, "ModulesToSaveWrapper", [replaced[leaf] for leaf in inside]


def _all_or_none(values: Iterable[bool | Literal["irregular"]]) -> bool | Literal["irregular"]:
    found = set(values)
    return found.pop() if len(found) == 1 else "irregular" if found else False


def _platforms(arrays: Iterable[Any]) -> list[str]:
    platforms: set[str] = set()
    for array in arrays:
        if isinstance(array, jax.Array) and not isinstance(array, Tracer):
            platforms |= {device.platform for device in array.devices()}
        else:
            platforms.add("abstract" if isinstance(array, jax.ShapeDtypeStruct) else "cpu")
    return sorted(platforms)
