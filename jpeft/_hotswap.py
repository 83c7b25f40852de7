"""Another adapter in the place of one, without another compilation.

Compiled functions know an adapter by its config, its modules and the shapes of its arrays. A swap keeps those of the
slot: a lower rank is filled up with zeros, a module that is left out becomes zeros, and the scaling is an array anyhow.
What the slot's config says then is an upper bound; `trimmed` works out from the arrays what is really there.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from ._contract import Method, Site, method_of, wider
from ._mixed import MixedConfig
from ._params import Adapter, PeftParams, Sites, is_peft_params
from ._patterns import matches, value_for
from ._ranks import check_zeros_are_nothing, padded
from ._stacks import layer_paths
from ._wrap import checked_names, checked_params

# Fields that say where an adapter comes from, how it began, and what its arrays show. All others are mathematics.
_SHOWN_BY_ARRAYS = frozenset({
    "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules", "exclude_modules",
    "layers_to_transform", "layers_pattern", "target_parameters",
})  # fmt: skip
_WITHOUT_EFFECT = frozenset({
    "task_type", "base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "peft_version", "extra",
    "init_lora_weights", "loftq_config", "corda_config", "eva_config", "lora_ga_config", "fan_in_fan_out",
})  # fmt: skip
_RANKED = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")


def hotswap(wrapped: PeftParams, name: str, new: PeftParams | Adapter) -> PeftParams:
    """The same parameters with the values of another adapter in those of adapter `name`; jitted functions stay.

    new: an adapter, or parameters with exactly one. It may have another scaling, lower ranks (zeros fill them up) and
    fewer modules (the others become zeros). The config stays the slot's; `trimmed` gives the one that the arrays have,
    which `save_pretrained` asks for where they differ. Make room beforehand with `prepare_for_hotswap`.
    Raises ValueError, and changes nothing, for higher ranks, other modules, a wider dtype, other full copies, and
    settings that change the mathematics, such as dropout or DoRA.

    >>> import jax, jax.numpy as jnp, jpeft
    >>> params = {"query": {"kernel": jnp.ones((4, 6))}}
    >>> make = lambda r: jpeft.wrap(params, jpeft.LoraConfig(r=r, lora_alpha=2, target_modules=["query"]))
    >>> apply, slot = jax.jit(jpeft.lift(lambda params, x: x @ params["query"]["kernel"])), make(4)
    >>> _ = apply(slot, jnp.ones((1, 4))), apply(jpeft.hotswap(slot, "default", make(2)), jnp.ones((1, 4)))
    >>> apply._cache_size()
    1
    """
    (name,) = checked_names(checked_params(wrapped), name)
    slot, given = wrapped.adapters[name], _one_adapter(new)
    what = f"hot-swapping adapter {name!r}"
    check_zeros_are_nothing(name, slot, what)
    _check_config(what, slot, given)
    check_zeros_are_nothing("new", given, what)
    _check_modules(what, slot, given)
    weights = {
        path: {
            key: _put(what, f"{path}.{key}", array, given.weights.get(path, {}).get(key)) for key, array in own.items()
        }
        for path, own in slot.weights.items()
    }
    replaced = {path: _put(what, path, copy, given.replaced[path]) for path, copy in slot.replaced.items()}
    scaling = {path: _put(what, path, array, given.scaling.get(path)) for path, array in slot.scaling.items()}
    rows = jax.tree.map(lambda old, own: _put(what, "rows", old, own), slot.rows, given.rows)
    swapped = dataclasses.replace(slot, weights=weights, replaced=replaced, scaling=scaling, rows=rows)
    return dataclasses.replace(wrapped, adapters={**wrapped.adapters, name: swapped})


def prepare_for_hotswap(wrapped: PeftParams, name: str, *, rank: int) -> PeftParams:
    """The same parameters with room in adapter `name` for adapters of up to `rank`; it computes what it did.

    Every module gets that rank, filled up with zeros, and the config says so, with the alpha that keeps the scaling.
    Do this before functions are compiled. Raises ValueError if a module has a higher rank already, or the method has
    no rank.

    >>> import jax.numpy as jnp, jpeft
    >>> wrapped = jpeft.wrap({"q": {"kernel": jnp.ones((4, 6))}}, jpeft.LoraConfig(r=2, target_modules=["q"]))
    >>> adapter = prepare_for_hotswap(wrapped, "default", rank=8).adapters["default"]
    >>> adapter.weights["q"]["lora_A"].shape, adapter.config.r, adapter.config.lora_alpha
    ((8, 4), 8, 32.0)
    """
    (name,) = checked_names(checked_params(wrapped), name)
    adapter = wrapped.adapters[name]
    what = f"making room in adapter {name!r}"
    check_zeros_are_nothing(name, adapter, what)
    _check_ranked(name, adapter)
    too_high = {path: own for path in adapter.sites if (own := _rank(adapter, path)) > rank}
    if too_high:
        raise ValueError(f"{what}: rank is {rank}, but the ranks {too_high} are higher; expected at least those")
    weights = {
        path: {key: padded(array, _at_rank(adapter, path, key, rank)) for key, array in own.items()}
        for path, own in adapter.weights.items()
    }
    ranked = dataclasses.replace(adapter, weights=weights)
    ranked = dataclasses.replace(ranked, config=_described(ranked, dict.fromkeys(adapter.sites, rank)))
    return dataclasses.replace(wrapped, adapters={**wrapped.adapters, name: ranked})


def trimmed(wrapped: PeftParams, name: str) -> PeftParams:
    """The same parameters with adapter `name` as its arrays are: no zeros beyond its ranks, and a config that says so.

    Ranks, alphas and modules are worked out from the values, module by module; modules of zeros alone are left out.
    It computes the same, in other shapes, and can be saved. Raises ValueError if the method has no rank, and for
    arrays without values.

    >>> import jax.numpy as jnp, jpeft
    >>> params = {"query": {"kernel": jnp.ones((4, 6))}}
    >>> make = lambda r: jpeft.wrap(params, jpeft.LoraConfig(r=r, lora_alpha=6, target_modules=["query"]))
    >>> config = trimmed(jpeft.hotswap(make(4), "default", make(3)), "default").adapters["default"].config
    >>> config.r, config.lora_alpha
    (3, 6.0)
    """
    (name,) = checked_names(checked_params(wrapped), name)
    adapter = wrapped.adapters[name]
    check_zeros_are_nothing(name, adapter, f"trimming adapter {name!r}")
    _check_ranked(name, adapter)
    if not _has_values((adapter.weights, adapter.scaling)):
        raise ValueError(f"trimming adapter {name!r} looks at values, but it is abstract; call it outside jit")
    ranks = {path: _used_rank(adapter, path) for path in adapter.sites}
    kept = [path for path, rank in ranks.items() if rank] or list(ranks)
    # A name in target_modules means all paths that end in it.
    kept = [path for path in ranks if path in kept or matches(path, kept)]
    ranks = {path: max(1, ranks[path]) for path in kept}
    weights = {
        path: {key: array[_corner(_at_rank(adapter, path, key, ranks[path]))] for key, array in own.items()}
        for path, own in adapter.weights.items()
        if path in ranks
    }
    config = adapter.config
    if len(kept) < len(adapter.sites):
        single = tuple(layer for path in kept for layer in layer_paths(path) or [path])
        none = {"exclude_modules": None, "layers_to_transform": None, "layers_pattern": None}
        config = dataclasses.replace(config, target_modules=single, **none)  # type: ignore[call-arg]
    own = dataclasses.replace(
        adapter,
        weights=weights,
        scaling={path: adapter.scaling[path] for path in kept},
        config=config,
        sites=Sites({path: adapter.sites[path] for path in kept}),
    )
    own = dataclasses.replace(own, config=_described(own, ranks))
    return dataclasses.replace(wrapped, adapters={**wrapped.adapters, name: own})


def check_says_its_scaling(name: str, adapter: Adapter) -> None:
    """Raise ValueError if a file of this adapter, which holds its config and not its scaling, would be another one."""
    method = method_of(adapter.config)
    if isinstance(adapter.config, MixedConfig):
        raise ValueError("a mixture of adapters has no file of its own; expected jpeft.unmixed(...) of the parameters")
    if not _has_values(adapter.scaling):
        return
    for path, site in adapter.sites.items():
        said, array = method.scaling(site, adapter.config), np.asarray(adapter.scaling[path])
        if not np.allclose(array, said, rtol=1e-6, atol=0.0):
            raise ValueError(
                f"adapter {name!r} scales {path!r} by {array.reshape(-1)[0]}, but its config by {said}, as after "
                "jpeft.hotswap; expected jpeft.trimmed(wrapped, name), whose config is that of the arrays"
            )


def _one_adapter(new: Any) -> Adapter:
    if isinstance(new, Adapter):
        return new
    if not is_peft_params(new) or len(new.adapters) != 1:
        found = f"parameters with the adapters {list(new.adapters)}" if is_peft_params(new) else type(new).__name__
        raise ValueError(f"new is {found}; expected an Adapter, or PeftParams with exactly one")
    return next(iter(new.adapters.values()))


def _check_config(what: str, slot: Adapter, new: Adapter) -> None:
    if type(slot.config) is not type(new.config):
        raise ValueError(f"{what}: it is a {type(slot.config).__name__}, the new one a {type(new.config).__name__}")
    fields = {field.name for field in dataclasses.fields(slot.config)} - _SHOWN_BY_ARRAYS - _WITHOUT_EFFECT
    other = [name for name in sorted(fields) if getattr(slot.config, name) != getattr(new.config, name)]
    if other or method_of(slot.config) is not method_of(new.config):
        given = ", ".join(f"{n}={getattr(new.config, n)!r} instead of {getattr(slot.config, n)!r}" for n in other)
        raise ValueError(
            f"{what}: the new one computes something else, by {given or 'another variant of its method'}; expected the "
            "slot's settings: load it as another adapter instead"
        )


def _check_modules(what: str, slot: Adapter, new: Adapter) -> None:
    unknown = [path for path, site in new.sites.items() if slot.sites.get(path) != site]
    if unknown:
        raise ValueError(
            f"{what}: the new one acts on {', '.join(unknown[:5])}{' and more' if len(unknown) > 5 else ''}, which the "
            "slot does not have; expected modules among the slot's: begin with the adapter that has the most"
        )
    if jax.tree.structure(new.rows) != jax.tree.structure(slot.rows):
        raise ValueError(f"{what}: the two train other rows of tables; expected the same trainable_token_indices")
    if set(new.replaced) != set(slot.replaced):
        raise ValueError(
            f"{what}: the new one replaces {sorted(new.replaced)}, the slot {sorted(slot.replaced)}; expected the same "
            "leaves, as nothing stands for a copy that is not there"
        )


def _put(what: str, path: str, slot: Any, new: Any) -> Any:
    """The new array, or zeros, in the shape, dtype and place of the slot's."""
    if new is None:
        new = (
            jax.ShapeDtypeStruct(slot.shape, slot.dtype) if not _has_values(slot) else jnp.zeros(slot.shape, slot.dtype)
        )
    fits = len(new.shape) == len(slot.shape) and all(n <= s for n, s in zip(new.shape, slot.shape, strict=True))
    if not fits:
        raise ValueError(
            f"{what}: {path!r} has the shape {tuple(new.shape)}, the slot's {tuple(slot.shape)}; expected at most that "
            "rank: make room with jpeft.prepare_for_hotswap(wrapped, name, rank=...) before compiling"
        )
    if new.dtype != slot.dtype and wider(new.dtype, slot.dtype) != slot.dtype:
        raise ValueError(f"{what}: {path!r} is {new.dtype}, the slot's {slot.dtype}; expected a dtype no wider")
    if isinstance(new, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(slot.shape, slot.dtype)
    same = isinstance(new, jax.Array) and new.dtype == slot.dtype
    array = padded(new if same else jnp.asarray(new).astype(slot.dtype), tuple(slot.shape))
    placed = isinstance(slot, jax.Array) and not isinstance(slot, Tracer) and slot.committed
    return jax.device_put(array, slot.sharding) if placed else array


def _has_values(tree: Any) -> bool:
    return not any(isinstance(leaf, (Tracer, jax.ShapeDtypeStruct)) for leaf in jax.tree.leaves(tree))


def _check_ranked(name: str, adapter: Adapter) -> None:
    absent = [field for field in _RANKED if not hasattr(adapter.config, field)]
    if absent:
        raise ValueError(
            f"adapter {name!r}: {type(adapter.config).__name__} has no {', '.join(absent)}; expected a method with a "
            "rank, such as LoRA"
        )


@functools.lru_cache
def _shapes(method: Method, config: Any, site: Site, rank: int) -> Mapping[str, tuple[int, ...]]:
    key = jax.eval_shape(lambda: jax.random.key(0))
    own = dataclasses.replace(config, r=rank, rank_pattern={})

    def init(key: jax.Array) -> dict[str, jax.Array]:
        assert method.init is not None
        return method.init(key, site, own, lambda: jnp.zeros((site.in_features, *site.window, site.out_features)))

    return {name: tuple(array.shape) for name, array in jax.eval_shape(init, key).items()}


def _rank_axis(adapter: Adapter, path: str, key: str) -> int:
    """The axis of an array, counted from its end, that is as long as the rank is."""
    site = dataclasses.replace(adapter.sites[path], path="", leaf="", bias=None)
    config = dataclasses.replace(adapter.config, init_lora_weights=True, rank_pattern={}, alpha_pattern={})
    low, high = (_shapes(method_of(adapter.config), config, site, rank)[key] for rank in (2, 4))
    return next(axis - len(low) for axis, sizes in enumerate(zip(low, high, strict=True)) if sizes[0] != sizes[1])


def _rank(adapter: Adapter, path: str) -> int:
    key = next(iter(adapter.weights[path]))
    return adapter.weights[path][key].shape[_rank_axis(adapter, path, key)]


def _at_rank(adapter: Adapter, path: str, key: str, rank: int) -> tuple[int, ...]:
    shape, axis = list(adapter.weights[path][key].shape), _rank_axis(adapter, path, key)
    shape[axis] = rank
    return tuple(shape)


def _corner(shape: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(0, size) for size in shape)


def _used_rank(adapter: Adapter, path: str) -> int:
    """The rank without what at the end is zero in both factors, in all layers of a stack."""
    used = np.zeros(_rank(adapter, path), bool)
    for key, array in adapter.weights[path].items():
        rows = np.moveaxis(np.asarray(array), _rank_axis(adapter, path, key), 0)
        used |= np.any(rows.reshape(rows.shape[0], -1) != 0, axis=1)
    return int(used.nonzero()[0].max(initial=-1)) + 1


def _described(adapter: Adapter, ranks: Mapping[str, int]) -> Any:
    """The config with ranks and alphas that give the ranks named and the adapter's scaling."""
    config: Any = adapter.config
    if not _has_values(adapter.scaling):
        method = method_of(config)
        scalings = {path: float(method.scaling(site, config)) for path, site in adapter.sites.items()}
    else:
        scalings = {path: _one_scaling(path, adapter.scaling[path]) for path in adapter.sites}
    alphas = {path: _alpha(scalings[path], rank, config.use_rslora) for path, rank in ranks.items()}
    rank, rank_pattern = _common(ranks)
    alpha, alpha_pattern = _common(alphas)
    return dataclasses.replace(config, r=rank, rank_pattern=rank_pattern, lora_alpha=alpha, alpha_pattern=alpha_pattern)


def _one_scaling(path: str, scaling: Any) -> float:
    values = np.unique(np.asarray(scaling))
    if len(values) != 1:
        raise ValueError(f"the layers of {path!r} have the scalings {values.tolist()}; expected one for a stack")
    return float(values[0])


def _alpha(scaling: float, rank: int, rslora: bool) -> float:
    divisor = math.sqrt(rank) if rslora else rank
    # The scaling is known in float32: of the alphas that give it, the roundest.
    for digits in range(0, 12):
        alpha = round(scaling * divisor, digits)
        if np.float32(alpha / divisor) == np.float32(scaling):
            return alpha
    return scaling * divisor


def _common(values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The value that most modules have, and a pattern that gives the others theirs."""
    counts = list(values.values())
    default = max(dict.fromkeys(counts), key=counts.count)
    spelled = {layer: value for path, value in values.items() for layer in layer_paths(path) or [path]}
    longest_first = sorted(spelled, key=len, reverse=True)
    pattern = {re.escape(path): spelled[path] for path in longest_first if spelled[path] != default}
    if any(value_for(path, pattern, default) != value for path, value in spelled.items()):
        # The path of one module ends as that of another does.
        pattern = {re.escape(path): spelled[path] for path in longest_first}
    return default, pattern
