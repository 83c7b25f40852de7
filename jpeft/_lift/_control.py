"""Rules for control flow: the body is walked in place of the traced one, adapted weights pass as arguments."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from .._contract import STACK
from ._codes import carrier, constrained, densified, divides, specs_like, with_leading_axis
from ._dropout import at_step, has_key
from ._factors import factored
from ._jaxpr import (
    JIT_PRIMITIVES,
    Equation,
    Jaxpr,
    explicit_sharding,
    is_literal,
    opened,
    reshard,
    scan_split,
)
from ._walk import Context, Rule, plain, walk
from ._weight import AdaptedWeight, Axis, Term, Unsupported, is_adapted


def jit(context: Context, equation: Equation, inputs: list[Any], needed: list[bool]) -> list[Any]:
    """A jitted body is walked in line; the shardings that it asked for become constraints."""
    params = equation.params
    jaxpr = params.get("jaxpr", params.get("call_jaxpr"))
    inputs = [_constrained(v, s) for v, s in _paired(inputs, params.get("in_shardings"))]
    outputs = walk(context, jaxpr, inputs, needed)
    return [_constrained(v, s) for v, s in _paired(outputs, params.get("out_shardings"))]


def _paired(values: list[Any], shardings: Sequence[Any] | None) -> list[tuple[Any, Any]]:
    return list(zip(values, shardings if shardings else [None] * len(values), strict=True))


def _constrained(value: Any, sharding: Any) -> Any:
    if value is None or not isinstance(sharding, jax.sharding.Sharding):
        return value
    if isinstance(value, AdaptedWeight):
        return value.with_base(constrained(value.base, sharding))
    return lax.with_sharding_constraint(value, sharding)


def checkpoint(context: Context, equation: Equation, inputs: list[Any], needed: list[bool]) -> list[Any]:
    params, forwarded = equation.params, _forwarded(equation.params["jaxpr"])

    def body(*args: Any) -> list[Any]:
        return _outputs(context, equation, walk(context, params["jaxpr"], args, _own(needed, forwarded, inputs)))

    outputs = jax.checkpoint(body, prevent_cse=params["prevent_cse"], policy=params["policy"])(*inputs)
    return _with_forwarded(outputs, forwarded, inputs)


def cond(context: Context, equation: Equation, inputs: list[Any], needed: list[bool]) -> list[Any]:
    if equation.params.get("branches_platforms"):
        raise Unsupported("a choice by platform")
    index, *operands = inputs
    branches = equation.params["branches"]
    sources = [_forwarded(branch) for branch in branches]
    agreed = [first if all(s == first for s in rest) else None for first, *rest in zip(*sources, strict=True)]
    wanted = _own(needed, agreed, operands)

    def body(branch: Jaxpr) -> Callable[..., list[Any]]:
        return lambda *args: _outputs(context, equation, walk(context, branch, args, wanted))

    outputs = lax.switch(index, [body(branch) for branch in branches], *operands)
    return _with_forwarded(outputs, agreed, operands)


def while_(context: Context, equation: Equation, inputs: list[Any], needed: list[bool]) -> list[Any]:
    params = equation.params
    cond_constants, body_constants = params["cond_nconsts"], params["body_nconsts"]
    for_cond, for_body = inputs[:cond_constants], inputs[cond_constants : cond_constants + body_constants]
    carry = inputs[cond_constants + body_constants :]
    forwarded = [
        source if source is not None and source - body_constants == place else None
        for place, source in enumerate(_forwarded(params["body_jaxpr"]))
    ]
    # A weight that the loop hands on unchanged stays adapted; one that it changes has to be a plain array.
    fixed = [source is not None and is_adapted(value) for source, value in zip(forwarded, carry, strict=True)]
    start = [
        None if keep else plain(context, equation, value, "the loop changes it")
        for keep, value in zip(fixed, carry, strict=True)
    ]

    def full(state: Sequence[Any], step: Any = None) -> list[Any]:
        return [at_step(value, step) if keep else now for keep, value, now in zip(fixed, carry, state, strict=True)]

    def test(state: tuple[Any, Sequence[Any]]) -> Any:
        step, own = state
        constants = [at_step(value, step) for value in for_cond]
        return walk(context, params["cond_jaxpr"], [*constants, *full(own, step)])[0]

    def body(state: tuple[Any, Sequence[Any]]) -> tuple[Any, list[Any]]:
        step, own = state
        constants = [at_step(value, step) for value in for_body]
        outputs = walk(context, params["body_jaxpr"], [*constants, *full(own, step)], [not keep for keep in fixed])
        return None if step is None else step + 1, _like_carry(_outputs(context, equation, outputs), own)

    # Only dropout asks for the number of the step.
    first = 0 if any(map(has_key, inputs)) else None
    return full(lax.while_loop(test, body, (first, start))[1])


def scan(context: Context, equation: Equation, inputs: list[Any], needed: list[bool]) -> list[Any]:
    params, jaxpr = equation.params, equation.params["jaxpr"]
    n_constants, n_carry = scan_split(equation)
    closed, carry, xs = (
        inputs[:n_constants],
        inputs[n_constants : n_constants + n_carry],
        inputs[n_constants + n_carry :],
    )
    forwarded = _forwarded(jaxpr)
    fixed = [is_adapted(value) and forwarded[place] == n_constants + place for place, value in enumerate(carry)]
    start = [
        None if keep else plain(context, equation, value, "the loop changes it")
        for keep, value in zip(fixed, carry, strict=True)
    ]
    sliced = [_sliced(context, value) for value in xs]
    # A stack that comes out as it went in (as NNX modules do) is the stack itself; it is not written again.
    stacks = [
        source if source is not None and source >= n_constants + n_carry and is_adapted(inputs[source]) else None
        for source in forwarded[n_carry:]
    ]
    wanted = [*(not keep for keep in fixed), *(n and s is None for n, s in zip(needed[n_carry:], stacks, strict=True))]

    def body(state: Sequence[Any], x: tuple[Sequence[Any], Any]) -> tuple[list[Any], list[Any]]:
        slices, step = x
        constants = [at_step(value, step) for value in closed]
        now = [at_step(value, step) if keep else own for keep, value, own in zip(fixed, carry, state, strict=True)]
        rows = [piece.rebuild(own) for piece, own in zip(sliced, slices, strict=True)]
        outputs = _outputs(context, equation, walk(context, jaxpr, [*constants, *now, *rows], wanted))
        return _like_carry(outputs[:n_carry], state), outputs[n_carry:]

    # Only dropout asks for the number of the step.
    steps = jnp.arange(params["length"]) if any(map(has_key, (*closed, *carry))) else None
    given = ([piece.arrays for piece in sliced], steps)
    options = {name: params[name] for name in ("length", "reverse", "unroll", "_split_transpose") if name in params}
    end, ys = lax.scan(body, start, given, **options)
    last = [value if keep else own for keep, value, own in zip(fixed, carry, end, strict=True)]
    return [*last, *(inputs[s] if s is not None else y for s, y in zip(stacks, ys, strict=True))]


def _like_carry(outputs: list[Any], state: Sequence[Any]) -> list[Any]:
    """The carry with exactly the types that it came in with (weak types and literals differ)."""
    return [
        None if old is None else jnp.asarray(new).astype(old.dtype) if _is_number(old) else new
        for new, old in zip(outputs, state, strict=True)
    ]


def _is_number(value: Any) -> bool:
    return not jnp.issubdtype(value.dtype, jax.dtypes.extended)


@dataclasses.dataclass(frozen=True)
class Sliced:
    """What a scan slices of one of its inputs, and how a slice becomes the body's argument."""

    arrays: Any
    rebuild: Callable[[Any], Any]


