"""Where the activated adapters among those in use begin to act, from the token ids of a call."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ._config import PeftConfig
from ._mixed import is_mixed, with_rows
from ._params import PeftParams

OFFSETS, TOKENS = "alora_offsets", "alora_invocation_tokens"


def alora_offsets(input_ids: Any, invocation_tokens: Sequence[int]) -> jax.Array:
    """Of each row the distance of the last invocation's first token from the end; 0 for a row without one.

    input_ids: integers (..., length), padded on either side or not: padding after the text counts as tokens do.
    invocation_tokens: the config's `alora_invocation_tokens`. Returns int32 (...), for `with_context`.
    Raises ValueError for ids that are no integers and for no tokens at all.

    >>> alora_offsets([[7, 5, 6, 9, 9], [5, 6, 5, 6, 0], [1, 2, 3, 4, 5]], [5, 6]).tolist()
    [4, 3, 0]
    """
    ids, tokens = jnp.asarray(input_ids), tuple(map(int, invocation_tokens))
    if not ids.ndim or not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(f"input_ids are {ids.dtype} of shape {ids.shape}; expected integers of shape (rows, length)")
    if not tokens:
        raise ValueError("invocation_tokens is empty; expected the ids of the tokens that activate the adapter")
    ids, length = ids.astype(jnp.int32), ids.shape[-1]
    starts = length - len(tokens) + 1
    if starts < 1:
        return jnp.zeros(ids.shape[:-1], jnp.int32)
    found = jnp.ones((*ids.shape[:-1], starts), bool)
    for place, token in enumerate(tokens):
        found &= ids[..., place : place + starts] == token
    last = jnp.max(jnp.where(found, jnp.arange(starts, dtype=jnp.int32), -1), axis=-1)
    return jnp.where(last < 0, 0, length - last)


def awaits_offsets(wrapped: PeftParams) -> bool:
    """Whether an adapter in use is an aLoRA, and the context does not say where it begins."""
    return OFFSETS not in wrapped.context and any(_tokens(config) for config in _configs(wrapped))


def with_offsets(wrapped: PeftParams, input_ids: Any) -> PeftParams:
    """The same parameters with `alora_offsets` of these ids in the context, if they are awaited.

    input_ids: integers (rows, length). Each adapter goes by its own invocation, and in a mixture each row by that of
    its adapter. Raises ValueError for ids of another form or number of rows.

    >>> import jpeft
    >>> config = jpeft.LoraConfig(target_modules=["q"], alora_invocation_tokens=[5, 6], task_type="CAUSAL_LM")
    >>> wrapped = jpeft.wrap({"q": {"kernel": jnp.ones((4, 6))}}, config)
    >>> with_offsets(wrapped, jnp.array([[5, 6, 1], [1, 2, 3]])).context["alora_offsets"]["default"].tolist()
    [3, 0]
    """
    if not awaits_offsets(wrapped):
        return wrapped
    ids = jnp.asarray(input_ids)
    if ids.ndim != 2:
        raise ValueError(f"input_ids are of shape {ids.shape}; expected (rows, length)")
    if is_mixed(wrapped):
        wrapped = with_rows(wrapped, ids.shape[0])
        given: Any = _of_rows(ids, wrapped)
    else:
        configs = {name: wrapped.adapters[name].config for name in wrapped.active}
        given = {name: _offsets(ids, config) for name, config in configs.items() if _tokens(config)}
    return dataclasses.replace(wrapped, context={**wrapped.context, OFFSETS: given})


def without_offsets(wrapped: PeftParams, rows: int) -> PeftParams:
    """The same parameters for a call whose tokens are not known: adapters that await offsets act nowhere."""
    if not awaits_offsets(wrapped):
        return wrapped
    return dataclasses.replace(wrapped, context={**wrapped.context, OFFSETS: jnp.zeros(rows, jnp.int32)})


def _configs(wrapped: PeftParams) -> list[PeftConfig]:
    configs: list[Any] = [wrapped.adapters[name].config for name in wrapped.active]
    return [part.config for part in configs[0].parts] if configs and is_mixed(wrapped) else configs


def _tokens(config: Any) -> tuple[int, ...]:
    return getattr(config, TOKENS, None) or ()


def _offsets(ids: jax.Array, config: PeftConfig) -> jax.Array:
    tokens = _tokens(config)
    return alora_offsets(ids, tokens) if tokens else jnp.zeros(ids.shape[0], jnp.int32)


def _of_rows(ids: jax.Array, mixed: PeftParams) -> jax.Array:
    offsets = jnp.stack([_offsets(ids, config) for config in _configs(mixed)])
    indices = jnp.maximum(mixed.context["adapter_indices"], 0)
    return jnp.take_along_axis(offsets, indices[None], axis=0, mode="clip")[0]
