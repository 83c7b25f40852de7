"""The layers of a model, one after another: each by itself, or uniform ones stacked and run by `jax.lax.scan`.

A model's layers are modules named by their numbers, as in a `torch.nn.ModuleList`. Stacked, the layers of one kind are
one module whose parameters have a leading axis, named by the slice of the numbers that it stands for: "0:24" for 24
equal layers, "0:24:2" and "1:24:2" for two kinds that alternate.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jpeft import save_adapted_products
from jpeft._stacks import stacked_numbers

from ._family import Options
from ._spread import spread

_OF_JAX = (
    "dots_saveable",
    "dots_with_no_batch_dims_saveable",
    "checkpoint_dots",
    "checkpoint_dots_with_no_batch_dims",
    "everything_saveable",
)
REMAT_POLICIES = {
    "nothing_saveable": jax.checkpoint_policies.nothing_saveable,
    "save_adapted_products": save_adapted_products,
    **{name: getattr(jax.checkpoint_policies, name) for name in _OF_JAX},
}
"""Policies of `jax.checkpoint` that need no arguments, from the least memory to the most."""

Layer = Callable[[nnx.Module, Any, Any, Any], tuple[Any, Any]]
"""`(module, x, memory, own) -> (x, memory)`."""


def layers(make: Callable[[int], nnx.Module], kinds: Sequence[Hashable], options: Options) -> nnx.Dict:
    """The layers `make(0), make(1), ...`, stacked if `options.scan_layers`; layers of equal `kinds` are alike."""
    if not options.scan_layers:
        return nnx.Dict({str(number): make(number) for number in range(len(kinds))})
    modules: dict[str, nnx.Module] = {}
    for first, last, period in _runs(kinds):
        if last - first <= period:
            modules |= {str(number): make(number) for number in range(first, last)}
            continue
        for number in range(first, first + period):
            step = f":{period}" if period > 1 else ""
            modules[f"{number}:{last}{step}"] = _stacked(make(number), (last - first) // period)
    return nnx.Dict(modules)


def _runs(kinds: Sequence[Hashable]) -> list[tuple[int, int, int]]:
    """`(first, last, period)` of spans of layers in which the kinds repeat; what does not fit a period comes last."""
    total = len(kinds)
    period = next((p for p in range(1, total // 2 + 1) if all(kinds[i] == kinds[i % p] for i in range(total))), None)
    if period is not None:
        whole = total - total % period
        return [(0, whole, period)] + ([(whole, total, total - whole)] if whole < total else [])
    starts = [0, *(i for i in range(1, total) if kinds[i] != kinds[i - 1]), total]
    return [(first, last, 1) for first, last in zip(starts[:-1], starts[1:], strict=True)]


def _stacked(module: nnx.Module, count: int) -> nnx.Module:
    graphdef, state = nnx.split(module)

    def stack(struct: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((count, *struct.shape), struct.dtype)

    return nnx.merge(graphdef, jax.tree.map(stack, state))


def run(
    modules: nnx.Dict,
    x: Any,
    layer: Layer,
    *,
    memories: Mapping[str, Any] | None = None,
    own: Mapping[int, Any] | None = None,
    options: Options,
    collect: bool = False,
) -> tuple[Any, dict[str, Any], tuple[Any, ...]]:
    """Put `x` through all layers by `layer(module, x, memory, own)`.

    `memories`: what each layer kept from an earlier call, by name. `own`: what single layers are given of their own, by
    number, trees of arrays that are alike; the other layers are given None, or zeros within a stack that has some.
    Returns x, the layers' new memories by name, and, if `collect`, what went into every layer. On a mesh, x is spread
    before each layer and after it.
    """
    memories = {} if memories is None else memories
    kept: dict[str, Any] = {}
    inputs: list[Any] = []
    x = spread(x, options.mesh)
    for names in _in_order(modules):
        given = {name: (memories.get(name), _own_of(name, own or {})) for name in names}
        x, new, entered = _run_group({name: modules[name] for name in names}, x, layer, given, options, collect)
        kept |= {name: memory for name, memory in new.items() if memory is not None}
        inputs += entered
    return x, kept, tuple(inputs)


def _in_order(modules: nnx.Dict) -> list[list[str]]:
    """The names in the order of their first layers; stacks that alternate with one another are one group."""
    groups: dict[Any, list[str]] = {}
    for name in sorted(modules, key=lambda name: int(name.partition(":")[0])):
        numbers = stacked_numbers(name)
        groups.setdefault(name if numbers is None else (numbers.stop, numbers.step), []).append(name)
    return list(groups.values())


def _own_of(name: str, own: Mapping[int, Any]) -> Any:
    numbers = stacked_numbers(name)
    if numbers is None:
        return own.get(int(name))
    first = next((own[number] for number in numbers if number in own), None)
    if first is None:
        return None
    nothing = jax.tree.map(jnp.zeros_like, first)
    return jax.tree.map(lambda *arrays: jnp.stack(arrays), *(own.get(number, nothing) for number in numbers))


def _run_group(
    modules: Mapping[str, nnx.Module],
    x: Any,
    layer: Layer,
    given: Mapping[str, tuple[Any, Any]],
    options: Options,
    collect: bool,
) -> tuple[Any, Mapping[str, Any], list[Any]]:
    split = {name: nnx.split(module) for name, module in modules.items()}
    graphdefs = {name: graphdef for name, (graphdef, _) in split.items()}

    def one(name: str, state: Any, x: Any, memory: Any, own: Any) -> tuple[Any, Any]:
        def call(state: Any, x: Any, memory: Any, own: Any) -> tuple[Any, Any]:
            return layer(nnx.merge(graphdefs[name], state), x, memory, own)

        if options.remat is not None:
            # Within a scan nothing can be merged across the boundary, and the barriers would only cost time.
            call = jax.checkpoint(call, policy=REMAT_POLICIES[options.remat], prevent_cse=not scanned)
        return call(state, x, memory, own)

    def all_of(x: Any, each: Any) -> tuple[Any, Any]:
        states, given = each
        new, entered = {}, []
        for name in modules:
            entered.append(x if collect else None)
            x, new[name] = one(name, states[name], x, *given[name])
            x = spread(x, options.mesh)
        return x, (new, entered)

    scanned = stacked_numbers(next(iter(modules))) is not None
    states = {name: state for name, (_, state) in split.items()}
    if not scanned:
        x, (new, entered) = all_of(x, (states, given))
        return x, new, [value for value in entered if value is not None]
    x, (new, entered) = jax.lax.scan(all_of, x, (states, given))
    return x, new, _interleaved(entered) if collect else []


def _interleaved(entered: Sequence[jax.Array]) -> list[jax.Array]:
    return [stack[index] for index in range(entered[0].shape[0]) for stack in entered]


def check_remat(policy: str | None) -> None:
    """Raise ValueError unless `policy` is None or the name of a policy."""
    if policy is not None and policy not in REMAT_POLICIES:
        raise ValueError(f"remat={policy!r} is not known; expected None or one of: {', '.join(REMAT_POLICIES)}")
