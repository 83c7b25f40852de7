"""GraLoRA: Granular Low-Rank Adaptation (Jung et al., 2025, https://arxiv.org/abs/2505.20355).

    W' = W + s (D + G H),   block (n, j) of D:  A_n[:, j] B_j[n],   s = alpha / (r + hybrid_r)

W is a grid of k x k blocks; A_n (in / k, r) and B_j (r, out / k) are cut into k slices of r / k ranks, so that each
block has its own pair. `gralora_A` (k, in / k, r), `gralora_B` (k, r, out / k); G H is a LoRA of rank hybrid_r, if that
is not 0: `gralora_A_general` (hybrid_r, in), `gralora_B_general` (out, hybrid_r). Costs (r + hybrid_r) (in + out)
parameters, twice as many FLOPs and 2 r + hybrid_r numbers of memory for each token. PEFT drops other inputs of the grid
than of G H, and takes no x of more than three axes; here one x is dropped from for both.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from .._config import PeftType, TunerConfig
from .._contract import Arrays, Base, Method, Site, dropped, register
from ._lycoris import kaiming_uniform


@dataclasses.dataclass(frozen=True, kw_only=True)
class GraloraConfig(TunerConfig):
    """What GraLoRA trains and where; PEFT's fields and defaults.

    r: ranks of a row or column of blocks together, a multiple of gralora_k. gralora_k: blocks along each side of the
    weight, a divisor of its inputs and outputs. hybrid_r: rank of the LoRA beside the blocks, 0 for none. alpha: the
    change is scaled by alpha / (r + hybrid_r). gralora_dropout: rate in [0, 1) on the input of the change.
    init_weights: False for random values of what else begins at zero. fan_in_fan_out: as PEFT has it.
    Raises ValueError for values out of range.

    >>> GraloraConfig(r=16, gralora_k=4, target_modules=["q_proj"]).alpha
    64
    """

    peft_type: PeftType | None = PeftType.GRALORA
    r: int = 32
    hybrid_r: int = 0
    alpha: float = 64
    gralora_dropout: float = 0.0
    gralora_k: int = 2
    fan_in_fan_out: bool = False
    init_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("r", 1), ("gralora_k", 1), ("hybrid_r", 0)):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected an integer of at least {least}")
        if self.r % self.gralora_k:
            raise ValueError(f"r is {self.r} and gralora_k is {self.gralora_k}; expected r to be a multiple of it")
        if not 0.0 <= self.gralora_dropout < 1.0:
            raise ValueError(f"gralora_dropout is {self.gralora_dropout!r}; expected a rate in [0, 1)")
        if self.bias not in ("none", "all", "gralora_only"):
            raise ValueError(f"bias is {self.bias!r}; expected 'none', 'all' or 'gralora_only'")


def init(key: jax.Array, site: Site, config: GraloraConfig, weight: Callable[[], Any]) -> dict[str, jax.Array]:
    k, r, n_in, n_out = config.gralora_k, config.r, site.in_features, site.out_features
    if n_in % k or n_out % k:
        raise ValueError(
            f"gralora_k is {k} at {site.path!r}; expected a divisor of its {n_in} inputs and of its {n_out} outputs"
        )
    keys = jax.random.split(key, 4)
    bound = 1 / math.sqrt(n_in // k)
    arrays = {"gralora_A": jax.random.uniform(keys[0], (k, n_in // k, r), minval=-bound, maxval=bound)}
    arrays["gralora_B"] = jax.random.uniform(keys[1], (k, r, n_out // k), minval=-1, maxval=1) / math.sqrt(r)
    if config.hybrid_r:
        arrays["gralora_A_general"] = kaiming_uniform(keys[2], (config.hybrid_r, n_in))
        arrays["gralora_B_general"] = kaiming_uniform(keys[3], (n_out, config.hybrid_r))
    begun = {name: jnp.zeros_like(array) for name, array in arrays.items() if "_B" in name}
    return {**arrays, **begun} if config.init_weights else arrays


def forward(p: Arrays, x: jax.Array, base: Base, site: Site, context: Mapping[str, Any]) -> jax.Array:
    a, b = p["gralora_A"].astype(x.dtype), p["gralora_B"].astype(x.dtype)
    y, x = base(x), dropped(x, context)
    k = a.shape[0]
    # Block by block, as there are few: batched products would copy x with its blocks in front.
    thin = [jnp.split(part @ own, k, axis=-1) for part, own in zip(jnp.split(x, k, axis=-1), a, strict=True)]
    # Slice j of the ranks of every row of blocks goes to column j.
    columns = [jnp.concatenate([row[j] for row in thin], axis=-1) @ b[j] for j in range(k)]
    change = jnp.concatenate(columns, axis=-1)
    if "gralora_A_general" in p:
        inner = base.apply(x, p["gralora_A_general"].T)
        change = change + (inner @ p["gralora_B_general"].T.astype(inner.dtype)).astype(change.dtype)
    return y + (p["scaling"].astype(change.dtype) * change).astype(y.dtype)


def merge(p: Arrays, w: jax.Array, b: jax.Array | None, site: Site) -> tuple[jax.Array, jax.Array | None]:
    first, second = p["gralora_A"].astype(w.dtype), p["gralora_B"].astype(w.dtype)
    k, _, r = first.shape
    left, right = first.reshape(*first.shape[:-1], k, r // k), second.reshape(k, k, r // k, -1)
    change = jnp.einsum("nijq,jnqo->nijo", left, right).reshape(w.shape)
    if "gralora_A_general" in p:
        change = change + (p["gralora_B_general"] @ p["gralora_A_general"]).T.astype(w.dtype)
    return w + p["scaling"].astype(w.dtype) * change, b


GRALORA = register(
    Method(
        config=GraloraConfig,
        init=init,
        forward=forward,
        merge=merge,
        scaling=lambda site, config: config.alpha / (config.r + config.hybrid_r),
        dropout=lambda config: config.gralora_dropout,
    )
)
