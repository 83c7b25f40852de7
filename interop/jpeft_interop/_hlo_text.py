"""The text of a compiled program, read: computations, their instructions, and how often each one runs in a step."""

import dataclasses
import functools
import math
import re
from typing import NamedTuple


class Array(NamedTuple):
    """One array of a result: its element type in XLA's words ("bf16"), and its shape on one device."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.ceil(math.prod(self.shape) * _bits(self.dtype) / 8)


@dataclasses.dataclass(frozen=True)
class Instruction:
    name: str
    opcode: str
    # The arrays of the result in order, tuples flattened, and the first level of the tuple: arrays an element.
    result: tuple[Array, ...]
    elements: tuple[tuple[Array, ...], ...]
    operands: tuple[str, ...]
    # What stands between the parentheses, and what follows them: attributes, metadata, backend_config.
    arguments: str
    attributes: str
    root: bool

    def attribute(self, pattern: str) -> str | None:
        """The first group of the pattern where it matches the attributes, else None."""
        found = re.search(pattern, self.attributes)
        return found.group(1) if found else None

    @property
    def called(self) -> dict[str, tuple[str, ...]]:
        """The names of the computations it calls, by the attribute that names them."""
        return {name: tuple(_NAMES.findall(names)) for name, names in _CALLED.findall(self.attributes)}


@dataclasses.dataclass(frozen=True)
class Computation:
    name: str
    instructions: tuple[Instruction, ...]

    @functools.cached_property
    def by_name(self) -> dict[str, Instruction]:
        return {instruction.name: instruction for instruction in self.instructions}

    @property
    def root(self) -> Instruction:
        return next((one for one in self.instructions if one.root), self.instructions[-1])

    def operands(self, instruction: Instruction) -> list[Instruction]:
        return [self.by_name[name] for name in instruction.operands if name in self.by_name]


@dataclasses.dataclass(frozen=True)
class Program:
    computations: dict[str, Computation]
    entry: str


_BITS = {"pred": 8, "token": 0, "opaque": 0, "tf32": 32}
_ARRAY = re.compile(r"([a-z]\w*)\[([^\]]*)\](?:\{[^}]*\})?")
_INSTRUCTION = re.compile(r"\s*(ROOT )?%?([\w.\-]+) = ")
_OPCODE = re.compile(r"\s*([\w\-]+)\(")
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_NAMES = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(
    r"\b(calls|to_apply|body|condition|branch_computations|true_computation|false_computation)="
    r"(%[\w.\-]+|\{[^}]*\})"
)
_COMMENT = re.compile(r"/\*.*?\*/")


def program(text: str) -> Program:
    """The program that `jax.stages.Compiled.as_text()` prints; raises ValueError if the text is none.

    >>> parsed = program('''ENTRY %main (x: f32[2,3]) -> f32[2,3] {
    ...   %x = f32[2,3]{1,0} parameter(0)
    ...   ROOT %negate = f32[2,3]{1,0} negate(%x)
    ... }''')
    >>> [(one.opcode, one.result) for one in parsed.computations[parsed.entry].instructions][-1]
    ('negate', (Array(dtype='f32', shape=(2, 3)),))
    """
    computations: dict[str, Computation] = {}
    entry, name, gathered = "", "", []
    for line in text.splitlines():
        header = _COMPUTATION.match(line)
        if header:
            name, gathered = header.group(2), []
            entry = name if header.group(1) else entry
        elif line.startswith("}") and name:
            computations[name], name = Computation(name, tuple(gathered)), ""
        elif name and (instruction := _instruction(line)):
            gathered.append(instruction)
    if not entry:
        raise ValueError(
            "expected the text of a compiled program, with an ENTRY computation, as jax.stages.Compiled.as_text() "
            f"prints it, not {text[:80]!r}"
        )
    return Program(computations, entry)


def _instruction(line: str) -> Instruction | None:
    start = _INSTRUCTION.match(line)
    if not start:
        return None
    line = _COMMENT.sub("", line) if "/*" in line else line
    result_end = _end(line, start.end())
    opcode = _OPCODE.match(line, result_end)
    if not opcode:
        return None
    arguments_end = _end(line, opcode.end() - 1)
    arguments = line[opcode.end() : arguments_end - 1]
    elements = _elements(line[start.end() : result_end])
    return Instruction(
        start.group(2),
        opcode.group(1),
        tuple(array for element in elements for array in element),
        elements,
        tuple(_NAMES.findall(arguments)),
        arguments,
        line[arguments_end:],
        bool(start.group(1)),
    )


def _end(line: str, start: int) -> int:
    """Where what begins at `start` ends: a tuple in parentheses, or else an array's type."""
    if line[start] != "(":
        array = _ARRAY.match(line, start)
        return array.end() if array else start
    depth = 0
    for index in range(start, len(line)):
        depth += (line[index] == "(") - (line[index] == ")")
        if not depth:
            return index + 1
    return len(line)


def _elements(text: str) -> tuple[tuple[Array, ...], ...]:
    if not text.startswith("("):
        return (_arrays(text),)
    pieces, depth, begin = [], 0, 1
    for index, letter in enumerate(text):
        depth += (letter in "([{") - (letter in ")]}")
        if (letter == "," and depth == 1) or (not depth and index > begin):
            pieces.append(text[begin:index])
            begin = index + 1
    return tuple(_arrays(piece) for piece in pieces)


def _arrays(text: str) -> tuple[Array, ...]:
    return tuple(
        Array(dtype, tuple(int(size.strip(" <=")) for size in sizes.split(",") if size.strip()))
        for dtype, sizes in _ARRAY.findall(text)
    )


def _bits(dtype: str) -> int:
    if dtype in _BITS:
        return _BITS[dtype]
    # "bf16", "s4", "u32", "f8e4m3fn", "c64": the first number is the width.
    return int(re.findall(r"\d+", dtype)[0])
