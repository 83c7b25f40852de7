"""Adapters that start from factors taken out of the weight, made plain LoRA, which needs nothing but the base."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from ._contract import Site
from ._params import Adapter, PeftParams
from ._wrap import checked_names, checked_params

INITIAL = {"initial_A": "lora_A", "initial_B": "lora_B"}
"""{array that holds the initial values: array that holds the trained ones}"""


def convert_to_plain_lora(wrapped: PeftParams, adapter_name: str = "default") -> PeftParams:
    """The same function with an adapter of PiSSA, OLoRA, CorDA or LoRA-GA as plain LoRA of twice the rank.

    s (A B - A0 B0) is s [A, A0] [B; -B0]: arrays of rank 2 r, the same scaling (lora_alpha doubled, or times sqrt(2)
    with use_rslora; the patterns likewise), init_lora_weights=True. It trains like any LoRA, A0 and B0 too. Adapters of
    another initialisation come back as they are. Raises ValueError for an unknown name.

    >>> import jax, jpeft
    >>> params = {"query": {"kernel": jax.random.normal(jax.random.key(0), (4, 6))}}
    >>> config = jpeft.LoraConfig(r=2, target_modules=["query"], init_lora_weights="pissa")
    >>> plain = convert_to_plain_lora(jpeft.wrap(params, config))
    >>> plain.adapters["default"].config.r, plain.adapters["default"].weights["query"]["lora_A"].shape
    (4, (4, 4))
    """
    (name,) = checked_names(checked_params(wrapped), adapter_name)
    return dataclasses.replace(wrapped, adapters={**wrapped.adapters, name: plain_lora(wrapped.adapters[name])})


def keeps_initial_values(adapter: Adapter) -> bool:
    """Whether an adapter acts by the change of its factors since they were made."""
    return any(INITIAL.keys() <= arrays.keys() for arrays in adapter.weights.values())


def plain_lora(adapter: Adapter, initial: Mapping[str, Mapping[str, Any]] | None = None) -> Adapter:
    """The adapter as plain LoRA of its change since initial factors: those that it keeps, or `initial`.

    initial: {module path: {"lora_A", "lora_B": array}}. Without it, an adapter that keeps none comes back as it is.
    """
    if initial is None and not keeps_initial_values(adapter):
        return adapter
    weights = {
        path: _doubled(arrays, (initial or {}).get(path), adapter.sites[path])
        for path, arrays in adapter.weights.items()
    }
    config: Any = adapter.config
    factor = 2**0.5 if config.use_rslora else 2
    config = dataclasses.replace(
        config,
        init_lora_weights=True,
        r=2 * config.r,
        lora_alpha=factor * config.lora_alpha,
        rank_pattern={name: 2 * rank for name, rank in config.rank_pattern.items()},
        alpha_pattern={name: factor * alpha for name, alpha in config.alpha_pattern.items()},
        corda_config=None,
        lora_ga_config=None,
    )
    return dataclasses.replace(adapter, weights=weights, config=config)


def _doubled(arrays: Mapping[str, Any], initial: Mapping[str, Any] | None, site: Site) -> dict[str, Any]:
    if initial is None and not INITIAL.keys() <= arrays.keys():
        # A lookup table in such an adapter is plain already, but has to be of the rank that the config now says.
        return {
            name: jnp.concatenate([array, jnp.zeros_like(array)], axis=_rank_axis(name, site))
            for name, array in arrays.items()
        }
    first = {ours: arrays[name] for name, ours in INITIAL.items()} if initial is None else initial
    a, b = arrays["lora_A"], arrays["lora_B"]
    a0, b0 = jnp.asarray(first["lora_A"], a.dtype), jnp.asarray(first["lora_B"], b.dtype)
    return {
        "lora_A": jnp.concatenate([a, a0], axis=_rank_axis("lora_A", site)),
        "lora_B": jnp.concatenate([b, -b0], axis=_rank_axis("lora_B", site)),
    }


def _rank_axis(name: str, site: Site) -> int:
    return len(site.stack) + (0 if name.endswith("A") else 1)
