"""Where activated adapters (aLoRA) begin in a call of the familiar face: told, or read off the token ids."""

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp

import jpeft
from jpeft import PeftParams, TaskType
from jpeft._activation import awaits_offsets, with_offsets, without_offsets


def with_told(params: PeftParams, **row_inputs: Any) -> PeftParams:
    """The parameters with what the caller says of the rows of a call; None: as they are."""
    given = {name: value for name, value in row_inputs.items() if value is not None}
    if not given:
        return params
    return dataclasses.replace(params, context={**params.context, **jpeft.with_context(params, **given).context})


def with_found_offsets(
    params: PeftParams, task: TaskType | None, args: Sequence[Any], inputs: Mapping[str, Any]
) -> PeftParams:
    """The parameters with the offsets of the call's `input_ids`, in a language model; other tasks have to be told.

    Without ids, but with `inputs_embeds`, such adapters act nowhere, with a UserWarning: all of it as in PEFT.
    """
    if task != TaskType.CAUSAL_LM or not awaits_offsets(params):
        return params
    ids = inputs.get("input_ids", args[0] if args else None)
    if ids is not None:
        return with_offsets(params, ids)
    embedded = inputs.get("inputs_embeds")
    if embedded is None:
        return params
    warnings.warn(
        "aLoRA adapters begin at tokens, and the call has inputs_embeds alone; they act nowhere. Expected input_ids "
        "or alora_offsets=[...] beside them",
        stacklevel=3,
    )
    return without_offsets(params, jnp.shape(embedded)[0])
