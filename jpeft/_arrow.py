"""Arrow's router, made of adapters that are there already: `create_arrow_adapter`."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ._config import PeftType
from ._contract import LINEAR, Site, config_class, wide_dtype
from ._low_rank import is_plain_lora, padded
from ._params import Adapter, PeftParams
from ._retarget import selecting
from ._wrap import check_name, checked_names, checked_params

Weights = dict[str, dict[str, Any]]
# The factors and the scaling of one adapter at one module.
Part = tuple[jax.Array, jax.Array, Any]


def create_arrow_adapter(
    wrapped: PeftParams,
    adapter_names: Sequence[str],
    config: Any,
    general_adapter_names: Sequence[str] = (),
    adapter_name: str = "arrow_router",
) -> PeftParams:
    """The same parameters with a router more, which sends each token to those of its LoRA adapters that fit it best.

    adapter_names: of the adapters to choose from, in the order of the router's arrays. config: how it chooses; its
    lists of names are filled in. general_adapter_names: with `use_gks`, adapters of general knowledge; their mean, of A
    and of B each by itself, is subtracted from the factors of the others (GenKnowSub).
    The router waits for `set_adapter`. It holds copies of what the adapters are now: make it anew after training
    them, and delete them if they are not needed by themselves. Ranks may differ, but not with general adapters.
    Nothing of it trains, gradients pass through it, and it cannot be merged. Works on abstract trees too.
    Raises TypeError for another config and for adapters that are not plain LoRA of linear layers, and ValueError for
    unknown names and a taken one, fewer adapters than top_k, general adapters without `use_gks` or the other way
    round, adapters of other modules or that train more than their factors, and ranks that do not fit.
    Of https://arxiv.org/abs/2405.11157 and https://arxiv.org/abs/2505.10939; the numbers are those of PEFT's
    `create_arrow_model`, with exact singular vectors in place of 15 steps of an iteration from a random start.

    >>> import jpeft
    >>> config = jpeft.LoraConfig(r=2, target_modules=["query"], init_lora_weights=False)
    >>> wrapped = jpeft.wrap({"query": {"kernel": jnp.ones((4, 6))}}, config, adapter_name="law")
    >>> wrapped = jpeft.wrap(wrapped, config, adapter_name="poems", rng=jax.random.key(1))
    >>> wrapped = create_arrow_adapter(wrapped, ["law", "poems"], jpeft.ArrowConfig(top_k=1))
    >>> wrapped.adapters["arrow_router"].weights["query"]["arrow_prototypes"].shape
    (2, 4)
    """
    names = checked_names(checked_params(wrapped), adapter_names)
    check_name(adapter_name, wrapped.adapters)
    first = wrapped.adapters[names[0]]
    given: Any = first.config
    abstract = any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(first.weights))
    _check_adapters(wrapped, names, first.sites)
    rank = max(_rank(wrapped.adapters[name], path) for name in names for path in first.sites)

    def unused(path: str, site: Site) -> dict[str, Any]:
        dtype = jax.tree.leaves(first.weights[path])[0].dtype
        shapes = {"lora_A": (rank, site.in_features), "lora_B": (site.out_features, rank)}
        make = jax.ShapeDtypeStruct if abstract else jnp.zeros
        return {name: make((*site.stack, *shape), dtype) for name, shape in shapes.items()}

    lora: Any = config_class(PeftType.LORA)
    own = lora(
        r=rank,
        target_modules=given.target_modules,
        exclude_modules=given.exclude_modules,
        layers_to_transform=given.layers_to_transform,
        layers_pattern=given.layers_pattern,
        layer_replication=given.layer_replication,
        task_type=given.task_type,
        base_model_name_or_path=given.base_model_name_or_path,
        revision=given.revision,
        arrow_config=config,
    )
    settings = own.arrow_config
    if settings is None:
        raise TypeError("config is None; expected a jpeft.ArrowConfig")
    general = (general_adapter_names,) if isinstance(general_adapter_names, str) else tuple(general_adapter_names)
    named = dataclasses.replace(settings, task_adapter_names=names, gks_adapter_names=general)
    make = jax.ShapeDtypeStruct if abstract else jnp.ones
    adapter = Adapter(
        weights={path: unused(path, site) for path, site in first.sites.items()},
        shared={},
        replaced={},
        scaling={path: make(site.stack, jnp.float32) for path, site in first.sites.items()},
        config=selecting(own, first.sites, wrapped),
        sites=first.sites,
    )
    return dataclasses.replace(
        wrapped, adapters={**wrapped.adapters, adapter_name: with_routes(wrapped, adapter, named)}
    )


def with_routes(wrapped: PeftParams, adapter: Adapter, config: Any) -> Adapter:
    """A plain LoRA adapter made a router among the adapters that the config names, at the modules that it acts on.

    Raises TypeError and ValueError as `create_arrow_adapter`.
    """
    own: Any = adapter.config
    names, general = config.task_adapter_names or (), config.gks_adapter_names or ()
    absent = [name for name in (*names, *general) if name not in wrapped.adapters]
    if absent or not names:
        raise ValueError(
            f"the router chooses among the adapters {[*names, *general]}, but the parameters have "
            f"{list(wrapped.adapters)}; expected all of them, under these names, before the router"
        )
    if config.use_gks != bool(general):
        raise ValueError(
            f"use_gks is {config.use_gks} and general_adapter_names is {list(general)}; expected general adapters, "
            "with use_gks=True, or none, with use_gks=False"
        )
    if config.top_k > len(names):
        raise ValueError(
            f"top_k is {config.top_k}, but there are {len(names)} adapters: {list(names)}; expected no more"
        )
    _check_adapters(wrapped, (*names, *general), adapter.sites)
    chosen, subtracted = ([wrapped.adapters[name] for name in group] for group in (names, general))
    for path in adapter.sites if general else ():
        ranks = {name: _rank(wrapped.adapters[name], path) for name in (*names, *general)}
        if len(set(ranks.values())) > 1:
            raise ValueError(
                f"general knowledge is subtracted factor by factor, but at {path!r} the ranks are {ranks}; expected "
                "adapters of one rank"
            )
    parts = {path: ([_part(a, path) for a in chosen], [_part(a, path) for a in subtracted]) for path in adapter.sites}
    build = functools.partial(_routes, sites=adapter.sites)
    abstract = any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(parts))
    routes = jax.eval_shape(build, parts) if abstract else build(parts)
    return dataclasses.replace(
        adapter,
        weights={path: {**arrays, **routes[path]} for path, arrays in adapter.weights.items()},
        scaling={path: jnp.ones_like(array) if not abstract else array for path, array in adapter.scaling.items()},
        config=dataclasses.replace(own, arrow_config=config),
    )


def _check_adapters(wrapped: PeftParams, names: Sequence[str], sites: Mapping[str, Site]) -> None:
    for name in names:
        adapter = wrapped.adapters[name]
        check_choosable(name, adapter)
        if adapter.sites != sites:
            other = sorted({*adapter.sites.items()} ^ {*sites.items()}, key=str)[0][0]
            raise ValueError(
                f"adapter {name!r} does not act on the router's modules, {other!r} for one; expected all adapters on "
                "the same modules, of the same layouts"
            )


def check_choosable(name: str, adapter: Adapter) -> None:
    """Raise TypeError or ValueError for an adapter that a router cannot choose for single tokens."""
    if not is_plain_lora(adapter.config) or getattr(adapter.config, "target_parameters", None):
        raise TypeError(
            f"adapter {name!r} has {adapter.config!r}; expected plain LoRA of modules, which a router can choose: "
            "jpeft.convert_to_lora makes it of others"
        )
    odd = [f"{path!r} is a {site.kind}" for path, site in adapter.sites.items() if site.kind != LINEAR]
    if odd:
        raise TypeError(f"adapter {name!r}: {', '.join(odd)}; expected adapters of linear layers alone")
    if rest := [*adapter.replaced, *adapter.rows]:
        raise ValueError(
            f"adapter {name!r} trains {', '.join(rest)} besides its factors, which a router cannot choose for each "
            "token; expected adapters without modules_to_save, bias and trainable_token_indices"
        )


def _rank(adapter: Adapter, path: str) -> int:
    return adapter.weights[path]["lora_A"].shape[-2]


def _part(adapter: Adapter, path: str) -> Part:
    return adapter.weights[path]["lora_A"], adapter.weights[path]["lora_B"], adapter.scaling[path]


def _routes(parts: Mapping[str, tuple[list[Part], list[Part]]], sites: Mapping[str, Site]) -> Weights:
    routes = {path: _stacked(*groups, sites[path]) for path, groups in parts.items()}
    # Layers of one shape go through one compiled program, all at once.
    alike: dict[Any, list[str]] = {}
    for path, arrays in routes.items():
        alike.setdefault(tuple((array.shape, array.dtype) for array in arrays.values()), []).append(path)
    for paths in alike.values():
        a, b = (jnp.stack([routes[path][name] for path in paths]) for name in ("arrow_A", "arrow_B"))
        for path, prototypes in zip(paths, top_right_singular_vectors(a, b), strict=True):
            routes[path]["arrow_prototypes"] = prototypes
    return routes


def _stacked(chosen: list[Part], subtracted: list[Part], site: Site) -> dict[str, jax.Array]:
    """The adapters' arrays at one module one behind the other, after the site's own stack axes."""
    axis, rank = len(site.stack), max(a.shape[-2] for a, _, _ in chosen)
    dtypes = [array.dtype for a, b, _ in (*chosen, *subtracted) for array in (a, b)]
    dtype = max(dtypes, key=lambda dtype: jnp.finfo(dtype).bits)
    own, general = (
        [padded(a.astype(dtype), b.astype(dtype), rank) for a, b, _ in group] for group in (chosen, subtracted)
    )
    a, b = (jnp.stack(factors, axis) for factors in zip(*own, strict=True))
    if general:
        a, b = (
            factors - jnp.stack(means, axis).mean(axis, keepdims=True)
            for factors, means in zip((a, b), zip(*general, strict=True), strict=True)
        )
    return {"arrow_A": a, "arrow_B": b, "arrow_scaling": jnp.stack([scaling for _, _, scaling in chosen], axis)}


@jax.jit
def top_right_singular_vectors(a: jax.Array, b: jax.Array) -> jax.Array:
    """The unit vector (..., in) that b a stretches most, zero if that is zero; a (..., r, in), b (..., out, r).

    b a is not built: q_a, q_b being orthonormal, b a = q_b (r_b r_aᵀ) q_aᵀ has the core's singular values.

    >>> v = top_right_singular_vectors(jnp.array([[3.0, 4.0, 0.0]]), jnp.array([[2.0], [0.0]]))
    >>> [round(abs(float(entry)), 3) for entry in v]
    [0.6, 0.8, 0.0]
    """
    wide = wide_dtype(a.dtype)
    with jax.default_matmul_precision("highest"):
        q_a, r_a = jnp.linalg.qr(jnp.swapaxes(a.astype(wide), -1, -2))
        r_b = jnp.linalg.qr(b.astype(wide), mode="r")
        _, values, vectors = jnp.linalg.svd(r_b @ jnp.swapaxes(r_a, -1, -2), full_matrices=False)
        first = jnp.einsum("...ik,...k->...i", q_a, vectors[..., 0, :])
    return jnp.where(values[..., :1] > 0, first, 0).astype(a.dtype)
