"""Greedy search and sampling."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from ._decoding import Decoder, LogitsProcessor, Network, State

Choose = Callable[[jax.Array, jax.Array], jax.Array]
"""`(logits (rows, vocab), key) -> tokens (rows,)`."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Warp:
    """How the distribution of the next token is changed before it is drawn from: scalars."""

    temperature: jax.Array
    top_p: jax.Array


def sample(
    network: Network,
    decoder: Decoder,
    first: tuple[jax.Array, State],
    sequences: jax.Array,
    prompt_length: int,
    eos: tuple[int, ...],
    pad: int,
    processor: LogitsProcessor | None,
    choose: Choose,
    key: jax.Array,
) -> jax.Array:
    """Fill `sequences (rows, prompt_length + new tokens)`, a token at a time, until every row has ended.

    `first`: logits and state after the prompt. `choose(logits, key) -> tokens`. A row that has ended is filled with
    `pad`.
    """
    length = sequences.shape[1]

    def tokens_after(logits: jax.Array, sequences: jax.Array, finished: jax.Array, end: jax.Array) -> jax.Array:
        logits = logits.astype(jnp.float32)
        if processor is not None:
            logits = processor(sequences, logits, end)
        chosen = choose(logits, jax.random.fold_in(key, end)).astype(sequences.dtype)
        return jnp.where(finished, jnp.asarray(pad, sequences.dtype), chosen)

    def going_on(carry: tuple[jax.Array, jax.Array, jax.Array, jax.Array, State]) -> jax.Array:
        _, finished, end, _, _ = carry
        return (end < length) & ~jnp.all(finished)

    def one(
        carry: tuple[jax.Array, jax.Array, jax.Array, jax.Array, State],
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, State]:
        sequences, finished, end, logits, state = carry
        tokens = tokens_after(logits, sequences, finished, end)
        sequences = jax.lax.dynamic_update_slice(sequences, tokens[:, None], (0, end))
        finished |= jnp.isin(tokens, jnp.asarray(eos, tokens.dtype)) if eos else False
        logits, state = decoder.step(network, state, tokens)
        return sequences, finished, end + 1, logits, state

    logits, state = first
    start = (sequences, jnp.zeros(sequences.shape[:1], bool), jnp.asarray(prompt_length, jnp.int32), logits, state)
    return jax.lax.while_loop(going_on, one, start)[0]


def greedy(logits: jax.Array, key: jax.Array) -> jax.Array:
    """The likeliest token; the first of equals."""
    return jnp.argmax(logits, axis=-1)


@dataclass(frozen=True)
class Draw:
    """Draw a token from the warped distribution: temperature first, then the `top_k` likeliest, then `top_p`."""

    top_k: int | None
    warp: Warp

    def __call__(self, logits: jax.Array, key: jax.Array) -> jax.Array:
        values, tokens = candidates(logits, self.top_k, self.warp)
        drawn = jax.random.categorical(key, values, axis=-1)
        return jnp.take_along_axis(tokens, drawn[:, None], axis=-1)[:, 0]


def candidates(logits: jax.Array, top_k: int | None, warp: Warp) -> tuple[jax.Array, jax.Array]:
    """Tokens `(rows, k)` by falling likelihood, and their scores: `-inf` for those that `top_p` leaves out.

    `top_p` keeps the smallest set of likeliest tokens whose probabilities sum to at least `top_p`, and one at least.
    """
    vocabulary = logits.shape[-1]
    values, tokens = jax.lax.top_k(logits / warp.temperature, min(top_k or vocabulary, vocabulary))
    probabilities = jax.nn.softmax(values, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    kept = (before < warp.top_p).at[:, 0].set(True)
    return jnp.where(kept, values, -jnp.inf), tokens
