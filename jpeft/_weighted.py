"""Several LoRA adapters combined into one: `add_weighted_adapter`."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ._config import TunerConfig
from ._contract import Site, wide_dtype
from ._low_rank import as_arrays, as_matrices, factor_names, is_lora, is_plain_lora, padded, product_svd, truncated
from ._params import Adapter, PeftParams, Sites
from ._paths import fold_in_name
from ._retarget import copied, selecting
from ._stacks import layer_paths
from ._targets import ALL_LINEAR
from ._task_vectors import SIGN_METHODS, dare_linear, dare_ties, magnitude_prune, task_arithmetic, ties
from ._wrap import check_name, checked_key, checked_names, checked_params

# What becomes of the two factors, each by itself; with "_svd", of the change of the weight, which is then factored.
RULES = ("ties", "dare_ties", "dare_linear", "magnitude_prune")
COMBINATIONS = ("svd", "linear", "cat", *RULES, *(f"{rule}_svd" for rule in RULES))

Rule = Callable[[Sequence[jax.Array], jax.Array, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class _Recipe:
    """What `add_weighted_adapter` was asked for, checked: rank is the result's."""

    kind: str
    rank: int
    clamp: float | None
    rule: Rule


@dataclasses.dataclass(frozen=True)
class _Part:
    """One adapter's share in one module: its factors as matrices, and its weight and scaling, one a stack entry."""

    a: jax.Array
    b: jax.Array
    weight: jax.Array
    scaling: jax.Array


jax.tree_util.register_dataclass(_Part, data_fields=["a", "b", "weight", "scaling"], meta_fields=[])


def add_weighted_adapter(
    wrapped: PeftParams,
    adapters: Sequence[str],
    weights: Sequence[Any] | jax.Array,
    adapter_name: str,
    combination_type: str = "svd",
    svd_rank: int | None = None,
    svd_clamp: float | None = None,
    density: float | None = None,
    majority_sign_method: str = "total",
    rng: jax.Array | None = None,
) -> PeftParams:
    """The same parameters with one LoRA adapter more, made of others; which ones are active stays as it is.

    adapters, weights: names, and a number for each, negative ones too; the numbers may be traced, so that they can be
    learned. adapter_name: of the new adapter, whose rank equals its alpha. combination_type, of PEFT's meaning:
    "svd": the weighted sum of the changes, of the best rank `svd_rank` (default: the largest of the ranks);
    "cat": the same sum exactly, of the sum of the ranks; "linear": the factors summed up, a rough approximation;
    "ties", "dare_ties", "dare_linear", "magnitude_prune": the factors merged by that rule of `jpeft.ties` and so on,
    and with "_svd" the changes merged so and then factored. All but "cat" and those with "svd" ask for equal ranks.
    svd_clamp: quantile in (0, 1] at which the factors of a decomposition are clamped. density: the part of the entries
    that is kept, in [0, 1]; rules ask for it. majority_sign_method: "total" or "frequency", for "ties". rng: key of
    the random choice of "dare" (default: seed 0); a module's depends on it and on the module's path alone.
    A module takes part with the adapters that act on it. Modules that one adapter saves in full come along as they are.
    Raises ValueError for unknown names, numbers and types out of range, ranks that differ where they may not, adapters
    that train biases or save the same module, and TypeError for adapters that are not plain LoRA.

    >>> import jpeft
    >>> config = jpeft.LoraConfig(r=2, target_modules=["query"])
    >>> wrapped = jpeft.wrap({"query": {"kernel": jnp.ones((4, 6))}}, config, adapter_name="one")
    >>> wrapped = jpeft.wrap(wrapped, config, adapter_name="two")
    >>> wrapped = add_weighted_adapter(wrapped, ["one", "two"], [0.7, -0.3], "both", combination_type="cat")
    >>> wrapped.adapters["both"].config.r, wrapped.adapters["both"].weights["query"]["lora_A"].shape
    (4, (4, 4))
    """
    names = checked_names(checked_params(wrapped), adapters)
    check_name(adapter_name, wrapped.adapters)
    parts = {name: wrapped.adapters[name] for name in names}
    for name, adapter in parts.items():
        _check_plain(name, adapter)
    weights = jnp.asarray(weights)
    if weights.shape != (len(names),):
        raise ValueError(f"weights have shape {weights.shape}; expected one number for each of: {', '.join(names)}")
    recipe = _Recipe(
        kind=combination_type,
        rank=_new_rank(parts, combination_type, svd_rank),
        clamp=_checked_clamp(svd_clamp),
        rule=_rule(combination_type, density, majority_sign_method),
    )
    sites = _united_sites(parts)
    key = checked_key(rng)
    shares = {path: _shares(path, site, parts, weights, recipe) for path, site in sites.items()}
    combine = functools.partial(_combined, sites=sites, recipe=recipe)
    abstract = any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(list(parts.values())))
    new = {path: adapter.scaling[path] for adapter in parts.values() for path in adapter.scaling}
    adapter = Adapter(
        weights=jax.eval_shape(combine, key, shares) if abstract else combine(key, shares),
        shared={},
        replaced=copied({path: leaf for adapter in parts.values() for path, leaf in adapter.replaced.items()}),
        scaling={path: new[path] if abstract else jnp.ones_like(new[path]) for path in sites},
        config=selecting(_new_config(parts, recipe.rank), sites, wrapped),
        sites=sites,
    )
    return dataclasses.replace(wrapped, adapters={**wrapped.adapters, adapter_name: adapter})


