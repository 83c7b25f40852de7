"""MiSS: Matrix Shard Sharing (Kang and Yin, 2024, https://arxiv.org/abs/2409.15371).

    y = x W + s D,   s_j = x_j + x_(j + r) + x_(j + 2 r) + ...      `miss_block`: D (r, out)

and of the same shape for init_weights="mini" D = (E, E, ...), with `miss_block` E (r, mini_r); costs r * out or
r * mini_r parameters, and in + 2 r out or in + 2 r mini_r + out FLOPs for each token. init_weights="bat": each block
W_io (r, r) of W becomes W_io + C_o W_io + C_o, `miss_block` (out / r, r, r) the transposed C_o; costs r * out
parameters, 2 in out FLOPs for each token, and, once for each use, 2 in out r FLOPs and a weight of memory. PEFT
ignores miss_dropout in that form; here what is dropped is dropped from the change in all of them.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from .._config import PeftType, TunerConfig
from .._contract import Arrays, Base, Method, Site, dropped, register


@dataclasses.dataclass(frozen=True, kw_only=True)
class MissConfig(TunerConfig):
    """What MiSS trains and where; PEFT's fields and defaults.

    r: number of sums of inputs, at least 1 and at most the layer's inputs; for "bat" a divisor of its inputs and
    outputs. miss_dropout: rate in [0, 1) on the input of the change. init_weights: True, or "bat" or "mini" for these
    forms (all begin at zero), or False for random values. mini_r: outputs that "mini" repeats, a divisor of the
    layer's. Raises ValueError for values out of range.

    >>> MissConfig(r=16, init_weights="bat", target_modules=["q_proj"]).mini_r
    1
    """

    peft_type: PeftType | None = PeftType.MISS
    r: int = 64
    miss_dropout: float = 0.0
    mini_r: int = 1
    init_weights: bool | str = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("r", "mini_r"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected an integer of at least 1")
        if not 0.0 <= self.miss_dropout < 1.0:
            raise ValueError(f"miss_dropout is {self.miss_dropout!r}; expected a rate in [0, 1)")
        if self.init_weights not in (True, False, "bat", "mini"):
            raise ValueError(f"init_weights is {self.init_weights!r}; expected True, False, 'bat' or 'mini'")
        if self.bias not in ("none", "all", "MiSS_only", "miss_only"):
            raise ValueError(f"bias is {self.bias!r}; expected 'none', 'all' or 'MiSS_only'")


def init(key: jax.Array, site: Site, config: MissConfig, weight: Callable[[], Any]) -> dict[str, jax.Array]:
    r, n_in, n_out, form = config.r, site.in_features, site.out_features, config.init_weights
    if r > n_in:
        raise ValueError(f"r is {r} at {site.path!r}; expected at most its {n_in} inputs")
    if form == "bat" and (n_in % r or n_out % r):
        raise ValueError(
            f"r is {r} at {site.path!r}, with init_weights='bat'; expected a divisor of its {n_in} inputs and of its "
            f"{n_out} outputs"
        )
    if form == "mini" and n_out % config.mini_r:
        raise ValueError(f"mini_r is {config.mini_r} at {site.path!r}; expected a divisor of its {n_out} outputs")
    if form is False:
        # torch's kaiming_uniform_(a=sqrt(5)), for which the number of outputs is the fan.
        return {"miss_block": jax.random.uniform(key, (r, n_out), minval=-1, maxval=1) / math.sqrt(n_out)}
    shapes = {"bat": (n_out // r, r, r), "mini": (r, config.mini_r)}
    return {"miss_block": jnp.zeros(shapes.get(str(form), (r, n_out)))}


def sums(x: jax.Array, r: int) -> jax.Array:
    """s of x (..., in), which is filled up with zeros to a multiple of r: (..., r)."""
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % r)])
    return x.reshape(*x.shape[:-1], -1, r).sum(-2)


def change_of(w: jax.Array, block: jax.Array) -> jax.Array:
    """C_o W_io + C_o for each block of a weight (in, out), block (out / r, r, r) holding the transposed C_o."""
    r = block.shape[-1]
    parts, block = w.reshape(w.shape[0] // r, r, -1, r), block.astype(w.dtype)
    turned = jnp.einsum("akop,okq->aqop", parts, block, precision="highest")
    return (turned + block.transpose(2, 0, 1)).reshape(w.shape)


def forward(p: Arrays, x: jax.Array, base: Base, site: Site, context: Mapping[str, Any]) -> jax.Array:
    config, block, kept = context["config"], p["miss_block"], dropped(x, context)
    y = base(x)
    if config.init_weights == "bat":
        return y + base.apply(kept, change_of(base.weight(), block)).astype(y.dtype)
    h = sums(kept, config.r) @ block.astype(x.dtype)
    if config.init_weights == "mini":
        h = jnp.tile(h, site.out_features // config.mini_r)
    return y + h.astype(y.dtype)


def merge(p: Arrays, w: jax.Array, b: jax.Array | None, site: Site) -> tuple[jax.Array, jax.Array | None]:
    config: Any = p["config"]
    block = p["miss_block"].astype(w.dtype)
    if config.init_weights == "bat":
        return w + change_of(p["base"].astype(w.dtype), block), b
    rows, columns = -(-site.in_features // config.r), site.out_features // block.shape[1]
    return w + jnp.tile(block, (rows, columns))[: site.in_features], b


MISS = register(
    Method(
        config=MissConfig,
        init=init,
        forward=forward,
        merge=merge,
        dropout=lambda config: config.miss_dropout,
        needs_base=True,
        needs_config=True,
    )
)
