"""All that depends on the inside of JAX: reading jaxprs and their equations, running them, and shardings.

Every fact that differs between JAX versions is settled here (tested on 0.10 and 0.12), through public modules alone.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.api_util
import jax.core
import jax.extend.core as jex
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

Equation = Any  # jax.extend.core.JaxprEqn
Jaxpr = Any  # jax.extend.core.Jaxpr or ClosedJaxpr: one class in newer versions

# A jaxpr has to name the function that it comes from; a block of equations comes from none.
_DEBUG_INFO = jax.api_util.debug_info("jpeft", lambda: None, (), {}, result_paths_thunk=tuple)

JIT_PRIMITIVES = ("jit", "pjit", "closed_call", "core_call")


def is_literal(atom: Any) -> bool:
    return isinstance(atom, jex.Literal)


def trace(function: Callable[..., Any], *args: Any) -> Jaxpr:
    return jax.make_jaxpr(function)(*args)


def constants(jaxpr: Jaxpr) -> Sequence[Any]:
    """The values of a jaxpr's constvars; an open jaxpr has none."""
    return getattr(jaxpr, "consts", ())


def opened(jaxpr: Jaxpr) -> Jaxpr:
    return getattr(jaxpr, "jaxpr", jaxpr)


def constant_variables(jaxpr: Jaxpr) -> Sequence[Any]:
    return opened(jaxpr).constvars if constants(jaxpr) else ()


def run_block(
    equations: Sequence[Equation], inputs: Sequence[Any], outputs: Sequence[Any], args: Sequence[Any]
) -> list:
    """Run equations unchanged, with their scopes, effects and contexts, from input to output variables."""
    block = jex.Jaxpr([], list(inputs), list(outputs), list(equations), debug_info=_DEBUG_INFO)
    return jax.core.eval_jaxpr(block, (), *args)


def run_equation(equation: Equation, args: Sequence[Any]) -> list[Any]:
    """Run one equation, inside its `scope_of`, on other arguments, which may differ from the traced ones in shape."""
    values = {atom: arg for atom, arg in zip(equation.invars, args, strict=True) if not is_literal(atom)}
    source = equation.source_info
    unnamed = equation.replace(source_info=source.replace(name_stack=source.name_stack[:0]))
    return run_block([unnamed], list(values), list(equation.outvars), list(values.values()))


@contextlib.contextmanager
def scope_of(equation: Equation) -> Iterator[None]:
    """What a rule computes in place of an equation keeps that equation's names, mesh and configuration."""
    name = str(equation.source_info.name_stack)
    with equation.ctx.manager, jax.named_scope(name) if name else contextlib.nullcontext():
        yield


def has_effects(equation: Equation) -> bool:
    return bool(equation.effects)


def scan_split(equation: Equation) -> tuple[int, int]:
    """How many leading operands of a scan are constants, and how many after them are the carry."""
    params = equation.params
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    constants_in, carry_in, _ = params["ft_in"].unpack()
    return len(list(constants_in)), len(list(carry_in))


def custom_jvp_rule(equation: Equation) -> Callable[[Sequence[bool]], tuple[Jaxpr, Sequence[bool]]]:
    """The jvp rule as a jaxpr of (primals, nonzero tangents) -> (outputs, nonzero output tangents)."""
    thunk = equation.params["jvp_jaxpr_fun"]

    def rule(zero_tangents: Sequence[bool]) -> tuple[Jaxpr, Sequence[bool]]:
        jaxpr, consts, zeros_out = thunk.call_wrapped(*zero_tangents)
        return _close(jaxpr, consts), zeros_out

    return rule


def custom_vjp_rules(equation: Equation) -> tuple[Jaxpr, list[int | None], Callable[..., Any]]:
    """(fwd jaxpr giving residuals then outputs, for each residual the input it forwards or None, bwd)."""
    params = equation.params
    symbolic = [False] * len(equation.invars)
    jaxpr, consts = params["fwd_jaxpr_thunk"].call_wrapped(*symbolic)
    _, _, forwarded = params["out_trees"]()

    def backward(*args: Any) -> Sequence[Any]:
        results = params["bwd"].call_wrapped(*args)
        return results[0] if isinstance(results, tuple) else results  # newer versions: (results, logs)

    return _close(jaxpr, consts), list(forwarded), backward


