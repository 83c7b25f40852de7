"""Adapters beside a parameter tree: put there, chosen among and taken off again."""

import dataclasses
import functools
import math
import re
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ._arrays import initial_together, with_derivation
from ._begin import Tree, begun
from ._config import PeftConfig
from ._contract import Method, Site, method_of
from ._params import Adapter, PeftParams, Sites, is_peft_params
from ._parts import as_they_are, leaves_in_full, rows_of, with_named_targets
from ._paths import fold_in_name, leaves_by_path
from ._quantized import as_dense, is_abstract, is_quantized, taken
from ._sites import bias_layout, bias_sizes, candidates, canonical, checked_weight
from ._stacks import layer_sites, restacked, stacked_site, unstacked
from ._targets import bias_leaves, by_layer, saved_leaves, select_sites
from ._tokens import check_overlap, check_tables, initial_rows, token_sites


def wrap(
    params: Any,
    config: PeftConfig,
    *,
    rng: jax.Array | None = None,
    adapter_name: str = "default",
    layouts: Mapping[str, str] | None = None,
    dtype: Any = jnp.float32,
) -> PeftParams:
    """Parameters with a new adapter beside them; the parameters themselves are kept by reference, never copied.

    params: a tree of arrays or of `jax.ShapeDtypeStruct`s (then the adapter is abstract too), or what `wrap` returned,
    to add another adapter. The first adapter is active, later ones wait for `set_adapter`.
    rng: key of the initial values (default: seed 0); a module's values depend on it and on the module's path alone.
    layouts: {leaf or module path, or regular expression: layout}, one letter an axis: i input, o output, v vocabulary
    of a lookup table, '.' window of a convolution, b stack (layers, experts, fused parts). Kernels of two axes are
    "io" unless told otherwise. dtype: of the adapter's floating-point arrays, each of shape (*stack, ...).
    A module named as a slice of numbers is a stack of layers: `layers.0:12.query.kernel` of shape (12, in, out) is
    `layers.0.query.kernel` and so on, which the config's names, patterns and layers mean; it gets the values that the
    layers would get one by one.
    Raises TypeError if `config` is of no known method or `rng` is not a key, and ValueError if no module is selected,
    or some layers of a stack and not the others, a layout is unknown, the tree is empty or the name is taken.

    >>> import jax, jax.numpy as jnp, jpeft
    >>> params = {"query": {"kernel": jnp.ones((4, 6))}, "head": {"kernel": jnp.ones((6, 2))}}
    >>> wrapped = wrap(params, jpeft.LoraConfig(r=2, target_modules=["query"]), rng=jax.random.key(0))
    >>> wrapped.base is params, jax.tree.map(jnp.shape, wrapped.adapters["default"].weights)
    (True, {'query': {'lora_A': (2, 4), 'lora_B': (6, 2)}})
    """
    config = by_layer(_checked_config(config))
    method = method_of(config)
    wrapped = params if is_peft_params(params) else PeftParams(base=params, adapters={}, active=())
    check_name(adapter_name, wrapped.adapters)
    _check_bias(config, wrapped.adapters)
    key, dtype = checked_key(rng), _checked_dtype(dtype)
    leaves = leaves_by_path(wrapped.base)
    if not leaves:
        raise ValueError("the parameter tree has no leaves; expected a tree of arrays, such as a model's parameters")
    layers = unstacked(leaves)
    found = candidates(layers, layouts)
    config = with_named_targets(config, method, layers, found)
    selected = select_sites(layers, found, config, method) if method.selects else {}
    trained = [*saved_leaves(layers, found, config), *bias_leaves(layers, selected, config)]
    trained += leaves_in_full(layers, found, config) if method.in_full else []
    sites = _stacked_sites(selected, layers, config)
    trained = restacked(dict.fromkeys(trained), layers, _said(config, *_WHOLE[method.in_full], verb="would train"))
    replaced = {path: _copy(path, leaves[path]) for path in trained if _is_array(leaves[path])}

    tokens = rows_of(method, layers, found, config) or token_sites(found, config)
    check_tables(tokens, sites, replaced)

    abstract = any(map(is_abstract, leaves.values()))
    if method.begin is not None:
        adapter = begun(fold_in_name(key, method.config.__name__), Tree(leaves, layers, found), config, dtype, abstract)
    else:
        begin = abstract_adapter if abstract else initial_adapter
        adapter = begin(key, _read_leaves(sites, leaves, method), Sites(sites), config, dtype)
    adapter = dataclasses.replace(
        adapter,
        replaced=replaced,
        rows={
            site.leaf: initial_rows(
                leaves[site.leaf], site, rows, dtype, None if as_they_are(method, config) else fold_in_name(key, path)
            )
            for path, (site, rows) in tokens.items()
        },
    )
    active = wrapped.active if wrapped.adapters else (adapter_name,)
    return dataclasses.replace(wrapped, adapters={**wrapped.adapters, adapter_name: adapter}, active=active)


