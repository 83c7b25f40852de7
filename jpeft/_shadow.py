"""What ShadowPEFT does around each block of a decoder, for any model to call around its own."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

TRANSFORM, GATE = "shadow_update_transform.default", "shadow_update_gate.default"
DOWN, UP = "shadow_down.default.weight", "shadow_up.default.weight"


def shadow_injection(
    p: Mapping[str, jax.Array],
    hidden: jax.Array,
    shadow: jax.Array,
    *,
    alpha: float,
    rng: jax.Array | None = None,
    dropout: float = 0.0,
) -> jax.Array:
    """What goes into a block in place of `hidden`: `hidden + alpha * up(down(drop(hidden - shadow)))`.

    p: the block's arrays, as `jpeft.wrap` puts them beside it (`Adapter.weights[path of the block]`). hidden, shadow
    (..., features): the block's input, and the side state of the same tokens. alpha: `shadow_alpha` of the config.
    rng: a key of this block, in training; without one nothing is dropped. dropout: a rate in [0, 1).
    Computed in the dtype of p; the result has that of `hidden`. Raises ValueError for states of another shape.

    The hook of a decoder of one's own, with a shadow network of one's own:

    >>> import jax, jpeft
    >>> params = {"embed_tokens": {"embedding": jax.numpy.ones((9, 4))}}
    >>> params["layers"] = {"0": {"kernel": jax.numpy.ones((4, 4))}}
    >>> wrapped = jpeft.wrap(params, jpeft.ShadowConfig(r=2), rng=jax.random.key(0))
    >>> def decoder(params, ids, shadow, blocks):
    ...     x = params["embed_tokens"]["embedding"][ids]
    ...     for number, layer in params["layers"].items():
    ...         p = blocks[f"layers.{number}"]
    ...         x = jpeft.shadow_injection(p, x, shadow, alpha=0.1)
    ...         x = x + jax.numpy.tanh(x @ layer["kernel"])
    ...         shadow = jpeft.shadow_update(p, x, shadow)
    ...     return x
    >>> adapter = wrapped.adapters["default"]
    >>> sorted(adapter.shared)
    ['shadow_backbone.default.layers.0.weight']
    >>> decoder(params, jax.numpy.zeros((2, 3), int), jax.numpy.zeros((2, 3, 4)), adapter.weights).shape
    (2, 3, 4)

    Source: https://arxiv.org/abs/2604.19254, equations 2 to 4, and PEFT's ShadowLayer.
    """
    _check(hidden, shadow)
    down, up = p[DOWN], p[UP]
    difference = (hidden - shadow.astype(hidden.dtype)).astype(down.dtype)
    if rng is not None and dropout:
        kept = jax.random.bernoulli(rng, 1.0 - dropout, difference.shape)
        difference = jnp.where(kept, difference / (1.0 - dropout), jnp.zeros_like(difference))
    correction = alpha * ((difference @ down.T) @ up.T)
    return hidden + correction.astype(hidden.dtype)


def shadow_update(p: Mapping[str, jax.Array], hidden: jax.Array, shadow: jax.Array) -> jax.Array:
    """The side state after a block: `(1 - g) * shadow + g * t`, with `t = T(hidden)` and `g = sigmoid(G(hidden))`.

    p: as for `shadow_injection`. hidden, shadow (..., features): the block's output, and the side state before it. T
    and G are two linear layers with a GELU between them. Computed in the dtype of p; the result has that of `shadow`.
    Raises ValueError for states of another shape.

    >>> zeros = {"0.weight": jnp.zeros((2, 4)), "0.bias": jnp.zeros(2), "2.weight": jnp.zeros((4, 2))}
    >>> zeros["2.bias"] = jnp.zeros(4)
    >>> p = {f"shadow_update_{part}.default.{n}": a for part in ("transform", "gate") for n, a in zeros.items()}
    >>> shadow_update(p, jnp.ones((1, 4)), jnp.ones((1, 4))).tolist()
    [[0.5, 0.5, 0.5, 0.5]]

    Source: https://arxiv.org/abs/2604.19254, equations 5 to 7, and PEFT's ShadowLayer.
    """
    _check(hidden, shadow)
    wide = hidden.astype(p[f"{TRANSFORM}.0.weight"].dtype)
    gate = jax.nn.sigmoid(_two_layers(p, GATE, wide))
    return ((1.0 - gate) * shadow.astype(wide.dtype) + gate * _two_layers(p, TRANSFORM, wide)).astype(shadow.dtype)


def _two_layers(p: Mapping[str, jax.Array], name: str, x: jax.Array) -> jax.Array:
    inner = jax.nn.gelu(x @ p[f"{name}.0.weight"].T + p[f"{name}.0.bias"], approximate=False)
    return inner @ p[f"{name}.2.weight"].T + p[f"{name}.2.bias"]


def _check(hidden: jax.Array, shadow: jax.Array) -> None:
    if hidden.shape != shadow.shape:
        raise ValueError(
            f"hidden has the shape {hidden.shape}, shadow {shadow.shape}; expected one state of the shadow for each "
            "token, as wide as the model's: project it if the shadow is narrower"
        )
