"""RandLoRA: Full-rank parameter-efficient fine-tuning of large models (Albert et al., 2025, arXiv:2502.00987).

    W' = W + s B diag(l) A',   A'[j] = A[j // n] * g[j % n],   j < r n   (in <= out; else the same, transposed)
    (https://arxiv.org/abs/2502.00987), s = randlora_alpha / r, n = min(in, out) / r, rounded up

`randlora_lambda (r, n)`: l, and `randlora_gamma (n, min(in, out))`: g train; `randlora_A (r, 1, m)` and `randlora_B
(most, N, r)`, for the largest layer, are drawn once for all layers and do not. Of them a layer uses A (r, min) and
B (max, n, r) as (max, n r). Costs r n + n min(in, out) parameters, 2 r n (in + out) FLOPs for each token, and
r (m + most N) numbers for the whole model. The paper pairs row k of A with column k of B in each of the n bases; PEFT
counts the bases of A and B in another order, and files are trained so, so here, too.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from .._config import PeftType, TunerConfig
from .._contract import Arrays, Base, Method, Site, dropped, register
from ._projections import check_projected, most_features, of_each, random_bases


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandLoraConfig(TunerConfig):
    """What RandLoRA trains and where; PEFT's fields and defaults.

    r: rank of one basis, at least 1; fewer train with a larger one. projection_prng_key: the seed of the bases, which
    are those that PyTorch draws of it in bfloat16. save_projection: whether files hold the bases; without it they are
    drawn again. sparse: bases of -1, 0 and 1, of which two thirds are zero; very_sparse: all but 1 / sqrt(m) are.
    randlora_dropout: rate in [0, 1). randlora_alpha: the change is scaled by randlora_alpha / r. init_weights: False
    for a normal l. Raises ValueError for values out of range.

    >>> RandLoraConfig(r=16, target_modules=["q_proj", "v_proj"]).randlora_alpha
    640
    """

    peft_type: PeftType | None = PeftType.RANDLORA
    r: int = 32
    projection_prng_key: int = 0
    save_projection: bool = True
    sparse: bool = False
    very_sparse: bool = False
    randlora_dropout: float = 0.0
    randlora_alpha: float = 640
    fan_in_fan_out: bool = False
    init_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_projected(self, "randlora", self.randlora_dropout)


def init(key: jax.Array, site: Site, config: RandLoraConfig) -> dict[str, jax.Array]:
    narrow, wide = sorted((site.in_features, site.out_features))
    shape = (config.r, -(-narrow // config.r))
    lengths = jnp.zeros(shape) if config.init_weights else jax.random.normal(key, shape)
    gain = 1 / max(shape[1], narrow) if config.init_weights else 1 / wide
    return {"randlora_lambda": lengths, "randlora_gamma": jnp.full((shape[1], narrow), gain)}


def together(
    key: jax.Array, sites: Mapping[str, Site], config: RandLoraConfig, weights: Mapping[str, Callable[[], jax.Array]]
) -> tuple[dict[str, jax.Array], dict[str, dict[str, jax.Array]]]:
    a, b = random_bases(config, *sorted(most_features(sites)))
    return {"randlora_A": jnp.asarray(a), "randlora_B": jnp.asarray(b)}, of_each(init, key, sites, config)


def bases(p: Arrays, site: Site) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(A (r, 1, min), B (max, r n), l (r n)) of one layer."""
    count, narrow = p["randlora_gamma"].shape
    b = p["randlora_B"][: max(site.in_features, site.out_features), :count]
    return p["randlora_A"][:, :, :narrow], b.reshape(b.shape[0], -1), p["randlora_lambda"].reshape(-1)


def scaled(a: jax.Array, gamma: jax.Array) -> jax.Array:
    return (a * gamma.astype(a.dtype)).reshape(-1, a.shape[-1])


def forward(p: Arrays, x: jax.Array, base: Base, site: Site, context: Mapping[str, Any]) -> jax.Array:
    y, x = base(x), dropped(x, context)
    a, b, lengths = (array.astype(x.dtype) for array in bases(p, site))
    lengths = lengths * p["scaling"].astype(x.dtype)
    # A', as large as a square weight, is made again in the backward pass and not kept until then.
    if site.in_features <= site.out_features:
        h = jax.checkpoint(lambda x, gamma: x @ scaled(a, gamma).T)(x, p["randlora_gamma"])
        return y + ((h * lengths) @ b.T).astype(y.dtype)
    h = (x @ b) * lengths
    return y + jax.checkpoint(lambda h, gamma: h @ scaled(a, gamma))(h, p["randlora_gamma"]).astype(y.dtype)


def merge(p: Arrays, w: jax.Array, b: jax.Array | None, site: Site) -> tuple[jax.Array, jax.Array | None]:
    a, tall, lengths = bases(p, site)
    change = (tall * (p["scaling"] * lengths)) @ scaled(a, p["randlora_gamma"])
    return w + (change.T if site.in_features <= site.out_features else change).astype(w.dtype), b


RANDLORA = register(
    Method(
        config=RandLoraConfig,
        together=together,
        forward=forward,
        merge=merge,
        scaling=lambda site, config: config.randlora_alpha / config.r,
        dropout=lambda config: config.randlora_dropout,
        frozen=frozenset({"randlora_A", "randlora_B"}),
        unsaved=lambda config: frozenset() if config.save_projection else frozenset({"randlora_A", "randlora_B"}),
    )
)
