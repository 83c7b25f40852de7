"""VeRA: Vector-based Random Matrix Adaptation (Kopiczko et al., 2023, https://arxiv.org/abs/2310.11454).

    W' = W + (A diag(d)) (B diag(b)),   A (in, r) and B (r, out) the first columns and rows of one pair for all layers

`vera_lambda_d` (r) and `vera_lambda_b` (out) train; `vera_A (r, most in)` and `vera_B (most out, r)` are drawn once, of
the seed alone, and do not. Costs r + out parameters, 2 r (in + out) FLOPs for each token, and r (most in + most out)
numbers for the whole model. PEFT wants the same seed of all its adapters, as they share their matrices; here each has
its own pair.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from .._config import PeftType, TunerConfig
from .._contract import Arrays, Base, Method, Site, dropped, register
from .._torch_random import Generator
from ._projections import check_projected, most_features, of_each


@dataclasses.dataclass(frozen=True, kw_only=True)
class VeraConfig(TunerConfig):
    """What VeRA trains and where; PEFT's fields and defaults.

    r: rank, at least 1; larger than LoRA's, as the matrices do not train. projection_prng_key: the seed of the
    matrices, which are those that PyTorch draws of it. save_projection: whether files hold the matrices; without it
    they are drawn again. vera_dropout: rate in [0, 1) on the input of the low-rank path. d_initial: where every entry
    of d begins; b begins as zeros. init_weights: False for a normal d and a b of ones instead.
    Raises ValueError for values out of range.

    >>> VeraConfig(r=64, target_modules=["q_proj", "v_proj"]).d_initial
    0.1
    """

    peft_type: PeftType | None = PeftType.VERA
    r: int = 256
    projection_prng_key: int = 0
    save_projection: bool = True
    vera_dropout: float = 0.0
    d_initial: float = 0.1
    fan_in_fan_out: bool = False
    init_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_projected(self, "vera", self.vera_dropout)


def init(key: jax.Array, site: Site, config: VeraConfig) -> dict[str, jax.Array]:
    if config.init_weights:
        d, b = jnp.full((config.r,), config.d_initial), jnp.zeros(site.out_features)
    else:
        d, b = jax.random.normal(key, (config.r,)), jnp.ones(site.out_features)
    return {"vera_lambda_b": b, "vera_lambda_d": d}


def together(
    key: jax.Array, sites: Mapping[str, Site], config: VeraConfig, weights: Mapping[str, Callable[[], jax.Array]]
) -> tuple[dict[str, jax.Array], dict[str, dict[str, jax.Array]]]:
    generator, (most_in, most_out) = Generator(config.projection_prng_key), most_features(sites)
    a = generator.kaiming_uniform((config.r, most_in))
    b = generator.kaiming_uniform((most_out, config.r))
    return {"vera_A": jnp.asarray(a), "vera_B": jnp.asarray(b)}, of_each(init, key, sites, config)


def forward(p: Arrays, x: jax.Array, base: Base, site: Site, context: Mapping[str, Any]) -> jax.Array:
    y = base(x)
    # The vectors multiply what is thin, so that the matrices stay one for all layers and no gradient has their shape.
    h = base.apply(dropped(x, context), p["vera_A"][:, : site.in_features].T)
    h = (h * p["vera_lambda_d"].astype(h.dtype)) @ p["vera_B"][: site.out_features].T.astype(h.dtype)
    return y + (h * p["vera_lambda_b"].astype(h.dtype)).astype(y.dtype)


def merge(p: Arrays, w: jax.Array, b: jax.Array | None, site: Site) -> tuple[jax.Array, jax.Array | None]:
    thin = p["vera_A"][:, : site.in_features].T * p["vera_lambda_d"]
    change = thin @ p["vera_B"][: site.out_features].T * p["vera_lambda_b"]
    return w + change.astype(w.dtype), b


VERA = register(
    Method(
        config=VeraConfig,
        together=together,
        forward=forward,
        merge=merge,
        dropout=lambda config: config.vera_dropout,
        frozen=frozenset({"vera_A", "vera_B"}),
        unsaved=lambda config: frozenset() if config.save_projection else frozenset({"vera_A", "vera_B"}),
    )
)
