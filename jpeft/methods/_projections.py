"""What methods with one pair of random matrices for all layers have in common: VeRA, PVeRA and RandLoRA."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._contract import Site, fold_in_name
from .._torch_random import Generator


def most_features(sites: Mapping[str, Site]) -> tuple[int, int]:
    """(in, out): the most that any of the layers has, for which the matrices are drawn."""
    return max(site.in_features for site in sites.values()), max(site.out_features for site in sites.values())


def of_each(
    begin: Callable[[jax.Array, Site, Any], dict[str, jax.Array]],
    key: jax.Array,
    sites: Mapping[str, Site],
    config: Any,
) -> dict[str, dict[str, jax.Array]]:
    """The arrays that each layer begins with; they depend on the key and on the layer's path alone."""
    return {path: begin(fold_in_name(key, path), site, config) for path, site in sites.items()}


def check_projected(config: Any, method: str, dropout: float) -> None:
    """Raise ValueError for a rank, a rate of dropout, a seed or a value of bias out of range."""
    if not isinstance(config.r, int) or config.r <= 0:
        raise ValueError(f"r is {config.r!r}; expected an integer of at least 1")
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"{method}_dropout is {dropout!r}; expected a rate in [0, 1)")
    check_bias(config, method)
    seed = config.projection_prng_key
    if not isinstance(seed, int) or not -(2**63) <= seed < 2**64:
        raise ValueError(f"projection_prng_key is {seed!r}; expected an integer of 64 bits, the seed of the matrices")


def check_bias(config: Any, method: str) -> None:
    if config.bias not in ("none", "all", f"{method}_only"):
        raise ValueError(f"bias is {config.bias!r}; expected 'none', 'all' or '{method}_only'")


def random_bases(config: Any, narrow: int, wide: int) -> tuple[np.ndarray, np.ndarray]:
    """RandLoRA's A (r, 1, narrow) and B (wide, bases, r) as PEFT draws them, over their standard deviations.

    Sparse ones in float32, others in bfloat16, as PEFT does where PyTorch has it.
    Raises ValueError for a basis all of whose numbers are equal, such as one of zeros.
    """
    generator, count = Generator(config.projection_prng_key), -(-narrow // config.r)
    if config.sparse or config.very_sparse:
        rare = 1 / (2 * (math.sqrt(narrow) if config.very_sparse else 3))
        shapes = ((config.r, 1, narrow), (wide, count, config.r))
        a, b = (_ternary(generator.uniform(shape, 0, 1), rare) for shape in shapes)
    else:
        shapes = ((config.r, 1, narrow), *[(wide, 1, config.r)] * count)
        a, *parts = (generator.kaiming_uniform(shape, math.sqrt(5), jnp.bfloat16) for shape in shapes)
        b = np.concatenate(parts, axis=1)
    return _normalised(a, config), _normalised(b, config)


def _ternary(drawn: np.ndarray, rare: float) -> np.ndarray:
    return np.where(drawn < rare, -1, np.where(drawn > 1 - rare, 1, 0)).astype(np.float32)


def _normalised(basis: np.ndarray, config: Any) -> np.ndarray:
    """The basis over its standard deviation, each of them rounded to the basis' type."""
    values = basis.astype(np.float64)
    deviation = values.std(ddof=1).astype(basis.dtype) if values.size > 1 else 0
    if not deviation > 0:
        raise ValueError(
            f"all {values.size} numbers of a random basis are equal, of shape {basis.shape} and "
            f"projection_prng_key={config.projection_prng_key}; expected another seed, larger layers, or "
            "very_sparse=False"
        )
    return (values.astype(np.float32) / np.float32(deviation)).astype(basis.dtype)
