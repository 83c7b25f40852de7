"""How often each instruction of a compiled program runs in one step: calls followed, loops counted by their trips."""

from collections.abc import Iterator
from typing import NamedTuple

from ._hlo_text import Array, Computation, Instruction, Program


class Run(NamedTuple):
    """An instruction, the computation that holds it, the one that runs it outside all fusions, and the loops' trips."""

    instruction: Instruction
    holder: Computation
    caller: Computation
    times: int
    # The fusions entered on the way, the innermost last.
    fusions: tuple[Instruction, ...]


def operand(run: Run, index: int) -> Array:
    """The array that an instruction is given as its operand of this number."""
    return run.holder.by_name[run.instruction.operands[index]].result[0]


def runs(parsed: Program) -> Iterator[Run]:
    """Each instruction of a step as often as something calls it, with the trips of the loops around it.

    A loop whose trips the program does not tell counts once. Every branch of a conditional is visited.
    """
    yield from _runs(parsed, parsed.computations[parsed.entry], None, 1, ())


def _runs(
    parsed: Program, holder: Computation, caller: Computation | None, times: int, fusions: tuple[Instruction, ...]
) -> Iterator[Run]:
    caller = caller or holder
    for one in holder.instructions:
        yield Run(one, holder, caller, times, fusions)
        for target, trips in _calls(parsed, holder, one):
            inside = one.opcode == "fusion"
            yield from _runs(
                parsed, target, caller if inside else None, times * trips, (*fusions, one) if inside else ()
            )


def _calls(parsed: Program, holder: Computation, one: Instruction) -> Iterator[tuple[Computation, int]]:
    called = one.called
    if one.opcode == "while":
        trips = loop_trips(parsed, holder, one)
        names = [(called["body"], trips), (called["condition"], trips)]
    elif one.opcode in ("fusion", "async-start"):
        names = [(called.get("calls", ()), 1)]
    elif one.opcode == "call":
        names = [(called.get("to_apply", ()), 1)]
    elif one.opcode == "conditional":
        names = [(value, 1) for value in called.values()]
    else:
        # A reduction's or a sort's own small computation: it holds scalars.
        names = []
    for group, trips in names:
        for name in group:
            if name in parsed.computations:
                yield parsed.computations[name], trips


def loop_trips(parsed: Program, holder: Computation, loop: Instruction) -> int:
    """How often the body runs: what the compiler says, or its counter does, else 1.

    The counter is the element of the loop's tuple that the condition compares with a constant. It begins where the
    loop's operand does and grows by what the body adds: by 1 from 0 in JAX's own loops, by 2 in those of the TPU
    compiler that exchange a weight's pieces while it multiplies with them.
    """
    known = loop.attribute(r'"known_trip_count":\{"n":"(\d+)"')
    if known:
        return int(known)
    called = loop.called
    condition, body = (parsed.computations.get(called.get(name, ("",))[0]) for name in ("condition", "body"))
    found = condition and _bound(parsed, condition)
    if not found:
        return 1
    place, bound = found
    start = _element(holder, loop.operands[0], place) if loop.operands else None
    step = body and _step(holder, loop, body, place)
    return max(-(-(bound - (start or 0)) // (step or 1)), 0)


def _bound(parsed: Program, condition: Computation) -> tuple[int, int] | None:
    """The counter's place in the tuple, and the first value with which the loop ends."""
    compared, operands = condition.root, [condition.by_name.get(name) for name in condition.root.operands]
    if compared.opcode == "fusion":
        inner = parsed.computations.get(compared.called["calls"][0])
        if inner is None:
            return None
        arguments, compared = operands, inner.root
        operands = [_argument(inner.by_name.get(name), arguments) for name in compared.operands]
    direction = compared.attribute(r"direction=(\w+)")
    if compared.opcode != "compare" or len(operands) != 2 or direction not in ("LT", "LE", "NE"):
        return None
    counter, bound = operands[0], _constant(condition, operands[1])
    counter = _source(condition, counter)
    if counter is None or bound is None or counter.opcode != "get-tuple-element":
        return None
    return _index(counter), bound + (direction == "LE")


def _argument(one: Instruction | None, arguments: list[Instruction | None]) -> Instruction | None:
    """What a fusion was given where it names a parameter of its own."""
    return arguments[int(one.arguments)] if one is not None and one.opcode == "parameter" else one


def _step(holder: Computation, loop: Instruction, body: Computation, place: int) -> int | None:
    """What the body adds to the counter; None if that is hidden."""
    if body.root.opcode != "tuple":
        return None
    new = _source(body, body.by_name.get(body.root.operands[place]))
    if new is None or new.opcode not in ("add", "fusion"):
        return None
    for name in new.operands:
        one = _source(body, body.by_name.get(name))
        if one is None or (one.opcode == "get-tuple-element" and _index(one) == place):
            continue
        if one.opcode == "get-tuple-element":
            return _element(holder, loop.operands[0], _index(one))
        return _constant(body, one)
    return None


def _element(holder: Computation, name: str, place: int) -> int | None:
    """The number that a tuple holds at a place, if it is a constant."""
    made = _source(holder, holder.by_name.get(name))
    if made is None or made.opcode != "tuple":
        return None
    return _constant(holder, holder.by_name.get(made.operands[place]))


def _constant(holder: Computation, one: Instruction | None) -> int | None:
    one = _source(holder, one)
    return int(one.arguments) if one is not None and one.opcode == "constant" and one.arguments.isdigit() else None


def _source(holder: Computation, one: Instruction | None) -> Instruction | None:
    """What an instruction is a copy of."""
    while one is not None and one.opcode in ("copy", "bitcast", "copy-done", "copy-start", "convert"):
        one = holder.by_name.get(one.operands[0])
    return one


def _index(one: Instruction) -> int:
    return int(one.attribute(r"index=(\d+)") or 0)
