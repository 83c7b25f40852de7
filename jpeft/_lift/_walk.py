"""Walking a jaxpr: equations that no adapted weight reaches run in blocks, the others by the rule of their primitive.

A rule is `rule(context, equation, inputs, needed) -> outputs`; it may return adapted weights. Where it raises
`Unsupported`, or there is none, the equation runs on merged weights.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from ._codes import recomputed
from ._factors import BY_LAYER, factored
from ._jaxpr import (
    Equation,
    Jaxpr,
    constant_variables,
    constants,
    has_effects,
    is_literal,
    opened,
    run_block,
    run_equation,
    scope_of,
)
from ._record import REPLACED, Record, primitive_name
from ._weight import FULL_COPY, AdaptedWeight, Term, Unsupported, check_scaled, is_adapted, materialize

Rule = Callable[["Context", Equation, list[Any], list[bool]], list[Any]]


@dataclasses.dataclass(frozen=True)
class Context:
    """What every rule may need: the table of rules, the record of this trace, and where in the program it is.

    calls: the equations whose bodies are being walked, outermost first. spread: mesh axes along which arrays may
    differ from device to device where JAX does not keep track of it. named: whether products get their names for
    `jax.checkpoint`; those of tangents cannot, as JAX does not transpose names.
    """

    rules: dict[str, Rule]
    record: Record
    calls: tuple[int, ...] = ()
    spread: tuple[str, ...] = ()
    named: bool = True

    def inside(self, equation: Equation) -> "Context":
        return dataclasses.replace(self, calls=(*self.calls, id(equation)))

    def use(self, weight: AdaptedWeight, how: str, equation: Equation | None, *, only: Term | None = None) -> None:
        """Note how an equation uses a weight, or one term of it; raises ValueError if it is not dequantised yet."""
        check_scaled(weight, primitive_name(equation))
        self.record.use(weight, how, (*self.calls, id(equation)), primitive_name(equation), only)

    def dropout_index(self, term: Term, equation: Equation) -> int:
        """Which use of a module this is; the same however often its body is traced."""
        return self.record.dropout_index(term, (*self.calls, id(equation)))


def walk(context: Context, jaxpr: Jaxpr, args: Sequence[Any], needed: Sequence[bool] | None = None) -> list[Any]:
    """Evaluate a jaxpr whose arguments may be adapted weights; outputs that are not needed may be None."""
    inner = opened(jaxpr)
    context.record.keep(jaxpr)
    needed = [True] * len(inner.outvars) if needed is None else needed
    live, last_use = _liveness(inner, needed)
    values: dict[Any, Any] = dict(zip(constant_variables(jaxpr), constants(jaxpr), strict=True))
    values.update(zip(jaxpr.invars, args, strict=True))

    def read(atom: Any) -> Any:
        return atom.val if is_literal(atom) else values[atom]

    block: list[Equation] = []
    made: set[Any] = set()

    def flush(position: int) -> None:
        if not block:
            return
        inputs = dict.fromkeys(
            atom for eqn in block for atom in eqn.invars if not is_literal(atom) and atom not in made
        )
        outputs = [var for eqn in block for var in eqn.outvars if last_use.get(var, -1) >= position]
        values.update(zip(outputs, run_block(block, list(inputs), outputs, [values[v] for v in inputs]), strict=True))
        block.clear()
        made.clear()

    for position, equation in enumerate(inner.eqns):
        if not live[position]:
            continue
        if not any(is_adapted(values.get(atom)) for atom in equation.invars if not is_literal(atom)):
            block.append(equation)
            made.update(equation.outvars)
            continue
        flush(position)
        wanted = [last_use.get(var, -1) > position for var in equation.outvars]
        outputs = _apply(context, equation, [read(atom) for atom in equation.invars], wanted)
        values.update(zip(equation.outvars, outputs, strict=True))
    flush(len(inner.eqns))
    return [read(atom) if want else None for atom, want in zip(inner.outvars, needed, strict=True)]


def _liveness(jaxpr: Jaxpr, needed: Sequence[bool]) -> tuple[list[bool], dict[Any, int]]:
    """Which equations matter to the needed outputs, and where each variable is read last."""
    end = len(jaxpr.eqns)
    last = {atom: end for atom, want in zip(jaxpr.outvars, needed, strict=True) if want and not is_literal(atom)}
    live = [False] * end
    for position in reversed(range(end)):
        equation = jaxpr.eqns[position]
        if has_effects(equation) or any(var in last for var in equation.outvars):
            live[position] = True
            for atom in equation.invars:
                if not is_literal(atom):
                    last.setdefault(atom, position)
    return live, last


def _apply(context: Context, equation: Equation, inputs: list[Any], wanted: list[bool]) -> list[Any]:
    name = equation.primitive.name
    rule, reason = context.rules.get(name), "no rule"
    inputs = inputs if name in BY_LAYER else [factored(value) for value in inputs]
    if rule is not None:
        try:
            with scope_of(equation):
                return rule(context.inside(equation), equation, inputs, wanted)
        except Unsupported as unsupported:
            reason = str(unsupported)

    def on_merged(*own: Any) -> list[Any]:
        return run_equation(equation, [plain(context, equation, value, reason) for value in own])

    with scope_of(equation):
        return on_merged(*inputs) if has_effects(equation) else recomputed(on_merged, *inputs)


def plain(context: Context, equation: Equation | None, value: Any, reason: str) -> Any:
    """A value as an array: an adapted weight is merged, with a note why. No equation: a result of the function."""
    if not is_adapted(value):
        return value
    copied = value.terms and all(term.method is FULL_COPY for term in value.terms)
    how = REPLACED if copied else f"merged: {primitive_name(equation)} ({reason})"
    context.use(value, how, equation)
    try:
        return materialize(factored(value))
    except ValueError as error:  # of a method that has no merged weight
        raise ValueError(f"{error} ({how})") from error
