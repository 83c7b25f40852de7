"""X-LoRA on the familiar face: experts read from their folders, and the first run of a model before each call."""

import dataclasses
from typing import Any

import jax

import jpeft
from jpeft import PeftParams
from jpeft._wrap import check_name
from jpeft._xlora import SCALINGS, router_among, router_of

from ._base_model import BaseModel
from ._hidden_states import hidden_state_of
from ._load import load_adapter

_OF_LOSSES = frozenset({"labels", "start_positions", "end_positions", "loss_chunk_size"})


def with_router_scalings(
    base: BaseModel, wrapped: PeftParams, batch: dict[str, Any]
) -> tuple[PeftParams, dict[str, Any]]:
    """The parameters with how much each expert of an active X-LoRA adapter counts for the tokens of this batch.

    What the context holds of it already stays. Raises TypeError for a model that does not tell its hidden states.
    """
    if router_of(wrapped) is None or SCALINGS in wrapped.context:
        return wrapped, batch

    def last_hidden_state(params: PeftParams) -> jax.Array:
        if base.library is None:  # a function, which need not know how to be asked
            return hidden_state_of(None, base.class_name)
        given = {name: value for name, value in batch.items() if name not in _OF_LOSSES}
        outputs = jpeft.lift(base.apply)(params, **{**given, "output_hidden_states": True})
        return hidden_state_of(outputs, base.class_name)

    return jpeft.with_xlora_scalings(wrapped, last_hidden_state), batch


def with_read_experts(
    wrapped: PeftParams, base: BaseModel, config: Any, adapter_name: str, rng: jax.Array | None
) -> PeftParams:
    """The parameters with a new X-LoRA adapter, whose experts are read from where its config says.

    Raises ValueError for no experts at all, hidden states of another size than the model's, and a name that is taken,
    and what `load_adapter` raises.
    """
    check_name(adapter_name, wrapped.adapters)
    if not config.adapters:
        raise ValueError("adapters is empty; expected the folder of each expert by its name")
    size = base.config.get("hidden_size")
    if config.hidden_size is None and size is not None:
        config = dataclasses.replace(config, hidden_size=size)
    if size not in (None, config.hidden_size):
        raise ValueError(f"hidden_size is {config.hidden_size}; expected {size}, the size of the model's hidden states")
    experts = PeftParams(wrapped.base, {}, ())
    for name, path in config.adapters.items():
        experts = load_adapter(experts, path, name, layouts=base.layouts)
    router = router_among(experts, list(experts.adapters), config, rng)
    active = wrapped.active if wrapped.adapters else (adapter_name,)
    return dataclasses.replace(wrapped, adapters={**wrapped.adapters, adapter_name: router}, active=active)
