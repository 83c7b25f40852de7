"""Beam search with the rules of `transformers`: which hypotheses are kept, how they are scored, when it ends."""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp

from ._decoding import Decoder, LogitsProcessor, Network, State, take_state_rows

OUT = -1.0e9
"""A score that no hypothesis has: what `transformers` marks impossible ones with."""


@dataclass(frozen=True)
class Beams:
    """Settings of a beam search.

    `length_penalty`: a finished hypothesis has the sum of its log-probabilities over its length to that power.
    `early_stopping`: True ends a row's search when it has `count` finished hypotheses; False when the best running one
    cannot beat them at its present length; "never" when it cannot at any length.
    """

    count: int
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Search:
    """Arrays of a search; `(rows, beams)` each, sequences with the length behind. `end`: tokens so far."""

    running: jax.Array
    running_scores: jax.Array
    finished: jax.Array
    finished_scores: jax.Array
    is_finished: jax.Array
    improvable: jax.Array
    going_on: jax.Array
    end: jax.Array
    logits: jax.Array
    state: State


def beam_search(
    network: Network,
    decoder: Decoder,
    first: tuple[jax.Array, State],
    sequences: jax.Array,
    prompt_length: int,
    eos: tuple[int, ...],
    processor: LogitsProcessor | None,
    beams: Beams,
) -> tuple[jax.Array, jax.Array]:
    """The finished hypotheses `(rows, beams, length)` of each row and their scores, best first.

    `first`: logits `(rows, vocab)` and state after the prompt. `sequences (rows, length)`: the prompt, then padding.
    """
    rows, length = sequences.shape
    count = beams.count
    logits, state = first
    spread = jnp.repeat(jnp.arange(rows), count)
    running = jnp.repeat(sequences[:, None], count, axis=1)
    # All beams of a row start alike: only the first may be continued, or every hypothesis would be there `count` times.
    scores = jnp.where(jnp.arange(count) == 0, 0.0, OUT)[None].repeat(rows, axis=0)
    search = _Search(
        running=running,
        running_scores=scores,
        finished=running,
        finished_scores=jnp.full((rows, count), OUT),
        is_finished=jnp.zeros((rows, count), bool),
        improvable=jnp.ones((rows, 1), bool),
        going_on=jnp.asarray(True),
        end=jnp.asarray(prompt_length, jnp.int32),
        logits=jnp.take(logits, spread, axis=0),
        state=take_state_rows(state, spread),
    )

    def one(search: _Search) -> _Search:
        return _one_token(search, network, decoder, prompt_length, eos, processor, beams)

    search = jax.lax.while_loop(lambda search: search.going_on & (search.end < length), one, search)
    return search.finished, search.finished_scores


def _one_token(
    search: _Search,
    network: Network,
    decoder: Decoder,
    prompt_length: int,
    eos: tuple[int, ...],
    processor: LogitsProcessor | None,
    beams: Beams,
) -> _Search:
    rows, count, length = search.running.shape
    scores = jax.nn.log_softmax(search.logits.astype(jnp.float32), axis=-1)
    if processor is not None:
        scores = processor(search.running.reshape(rows * count, length), scores, search.end)
    vocabulary = scores.shape[-1]
    scores = (scores.reshape(rows, count, vocabulary) + search.running_scores[..., None]).reshape(rows, -1)
    # So many that `count` can go on even if all the others end here.
    candidate_scores, chosen = jax.lax.top_k(scores, max(2, 1 + len(eos)) * count)
    source, tokens = chosen // vocabulary, (chosen % vocabulary).astype(search.running.dtype)
    candidates = _gather(search.running, source)
    candidates = jax.lax.dynamic_update_slice(candidates, tokens[..., None], (0, 0, search.end))
    ends = jnp.isin(tokens, jnp.asarray(eos, tokens.dtype)) if eos else jnp.zeros(tokens.shape, bool)
    ends |= search.end + 1 == length

    running_scores, kept = jax.lax.top_k(candidate_scores + jnp.where(ends, OUT, 0.0), count)
    running = _gather(candidates, kept)
    rows_of = (_gather(source, kept) + count * jnp.arange(rows)[:, None]).reshape(-1)

    finished, finished_scores, is_finished = _with_newly_finished(
        search, candidates, candidate_scores, ends, prompt_length, beams
    )
    end = search.end + 1
    improvable = search.improvable & _can_improve(
        running_scores, finished_scores, is_finished, end - prompt_length, length - prompt_length, beams
    )
    going_on = jnp.any(improvable) & ~jnp.all(ends)
    if beams.early_stopping is True:
        going_on &= ~jnp.all(is_finished)
    state = take_state_rows(search.state, rows_of)
    next_tokens = jax.lax.dynamic_slice_in_dim(running, search.end, 1, axis=2).reshape(-1)
    logits, state = decoder.step(network, state, next_tokens)
    return _Search(
        running, running_scores, finished, finished_scores, is_finished, improvable, going_on, end, logits, state
    )


def _gather(array: jax.Array, index: jax.Array) -> jax.Array:
    return jnp.take_along_axis(array, index.reshape(*index.shape, *[1] * (array.ndim - 2)), axis=1)


def _with_newly_finished(
    search: _Search, candidates: jax.Array, scores: jax.Array, ends: jax.Array, prompt_length: int, beams: Beams
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The best `count` of the finished hypotheses, old and new; only the likeliest `count` candidates may finish."""
    new = ends & (jnp.arange(ends.shape[1]) < beams.count)[None]
    generated = (search.end + 1 - prompt_length).astype(jnp.float32)
    scores = scores / generated**beams.length_penalty
    closed = ~search.improvable
    if beams.early_stopping is True:
        closed |= jnp.all(search.is_finished, axis=-1, keepdims=True)
    scores += jnp.where(closed, OUT, 0.0)
    scores += jnp.where(new, 0.0, OUT)
    best, kept = jax.lax.top_k(jnp.concatenate([search.finished_scores, scores], axis=1), beams.count)
    sequences = _gather(jnp.concatenate([search.finished, candidates], axis=1), kept)
    return sequences, best, _gather(jnp.concatenate([search.is_finished, new], axis=1), kept)


def _can_improve(
    running_scores: jax.Array,
    finished_scores: jax.Array,
    is_finished: jax.Array,
    generated: jax.Array,
    most: int,
    beams: Beams,
) -> jax.Array:
    """Whether a row's best running hypothesis could still beat its worst finished one: `(rows, 1)`."""
    to_the_end = beams.early_stopping == "never" and beams.length_penalty > 0.0
    at = jnp.asarray(most if to_the_end else generated, jnp.float32)
    best = running_scores[:, :1] / at**beams.length_penalty
    worst = jnp.where(is_finished, finished_scores.min(axis=1, keepdims=True), OUT)
    return jnp.any(best > worst, axis=-1, keepdims=True)
