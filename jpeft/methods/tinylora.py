"""TinyLoRA: Learning to Reason in 13 Parameters (Morris et al., 2026, https://arxiv.org/abs/2602.04118).

    W' = W + A R' B,   R = sum_i v_i P_i,   W ~ A B the first r terms of its singular value decomposition

`tinylora_v.<group> (u)` trains; `tinylora_A (r, in)` and `tinylora_B (out, r)` hold a root of the singular values
each, `tinylora_P (u, r, r)` is drawn of projection_seed and the layer's number, and these do not. On a lookup table A
is (r, out) and B (in, r), and R stands for R'. Costs u parameters for each group, 2 r (in + out) FLOPs for each token,
2 r^2 (u + out) for each use of a layer, and r (in + out) + u r^2 numbers in memory.
Layers are counted, and dealt out to the groups, in the order of the PyTorch model, which is taken from the names of
modules; where they do not tell it, reading or writing a file gives a UserWarning.
PEFT leaves v as memory holds it with init_weights=False; here it is normal then.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from .._config import PeftType, TunerConfig
from .._contract import EMBEDDING, LINEAR, Arrays, Site, fold_in_name, low_rank, register, wide_dtype
from .._torch_random import Generator
from ._decompositions import principal
from ._projections import check_bias


@dataclasses.dataclass(frozen=True, kw_only=True)
class TinyLoraConfig(TunerConfig):
    """What TinyLoRA trains and where; PEFT's fields and defaults.

    r: rank of the decomposition, at least 1; of a smaller weight it is the smaller side. u: how many numbers a group
    of layers trains, at least 1. weight_tying: 0 for a group for each layer ... 1 for one of all. projection_seed: of
    the P, which are those that PyTorch draws. save_projection: whether files hold the P; without it they are drawn
    again. tinylora_dropout: rate in [0, 1) on the input of the low-rank path; on what is looked up of a table's B.
    init_weights: True for zeros, "uniform" for v between -init_v_bound and init_v_bound, False for a normal one.
    Raises ValueError for values out of range.

    >>> TinyLoraConfig(u=13, weight_tying=1.0, target_modules=["q_proj", "v_proj"]).r
    2
    """

    peft_type: PeftType | None = PeftType.TINYLORA
    r: int = 2
    u: int = 64
    weight_tying: float = 0.0
    projection_seed: int = 42
    save_projection: bool = True
    init_v_bound: float = 0.02
    tinylora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    init_weights: bool | str = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("r", "u"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}; expected an integer of at least 1")
        if not 0.0 <= self.weight_tying <= 1.0:
            raise ValueError(f"weight_tying is {self.weight_tying!r}; expected a number from 0 to 1")
        if not 0.0 <= self.tinylora_dropout < 1.0:
            raise ValueError(f"tinylora_dropout is {self.tinylora_dropout!r}; expected a rate in [0, 1)")
        if self.init_weights not in (True, False, "uniform"):
            raise ValueError(f"init_weights is {self.init_weights!r}; expected True, False or 'uniform'")
        if not isinstance(self.projection_seed, int) or not -(2**63) <= self.projection_seed < 2**63:
            raise ValueError(f"projection_seed is {self.projection_seed!r}; expected an integer of 64 bits")
        check_bias(self, "tinylora")


def groups(count: int, config: TinyLoraConfig) -> list[int]:
    """The group of each layer."""
    total = max(1, round(count * (1 - config.weight_tying)))
    size = max(1, count // total)
    return [min(number // size, total - 1) for number in range(count)]


def uses(sites: Mapping[str, Site], config: TinyLoraConfig) -> dict[str, dict[str, str]]:
    own = zip(sites, groups(len(sites), config), strict=True)
    return {path: {"tinylora_v": f"tinylora_v.{group}"} for path, group in own}


def together(
    key: jax.Array, sites: Mapping[str, Site], config: TinyLoraConfig, weights: Mapping[str, Callable[[], jax.Array]]
) -> tuple[dict[str, jax.Array], dict[str, dict[str, jax.Array]]]:
    names = {own["tinylora_v"] for own in uses(sites, config).values()}
    shared = {name: begin(fold_in_name(key, name), config) for name in sorted(names)}
    return shared, {
        path: fixed(weights[path](), site, number, config) for number, (path, site) in enumerate(sites.items())
    }


def begin(key: jax.Array, config: TinyLoraConfig) -> jax.Array:
    bound = config.init_v_bound
    if config.init_weights == "uniform":
        return jax.random.uniform(key, (config.u,), minval=-bound, maxval=bound)
    return jnp.zeros(config.u) if config.init_weights else jax.random.normal(key, (config.u,))


def fixed(weight: jax.Array, site: Site, number: int, config: TinyLoraConfig) -> dict[str, jax.Array]:
    """The arrays that do not train, of the weight and the layer's number; A and B in the weight's precision."""
    matrix = weight.astype(wide_dtype(weight.dtype))
    left, values, right = principal(matrix if site.kind == EMBEDDING else matrix.T, config.r)
    left, values, right = (array.astype(weight.dtype) for array in (left, values, right))
    roots, r = jnp.sqrt(values), values.shape[0]
    p = Generator(config.projection_seed + number).normal((config.u, r, r), 0, 1 / math.sqrt(r))
    return {"tinylora_A": roots[:, None] * right, "tinylora_B": left * roots, "tinylora_P": jnp.asarray(p)}


def factors(p: Arrays, site: Site) -> tuple[jax.Array, jax.Array]:
    a, b, v = p["tinylora_A"], p["tinylora_B"], p["tinylora_v"]
    middle = jnp.tensordot(v, p["tinylora_P"].astype(v.dtype), axes=1).astype(a.dtype)
    return (b.T, middle @ a) if site.kind == EMBEDDING else (a, (b @ middle).T)


TINYLORA = register(
    low_rank(
        config=TinyLoraConfig,
        together=together,
        uses=uses,
        factors=factors,
        dropout=lambda config: config.tinylora_dropout,
        drops_lookups=True,
        kinds=frozenset({LINEAR, EMBEDDING}),
        frozen=frozenset({"tinylora_A", "tinylora_B", "tinylora_P"}),
        unsaved=lambda config: frozenset() if config.save_projection else frozenset({"tinylora_P"}),
        ordered=lambda config: config.weight_tying < 1 or not config.save_projection,
    )
)
