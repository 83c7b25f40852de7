"""PSOFT: Principal Subspace Adaptation, orthogonal (Wu et al., 2025, https://openreview.net/forum?id=FSHrinMArK).

    W' = W + s A (diag(b) R diag(a) - 1)^T B,   s A B the first r terms of W's singular value decomposition
    R = (1 - Q)^-1 (1 + Q),  or its series, of a skew-symmetric Q,  or any matrix;   s = psoft_alpha / r

`psoft_R.weight` holds what is above the diagonal of Q (r (r - 1) / 2), or R (r, r); `psoft_R.vector_a`, `.vector_b` a
and b. `psoft_A` (r, in) and `psoft_B` (out, r) follow from W up to signs, which R does not bear: another machine may
find others, so that they are kept in a file beside PEFT's. Costs r (r - 1) / 2 + 2 r parameters, 2 r (in + out) FLOPs
and r numbers of memory for each token, once for each use 2 in r^2, and r (in + out) numbers that do not train.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from .._contract import Arrays, Base, Site, dropped, low_rank, register, wide_dtype
from ._decompositions import principal, principal_by_iteration
from ._psoft_config import PsoftConfig as PsoftConfig
from ._rotations import cayley, neumann, skew


def scaling(site: Site, config: PsoftConfig) -> float:
    return config.psoft_alpha / config.r


def init(key: jax.Array, site: Site, config: PsoftConfig, weight: Callable[[], Any]) -> dict[str, jax.Array]:
    r, most = config.r, min(site.in_features, site.out_features)
    if r > most:
        raise ValueError(
            f"r is {r} at {site.path!r}; expected at most {most}, the rank of a weight of {site.in_features} inputs "
            f"and {site.out_features} outputs"
        )
    shape = (r * (r - 1) // 2,) if config.psoft_orth else (r, r)
    noise = jnp.zeros(shape) if config.init_weights else 0.1 * jax.random.normal(key, shape)
    arrays = {"psoft_R.weight": noise if config.psoft_orth else jnp.eye(r) + noise}
    if config.psoft_mag_b:
        arrays["psoft_R.vector_b"] = jnp.ones(r)
    if config.psoft_mag_a:
        arrays["psoft_R.vector_a"] = jnp.ones(r)
    return {**arrays, **_subspace(weight(), site, config)}


def _subspace(w: jax.Array, site: Site, config: PsoftConfig) -> dict[str, jax.Array]:
    # Of PyTorch's weight (out, in): of its transpose, more signs would be others than PyTorch's.
    matrix = w.astype(wide_dtype(w.dtype)).T
    if config.psoft_svd == "full":
        u, s, vh = principal(matrix, config.r)
    else:
        key = jax.random.key(config.random_seed)
        u, s, vh = principal_by_iteration(key, matrix, config.r, config.psoft_svd_lowrank_niter)
    s = s / scaling(site, config)
    left = jnp.sqrt(s) if config.ab_svd_init == "pissa_init" else jnp.ones_like(s)
    return {"psoft_A": left[:, None] * vh, "psoft_B": u * (s / jnp.where(left > 0, left, 1))}


def skew_symmetric(p: Arrays) -> jax.Array:
    entries = p["psoft_R.weight"].astype(wide_dtype(p["psoft_R.weight"].dtype))
    return skew(entries, (1 + math.isqrt(1 + 8 * entries.size)) // 2)


def shortened(q: jax.Array, eps: float | None) -> jax.Array:
    """Q, or the multiple of it that has the length eps if it is longer."""
    if eps is None:
        return q
    square = jnp.sum(q * q)
    longer = square > eps**2
    return jnp.where(longer, eps / jnp.sqrt(jnp.where(longer, square, 1)), 1) * q


def with_rotation(p: Arrays, rotation: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The factors (r, in) and (r, out) of the change, for a matrix R."""
    for name, axis in (("psoft_R.vector_b", 1), ("psoft_R.vector_a", 0)):
        if name in p:
            rotation = rotation * jnp.expand_dims(p[name].astype(rotation.dtype), axis)
    a, b = p["psoft_A"], p["psoft_B"]
    change = rotation - jnp.eye(rotation.shape[0], dtype=rotation.dtype)
    return change.astype(a.dtype) @ a, p["scaling"].astype(b.dtype) * b.T


def factors(p: Arrays, site: Site) -> tuple[jax.Array, jax.Array]:
    stored = p["psoft_R.weight"]
    return with_rotation(p, stored if stored.ndim == 2 else cayley(-skew_symmetric(p)))


def of_series(p: Arrays, config: Any) -> tuple[jax.Array, jax.Array]:
    q = shortened(skew_symmetric(p), config.cayley_neumann_eps)
    return with_rotation(p, neumann(q, config.num_cayley_neumann_terms))


def forward_of_series(p: Arrays, x: jax.Array, base: Base, site: Site, context: Mapping[str, Any]) -> jax.Array:
    a, b = of_series(p, context["config"])
    y = base(x)
    h = base.apply(dropped(x, context), a.T)
    return y + (h @ b.astype(h.dtype)).astype(y.dtype)


def merge_of_series(p: Arrays, w: jax.Array, b: jax.Array | None, site: Site) -> tuple[jax.Array, jax.Array | None]:
    first, second = of_series(p, p["config"])
    return w + (first.T @ second).astype(w.dtype), b


PSOFT = register(
    low_rank(
        config=PsoftConfig,
        init=init,
        factors=factors,
        scaling=scaling,
        dropout=lambda config: config.psoft_dropout,
        derived=frozenset({"psoft_A", "psoft_B"}),
        precious=frozenset({"psoft_A", "psoft_B"}),
    )
)
PSOFT_BY_SERIES = register(
    dataclasses.replace(PSOFT, factors=None, forward=forward_of_series, merge=merge_of_series, needs_config=True),
    applies=lambda config: config.psoft_orth and config.use_cayley_neumann,
)
