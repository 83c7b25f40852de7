"""What goes into each adapted layer: statistics of its inputs, collected while a function runs.

A layer's input is tapped by an identity whose derivative by a placeholder of zeros is the statistic, whatever the
cotangent. So JAX's own reverse pass carries the statistics out of scans, remat and mapped layers, and sums them over
all uses of a layer; the cotangents themselves are used by nothing, and compiled away.
"""

import dataclasses
import functools
import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from ._config import TunerConfig
from ._contract import LINEAR, Arrays, Base, Method, Site, register
from ._lift import lift
from ._params import Adapter, PeftParams, Sites
from ._wrap import checked_names, checked_params

Statistic = Callable[[jax.Array, jax.Array], dict[str, jax.Array]]


def second_moments(x: jax.Array, kept: jax.Array) -> dict[str, jax.Array]:
    """Count, sum and sum of outer products of the rows x (n, in) that are kept (n,), in float32."""
    x = jnp.where(kept[:, None], x.astype(jnp.float32), 0)
    return {"count": kept.sum(dtype=jnp.float32), "sum": x.sum(0), "outer": _outer(x)}


def normalised_moments(x: jax.Array, kept: jax.Array) -> dict[str, jax.Array]:
    """How many calls there were, and the outer products of their rows, each call's divided by its largest entry."""
    x = jnp.where(kept[:, None], x.astype(jnp.float32), 0)
    return {"calls": jnp.ones((), jnp.float32), "outer": _outer(x / jnp.abs(jnp.max(x)))}


def _outer(x: jax.Array) -> jax.Array:
    return jnp.matmul(x.T, x, precision=jax.lax.Precision.HIGHEST)


STATISTICS: Mapping[str, Statistic] = {"second_moments": second_moments, "normalised_moments": normalised_moments}
"""What can be collected, from the rows of one call of a layer; it is summed over calls."""


def capture_inputs(
    function: Callable[..., Any],
    wrapped: PeftParams,
    *args: Any,
    statistic: str = "second_moments",
    mask: jax.Array | None = None,
    adapter_name: str = "default",
    **kwargs: Any,
) -> tuple[Any, dict[str, dict[str, jax.Array]]]:
    """Call the base function, and collect statistics of what goes into the linear layers that an adapter acts on.

    function: as given to `lift`, called with the base parameters, *args and **kwargs. statistic: "second_moments"
    (of the rows x: their "count", "sum" and "outer" products summed) or "normalised_moments" (the number of "calls",
    and "outer" of rows divided by the largest entry of their call). mask: booleans of the shape of the inputs without
    their last axis (batch, tokens), False where they do not count. Returns (what the function returns, {module path:
    {name: float32 array}}), stacked layers along leading axes. Pure and traceable; JAX has to be able to differentiate
    the function in reverse. Raises ValueError for an unknown name, if the function returns no floating-point array, or
    if the mask does not fit the input of a layer.

    >>> import jpeft
    >>> params = {"dense": {"kernel": jnp.ones((3, 2))}}
    >>> wrapped = jpeft.wrap(params, jpeft.LoraConfig(r=1, target_modules=["dense"]))
    >>> y, found = capture_inputs(lambda p, x: x @ p["dense"]["kernel"], wrapped, jnp.ones((5, 3)))
    >>> y.shape, found["dense"]["count"], found["dense"]["sum"]
    ((5, 2), Array(5., dtype=float32), Array([5., 5., 5.], dtype=float32))
    """
    (name,) = checked_names(checked_params(wrapped), adapter_name)
    if statistic not in STATISTICS:
        raise ValueError(f"statistic is {statistic!r}; expected one of {', '.join(STATISTICS)}")
    sites = {path: site for path, site in wrapped.adapters[name].sites.items() if site.kind == LINEAR}
    zeros = {path: _zeros(site, statistic) for path, site in sites.items()}

    def tapped(statistics: Mapping[str, Any]) -> tuple[list[Any], Any]:
        tapping = _tapping(wrapped.base, sites, statistics, statistic, mask)
        with warnings.catch_warnings():
            # A layer that the function does not use is one without inputs: the statistics say so.
            warnings.simplefilter("ignore")
            outputs = lift(function)(tapping, *args, **kwargs)
        leaves = jax.tree.leaves(outputs)
        return [leaf for leaf in leaves if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)], outputs

    floating, pullback, outputs = jax.vjp(tapped, zeros, has_aux=True)
    if not floating:
        raise ValueError("the function returns no floating-point array; expected logits or a loss, say")
    (found,) = pullback([jnp.zeros_like(leaf) for leaf in floating])
    return outputs, found


