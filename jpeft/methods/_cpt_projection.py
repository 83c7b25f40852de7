"""What keeps CPT's prompt near its context: the projection, and an optax transform that does it after each step."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from .._contract import wide_dtype

DELTA = "delta_embedding.weight"
"""How far each token of the context has moved: (n, dim)."""

_LEAST = 1e-10


def radii(config: Any) -> np.ndarray:
    """How far each token may move: (n, 1)."""
    types, scale = np.asarray(config.cpt_tokens_type_mask), np.sqrt(config.token_dim / 2048)
    own = np.where(types % 4 == 2, config.opt_projection_epsilon, config.opt_projection_format_epsilon) * scale
    return np.where((types > 0) & (types % 4 > 0), own, _LEAST).astype(np.float32)[:, None]


def projected(delta: jax.Array, config: Any) -> jax.Array:
    """D (n, dim) with the rows that are longer than their radii shortened to them."""
    wide = delta.astype(wide_dtype(delta.dtype))
    most = jnp.asarray(radii(config), wide.dtype)
    length = jnp.linalg.norm(wide, axis=1, keepdims=True)
    return jnp.where(length > most, wide * (most / jnp.where(length > most, length, 1.0)), wide).astype(delta.dtype)


def cpt_projection() -> optax.GradientTransformation:
    """CPT's projection: after each step no token of a context is farther from where it began than the config allows.

    Last in a chain: `optax.chain(optax.masked(optax.adamw(1e-4), jpeft.trainable_mask), cpt_projection())`. It takes
    updates and parameters of the wrapped parameters, or of the trainable half of `jpeft.partition`, changes those of
    `delta_embedding.weight` of CPT adapters alone, in float32 or wider, and keeps no state. Without it a prompt acts
    projected all the same, but an optimizer goes on to move what is outside. Raises ValueError if `update` gets no
    parameters. https://arxiv.org/abs/2410.17222

    >>> import jpeft, jax, jax.numpy as jnp
    >>> config = jpeft.CPTConfig(cpt_token_ids=[5, 6], cpt_tokens_type_mask=[2, 4])
    >>> wrapped = jpeft.wrap({"embed_tokens": {"embedding": jnp.ones((9, 2048))}}, config)
    >>> tx = cpt_projection()
    >>> updates, _ = tx.update(jax.tree.map(jnp.ones_like, wrapped), tx.init(wrapped), wrapped)
    >>> delta = updates.adapters["default"].shared["delta_embedding.weight"]
    >>> [round(float(jnp.linalg.norm(row)), 4) for row in delta]
    [0.1, 0.0]
    """

    def init(params: Any) -> optax.EmptyState:
        return optax.EmptyState()

    def update(grads: Any, state: optax.EmptyState, params: Any = None) -> tuple[Any, Any]:
        if params is None:
            raise ValueError("update got no parameters; expected tx.update(updates, state, params)")
        found = {
            name: _projected(grads.adapters[name], adapter)
            for name, adapter in params.adapters.items()
            if DELTA in adapter.shared
        }
        return dataclasses.replace(grads, adapters={**grads.adapters, **found}), state

    return optax.GradientTransformation(init, update)  # pyright: ignore[reportArgumentType]


def _projected(updates: Any, adapter: Any) -> Any:
    update, delta = updates.shared.get(DELTA), adapter.shared.get(DELTA)
    # Of an adapter that does not train there is no update.
    if update is None or delta is None or jnp.shape(update) != jnp.shape(delta):
        return updates
    wide = wide_dtype(delta.dtype)
    start = delta.astype(wide)
    moved = projected(start + update.astype(wide), adapter.config)
    return dataclasses.replace(updates, shared={**updates.shared, DELTA: (moved - start).astype(update.dtype)})
