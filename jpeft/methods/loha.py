"""LoHa: low-rank Hadamard product, of FedPara (Hyeon-Woo et al., 2022, https://arxiv.org/abs/2108.06098).

    W' = W + s (A1 B1) * (A2 B2),   s = alpha / r   (Proposition 1)

`hada_w1_b (r, in)`, `hada_w1_a (out, r)` are A1 and B1, `hada_w2_b`, `hada_w2_a` the others; for convolutions `in`
stands for in * window, unless use_effective_conv2d keeps `hada_t1, hada_t2 (r, r, *window)` apart (Proposition 3), with
`*_a (r, out)`, `*_b (r, in)`. Costs 2 r (in + out) parameters. The product has rank r^2 at most, with the Khatri-Rao
factors A1 * A2 and B1 * B2: 2 r^2 (in + out) FLOPs for each token and no memory, or, where that is less, 2 in out for
each token and 4 r in out for each pass, with one matrix (in, out).
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from .._config import PeftType, TunerConfig
from .._contract import CONVOLUTION, LINEAR, Arrays, Base, Site, additive, register
from ._lycoris import check_ranks_and_rates, is_effective, is_noisy, kaiming_uniform, kept, rank_of, scaling


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoHaConfig(TunerConfig):
    """What LoHa trains and where; PEFT's fields and defaults.

    r: rank of each of the two products, at least 1. alpha: the change is scaled by alpha / r. rank_dropout,
    module_dropout: rates in [0, 1) at which the change of an output, and of a layer, is left out in training.
    use_effective_conv2d: whether windows get a factor of their own. init_weights: whether a fresh adapter changes
    nothing. rank_pattern, alpha_pattern: {name or regular expression: value}, the first match wins.
    Raises ValueError for values out of range.

    >>> LoHaConfig(r=4, target_modules=["q_proj"]).alpha
    8
    """

    peft_type: PeftType | None = PeftType.LOHA
    r: int = 8
    alpha: float = 8
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    use_effective_conv2d: bool = False
    init_weights: bool = True
    rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranks_and_rates(self)


def init(key: jax.Array, site: Site, config: LoHaConfig, weight: Callable[[], Any]) -> dict[str, jax.Array]:
    r, effective = rank_of(site, config), is_effective(site, config)
    inputs = site.in_features * (1 if effective else math.prod(site.window))
    out = (r, site.out_features) if effective else (site.out_features, r)
    shapes = {"hada_w1_a": out, "hada_w1_b": (r, inputs), "hada_w2_a": out, "hada_w2_b": (r, inputs)}
    if effective:
        # PEFT's convolutions have windows of two axes.
        window = (r, r, *site.window, *(1 for _ in range(2 - len(site.window))))
        shapes |= {"hada_t1": window, "hada_t2": window}
    keys = jax.random.split(key, len(shapes))
    arrays = {name: kaiming_uniform(own, shape) for own, (name, shape) in zip(keys, shapes.items(), strict=True)}
    return arrays | ({"hada_w2_b": jnp.zeros((r, inputs))} if config.init_weights else {})


def half(p: Arrays, number: int, site: Site) -> tuple[jax.Array, jax.Array]:
    """One of the two products as factors (r, in, *window) and (r, out)."""
    a, b, window = p[f"hada_w{number}_a"], p[f"hada_w{number}_b"], p.get(f"hada_t{number}")
    if window is None:
        return b.reshape(-1, site.in_features, *site.window), a.T
    of_inputs = jnp.einsum("ijw,jc->icw", window.reshape(*window.shape[:2], -1), b)
    return of_inputs.reshape(-1, site.in_features, *site.window), a


def delta(p: Arrays, site: Site) -> jax.Array:
    first, second = (jnp.tensordot(*half(p, number, site), axes=(0, 0)) for number in (1, 2))
    return p["scaling"].astype(first.dtype) * first * second


def factors(p: Arrays, site: Site) -> tuple[jax.Array, jax.Array]:
    """Of the whole change: (r^2, in, *window) and (r^2, out)."""
    (a1, b1), (a2, b2) = (half(p, number, site) for number in (1, 2))
    a, b = ((first[:, None] * second[None]).reshape(-1, *first.shape[1:]) for first, second in ((a1, a2), (b1, b2)))
    return a, p["scaling"].astype(b.dtype) * b


def forward(p: Arrays, x: jax.Array, base: Base, site: Site, context: Mapping[str, Any]) -> jax.Array:
    y, r = base(x), p["hada_w1_b"].shape[0]
    inputs, outputs, rows = site.in_features * math.prod(site.window), site.out_features, math.prod(y.shape[:-1])
    if rows * r**2 * (inputs + outputs) < (rows + 2 * r) * inputs * outputs:
        a, b = factors(p, site)
        h = base.apply(x, jnp.moveaxis(a, 0, -1))
        change = h @ b.astype(h.dtype)
    else:
        change = base.apply(x, delta(p, site))
    return y + kept(change, context, rescaled=True).astype(y.dtype)


LOHA = register(
    additive(
        config=LoHaConfig,
        init=init,
        delta=delta,
        forward=forward,
        scaling=scaling,
        noisy=is_noisy,
        kinds=frozenset({LINEAR, CONVOLUTION}),
    )
)
