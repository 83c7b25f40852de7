"""Adapters that start from factors taken out of the base: made plain LoRA for files that everyone reads."""

import dataclasses
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jpeft import PeftParams
from jpeft._conversion import keeps_initial_values, plain_lora
from jpeft._low_rank import is_plain_lora
from jpeft._params import Adapter
from jpeft._paths import leaves_by_path
from jpeft._stacks import layer_paths, unstacked

from ._family import Family
from ._fields import is_replayed
from ._files import read_tensors
from ._keys import slots
from ._listed import listed
from ._pair import find_pair
from ._stacked import is_abstract, unstacked_adapter, unstacked_layouts


def writable(adapter: Adapter) -> Adapter:
    """The adapter, or plain LoRA of it if its initial factors cannot be made again from the base and the config."""
    config: Any = adapter.config
    how = getattr(config, "init_lora_weights", True)
    if is_replayed(how) or any(map(is_abstract, jax.tree.leaves(adapter.weights))):
        return adapter
    plain = plain_lora(adapter)
    settings = {"init_lora_weights": True, "loftq_config": {}, "corda_config": None, "lora_ga_config": None}
    return dataclasses.replace(plain, config=dataclasses.replace(plain.config, **settings))


def with_plain_lora(
    wrapped: PeftParams,
    names: Sequence[str],
    initial: str | os.PathLike[str] | bool | None,
    family: Family,
    layouts: Mapping[str, str],
) -> PeftParams:
    """The parameters with plain LoRA in the place of the named adapters that start from factors taken out of the base.

    initial: the folder of the untrained adapter, or True for the initial factors that the adapters have themselves.
    Raises ValueError for a folder that does not go with the adapters, FileNotFoundError if there is none.
    """
    if initial is None or initial is False:
        return wrapped
    adapters = dict(wrapped.adapters)
    for name in names:
        if initial is True:
            adapters[name] = plain_lora(adapters[name])
            continue
        _check_convertible(name, adapters[name], initial)
        found = _initial_factors(Path(initial).expanduser(), wrapped, adapters[name], family, layouts)
        if not keeps_initial_values(adapters[name]):
            _warn_of_change(name, found, initial)
        adapters[name] = plain_lora(adapters[name], found)
    return dataclasses.replace(wrapped, adapters=adapters)


def _check_convertible(name: str, adapter: Adapter, initial: str | os.PathLike[str]) -> None:
    if keeps_initial_values(adapter) or is_plain_lora(adapter.config) and not adapter.rows:
        return
    raise ValueError(
        f"path_initial_model_for_weight_conversion is {str(initial)!r}, but adapter {name!r} of a "
        f"{type(adapter.config).__name__} is no plain LoRA, whose change since then is LoRA again; leave it out"
    )


def _warn_of_change(name: str, found: Mapping[str, Mapping[str, Any]], initial: str | os.PathLike[str]) -> None:
    # As in PEFT, for a base out of which its owner took the initial product. The base here may be another.
    changed = [path for path, factors in found.items() if jnp.any(factors["lora_A"]) and jnp.any(factors["lora_B"])]
    if changed:
        warnings.warn(
            f"adapter {name!r} acts on the base as it is, and what is written is its change since {str(initial)!r}, "
            f"whose factors are no zeros ({listed(changed)}): right for a base that has their product in it, which the "
            "base here does not; else leave path_initial_model_for_weight_conversion out",
            stacklevel=4,
        )


def _initial_factors(
    folder: Path, wrapped: PeftParams, adapter: Adapter, family: Family, layouts: Mapping[str, str]
) -> dict[str, dict[str, Any]]:
    file = find_pair(folder).weights
    leaves, tensors = leaves_by_path(wrapped.base), read_tensors(file)
    layouts = unstacked_layouts({**family.layouts, **layouts}, leaves)
    table = slots(unstacked_adapter(adapter), unstacked(leaves), family, layouts)
    wanted = {(slot.path, slot.name): (key, slot) for key, slot in table.items() if slot.name in ("lora_A", "lora_B")}
    wrong = [
        f"{key} {tensors[key].shape if key in tensors else 'is absent'}, expected {slot.shape}"
        for key, slot in wanted.values()
        if key not in tensors or tensors[key].shape != slot.shape
    ]
    if wrong:
        raise ValueError(f"{file} does not hold the initial values of this adapter: {listed(wrong)}")

    def factor(path: str, name: str) -> Any:
        layers = [np.asarray(tensors[wanted[layer, name][0]]) for layer in layer_paths(path) or [path]]
        return jnp.stack(layers) if layer_paths(path) else jnp.asarray(layers[0])

    return {
        path: {name: factor(path, name) for name in ("lora_A", "lora_B")}
        for path, arrays in adapter.weights.items()
        if "lora_A" in arrays
    }
