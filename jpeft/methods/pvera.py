"""PVeRA: Probabilistic Vector-based Random Matrix Adaptation (Fillioux et al., 2025, arXiv:2512.07703).

    y = x W + ((m + e exp(v / 2)) B) diag(b),   (m, v) = (x A) diag(d),   e normal        (https://arxiv.org/abs/2512.07703)

`pvera_lambda_d` (2 r) and `pvera_lambda_b` (out) train; `pvera_A (2 r, most in)` and `pvera_B (most out, r)` are drawn
once for all layers and do not. Costs 2 r + out parameters, 2 r (2 in + out) FLOPs for each token that is sampled and
2 r (in + out) for one that is not, where v is not needed, and r (2 most in + most out) numbers for the whole model.
Without a key e is zero, as it is in merged weights: y is linear in x then, and v does not count.
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
class PveraConfig(TunerConfig):
    """What PVeRA trains and where; PEFT's fields and defaults, of which those of VeRA mean what they mean there.

    sample_at_inference: whether the adapter samples where it does not train, too: then every call needs a key,
    `jpeft.with_context(params, rng=...)`, and one that is loaded for inference drops nothing with it.
    generator_seed: kept for files; here a call's key is the seed.
    Raises ValueError for values out of range.

    >>> PveraConfig(r=64, target_modules=["query", "value"]).sample_at_inference
    False
    """

    peft_type: PeftType | None = PeftType.PVERA
    r: int = 256
    projection_prng_key: int = 0
    save_projection: bool = True
    pvera_dropout: float = 0.0
    d_initial: float = 0.1
    fan_in_fan_out: bool = False
    init_weights: bool = True
    sample_at_inference: bool = False
    generator_seed: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_projected(self, "pvera", self.pvera_dropout)


def init(key: jax.Array, site: Site, config: PveraConfig) -> dict[str, jax.Array]:
    if config.init_weights:
        d, b = jnp.full((2 * config.r,), config.d_initial), jnp.zeros(site.out_features)
    else:
        d, b = jax.random.normal(key, (2 * config.r,)), jnp.ones(site.out_features)
    return {"pvera_lambda_b": b, "pvera_lambda_d": d}


def together(
    key: jax.Array, sites: Mapping[str, Site], config: PveraConfig, weights: Mapping[str, Callable[[], jax.Array]]
) -> tuple[dict[str, jax.Array], dict[str, dict[str, jax.Array]]]:
    generator, (most_in, most_out) = Generator(config.projection_prng_key), most_features(sites)
    a = generator.kaiming_uniform((2 * config.r, most_in))
    b = generator.kaiming_uniform((most_out, config.r))
    return {"pvera_A": jnp.asarray(a), "pvera_B": jnp.asarray(b)}, of_each(init, key, sites, config)


def forward(p: Arrays, x: jax.Array, base: Base, site: Site, context: Mapping[str, Any]) -> jax.Array:
    config, y = context["config"], base(x)
    if "rng" not in context and config.sample_at_inference:
        raise ValueError(
            f"PVeRA at {site.path!r}: sample_at_inference is True, and the call brings no key to sample with; expected "
            "jpeft.with_context(params, rng=...), or sample_at_inference=False"
        )
    x, a, d = dropped(x, context), p["pvera_A"][:, : site.in_features], p["pvera_lambda_d"]
    samples = "rng" in context
    rows = a.shape[0] if samples else a.shape[0] // 2
    h = base.apply(x, a[:rows].T)
    h = h * d[:rows].astype(h.dtype)
    if samples:
        mean, log_variance = jnp.split(h, 2, axis=-1)
        noise = jax.random.normal(jax.random.fold_in(context["rng"], 1), mean.shape, mean.dtype)
        h = mean + noise * jnp.exp(log_variance / 2)
    h = h @ p["pvera_B"][: site.out_features].T.astype(h.dtype)
    return y + (h * p["pvera_lambda_b"].astype(h.dtype)).astype(y.dtype)


def merge(p: Arrays, w: jax.Array, b: jax.Array | None, site: Site) -> tuple[jax.Array, jax.Array | None]:
    rank = p["pvera_B"].shape[1]
    thin = p["pvera_A"][:rank, : site.in_features].T * p["pvera_lambda_d"][:rank]
    change = thin @ p["pvera_B"][: site.out_features].T * p["pvera_lambda_b"]
    return w + change.astype(w.dtype), b


PVERA = register(
    Method(
        config=PveraConfig,
        together=together,
        forward=forward,
        merge=merge,
        dropout=lambda config: 0.0 if config.inference_mode and config.sample_at_inference else config.pvera_dropout,
        noisy=lambda config: True,
        linear=False,
        frozen=frozenset({"pvera_A", "pvera_B"}),
        unsaved=lambda config: frozenset() if config.save_projection else frozenset({"pvera_A", "pvera_B"}),
    )
)
