"""A bidirectional LSTM of several layers, with the arrays, names and order of gates of `torch.nn.LSTM`."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from .._contract import Arrays

_DIRECTIONS = ("", "_reverse")
_GATES = 4


def lstm_shapes(inputs: int, hidden: int, layers: int) -> dict[str, tuple[int, ...]]:
    """{name: shape} of the arrays: of a layer's gates (input, forget, cell, output) one below the other.

    >>> lstm_shapes(3, 2, 1)["weight_ih_l0_reverse"]
    (8, 3)
    """
    return {
        f"{name}_l{layer}{direction}": (_GATES * hidden, *columns)
        for layer in range(layers)
        for direction in _DIRECTIONS
        for name, columns in {
            "weight_ih": (2 * hidden if layer else inputs,),
            "weight_hh": (hidden,),
            "bias_ih": (),
            "bias_hh": (),
        }.items()
    }


def lstm(p: Arrays, x: jax.Array, layers: int, between: Callable[[jax.Array, int], jax.Array]) -> jax.Array:
    """What the last layer makes of a sequence x (length, inputs), both ways side by side: (length, 2 hidden).

    p: as of `lstm_shapes`. between(y, layer): what the next layer is given of the outputs of one, such as dropout.
    """
    for layer in range(layers):
        x = between(x, layer - 1) if layer else x
        ways = [_one_way(p, x, f"l{layer}{direction}", reverse=bool(direction)) for direction in _DIRECTIONS]
        x = jnp.concatenate(ways, axis=-1)
    return x


def _one_way(p: Arrays, x: jax.Array, name: str, reverse: bool) -> jax.Array:
    recurrent = p[f"weight_hh_{name}"].T
    gates = x @ p[f"weight_ih_{name}"].T + p[f"bias_ih_{name}"] + p[f"bias_hh_{name}"]
    start = jnp.zeros(recurrent.shape[0], gates.dtype)

    def step(state: tuple[jax.Array, jax.Array], own: jax.Array) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        hidden, cell = state
        add, keep, new, out = jnp.split(own + hidden @ recurrent, _GATES)
        cell = jax.nn.sigmoid(keep) * cell + jax.nn.sigmoid(add) * jnp.tanh(new)
        hidden = jax.nn.sigmoid(out) * jnp.tanh(cell)
        return (hidden, cell), hidden

    return lax.scan(step, (start, start), gates, reverse=reverse)[1]


def lstm_bound(hidden: int) -> float:
    """Of the uniform distribution that every array begins with."""
    return 1 / math.sqrt(hidden)