def _check_plain(name: str, adapter: Adapter) -> None:
    config: Any = adapter.config
    if not is_lora(config):
        raise TypeError(
            f"adapter {name!r} has a {type(config).__name__}; expected a LoraConfig: make a LoRA of it first, with "
            "jpeft.convert_to_lora"
        )
    if adapter.rows:
        raise TypeError(
            f"adapter {name!r} trains single rows of {', '.join(adapter.rows)} (trainable_token_indices), which "
            "have no weighted sum with another adapter's; expected adapters without"
        )
    if getattr(config, "target_parameters", None):
        raise TypeError(f"adapter {name!r} has target_parameters={config.target_parameters!r}; expected none")  # pyright: ignore[reportAttributeAccessIssue]
    odd = {
        path: sorted(own) for path, own in adapter.weights.items() if set(own) != set(factor_names(adapter.sites[path]))
    }
    if not is_plain_lora(config) or odd or adapter.shared:
        what = f": {next(iter(odd))!r} has {', '.join(next(iter(odd.values())))}" if odd else ""
        raise TypeError(
            f"adapter {name!r} is a variant of LoRA whose change is more than its two factors{what}; expected plain "
            "LoRA: make one of it first, with jpeft.convert_to_lora"
        )
    if config.bias != "none":
        raise ValueError(
            f"adapter {name!r} has bias={config.bias!r}, and trained biases cannot be combined; expected 'none'"
        )


def _new_rank(parts: Mapping[str, Adapter], kind: str, svd_rank: int | None) -> int:
    if kind not in COMBINATIONS:
        raise ValueError(f"combination_type is {kind!r}; expected one of {', '.join(map(repr, COMBINATIONS))}")
    if svd_rank is not None and not (isinstance(svd_rank, int) and svd_rank > 0):
        raise ValueError(f"svd_rank is {svd_rank!r}; expected an integer of at least 1, or None")
    ranks = {name: _largest_rank(adapter.config) for name, adapter in parts.items()}
    if kind == "cat":
        return sum(ranks.values())
    if kind.endswith("svd"):
        return svd_rank or max(ranks.values())
    if len(set(ranks.values())) > 1:
        given = ", ".join(f"{name!r} has {rank}" for name, rank in ranks.items())
        raise ValueError(f"combination_type {kind!r} needs adapters of the same rank, but {given}; use 'svd' or 'cat'")
    return max(ranks.values())


def _largest_rank(config: Any) -> int:
    return max(config.r, *config.rank_pattern.values()) if config.rank_pattern else config.r


def _checked_clamp(clamp: float | None) -> float | None:
    if clamp is not None and not 0 < clamp <= 1:
        raise ValueError(f"svd_clamp is {clamp!r}; expected a quantile in (0, 1], or None")
    return clamp


def _rule(kind: str, density: float | None, sign: str) -> Rule:
    name = kind.removesuffix("_svd")
    if name not in RULES:
        return lambda tensors, weights, key: task_arithmetic(tensors, weights)
    if density is None or not 0 <= density <= 1:
        raise ValueError(
            f"density is {density!r}; combination_type {kind!r} needs the part to keep, a number in [0, 1]"
        )
    if sign not in SIGN_METHODS:
        raise ValueError(f"majority_sign_method is {sign!r}; expected one of {', '.join(map(repr, SIGN_METHODS))}")
    rules: dict[str, Rule] = {
        "ties": lambda tensors, weights, key: ties(tensors, weights, density, sign),
        "dare_ties": lambda tensors, weights, key: dare_ties(tensors, weights, density, sign, rng=key),
        "dare_linear": lambda tensors, weights, key: dare_linear(tensors, weights, density, rng=key),
        "magnitude_prune": lambda tensors, weights, key: magnitude_prune(tensors, weights, density),
    }
    return rules[name]


def _united_sites(parts: Mapping[str, Adapter]) -> Sites:
    sites: dict[str, Site] = {}
    for name, adapter in parts.items():
        for path, site in adapter.sites.items():
            if sites.setdefault(path, site) != site:
                raise ValueError(
                    f"adapter {name!r} sees {path!r} as {site}, and another of {', '.join(parts)} as {sites[path]}; "
                    "expected adapters that were wrapped with the same layouts"
                )
            saved = next((other for other, each in parts.items() if site.leaf in each.replaced), None)
            if saved is not None:
                raise ValueError(
                    f"adapter {name!r} adapts {path!r}, which {saved!r} saves in full; a combination cannot do both"
                )
    return Sites(sites)