_WHOLE = {False: ("modules_to_save", "bias"), True: ("target_modules", "modules_to_save", "bias")}


def unwrap(wrapped: PeftParams) -> Any:
    """The base tree, as it was given to `wrap`; raises TypeError if there is no adapter to take off.

    >>> import jax.numpy as jnp, jpeft
    >>> params = {"query": {"kernel": jnp.ones((4, 6))}}
    >>> unwrap(jpeft.wrap(params, jpeft.LoraConfig(target_modules=["query"]))) is params
    True
    """
    return checked_params(wrapped).base


def set_adapter(wrapped: PeftParams, names: str | Sequence[str]) -> PeftParams:
    """The same parameters with other adapters in use, applied in the order given.

    Raises ValueError for unknown or repeated names, for none at all, and for adapters that replace the same leaf.

    >>> import jax.numpy as jnp, jpeft
    >>> config = jpeft.LoraConfig(target_modules=["query"])
    >>> wrapped = jpeft.wrap({"query": {"kernel": jnp.ones((4, 6))}}, config)
    >>> wrapped = jpeft.wrap(wrapped, config, adapter_name="other")
    >>> wrapped.active, set_adapter(wrapped, "other").active
    (('default',), ('other',))
    """
    return dataclasses.replace(checked_params(wrapped), active=checked_names(wrapped, names))


def disable_adapters(wrapped: PeftParams) -> PeftParams:
    """The same parameters with no adapter in use: the base model, until `set_adapter`.

    Raises TypeError if `wrapped` does not come from `wrap`.

    >>> import jax.numpy as jnp, jpeft
    >>> wrapped = jpeft.wrap({"query": {"kernel": jnp.ones((4, 6))}}, jpeft.LoraConfig(target_modules=["query"]))
    >>> disable_adapters(wrapped).active
    ()
    """
    return dataclasses.replace(checked_params(wrapped), active=())


def _stacked_sites(selected: Mapping[str, Site], layers: Mapping[str, Any], config: Any) -> dict[str, Site]:
    said = _said(config, "target_modules", "exclude_modules", "modules_to_save", "layers_to_transform", verb="select")
    by_leaf = restacked({site.leaf: site for site in selected.values()}, layers, said)
    return {site.path: site for site in (stacked_site(leaf, sites) for leaf, sites in by_leaf.items())}


def _said(config: Any, *fields: str, verb: str) -> str:
    values = {field: getattr(config, field, None) for field in fields}
    return f"{', '.join(f'{k}={v!r}' for k, v in values.items() if v not in (None, (), 'none'))} {verb}"


def _read_leaves(sites: Mapping[str, Site], leaves: Mapping[str, Any], method: Method) -> dict[str, Any]:
    """{site path: what the method's arrays begin from}: the base leaf, or that and the bias or None."""
    if not method.reads_bias:
        return {path: leaves[site.leaf] for path, site in sites.items()}
    return {path: (leaves[site.leaf], None if site.bias is None else leaves[site.bias]) for path, site in sites.items()}


def initial_adapter(key: jax.Array, leaves: Mapping[str, Any], sites: Sites, config: Any, dtype: Any) -> Adapter:
    """A new adapter of these sites, without replaced leaves. leaves: {site path: the base leaf}, or that and a bias."""
    method = method_of(config)
    # First, as it refuses layers of a stack that a pattern treats differently.
    scaling = {path: jnp.full(site.stack, method.scaling(site, config), jnp.float32) for path, site in sites.items()}
    if method.together is not None:
        weights, shared = initial_together(method, key, sites, leaves, config)
    else:
        weights, shared = {}, {}
        for path, site in sites.items():
            weights[path] = _initial_layers(key, leaves[path], site, method, config, dtype)
    weights, shared = jax.tree.map(functools.partial(cast_floating, dtype=dtype), (weights, shared))
    return with_derivation(Adapter(weights, shared, {}, scaling, config, sites), leaves)


