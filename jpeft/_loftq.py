"""LoftQ: LoRA-Fine-Tuning-Aware Quantization (Li et al., 2023, https://arxiv.org/abs/2310.08659).

Quantising and decomposing alternate: Q is the quantised W - s A B, and s A B the nearest to W - Q of its rank. The
number formats are those of PEFT: NF4 (NF2 by the same rule) in blocks of 64 of the (out, in) matrix, and int8 by rows.
"""

import dataclasses
import functools
import statistics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ._contract import INPUT, OUTPUT, Site
from ._formats import Plan, encoded, imported_qwix, over_blocks
from ._initial import adapter_to_initialise, linear_sites, over_stack, rank_and_scaling, weights_of, with_factors
from ._params import PeftParams
from ._paths import map_leaves
from ._quantized import Quantized, by_blocks
from ._sites import restored

BLOCK = 64

# Where the outermost value of a normal float stands, as a probability (https://arxiv.org/abs/2305.14314).
OUTERMOST = 0.9677083


def initialize_lora_loftq_weights(
    wrapped: PeftParams, *, adapter_name: str = "default", base: str = "dense"
) -> PeftParams:
    """Parameters whose adapted weights are quantised, with an adapter that starts from what quantising lost.

    wrapped: with an adapter of init_lora_weights="loftq", whose loftq_config says how many bits and rounds. The tree
    that was wrapped is left alone; the result has another base, whose adapted weights hold the quantised numbers in
    the leaves' own dtypes, and a plain LoRA adapter of it: keep that base along with the adapter (`unwrap`).
    base: "dense" for these leaves, or "quantized" for the same numbers as codes and scales (`jpeft.Quantized`).
    Raises ValueError for an adapter of another initialisation, ranks above a layer's sizes, another word for `base`,
    and for "quantized" where blocks of 64 of the (out, in) matrix are no blocks of the leaf.

    >>> import jpeft
    >>> params = {"dense": {"kernel": jax.random.normal(jax.random.key(0), (8, 8))}}
    >>> config = jpeft.LoraConfig(r=4, target_modules=["dense"], init_lora_weights="loftq")
    >>> wrapped = initialize_lora_loftq_weights(jpeft.wrap(params, config))
    >>> np.unique(wrapped.base["dense"]["kernel"]).size <= 16
    True
    """
    adapter = adapter_to_initialise(wrapped, adapter_name, "loftq")
    config: Any = adapter.config
    if base not in _FORMS:
        raise ValueError(f"base is {base!r}; expected one of: {', '.join(_FORMS)}")
    sites, factors, leaves = linear_sites(adapter), {}, {}
    for path, weight in weights_of(wrapped, sites).items():
        site = sites[path]
        rank, scaling = rank_and_scaling(site, config)
        if rank > min(site.in_features, site.out_features) or scaling <= 0:
            raise ValueError(
                f"init_lora_weights='loftq' at {path!r}: r is {rank}, the scaling {scaling}; expected at most "
                f"{min(site.in_features, site.out_features)}, and a scaling above 0"
            )
        settings = config.loftq_config
        one = functools.partial(_alternated, settings.loftq_bits, settings.loftq_iter, rank, scaling)
        quantised, *factors[path] = over_stack(one, site)(weight)
        leaves[site.leaf] = _FORMS[base](quantised, site, settings.loftq_bits)
    new_base = map_leaves(lambda path, leaf: leaves.get(path, leaf), wrapped.base)
    plain = dataclasses.replace(adapter, config=dataclasses.replace(config, init_lora_weights=True, loftq_config={}))
    wrapped = dataclasses.replace(wrapped, base=new_base, adapters={**wrapped.adapters, adapter_name: plain})
    return with_factors(wrapped, adapter_name, factors, initial=False)


def _as_dense(weight: jax.Array, site: Site, bits: int) -> jax.Array:
    return restored(weight, site.layout, site.shape).astype(site.dtype)


