"""Rules for functions with derivative rules of their own.

The forward pass is walked, so its products stay low-rank. The user's rule is kept: it asks for (or gives) the
derivative by the whole weight, which is then carried on to the adapter's arrays through the merged weight.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ._codes import stand_in
from ._dropout import without_key
from ._jaxpr import Equation, custom_jvp_rule, custom_vjp_rules, is_floating, is_number, opened, trace
from ._walk import Context, Rule, plain, walk
from ._weight import Unsupported, is_adapted, materialize

DIFFERENTIATED_THROUGH = "jpeft_differentiated_through"
"""The name of a jitted function that is all that a function with a rule of its own computes, where that rule is only
there for speed: of adapted weights the function itself is differentiated, so that their products stay low-rank."""


def custom_jvp_call(context: Context, equation: Equation, inputs: list[Any], needed: list[bool]) -> list[Any]:
    if equation.params["num_consts"] or equation.params["symbolic_zeros"]:
        raise Unsupported("custom_jvp with constants or symbolic zeros")
    jaxpr, rule = equation.params["call_jaxpr"], custom_jvp_rule(equation)

    @jax.custom_jvp
    def function(*args: Any) -> list[Any]:
        return _arrays(context, equation, walk(context, jaxpr, args))

    def jvp(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[list[Any], list[Any]]:
        dense = [_dense_tangent(p, t) for p, t in zip(primals, tangents, strict=True)]
        zero = [not is_floating(jax.typeof(_base(p))) for p in primals]
        derivative, zeros_out = rule(zero)
        given = [t for t, z in zip(dense, zero, strict=True) if not z]
        linear = dataclasses.replace(context, named=False)
        outputs = _arrays(context, equation, walk(linear, derivative, [*primals, *given]))
        values, changes = outputs[: len(zeros_out)], iter(outputs[len(zeros_out) :])
        return values, [_zero_tangent(v) if z else next(changes) for v, z in zip(values, zeros_out, strict=True)]

    function.defjvp(jvp)
    return function(*inputs)


def _arrays(context: Context, equation: Equation, values: Sequence[Any]) -> list[Any]:
    return [plain(context, equation, value, "it or its derivative returns the weight") for value in values]


def _base(value: Any) -> Any:
    return stand_in(value.base) if is_adapted(value) else value


def _dense_tangent(primal: Any, tangent: Any) -> Any:
    return jax.jvp(materialize, (primal,), (tangent,))[1] if is_adapted(primal) else tangent


def _zero_tangent(value: Any) -> Any:
    if is_floating(jax.typeof(value)):
        return jnp.zeros_like(value)
    return np.zeros(jnp.shape(value), jax.dtypes.float0)


def custom_vjp_call(context: Context, equation: Equation, inputs: list[Any], needed: list[bool]) -> list[Any]:
    params = equation.params
    if [inner.params.get("name") for inner in opened(params["call_jaxpr"]).eqns] == [DIFFERENTIATED_THROUGH]:
        return walk(context, params["call_jaxpr"], inputs, needed)
    if params["num_consts"] or params["symbolic_zeros"]:
        raise Unsupported("custom_vjp with constants or symbolic zeros")
    jaxpr = params["call_jaxpr"]

    @jax.custom_vjp
    def function(*args: Any) -> list[Any]:
        return _arrays(context, equation, walk(context, jaxpr, args))

    def forward(*args: Any) -> tuple[list[Any], tuple[Any, ...]]:
        rule, forwarded, _ = custom_vjp_rules(equation)
        outputs = walk(context, rule, args)
        computed = iter(outputs[: sum(source is None for source in forwarded)])
        values = outputs[sum(source is None for source in forwarded) :]
        residuals = [next(computed) if source is None else args[source] for source in forwarded]
        return _arrays(context, equation, values), (residuals, args)

    def backward(saved: tuple[Any, ...], cotangents: list[Any]) -> tuple[Any, ...]:
        residuals, args = saved
        rule, absent = _traced_backward(custom_vjp_rules(equation)[2], residuals, cotangents)
        # Which inputs the forward pass has dropped, a rule cannot tell: it gives the derivative without dropout.
        given = iter(_arrays(context, equation, walk(context, rule, [*map(without_key, residuals), *cotangents])))
        gradients = [None if missing else next(given) for missing in absent]
        return tuple(_pulled_back(arg, gradient) for arg, gradient in zip(args, gradients, strict=True))

    function.defvjp(forward, backward)
    return function(*inputs)


def _traced_backward(
    rule: Callable[..., Any], residuals: Sequence[Any], cotangents: Sequence[Any]
) -> tuple[Any, list[bool]]:
    """The backward rule as a jaxpr on plain arrays, and which of its results are zero."""
    absent: list[bool] = []

    def present(*args: Any) -> list[Any]:
        results = rule(*args)
        absent[:] = [not is_number(result) for result in results]
        return [result for result in results if is_number(result)]

    # The values themselves are given, for their types tell more than shapes: shardings, varying axes, weak types.
    return trace(present, *map(_base, (*residuals, *cotangents))), absent


def _pulled_back(arg: Any, gradient: Any) -> Any:
    """The gradient by an argument, from the gradient by its merged value."""
    if gradient is None:
        return None
    if not is_adapted(arg):
        return gradient
    _, pull = jax.vjp(materialize, arg)
    return pull(gradient)[0]


CUSTOM: dict[str, Rule] = {"custom_jvp_call": custom_jvp_call, "custom_vjp_call": custom_vjp_call}
