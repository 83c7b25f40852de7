"""From adapters, as they are stored, to the terms that act on each leaf of the base tree."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from .._arrays import arrays_at, over_stack
from .._config import FrozenMapping
from .._context import brought
from .._contract import (
    EMBEDDING,
    OUTPUT,
    STACK,
    VOCABULARY,
    Merge,
    Method,
    Site,
    is_quantised,
    merged,
    method_of,
)
from .._params import Adapter, PeftParams, Rng
from .._paths import fold_in_name, last_name, leaves_by_path, parent
from .._sites import canonical
from .._stacks import layer_paths
from .._targets import saved_modules
from .._tokens import TokenRows, row_method
from ._factors import with_factors
from ._prompts import prompt_terms
from ._weight import FULL_COPY, Term, weight_axes


def adapted_modules(wrapped: PeftParams) -> list[tuple[str, str]]:
    """(adapter, module path) of everything that is active."""
    adapters = [(name, wrapped.adapters[name]) for name in wrapped.active]
    sites = [(name, path) for name, adapter in adapters for path in adapter.sites]
    return [*sites, *((name, part.site.path) for name, adapter in adapters for part in adapter.rows.values())]


def terms_by_leaf(wrapped: PeftParams) -> dict[str, tuple[Term, ...]]:
    """The terms of the active adapters, in their order, by the path of the leaf that they act on."""
    rng: Rng | None = wrapped.context.get("rng")
    terms: dict[str, tuple[Term, ...]] = {}
    for name in wrapped.active:
        adapter = wrapped.adapters[name]
        method = method_of(adapter.config)
        given = {} if method.prompt is not None else brought(wrapped, name)
        for path, site in adapter.sites.items() if method.prompt is None else ():
            term = _with_rows(_term(name, adapter, method, path, site, rng), given)
            terms[site.leaf] = (*terms.get(site.leaf, ()), term)
        for leaf, part in adapter.rows.items():
            terms[leaf] = (*terms.get(leaf, ()), _row_term(name, adapter, part))
        for path, full in adapter.replaced.items():
            if _is_saved_table(path, full, adapter):
                terms[path] = (_full_copy(name, adapter, path, full),)
    # Last, as what acts on the table has to find its own ids.
    for leaf, prompts in prompt_terms(wrapped).items():
        terms[leaf] = (*terms.get(leaf, ()), *prompts)
    return terms


def _is_saved_table(path: str, leaf: Any, adapter: Adapter) -> bool:
    """Whether a leaf is a lookup table that trains in full (and not one that was resized: that is the base's)."""
    if getattr(adapter.config, "ensure_weight_tying", False):
        return False  # it then stands for the table in every use
    axes = 2 if layer_paths(path) is None else 3
    if jnp.ndim(leaf) != axes or "embed" not in last_name(path):
        return False
    return method_of(adapter.config).in_full or bool(saved_modules([parent(path)], adapter.config))


def _row_term(name: str, adapter: Adapter, part: TokenRows) -> Term:
    labels = FrozenMapping({"rows": (None, None)})
    return Term({"rows": part.values}, labels, row_method(part.indices), adapter.config, name, (part.site,))


def _full_copy(name: str, adapter: Adapter, path: str, full: jax.Array) -> Term:
    layout = (STACK if layer_paths(path) else "") + VOCABULARY + OUTPUT
    site = Site(parent(path), path, None, layout, jnp.shape(full), str(full.dtype))
    stack = [axis for group in weight_axes(layout, site.shape) for axis in group if axis.role == STACK]
    labels = FrozenMapping({"full": (*stack, None, None)})
    return Term({"full": full}, labels, FULL_COPY, adapter.config, name, (site,))


def _term(name: str, adapter: Adapter, method: Method, path: str, site: Site, rng: Rng | None) -> Term:
    own, alike = arrays_at(adapter, path)
    axes = tuple(axis for group in weight_axes(site.layout, site.shape) for axis in group)
    stack = tuple(axis for axis in axes if axis.role == STACK)
    lead = {array: () if array in alike else stack for array in own}
    labels: dict[str, Any] = {n: (*lead[n], *(None,) * (jnp.ndim(own[n]) - len(lead[n]))) for n in own}
    arrays = dict(own)
    # As in PEFT: dropout is on the input of a layer, and the input of a lookup is no number.
    if rng is not None and _is_random(method, adapter.config, site):
        key = fold_in_name(rng.key(), f"{name}/{path}")
        arrays["key"] = jax.random.split(key, site.stack) if stack else key
        labels["key"] = stack
    stored = method.factors is not None
    term = Term(arrays, FrozenMapping(labels), method, adapter.config, name, (site,), stored)
    # Those of a single layer are made here, once for all of its uses.
    return with_factors(term) if stored and not stack else term


def _with_rows(term: Term, given: Mapping[str, jax.Array]) -> Term:
    """A term with arrays that belong to the rows of the batch and so have none of the weight's axes."""
    labels = {name: (None,) * jnp.ndim(array) for name, array in given.items()}
    return dataclasses.replace(term, arrays={**term.arrays, **given}, labels=FrozenMapping({**term.labels, **labels}))


def _is_random(method: Method, config: Any, site: Site) -> bool:
    drops = site.kind != EMBEDDING or method.drops_lookups
    return method.noisy(config) or bool(method.dropout(config) and drops)


def replaced_leaves(wrapped: PeftParams) -> dict[str, Any]:
    """The leaves that the active adapters put in place of the base's: full copies, and biases that methods change.

    Full copies of lookup tables are not among them but among the terms, as they may act on one use of a leaf only.
    """
    replaced: dict[str, Any] = {}
    for name in wrapped.active:
        adapter = wrapped.adapters[name]
        replaced.update({k: v for k, v in adapter.replaced.items() if not _is_saved_table(k, v, adapter)})
    changed = [
        (adapter, method, path, site, site.bias)
        for adapter in (wrapped.adapters[name] for name in wrapped.active)
        for method in [method_of(adapter.config)]
        for path, site in adapter.sites.items()
        if method.changes_bias and site.bias is not None
    ]
    leaves = leaves_by_path(wrapped.base) if changed else {}
    for adapter, method, path, site, leaf in changed:
        own, alike = arrays_at(adapter, path)
        if method.needs_base:
            own["base"] = canonical(_checked_base(leaves[site.leaf], site), site.layout)
        into = functools.partial(merged, method, adapter.config)
        replaced[leaf] = merged_bias(into, own, alike, replaced.get(leaf, leaves[leaf]), site)
    return replaced


def _checked_base(leaf: Any, site: Site) -> Any:
    if is_quantised(leaf.dtype):
        raise ValueError(
            f"the adapted bias of {site.path!r} depends on the weight, but {site.leaf!r} is quantised: its dtype is "
            f"{leaf.dtype}; expected a floating-point one of 16 bits or more: give this module unquantised, or leave "
            "it out of target_modules"
        )
    return leaf


def merged_bias(
    merge_into: Merge, own: dict[str, Any], alike: frozenset[str], bias: jax.Array, site: Site
) -> jax.Array:
    """The bias of a method that changes it; the weight that is merged takes no part: it is a placeholder of zeros."""

    def one(arrays: dict[str, jax.Array], b: jax.Array) -> jax.Array:
        w = jnp.zeros((site.in_features, *site.window, site.out_features), b.dtype)
        return merge_into(arrays, w, b.reshape(-1), site)[1]  # type: ignore[return-value]

    biases = jnp.reshape(bias, (*site.stack, -1))
    return over_stack(one, site, alike, 0)(own, biases).reshape(bias.shape).astype(bias.dtype)
