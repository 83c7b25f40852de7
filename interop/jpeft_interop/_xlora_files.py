"""The files of an X-LoRA adapter: its classifier in its own folder, each expert in a subfolder of that.

What PEFT writes is less than that. Its file lacks tensors of the classifier whose number is the name of an expert; the
subfolder of that expert holds them, without the number. Its subfolders hold nothing of an expert but single layers,
among leaves of the base: experts are read from where its config says that they were, as PEFT does.
"""

import dataclasses
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jpeft import PeftParams
from jpeft._params import Adapter
from jpeft._xlora import experts_of, is_router, router_among

from ._files import opened, read_tensors
from ._listed import listed
from ._pair import CONFIG_NAME, WEIGHTS_NAME, Pair

_OF_PEFT = "base_model.lora_model."
"""How keys begin in the subfolders that PEFT writes."""


def with_places(wrapped: PeftParams, names: Iterable[str], root: Path) -> PeftParams:
    """The parameters whose routers say that their experts are in the folders that they are written to.

    Warns (UserWarning) of experts with other names than PEFT computes with.
    """
    adapters = dict(wrapped.adapters)
    for name in (name for name in names if is_router(adapters[name])):
        config: Any = adapters[name].config
        if list(config.adapters) != [str(number) for number in range(len(config.adapters))]:
            warnings.warn(
                f"the experts of adapter {name!r} are called {list(config.adapters)}; PyTorch PEFT can use X-LoRA with "
                "experts called '0', '1', ... alone, and fails with these",
                stacklevel=3,
            )
        places = {expert: str(root / _inside(name, expert)) for expert in config.adapters}
        adapters[name] = dataclasses.replace(adapters[name], config=dataclasses.replace(config, adapters=places))
    return dataclasses.replace(wrapped, adapters=adapters)


def experts_to_write(wrapped: PeftParams, names: Iterable[str]) -> dict[str, tuple[str, PeftParams]]:
    """{folder: (name, parameters with this expert alone)} of the routers among the adapters that are written.

    Raises ValueError for an expert whose folder is that of an adapter that is written, too.
    """
    found: dict[str, tuple[str, PeftParams]] = {}
    chosen = list(names)
    for name in (name for name in chosen if is_router(wrapped.adapters[name])):
        for expert, adapter in experts_of(wrapped.adapters[name]).items():
            if (folder := _inside(name, expert)) in chosen:
                raise ValueError(
                    f"adapter {expert!r} and the expert of that name of {name!r} would be written to one folder; "
                    f"expected one of them: jpeft.delete_adapter(wrapped, {expert!r}), or selected_adapters"
                )
            found[folder] = (expert, dataclasses.replace(wrapped, adapters={expert: adapter}, active=()))
    return found


def _inside(name: str, expert: str) -> str:
    return expert if name == "default" else f"{name}/{expert}"


def read_router(
    wrapped: PeftParams,
    files: Pair,
    config: Any,
    adapter_name: str,
    told: bool,
    tensors: Mapping[str, np.ndarray],
    read_expert: Callable[[PeftParams, Path | str, str], PeftParams],
) -> PeftParams:
    """The parameters with the router of a folder.

    told: whether the caller gave the config, whose paths count then before the folder's own experts. tensors: of the
    file. read_expert(params, folder, name) -> the parameters with that adapter, too.
    """
    root, experts = files.weights.parent, PeftParams(wrapped.base, {}, ())
    for name, path in _in_order(config.adapters).items():
        experts = read_expert(experts, _place(root, name, path, told), name)
    router = router_among(experts, list(experts.adapters), config)
    router = filled_router(files.weights, {**_left_out(root, config), **tensors}, router)
    active = wrapped.active if wrapped.adapters else (adapter_name,)
    return dataclasses.replace(wrapped, adapters={**wrapped.adapters, adapter_name: router}, active=active)


def filled_router(path: Path, tensors: Mapping[str, Any], router: Adapter) -> Adapter:
    """A router with the classifier of a file; raises ValueError for tensors that are missing, unexpected, misshapen."""
    keys = {f"base_model.{name}": name for name in router.shared}
    shapes = {key: tuple(router.shared[name].shape) for key, name in keys.items()}
    wrong = {
        "missing": [key for key in keys if key not in tensors],
        "unexpected": [key for key in tensors if key not in keys],
        "misshapen": [
            f"{key} {tuple(tensors[key].shape)}, expected {shape}"
            for key, shape in shapes.items()
            if key in tensors and tuple(tensors[key].shape) != shape
        ],
    }
    if any(wrong.values()):
        said = "; ".join(f"{what}: {listed(names)}" for what, names in wrong.items() if names)
        raise ValueError(f"{path} does not fit the X-LoRA classifier of its config: {said}")
    return dataclasses.replace(router, shared={name: jnp.asarray(tensors[key]) for key, name in keys.items()})


def _in_order(adapters: Mapping[str, str]) -> dict[str, str]:
    # PEFT's file has them in the order of texts, "10" before "2"; the classifier counts them by number.
    names = sorted(adapters, key=int) if all(name.isdecimal() for name in adapters) else list(adapters)
    return {name: adapters[name] for name in names}


def _place(root: Path, name: str, path: str, told: bool) -> Path | str:
    inside = root / name
    if not told and (inside / CONFIG_NAME).is_file() and not _is_pefts(inside):
        return inside
    return path


def _is_pefts(folder: Path) -> bool:
    if not (folder / WEIGHTS_NAME).is_file():
        return False
    with opened(folder / WEIGHTS_NAME) as file:
        return any(key.startswith(_OF_PEFT) for key in file.keys())


def _left_out(root: Path, config: Any) -> dict[str, np.ndarray]:
    """What PEFT left out of its file of the classifier, from the subfolders of experts."""
    found: dict[str, np.ndarray] = {}
    for layer in config.layers:
        holder, _, number = layer.rpartition(".")
        folder = root / number
        if number in config.adapters and (folder / WEIGHTS_NAME).is_file() and _is_pefts(folder):
            held = read_tensors(folder / WEIGHTS_NAME)
            pairs = {f"base_model.{layer}.{array}": f"base_model.{holder}.{array}" for array in ("weight", "bias")}
            found |= {key: held[short] for key, short in pairs.items() if short in held}
    return found
