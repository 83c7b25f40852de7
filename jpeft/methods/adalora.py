"""AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning (Zhang et al., 2023, arXiv:2303.10512).

    W' = W + s A diag(e) B,   s = lora_alpha / (init_r + 1e-5)      (https://arxiv.org/abs/2303.10512, equation 3)

`lora_A (r, in * window)`, `lora_E (r, 1)`, `lora_B (out, r)`; r is init_r, or what the file's rank_pattern left of it.
Which e stay is decided in training: `jpeft.adalora_rank_allocator`. Costs r (in + out + 1) parameters and 2 r (in +
out) FLOPs for each token; no memory besides. As in PEFT s keeps init_r however many ranks are left, and a singular
value that is masked trains on, and may come back, until the last allocation.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from .._config import PeftType, TunerConfig
from .._contract import CONVOLUTION, LINEAR, Arrays, Site, low_rank, register
from .._patterns import value_for

E = ".lora_E"


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaLoraConfig(TunerConfig):
    """What AdaLoRA trains and where, and its schedule; PEFT's fields and defaults.

    init_r: rank at the start, at least 1. target_r: mean rank at the end. total_step: steps of training, which has to
    be given; tinit, tfinal: steps at their beginning and end without allocation; deltaT: steps between two allocations,
    at least 1. beta1, beta2: of the moving averages of sensitivity and uncertainty, in (0, 1). orth_reg_weight: of
    `jpeft.adalora_orthogonality_loss`, at least 0. lora_alpha: scale. lora_dropout: rate in [0, 1). init_lora_weights:
    whether a fresh adapter changes nothing. rank_pattern: {module path + ".lora_E": whether each rank stays}, filled in
    by `jpeft.adalora_sliced`. r: PEFT's field; of no effect. Raises ValueError for values out of range.

    >>> AdaLoraConfig(target_r=4, init_r=6, total_step=100, target_modules=["q_proj"]).deltaT
    1
    """

    peft_type: PeftType | None = PeftType.ADALORA
    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    init_lora_weights: bool = True
    target_r: int = 8
    init_r: int = 12
    tinit: int = 0
    tfinal: int = 0
    deltaT: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    orth_reg_weight: float = 0.5
    total_step: int | None = None
    rank_pattern: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        total = self.total_step
        checks = {
            "total_step": (isinstance(total, int) and total > 0, "the number of steps of training, at least 1"),
            "init_r": (isinstance(self.init_r, int) and self.init_r >= 1, "an integer of at least 1"),
            "target_r": (0 <= self.target_r <= self.init_r, f"a number of 0 to init_r={self.init_r}"),
            "deltaT": (isinstance(self.deltaT, int) and self.deltaT >= 1, "an integer of at least 1"),
            "beta1": (0 < self.beta1 < 1, "a number between 0 and 1"),
            "beta2": (0 < self.beta2 < 1, "a number between 0 and 1"),
            "orth_reg_weight": (self.orth_reg_weight >= 0, "a number of at least 0"),
            "lora_alpha": (self.lora_alpha > 0, "a positive number"),
            "lora_dropout": (0.0 <= self.lora_dropout < 1.0, "a rate in [0, 1)"),
            "bias": (self.bias in ("none", "all", "lora_only"), "'none', 'all' or 'lora_only'"),
        }
        for name, (good, expected) in checks.items():
            if not good:
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected {expected}")
        if not 0 <= self.tinit < (total or 0) - self.tfinal <= (total or 0):
            raise ValueError(
                f"tinit={self.tinit} and tfinal={self.tfinal} leave no step of total_step={total} for allocation; "
                "expected tinit < total_step - tfinal, neither below 0"
            )


def rank_of(site: Site, config: AdaLoraConfig) -> int:
    kept = {re.escape(name.removesuffix(E)): sum(map(bool, own)) for name, own in (config.rank_pattern or {}).items()}
    return value_for(site.path, kept, config.init_r)


def init(key: jax.Array, site: Site, config: AdaLoraConfig, weight: Callable[[], Any]) -> dict[str, jax.Array]:
    if len(site.window) not in (0, 2):
        raise ValueError(f"AdaLoRA at {site.path!r}: the window is {site.window}; expected one of two axes")
    rank, inputs = rank_of(site, config), site.in_features
    for size in site.window:
        inputs *= size
    keys = jax.random.split(key, 3)
    a, b = jax.random.normal(keys[0], (rank, inputs)), jax.random.normal(keys[1], (site.out_features, rank))
    if not config.init_lora_weights:
        return {"lora_A": a, "lora_B": b, "lora_E": jax.random.normal(keys[2], (rank, 1))}
    return {"lora_A": 0.02 * a, "lora_B": 0.02 * b, "lora_E": jnp.zeros((rank, 1))}


def factors(p: Arrays, site: Site) -> tuple[jax.Array, jax.Array]:
    a, b = p["lora_A"] * p["lora_E"].astype(p["lora_A"].dtype), p["lora_B"]
    return a.reshape(a.shape[0], site.in_features, *site.window), p["scaling"].astype(b.dtype) * b.T


ADALORA = register(
    low_rank(
        config=AdaLoraConfig,
        init=init,
        factors=factors,
        scaling=lambda site, config: config.lora_alpha / (config.init_r + 1e-5),
        dropout=lambda config: config.lora_dropout,
        kinds=frozenset({LINEAR, CONVOLUTION}),
        ranked=E,
    )
)
