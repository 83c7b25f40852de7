"""Adapters merged into the parameters: a tree like the base that needs no adapters any more."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from ._arrays import arrays_at, over_stack
from ._contract import Arrays, Merge, Site, is_quantised, merged as one_merged, method_of, not_merged, wide_dtype
from ._params import Adapter, PeftParams
from ._paths import leaves_by_path, map_leaves
from ._quantize import dequantize, requantised
from ._quantized import Quantized, as_dense, is_abstract, is_quantized
from ._sites import bias_layout, bias_sizes, canonical, restored
from ._tokens import row_method
from ._wrap import cast_floating, checked_names, checked_params


def merge(
    wrapped: PeftParams,
    *,
    adapter_names: str | Sequence[str] | None = None,
    safe: bool = False,
    requantize: bool = False,
) -> Any:
    """A tree like the base, of the same structure, shapes and dtypes, with adapters merged into its leaves.

    adapter_names: those to merge (default: the active ones). The arithmetic is in float32 or wider. safe: raise
    ValueError if a merged leaf is not finite (not under `jit`, where values are not known). An adapter of a lookup
    table acts on the lookup alone; where a model uses the table as its output layer too, its merged leaf changes both.
    Leaves of `jpeft.quantize` come out as the dense weights. requantize: keep their format; the merged weight is then
    rounded to it, an error as large as that of quantising the base, which may well be larger than the change.
    Raises ValueError for unknown names, for adapters that are no change of weights (prompts, prefixes), for a weight
    that is not of a floating-point dtype, and for `requantize` of a
    weight with zero points.

    >>> import jax.numpy as jnp, jpeft
    >>> params = {"query": {"kernel": jnp.ones((4, 6))}}
    >>> merged = merge(jpeft.wrap(params, jpeft.LoraConfig(target_modules=["query"])))
    >>> bool((merged["query"]["kernel"] == params["query"]["kernel"]).all())
    True
    """
    names = checked_params(wrapped).active if adapter_names is None else checked_names(wrapped, adapter_names)
    for name in names:
        if method_of(wrapped.adapters[name].config).begin is not None:
            raise ValueError(not_merged(f"adapter {name!r} of {type(wrapped.adapters[name].config).__name__}"))
    leaves = leaves_by_path(wrapped.base)
    changed: dict[str, Any] = {}
    for name in names:
        changed.update(wrapped.adapters[name].replaced)
    for adapter in (wrapped.adapters[name] for name in names):
        for path, site in adapter.sites.items():
            own = as_dense(leaves[site.leaf])
            weight = changed.get(site.leaf, own)
            bias = None if site.bias is None else changed.get(site.bias, leaves[site.bias])
            changed[site.leaf], merged_bias = merged_at(adapter, path, weight, bias, own)
            if site.bias is not None:
                changed[site.bias] = merged_bias
    for part in (part for name in names for part in wrapped.adapters[name].rows.values()):
        weight = changed.get(part.site.leaf, as_dense(leaves[part.site.leaf]))
        own, method = {"rows": part.values}, row_method(part.indices)
        changed[part.site.leaf], _ = _merged(own, frozenset(), weight, None, None, part.site, method.merge)
    for path, leaf in changed.items() if safe else ():
        _check_finite(path, leaf)

    def chosen(path: str, leaf: Any) -> Any:
        if not is_quantized(leaf):
            return _like(leaf, changed[path]) if path in changed else leaf
        if not requantize:
            return _like_codes(leaf, changed[path]) if path in changed else dequantize(leaf)
        return requantised(path, leaf, changed[path]) if path in changed else leaf

    return map_leaves(chosen, wrapped.base)


def merged_at(adapter: Adapter, path: str, weight: Any, bias: Any, own: Any) -> tuple[Any, Any]:
    """The weight and the bias of one module with an adapter in them. own: the base's weight, as methods ask for it."""
    p, alike = arrays_at(adapter, path)
    method = method_of(adapter.config)
    into = functools.partial(one_merged, method, adapter.config)
    return _merged(p, alike, weight, bias, own if method.needs_base else None, adapter.sites[path], into)


