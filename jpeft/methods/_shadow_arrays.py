"""What ShadowPEFT trains of each block (`shadow.py`), as it begins."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from .._contract import fold_in_name
from .._shadow import DOWN, GATE, TRANSFORM, UP


def arrays_of(key: jax.Array, group: str, paths: Sequence[str], width: int, config: Any) -> dict[str, jax.Array]:
    """The arrays of a block, or of a stack of blocks of these paths, each with the values that it has by itself."""
    inner = config.update_hidden_size or config.r
    each = [_block(fold_in_name(key, path), width, config.r, inner) for path in paths]
    arrays = each[0] if [*paths] == [group] else {name: jnp.stack([own[name] for own in each]) for name in each[0]}
    return {**arrays, UP: jnp.zeros_like(arrays[UP])} if config.init_weights else arrays


# One program for all blocks, which are alike.
@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _block(key: jax.Array, width: int, r: int, inner: int) -> dict[str, jax.Array]:
    keys = {name: fold_in_name(key, name) for name in (DOWN, UP, TRANSFORM, GATE)}
    arrays = {DOWN: linear(keys[DOWN], r, width), UP: linear(keys[UP], width, r)}
    for part in (TRANSFORM, GATE):
        for number, (outputs, inputs) in {0: (inner, width), 2: (width, inner)}.items():
            own = jax.random.split(jax.random.fold_in(keys[part], number))
            arrays[f"{part}.{number}.weight"] = linear(own[0], outputs, inputs)
            arrays[f"{part}.{number}.bias"] = linear(own[1], outputs, inputs)[:, 0]
    return arrays


def linear(key: jax.Array, outputs: int, inputs: int) -> jax.Array:
    """As a linear layer of PyTorch begins, (out, in)."""
    return jax.random.uniform(key, (outputs, inputs), minval=-(inputs**-0.5), maxval=inputs**-0.5)