def _sliced(context: Context, value: Any) -> Sliced:
    if not is_adapted(value):
        return Sliced(value, lambda own: own)
    weight: AdaptedWeight = value
    if len(weight.axes[0]) > 1:
        raise Unsupported("scan over axes that were reshaped together")
    axis = weight.axes[0][0] if weight.axes[0] else None
    if axis is None or axis.role != STACK:
        weight = factored(weight)
    if axis is not None:
        context.record.role(weight, axis, STACK)
        if axis.role != STACK and not all(term.low_rank for term in weight.terms):
            raise Unsupported("scan over an input or output axis")
    mapped = [_leading(term, axis) for term in weight.terms]

    def rebuild(own: Any) -> AdaptedWeight:
        base, slices = own
        terms = []
        for term, arrays in zip(weight.terms, slices, strict=True):
            terms.append(_without(term, axis, arrays))
        return dataclasses.replace(weight, base=base, terms=tuple(terms), axes=weight.axes[1:])

    return Sliced((with_leading_axis(weight.base), mapped), rebuild)


def _leading(term: Term, axis: Axis | None) -> dict[str, jax.Array]:
    """The arrays of a term that have the axis, with that axis in front."""
    return {
        name: jnp.moveaxis(array, term.labels[name].index(axis), 0)
        for name, array in term.arrays.items()
        if axis is not None and axis in term.labels[name]
    }


def _without(term: Term, axis: Axis | None, arrays: dict[str, jax.Array]) -> Term:
    """A term at one index of the axis: `arrays` in place of those that had it."""
    if axis is None:
        return term
    return dataclasses.replace(term.map_axis(axis, lambda array, at: array), arrays={**term.arrays, **arrays})


