"""Soft prompts: a lookup of ids that follow the vocabulary finds the rows of a prompt, whatever acts on the table."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NoReturn

import jax
import jax.numpy as jnp

from .._config import FrozenMapping, PeftConfig
from .._contract import EMBEDDING, OUTPUT, Arrays, Base, Method, Site, not_merged
from .._params import PeftParams
from .._virtual_tokens import prompt_rows, virtual_ids
from . import _labels as lab
from ._weight import AdaptedWeight, Axis, Term, of_role, sizes


def _refused(p: Arrays, w: jax.Array, b: jax.Array | None, site: Site) -> NoReturn:
    raise ValueError(not_merged(f"the prompt that is looked up in {site.leaf!r}"))


def _not_looked_up(p: Arrays, x: jax.Array, base: Base, site: Site, context: Mapping[str, Any]) -> NoReturn:
    raise ValueError(
        f"the model multiplies {site.leaf!r} with what stands for its tokens, such as one-hot rows, which have "
        "no place for the tokens of a prompt; expected a lookup, such as jnp.take(table, ids, axis=0)"
    )


# Like every adapter of a table a prompt acts on lookups; a tied output layer knows nothing of it.
PROMPT = Method(
    config=PeftConfig,
    merge=_refused,
    forward=_not_looked_up,
    tied=lambda p, x, y, site: y,
    kinds=frozenset({EMBEDDING}),
)


def prompt_terms(wrapped: PeftParams) -> dict[str, tuple[Term, ...]]:
    """The terms of the active prompts by the path of the table in which their ids are looked up."""
    terms: dict[str, tuple[Term, ...]] = {}
    for name, ids in virtual_ids(wrapped).items():
        adapter = wrapped.adapters[name]
        rows = prompt_rows(wrapped, name)
        arrays = {"rows": rows, "first": jnp.asarray(ids.start, jnp.int32)}
        labels = FrozenMapping({"rows": (None,) * rows.ndim, "first": ()})
        for site in adapter.sites.values():
            term = Term(arrays, labels, PROMPT, adapter.config, name, (site,))
            terms[site.leaf] = (*terms.get(site.leaf, ()), term)
    return terms


def is_prompt(term: Term) -> bool:
    return term.method is PROMPT


def without_prompts(weight: AdaptedWeight) -> AdaptedWeight:
    return dataclasses.replace(weight, terms=tuple(term for term in weight.terms if not is_prompt(term)))


def known_ids(ids: jax.Array, terms: tuple[Term, ...]) -> jax.Array:
    """The ids (..., columns) of a lookup with those of prompts replaced by one that the table has."""
    inside = [_place(ids, term)[1] for term in terms]
    return jnp.where(jnp.any(jnp.stack(inside), axis=0), jnp.zeros_like(ids), ids)


def with_prompt(
    found: jax.Array,
    ids: jax.Array,
    term: Term,
    axes: tuple[Axis, ...],
    groups: list[lab.Group],
    names: tuple[str, ...],
) -> jax.Array:
    """What a lookup has found, with the rows of a prompt where the ids (...) are its own.

    names: of the axes of the ids. axes: of the table. groups: how the result is made of both.
    """
    place, inside = _place(ids, term)
    rows = term.arrays["rows"].astype(found.dtype)
    count, outputs = rows.shape[-2], of_role(axes, OUTPUT)
    place = jnp.clip(place, 0, count - 1)
    if rows.ndim == 2:
        own = rows[place]
    else:
        if ids.ndim < 1 or ids.shape[0] != rows.shape[0]:
            raise ValueError(
                f"adapter {term.adapter!r} has a prompt for each of {rows.shape[0]} rows, and the ids that are looked "
                f"up are of shape {ids.shape}; expected ids of shape ({rows.shape[0]}, length)"
            )
        own = jax.vmap(lambda rows, place: rows[place])(rows, place)
    known = {**sizes(axes), **lab.sizes_of(ids, names)}
    whole = lab.split(own, [*((name,) for name in names), outputs], known)
    own = lab.arrange(whole, (*names, *outputs), groups, known)
    inside = lab.arrange(inside, names, [tuple(n for n in group if n in names) for group in groups], known)
    return jnp.where(inside, own, found)


def _place(ids: jax.Array, term: Term) -> tuple[jax.Array, jax.Array]:
    first, count = term.arrays["first"].astype(ids.dtype), term.arrays["rows"].shape[-2]
    place = ids - first
    return place, (ids >= first) & (place < count)
