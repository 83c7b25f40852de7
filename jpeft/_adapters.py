"""Adapters that are there already: taken away, renamed, made stronger or weaker."""

import dataclasses
import numbers
from typing import Any

import jax
import jax.numpy as jnp

from ._low_rank import is_lora
from ._params import PeftParams
from ._wrap import check_name, checked_names, checked_params


def delete_adapter(wrapped: PeftParams, adapter_name: str) -> PeftParams:
    """The same parameters without one of their adapters.

    If it was the only active one, none is active afterwards: choose one with `set_adapter`. Raises ValueError for an
    unknown name.

    >>> import jpeft
    >>> config = jpeft.LoraConfig(target_modules=["query"])
    >>> wrapped = jpeft.wrap({"query": {"kernel": jnp.ones((4, 6))}}, config)
    >>> wrapped = delete_adapter(jpeft.wrap(wrapped, config, adapter_name="other"), "other")
    >>> list(wrapped.adapters), wrapped.active
    (['default'], ('default',))
    """
    (gone,) = checked_names(checked_params(wrapped), adapter_name)
    return dataclasses.replace(
        wrapped,
        adapters={name: adapter for name, adapter in wrapped.adapters.items() if name != gone},
        active=tuple(name for name in wrapped.active if name != gone),
    )


def rename_adapter(wrapped: PeftParams, adapter_name: str, new_name: str) -> PeftParams:
    """The same parameters with another name for one of their adapters, active if it was.

    Raises ValueError for an unknown name, and for a new one that is taken or has a dot.

    >>> import jpeft
    >>> wrapped = jpeft.wrap({"query": {"kernel": jnp.ones((4, 6))}}, jpeft.LoraConfig(target_modules=["query"]))
    >>> rename_adapter(wrapped, "default", "french").active
    ('french',)
    """
    (old,) = checked_names(checked_params(wrapped), adapter_name)
    check_name(new_name, {name: adapter for name, adapter in wrapped.adapters.items() if name != old})
    names = {name: new_name if name == old else name for name in wrapped.adapters}
    return dataclasses.replace(
        wrapped,
        adapters={names[name]: adapter for name, adapter in wrapped.adapters.items()},
        active=tuple(names[name] for name in wrapped.active),
    )


def rescale_adapter_scale(wrapped: PeftParams, multiplier: Any, adapter: str | None = None) -> PeftParams:
    """The same parameters with the scaling of LoRA adapters multiplied by a number; zero switches them off.

    multiplier: a number, which may be traced: another one does not recompile. adapter: the name of one adapter
    (default: all that are LoRA). Scaling is no part of a file; `add_weighted_adapter` with one adapter and the
    multiplier as its weight makes one that can be saved. Raises TypeError for a multiplier that is no number, and
    ValueError for an unknown name or if no adapter meant is LoRA.

    >>> import jpeft
    >>> config = jpeft.LoraConfig(r=2, lora_alpha=6, target_modules=["query"])
    >>> wrapped = jpeft.wrap({"query": {"kernel": jnp.ones((4, 6))}}, config)
    >>> float(rescale_adapter_scale(wrapped, 0.5).adapters["default"].scaling["query"])
    1.5
    """
    number = isinstance(multiplier, numbers.Real) and not isinstance(multiplier, bool)
    if not number and not (isinstance(multiplier, jax.Array) and multiplier.ndim == 0):
        raise TypeError(f"multiplier is {multiplier!r}; expected a number")
    checked_params(wrapped)
    names = wrapped.adapters if adapter is None else checked_names(wrapped, adapter)
    lora = [name for name in names if is_lora(wrapped.adapters[name].config)]
    if not lora:
        given = ", ".join(f"{name!r} has a {type(wrapped.adapters[name].config).__name__}" for name in names)
        raise ValueError(f"only LoRA has a scaling that can be changed, but {given or 'there is no adapter'}")

    def rescaled(scaling: Any) -> Any:
        if isinstance(scaling, jax.ShapeDtypeStruct):
            return scaling
        return scaling * jnp.asarray(multiplier).astype(scaling.dtype)

    changed = {
        name: dataclasses.replace(own, scaling={path: rescaled(array) for path, array in own.scaling.items()})
        for name, own in wrapped.adapters.items()
        if name in lora
    }
    return dataclasses.replace(wrapped, adapters={**wrapped.adapters, **changed})
