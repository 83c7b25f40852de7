"""Arrow: Towards Modular LLMs by Building and Re-Using a Library of LoRAs (Ostapenko et al., 2024,
https://arxiv.org/abs/2405.11157), with GenKnowSub (https://arxiv.org/abs/2505.10939).

    y = x W + sum_e c_e s_e (x A_e) B_e,   c = softmax(|x . p_e| / temperature) over the top_k largest, 0 elsewhere

p_e: the direction that A_e B_e stretches most. Beside the unused `lora_A`, `lora_B` of PEFT's file, for n adapters:
`arrow_A (n, r, in)`, `arrow_B (n, out, r)`, `arrow_scaling (n)`, `arrow_prototypes (n, in)`. None of them trains.
"""

from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
from jax import lax

from .._config import FrozenMapping
from .._contract import LINEAR, Arrays, Base, Method, Site, dropped, register
from .lora import LORA, LoraConfig

ROUTES = FrozenMapping({"arrow_A": "..i", "arrow_B": ".o.", "arrow_scaling": ".", "arrow_prototypes": ".i"})
UNUSED = FrozenMapping({"lora_A": ".i", "lora_B": "o."})


def init(key: jax.Array, site: Site, config: LoraConfig, weight: Callable[[], Any]) -> NoReturn:
    raise ValueError(
        f"arrow_config at {site.path!r}: a router has no values of its own to begin with; expected "
        "jpeft.create_arrow_adapter(wrapped, names, arrow_config), which makes one of adapters that are there"
    )


def forward(p: Arrays, x: jax.Array, base: Base, site: Site, context: Mapping[str, Any]) -> jax.Array:
    y, settings = base(x), context["config"].arrow_config
    # As in PEFT in the precision of the adapters: which of them are the largest hangs on the last bits.
    dtype = max(x.dtype, p["arrow_A"].dtype, key=lambda dtype: jnp.finfo(dtype).bits)
    x, a, b, scaling, prototypes, overall = (
        array.astype(dtype)
        for array in (x, p["arrow_A"], p["arrow_B"], p["arrow_scaling"], p["arrow_prototypes"], p["scaling"])
    )
    coefficients = routing(x, prototypes, settings.top_k, settings.router_temperature) * (overall * scaling)
    h = jnp.einsum("...i,nri->...nr", x, a) * coefficients[..., None]
    # As in PEFT: dropout is on what comes out.
    change = dropped(jnp.einsum("...nr,nor->...o", h, b), context)
    return y + change.astype(y.dtype)


def routing(x: jax.Array, prototypes: jax.Array, top_k: int, temperature: float) -> jax.Array:
    """How much each adapter counts for each token: (..., n), of which top_k are above zero and sum up to one."""
    scores = jnp.abs(jnp.matmul(x, prototypes.T, precision="highest"))
    largest, chosen = lax.top_k(scores, top_k)
    weights = jax.nn.softmax(largest / jnp.asarray(temperature, scores.dtype))
    return jnp.sum(weights[..., None] * jax.nn.one_hot(chosen, prototypes.shape[0], dtype=scores.dtype), axis=-2)


def merge(p: Arrays, w: jax.Array, b: jax.Array | None, site: Site) -> NoReturn:
    raise ValueError(
        f"the Arrow router at {site.path!r} chooses among adapters for each token, so that no merged weight stands for "
        "it; expected uses x @ W of the weight alone, or another active adapter: jpeft.set_adapter, or "
        "jpeft.add_weighted_adapter for one mixture for all tokens"
    )


ARROW = register(
    Method(
        config=LoraConfig,
        init=init,
        forward=forward,
        merge=merge,
        dropout=LORA.dropout,
        kinds=frozenset({LINEAR}),
        frozen=frozenset(UNUSED),
        derived=frozenset(ROUTES),
        axes=FrozenMapping({**UNUSED, **ROUTES}),
        linear=False,
    ),
    applies=lambda config: config.arrow_config is not None,
)
