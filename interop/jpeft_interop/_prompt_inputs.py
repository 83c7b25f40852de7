"""What soft prompts need of a call besides their virtual tokens: a decoder's input, and how much each label counts."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from jpeft import PeftParams
from jpeft._contract import method_of
from jpeft._cpt import label_weights, weighted_loss
from jpeft._virtual_labels import TYPES

from ._base_model import BaseModel

WEIGHTS = "label_weights"
DECAY = "decay"


def with_decoder_input(base: BaseModel, wrapped: PeftParams, batch: Mapping[str, Any]) -> dict[str, Any]:
    """The batch with the labels as the decoder's input, if a prompt is to come before that and the batch lacks it.

    Raises ValueError if the model's config does not tell the tokens that they begin with and are filled with.
    """
    given = batch.get("labels") is not None and batch.get("decoder_input_ids") is None
    configs: list[Any] = [wrapped.adapters[name].config for name in wrapped.active]
    if not given or not any(method_of(config).in_decoder and config.submodules > 1 for config in configs):
        return dict(batch)
    # Late, as Flax is there.
    from .models._losses import decoder_inputs

    config = getattr(base.given, "config", None)
    start, pad = (
        base.config.get(name, getattr(config, name, None)) for name in ("decoder_start_token_id", "pad_token_id")
    )
    return {**batch, "decoder_input_ids": decoder_inputs(batch["labels"], start, pad)}


def without_idle_types(wrapped: PeftParams, batch: Mapping[str, Any]) -> dict[str, Any]:
    """The batch without the types of its tokens, which no model takes, unless its loss depends on them."""
    losses = {getattr(wrapped.adapters[name].config, "opt_weighted_loss_type", None) for name in wrapped.active}
    prompts = any(method_of(wrapped.adapters[name].config).labels is not None for name in wrapped.active)
    idle = prompts and (DECAY not in losses or batch.get("labels") is None)
    return {name: value for name, value in batch.items() if not (idle and name == TYPES)}


def with_weights(
    wrapped: PeftParams, batch: Mapping[str, Any], adapter_names: Sequence[str] | None = None
) -> dict[str, Any]:
    """The batch with how much each label counts in place of the types of its tokens, for `weighing`."""
    if TYPES not in batch:
        return dict(batch)
    factors = {
        name: getattr(wrapped.adapters[name].config, "opt_loss_decay_factor", 1.0)
        for name in wrapped.active
        if getattr(wrapped.adapters[name].config, "opt_weighted_loss_type", None) == DECAY
    }
    types = jnp.asarray(batch[TYPES])
    names = list(factors)[:1] * types.shape[0] if adapter_names is None else adapter_names
    own = jnp.array([[factors.get(name, 1.0)] for name in names], jnp.float32)
    rest = {name: value for name, value in batch.items() if name != TYPES}
    return {**rest, WEIGHTS: label_weights(types, own)}


def weighing(apply: Callable[..., Any]) -> Callable[..., Any]:
    """The function of a language model that takes `label_weights (rows, length)`, too, and counts them in its loss.

    It raises ValueError for them where it gets no logits.
    """

    def weighed(params: Any, *args: Any, **kwargs: Any) -> Any:
        weights = kwargs.pop(WEIGHTS, None)
        output = apply(params, *args, **kwargs)
        if weights is None:
            return output
        labels, logits = jnp.asarray(kwargs["labels"]), output.logits
        if logits is None:
            raise ValueError(
                f"a loss that decays is made of the logits of all {labels.shape[1]} tokens, and the call gives none; "
                "expected no loss_chunk_size, or opt_weighted_loss_type='none'"
            )
        return dataclasses.replace(output, loss=weighted_loss(logits, labels, weights))

    return weighed
