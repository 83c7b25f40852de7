"""PEANuT: Parameter-Efficient Adaptation with Weight-aware Neural Tweakers (Zhong et al., 2024, arXiv:2410.01870).

    W' = W + s H B,   H (in, r) a small network of the rows of W itself (https://arxiv.org/abs/2410.01870):
    H_0 = f(W A),   H_i = f(H_(i-1) E_i),   then back:  H <- f(H D_i) + H_(depth-i),   i = 1 ... depth

`peanut_A` (r, out), `peanut_B` (out, r), `peanut_encoders.0` ... and `peanut_decoders.0` ... (r, r), each transposed;
f is act_fn and s is scaling. Costs 2 r out + 2 depth r^2 parameters; for each token 2 r (in + out) FLOPs and r numbers
of memory, and for each use of the weight 2 in out r + 4 depth in r^2 FLOPs and (2 depth + 1) in r numbers.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from .._config import PeftType, TunerConfig
from .._contract import Arrays, Base, Method, Site, register, wide_dtype
from ._activations import ACTIVATIONS
from ._lycoris import kaiming_uniform


@dataclasses.dataclass(frozen=True, kw_only=True)
class PeanutConfig(TunerConfig):
    """What PEANuT trains and where; PEFT's fields and defaults.

    r: width of the network, at least 1. depth: layers on the way in and as many on the way out, beside the first and
    the last. act_fn: the name that transformers has for the activation, such as "relu", "gelu", "silu" or "tanh".
    scaling: factor of the change. init_weights: False for a random last layer, which otherwise begins at zero.
    Raises ValueError for values out of range and unknown activations.

    >>> PeanutConfig(r=16, depth=1, act_fn="silu", target_modules=["q_proj"]).scaling
    1.0
    """

    peft_type: PeftType | None = PeftType.PEANUT
    r: int = 32
    depth: int = 0
    act_fn: str = "relu"
    scaling: float = 1.0
    init_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("r", 1), ("depth", 0)):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected an integer of at least {least}")
        if self.act_fn not in ACTIVATIONS:
            raise ValueError(f"act_fn is {self.act_fn!r}; expected one of {', '.join(sorted(ACTIVATIONS))}")


def init(key: jax.Array, site: Site, config: PeanutConfig, weight: Callable[[], Any]) -> dict[str, jax.Array]:
    r, n_out = config.r, site.out_features
    middle = [f"peanut_{side}.{index}" for side in ("encoders", "decoders") for index in range(config.depth)]
    shapes = {"peanut_A": (r, n_out), **dict.fromkeys(middle, (r, r)), "peanut_B": (n_out, r)}
    keys = dict(zip(shapes, jax.random.split(key, len(shapes)), strict=True))
    arrays = {name: kaiming_uniform(keys[name], shape) for name, shape in shapes.items()}
    return {**arrays, "peanut_B": jnp.zeros((n_out, r))} if config.init_weights else arrays


def rows(p: Arrays, w: jax.Array, config: Any) -> jax.Array:
    """H (in, r) of a weight (in, out), float32 or wider."""
    act = ACTIVATIONS[config.act_fn]

    def layer(h: jax.Array, name: str) -> jax.Array:
        return act(h @ p[name].T.astype(h.dtype))

    first = p["peanut_A"].T.astype(w.dtype)
    h = act(jnp.matmul(w, first, preferred_element_type=wide_dtype(w.dtype)))
    passed = []
    for index in range(config.depth):
        passed.append(h)
        h = layer(h, f"peanut_encoders.{index}")
    for index in range(config.depth):
        h = layer(h, f"peanut_decoders.{index}") + passed.pop()
    return h


def last(p: Arrays) -> jax.Array:
    return p["scaling"].astype(p["peanut_B"].dtype) * p["peanut_B"].T


def forward(p: Arrays, x: jax.Array, base: Base, site: Site, context: Mapping[str, Any]) -> jax.Array:
    y, h = base(x), base.apply(x, rows(p, base.weight(), context["config"]))
    return y + (h @ last(p).astype(h.dtype)).astype(y.dtype)


def merge(p: Arrays, w: jax.Array, b: jax.Array | None, site: Site) -> tuple[jax.Array, jax.Array | None]:
    h = rows(p, p["base"], p["config"])
    return w + (h @ last(p).astype(h.dtype)).astype(w.dtype), b


PEANUT = register(
    Method(
        config=PeanutConfig,
        init=init,
        forward=forward,
        merge=merge,
        scaling=lambda site, config: config.scaling,
        needs_base=True,
        needs_config=True,
    )
)
