"""What the compiler says of a step: bytes, operations and collectives of one device, or why it refuses."""

import math
import re
import time
import warnings
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp

from .._hlo import collectives, flops
from .._hlo_bytes import bytes_moved
from ._results import CollectiveTotal, StepPlan
from ._steps import Step
from ._workload import Workload

# Of JAX 0.10; JAX 0.12 has none.
EFFORT = "exec_time_optimization_effort"
UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def measured(
    step: Step, work: Workload, rows: int, memory: int | None, effort: float = 0.0, details: bool = True
) -> StepPlan:
    """The plan of one step with a batch of this many rows.

    memory: bytes of a device. effort: of the compiler, from -1 to 1. details: whether the program is read for its
    operations and collectives, too. A program that is too large for the device is a result; other errors of the
    compiler are raised.
    """
    start = time.perf_counter()
    # The engine and the models ask the mesh what they are compiled for. Under strict promotion JAX cannot lower its own
    # attention in bfloat16 for CPU.
    with jax.set_mesh(work.mesh), jax.numpy_dtype_promotion("standard"), warnings.catch_warnings():
        # What a compiler without a device has made may be in the cache and cannot be read again: it is made anew.
        warnings.filterwarnings("ignore", message="Error reading persistent compilation cache entry")
        lowered = step.lower(rows)
        traced = time.perf_counter()
        try:
            compiled = lowered.compile({EFFORT: effort} if effort else None)
        except jax.errors.JaxRuntimeError as error:
            if EFFORT in str(error):
                raise ValueError(
                    f"effort is {effort}, but the compiler of JAX {jax.__version__} has no such setting: leave it at 0"
                ) from error
            if not is_refusal(str(error)):
                raise
            seconds = (traced - start, time.perf_counter() - traced)
            return _refused(step, work, rows, str(error), seconds)
    seconds = (traced - start, time.perf_counter() - traced)
    stats = compiled.memory_analysis()
    given = _given(step, work, rows)
    total = (
        stats.argument_size_in_bytes
        + stats.output_size_in_bytes
        - stats.alias_size_in_bytes
        + stats.temp_size_in_bytes
        + stats.generated_code_size_in_bytes
    )
    text = compiled.as_text() if details else None
    return StepPlan(
        **given,
        temporaries=stats.temp_size_in_bytes,
        other=total - stats.temp_size_in_bytes - sum(given.values()),
        total=total,
        fits=None if memory is None else total <= memory,
        refusal=None,
        flops=None if text is None else flops(text),
        moved=None if text is None else bytes_moved(text),
        collectives=() if text is None else _totals(text),
        seconds=seconds,
    )


def _refused(step: Step, work: Workload, rows: int, message: str, seconds: tuple[float, float]) -> StepPlan:
    given, needed = _given(step, work, rows), needed_bytes(message)
    return StepPlan(
        **given,
        temporaries=None,
        other=None,
        total=needed,
        fits=False,
        refusal=" ".join(message.split())[:300],
        flops=None,
        moved=None,
        collectives=(),
        seconds=seconds,
    )


def is_refusal(message: str) -> bool:
    """Whether an error of the compiler or the runtime says that memory does not suffice."""
    return "RESOURCE_EXHAUSTED" in message or "out of memory" in message.lower()


def needed_bytes(message: str) -> int | None:
    """Of a refusal, what the program would need; None if it does not say.

    >>> needed_bytes("Ran out of memory in memory space hbm. Used 24.50G of 15.75G hbm.") == int(24.5 * 2**30)
    True
    """
    found = re.search(r"Used ([\d.]+)([KMGT]?) of|required for HLO temporaries \(([\d.]+)([KMGT]?)\)", message)
    if not found:
        return None
    number, unit = (found.group(1), found.group(2)) if found.group(1) else (found.group(3), found.group(4))
    return int(float(number) * UNITS[unit])


def _given(step: Step, work: Workload, rows: int) -> dict[str, int]:
    return {
        "parameters": device_bytes(step.parameters),
        "adapter": device_bytes(step.adapter),
        "optimizer": device_bytes(step.optimizer),
        "batch": device_bytes(work.batch(rows)),
    }


def device_bytes(tree: Any) -> int:
    """Bytes of a tree of shapes on one device, before the device's layout pads them."""
    return sum(_device_bytes(leaf) for leaf in jax.tree.leaves(tree))


def _device_bytes(leaf: Any) -> int:
    sharding = getattr(leaf, "sharding", None)
    shape = leaf.shape if sharding is None else sharding.shard_shape(tuple(leaf.shape))
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return 0
    return math.ceil(math.prod(shape) * bits_of(leaf.dtype) / 8)


def bits_of(dtype: Any) -> int:
    """Bits that an element takes on a device."""
    dtype = jnp.dtype(dtype)
    name = re.fullmatch(r"u?int([24])|float4\w*", dtype.name)
    return dtype.itemsize * 8 if not name else int(name.group(1) or 4)


def _totals(text: str) -> tuple[CollectiveTotal, ...]:
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for one in collectives(text):
        counts[one.kind] += one.times
        sizes[one.kind] += one.total
    return tuple(CollectiveTotal(kind, counts[kind], sizes[kind]) for kind in sorted(counts))
