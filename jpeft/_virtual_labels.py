"""What a prompt does to the labels of a batch, and to the input of a decoder: parts of `with_virtual_tokens`."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ._contract import method_of
from ._params import PeftParams

IGNORED = -100
TYPES = "input_type_mask"

# Of a text whose tokens have no types: those of labels, all of one example.
_LABEL = 4


def with_ignored(labels: Any, count: int) -> jax.Array:
    """Labels (rows, length) with so many before them that count nothing."""
    labels = jnp.asarray(labels)
    return jnp.concatenate([jnp.full((labels.shape[0], count), IGNORED, labels.dtype), labels], axis=1)


def with_labels_of_prompts(
    batch: Mapping[str, Any], wrapped: PeftParams, adapters: Sequence[str], count: int
) -> dict[str, jax.Array]:
    """`labels` and `input_type_mask` (rows, count + length) of a batch, of whose rows some begin with a text to learn.

    adapters: of each row. count: how many virtual tokens there are. Labels stay where the type of their token is a
    multiple of four above zero; types of the text follow those of the prompt.
    """
    labels = jnp.asarray(batch["labels"])
    rows = labels.shape[0]
    tokens = np.full((rows, count), IGNORED, np.int32)
    types = np.zeros((rows, count), np.int32)
    for row, name in enumerate(adapters):
        own = _labels_of(wrapped, name)
        if own is not None:
            tokens[row, count - len(own[0]) :], types[row, count - len(own[1]) :] = own
    # By fours, so that each type goes on to mean the same.
    last = -(types.max(axis=1, keepdims=True, initial=0) // -4) * 4
    given = batch.get(TYPES)
    given = jnp.full(labels.shape, _LABEL, jnp.int32) if given is None else jnp.asarray(given)
    if given.shape != labels.shape or not jnp.issubdtype(given.dtype, jnp.integer):
        raise ValueError(
            f"{TYPES} is {given.dtype} of shape {given.shape}; expected integers of the shape of the labels, "
            f"{labels.shape}"
        )
    own = jnp.where(given > 0, given + last.astype(given.dtype), given)
    whole = jnp.concatenate([types.astype(given.dtype), own], axis=1)
    found = jnp.concatenate([tokens.astype(labels.dtype), labels], axis=1)
    return {"labels": jnp.where((whole > 0) & (whole % 4 == 0), found, IGNORED), TYPES: whole}


def have_labels(wrapped: PeftParams, adapters: Sequence[str]) -> bool:
    """Whether one of the adapters has a prompt that is a text to learn itself."""
    return any(_labels_of(wrapped, name) is not None for name in adapters)


def with_decoder_prompts(
    batch: Mapping[str, Any], prompts: Mapping[str, range], adapters: Sequence[str]
) -> dict[str, jax.Array]:
    """What changes in a batch when prompts come before the decoder's input; nothing without a decoder.

    prompts: {adapter: ids}. adapters: of each row. Raises ValueError for rows with and without
    one, and for labels without the input of which they are the next tokens.
    """
    names = ", ".join(map(repr, prompts))
    lengths = {len(prompts.get(name, ())) for name in adapters}
    if len(lengths) > 1:
        raise ValueError(
            f"of the prompts of {names} the rows have {sorted(lengths)} tokens before the decoder's input; expected "
            "one number, as all rows of a decoder begin together"
        )
    before = np.array([prompts.get(name, ()) for name in adapters], np.int32)
    if batch.get("decoder_input_ids") is None:
        if batch.get("labels") is None:
            return {}
        raise ValueError(
            f"the prompt of {names} comes before the decoder's input, too, and the batch has labels, but no "
            "decoder_input_ids; expected both: the labels moved one to the right, after the start token, or "
            "jpeft_interop.prepare_inputs, which makes them"
        )
    given = jnp.asarray(batch["decoder_input_ids"])
    found = {"decoder_input_ids": jnp.concatenate([before.astype(given.dtype), given], axis=1)}
    mask = batch.get("decoder_attention_mask")
    if mask is not None:
        mask = jnp.asarray(mask)
        found["decoder_attention_mask"] = jnp.concatenate([jnp.ones(before.shape, mask.dtype), mask], axis=1)
    if batch.get("labels") is not None:
        found["labels"] = with_ignored(batch["labels"], before.shape[1])
    return found


def _labels_of(wrapped: PeftParams, name: str) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    if name not in wrapped.adapters:
        return None
    method = method_of(wrapped.adapters[name].config)
    return None if method.labels is None else method.labels(wrapped.adapters[name].config)
