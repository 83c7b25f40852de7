"""VeLoRA: Memory Efficient Training using Rank-1 Sub-Token Projections (Miles et al., 2024, arXiv:2405.17991).

    W' = W + s A B as in LoRA (https://arxiv.org/abs/2405.17991); for the gradient of A, of each input x only
    z_g = <x_g, v> is kept, for groups g of its features, and scale z_g v stands for x_g

Beside LoRA's arrays `lora_velora_embed`: v (in / num_groups, rounded up), which does not train.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from .._contract import LINEAR, Arrays, Base, Site, dropped, low_rank, register, wide_dtype
from .lora import LORA, LoraConfig, factors, init as init_lora, scaling


def init(key: jax.Array, site: Site, config: LoraConfig, weight: Callable[[], Any]) -> dict[str, jax.Array]:
    settings: Any = config.velora_config
    size = -(-site.in_features // settings.num_groups)
    random = settings.init_type == "random"
    direction = unit(jax.random.normal(jax.random.fold_in(key, 2), (size,))) if random else jnp.zeros(size)
    return {**init_lora(key, site, config, weight), "lora_velora_embed": direction}


def unit(v: jax.Array) -> jax.Array:
    """v of length one, and equal entries if v is zero."""
    v = v.astype(wide_dtype(v.dtype))
    v = jnp.where(jnp.any(v != 0), v, jnp.ones_like(v))
    return v / jnp.linalg.norm(v)


def grouped(x: jax.Array, size: int) -> jax.Array:
    """x (..., in) as (rows, groups, size), filled up with zeros."""
    missing = -x.shape[-1] % size
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)])
    return x.reshape(-1, x.shape[-1] // size, size)


def forward(p: Arrays, x: jax.Array, base: Base, site: Site, context: Mapping[str, Any]) -> jax.Array:
    a, b = factors(p, site)
    y, x = base(x), dropped(x, context)
    h = compressed_product(context["config"].velora_config, x, a.astype(x.dtype), p["lora_velora_embed"])
    return y + (h @ b.astype(h.dtype)).astype(y.dtype)


def direction_of(settings: Any, x: jax.Array, stored: jax.Array) -> jax.Array:
    average = unit(grouped(x, stored.shape[0]).mean((0, 1)))
    if settings.init_type == "batch_average":
        return average.astype(x.dtype)
    # "batch_average_once" has nothing stored before a first average is.
    return jnp.where(jnp.any(stored != 0), stored.astype(average.dtype), average).astype(x.dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def compressed_product(settings: Any, x: jax.Array, a: jax.Array, stored: jax.Array) -> jax.Array:
    return x @ a.T


# A rule for tangents, and not for the backward pass alone, so that derivatives in both directions exist.
@compressed_product.defjvp
def _tangent(settings: Any, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    (x, a, stored), (x_dot, a_dot, _) = primals, tangents
    direction = direction_of(settings, x, stored)
    z = grouped(x, direction.shape[0]) @ direction

    # What is made of z is made again in the backward pass, so that z is all that is kept until then.
    @jax.checkpoint
    def by_a(z: jax.Array, direction: jax.Array, a_dot: jax.Array) -> jax.Array:
        made = (z[:, :, None] * direction).reshape(z.shape[0], -1)[:, : a.shape[1]]
        return (made * jnp.asarray(settings.scale, z.dtype)) @ a_dot.T

    return x @ a.T, x_dot @ a.T + by_a(z, direction, a_dot).reshape(*x.shape[:-1], a.shape[0])


VELORA = register(
    dataclasses.replace(
        low_rank(
            config=LoraConfig,
            init=init,
            factors=factors,
            scaling=scaling,
            dropout=LORA.dropout,
            kinds=frozenset({LINEAR}),
            frozen=frozenset({"lora_velora_embed"}),
        ),
        forward=forward,
        factors=None,
    ),
    applies=lambda config: config.velora_config is not None,
)
