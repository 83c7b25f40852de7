"""KaSA: Knowledge-aware Singular-value Adaptation (Wang et al., 2024, https://arxiv.org/abs/2412.06071).

    W' = W - A0 B0 + s A diag(d) B,   A0 B0 the part of W of its r smallest singular values

Beside LoRA's arrays `lora_diag`: d (r). PEFT overwrites W with W - A0 B0; here W stays, and `kasa_A (r, in)` and
`kasa_B (out, r)` follow from it. A fresh adapter therefore changes what the model computes. One at a time.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from .._contract import LINEAR, Arrays, Base, Site, dropped, low_rank, register, wide_dtype, wider
from .lora import LORA, LoraConfig, factors as lora_factors, init as init_lora, rank_of, scaling


def init(key: jax.Array, site: Site, config: LoraConfig, weight: Callable[[], Any]) -> dict[str, jax.Array]:
    rank, most = rank_of(site, config), min(site.in_features, site.out_features) - 1
    if rank > most:
        raise ValueError(
            f"kasa_config at {site.path!r}: r is {rank}; expected at most {most}, so that something is left of a "
            f"weight of {site.in_features} inputs and {site.out_features} outputs"
        )
    w, key_diag = weight(), jax.random.fold_in(key, 2)
    u, s, vh = jnp.linalg.svd(w.astype(wide_dtype(w.dtype)), full_matrices=False)
    small = {"kasa_A": u[:, -rank:].T, "kasa_B": (s[-rank:, None] * vh[-rank:]).T}
    return {**init_lora(key, site, config, weight), "lora_diag": jax.random.normal(key_diag, (rank,)), **small}


def factors(p: Arrays, site: Site) -> tuple[jax.Array, jax.Array]:
    (a, b), (a0, b0) = changed(p, site), removed(p)
    return jnp.concatenate([a, a0.astype(a.dtype)]), jnp.concatenate([b, -b0.astype(b.dtype)])


def changed(p: Arrays, site: Site) -> tuple[jax.Array, jax.Array]:
    return lora_factors({**p, "lora_A": p["lora_A"] * p["lora_diag"].astype(p["lora_A"].dtype)[:, None]}, site)


def removed(p: Arrays) -> tuple[jax.Array, jax.Array]:
    return p["kasa_A"], p["kasa_B"].T


def forward(p: Arrays, x: jax.Array, base: Base, site: Site, context: Mapping[str, Any]) -> jax.Array:
    """With dropout, which is on the input of the change alone."""
    y = base(x)
    for sign, kept, (a, b) in ((-1, x, removed(p)), (1, dropped(x, context), changed(p, site))):
        h = base.apply(kept, a.T)
        y = y + sign * (h @ b.astype(h.dtype)).astype(y.dtype)
    return y


def kasa_loss(wrapped: Any) -> jax.Array:
    """What KaSA adds to the loss: a scalar, float32 or wider, summed over all modules of the active adapters.

    beta |d|^2 + gamma (|B^T B - 1| + |A A^T - 1|) for each module (equations 9 to 11 of the paper), with the weights
    of its config; modules of other methods add nothing. wrapped: from `jpeft.wrap`.

    >>> import jax.numpy as jnp, jpeft
    >>> config = jpeft.LoraConfig(r=2, kasa_config=jpeft.KasaConfig(), target_modules=["query"])
    >>> kasa_loss(jpeft.wrap({"query": {"kernel": jnp.eye(4)}}, config)).shape
    ()
    """
    total = jnp.zeros((), jnp.float32)
    for adapter in (wrapped.adapters[name] for name in wrapped.active):
        settings = getattr(adapter.config, "kasa_config", None)
        for arrays in adapter.weights.values() if settings is not None else ():
            loss = _loss(arrays["lora_A"], arrays["lora_B"], arrays["lora_diag"], settings)
            total = total.astype(wider(total.dtype, loss.dtype)) + loss
    return total


def _loss(a: jax.Array, b: jax.Array, d: jax.Array, settings: Any) -> jax.Array:
    a, b, d = (array.astype(wide_dtype(array.dtype)) for array in (a, b, d))
    b = jnp.swapaxes(b, -1, -2)
    distance = jnp.zeros((), a.dtype)
    for rows in (a, b):
        gram = jnp.matmul(rows, jnp.swapaxes(rows, -1, -2), precision="highest")
        squares = jnp.sum((gram - jnp.eye(gram.shape[-1], dtype=gram.dtype)) ** 2, axis=(-1, -2))
        # The root has no derivative at zero, where it is least.
        distance = distance + jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1)), 0).sum()
    return settings.beta * jnp.sum(d**2) + settings.gamma * distance


KASA = register(
    low_rank(
        config=LoraConfig,
        init=init,
        factors=factors,
        scaling=scaling,
        kinds=frozenset({LINEAR}),
        derived=frozenset({"kasa_A", "kasa_B"}),
    ),
    applies=lambda config: config.kasa_config is not None and not config.lora_dropout,
)
KASA_WITH_DROPOUT = register(
    dataclasses.replace(KASA, forward=forward, factors=None, dropout=LORA.dropout),
    applies=lambda config: config.kasa_config is not None and config.lora_dropout > 0,
)
