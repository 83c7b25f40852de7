"""Adapters of any method as LoRA: `convert_to_lora`; and LoRA without intruder dimensions."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ._arrays import arrays_at, over_stack
from ._config import PeftType, TunerConfig
from ._contract import Site, config_class, method_of, wide_dtype
from ._low_rank import as_arrays, as_matrices, is_plain_lora, largest_rank, padded, product_svd, truncated
from ._merge import merged_at
from ._params import Adapter, PeftParams
from ._paths import leaves_by_path
from ._quantized import as_dense
from ._retarget import copied, selecting
from ._sites import canonical
from ._stacks import layer_paths
from ._wrap import cast_floating, check_name, checked_names, checked_params

Decomposition = tuple[jax.Array, jax.Array, jax.Array]


def convert_to_lora(
    wrapped: PeftParams, adapter_name: str, rank: int | float, new_name: str, *, dtype: Any = jnp.float32
) -> PeftParams:
    """The same parameters with one adapter more: LoRA that changes the weights as nearly as another adapter does.

    rank: an integer is the rank everywhere. A float in (0, 1] is a part of the energy: each module gets the smallest
    rank whose largest singular values have that part of the sum of all squares; the layers of a stack get the largest
    rank that one of them needs. Such a rank depends on values, so that it works outside `jit` only.
    new_name: of the new adapter, whose rank equals its alpha. dtype: of its arrays. Which adapters are active stays as
    it is; modules saved in full come along. Linear layers, lookup tables and convolutions, of any method that can be
    merged, LoRA itself too (to lower its rank).
    Raises ValueError for unknown names, a rank out of range, and trained biases; TypeError for a method that
    changes biases or adapts no module, or modules of a kind that LoRA does not act on.

    >>> import jpeft
    >>> config = jpeft.LoraConfig(r=4, init_lora_weights=False, target_modules=["query"])
    >>> wrapped = jpeft.wrap({"query": {"kernel": jnp.ones((4, 6))}}, config)
    >>> wrapped = convert_to_lora(wrapped, "default", 2, "smaller")
    >>> jax.tree.map(jnp.shape, wrapped.adapters["smaller"].weights)
    {'query': {'lora_A': (2, 4), 'lora_B': (6, 2)}}
    """
    (name,) = checked_names(checked_params(wrapped), adapter_name)
    check_name(new_name, wrapped.adapters)
    adapter = wrapped.adapters[name]
    check_convertible(name, adapter)
    _check_rank(rank, adapter.sites)
    leaves = leaves_by_path(wrapped.base)
    weights, ranks = {}, {}
    with jax.default_matmul_precision("highest"):
        for path, site in adapter.sites.items():
            found = _decomposed(adapter, site, leaves)
            ranks[path] = rank if isinstance(rank, int) else _rank_for(found[1], rank)
            a, b = padded(*truncated(*found, ranks[path]), ranks[path])
            weights[path] = {key: array.astype(dtype) for key, array in as_arrays(a, b, site).items()}
    config = selecting(_lora_config(adapter.config, ranks), adapter.sites, wrapped)
    return _with_lora(wrapped, adapter, new_name, config, weights)


def _with_lora(
    wrapped: PeftParams, adapter: Adapter, new_name: str, config: TunerConfig, weights: dict[str, dict[str, Any]]
) -> PeftParams:
    scaling = {path: jnp.ones(site.stack, jnp.float32) for path, site in adapter.sites.items()}
    new = Adapter(weights, {}, copied(adapter.replaced), scaling, config, adapter.sites, copied(adapter.rows))
    return dataclasses.replace(wrapped, adapters={**wrapped.adapters, new_name: new})


def _check_rank(rank: Any, sites: Mapping[str, Site]) -> None:
    whole = isinstance(rank, int) and not isinstance(rank, bool)
    if not (whole and rank >= 1) and not (isinstance(rank, float) and 0 < rank <= 1):
        raise ValueError(f"rank is {rank!r}; expected an integer of at least 1, or a part of the energy in (0, 1]")
    for path, site in sites.items():
        if whole and rank > largest_rank(site):
            raise ValueError(f"rank is {rank}, but the weight of {path!r} has rank {largest_rank(site)} at most")


def check_convertible(name: str, adapter: Adapter) -> None:
    method, bias = method_of(adapter.config), getattr(adapter.config, "bias", "none")
    if bias != "none":
        raise ValueError(f"adapter {name!r} has bias={bias!r}; expected 'none', for LoRA would lose its trained biases")
    if not adapter.sites or method.begin is not None:
        raise TypeError(f"adapter {name!r} with its {type(adapter.config).__name__} adapts no module that LoRA could")
    kinds = method_of(config_class(PeftType.LORA)()).kinds
    odd = [f"{path!r} ({site.kind})" for path, site in adapter.sites.items() if site.kind not in kinds]
    if method.changes_bias or odd:
        what = f"acts on {', '.join(odd[:3])}" if odd else "changes biases"
        raise TypeError(f"adapter {name!r} with its {type(adapter.config).__name__} {what}, which LoRA cannot do")


def _decomposed(adapter: Adapter, site: Site, leaves: Mapping[str, Any]) -> Decomposition:
    """The singular value decomposition of the change of one module's weight, as (outputs, inputs and window)."""
    if is_plain_lora(adapter.config):
        a, b = as_matrices(adapter.weights[site.path], site)
        wide = wide_dtype(a.dtype)
        scaling = adapter.scaling[site.path][..., None, None].astype(wide)
        return product_svd(a.astype(wide) * scaling, b.astype(wide))
    factors = method_of(adapter.config).factors
    if factors is not None:
        arrays, alike = arrays_at(adapter, site.path)
        dtype = wide_dtype(jax.dtypes.canonicalize_dtype(leaves[site.leaf].dtype))
        wide = {name: cast_floating(array, dtype) for name, array in arrays.items()}
        a, b = over_stack(lambda p: factors(p, site), site, alike)(wide)
        if a.shape[len(site.stack)] <= largest_rank(site):
            a = a.reshape(*a.shape[: len(site.stack) + 1], -1)
            return product_svd(a, jnp.swapaxes(b, -1, -2))
    u, s, vh = jnp.linalg.svd(_change(adapter, site, leaves), full_matrices=False)
    return u, s, vh


