"""Bytes that a compiled program moves in one step: an estimate from its text."""

from ._hlo_runs import Run, operand, runs
from ._hlo_text import Array, Computation, Instruction, Program, program

# What names or reshapes a buffer moves nothing.
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all",
    "partition-id", "replica-id", "opt-barrier", "add-dependency", "async-done", "async-update", "async-start",
}  # fmt: skip


def bytes_moved(text: str) -> int:
    """Bytes that one step reads and writes on one device: an estimate, the operands and results of each instruction.

    What a fusion keeps inside itself does not count; of an operand or a result that is only sliced or updated in place
    the slice alone counts. Like the compiler's own `bytes accessed` it knows no caches, but it counts each trip of a
    loop. Raises ValueError if the text is no compiled program.

    >>> bytes_moved('''ENTRY %main (x: f32[2,3]) -> f32[2,3] {
    ...   %x = f32[2,3]{1,0} parameter(0)
    ...   ROOT %negate = f32[2,3]{1,0} negate(%x)
    ... }''')
    48
    """
    parsed = program(text)
    return sum(run.times * _moved(parsed, run) for run in runs(parsed) if not run.fusions)


def _moved(parsed: Program, run: Run) -> int:
    one = run.instruction
    if one.opcode in _FREE or one.opcode.endswith("-done"):
        return 0
    if one.opcode in ("dynamic-slice", "slice", "gather"):
        return 2 * _bytes(one.result)
    if one.opcode in ("dynamic-update-slice", "scatter"):
        return 2 * operand(run, 1 if one.opcode == "dynamic-update-slice" else 2).bytes
    if one.opcode.endswith("-start"):
        return _bytes(one.elements[0]) + (_bytes(one.elements[1]) if len(one.elements) > 1 else _bytes(one.result))
    operands = [_bytes(operand.result) for operand in run.holder.operands(one)]
    if one.opcode != "fusion":
        return sum(operands) + _bytes(one.result)
    inner = parsed.computations[one.called["calls"][0]]
    read = [_read(inner, index, size) for index, size in enumerate(operands)]
    return sum(read) + _written(inner, one)


def _bytes(arrays: tuple[Array, ...]) -> int:
    return sum(array.bytes for array in arrays)


def _read(inner: Computation, index: int, size: int) -> int:
    parameter = next(
        (one for one in inner.instructions if one.opcode == "parameter" and one.arguments == str(index)), None
    )
    if parameter is None:
        return size
    users = [one for one in inner.instructions if parameter.name in one.operands]
    if not users:
        return 0
    sliced = 0
    for user in users:
        if user.opcode in ("dynamic-slice", "slice", "gather") and user.operands[0] == parameter.name:
            sliced += _bytes(user.result)
        elif user.opcode == "dynamic-update-slice" and user.operands[0] == parameter.name:
            continue
        else:
            return size
    return min(size, sliced)


def _written(inner: Computation, one: Instruction) -> int:
    root = inner.root
    if root.opcode == "bitcast":
        root = inner.by_name.get(root.operands[0], root)
    if root.opcode == "dynamic-update-slice":
        return inner.by_name[root.operands[1]].result[0].bytes
    return _bytes(one.result)
