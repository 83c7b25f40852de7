"""DeLoRA: Decoupling Angles and Strength in Low-rank Adaptation (Bini et al., 2025, https://arxiv.org/abs/2503.18225).

    W' = W + diag(w) A diag(l / (r |a_k| |b_k|)) B,   w the norms of W's rows, one an input, when the adapter was made

`delora_A (r, in)`, `delora_B (out, r)` and `delora_lambda` (1): l train; `delora_w_norm` (in) does not. Norms below
1e-4 count as that. Costs r (in + out) + 1 parameters, 2 r (in + out) FLOPs and r numbers of memory for each token,
and in numbers that do not train. PEFT's module_dropout, said to leave out layers, is a plain dropout on the input of
the change, and files are trained so, so here, too.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from .._config import PeftType, TunerConfig
from .._contract import Arrays, Site, low_rank, register, wide_dtype
from .._patterns import value_for
from ._lycoris import kaiming_uniform

_LEAST = 1e-4


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeloraConfig(TunerConfig):
    """What DeLoRA trains and where; PEFT's fields and defaults.

    r: rank, at least 1. delora_lambda: where the strength of the change begins, which bounds its norm.
    module_dropout: rate in [0, 1) on the input of the low-rank path. rank_pattern, lambda_pattern: {name or regular
    expression: value}, the first match wins. init_weights: whether B begins as zeros, so that a fresh adapter changes
    nothing. Raises ValueError for values out of range.

    >>> DeloraConfig(r=4, target_modules=["q_proj"]).delora_lambda
    15
    """

    peft_type: PeftType | None = PeftType.DELORA
    r: int = 8
    delora_lambda: float = 15
    module_dropout: float = 0.0
    init_weights: bool = True
    rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)
    lambda_pattern: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        for where, rank in [("r", self.r), *((f"rank_pattern[{k!r}]", v) for k, v in self.rank_pattern.items())]:
            if not isinstance(rank, int) or rank <= 0:
                raise ValueError(f"{where} is {rank!r}; expected an integer of at least 1")
        if not 0.0 <= self.module_dropout < 1.0:
            raise ValueError(f"module_dropout is {self.module_dropout!r}; expected a rate in [0, 1)")
        if self.bias not in ("none", "all", "delora_only"):
            raise ValueError(f"bias is {self.bias!r}; expected 'none', 'all' or 'delora_only'")


def init(key: jax.Array, site: Site, config: DeloraConfig, weight: Callable[[], Any]) -> dict[str, jax.Array]:
    r, w, (key_a, key_b) = value_for(site.path, config.rank_pattern, config.r), weight(), jax.random.split(key)
    strength = value_for(site.path, config.lambda_pattern, config.delora_lambda)
    shape = (site.out_features, r)
    return {
        "delora_A": kaiming_uniform(key_a, (r, site.in_features)),
        "delora_B": jnp.zeros(shape) if config.init_weights else kaiming_uniform(key_b, shape),
        "delora_lambda": jnp.full((1,), float(strength)),
        "delora_w_norm": jnp.linalg.norm(w.astype(wide_dtype(w.dtype)), axis=1),
    }


def norms(rows: jax.Array) -> jax.Array:
    """Of each row, at least 1e-4; where it is that, without a derivative."""
    return jnp.sqrt(jnp.maximum(jnp.sum(rows * rows, axis=1), _LEAST**2))


def factors(p: Arrays, site: Site) -> tuple[jax.Array, jax.Array]:
    names = ("delora_A", "delora_B", "delora_lambda", "delora_w_norm")
    a, b, strength, w_norm = (p[name].astype(wide_dtype(p[name].dtype)) for name in names)
    strengths = p["scaling"].astype(a.dtype) * strength / (len(a) * norms(a) * norms(b.T))
    return (a * w_norm).astype(p["delora_A"].dtype), (strengths[:, None] * b.T).astype(p["delora_B"].dtype)


DELORA = register(
    low_rank(
        config=DeloraConfig,
        init=init,
        factors=factors,
        dropout=lambda config: config.module_dropout,
        frozen=frozenset({"delora_w_norm"}),
    )
)
