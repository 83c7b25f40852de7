"""Where activated adapters (aLoRA) begin in a call of the familiar face: told, or read off the token ids."""

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp

import jpeft
from jpeft import PeftParams, TaskType
from jpeft._activation import OFFSETS, awaits_offsets, with_offsets, without_offsets


def with_told_offsets(params: PeftParams, offsets: Any) -> PeftParams:
    """The parameters with offsets that the caller gives; None: as they are."""
    if offsets is None:
        return params
    given = jpeft.with_context(params, alora_offsets=offsets).context[OFFSETS]
    return dataclasses.replace(params, context={**params.context, OFFSETS: given})


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