def shard_map(context: Context, equation: Equation, inputs: list[Any], needed: list[bool]) -> list[Any]:
    params, forwarded = equation.params, [None] * len(equation.outvars)
    mesh = params["mesh"]
    inputs = [_whole_blocks(value, spec, mesh) for value, spec in zip(inputs, params["in_specs"], strict=True)]
    specs = [_specs(value, spec) for value, spec in zip(inputs, params["in_specs"], strict=True)]
    inputs = [_resharded(value, spec) for value, spec in zip(inputs, specs, strict=True)]

    if not params["check_vma"]:
        named = [spec for value, spec in zip(inputs, params["in_specs"], strict=True) if not is_adapted(value)]
        context = dataclasses.replace(context, spread=(*context.spread, *_names(named)))

    def body(*args: Any) -> tuple[Any, ...]:
        local = [_local(value) for value in args]
        outputs = _outputs(context, equation, walk(context, params["jaxpr"], local, needed))
        return tuple(outputs)

    outputs = jax.shard_map(
        body,
        mesh=mesh,
        in_specs=tuple(specs),
        out_specs=tuple(spec if want else None for spec, want in zip(params["out_specs"], needed, strict=True)),
        axis_names=set(params.get("newly_manual_axes", params.get("manual_axes", mesh.axis_names))),
        check_vma=params["check_vma"],
    )(*inputs)
    return _with_forwarded(outputs, forwarded, inputs)


def _whole_blocks(value: Any, spec: PartitionSpec, mesh: Any) -> Any:
    """A weight that can be partitioned so: a dense one where the edges of shards would cut its blocks."""
    return value if not is_adapted(value) or divides(value.base, spec, mesh) else densified(value)


def _names(specs: Sequence[PartitionSpec]) -> set[str]:
    """The mesh axes that partition an array."""
    entries = (entry for spec in specs for entry in spec if entry is not None)
    return {name for entry in entries for name in (entry if isinstance(entry, tuple) else (entry,))}


def _specs(value: Any, spec: PartitionSpec) -> Any:
    """The partition of a weight's arrays that fits the partition of its base."""
    if not is_adapted(value):
        return spec
    weight: AdaptedWeight = value
    placed: dict[Axis, Any] = {}
    for group, names in zip(weight.axes, tuple(spec) + (None,) * len(weight.axes), strict=False):
        if names is None:
            continue
        if len(group) != 1 or (group[0].role != STACK and not all(term.low_rank for term in weight.terms)):
            raise Unsupported("shard_map over an axis that a method does not follow")
        placed[group[0]] = names
    terms = tuple(
        dataclasses.replace(
            term,
            arrays={name: PartitionSpec(*(placed.get(label) for label in term.labels[name])) for name in term.arrays},
        )
        for term in weight.terms
    )
    return dataclasses.replace(weight, base=specs_like(weight.base, spec), terms=terms)


def _resharded(value: Any, spec: Any) -> Any:
    if not is_adapted(value) or explicit_sharding(carrier(value.base)) is None:
        return value
    return jax.tree.map(lambda array, own: reshard(array, own), value, spec)


def _local(value: Any) -> Any:
    """A weight inside a shard_map: the same axes, each of its local size."""
    if not is_adapted(value):
        return value
    weight: AdaptedWeight = value
    for position, group in enumerate(weight.axes):
        if len(group) == 1 and group[0].size != weight.base.shape[position]:
            weight = _resized(weight, group[0], weight.base.shape[position])
    return weight


def _resized(weight: AdaptedWeight, axis: Axis, size: int) -> AdaptedWeight:
    new = Axis(axis.role, axis.place, size)
    axes = tuple(tuple(new if a == axis else a for a in group) for group in weight.axes)
    return weight.with_base(weight.base, axes).map_terms(lambda term: term.map_axis(axis, lambda array, at: array, new))


def _forwarded(jaxpr: Jaxpr) -> list[int | None]:
    """For each output of a jaxpr the input that it is, untouched, or None."""
    inner = opened(jaxpr)
    source: dict[Any, int] = {variable: index for index, variable in enumerate(jaxpr.invars)}
    for equation in inner.eqns:
        if equation.primitive.name in (*JIT_PRIMITIVES, "remat2", "checkpoint"):
            body = equation.params.get("jaxpr", equation.params.get("call_jaxpr"))
            for variable, index in zip(equation.outvars, _forwarded(body), strict=True):
                atom = None if index is None else equation.invars[index]
                if atom is not None and not is_literal(atom) and atom in source:
                    source[variable] = source[atom]
    return [None if is_literal(atom) else source.get(atom) for atom in inner.outvars]


def _own(needed: Sequence[bool], forwarded: Sequence[int | None], inputs: Sequence[Any]) -> list[bool]:
    """Which outputs a body has to compute: not those that are an adapted weight passed through."""
    return [
        want and not (source is not None and is_adapted(inputs[source]))
        for want, source in zip(needed, forwarded, strict=True)
    ]


def _with_forwarded(outputs: Sequence[Any], forwarded: Sequence[int | None], inputs: Sequence[Any]) -> list[Any]:
    return [
        inputs[source] if source is not None and is_adapted(inputs[source]) else output
        for output, source in zip(outputs, forwarded, strict=True)
    ]


def _outputs(context: Context, equation: Equation, values: Sequence[Any]) -> list[Any]:
    return [plain(context, equation, value, "its body returns it") for value in values]


CONTROL: dict[str, Rule] = {
    **dict.fromkeys(JIT_PRIMITIVES, jit),
    **dict.fromkeys(("remat2", "checkpoint"), checkpoint),
    "cond": cond,
    "while": while_,
    "scan": scan,
    "shard_map": shard_map,
}
