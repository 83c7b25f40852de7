"""Uni-LoRA: One Vector Is All You Need (Li et al., 2025, https://arxiv.org/abs/2506.00799).

    W' = W + A B,   A (in, r) and B (r, out) made of entries of one vector:  theta[index] / sqrt(how often it is used)

`unilora_theta_d (d)` trains, for all layers together; `unilora_indices_A`, `unilora_scales_A (r, in)` and
`unilora_indices_B`, `unilora_scales_B (out, r)` do not. Costs d parameters for the whole model, 2 r (in + out) FLOPs
for each token, r (in + out) and as many lookups for each use of a layer, and 2 r (in + out) numbers in memory.
The indices are dealt out by the seed over all layers in the order of the PyTorch model, which a tree does not have: it
is taken from the names of modules. Where they do not tell it, files without indices (save_indices=False, PEFT's
default) may mean other indices in PyTorch; reading or writing one gives a UserWarning. With save_indices they are safe.
"""

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from .._config import PeftType, TunerConfig
from .._contract import Arrays, Site, low_rank, register
from ._projections import check_bias

FIXED = frozenset(f"unilora_{kind}_{side}" for kind in ("indices", "scales") for side in "AB")


@dataclasses.dataclass(frozen=True, kw_only=True)
class UniLoraConfig(TunerConfig):
    """What Uni-LoRA trains and where; PEFT's fields and defaults.

    r: rank, at least 1. theta_d_length: of the vector, all that trains. proj_seed: of the indices, at least 0; they
    are those that numpy draws for PEFT. save_indices: whether files hold indices and scales; without it they are dealt
    out again. unilora_dropout: rate in [0, 1) on the input of the low-rank path. init_theta_d_bound: the vector begins
    uniform between it and its negative; normal without init_weights. Raises ValueError for values out of range.

    >>> UniLoraConfig(theta_d_length=1024, target_modules=["q_proj", "v_proj"]).proj_seed
    42
    """

    peft_type: PeftType | None = PeftType.UNILORA
    r: int = 4
    proj_seed: int = 42
    theta_d_length: int = 256
    unilora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    init_theta_d_bound: float = 0.02
    init_weights: bool = True
    save_indices: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("r", 1), ("theta_d_length", 1), ("proj_seed", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name} is {value!r}; expected an integer of at least {least}")
        if not 0.0 <= self.unilora_dropout < 1.0:
            raise ValueError(f"unilora_dropout is {self.unilora_dropout!r}; expected a rate in [0, 1)")
        if self.init_theta_d_bound <= 0:
            raise ValueError(f"init_theta_d_bound is {self.init_theta_d_bound!r}; expected a positive number")
        check_bias(self, "unilora")


def dealt(count: int, length: int, seed: int) -> np.ndarray:
    """Indices (count): each of `length` as often as any other, or once more, in an order of the seed."""
    generator = np.random.default_rng(seed)
    extras = generator.choice(length, size=count % length, replace=False) if count % length else np.arange(0)
    indices = np.concatenate([np.repeat(np.arange(length), count // length), extras])
    generator.shuffle(indices)
    return indices


def together(
    key: jax.Array, sites: Mapping[str, Site], config: UniLoraConfig, weights: Mapping[str, Callable[[], jax.Array]]
) -> tuple[dict[str, jax.Array], dict[str, dict[str, jax.Array]]]:
    length, bound = config.theta_d_length, config.init_theta_d_bound
    key = jax.random.fold_in(key, 0)
    if config.init_weights:
        theta = jax.random.uniform(key, (length,), minval=-bound, maxval=bound)
    else:
        theta = jax.random.normal(key, (length,))
    sizes = [config.r * size for site in sites.values() for size in (site.in_features, site.out_features)]
    indices = dealt(sum(sizes), length, config.proj_seed)
    counts = np.bincount(indices, minlength=length)
    scales = (1 / np.sqrt(np.maximum(counts, 1), dtype=np.float32))[indices]
    parts = iter(zip(*(np.split(array, np.cumsum(sizes)[:-1]) for array in (indices, scales)), strict=True))
    arrays = {}
    for path, site in sites.items():
        shapes = {"A": (config.r, site.in_features), "B": (site.out_features, config.r)}
        own: dict[str, jax.Array] = {}
        for side, shape in shapes.items():
            index, scale = next(parts)
            own[f"unilora_indices_{side}"] = jnp.asarray(index.astype(np.int32).reshape(shape))
            own[f"unilora_scales_{side}"] = rounded(scale.reshape(shape), site)
        arrays[path] = own
    return {"unilora_theta_d": theta}, arrays


def rounded(scales: np.ndarray, site: Site) -> jax.Array:
    """The scales in the precision of the weight, as PEFT has them."""
    own = jnp.dtype(site.dtype)
    return jnp.asarray(scales).astype(own if jnp.issubdtype(own, jnp.floating) else scales.dtype).astype(scales.dtype)


def factors(p: Arrays, site: Site) -> tuple[jax.Array, jax.Array]:
    theta = p["unilora_theta_d"]
    a, b = (theta[p[f"unilora_indices_{side}"]] * p[f"unilora_scales_{side}"].astype(theta.dtype) for side in "AB")
    return a, b.T


UNILORA = register(
    low_rank(
        config=UniLoraConfig,
        together=together,
        factors=factors,
        dropout=lambda config: config.unilora_dropout,
        frozen=FIXED,
        unsaved=lambda config: frozenset() if config.save_indices else FIXED,
        ordered=lambda config: not config.save_indices,
    )
)
