"""ShadowPEFT and models of the Hugging Face family: the shadow that a model has, that of a file, that of a call."""

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any

import numpy as np

import jpeft
from jpeft import PeftParams, ShadowConfig
from jpeft._paths import last_name, parent
from jpeft.methods.shadow import BACKBONE

from ._base_model import BaseModel

SHADOW = "shadow"
"""The name of the input."""

OTHER_SIZES = ("shadow_hidden_size", "shadow_num_attention_heads", "shadow_intermediate_size")


def with_shadow_of_model(config: jpeft.PeftConfig, base: BaseModel) -> jpeft.PeftConfig:
    """The config with the tensors of the shadow that a model of `jpeft_interop.models` has; others as they are.

    Raises ValueError for a model that has none, and for sizes that do not fit it.
    """
    blueprint = getattr(base.given, "blueprint", None)
    if not isinstance(config, ShadowConfig) or config.shadow_tensors is not None or blueprint is None:
        return config
    # Late, as a model of the family is here, and so is Flax.
    from .models._shadow import first_tensors

    return dataclasses.replace(config, shadow_tensors=first_tensors(blueprint, config))


def with_shadow_of_file(config: jpeft.PeftConfig, tensors: Mapping[str, np.ndarray]) -> jpeft.PeftConfig:
    """The config with the tensors of the shadow that a file holds, where it is not told by the model's parameters."""
    if not isinstance(config, ShadowConfig) or config.shadow_tensors is not None or _is_told(config):
        return config
    prefix = f"base_model.{BACKBONE}."
    found = {key.removeprefix(prefix): (tensor.shape, 0.0, 0.0) for key, tensor in tensors.items()
             if key.startswith(prefix)}  # fmt: skip
    return dataclasses.replace(config, shadow_tensors=found)


def _is_told(config: ShadowConfig) -> bool:
    names = config.target_modules or ()
    named = not isinstance(names, str) and all(last_name(parent(name)) == "layers" for name in names)
    return named and all(getattr(config, size) is None for size in OTHER_SIZES)


def with_shadow(base: BaseModel, wrapped: PeftParams, batch: dict[str, Any]) -> tuple[PeftParams, dict[str, Any]]:
    """The parameters, and the batch with the shadow of the active adapter, if it has one and the batch has none.

    A function of one's own that takes `shadow` is given the `jpeft.Adapter`. Raises TypeError for one that does not,
    and ValueError for other models without a shadow, for several active adapters, and for one of another model.
    """
    names = [name for name in wrapped.active if isinstance(wrapped.adapters[name].config, ShadowConfig)]
    if not names or SHADOW in batch:
        return wrapped, batch
    blueprint = getattr(base.given, "blueprint", None)
    if blueprint is not None:
        from .models._shadow import shadow_of

        return wrapped, {**batch, SHADOW: shadow_of(blueprint, wrapped)}
    taken = inspect.signature(base.apply).parameters.values()
    if not any(own.name == SHADOW or own.kind is own.VAR_KEYWORD for own in taken):
        raise TypeError(
            f"the model's function takes no {SHADOW}; expected an argument of this name, the jpeft.Adapter whose "
            "arrays it gives to jpeft.shadow_injection and jpeft.shadow_update around its blocks"
        )
    return wrapped, {**batch, SHADOW: wrapped.adapters[names[0]]}