def _shares(
    path: str, site: Site, parts: Mapping[str, Adapter], weights: jax.Array, recipe: _Recipe
) -> list[tuple[dict[str, Any], Any, jax.Array]]:
    found = [
        (adapter.weights[path], adapter.scaling[path], weight)
        for adapter, weight in zip(parts.values(), weights, strict=True)
        if path in adapter.weights
    ]
    ranks = {arrays[factor_names(site)[0]].shape[len(site.stack)] for arrays, _, _ in found}
    if len(ranks) > 1 and recipe.kind != "cat" and not recipe.kind.endswith("svd"):
        raise ValueError(
            f"combination_type {recipe.kind!r} needs adapters of the same rank, but at {path!r} they have "
            f"{', '.join(map(str, sorted(ranks)))}, by their rank_pattern; use 'svd' or 'cat'"
        )
    return found


def _combined(key: jax.Array, shares: Mapping[str, Any], *, sites: Sites, recipe: _Recipe) -> dict[str, dict[str, Any]]:
    return {path: _site_combined(key, shares[path], site, recipe) for path, site in sites.items()}


def _site_combined(key: jax.Array, shares: Sequence[Any], site: Site, recipe: _Recipe) -> dict[str, jax.Array]:
    dtype = shares[0][0][factor_names(site)[0]].dtype
    wide = wide_dtype(dtype)

    def part(arrays: Mapping[str, Any], scaling: Any, weight: jax.Array) -> _Part:
        a, b = as_matrices(arrays, site)
        scaling = jnp.asarray(scaling)
        weight = jnp.broadcast_to(weight, scaling.shape)
        return jax.tree.map(lambda array: array.astype(wide), _Part(a, b, weight, scaling))

    def one(key: jax.Array, parts: list[_Part]) -> tuple[jax.Array, jax.Array]:
        return _factors(parts, recipe, key)

    for _ in site.stack:
        one = jax.vmap(one)
    with jax.default_matmul_precision("highest"):
        a, b = one(_keys(key, site), [part(*share) for share in shares])
    return {name: array.astype(dtype) for name, array in as_arrays(a, b, site).items()}


def _keys(key: jax.Array, site: Site) -> jax.Array:
    # Layers in a stack draw what they would draw one by one.
    layers = layer_paths(site.path)
    if layers is None:
        own = fold_in_name(key, site.path)
        return jax.random.split(own, site.stack) if site.stack else own
    own, inner = jnp.stack([fold_in_name(key, path) for path in layers]), site.stack[1:]
    return jax.vmap(lambda key: jax.random.split(key, inner))(own) if inner else own


def _factors(parts: list[_Part], recipe: _Recipe, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(a, b) of one module that is in no stack, of the new rank."""
    if recipe.kind in ("cat", "svd"):
        a = jnp.concatenate([part.a * (part.weight * part.scaling) for part in parts])
        b = jnp.concatenate([part.b for part in parts], axis=1)
        if recipe.kind == "svd":
            a, b = _clamped(*truncated(*product_svd(a, b), recipe.rank), recipe.clamp)
    elif recipe.kind.endswith("svd"):
        changes = [(part.b @ part.a) * part.scaling for part in parts]
        change = recipe.rule(changes, jnp.stack([part.weight for part in parts]), key)
        u, s, vh = jnp.linalg.svd(change, full_matrices=False)
        a, b = _clamped(*truncated(u, s, vh, recipe.rank), recipe.clamp)
    else:
        both = jnp.stack([part.weight * part.scaling for part in parts])
        root, key_a, key_b = jnp.sqrt(jnp.abs(both)), *jax.random.split(key)
        # The sign on one side only: on both it would cancel.
        a = recipe.rule([part.a for part in parts], jnp.where(both >= 0, root, -root), key_a)
        b = recipe.rule([part.b for part in parts], root, key_b)
    return padded(a, b, recipe.rank)


def _clamped(a: jax.Array, b: jax.Array, clamp: float | None) -> tuple[jax.Array, jax.Array]:
    if clamp is None:
        return a, b
    high = jnp.quantile(jnp.concatenate([b.ravel(), a.ravel()]), clamp)
    return jnp.clip(a, -high, high), jnp.clip(b, -high, high)


def _new_config(parts: Mapping[str, Adapter], rank: int) -> TunerConfig:
    configs: list[Any] = [adapter.config for adapter in parts.values()]
    saved = tuple(dict.fromkeys(name for config in configs for name in config.modules_to_save or ()))
    return dataclasses.replace(
        configs[0],
        r=rank,
        lora_alpha=rank,
        rank_pattern={},
        alpha_pattern={},
        # Both would change what the finished factors mean, or whether they can be loaded.
        use_rslora=False,
        init_lora_weights=True,
        modules_to_save=saved or None,
        target_modules=_united_targets([config.target_modules for config in configs]),
    )


def _united_targets(targets: list[Any]) -> Any:
    if len(set(targets)) == 1:
        return targets[0]
    if all(isinstance(each, tuple) for each in targets):
        return tuple(dict.fromkeys(name for names in targets for name in names))
    if all(isinstance(each, str) and each.lower() != ALL_LINEAR for each in targets):
        return "|".join(f"({regex})" for regex in targets)
    return None  # no config of PEFT's says both; the modules are named one by one
