"""HRA: Householder Reflection Adaptation (Yuan et al., 2024, https://arxiv.org/abs/2405.17484).

    W' = H_r ... H_1 W,   H_i = 1 - 2 u_i u_i^T,   the u_i columns of U, of length one

`hra_u`: U (in, r), or (in * height * width, r) of a convolution. The product of the reflections is never built: it is
1 - U M^-1 U^T with M (r, r) the lower triangle of U^T U and 1/2 on its diagonal (the compact WY form), so that x gets
two thin products. apply_GS makes the u_i orthogonal first: then M is U^T U / 2, whatever U is, without the steps of
Gram and Schmidt. Costs in * r parameters, 4 in r FLOPs for each token (a convolution: as LoRA), r numbers of memory.
PEFT begins apply_GS with equal columns, of which nothing is left to divide by; here it begins with random ones. Where
several adapters act on one convolution, each changes the base's kernel, as does each that needs it.
"""

import dataclasses
import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from .._config import PeftType, TunerConfig
from .._contract import CONVOLUTION, LINEAR, Arrays, Base, Method, Site, register, wide_dtype
from ._rotations import as_rows, rotated_size


@dataclasses.dataclass(frozen=True, kw_only=True)
class HRAConfig(TunerConfig):
    """What HRA trains and where; PEFT's fields and defaults.

    r: number of reflections, at least 1; even, so that a fresh adapter changes nothing (pairs of equal reflections).
    apply_GS: whether the reflections are made orthogonal to one another. init_weights: False for random reflections.
    Raises ValueError for values out of range.

    >>> HRAConfig(r=4, target_modules=["q_proj"]).apply_GS
    False
    """

    peft_type: PeftType | None = PeftType.HRA
    r: int = 8
    apply_GS: bool = False
    init_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.r, int) or self.r <= 0:
            raise ValueError(f"r is {self.r!r}; expected an integer of at least 1")
        if self.bias not in ("none", "all", "hra_only"):
            raise ValueError(f"bias is {self.bias!r}; expected 'none', 'all' or 'hra_only'")


def init(key: jax.Array, site: Site, config: HRAConfig, weight: Callable[[], Any]) -> dict[str, jax.Array]:
    size, rank = rotated_size(site, "HRA"), config.r
    if config.apply_GS and rank > size:
        raise ValueError(
            f"apply_GS at {site.path!r}: r is {rank}; expected at most {size}, as there are no more orthogonal vectors"
        )
    paired = config.init_weights and not config.apply_GS
    if paired and rank % 2:
        warnings.warn(
            f"r is {rank}, an odd number of reflections, which cannot cancel in pairs: a fresh adapter changes what "
            f"the model computes; an even r does not (init_weights=False says that this is meant)",
            stacklevel=2,
        )
    columns = rank // 2 if paired and rank % 2 == 0 else rank
    # torch's kaiming_uniform_(a=sqrt(5)), for which the number of columns is the fan.
    u = jax.random.uniform(key, (size, columns), minval=-1, maxval=1) / math.sqrt(columns)
    return {"hra_u": jnp.repeat(u, rank // columns, axis=1)}


def factors(p: Arrays, config: HRAConfig) -> tuple[jax.Array, jax.Array]:
    """U (in, r) and M^-1 U^T (r, in), of which H_r ... H_1 = 1 - U M^-1 U^T."""
    u = p["hra_u"].astype(wide_dtype(p["hra_u"].dtype))
    u = u / jnp.linalg.norm(u, axis=0)
    gram = jnp.matmul(u.T, u, precision="highest")
    one = jnp.eye(config.r, dtype=u.dtype)
    # M^-1 first, which is small: solvers for as many columns as there are inputs start threads of their own on CPUs.
    if config.apply_GS:
        inverse = jnp.linalg.solve(gram / 2, one)
    else:
        # With the squares of the lengths as they were rounded, so that pairs of equal reflections cancel.
        inverse = jax.scipy.linalg.solve_triangular(jnp.tril(gram) * (1 - one / 2), one, lower=True)
    return u, jnp.matmul(inverse, u.T, precision="highest")


def forward(p: Arrays, x: jax.Array, base: Base, site: Site, context: Mapping[str, Any]) -> jax.Array:
    u, v = factors(p, context["config"])
    if site.kind != CONVOLUTION:
        return base(x - (x @ u.astype(x.dtype)) @ v.astype(x.dtype))
    window = (site.in_features, *site.window)
    y = base(x)
    h = base.apply(x, u.reshape(*window, -1))
    return y - (h @ base.project(v.reshape(-1, *window)).astype(h.dtype)).astype(y.dtype)


def merge(p: Arrays, w: jax.Array, b: jax.Array | None, site: Site) -> tuple[jax.Array, jax.Array | None]:
    config: Any = p["config"]
    u, v = (factor.astype(w.dtype) for factor in factors(p, config))
    of = p["base"].astype(w.dtype) if site.kind == CONVOLUTION else w
    return w - (u @ (v @ as_rows(of))).reshape(w.shape), b


HRA = register(
    Method(
        config=HRAConfig,
        init=init,
        forward=forward,
        merge=merge,
        kinds=frozenset({LINEAR, CONVOLUTION}),
        needs_base=True,
        needs_config=True,
    )
)
