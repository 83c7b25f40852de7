"""Poly: Combining Modular Skills in Multitask Learning (Ponti et al., 2022, https://arxiv.org/abs/2202.13914).

    y = x W + (x A) B / r,   A = sum_s w_s A_s,   B = sum_s w_s B_s,   w = g / sum(g),   g = sigmoid(logits[task])

`poly_lora_A (splits, skills, in / splits, r)`, `poly_lora_B (splits, skills, r, out / splits)`, and for the mixing
`poly_router.module_logits (tasks, splits skills)`. With several splits (Multi-Head Routing, Caccia et al., 2022,
https://arxiv.org/abs/2211.03831) each part of the inputs, and each of the outputs, has a mixture of its own.
Costs skills r (in + out) and tasks splits skills parameters, 2 r (in + out) FLOPs for each token and
2 skills r (in + out) for each row, whose A and B are made anew. `task_ids (rows,)`: of each row.
In training, with a key, g is drawn: a relaxed Bernoulli variable of temperature 1, sigmoid(logits + logistic noise),
for each row and use of a layer. What a row gets depends on its task, so that it cannot be merged.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from .._config import PeftType, TunerConfig
from .._contract import Arrays, Base, Method, Site, register, wide_dtype
from ._task_ids import of_known, task_ids_of

EPSILON = 1e-12


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolyConfig(TunerConfig):
    """What Poly trains and where; PEFT's fields and defaults.

    r: rank. n_tasks: how many tasks there are, `task_ids` being 0 to n_tasks - 1. n_skills: how many pairs of factors
    they share. n_splits: into how many parts inputs and outputs are split, each with a mixture of its own; it has to
    divide both. poly_type: "poly". init_weights: whether B begins as zeros; if not, as A does, uniform.
    Raises ValueError for values out of range.

    >>> PolyConfig(n_tasks=3, target_modules=["q_proj", "v_proj"]).n_skills
    4
    """

    peft_type: PeftType | None = PeftType.POLY
    r: int = 8
    poly_type: str = "poly"
    n_tasks: int = 1
    n_skills: int = 4
    n_splits: int = 1
    init_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("r", "n_tasks", "n_skills", "n_splits"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}; expected an integer of at least 1")
        if self.poly_type != "poly":
            raise ValueError(f"poly_type is {self.poly_type!r}; expected 'poly' (of several heads with n_splits > 1)")
        if self.bias != "none":
            raise ValueError(f"bias is {self.bias!r}; expected 'none', as Poly trains no biases")


def init(key: jax.Array, site: Site, config: PolyConfig, weight: Callable[[], Any]) -> dict[str, jax.Array]:
    splits, skills, r = config.n_splits, config.n_skills, config.r
    if site.in_features % splits or site.out_features % splits:
        raise ValueError(
            f"Poly at {site.path!r}: n_splits is {splits}; expected a number that divides its {site.in_features} "
            f"inputs and {site.out_features} outputs"
        )
    inputs, outputs = site.in_features // splits, site.out_features // splits
    key_a, key_b, key_router = jax.random.split(key, 3)
    b = (splits, skills, r, outputs)
    return {
        "poly_lora_A": uniform(key_a, (splits, skills, inputs, r), 1 / math.sqrt(inputs)),
        "poly_lora_B": jnp.zeros(b) if config.init_weights else uniform(key_b, b, 1 / math.sqrt(r)),
        "poly_router.module_logits": uniform(key_router, (config.n_tasks, splits * skills), 1e-3),
    }


def uniform(key: jax.Array, shape: tuple[int, ...], bound: float) -> jax.Array:
    return jax.random.uniform(key, shape, minval=-bound, maxval=bound)


def mixing(logits: jax.Array, context: Mapping[str, Any]) -> jax.Array:
    """How much each skill counts, (rows, splits, skills), for logits of this shape; the sum over skills is one."""
    if "rng" in context:
        logits = logits + jax.random.logistic(context["rng"], logits.shape, logits.dtype)
    gates = jax.nn.sigmoid(logits)
    return gates / (gates.sum(axis=-1, keepdims=True) + EPSILON)


def forward(p: Arrays, x: jax.Array, base: Base, site: Site, context: Mapping[str, Any]) -> jax.Array:
    y, tasks = base(x), context["task_ids"]
    a, b, logits = p["poly_lora_A"], p["poly_lora_B"], p["poly_router.module_logits"]
    (splits, skills, _, r), rows, wide = a.shape, tasks.shape[0], wide_dtype(a.dtype)
    if x.ndim < 2 or x.shape[0] != rows:
        raise ValueError(
            f"task_ids are for {rows} rows, but {site.path!r} gets an array of shape {x.shape}; expected (rows, "
            "tokens, features) of as many rows, the whole batch with its rows as an axis by itself"
        )
    own = jnp.take(logits.astype(wide), tasks, axis=0, mode="clip").reshape(rows, splits, skills)
    w = of_known(mixing(own, context), tasks, logits.shape[0])
    a = jnp.einsum("bqs,qsdr->bqdr", w, a.astype(wide)).reshape(rows, -1, r)
    b = jnp.einsum("bqs,qsrd->brqd", w, b.astype(wide)).reshape(rows, r, -1) * (p["scaling"].astype(wide) / r)
    h = jax.vmap(base.apply)(x, a)
    return y + jax.vmap(jnp.matmul)(h, b.astype(h.dtype)).astype(y.dtype)


def merge(p: Arrays, w: jax.Array, b: jax.Array | None, site: Site) -> tuple[jax.Array, jax.Array | None]:
    raise ValueError(
        f"Poly at {site.path!r} mixes its skills by the task of each row, which no weight does: it cannot be merged. "
        "Expected it beside the weight (jpeft.lift), in a function that uses the whole weight in products with (rows, "
        "tokens, features)"
    )


POLY = register(
    Method(
        config=PolyConfig,
        init=init,
        forward=forward,
        merge=merge,
        row_inputs=task_ids_of(lambda config: config.n_tasks),
        noisy=lambda config: True,
    )
)
