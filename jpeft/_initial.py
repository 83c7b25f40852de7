"""Initial factors put into an adapter that `wrap` has made: what the initialisations from data have in common."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from ._contract import LINEAR, Site, method_of, wide_dtype
from ._params import Adapter, PeftParams
from ._paths import leaves_by_path
from ._patterns import value_for
from ._sites import canonical
from ._wrap import checked_names, checked_params


def adapter_to_initialise(wrapped: PeftParams, adapter_name: str, how: str) -> Adapter:
    """The adapter of a name; raises ValueError if its config does not ask for this initialisation."""
    (name,) = checked_names(checked_params(wrapped), adapter_name)
    found = getattr(wrapped.adapters[name].config, "init_lora_weights", None)
    if found != how:
        raise ValueError(f"adapter {name!r} has init_lora_weights={found!r}; expected {how!r}")
    return wrapped.adapters[name]


def linear_sites(adapter: Adapter) -> dict[str, Site]:
    return {path: site for path, site in adapter.sites.items() if site.kind == LINEAR}


def rank_and_scaling(site: Site, config: Any) -> tuple[int, float]:
    return value_for(site.path, config.rank_pattern, config.r), method_of(config).scaling(site, config)


def weights_of(wrapped: PeftParams, sites: Mapping[str, Site]) -> dict[str, jax.Array]:
    """{module path: its canonical weight (*stack, in, out)}, in float32 or wider."""
    leaves = leaves_by_path(wrapped.base)
    found = {path: canonical(leaves[site.leaf], site.layout) for path, site in sites.items()}
    return {path: w.astype(wide_dtype(w.dtype)) for path, w in found.items()}


def over_stack(function: Callable[..., Any], site: Site) -> Callable[..., Any]:
    """A function of one layer's arrays, mapped over the site's stack axes."""
    for _ in site.stack:
        function = jax.vmap(function)
    return function


def with_factors(
    wrapped: PeftParams, adapter_name: str, factors: Mapping[str, tuple[jax.Array, jax.Array]], *, initial: bool
) -> PeftParams:
    """The same parameters with {module path: (lora_A, lora_B)} in an adapter; initial: as its initial values, too."""
    adapter, new = wrapped.adapters[adapter_name], {}
    for path, (a, b) in factors.items():
        old = adapter.weights[path]
        a, b = jnp.asarray(a, old["lora_A"].dtype), jnp.asarray(b, old["lora_B"].dtype)
        new[path] = {"lora_A": a, "lora_B": b, **({"initial_A": a, "initial_B": b} if initial else {})}
    adapter = dataclasses.replace(adapter, weights={**adapter.weights, **new})
    return dataclasses.replace(wrapped, adapters={**wrapped.adapters, adapter_name: adapter})