def abstract_adapter(key: jax.Array, leaves: Mapping[str, Any], sites: Sites, config: Any, dtype: Any) -> Adapter:
    """What `initial_adapter` gives, without values; one module stands for all that have arrays of the same shapes."""
    kinds = _kinds(sites, leaves, config)
    firsts: dict[Hashable, str] = {}
    for path, kind in kinds.items():
        firsts.setdefault(kind, path)
    own = Sites({path: sites[path] for path in firsts.values()})
    begin = functools.partial(initial_adapter, sites=own, config=config, dtype=dtype)
    adapter = jax.eval_shape(begin, key, {path: leaves[path] for path in own})
    return dataclasses.replace(
        adapter,
        weights={path: dict(adapter.weights[firsts[kind]]) for path, kind in kinds.items()},
        scaling={path: adapter.scaling[firsts[kind]] for path, kind in kinds.items()},
        sites=sites,
    )


def _kinds(sites: Sites, leaves: Mapping[str, Any], config: Any) -> dict[str, Hashable]:
    """{site path: what is equal for modules that differ in the number of their layer alone}."""
    patterns = [getattr(config, field.name) for field in dataclasses.fields(config) if field.name.endswith("_pattern")]
    method, patterned = method_of(config), any(isinstance(pattern, Mapping) and pattern for pattern in patterns)
    if method.together is not None or method.by_path or patterned:
        return {path: path for path in sites}
    return {
        path: (
            re.sub(r"(?<![^.])\d+(?![^.])", "#", path),
            (site.layout, site.shape, site.dtype, site.bias is None),
            getattr(leaves[path], "sharding", None),
        )
        for path, site in sites.items()
    }


def completed(adapter: Adapter, planned: Adapter, leaves: Mapping[str, Any], dtype: Any = jnp.float32) -> Adapter:
    """An adapter with the arrays that files do not hold made anew; abstract ones if the base is.

    planned: the same adapter with all of its arrays. leaves: {leaf path: array} of the base.
    """
    adapted = _read_leaves(adapter.sites, leaves, method_of(adapter.config))
    lacks = {path: arrays.keys() - adapter.weights[path].keys() for path, arrays in planned.weights.items()}
    lacks_shared = planned.shared.keys() - adapter.shared.keys()
    method = method_of(adapter.config)
    known = method.derived if method.derive is not None else frozenset()
    if not lacks_shared and not any(lacks.values()):
        return adapter

    def made_anew(leaves: Mapping[str, Any]) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
        fresh = initial_adapter(jax.random.key(0), leaves, adapter.sites, adapter.config, dtype)
        own = {path: {name: fresh.weights[path][name] for name in names - known} for path, names in lacks.items()}
        return own, {name: fresh.shared[name] for name in lacks_shared}

    abstract = is_abstract(adapted)
    # What many layers share may be large and made by numpy: a compiled program would hold it as a constant.
    made = made_anew if method.together is not None else jax.jit(made_anew)
    own, shared = {path: {} for path in lacks}, {}
    if lacks_shared or any(names - known for names in lacks.values()):
        own, shared = jax.eval_shape(made_anew, adapted) if abstract else made(adapted)
    weights = {path: {**arrays, **own[path]} for path, arrays in adapter.weights.items()}
    found = dataclasses.replace(adapter, weights=weights, shared={**adapter.shared, **shared})
    derived = functools.partial(with_derivation, lacking=lacks)
    return jax.eval_shape(derived, found, adapted) if abstract else derived(found, adapted)


def _initial_layers(
    key: jax.Array, leaf: Any, site: Site, method: Method, config: Any, dtype: Any
) -> dict[str, jax.Array]:
    layers = layer_sites(site)
    if layers is None:
        return _initial(fold_in_name(key, site.path), leaf, site, method, config, dtype)
    # One by one, so that stacked layers begin as single ones do, whatever the kind of key: vmap changes some draws.
    drawn = [
        _initial(fold_in_name(key, layer.path), leaf, layer, method, config, dtype, index)
        for index, layer in enumerate(layers)
    ]
    shapes = {layer.path: jax.tree.map(jnp.shape, arrays) for layer, arrays in zip(layers, drawn, strict=True)}
    if any(own != shapes[layers[0].path] for own in shapes.values()):
        raise ValueError(
            f"the layers of the stack {site.path!r} get different arrays: {shapes}. Layers stacked in one leaf are "
            "adapted alike: load the model with scan_layers=False, or write a config that treats them alike"
        )
    return {name: jnp.stack([arrays[name] for arrays in drawn]) for name in drawn[0]}


