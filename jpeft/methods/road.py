"""RoAd: 3-in-1, 2D Rotary Adaptation for Efficient Finetuning (Liao and Monz, 2024, https://arxiv.org/abs/2409.00119).

    y = R (x W + b),   in each group of features    y1 = c1 z1 - s1 z2,   y2 = s2 z1 + c2 z2    (equation 4)

for z1, z2 the first and the second half of the group of z = x W + b, with c = alpha cos(theta), s = alpha sin(theta).
`road_theta`, `road_alpha`: (out / 2) for road_1 (c1 = c2, s1 = s2), (out) for road_2,
and (2 out) for road_4, where c and s are of other angles and scales: for each
group group_size numbers of c, then as many of s. Costs out, 2 out or 4 out parameters, 3 out FLOPs for each token.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from .._config import PeftType, TunerConfig
from .._contract import Arrays, Base, Method, Site, register, wider

SIZES = {"road_1": 0.5, "road_2": 1, "road_4": 2}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoadConfig(TunerConfig):
    """What RoAd trains and where; PEFT's fields and defaults.

    variant: "road_1", "road_2" or "road_4", with as many numbers for each output. group_size: features of which the
    first half is paired with the second; even, at least 2, and a divisor of every layer's outputs. init_weights:
    whether the rotation begins as the identity; else angles are normal around 0 and scales around 1, both with a
    standard deviation of 0.5. Raises ValueError for values out of range.

    >>> RoadConfig(variant="road_2", target_modules=["q_proj"]).group_size
    64
    """

    peft_type: PeftType | None = PeftType.ROAD
    variant: str = "road_1"
    group_size: int = 64
    init_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.variant not in SIZES:
            raise ValueError(f"variant is {self.variant!r}; expected one of {', '.join(map(repr, SIZES))}")
        if not isinstance(self.group_size, int) or self.group_size <= 0 or self.group_size % 2:
            raise ValueError(f"group_size is {self.group_size!r}; expected an even integer of at least 2")


def init(key: jax.Array, site: Site, config: RoadConfig, weight: Callable[[], Any]) -> dict[str, jax.Array]:
    if site.out_features % config.group_size:
        raise ValueError(
            f"group_size is {config.group_size} at {site.path!r}; expected a divisor of its {site.out_features} outputs"
        )
    size = int(SIZES[config.variant] * site.out_features)
    if config.init_weights:
        return {"road_theta": jnp.zeros(size), "road_alpha": jnp.ones(size)}
    theta, alpha = 0.5 * jax.random.normal(key, (2, size))
    return {"road_theta": theta, "road_alpha": 1 + alpha}


def columns(p: Arrays, config: RoadConfig) -> tuple[jax.Array, jax.Array]:
    """c and s for each output: (groups, 2, group_size / 2)."""
    half = config.group_size // 2
    theta, alpha = p["road_theta"], p["road_alpha"]
    if config.variant == "road_4":
        (theta, of_s), (alpha, scale_of_s) = (a.reshape(-1, 2, 2, half).swapaxes(0, 1) for a in (theta, alpha))
        return alpha * jnp.cos(theta), scale_of_s * jnp.sin(of_s)
    theta, alpha = (a.reshape(-1, 1 if config.variant == "road_1" else 2, half) for a in (theta, alpha))
    return alpha * jnp.cos(theta), alpha * jnp.sin(theta)


def rotated(p: Arrays, y: jax.Array, config: RoadConfig) -> jax.Array:
    """R y for y (..., out), in the wider type of y and the arrays."""
    c, s = columns(p, config)
    z = y.reshape(*y.shape[:-1], -1, 2, config.group_size // 2)
    wide = wider(y.dtype, c.dtype)
    z, c, s = z.astype(wide), c.astype(wide), s.astype(wide)
    turned = jnp.stack([-z[..., 1, :], z[..., 0, :]], axis=-2)
    return (z * c + turned * s).reshape(y.shape).astype(y.dtype)


def forward(p: Arrays, x: jax.Array, base: Base, site: Site, context: Mapping[str, Any]) -> jax.Array:
    return rotated(p, base(x), context["config"])


def merge(p: Arrays, w: jax.Array, b: jax.Array | None, site: Site) -> tuple[jax.Array, jax.Array | None]:
    config: Any = p["config"]
    return rotated(p, w, config), None if b is None else rotated(p, b, config)


ROAD = register(
    Method(config=RoadConfig, init=init, forward=forward, merge=merge, changes_bias=True, needs_config=True)
)
