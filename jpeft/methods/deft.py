"""DEFT: Decompositional Efficient Fine-Tuning (Kumar et al., 2025, https://arxiv.org/abs/2509.22793).

    W' = (1 - Q V^T) W + s Q R,   with (Q, V) = (P, relu(P)) or both the factor Q of P's decomposition Q R
    W' = (1 - Q V^T) W           with para=True: PaRa (Chen et al., 2024, https://openreview.net/forum?id=KZgo2YQbhc)

for W (out, in) as in PyTorch; `deft_P` (out, r), `deft_R` (r, in), s = alpha / r, or 1 without alpha. Costs
r (in + out) parameters, 2 r (in + 2 out) FLOPs and 2 r numbers of memory for each token; with para r out, 4 r out and
r. Changes by several such adapters add up, as in PEFT; all but the first then take the base's product once more.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from .._config import PeftType, TunerConfig
from .._contract import Arrays, Base, Method, Site, dropped, register, wide_dtype


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeftConfig(TunerConfig):
    """What DEFT trains and where; PEFT's fields and defaults.

    r: rank of what is taken out of a weight and put into it, at least 1; at most a layer's outputs count.
    decomposition_method: "relu", a projection that is not orthogonal, or "qr", one that is. alpha: what is put in is
    scaled by alpha / r, or not at all (None). para: nothing is put in; the adapter then changes the model from the
    start. deft_dropout: rate in [0, 1) on the input of what is put in. init_weights: False for a random R of standard
    deviation 0.02 * init_scale; otherwise it begins as what is taken out. fan_in_fan_out: as PEFT has it.
    Raises ValueError for values out of range.

    >>> DeftConfig(r=4, decomposition_method="qr", target_modules=["q_proj"]).alpha is None
    True
    """

    peft_type: PeftType | None = PeftType.DEFT
    r: int = 8
    decomposition_method: str = "relu"
    init_scale: float = 1.0
    alpha: float | None = None
    para: bool = False
    fan_in_fan_out: bool = False
    deft_dropout: float = 0.0
    init_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.r, int) or self.r < 1:
            raise ValueError(f"r is {self.r!r}; expected an integer of at least 1")
        if self.decomposition_method not in ("relu", "qr"):
            raise ValueError(f"decomposition_method is {self.decomposition_method!r}; expected 'relu' or 'qr'")
        if not 0.0 <= self.deft_dropout < 1.0:
            raise ValueError(f"deft_dropout is {self.deft_dropout!r}; expected a rate in [0, 1)")
        if self.bias not in ("none", "all", "deft_only"):
            raise ValueError(f"bias is {self.bias!r}; expected 'none', 'all' or 'deft_only'")


def rank_of(site: Site, config: DeftConfig) -> int:
    return min(config.r, site.out_features)


def scaling(site: Site, config: DeftConfig) -> float:
    return config.alpha / rank_of(site, config) if config.alpha else 1.0


def init(key: jax.Array, site: Site, config: DeftConfig, weight: Callable[[], Any]) -> dict[str, jax.Array]:
    r, (key_p, key_r) = rank_of(site, config), jax.random.split(key)
    p = {"deft_P": 0.02 * jax.random.normal(key_p, (site.out_features, r))}
    if config.para:
        return p
    if not config.init_weights:
        return {**p, "deft_R": 0.02 * config.init_scale * jax.random.normal(key_r, (r, site.in_features))}
    w = weight()
    _, right = projection(p, config)
    kept = jnp.matmul(w.astype(wide_dtype(w.dtype)), right.astype(wide_dtype(w.dtype)), precision="highest")
    return {**p, "deft_R": kept.T / scaling(site, config)}


def projection(p: Arrays, config: Any) -> tuple[jax.Array, jax.Array]:
    """Q and V (out, r), float32 or wider."""
    own = p["deft_P"].astype(wide_dtype(p["deft_P"].dtype))
    if config.decomposition_method == "relu":
        return own, jax.nn.relu(own)
    q = jnp.linalg.qr(own)[0]
    return q, q


def injected(p: Arrays) -> jax.Array:
    """s R as (in, r)."""
    return p["scaling"].astype(p["deft_R"].dtype) * p["deft_R"].T


def forward(p: Arrays, x: jax.Array, base: Base, site: Site, context: Mapping[str, Any]) -> jax.Array:
    y = base(x)
    own = y if base.alone else base.apply(x, base.weight())
    left, right = projection(p, context["config"])
    h = -(own @ right.astype(own.dtype))
    if "deft_R" in p:
        h = h + base.apply(dropped(x, context), injected(p)).astype(h.dtype)
    return y + (h @ left.T.astype(h.dtype)).astype(y.dtype)


def merge(p: Arrays, w: jax.Array, b: jax.Array | None, site: Site) -> tuple[jax.Array, jax.Array | None]:
    left, right = (factor.astype(w.dtype) for factor in projection(p, p["config"]))
    h = -(p["base"].astype(w.dtype) @ right)
    if "deft_R" in p:
        h = h + injected(p).astype(w.dtype)
    return w + h @ left.T, b


DEFT = register(
    Method(
        config=DeftConfig,
        init=init,
        forward=forward,
        merge=merge,
        scaling=scaling,
        dropout=lambda config: config.deft_dropout,
        needs_base=True,
        needs_config=True,
    )
)