def _change(adapter: Adapter, site: Site, leaves: Mapping[str, Any]) -> jax.Array:
    """What a method that may depend on the weight makes of it, less the weight."""
    leaf = jnp.asarray(as_dense(leaves[site.leaf]))
    # In float32 or wider: rounding to the weight's own bfloat16 would be taken for a change.
    base = leaf.astype(wide_dtype(leaf.dtype))
    merged, _ = merged_at(adapter, site.path, base, None, base)
    change = canonical(merged - base, site.layout)
    axes = len(site.stack)
    return jnp.swapaxes(change.reshape(*change.shape[:axes], -1, change.shape[-1]), -1, -2)


def _rank_for(singular_values: jax.Array, energy: float) -> int:
    values = np.asarray(singular_values, np.float64).reshape(-1, singular_values.shape[-1])
    sums = np.cumsum(values**2, axis=-1)
    return max(int(np.searchsorted(row, energy * row[-1])) + 1 for row in sums)


def _lora_config(config: Any, ranks: Mapping[str, int]) -> TunerConfig:
    largest = max(ranks.values())
    by_layer = {layer: rank for path, rank in ranks.items() for layer in layer_paths(path) or [path]}
    # A name also means what ends in it, and the first match wins: the longest names come first.
    names = sorted(by_layer, key=len, reverse=True) if len(set(ranks.values())) > 1 else []
    shared = {field.name for field in dataclasses.fields(TunerConfig)} - {"peft_type", "extra"}
    make: Any = config_class(PeftType.LORA)
    return make(
        **{name: getattr(config, name) for name in shared},
        r=largest,
        lora_alpha=largest,
        rank_pattern={name: by_layer[name] for name in names},
        alpha_pattern={name: by_layer[name] for name in names},
        fan_in_fan_out=getattr(config, "fan_in_fan_out", False),
        trainable_token_indices=getattr(config, "trainable_token_indices", None),
    )


