"""DoRA: Weight-Decomposed Low-Rank Adaptation (Liu et al., 2024, https://arxiv.org/abs/2402.09353).

    W' = m * (W + s A B) / |W + s A B|,   the norm over all axes but the output, no gradient through it (section 4.3)

Beside LoRA's arrays `lora_magnitude_vector`: m `(out)`, for convolutions `(1, out, *ones)`. W + s A B is not built:
|W + s A B|^2 = |W|^2 + 2 s <W, A B> + s^2 |A B|^2, of which |W| is kept and the rest takes r rows.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .._contract import EMBEDDING, Arrays, Base, Method, Site, dropped, project, register, wide_dtype
from .lora import LORA, LoraConfig, factors, init as init_lora, scaling

Project = Callable[[jax.Array], jax.Array]


def init(key: jax.Array, site: Site, config: LoraConfig, weight: Callable[[], Any]) -> dict[str, jax.Array]:
    arrays, w = init_lora(key, site, config, weight), weight()
    wide = w.astype(wide_dtype(w.dtype))
    arrays["lora_base_norm"] = jnp.sqrt(jnp.sum(wide * wide, axis=range(w.ndim - 1)))
    p = {**arrays, "scaling": jnp.asarray(scaling(site, config), wide.dtype)}
    shape = (1, -1, *(1 for _ in site.window)) if site.window else (-1,)
    arrays["lora_magnitude_vector"] = norm(p, site, lambda a: project(a, w)).reshape(shape)
    return arrays


def norm(p: Arrays, site: Site, project: Project) -> jax.Array:
    """|W + s A B| for each output; where W is zero and |W| cannot be divided by, the norm of s A B."""
    own = p["lora_base_norm"].astype(wide_dtype(p["lora_base_norm"].dtype))
    a, b = (lax.stop_gradient(factor).astype(own.dtype) for factor in factors(p, site))
    rows = a.reshape(a.shape[0], -1)
    square = jnp.sum(b * jnp.matmul(rows @ rows.T, b, precision="highest"), axis=0)
    change = 2 * jnp.sum(b * lax.stop_gradient(project(a)).astype(own.dtype), axis=0) + square
    # Relative to |W|, so that a change of zero gives |W| to the last bit.
    large = own > 1e-15
    unit = jnp.where(large, own, 1)
    return unit * jnp.sqrt(jnp.maximum(large.astype(own.dtype) + change / unit**2, 0))


def factor(p: Arrays, site: Site, project: Project) -> jax.Array:
    """m / |W + s A B| for each output; 1 where there is nothing to divide by, of which PyTorch makes nan."""
    length = norm(p, site, project)
    magnitude = p["lora_magnitude_vector"].reshape(-1).astype(length.dtype)
    return jnp.where(length > 0, magnitude / jnp.where(length > 0, length, 1), 1)


def forward(p: Arrays, x: jax.Array, base: Base, site: Site, context: Mapping[str, Any]) -> jax.Array:
    a, b = factors(p, site)
    by = factor(p, site, base.project)
    kept = x if site.kind == EMBEDDING else dropped(x, context)
    y = base(kept)
    h = base.apply(kept, jnp.moveaxis(a, 0, -1))
    changed = scaled(y + (h @ b.astype(h.dtype)).astype(y.dtype), by)
    # What is dropped is dropped from the change alone, as in PEFT.
    return changed if kept is x else base(x) - y + changed


# Keeps its input for the backward pass as it is, not in the wider type of the product.
@jax.checkpoint
def scaled(y: jax.Array, by: jax.Array) -> jax.Array:
    return (y.astype(by.dtype) * by).astype(y.dtype)


def merge(p: Arrays, w: jax.Array, b: jax.Array | None, site: Site) -> tuple[jax.Array, jax.Array | None]:
    change = jnp.tensordot(*factors(p, site), axes=(0, 0))
    return (w + change.astype(w.dtype)) * factor(p, site, lambda a: project(a, p["base"])).astype(w.dtype), b


DORA = register(
    Method(
        config=LoraConfig,
        init=init,
        forward=forward,
        merge=merge,
        scaling=scaling,
        dropout=LORA.dropout,
        kinds=LORA.kinds,
        derived=frozenset({"lora_base_norm"}),
        needs_base=True,
    ),
    applies=lambda config: config.use_dora,
)
