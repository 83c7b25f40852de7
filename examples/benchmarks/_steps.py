"""Training steps in JAX that can be timed: compiled once, with what their memory is."""

import os
import platform
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from _models import Variant, training_step

Step = Callable[[], None]


class JaxStep(NamedTuple):
    """run: one step, after another. temporaries: bytes that it needs besides its arguments and results."""

    run: Step
    temporaries: int


def jax_step(variant: Variant, tokens: jax.Array) -> JaxStep:
    optimizer, step = training_step(variant)
    # Of its own, as steps donate it and variants start from the same arrays.
    trainable = jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), variant.trainable)
    held = [trainable, optimizer.init(trainable)]
    compiled = step.lower(*held, variant.frozen, tokens).compile()

    def run() -> None:
        *held[:], loss = compiled(*held, variant.frozen, tokens)
        jax.block_until_ready((held, loss))

    run()
    return JaxStep(run, compiled.memory_analysis().temp_size_in_bytes)


def environment() -> dict[str, Any]:
    return {
        "python": platform.python_version(),
        "jax": jax.__version__,
        "device": str(jax.devices()[0].device_kind),
        "cores": os.cpu_count(),
        "load": [round(load, 2) for load in os.getloadavg()],
    }
