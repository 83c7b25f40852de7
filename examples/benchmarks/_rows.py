"""Rows of a table of times, in jpeft and in PyTorch PEFT: timed together, in random order, and compared."""

import dataclasses
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

NONE = "PyTorch PEFT has none"


@dataclasses.dataclass(frozen=True)
class Row:
    """run: what is timed; if it returns a function, that undoes it off the clock. to: the row to compare with."""

    run: Callable[[], Any]
    to: str | None = None


Rows = dict[str, Row]


Seconds = dict[tuple[int, str], list[tuple[float, float]]]


def timed(runs: Mapping[tuple[int, str], Callable[[], Any]], repeats: int) -> Seconds:
    """(wall, processor) seconds of each run in each round."""
    order, shuffle = list(runs), random.Random(0).shuffle
    seconds: Seconds = {name: [] for name in runs}
    for number in range(repeats + 1):
        shuffle(order)
        for name in order:
            wall, processor = time.perf_counter(), time.process_time()
            undo = runs[name]()
            if number:
                seconds[name].append((time.perf_counter() - wall, time.process_time() - processor))
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


def medians(times: Sequence[tuple[float, float]]) -> list[float]:
    return [1000 * statistics.median(own) for own in zip(*times, strict=True)]


def ratio(times: Sequence[tuple[float, float]], to: Sequence[tuple[float, float]]) -> list[float]:
    """Median and quartiles of the ratio of wall times."""
    low, middle, high = statistics.quantiles([a / b for (a, _), (b, _) in zip(times, to, strict=True)], n=4)
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
