"""X-LoRA: Mixture of Low-Rank Adapter Experts (Buehler & Buehler, 2024, https://arxiv.org/abs/2402.07148).

    y = x W + g sum_e c_e s_e (x A_e) B_e,   c = softmax(classifier(h) / temperature), or the top_k largest of it

h: what the model without its experts makes of the token, its last hidden state, so that it runs twice. The classifier
is shared, `internal_xlora_classifier.layers.<i>.weight (out, in)` and `.bias`, and trains; the experts are LoRA
adapters as they were, which train if the config says so: for n of them `xlora_A (n, r, in)`, `xlora_B (n, out, r)`,
`xlora_scaling (n)`, and `xlora_layer ()`, the number of the module in PyTorch's order. Costs 2 n r (in + out) FLOPs
for each token of the second run. `xlora_scalings (rows, tokens, layers or 1, n)`: c, see `jpeft.with_xlora_scalings`.
PEFT computes with experts named "0", "1", ... alone, fails with other names, and leaves out of its files what has such
a name in its key, so that no folder of its own gives back what was saved; those that are written here are whole.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import jax
import jax.numpy as jnp

from .._config import FrozenMapping
from .._contract import Arrays, Base, Method, RowInput, Site, fold_in_name, register
from ._xlora_config import XLoraConfig
from ._xlora_scalings import check_scalings, kept, read_scalings

EXPERTS, PLACES = frozenset({"xlora_A", "xlora_B"}), frozenset({"xlora_scaling", "xlora_layer"})


def begin(key: jax.Array, tree: Any, config: XLoraConfig) -> NoReturn:
    raise ValueError(
        "X-LoRA has no experts of its own to begin with; expected jpeft.create_xlora_adapter(wrapped, names, config), "
        "which makes it of adapters that are there"
    )


def together(
    key: jax.Array, sites: Mapping[str, Site], config: XLoraConfig, weights: Mapping[str, Callable[[], jax.Array]]
) -> tuple[dict[str, jax.Array], dict[str, dict[str, jax.Array]]]:
    n, arrays, shared = len(config.experts), dict[str, dict[str, jax.Array]](), dict[str, jax.Array]()
    for number, (path, site) in enumerate(sites.items()):
        rank = max(expert.ranks.get(path, 0) for expert in config.experts)
        arrays[path] = {
            "xlora_A": jnp.zeros((n, rank, site.in_features)),
            "xlora_B": jnp.zeros((n, site.out_features, rank)),
            "xlora_scaling": jnp.zeros(n),
            "xlora_layer": jnp.asarray(number, jnp.int32),
        }
    inner = [config.xlora_size] * (config.xlora_depth - 1)
    sizes = [config.hidden_size or 0, *inner, n * (len(sites) if config.layerwise_scalings else 1)]
    for name, inputs, outputs in zip(config.layers, sizes[:-1], sizes[1:], strict=True):
        bound = 1 / math.sqrt(inputs)
        for array, shape in (("weight", (outputs, inputs)), ("bias", (outputs,))):
            drawn = fold_in_name(key, f"{name}.{array}")
            shared[f"{name}.{array}"] = jax.random.uniform(drawn, shape, minval=-bound, maxval=bound)
    return shared, arrays


def forward(p: Arrays, x: jax.Array, base: Base, site: Site, context: Mapping[str, Any]) -> jax.Array:
    y, config, given = base(x), context["config"], context["xlora_scalings"]
    if x.ndim != 3 or any(have not in (1, want) for have, want in zip(given.shape[:2], x.shape[:2], strict=True)):
        raise ValueError(
            f"xlora_scalings are for (rows, tokens) = {given.shape[:2]}, but {site.path!r} gets an array of shape "
            f"{x.shape}; expected (rows, tokens, features) of as many"
        )
    n, r, _ = p["xlora_A"].shape
    own = jnp.take(given, jnp.minimum(p["xlora_layer"], given.shape[2] - 1), axis=2)
    own = kept(own, config) * (p["xlora_scaling"] * p["scaling"]).astype(own.dtype) * config.global_scaling_weight
    h = hidden(x, p["xlora_A"], base, context).reshape(*x.shape[:2], n, r)
    h = (h * own[..., None].astype(h.dtype)).reshape(*x.shape[:2], n * r)
    b = jnp.swapaxes(p["xlora_B"], 1, 2).reshape(n * r, -1)
    return y + (h @ b.astype(h.dtype)).astype(y.dtype)


def hidden(x: jax.Array, a: jax.Array, base: Base, context: Mapping[str, Any]) -> jax.Array:
    """x A of all experts, one behind the other; in training each drops entries of its own."""
    rates = [expert.config.lora_dropout for expert in context["config"].experts]
    if "rng" not in context or not any(rates):
        return base.apply(x, a.reshape(-1, a.shape[-1]).T)
    parts = []
    for number, rate in enumerate(rates):
        stays = jax.random.bernoulli(jax.random.fold_in(context["rng"], number), 1.0 - rate, x.shape)
        parts.append(base.apply(jnp.where(stays, x / jnp.asarray(1.0 - rate, x.dtype), jnp.zeros_like(x)), a[number].T))
    return jnp.concatenate(parts, axis=-1)


def merge(p: Arrays, w: jax.Array, b: jax.Array | None, site: Site) -> tuple[jax.Array, jax.Array | None]:
    raise ValueError(
        f"X-LoRA at {site.path!r} weighs its experts anew for each token, which no weight does: it cannot be merged. "
        "Expected it beside the weight (jpeft.lift), in a function that uses the whole weight in products with (rows, "
        "tokens, features)"
    )


def _xlora(frozen: frozenset[str]) -> Method:
    return Method(
        config=XLoraConfig,
        begin=begin,
        together=together,
        uses=lambda sites, config: {path: {} for path in sites},
        forward=forward,
        merge=merge,
        dropout=lambda config: max(expert.config.lora_dropout for expert in config.experts),
        frozen=frozen,
        unsaved=lambda config: EXPERTS | PLACES,
        ordered=lambda config: config.layerwise_scalings,
        row_inputs=FrozenMapping({"xlora_scalings": RowInput(read_scalings, check=check_scalings)}),
    )


XLORA = register(_xlora(EXPERTS | PLACES))
TRAINED_TOO = register(_xlora(PLACES), applies=lambda config: config.use_trainable_adapters)