def _initial(
    key: jax.Array, leaf: Any, site: Site, method: Method, config: Any, dtype: Any, layer: int | None = None
) -> dict[str, jax.Array]:
    """The arrays of one site. layer: the index of the site's layer, if `leaf` is a stack of layers."""

    def one(key: jax.Array, index: Any) -> dict[str, jax.Array]:
        def single(leaf: Any, layout: str, sizes: tuple[int, ...]) -> jax.Array:
            if layer is not None:
                leaf = taken(leaf, layer) if is_quantized(leaf) else leaf[layer]
            whole = canonical(jnp.reshape(as_dense(leaf), sizes), layout)
            return whole.reshape(-1, *whole.shape[len(site.stack) :])[index] if site.stack else whole

        def weight() -> Any:
            if not method.reads_bias:
                return single(checked_weight(leaf, site), site.layout, site.shape)
            w, b = leaf
            return single(checked_weight(w, site), site.layout, site.shape), None if b is None else single(
                b, bias_layout(site), bias_sizes(site)
            )

        assert method.init is not None
        arrays = method.init(key, site, config, weight)
        return {name: cast_floating(array, dtype) for name, array in arrays.items()}

    if not site.stack:
        return one(key, None)
    count = math.prod(site.stack)
    arrays = jax.vmap(one)(jax.random.split(key, count), jnp.arange(count))
    return {name: array.reshape(*site.stack, *array.shape[1:]) for name, array in arrays.items()}


def cast_floating(array: jax.Array, dtype: Any) -> jax.Array:
    return array.astype(dtype) if array.dtype != dtype and jnp.issubdtype(array.dtype, jnp.inexact) else array


def _copy(path: str, leaf: Any) -> Any:
    if not jnp.issubdtype(leaf.dtype, jnp.inexact):
        raise ValueError(
            f"modules_to_save or bias would train {path!r}, whose dtype is {leaf.dtype}; expected a floating-point "
            "dtype: leave the module out, or give its parameters unquantised"
        )
    if is_quantized(leaf):
        return as_dense(leaf)
    # A real copy: the caller may donate both trees, and a buffer can be donated only once.
    return leaf if isinstance(leaf, jax.ShapeDtypeStruct) else jnp.array(leaf, copy=True)


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _is_array(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and not _is_key(leaf)


def checked_params(wrapped: Any) -> PeftParams:
    if not is_peft_params(wrapped):
        raise TypeError(f"expected the PeftParams that jpeft.wrap returns, not a {type(wrapped).__name__}")
    return wrapped


def _checked_config(config: Any) -> Any:
    if not isinstance(config, PeftConfig) or type(config) is PeftConfig:
        raise TypeError(f"config is {config!r}; expected the config of a method, such as jpeft.LoraConfig(...)")
    return config


def checked_names(wrapped: PeftParams, names: str | Sequence[str]) -> tuple[str, ...]:
    names = (names,) if isinstance(names, str) else tuple(names)
    unknown = [name for name in names if name not in wrapped.adapters]
    if unknown or not names:
        known = ", ".join(map(repr, wrapped.adapters))
        raise ValueError(f"adapter names are {list(names)}; expected at least one, all of them among: {known}")
    if len(set(names)) < len(names):
        raise ValueError(f"adapter names are {list(names)}; expected each of them once")
    owners: dict[str, str] = {}
    for name in names:
        for leaf in wrapped.adapters[name].replaced:
            if leaf in owners:
                raise ValueError(
                    f"adapters {owners[leaf]!r} and {name!r} both replace {leaf!r} in full; expected one of them"
                )
            owners[leaf] = name
    check_overlap({name: wrapped.adapters[name].rows for name in names})
    return names


def check_name(name: str, adapters: Mapping[str, Adapter]) -> None:
    if name in adapters:
        raise ValueError(f"there already is an adapter {name!r}; expected a name other than: {', '.join(adapters)}")
    if not isinstance(name, str) or not name or "." in name:
        raise ValueError(f"adapter_name is {name!r}; expected a name without dots")


def _check_bias(config: Any, adapters: Mapping[str, Adapter]) -> None:
    others = {name: getattr(adapter.config, "bias", "none") for name, adapter in adapters.items()}
    taken = [f"{name!r} has {bias!r}" for name, bias in others.items() if bias != "none"]
    if getattr(config, "bias", "none") != "none" and taken:
        raise ValueError(f"bias is {config.bias!r}, but {', '.join(taken)}; expected at most one adapter with biases")


def checked_key(rng: Any) -> jax.Array:
    if rng is None:
        return jax.random.key(0)
    if isinstance(rng, jax.Array) and (_is_key(rng) or (rng.dtype == jnp.uint32 and rng.ndim == 1)):
        return rng
    raise TypeError(f"rng is {type(rng).__name__} {rng!r}; expected a key from jax.random.key(seed)")


def _checked_dtype(dtype: Any) -> Any:
    if not jnp.issubdtype(jnp.dtype(dtype), jnp.inexact):
        raise ValueError(f"dtype is {jnp.dtype(dtype)}; expected a floating-point dtype, which can be trained")
    return jnp.dtype(dtype)
