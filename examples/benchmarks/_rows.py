"""Rows of a table of times, in jpeft and in PyTorch PEFT: timed together, in random order, and compared."""

import dataclasses
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tqdm import tqdm

NONE = "PyTorch PEFT has none"


@dataclasses.dataclass(frozen=True)
class Row:
    """run: what is timed; if it returns a function, that undoes it off the clock. to: the row to compare with."""

    run: Callable[[], Any]
    to: str | None = None


Rows = dict[str, Row]


Clocks = tuple[float, float]  # wall, processor
Seconds = dict[tuple[int, str], list[Clocks]]


def timed(runs: Mapping[tuple[int, str], Callable[[], Any]], repeats: int) -> Seconds:
    """(wall, processor) seconds of each run in each round."""
    order, shuffle = list(runs), random.Random(0).shuffle
    seconds: Seconds = {name: [] for name in runs}
    for number in range(repeats + 1):
        shuffle(order)
        for name in order:
            own = _clocks(runs[name])
            if number:
                seconds[name].append(own)
    return seconds


Pair = tuple[Callable[[], Any], Callable[[], Any]]


def paired(pairs: Mapping[tuple[int, str], Pair], repeats: int) -> dict[tuple[int, str], list[tuple[Clocks, Clocks]]]:
    """Each run and, right beside it, what it is compared with, in each round: [(seconds, seconds of the other)]."""
    order, shuffle = list(pairs), random.Random(0).shuffle
    seconds: dict[tuple[int, str], list[tuple[Clocks, Clocks]]] = {name: [] for name in pairs}
    for number in range(repeats + 1):
        shuffle(order)
        for name in tqdm(order, desc=f"round {number} of {repeats}", leave=False):
            run, other = pairs[name]
            # First one, then the other: what runs first finds caches that somebody else filled.
            own, others = (_clocks(run), _clocks(other)) if number % 2 else (_clocks(other), _clocks(run))[::-1]
            if number:
                seconds[name].append((own, others))
    return seconds


def _clocks(run: Callable[[], Any]) -> Clocks:
    wall, processor = time.perf_counter(), time.process_time()
    undo = run()
    seconds = time.perf_counter() - wall, time.process_time() - processor
    if callable(undo):
        undo()
    return seconds


def summary(name: str, to: str | None, has_peft: bool, seconds: Seconds) -> dict[str, Any]:
    row: dict[str, Any] = {"name": name, "to": to, "jpeft": medians(seconds[0, name])}
    if to is not None:
        row["ratio"] = ratio(seconds[0, name], seconds[0, to])
    if has_peft:
        row["peft"] = medians(seconds[1, name])
        row["to_peft"] = ratio(seconds[0, name], seconds[1, name])
        if to is not None and (1, to) in seconds:
            row["peft_ratio"] = ratio(seconds[1, name], seconds[1, to])
    return row


def medians(times: Sequence[Clocks]) -> list[float]:
    return [1000 * statistics.median(own) for own in zip(*times, strict=True)]


def ratio(times: Sequence[Clocks], to: Sequence[Clocks], clock: int = 0) -> list[float]:
    """Median and quartiles of the ratio of wall times; clock 1: of the processor's."""
    low, middle, high = statistics.quantiles([a[clock] / b[clock] for a, b in zip(times, to, strict=True)], n=4)
    return [middle, low, high]


def table(report: list[dict[str, Any]]) -> str:
    columns = "what", "jpeft, ms (processor)", "PyTorch PEFT, ms", "jpeft / PEFT", "jpeft / row", "PEFT / row", "row"
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for row in report:
        times = [f"{row[side][0]:.2f} ({row[side][1]:.2f})" if side in row else NONE for side in ("jpeft", "peft")]
        ratios = [_ratio_text(row.get(name)) for name in ("to_peft", "ratio", "peft_ratio")]
        lines.append(f"| {' | '.join([row['name'], *times, *ratios, row['to'] or ''])} |")
    return "\n".join(lines)


def _ratio_text(own: list[float] | None) -> str:
    return "" if own is None else f"{own[0]:.3g} ({own[1]:.3g} to {own[2]:.3g})"
