"""MonteCLoRA: Robust and Efficient Fine-tuning of LLMs with Bayesian Reparameterization of Low-Rank Adaptation
(Sengupta et al., 2024, https://arxiv.org/abs/2411.04358).

    W' = W + s A B; in training A + sum_n w_n N_n takes the place of A, N_n normal of variance exp(2 std) chi^2(r) for
    each row, w a softmax of normal numbers around expert_weights_prior

Beside LoRA's arrays `lora_monteclora_sampler.*`: `std_prior (r)` and `expert_weights_prior (num_samples)`, which train,
and PEFT's buffers `gaussian_var_prior (r, r)` and `expert_weights (num_samples)`.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.scipy.special import digamma, gammaln

from .._contract import LINEAR, Arrays, Base, Site, dropped, low_rank, register, wide_dtype
from .lora import LORA, LoraConfig, factors, init as init_lora, scaling

SAMPLER = "lora_monteclora_sampler."
FROZEN = frozenset({SAMPLER + "gaussian_var_prior", SAMPLER + "expert_weights"})


def init(key: jax.Array, site: Site, config: LoraConfig, weight: Callable[[], Any]) -> dict[str, jax.Array]:
    settings: Any = config.monteclora_config
    arrays, samples = init_lora(key, site, config, weight), settings.num_samples
    rank, keys = arrays["lora_A"].shape[0], jax.random.split(jax.random.fold_in(key, 2))
    sampler = {
        "std_prior": jax.random.uniform(keys[0], (rank,)),
        "expert_weights_prior": jax.random.uniform(keys[1], (samples,)),
        "gaussian_var_prior": jnp.eye(rank),
        "expert_weights": jnp.full((samples,), 1 / samples),
    }
    return {**arrays, **{SAMPLER + name: array for name, array in sampler.items()}}


def forward(p: Arrays, x: jax.Array, base: Base, site: Site, context: Mapping[str, Any]) -> jax.Array:
    a, b = factors(p, site)
    if "rng" in context:
        key_drawn, key_noise = jax.random.split(jax.random.fold_in(context["rng"], 1))
        variances, weights = drawn(p, key_drawn)
        normal = jax.random.normal(key_noise, (*weights.shape, *a.shape), variances.dtype)
        noise = jnp.einsum("n,nri->ri", weights, normal) * jnp.sqrt(variances)[:, None]
        a = a + (context["config"].monteclora_config.sample_scaler * noise).astype(a.dtype)
    y = base(x)
    h = base.apply(dropped(x, context), a.T)
    return y + (h @ b.astype(h.dtype)).astype(y.dtype)


def drawn(p: Arrays, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A draw of the variances (r) and of the weights of the samples (num_samples)."""
    std, prior = (p[SAMPLER + name] for name in ("std_prior", "expert_weights_prior"))
    std, prior = (array.astype(wide_dtype(array.dtype)) for array in (std, prior))
    key_variances, key_weights = jax.random.split(key)
    # The diagonal of a Wishart matrix of r degrees of freedom.
    wishart = 2 * jax.random.gamma(key_variances, std.shape[0] / 2, std.shape, std.dtype)
    alpha, count = jnp.maximum(jnp.exp(prior), 1e-6), prior.shape[0]
    spread = jnp.maximum((1 - 2 / count) / alpha + jnp.sum(1 / alpha) / count**2, 1e-6)
    logits = jnp.log(alpha) - jnp.log(alpha).mean()
    logits = logits + jnp.sqrt(spread + 1e-6) * jax.random.normal(key_weights, prior.shape, prior.dtype)
    return jnp.maximum(jnp.exp(2 * std) * wishart, 1e-3), jax.nn.softmax(logits)


def monteclora_loss(wrapped: Any, *, rng: jax.Array | None = None) -> jax.Array:
    """What MonteCLoRA adds to the loss: a scalar, the mean over all modules of the active adapters.

    kl_loss_weight times the divergences of the variational distributions from their priors and, with use_entropy, the
    sum of the squared weights of the samples. rng: draws variances and weights; without it the stored ones are taken.
    wrapped: from `jpeft.wrap`; modules of other methods do not count.

    >>> import jax.numpy as jnp, jpeft
    >>> config = jpeft.LoraConfig(r=2, monteclora_config=jpeft.MontecloraConfig(), target_modules=["query"])
    >>> monteclora_loss(jpeft.wrap({"query": {"kernel": jnp.eye(4)}}, config)).shape
    ()
    """
    losses = []
    for adapter in (wrapped.adapters[name] for name in wrapped.active):
        settings = getattr(adapter.config, "monteclora_config", None)
        for path, arrays in adapter.weights.items() if settings is not None else ():
            stack = adapter.sites[path].stack
            flat = {name: array.reshape(-1, *array.shape[len(stack) :]) for name, array in arrays.items()}
            for layer in range(flat["lora_A"].shape[0]):
                key = None if rng is None else jax.random.fold_in(rng, len(losses))
                losses.append(_loss({name: array[layer] for name, array in flat.items()}, settings, key))
    return sum(losses, jnp.zeros((), jnp.float32)) / max(len(losses), 1)


def _loss(p: Arrays, settings: Any, key: jax.Array | None) -> jax.Array:
    std, prior, variances, weights = (
        p[SAMPLER + name].astype(wide_dtype(p[SAMPLER + name].dtype))
        for name in ("std_prior", "expert_weights_prior", "gaussian_var_prior", "expert_weights")
    )
    variances = jnp.diagonal(variances)
    if key is not None:
        variances, weights = drawn(p, key)
    loss = settings.kl_loss_weight * sum(divergences(std, prior, variances, settings.dirichlet_prior))
    return loss + jnp.sum(weights**2) if settings.use_entropy else loss


def divergences(std: jax.Array, prior: jax.Array, variances: jax.Array, dirichlet: float) -> tuple[jax.Array, ...]:
    """Of the Dirichlet distribution of the weights, of the Wishart one and of the normal ones, from their priors."""
    rank, count = std.shape[0], prior.shape[0]
    alpha, wanted = jnp.exp(prior), jnp.full(prior.shape, dirichlet, prior.dtype)
    weights = gammaln(alpha.sum()) - gammaln(wanted.sum()) - jnp.sum(gammaln(alpha) - gammaln(wanted))
    weights = weights + jnp.sum((alpha - wanted) * (digamma(alpha) - digamma(alpha.sum())))
    wishart = 0.5 * rank * (jnp.sum(jnp.exp(2 * std) - 2 * std) - rank)
    variances = jnp.maximum(variances, 1e-6)
    return weights, wishart, 0.5 * count * (jnp.sum(variances - jnp.log(variances)) - rank)


MONTECLORA = register(
    dataclasses.replace(
        low_rank(
            config=LoraConfig,
            init=init,
            factors=factors,
            scaling=scaling,
            dropout=LORA.dropout,
            kinds=frozenset({LINEAR}),
            frozen=FROZEN,
        ),
        forward=forward,
        factors=None,
        noisy=lambda config: True,
    ),
    applies=lambda config: config.monteclora_config is not None,
)