def _merged(
    p: Arrays, alike: frozenset[str], weight: Any, bias: Any, own: Any, site: Site, merge_into: Merge
) -> tuple[Any, Any]:
    """The merged weight and bias. own: the base's weight, if the method asks for it."""
    if is_quantised(weight.dtype):
        raise ValueError(
            f"cannot merge into {site.leaf!r}: its dtype is {weight.dtype}; expected a floating-point one of 16 bits "
            "or more, for an adapter acts on the dequantised weight"
        )
    dtype = jax.dtypes.canonicalize_dtype(weight.dtype)
    wide = wide_dtype(dtype)

    def compute(p: Arrays, weight: Any, bias: Any, own: Any) -> tuple[jax.Array, jax.Array | None]:
        p = p if own is None else {**p, "base": canonical(own, site.layout)}
        w = canonical(weight, site.layout).astype(wide)
        b = None if bias is None else canonical(jnp.reshape(bias, bias_sizes(site)), bias_layout(site)).astype(wide)

        def one(p: Arrays, w: jax.Array, b: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
            return merge_into(p, w, b, site)

        function = over_stack(one, site, alike, 0, 0)
        # A product that the hardware rounds to bfloat16 would be kept for good here.
        with jax.default_matmul_precision("highest"):
            w, b = function({name: cast_floating(array, wide) for name, array in p.items()}, w, b)
        w = restored(w, site.layout, site.shape).astype(dtype)
        if bias is None or b is None:
            return w, bias
        b = restored(b, bias_layout(site), bias_sizes(site)).reshape(bias.shape)
        return w, b.astype(jax.dtypes.canonicalize_dtype(bias.dtype))

    abstract = any(isinstance(array, jax.ShapeDtypeStruct) for array in (*p.values(), weight))
    if abstract:
        return jax.eval_shape(compute, p, weight, bias, own)
    return _sharded_like((weight, bias), compute)(p, weight, bias, own)


def _sharded_like(leaves: tuple[Any, Any], compute: Callable[..., tuple[Any, Any]]) -> Callable[..., tuple[Any, Any]]:
    # Under explicit sharding most reshapes of sharded axes are refused; what comes out is sharded as what goes in.
    shardings = jax.tree.map(lambda leaf: jax.typeof(leaf).sharding, leaves)
    if not jax.typeof(leaves[0]).sharding.mesh.explicit_axes:
        return compute
    sharded: Any = jax.sharding.auto_axes(compute, out_sharding=shardings)
    return sharded


def _like(leaf: Any, merged: Any) -> Any:
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf  # for its sharding
    if isinstance(merged, jax.Array) and isinstance(leaf, jax.Array):
        merged = merged.astype(leaf.dtype)
    if isinstance(leaf, jax.Array) and not isinstance(leaf, Tracer) and len(leaf.sharding.device_set) > 1:
        return jax.device_put(merged, leaf.sharding)
    if isinstance(leaf, np.ndarray) and not isinstance(merged, (Tracer, jax.ShapeDtypeStruct)):
        return np.asarray(merged, leaf.dtype)
    return merged


def _like_codes(leaf: Quantized, merged: Any) -> Any:
    if is_abstract(leaf):
        return as_dense(leaf)
    merged = jnp.asarray(merged, leaf.dtype)
    sharded = not isinstance(merged, Tracer) and len(leaf.sharding.device_set) > 1
    return jax.device_put(merged, leaf.sharding) if sharded else merged


def _check_finite(path: str, leaf: Any) -> None:
    abstract = isinstance(leaf, (Tracer, jax.ShapeDtypeStruct))
    if abstract:
        raise ValueError(
            f"merge(safe=True) looks at values, but {path!r} is abstract; call it outside jit, or pass safe=False"
        )
    bad = int((~jnp.isfinite(jnp.asarray(leaf))).sum())
    if bad:
        raise ValueError(
            f"merging gives {path!r} {bad} entries of {leaf.size} that are not finite; the base or the adapter is "
            "broken there (safe=False merges all the same)"
        )
