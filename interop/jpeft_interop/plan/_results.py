"""What a plan says: bytes and operations of a step on one device, and whether it fits."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class CollectiveTotal:
    """All collectives of one kind in a step: how many, and the bytes of their results, on one device."""

    kind: str
    count: int
    bytes: int


@dataclasses.dataclass(frozen=True)
class StepPlan:
    """One way to train, on one device. Bytes unless said otherwise; None where the compiler did not get that far.

    parameters, adapter, optimizer, batch: what goes in, as its shapes say. temporaries: what the step needs beside, as
    compiled. other: padding of the device's layout, results that are not written in place, and the program. total: all
    of these. fits: whether that is within the device's memory; None if that is not known. refusal: the compiler's
    words. flops: of products and convolutions, in one step. moved: bytes read and written in one step, an estimate.
    Both count each trip of a loop. seconds: of tracing, and of compiling. largest_batch: rows of all devices with
    which it still fits, 0 if not even the fewest do, None if it was not searched for.
    """

    parameters: int
    adapter: int
    optimizer: int
    batch: int
    temporaries: int | None
    other: int | None
    total: int | None
    fits: bool | None
    refusal: str | None
    flops: int | None
    moved: int | None
    collectives: tuple[CollectiveTotal, ...]
    seconds: tuple[float, float]
    largest_batch: int | None = None


@dataclasses.dataclass(frozen=True)
class Plan:
    """What `plan` found: `settings` as given and completed, `memory` of one device in bytes or None, and the steps.

    adapter: with the method asked for. floor: the same step with nothing adapted, its gradient going through all
    activations and to no weight; None if left out. full: all parameters trained, likewise.
    `print` shows a table; `as_dict` and `as_json` have the numbers.
    """

    settings: Mapping[str, Any]
    memory: int | None
    adapter: StepPlan
    full: StepPlan | None
    floor: StepPlan | None

    @property
    def steps(self) -> dict[str, StepPlan]:
        every = {str(self.settings["method"]): self.adapter, "full fine-tuning": self.full, "frozen": self.floor}
        return {name: step for name, step in every.items() if step is not None}

    def as_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "settings": dict(self.settings)}

    def as_json(self) -> str:
        return json.dumps(self.as_dict(), indent=2)

    def __str__(self) -> str:
        from ._table import table

        return table(self)
