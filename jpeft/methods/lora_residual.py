"""LoRA from initial factors that are taken out of the weight, so that only the change of the factors acts.

    W' = W - s A0 B0 + s A B      (PEFT keeps W - s A0 B0 in the place of W; here W stays)

with A0, B0 from the weight alone: PiSSA (Meng et al., 2024, https://arxiv.org/abs/2404.02948), its first singular
vectors and values; OLoRA (Buyukakyuz, 2024, https://arxiv.org/abs/2406.01775), its QR decomposition; or from data:
"corda" and "lora_ga", whose functions put them here. `initial_A`, `initial_B` have the shapes of `lora_A`, `lora_B`.
Lookup tables are adapted by plain LoRA. Dropout acts on both products, as in the plain LoRA that comes of conversion;
in PEFT, where A0 B0 is in the weight, on A B alone.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from .._contract import EMBEDDING, LINEAR, Arrays, Site, low_rank, register, wide_dtype
from . import lora
from ._decompositions import principal, principal_by_iteration, triangular
from ._initialisations import PISSA_ITERATIONS

INITIAL = frozenset({"initial_A", "initial_B"})


def init(key: jax.Array, site: Site, config: lora.LoraConfig, weight: Callable[[], Any]) -> dict[str, jax.Array]:
    if site.kind == EMBEDDING:
        return lora.init(key, site, config, weight)
    if config.init_lora_weights in ("corda", "lora_ga"):
        plain = lora.init(key, site, config, weight)
        a, b = plain["lora_A"], plain["lora_B"]
    else:
        w = weight()
        a, b = _of_weight(key, w.astype(wide_dtype(w.dtype)), site, config)
    return {"lora_A": a, "lora_B": b, "initial_A": a, "initial_B": b}


def _of_weight(key: jax.Array, w: jax.Array, site: Site, config: lora.LoraConfig) -> tuple[jax.Array, jax.Array]:
    how, rank, scaling = config.init_lora_weights, lora.rank_of(site, config), lora.scaling(site, config)
    if rank > min(w.shape):
        raise ValueError(
            f"init_lora_weights={how!r} at {site.path!r}: r is {rank}; expected at most {min(w.shape)}, the rank of a "
            f"weight of {w.shape[0]} inputs and {w.shape[1]} outputs (rank_pattern gives single modules another r)"
        )
    if how == "olora":
        return triangular(w, rank)
    if scaling <= 0:
        raise ValueError(f"init_lora_weights={how!r} at {site.path!r}: expected lora_alpha above 0")
    found = PISSA_ITERATIONS.fullmatch(str(how))
    u, s, vh = principal_by_iteration(key, w, rank, int(found[1])) if found else principal(w, rank)
    root = jnp.sqrt(s / scaling)
    return root[:, None] * u.T, vh.T * root


def factors(p: Arrays, site: Site) -> tuple[jax.Array, jax.Array]:
    if site.kind == EMBEDDING:
        return lora.factors(p, site)
    a, b, a0, b0 = (p[name] for name in ("lora_A", "lora_B", "initial_A", "initial_B"))
    # A B - A0 B0 = A (B - B0) + (A - A0) B0: exactly zero at first, and small terms have small errors.
    first = jnp.concatenate([a, a - a0.astype(a.dtype)])
    second = jnp.concatenate([b - b0.astype(b.dtype), b0.astype(b.dtype)], axis=1)
    return first, p["scaling"].astype(b.dtype) * second.T


def _method(applies: Callable[[Any], bool], **kept: Any) -> Any:
    method = low_rank(
        config=lora.LoraConfig,
        init=init,
        factors=factors,
        scaling=lora.scaling,
        dropout=lambda config: config.lora_dropout,
        ties=lambda config: config.ensure_weight_tying,
        kinds=frozenset({LINEAR, EMBEDDING}),
        **kept,
    )
    return register(method, applies=applies)


def _is_given(config: lora.LoraConfig) -> bool:
    how = config.init_lora_weights
    return how in ("corda", "lora_ga") or (isinstance(how, str) and PISSA_ITERATIONS.fullmatch(how) is not None)


OF_WEIGHT = _method(lambda config: config.init_lora_weights in ("pissa", "olora"), derived=INITIAL)
GIVEN = _method(_is_given, frozen=INITIAL)
