"""HiRA: Parameter-Efficient Hadamard High-Rank Adaptation for Large Language Models (Huang et al., ICLR 2025).

    W' = W + W0 * (A B),   W0 the base weight itself      (https://openreview.net/forum?id=TwJrTz9cRS)

`hira_A (r, in, *window)` and `hira_B (out, r, *ones)`; on lookup tables `hira_embedding_A (r, vocabulary)`,
`hira_embedding_B (out, r)`. Costs r (in + out) parameters, 2 in out FLOPs for each token where the change cannot be
added to the weight (`_dense.py`), and for each pass (2 r + 1) in out to build W * (A B), which no skinny product can
replace; a lookup costs 2 r out + out and builds nothing. PEFT's first adapter has the rank r in every layer, whatever
rank_pattern says; here the pattern counts.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from .._config import PeftType, TunerConfig
from .._contract import CONVOLUTION, EMBEDDING, LINEAR, Arrays, Base, Method, Site, dropped, register
from .._patterns import value_for
from ._dense import changed_product
from ._elementwise import multiplied
from ._lycoris import kaiming_uniform


@dataclasses.dataclass(frozen=True, kw_only=True)
class HiraConfig(TunerConfig):
    """What HiRA trains and where; PEFT's fields and defaults.

    r: rank, at least 1. hira_dropout: rate in [0, 1) on the input of the change (not on lookups). init_weights: True (A
    Kaiming uniform, B zero), "gaussian" (A normal with standard deviation 1 / r in linear layers), False or None (both
    standard normal). rank_pattern: {name or regular expression: rank}, the first match wins.
    Raises ValueError for values out of range.

    >>> HiraConfig(target_modules=["q_proj"]).r
    32
    """

    peft_type: PeftType | None = PeftType.HIRA
    r: int = 32
    hira_dropout: float = 0.0
    fan_in_fan_out: bool = False
    init_weights: bool | str | None = True
    rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        for where, rank in [("r", self.r), *((f"rank_pattern[{k!r}]", v) for k, v in self.rank_pattern.items())]:
            if not isinstance(rank, int) or rank <= 0:
                raise ValueError(f"{where} is {rank!r}; expected an integer of at least 1")
        if not 0.0 <= self.hira_dropout < 1.0:
            raise ValueError(f"hira_dropout is {self.hira_dropout!r}; expected a rate in [0, 1)")
        how = self.init_weights
        if how not in (True, False, None) and str(how).lower() != "gaussian":
            raise ValueError(f"init_weights is {how!r}; expected True, False, None or 'gaussian'")


def init(key: jax.Array, site: Site, config: HiraConfig, weight: Callable[[], Any]) -> dict[str, jax.Array]:
    rank, (key_a, key_b) = value_for(site.path, config.rank_pattern, config.r), jax.random.split(key)
    shape_a = (rank, site.in_features, *site.window)
    shape_b = (site.out_features, rank, *(1 for _ in site.window))
    name = "hira_embedding_" if site.kind == EMBEDDING else "hira_"
    if not config.init_weights:
        a, b = jax.random.normal(key_a, shape_a), jax.random.normal(key_b, shape_b)
    elif site.kind == EMBEDDING:
        a, b = jnp.zeros(shape_a), jax.random.normal(key_b, shape_b)
    else:
        gaussian = config.init_weights is not True and site.kind == LINEAR
        a = jax.random.normal(key_a, shape_a) / rank if gaussian else kaiming_uniform(key_a, shape_a)
        b = jnp.zeros(shape_b)
    return {f"{name}A": a, f"{name}B": b}


def factors(p: Arrays, site: Site) -> tuple[jax.Array, jax.Array]:
    name = "hira_embedding_" if site.kind == EMBEDDING else "hira_"
    a, b = p[f"{name}A"], p[f"{name}B"]
    return a, b.reshape(b.shape[:2]).T


def forward(p: Arrays, x: jax.Array, base: Base, site: Site, context: Mapping[str, Any]) -> jax.Array:
    a, b = factors(p, site)
    if site.kind == EMBEDDING:
        y, rows = base(x), base.apply(x, a.T)
        return y + multiplied(base.apply(x, base.weight()), rows @ b.astype(rows.dtype)).astype(y.dtype)
    change = multiplied(base.weight(), jnp.tensordot(a, b, axes=(0, 0)))
    return changed_product(x, base, change, dropped(x, context))


def merge(p: Arrays, w: jax.Array, b: jax.Array | None, site: Site) -> tuple[jax.Array, jax.Array | None]:
    change = jnp.tensordot(*factors(p, site), axes=(0, 0)).astype(w.dtype)
    return w + p["base"].astype(w.dtype) * change, b


HIRA = register(
    Method(
        config=HiraConfig,
        init=init,
        forward=forward,
        merge=merge,
        dropout=lambda config: config.hira_dropout,
        kinds=frozenset({LINEAR, EMBEDDING, CONVOLUTION}),
        needs_base=True,
    )
)
