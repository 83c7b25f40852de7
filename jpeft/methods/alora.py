"""aLoRA: Activated LoRA (Greenewald et al., 2025, https://arxiv.org/abs/2504.12397).

    y = x W + s (x A) B   on the tokens from the last invocation on,   y = x W   on those before it

LoRA's arrays. Keys and values of the tokens before the invocation are those of the base model, whose cache can be
used again. No weight does this, so it cannot be merged. `alora_offsets`: of each row, how many tokens there are from
the invocation on, as in PEFT counted from the end, so that one new token after a cache is among them; 0 for none.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from .._config import FrozenMapping
from .._contract import LINEAR, Arrays, Base, Method, RowInput, Site, dropped, register
from .lora import LORA, LoraConfig, factors, init, scaling

EVERYWHERE = 2**31 - 1
"""An offset with which a row has plain LoRA."""


def read_offsets(value: Any) -> jax.Array:
    """Offsets (rows,) as int32; None in a list is 0, as PEFT has it."""
    if isinstance(value, (list, tuple)):
        value = [0 if offset is None else offset for offset in value]
    array = value if isinstance(value, jax.ShapeDtypeStruct) else jnp.asarray(value)
    if array.ndim != 1 or not array.size or not jnp.issubdtype(array.dtype, jnp.integer):
        raise ValueError(f"alora_offsets are {array.dtype} of shape {array.shape}; expected integers of shape (rows,)")
    if isinstance(array, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(array.shape, jnp.int32)  # type: ignore[return-value]
    if not isinstance(array, Tracer) and np.any(np.asarray(array) < 0):
        raise ValueError(f"alora_offsets hold {int(np.asarray(array).min())}; expected 0 (no invocation) or more")
    return array.astype(jnp.int32)


def activated(offsets: jax.Array, shape: tuple[int, ...], site: Site) -> jax.Array:
    """Where the adapter acts: of shape (rows, tokens, 1, ...), or (rows, 1) for (rows, features), a token a row."""
    if len(shape) < 2 or shape[0] != offsets.shape[0]:
        raise ValueError(
            f"alora_offsets are for {offsets.shape[0]} rows, but {site.path!r} computes an array of shape {shape}; "
            "expected (rows, tokens, features) of as many rows, the whole batch with its rows and tokens as axes apart"
        )
    tokens = shape[1] if len(shape) > 2 else 1
    mask = jnp.arange(tokens, dtype=offsets.dtype) >= tokens - jnp.minimum(offsets, tokens)[:, None]
    return mask.reshape(*mask.shape, *(1 for _ in shape[2:]))


def forward(p: Arrays, x: jax.Array, base: Base, site: Site, context: Mapping[str, Any]) -> jax.Array:
    a, b = factors(p, site)
    y = base(x)
    h = base.apply(dropped(x, context), jnp.moveaxis(a, 0, -1))
    h = jnp.where(activated(context["alora_offsets"], h.shape, site), h, jnp.zeros_like(h))
    return y + (h @ b.astype(h.dtype)).astype(y.dtype)


def merge(p: Arrays, w: jax.Array, b: jax.Array | None, site: Site) -> tuple[jax.Array, jax.Array | None]:
    raise ValueError(
        f"aLoRA at {site.path!r} changes what comes after its invocation and nothing else, which no weight does: it "
        "cannot be merged. Expected it beside the weight (jpeft.lift), in a function that uses the whole weight in "
        "products with (rows, tokens, features); to merge, train plain LoRA (alora_invocation_tokens=None)"
    )


ALORA = register(
    Method(
        config=LoraConfig,
        init=init,
        forward=forward,
        merge=merge,
        scaling=scaling,
        dropout=LORA.dropout,
        kinds=frozenset({LINEAR}),
        row_inputs=FrozenMapping({"alora_offsets": RowInput(read_offsets, plain=EVERYWHERE)}),
    ),
    applies=lambda config: bool(config.alora_invocation_tokens),
)
