"""One token at a time: what greedy search, sampling and beam search have in common."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from ._cache import Cache, take_rows
from ._prefix import KeyValuePrefix

Network = Callable[..., Any]
"""`apply(**inputs)`, with the parameters already in it."""

LogitsProcessor = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""`(sequences (rows, length), logits (rows, vocab), end) -> logits`, where `sequences[:, :end]` is the text so far."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """Between two tokens. `positions (rows,)`: of the next token. `fixed`: inputs that every call is given."""

    cache: Cache
    positions: jax.Array
    fixed: Mapping[str, jax.Array]


@dataclass(frozen=True)
class Decoder:
    """How a kind of model starts, and goes on by a token.

    `start(network, inputs, prompt, capacity) -> (logits (rows, vocab), state)`; `step(network, state, tokens (rows,))`
    the same. `prompt (rows, length)`: the tokens that the sequences begin with. The inputs may hold a prefix.
    """

    start: Callable[[Network, Mapping[str, jax.Array], jax.Array, int], tuple[jax.Array, State]]
    step: Callable[[Network, State, jax.Array], tuple[jax.Array, State]]


def take_state_rows(state: State, rows: jax.Array) -> State:
    """The state whose row `i` is row `rows[i]` of the given one."""
    fixed = {name: jnp.take(array, rows, axis=0) for name, array in state.fixed.items()}
    return State(take_rows(state.cache, rows), jnp.take(state.positions, rows, axis=0), fixed)


def right_aligned(input_ids: jax.Array, attention_mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Ids and mask `(rows, length)` with each row's padding moved to the left, so that new tokens follow the text."""
    length = input_ids.shape[1]
    source = (jnp.arange(length, dtype=jnp.int32)[None] - trailing(attention_mask)[:, None]) % length
    return jnp.take_along_axis(input_ids, source, axis=1), jnp.take_along_axis(attention_mask, source, axis=1)


def trailing(attention_mask: jax.Array) -> jax.Array:
    """Of each row the length of the padding after its text, int32 `(rows,)`."""
    length = attention_mask.shape[1]
    return length - jnp.max(jnp.where(attention_mask != 0, jnp.arange(length, dtype=jnp.int32) + 1, 0), axis=1)


def _start_causal(
    network: Network, inputs: Mapping[str, jax.Array], prompt: jax.Array, capacity: int, *, takes_positions: bool
) -> tuple[jax.Array, State]:
    rows, length = prompt.shape
    mask = inputs.get("attention_mask")
    ids, mask = (prompt, jnp.ones((rows, length), jnp.int32)) if mask is None else right_aligned(prompt, mask)
    positions = jnp.maximum(jnp.cumsum(mask.astype(jnp.int32), axis=1) - 1, 0)
    given: dict[str, Any] = _prefix(inputs)
    for prefix in given.values():
        positions, capacity = positions + prefix.starts, capacity + prefix.length
    if takes_positions:
        given["position_ids"] = positions
    output = network(input_ids=ids, attention_mask=mask, cache_length=capacity, logits_to_keep=1, **given)
    return output.logits[:, -1], State(output.past_key_values, positions[:, -1] + 1, {})


def _step_causal(
    network: Network, state: State, tokens: jax.Array, *, takes_positions: bool
) -> tuple[jax.Array, State]:
    given = {"position_ids": state.positions[:, None]} if takes_positions else {}
    output = network(input_ids=tokens[:, None], past_key_values=state.cache, **given)
    return output.logits[:, -1], State(output.past_key_values, state.positions + 1, {})


def causal(*, takes_positions: bool) -> Decoder:
    """A language model that goes on from its own input."""
    return Decoder(
        lambda *given: _start_causal(*given, takes_positions=takes_positions),
        lambda *given: _step_causal(*given, takes_positions=takes_positions),
    )


def _start_seq2seq(
    network: Network, inputs: Mapping[str, jax.Array], prompt: jax.Array, capacity: int
) -> tuple[jax.Array, State]:
    capacity += sum(prefix.length for prefix in _prefix(inputs).values())
    output = network(**inputs, decoder_input_ids=prompt, cache_length=capacity, logits_to_keep=1)
    fixed = {"attention_mask": inputs["attention_mask"]} if "attention_mask" in inputs else {}
    return output.logits[:, -1], State(output.past_key_values, jnp.full(prompt.shape[:1], prompt.shape[1]), fixed)


def _step_seq2seq(network: Network, state: State, tokens: jax.Array) -> tuple[jax.Array, State]:
    output = network(decoder_input_ids=tokens[:, None], past_key_values=state.cache, **state.fixed)
    return output.logits[:, -1], State(output.past_key_values, state.positions + 1, state.fixed)


def _prefix(inputs: Mapping[str, Any]) -> dict[str, KeyValuePrefix]:
    return {name: value for name, value in inputs.items() if isinstance(value, KeyValuePrefix)}


SEQ2SEQ = Decoder(_start_seq2seq, _step_seq2seq)
"""An encoder that reads the input, and a decoder that starts from tokens of its own."""
