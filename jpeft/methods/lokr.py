"""LoKr: low-rank Kronecker product (Yeh et al., 2023, LyCORIS, https://arxiv.org/abs/2309.14859).

    W' = W + s C (x) D,   s = alpha / r;   out = g k, in = m n,   C (g, m), D (k, n, *window)   (section 3.2)

`lokr_w1` is C, or `lokr_w1_a (g, r)`, `lokr_w1_b (r, m)` with decompose_both and r < max(g, m) / 2. `lokr_w2` is D,
or, for r < max(k, n) / 2, `lokr_w2_a (k, r)`, `lokr_w2_b (r, n * window)`, or with use_effective_conv2d `lokr_t2 (r, r,
*window)`, `lokr_w2_a (r, k)`, `lokr_w2_b (r, n)`. The product is not built: x is read as (m, n), D acts on n, C on m.
Costs g m + k n parameters (those of two factors: r (k + n)) and 2 m k (n + g) or 2 n g (m + k) FLOPs for each token,
whichever is less. In convolutions over one axis PEFT arranges the product of C and a whole D otherwise than in all
others; as adapters are trained so, it is built like that here, too.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from .._config import PeftType, TunerConfig
from .._contract import CONVOLUTION, LINEAR, Arrays, Base, Site, additive, register
from ._kronecker import change_of, delta, factorization, is_rearranged
from ._lycoris import check_ranks_and_rates, is_effective, is_noisy, kaiming_uniform, kept, rank_of, scaling


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoKrConfig(TunerConfig):
    """What LoKr trains and where; PEFT's fields and defaults.

    r: rank, at least 1. alpha: the change is scaled by alpha / r. rank_dropout, module_dropout: rates in [0, 1) at
    which the change of an output, and of a layer, is left out in training; rank_dropout_scale: whether what is left is
    scaled up. use_effective_conv2d: whether windows get a factor of their own. decompose_both: whether the first matrix
    may be two factors, too. decompose_factor: what the first of the two sizes of inputs and outputs is to be, or at
    most; -1 for near the square root. init_weights: True (the first matrix zero), "lycoris" (the second), False
    (neither). rank_pattern, alpha_pattern: {name or regular expression: value}, the first match wins.
    Raises ValueError for values out of range.

    >>> LoKrConfig(r=4, decompose_both=True, target_modules=["q_proj"]).decompose_factor
    -1
    """

    peft_type: PeftType | None = PeftType.LOKR
    r: int = 8
    alpha: float = 8
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    use_effective_conv2d: bool = False
    decompose_both: bool = False
    decompose_factor: int = -1
    rank_dropout_scale: bool = False
    init_weights: bool | str = True
    rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranks_and_rates(self)
        factor = self.decompose_factor
        if not isinstance(factor, int) or (factor < 1 and factor != -1):
            raise ValueError(f"decompose_factor is {factor!r}; expected -1 or an integer of at least 1")
        if self.init_weights not in (True, False, "lycoris"):
            raise ValueError(f"init_weights is {self.init_weights!r}; expected True, False or 'lycoris'")


def init(key: jax.Array, site: Site, config: LoKrConfig, weight: Callable[[], Any]) -> dict[str, jax.Array]:
    r, window = rank_of(site, config), site.window
    (g, k), (m, n) = (factorization(size, config.decompose_factor) for size in (site.out_features, site.in_features))
    shapes: dict[str, tuple[int, ...]] = {"lokr_w1": (g, m)}
    if config.decompose_both and r < max(g, m) / 2:
        shapes = {"lokr_w1_a": (g, r), "lokr_w1_b": (r, m)}
    if r >= max(k, n) / 2:
        shapes |= {"lokr_w2": (k, n, *window)}
    elif is_effective(site, config):
        # PEFT's convolutions have windows of two axes.
        shapes |= {"lokr_t2": (r, r, *window, *(1 for _ in range(2 - len(window))))}
        shapes |= {"lokr_w2_a": (r, k), "lokr_w2_b": (r, n)}
    else:
        shapes |= {"lokr_w2_a": (k, r), "lokr_w2_b": (r, n * math.prod(window))}
    first, second = (("lokr_w1", "lokr_w1_a"), ("lokr_w2", "lokr_w2_b"))
    zero = {True: first, False: (), "lycoris": second}[config.init_weights]
    keys = zip(jax.random.split(key, len(shapes)), shapes.items(), strict=True)
    return {name: jnp.zeros(shape) if name in zero else kaiming_uniform(own, shape) for own, (name, shape) in keys}


def forward(p: Arrays, x: jax.Array, base: Base, site: Site, context: Mapping[str, Any]) -> jax.Array:
    y, rescaled = base(x), context["config"].rank_dropout_scale
    change = base.apply(x, delta(p, site)) if is_rearranged(p, site) else change_of(p, x, base, site)
    return y + kept(change, context, rescaled=rescaled).astype(y.dtype)


LOKR = register(
    additive(
        config=LoKrConfig,
        init=init,
        delta=delta,
        forward=forward,
        scaling=scaling,
        noisy=is_noisy,
        kinds=frozenset({LINEAR, CONVOLUTION}),
    )
)
