"""Super-Tuning, and Supra, which is it with LoRA (PEFT's names: supertuning; https://arxiv.org/abs/2607.09287).

    W' = W + S + s A B,   S zero but for the n entries where |W| is largest (or smallest);   s = lora_alpha / r

`supertuning_values` (n) trains, n = (1 - sparsity) in out, and with r `supertuning_lora_A (r, in)` and `_B (out, r)`;
`supertuning_indices` (n), int32: places in PyTorch's weight (out, in), flat, by size, does not. Costs n + r (in + out)
parameters; for each token 2 n + 2 r (in + out) FLOPs and n + r numbers where 2 rows n <= in out for the rows of all
tokens; else, instead of 2 n, a matrix (in, out) that is added to the weight where it can be (`_dense.py`). PEFT wraps
places beyond 2^31; here they are refused.
"""

import dataclasses
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from .._contract import Arrays, Base, Method, Site, dropped, register
from ._lycoris import kaiming_uniform
from ._sparse import sparsely_changed
from ._supertuning_config import SupertuningConfig as SupertuningConfig


def init(key: jax.Array, site: Site, config: SupertuningConfig, weight: Callable[[], Any]) -> dict[str, jax.Array]:
    size, (key_values, key_a, key_b) = site.in_features * site.out_features, jax.random.split(key, 3)
    count, shape = int(size * (1 - config.sparsity)), (site.out_features, config.r or 0)
    if not (count >= 1 and size <= 2**31):
        raise ValueError(
            f"sparsity is {config.sparsity} at {site.path!r}, a weight of {size} entries, and leaves {count}; expected "
            "one entry at least, of a weight of 2**31 at most, for places of 32 bits"
        )
    values = jnp.zeros(count) if config.init_weights else jax.random.normal(key_values, (count,))
    arrays = {"supertuning_values": values, "supertuning_indices": by_size(weight(), config, count)[1]}
    if config.r is not None:
        arrays["supertuning_lora_A"] = kaiming_uniform(key_a, (config.r, site.in_features))
        arrays["supertuning_lora_B"] = jnp.zeros(shape) if config.init_weights else kaiming_uniform(key_b, shape)
    return arrays


def by_size(w: jax.Array, config: SupertuningConfig, count: int) -> tuple[jax.Array, jax.Array]:
    """The largest sizes of entries, or the smallest, in turn, and their places."""
    sizes = jnp.abs(w).T.reshape(-1)
    found, places = jax.lax.top_k(sizes if config.select_top else -sizes, count)
    return found, places.astype(jnp.int32)


def derive(p: Arrays, site: Site, config: SupertuningConfig, weight: Callable[[], Any]) -> dict[str, jax.Array]:
    found, places = by_size(weight(), config, p["supertuning_values"].size)
    if not isinstance(found, Tracer) and jnp.any(found[1:] == found[:-1]):
        warnings.warn(
            f"entries of {site.path!r} are equally large: PyTorch PEFT may put them in another order, and files do not "
            "say in which; save_precomputed_indices=True has them say it",
            stacklevel=2,
        )
    return {"supertuning_indices": places}


def sides(p: Arrays, config: Any) -> tuple[jax.Array, jax.Array]:
    """LoRA's factors (in, r) and (r, out)."""
    b = p["supertuning_lora_B"]
    return p["supertuning_lora_A"].T, (p["scaling"] * config.lora_alpha / config.r).astype(b.dtype) * b.T


def forward(p: Arrays, x: jax.Array, base: Base, site: Site, context: Mapping[str, Any]) -> jax.Array:
    config = context["config"]
    y = sparsely_changed(x, base, *_entries(p, site))
    if config.r is None:
        return y
    a, b = sides(p, config)
    h = base.apply(dropped(x, context), a)
    return y + (h @ b.astype(h.dtype)).astype(y.dtype)


def merge(p: Arrays, w: jax.Array, b: jax.Array | None, site: Site) -> tuple[jax.Array, jax.Array | None]:
    config: Any = p["config"]
    values, inputs, outputs = _entries(p, site)
    w = w.at[inputs, outputs].add(values.astype(w.dtype))
    return (w if config.r is None else w + jnp.matmul(*sides(p, config)).astype(w.dtype)), b


def _entries(p: Arrays, site: Site) -> tuple[jax.Array, jax.Array, jax.Array]:
    values, places = p["supertuning_values"], p["supertuning_indices"]
    return p["scaling"].astype(values.dtype) * values, places % site.in_features, places // site.in_features


SUPERTUNING = register(
    Method(
        config=SupertuningConfig,
        init=init,
        forward=forward,
        merge=merge,
        dropout=lambda config: 0.0 if config.r is None else config.lora_dropout,
        frozen=frozenset({"supertuning_indices"}),
        needs_config=True,
    )
)
SUPERTUNING_FOUND_AGAIN = register(
    dataclasses.replace(SUPERTUNING, frozen=frozenset(), derived=frozenset({"supertuning_indices"}), derive=derive),
    applies=lambda config: not config.save_precomputed_indices,
)