def _zeros(site: Site, statistic: str) -> dict[str, jax.Array]:
    row, kept = jax.ShapeDtypeStruct((1, site.in_features), jnp.float32), jax.ShapeDtypeStruct((1,), jnp.bool_)
    shapes = jax.eval_shape(STATISTICS[statistic], row, kept)
    return {name: jnp.zeros((*site.stack, *shape.shape), shape.dtype) for name, shape in shapes.items()}


def _tapping(
    base: Any, sites: Mapping[str, Site], statistics: Any, statistic: str, mask: jax.Array | None
) -> PeftParams:
    adapter = Adapter(
        weights=dict(statistics),
        shared={} if mask is None else {"mask": jnp.asarray(mask, bool)},
        replaced={},
        scaling={path: jnp.ones(site.stack, jnp.float32) for path, site in sites.items()},
        config=_CaptureConfig(statistic=statistic),
        sites=Sites(sites),
    )
    return PeftParams(base=base, adapters={"capture": adapter}, active=("capture",))


@dataclasses.dataclass(frozen=True, kw_only=True)
class _CaptureConfig(TunerConfig):
    """The adapter that changes nothing. statistic: what it collects."""

    statistic: str = "second_moments"


def _forward(statistic: str, p: Arrays, x: jax.Array, base: Base, site: Site, context: Mapping[str, Any]) -> jax.Array:
    kept = _rows_kept(p.get("mask"), x, site)
    return base(_tap(statistic, x, kept, {name: p[name] for name in _NAMES[statistic]}))


def _rows_kept(mask: jax.Array | None, x: jax.Array, site: Site) -> jax.Array:
    rows = math.prod(x.shape[:-1])
    if mask is None:
        return jnp.ones(rows, bool)
    if mask.size != rows:
        raise ValueError(
            f"the mask of shape {mask.shape} has {mask.size} entries, but the input of {site.path!r} has {rows} rows; "
            "expected a mask of the input's shape without the last axis"
        )
    return mask.reshape(-1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _tap(statistic: str, x: jax.Array, kept: jax.Array, zeros: dict[str, jax.Array]) -> jax.Array:
    return x


def _tap_forwards(statistic: str, x: jax.Array, kept: jax.Array, zeros: dict[str, jax.Array]) -> tuple[Any, Any]:
    return x, (x, kept)


def _tap_backwards(statistic: str, saved: Any, cotangent: jax.Array) -> tuple[Any, ...]:
    x, kept = saved
    return cotangent, None, STATISTICS[statistic](x.reshape(-1, x.shape[-1]), kept)


_tap.defvjp(_tap_forwards, _tap_backwards)

_NAMES = {
    name: tuple(jax.eval_shape(function, jax.ShapeDtypeStruct((1, 1), "float32"), jax.ShapeDtypeStruct((1,), bool)))
    for name, function in STATISTICS.items()
}

for _statistic in STATISTICS:
    register(
        Method(
            config=_CaptureConfig,
            init=lambda key, site, config, weight: {},
            merge=lambda p, w, b, site: (w, b),
            forward=functools.partial(_forward, _statistic),
            kinds=frozenset({LINEAR}),
        ),
        applies=functools.partial(lambda name, config: config.statistic == name, _statistic),
    )