def _close(jaxpr: Jaxpr, consts: Sequence[Any]) -> Jaxpr:
    return jaxpr if constants(jaxpr) else jex.ClosedJaxpr(opened(jaxpr), list(consts))


def is_array(value: Any) -> bool:
    return isinstance(value, (jax.Array, np.ndarray, np.generic))


def is_number(value: Any) -> bool:
    return is_array(value) or isinstance(value, (bool, int, float, complex))


def with_dtype(array: Any, dtype: Any) -> Any:
    """The type of an array, shardings and varying axes included, with another dtype: something to trace with."""
    return jax.typeof(array).update(dtype=np.dtype(dtype), weak_type=False)


def is_floating(aval: Any) -> bool:
    return jax.numpy.issubdtype(aval.dtype, np.inexact)


def on_one_cpu(*arrays: Any) -> bool:
    """Whether a program that computes with these arrays is compiled for a CPU, and for one device of it.

    Told by the mesh that one of them is on, or that is in use, before the machine that traces: programs for TPUs are
    compiled elsewhere, too. Manual axes of a mesh do not count, as each device has a program of its own there.
    """
    meshes = (*(jax.typeof(array).sharding.mesh for array in arrays), jax.sharding.get_abstract_mesh())
    mesh = next((mesh for mesh in meshes if not mesh.empty), None)
    if mesh is None:
        return jax.default_backend() == "cpu"
    kinds = zip(mesh.axis_sizes, mesh.axis_types, strict=True)
    shared = math.prod(size for size, kind in kinds if kind != AxisType.Manual)
    device = mesh.abstract_device
    return shared == 1 and (jax.default_backend() if device is None else device.platform) == "cpu"


def explicit_sharding(array: Any) -> NamedSharding | None:
    """The sharding in an array's type where its mesh has Explicit axes, else None."""
    sharding = jax.typeof(array).sharding
    mesh = sharding.mesh
    if mesh.empty or AxisType.Explicit not in mesh.axis_types:
        return None
    return sharding


def unsharded(function: Callable[..., Any], like: Any) -> Callable[..., Any]:
    """A function written without a thought for shardings, where a mesh has Explicit axes: the compiler chooses them.

    Its result is sharded like `like`. Its arguments are pytrees of arrays; it closes over none.
    """
    sharding = explicit_sharding(like)
    if sharding is None:
        return function
    names = zip(sharding.mesh.axis_names, sharding.mesh.axis_types, strict=True)
    axes = tuple(name for name, kind in names if kind == AxisType.Explicit)
    return jax.sharding.auto_axes(function, axes=axes, out_sharding=sharding)


def reshard(array: jax.Array, spec: PartitionSpec) -> jax.Array:
    return jax.sharding.reshard(array, spec)


def beside(array: jax.Array, like: Any) -> jax.Array:
    """An array on the mesh that `like` is on, whose axes may be of other types in another part of a program."""
    mesh, own = jax.typeof(like).sharding.mesh, jax.typeof(array).sharding.mesh
    if own.empty or mesh.empty or own.axis_types == mesh.axis_types:
        return array
    return jax.sharding.reshard(array, NamedSharding(mesh, PartitionSpec()))


def varying_axes(array: Any) -> frozenset[str]:
    """The manual mesh axes along which an array differs from device to device."""
    aval = jax.typeof(array)
    return frozenset(aval.vma if hasattr(aval, "vma") else aval.mat.varying)


def make_varying(array: jax.Array, axes: Sequence[str]) -> jax.Array:
    """Let an array count as different on each device along manual mesh axes, where it does not yet."""
    new = tuple(axis for axis in axes if axis not in varying_axes(array))
    return jax.lax.pcast(array, new, to="varying") if new else array
