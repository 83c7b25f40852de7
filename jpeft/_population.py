"""Populations: many adapters over one base, trained together by `jax.vmap`."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ._params import Adapter, PeftParams
from ._ranks import check_zeros_are_nothing, cut, largest, padded
from ._wrap import checked_params


def stack_adapters(members: Sequence[PeftParams]) -> PeftParams:
    """Parameters whose adapter arrays have a leading axis, one entry a member: (members, *stack, ...).

    members: parameters with the same adapter names, modules and base (the first one's is kept, by reference). Map a
    training step over the result with `in_axes=jpeft.population_axes(...)`, and each member trains as if alone: seeds,
    learning rates (`optax.inject_hyperparams`), scalings may differ, and ranks, for lower ones are filled up with zeros
    that stay zero. The config is that of a member with the highest rank. Keys for dropout are stacked as well.
    Raises ValueError for other modules, other settings than rank and scaling, and shapes that zeros cannot fill up.

    >>> import jax, jax.numpy as jnp, jpeft
    >>> params = {"query": {"kernel": jnp.ones((4, 6))}}
    >>> config = jpeft.LoraConfig(r=2, target_modules=["query"])
    >>> members = [jpeft.wrap(params, config, rng=jax.random.key(seed)) for seed in range(3)]
    >>> population = jpeft.stack_adapters(members)
    >>> population.base is params, population.adapters["default"].weights["query"]["lora_A"].shape
    (True, (3, 2, 4))
    >>> apply = jpeft.lift(lambda params, x: x @ params["query"]["kernel"])
    >>> jax.vmap(apply, in_axes=(jpeft.population_axes(population), None))(population, jnp.ones((5, 4))).shape
    (3, 5, 6)
    """
    members = list(map(checked_params, members))
    if not members:
        raise ValueError("there are no members; expected at least one PeftParams")
    first = members[0]
    for number, member in enumerate(members):
        _check_member(number, member, first)
    adapters = {name: _stacked(name, [member.adapters[name] for member in members]) for name in first.adapters}
    return dataclasses.replace(first, adapters=adapters, context=_stacked_context(members))


def unstack_adapters(population: PeftParams, like: Sequence[PeftParams] | None = None) -> list[PeftParams]:
    """The members of a population, with their present values.

    like: what `stack_adapters` was given, for their own ranks and configs; without it all have the population's.
    Raises ValueError if the arrays have not one leading axis in common, or `like` is of another length.

    >>> import jax, jax.numpy as jnp, jpeft
    >>> wrapped = jpeft.wrap({"q": {"kernel": jnp.ones((4, 6))}}, jpeft.LoraConfig(r=2, target_modules=["q"]))
    >>> [w.adapters["default"].weights["q"]["lora_B"].shape for w in unstack_adapters(stack_adapters([wrapped] * 2))]
    [(6, 2), (6, 2)]
    """
    sizes = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(checked_params(population).adapters)}
    if len(sizes) != 1 or () in sizes:
        raise ValueError(
            f"the arrays of the adapters have leading axes of {sorted(sizes)}; expected one axis of members, as "
            "jpeft.stack_adapters makes it"
        )
    ((count,),) = sizes
    if like is not None and len(like) != count:
        raise ValueError(f"like has {len(like)} members, the population {count}; expected as many")
    found = []
    for index in range(count):
        member = dataclasses.replace(population, adapters=_at(population.adapters, index), context={})
        found.append(member if like is None else _as_before(member, like[index]))
    return found


def population_axes(population: PeftParams) -> Any:
    """What `jax.vmap` needs as `in_axes` (and `out_axes`) for a population: its adapters by member, its base shared.

    >>> import jax.numpy as jnp, jpeft
    >>> wrapped = jpeft.wrap({"q": {"kernel": jnp.ones((4, 6))}}, jpeft.LoraConfig(target_modules=["q"]))
    >>> axes = population_axes(stack_adapters([wrapped] * 2))
    >>> axes.base, axes.adapters
    (None, 0)
    """
    checked_params(population)
    return dataclasses.replace(population, base=None, adapters=0, context=0 if population.context else None)


def _check_member(number: int, member: PeftParams, first: PeftParams) -> None:
    if (list(member.adapters), member.active) != (list(first.adapters), first.active):
        raise ValueError(
            f"member {number} has the adapters {list(member.adapters)}, active {member.active}, the first one "
            f"{list(first.adapters)}, active {first.active}; expected the same"
        )
    ours, theirs = jax.tree.flatten(first.base), jax.tree.flatten(member.base)
    if ours[1] != theirs[1] or any(a is not b for a, b in zip(ours[0], theirs[0], strict=True)):
        raise ValueError(f"member {number} has a base of its own; expected the first one's, which all members share")
    own, others = (jax.tree.map(jnp.shape, one.context) for one in (member, first))
    if own != others:
        raise ValueError(
            f"member {number} has the context {sorted(own)} of shapes {jax.tree.leaves(own)}, the first "
            f"{sorted(others)} of shapes {jax.tree.leaves(others)}; expected one form"
        )


def _stacked(name: str, adapters: list[Adapter]) -> Adapter:
    first = adapters[0]
    for number, adapter in enumerate(adapters):
        _check_alike(name, number, adapter, first)
    leaves, structure = zip(*(jax.tree.flatten(_arrays(adapter)) for adapter in adapters), strict=True)
    if any(other != structure[0] for other in structure):
        raise ValueError(f"the members' adapters {name!r} hold other arrays; expected the same modules and full copies")
    stacked = []
    for own in zip(*leaves, strict=True):
        shapes = [tuple(leaf.shape) for leaf in own]
        if len(set(shapes)) > 1:
            for adapter in adapters:
                check_zeros_are_nothing(name, adapter, f"stacking the shapes {sorted(set(shapes))}")
        shape = largest(shapes)
        stacked.append(_stack([padded(leaf, shape) for leaf in own]))
    weights, shared, replaced, scaling, rows = jax.tree.unflatten(structure[0], stacked)
    widest = max(adapters, key=lambda adapter: sum(leaf.size for leaf in jax.tree.leaves(adapter.weights)))
    return Adapter(weights, shared, replaced, scaling, widest.config, first.sites, rows)


def _arrays(adapter: Adapter) -> tuple[Any, ...]:
    return adapter.weights, adapter.shared, adapter.replaced, adapter.scaling, adapter.rows


# Where members may differ: their arrays tell, or it is about their beginning and not about what they compute.
_OWN = frozenset({"r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "init_lora_weights", "extra"})


def _check_alike(name: str, number: int, adapter: Adapter, first: Adapter) -> None:
    if adapter.sites != first.sites:
        raise ValueError(
            f"adapter {name!r} of member {number} acts on {list(adapter.sites)[:5]}, that of the first on "
            f"{list(first.sites)[:5]}; expected the same modules"
        )
    if type(adapter.config) is not type(first.config):
        raise ValueError(
            f"adapter {name!r} of member {number} is a {type(adapter.config).__name__}; expected one method"
        )
    fields = [field.name for field in dataclasses.fields(first.config) if field.name not in _OWN]
    other = [field for field in fields if getattr(adapter.config, field) != getattr(first.config, field)]
    if other:
        given = ", ".join(f"{f}={getattr(adapter.config, f)!r}, not {getattr(first.config, f)!r}" for f in other)
        raise ValueError(f"adapter {name!r} of member {number} has {given}; expected the first one's settings")


def _stack(arrays: list[Any]) -> Any:
    if len({str(array.dtype) for array in arrays}) > 1:
        raise ValueError(f"the members' arrays are {[str(array.dtype) for array in arrays]}; expected one dtype")
    if any(isinstance(array, jax.ShapeDtypeStruct) for array in arrays):
        return jax.ShapeDtypeStruct((len(arrays), *arrays[0].shape), arrays[0].dtype)
    return jnp.stack(arrays)


def _stacked_context(members: list[PeftParams]) -> dict[str, Any]:
    return jax.tree.map(lambda *own: _stack(list(own)), *(member.context for member in members))


def _at(tree: Any, index: int) -> Any:
    def one(leaf: Any) -> Any:
        return (
            jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype) if isinstance(leaf, jax.ShapeDtypeStruct) else leaf[index]
        )

    return jax.tree.map(one, tree)


def _as_before(member: PeftParams, like: PeftParams) -> PeftParams:
    def own(adapter: Adapter, before: Adapter) -> Adapter:
        *arrays, rows = jax.tree.map(lambda leaf, old: cut(leaf, tuple(old.shape)), _arrays(adapter), _arrays(before))
        return Adapter(*arrays, config=before.config, sites=before.sites, rows=rows)

    adapters = {name: own(adapter, like.adapters[name]) for name, adapter in member.adapters.items()}
    return dataclasses.replace(member, adapters=adapters)