def reduce_intruder_dimension(
    wrapped: PeftParams,
    old_adapter_name: str = "default",
    new_adapter_name: str = "intruder_reduced",
    top_k: int = 10,
    threshold_epsilon: float = 0.5,
    mitigation_lambda: float = 0.75,
) -> PeftParams:
    """The same parameters with one LoRA adapter more, in which intruder dimensions are weakened, to forget less.

    An intruder is one of the `top_k` leading left singular vectors of the merged weight whose cosine similarity with
    every one of the base weight is below `threshold_epsilon`; its part of the merged weight is multiplied by
    `mitigation_lambda`, and the change is brought back to the adapter's rank. Modules without intruders keep their
    factors. Which adapters are active stays as it is. Works under `jit`.
    Raises ValueError for unknown names and trained biases, TypeError for an adapter that is not plain LoRA.
    https://arxiv.org/abs/2410.21228

    >>> import jpeft
    >>> config = jpeft.LoraConfig(r=2, init_lora_weights=False, target_modules=["query"])
    >>> wrapped = jpeft.wrap({"query": {"kernel": jnp.eye(4, 6)}}, config)
    >>> sorted(reduce_intruder_dimension(wrapped).adapters)
    ['default', 'intruder_reduced']
    """
    (name,) = checked_names(checked_params(wrapped), old_adapter_name)
    check_name(new_adapter_name, wrapped.adapters)
    adapter = wrapped.adapters[name]
    check_convertible(name, adapter)
    if not is_plain_lora(adapter.config):
        raise TypeError(f"adapter {name!r} has a {type(adapter.config).__name__}; expected plain LoRA")
    leaves = leaves_by_path(wrapped.base)

    def reduced(a: jax.Array, b: jax.Array, scaling: jax.Array, w: jax.Array) -> tuple[jax.Array, jax.Array]:
        base, merged = jnp.linalg.svd(w, full_matrices=False), w + scaling * (b @ a)
        u, s, vh = jnp.linalg.svd(merged, full_matrices=False)
        similarity = jnp.abs(u.T @ base[0]).max(axis=1)
        intruder = (similarity < threshold_epsilon) & (jnp.arange(s.size) < top_k)
        less = (mitigation_lambda - 1) * (u * jnp.where(intruder, s, jnp.zeros_like(s))) @ vh
        u, s, vh = jnp.linalg.svd((merged + less - w) / scaling, full_matrices=False)
        rank, root = a.shape[0], jnp.sqrt(s)
        new_a, new_b = padded(root[:rank, None] * vh[:rank], u[:, :rank] * root[:rank], rank)
        return jnp.where(intruder.any(), new_a, a), jnp.where(intruder.any(), new_b, b)

    weights = {}
    with jax.default_matmul_precision("highest"):
        for path, site in adapter.sites.items():
            a, b = as_matrices(adapter.weights[path], site)
            w = canonical(leaves[site.leaf], site.layout)
            w = jnp.swapaxes(w.reshape(*site.stack, -1, w.shape[-1]), -1, -2)
            one, wide = reduced, wide_dtype(a.dtype)
            for _ in site.stack:
                one = jax.vmap(one)
            arrays = one(*(jnp.asarray(each).astype(wide) for each in (a, b, adapter.scaling[path], w)))
            weights[path] = {key: each.astype(a.dtype) for key, each in as_arrays(*arrays, site).items()}
    new = dataclasses.replace(adapter, weights=weights, replaced=copied(adapter.replaced))
    return dataclasses.replace(wrapped, adapters={**wrapped.adapters, new_adapter_name: new})
