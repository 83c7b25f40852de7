"""OSF: Orthogonal Subspace Fine-tuning (Nayak et al., 2025, https://arxiv.org/abs/2504.07097).

    W' = W + U S V - U0 S0 V0,   U0 S0 V0 the part of W of its k smallest singular values

for W (out, in) as in PyTorch: `osf_svd_params.U_low` (out, k), `.S_low` (k), `.V_low` (k, in), which begin as that
part; k = min(in, out) - effective_rank. It follows from W whatever the signs of its vectors are, and so does what
`jpeft.osf_gradient_projection` needs of the rest: `osf_U_high` if out > in, `osf_V_high` if in > out. Costs
k (in + out + 1) parameters, 4 k (in + out) FLOPs and 2 k numbers of memory for each token, and k (in + out + 1) +
effective_rank max(in, out) numbers that do not train. PEFT applies the first active adapter alone; here all of them.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from .._config import PeftType, TunerConfig
from .._contract import Arrays, Site, low_rank, register, wide_dtype
from .._patterns import search_value

U, S, V = (f"osf_svd_params.{name}_low" for name in "USV")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OSFConfig(TunerConfig):
    """What OSF trains and where; PEFT's fields and defaults.

    effective_rank: singular values of a weight that are left alone, the largest: a number of them, a fraction in (0, 1]
    of the lesser of its inputs and outputs (a float), or None for half of them. rank_pattern: {regular expression:
    effective_rank} for the modules in whose path it is found, the first counts. init_weights: False for random values
    instead of the weight's own. target_svd_config: nothing, as in PEFT. The gradients are to be projected:
    `jpeft.osf_gradient_projection`. Raises ValueError for values out of range.

    >>> OSFConfig(effective_rank=0.75, target_modules=["q_proj"]).effective_rank
    0.75
    """

    peft_type: PeftType | None = PeftType.OSF
    effective_rank: float | None = None
    rank_pattern: Mapping[str, float] | None = None
    init_weights: bool | None = True
    target_svd_config: Mapping[str, int] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        given = {f"rank_pattern[{name!r}]": value for name, value in (self.rank_pattern or {}).items()}
        for name, value in {"effective_rank": self.effective_rank, **given}.items():
            if value is not None and not value > 0:
                raise ValueError(
                    f"{name} is {value!r}; expected an integer of at least 1, a fraction in (0, 1] or None"
                )


def preserved(site: Site, config: OSFConfig) -> int:
    """The number of singular values that are left alone."""
    rank = search_value(site.path, config.rank_pattern or {}, config.effective_rank)
    most = min(site.in_features, site.out_features)
    wanted = most // 2 if rank is None else int(most * rank) if isinstance(rank, float) and rank <= 1 else int(rank)
    if wanted < 1:
        raise ValueError(
            f"effective_rank is {rank!r} at {site.path!r}, which is {wanted} of its {most} singular values; expected "
            "at least 1 of them"
        )
    return min(wanted, most)


def init(key: jax.Array, site: Site, config: OSFConfig, weight: Callable[[], Any]) -> dict[str, jax.Array]:
    kept, w = preserved(site, config), weight()
    u, s, v = jnp.linalg.svd(w.astype(wide_dtype(w.dtype)).T, full_matrices=False)
    began = {"osf_U_low_init": u[:, kept:], "osf_S_low_init": s[kept:], "osf_V_low_init": v[kept:]}
    arrays = dict(zip((U, S, V), began.values(), strict=True))
    if config.init_weights is False:
        keys = jax.random.split(key, 3)
        arrays = {name: jax.random.normal(k, arrays[name].shape) for name, k in zip(arrays, keys, strict=True)}
    # Of a square factor the rest follows from the part itself.
    if site.out_features > site.in_features:
        began["osf_U_high"] = u[:, :kept]
    if site.in_features > site.out_features:
        began["osf_V_high"] = v[:kept]
    return {**arrays, **began}


def factors(p: Arrays, site: Site) -> tuple[jax.Array, jax.Array]:
    now, began = p[U] * p[S], p["osf_U_low_init"] * p["osf_S_low_init"]
    a = jnp.concatenate([p[V], p["osf_V_low_init"].astype(p[V].dtype)])
    b = jnp.concatenate([now, -began.astype(now.dtype)], axis=1).T
    return a, p["scaling"].astype(b.dtype) * b


OSF = register(
    low_rank(
        config=OSFConfig,
        init=init,
        factors=factors,
        searched=frozenset({"rank_pattern"}),
        derived=frozenset({"osf_U_low_init", "osf_S_low_init", "osf_V_low_init", "osf_U_high", "osf_V_high"}),
    )
)
