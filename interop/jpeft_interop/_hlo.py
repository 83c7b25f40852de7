"""What a compiled program does in one step, read off its text: its collectives and its floating-point operations."""

import dataclasses
import math
import re
from collections.abc import Iterator

from ._hlo_runs import Run, operand, runs
from ._hlo_text import Array, Program, program

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One array that devices exchange.

    `shape` and `bytes` are those of the result on one device (what an all-gather has gathered, what a reduce-scatter
    leaves), `times` is how often a step does it: the trips of the loops around it. `group` counts the devices that
    take part together, 0 for all. `source` is the operation in the JAX program that asked for it, where it is known.
    """

    kind: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int
    times: int
    group: int
    name: str
    source: str

    @property
    def total(self) -> int:
        """Bytes a step."""
        return self.bytes * self.times


def collectives(text: str) -> tuple[Collective, ...]:
    """The collectives of one step of a compiled program, in its order; one entry for each array exchanged.

    `text` is what `jax.stages.Compiled.as_text()` gives on CPU, GPU or TPU. A pair of start and done counts once, and
    so does one that the TPU compiler spreads over several fusions. A loop whose trips the program does not tell counts
    once. Raises ValueError if the text is no compiled program.

    >>> collectives('''ENTRY %main (x: f32[2,8]) -> f32[8,8] {
    ...   %x = f32[2,8]{1,0} parameter(0)
    ...   ROOT %gathered = f32[8,8]{1,0} all-gather(%x), channel_id=1, replica_groups=[1,4]<=[4], dimensions={0}
    ... }''')[0]
    Collective(kind='all-gather', dtype='f32', shape=(8, 8), bytes=256, times=1, group=4, name='gathered', source='')
    """
    return tuple(_collectives(program(text)))


def _collectives(parsed: Program) -> Iterator[Collective]:
    spread: set[tuple[str, str]] = set()
    for run in runs(parsed):
        one = run.instruction
        kind = one.opcode.removesuffix("-start")
        if kind not in KINDS:
            continue
        # The TPU compiler repeats a collective in each fusion that it overlaps with, all under one channel.
        if run.fusions and "async_collective_fusion_config" in one.attributes:
            key = (run.caller.name, one.attribute(r"channel_id=(\d+)") or one.name)
            if key in spread:
                continue
            spread.add(key)
        arrays = _exchanged(run, kind)
        scattered = kind == "all-reduce" and bool(run.fusions) and run.holder.name.startswith("all-reduce-scatter")
        if scattered:
            kind, arrays = "reduce-scatter", run.fusions[-1].result
        group, source = _group(one.attributes), one.attribute(r'op_name="([^"]*)"') or ""
        for dtype, shape in arrays:
            size = Array(dtype, shape).bytes
            yield Collective(kind, dtype, shape, size, run.times, group, one.name, source)


def _exchanged(run: Run, kind: str) -> tuple[Array, ...]:
    one = run.instruction
    if not one.opcode.endswith("-start") or kind == "all-reduce":
        return one.result
    # A start holds its operands first and what it will have received second; contexts may follow.
    return one.elements[1] if len(one.elements) > 1 else one.result


def _group(attributes: str) -> int:
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", attributes)
    if listed:
        return len(listed.group(1).split(","))
    numbered = re.search(r"replica_groups=\[(\d+),(\d+)\]<=", attributes)
    if numbered:
        return int(numbered.group(2))
    meshed = re.search(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}", attributes)
    if meshed:
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", meshed.group(1)))
        return math.prod(int(sizes[name]) for name in re.findall(r"'([^']+)'", meshed.group(2)))
    paired = re.search(r"source_target_pairs=\{(.*?)\}\}", attributes)
    return 2 if paired else 0


def flops(text: str) -> int:
    """Floating-point operations of one step on one device: two for each multiply-add of a product or a convolution.

    Unlike `cost_analysis()`, which counts a loop's body once, it counts each trip. Elementwise work is left out, so the
    count of a program of matrix products is exact. Products stand as `dot`, as a convolution with or without batch
    axes made spatial (TPU), or as a library call (GPU; on TPU what the kernel declares). All branches of a
    conditional count. Raises ValueError if the text is no compiled program.

    >>> flops('''ENTRY %main (x: f32[2,3], w: f32[3,5]) -> f32[2,5] {
    ...   %x = f32[2,3]{1,0} parameter(0)
    ...   %w = f32[3,5]{1,0} parameter(1)
    ...   ROOT %dot = f32[2,5]{1,0} dot(%x, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
    ... }''')
    60
    """
    return sum(run.times * _flops(run) for run in runs(program(text)))


def _flops(run: Run) -> int:
    one = run.instruction
    if one.opcode == "dot":
        return 2 * _size(one.result[0]) * _contracted(run, r"lhs_contracting_dims=\{([\d,]*)\}")
    if one.opcode == "convolution":
        return _convolution(run)
    return _library_call(run) if one.opcode == "custom-call" else 0


def _library_call(run: Run) -> int:
    one = run.instruction
    # A Mosaic kernel on TPU, such as a ragged product, says itself what it costs.
    estimate = one.attribute(r'"cost_estimate":\{"flops":"(\d+)"')
    if estimate:
        return int(estimate)
    if re.search(r'custom_call_target="[^"]*(gemm|matmul)', one.attributes):
        return 2 * _size(one.result[0]) * _contracted(run, r'"lhs_contracting_dimensions":\[([\d,"]*)\]')
    return 0


def _size(array: Array) -> int:
    return math.prod(array.shape)


def _contracted(run: Run, pattern: str) -> int:
    axes = re.findall(r"\d+", run.instruction.attribute(pattern) or "")
    shape = operand(run, 0).shape
    return math.prod(shape[int(axis)] for axis in axes)


def _convolution(run: Run) -> int:
    one = run.instruction
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", one.attributes)
    if not labels:
        return 0
    left, kernel, out = labels.groups()
    image, weights, result = operand(run, 0).shape, operand(run, 1).shape, one.result[0].shape
    window = _window(one.attributes, sum(letter.isdigit() for letter in out))
    pairs = 1
    for axis, settings in enumerate(window):
        digit = str(axis)
        pairs *= _valid_pairs(image[left.index(digit)], result[out.index(digit)], **settings)
    # Of the kernel's `i` each group of features holds its share already; a batch group's share is the result's batch.
    return 2 * result[out.index("b")] * result[out.index("f")] * weights[kernel.index("i")] * pairs


def _window(attributes: str, axes: int) -> list[dict[str, int]]:
    text = re.search(r"window=\{([^}]*)\}", attributes)
    fields = dict(re.findall(r"(\w+)=([^ ]+)", text.group(1))) if text else {}

    def numbers(name: str, default: str) -> list[str]:
        return fields[name].split("x") if name in fields else [default] * axes

    return [
        {
            "size": int(size),
            "stride": int(stride),
            "low": int(pad.split("_")[0]),
            "dilation": int(left),
            "step": int(right),
        }
        for size, stride, pad, left, right in zip(
            numbers("size", "1"),
            numbers("stride", "1"),
            numbers("pad", "0_0"),
            numbers("lhs_dilate", "1"),
            numbers("rhs_dilate", "1"),
            strict=True,
        )
    ]


def _valid_pairs(image: int, result: int, size: int, stride: int, low: int, dilation: int, step: int) -> int:
    """Pairs of a result's place and a kernel's place that meet a true element: neither padding nor dilation."""
    count = 0
    for place in range(size):
        shift = place * step - low
        # Places `position` of the result with (position * stride + shift) divisible by the dilation and inside.
        if stride == dilation == 1:
            count += max(0, min(result, image - shift) - max(0, -shift))
        else:
            count += sum(
                0 <= at < image * dilation and at % dilation == 0
                for at in range(shift, shift + result * stride, stride)
            )
    return count