def _as_quantized(weight: jax.Array, site: Site, bits: int) -> Quantized:
    """The same numbers as codes: the largest of a block is one of them, so that its scale is found again."""
    leaf, counts = restored(weight, site.layout, site.shape), _counts(site, bits)
    if bits < 8:
        table = tuple(normal_floats(bits).tolist())
        return encoded(leaf, Plan("nf4" if bits == 4 else None, jnp.dtype(site.dtype), counts, table=table))
    steps = over_blocks(lambda blocks, axis: jnp.abs(blocks).max(axis), leaf, counts)
    steps = jnp.where(steps > 0, steps, 1) / 127
    codes = jnp.round(by_blocks(jnp.divide, leaf, steps)).astype(jnp.int8)
    return Quantized(imported_qwix().QArray(codes, steps, None, codes.dtype), jnp.dtype(site.dtype))


def _counts(site: Site, bits: int) -> tuple[int, ...]:
    """How many scales there are along each axis of the leaf."""
    inputs, outputs = (site.layout.count(letter) for letter in (INPUT, OUTPUT))
    rows = 1 if bits == 8 or site.in_features % BLOCK == 0 else BLOCK // site.in_features
    tiles = {INPUT: site.in_features if bits == 8 else min(BLOCK, site.in_features), OUTPUT: rows}
    whole = bits == 8 or BLOCK % tiles[INPUT] == 0
    if (inputs, outputs) != (1, 1) or not whole or not rows or site.out_features % rows:
        raise ValueError(
            f"base='quantized' at {site.path!r}: blocks of {BLOCK} of its matrix (out, in) = ({site.out_features}, "
            f"{site.in_features}), row after row, are no blocks of {site.leaf!r}, whose layout is {site.layout!r}; "
            f"expected one input axis, of a multiple or a divisor of {BLOCK}, and one output axis, or base='dense'"
        )
    return tuple(size // tiles.get(letter, 1) for letter, size in zip(site.layout, site.shape, strict=True))


_FORMS = {"dense": _as_dense, "quantized": _as_quantized}


def _alternated(
    bits: int, rounds: int, rank: int, scaling: float, w: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(the quantised weight, lora_A, lora_B) of a weight (in, out)."""
    target = rest = w.T
    for index in range(rounds):
        quantised = _quantised(rest, bits)
        u, s, vh = jnp.linalg.svd(target - quantised, full_matrices=False)
        root = jnp.sqrt(s[:rank])
        a, b = root[:, None] * vh[:rank], u[:, :rank] * root
        if index < rounds - 1:
            rest = target - jnp.matmul(b, a, precision="highest")
    return quantised.T, a / scaling**0.5, b / scaling**0.5


def _quantised(w: jax.Array, bits: int) -> jax.Array:
    """The numbers of a matrix (out, in) in its format, as numbers of its dtype."""
    if bits == 8:
        largest = jnp.abs(w).max(1, keepdims=True)
        step = jnp.where(largest > 0, largest, 1) / 127
        return jnp.round(w / step) * step
    flat = jnp.pad(w.reshape(-1), (0, -w.size % BLOCK)).reshape(-1, BLOCK)
    largest = jnp.abs(flat).max(1, keepdims=True)
    values = jnp.asarray(normal_floats(bits), w.dtype)
    middles = (values[1:] + values[:-1]) / 2
    nearest = values[jnp.searchsorted(middles, flat / jnp.where(largest > 0, largest, 1))]
    return (nearest * largest).reshape(-1)[: w.size].reshape(w.shape)


def normal_floats(bits: int) -> np.ndarray:
    """The values in [-1, 1] of a normal float, in rising order: quantiles of the normal distribution, and 0.

    >>> normal_floats(2).round(3)
    array([-1.   ,  0.   ,  0.338,  1.   ])
    """
    half = 2 ** (bits - 1)
    quantile = statistics.NormalDist().inv_cdf
    above = [quantile(p) for p in np.linspace(OUTERMOST, 0.5, half + 1)[:-1]]
    below = [-quantile(p) for p in np.linspace(OUTERMOST, 0.5, half)[:-1]]
    values = np.sort([*above, 0.0, *below])
    return values / values.max()
