"""What LoHa and LoKr share: ranks by pattern, initial values, and the two kinds of dropout of LyCORIS."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from .._contract import Site
from .._patterns import value_for


def check_ranks_and_rates(config: Any) -> None:
    """Raise ValueError for ranks below 1 and rates outside [0, 1)."""
    for where, rank in [("r", config.r), *((f"rank_pattern[{k!r}]", v) for k, v in config.rank_pattern.items())]:
        if not isinstance(rank, int) or rank <= 0:
            raise ValueError(f"{where} is {rank!r}; expected an integer of at least 1")
    for name in ("rank_dropout", "module_dropout"):
        if not 0.0 <= getattr(config, name) < 1.0:
            raise ValueError(f"{name} is {getattr(config, name)!r}; expected a rate in [0, 1)")


def rank_of(site: Site, config: Any) -> int:
    return value_for(site.path, config.rank_pattern, config.r)


def scaling(site: Site, config: Any) -> float:
    return value_for(site.path, config.alpha_pattern, config.alpha) / rank_of(site, config)


def is_effective(site: Site, config: Any) -> bool:
    """Whether the window of a convolution gets a factor of its own; one of a single entry does not."""
    return bool(config.use_effective_conv2d) and math.prod(site.window) > 1


def kaiming_uniform(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """torch's kaiming_uniform_(a=sqrt(5)): the bound is 1 / sqrt(fan_in), fan_in over all axes but the first."""
    bound = 1 / math.sqrt(math.prod(shape[1:]))
    return jax.random.uniform(key, shape, minval=-bound, maxval=bound)


def is_noisy(config: Any) -> bool:
    return bool(config.rank_dropout or config.module_dropout)


def kept(change: jax.Array, context: Mapping[str, Any], *, rescaled: bool) -> jax.Array:
    """The change (..., out) of a layer's output, of which some outputs are dropped, or all; without a key itself.

    rescaled: whether what is left is scaled up by the share that is left. Where nothing is, it is zero, not PEFT's nan.
    """
    if "rng" not in context:
        return change
    config, (of_rank, of_module) = context["config"], jax.random.split(context["rng"])
    if config.rank_dropout:
        left = jax.random.bernoulli(of_rank, 1.0 - config.rank_dropout, change.shape[-1:])
        share = jnp.maximum(jnp.mean(left, dtype=jnp.float32), 1 / left.size) if rescaled else jnp.ones(())
        change = change * jnp.where(left, 1 / share, 0).astype(change.dtype)
    if config.module_dropout:
        change = jnp.where(jax.random.bernoulli(of_module, 1.0 - config.module_dropout), change, 0)
    return change
