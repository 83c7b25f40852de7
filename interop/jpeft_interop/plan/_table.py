"""A plan as text."""

from collections.abc import Callable

from ._results import Plan, StepPlan

GIB = 2**30
UNITS = ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))


def table(plan: Plan) -> str:
    """The plan's settings, then a column for each way to train."""
    steps = plan.steps
    rows = [("per device", *steps)] + [(name, *map(cell, steps.values())) for name, cell in ROWS]
    rows += _collectives(list(steps.values()))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    rule = "-" * max(map(len, lines))
    refusals = [f"{name}: {step.refusal}" for name, step in steps.items() if step.refusal]
    return "\n".join([_headline(plan), rule, lines[0], rule, *lines[1:], rule, *refusals, *_notes(plan)])


def _headline(plan: Plan) -> str:
    said = plan.settings
    mesh = ", ".join(f"{name}={size}" for name, size in said["mesh"].items())
    memory = "its memory is not known" if plan.memory is None else f"{plan.memory / GIB:.2f} GiB each"
    where = f"{said['topology'] or said['platform']} ({said['device']}, {memory}), mesh {mesh}"
    tokens = f"{said['batch']} x {said['seq']} tokens" + (f" to {said['target_seq']}" if said["target_seq"] else "")
    extras = [f"accumulated in {said['accumulate']}"] if said["accumulate"] > 1 else []
    extras += [f"base in {said['quantize']}"] if said["quantize"] else []
    extras += [f"remat {said['remat']}"] if said["remat"] else []
    model = f"{said['model_type']}, {said['parameters'] / 1e9:.2f} B parameters in {said['param_dtype']}"
    return f"{model}; {said['trainable']:,} train with {said['method']}\n{', '.join([where, tokens, *extras])}"


def _notes(plan: Plan) -> list[str]:
    if plan.floor is None:
        return []
    return ["frozen: nothing adapted, the gradient through all activations and to no weight"]


def size(value: int | None) -> str:
    """Bytes in the unit that suits them.

    >>> size(3 * 2**29), size(5000), size(None)
    ('1.50 GiB', '4.88 KiB', '?')
    """
    if value is None:
        return "?"
    unit, name = next(((unit, name) for unit, name in UNITS if abs(value) >= unit), (1, "B"))
    return f"{value / unit:.2f} {name}" if unit > 1 else f"{value} B"


def _fits(step: StepPlan) -> str:
    return {True: "yes", False: "no", None: "not known"}[step.fits]


def _flops(value: int | None) -> str:
    return "?" if value is None else f"{value:.4g}"


def _batch(step: StepPlan) -> str:
    return "not searched" if step.largest_batch is None else str(step.largest_batch)


ROWS: tuple[tuple[str, Callable[[StepPlan], str]], ...] = (
    ("parameters", lambda step: size(step.parameters)),
    ("adapter", lambda step: size(step.adapter)),
    ("optimizer", lambda step: size(step.optimizer)),
    ("batch", lambda step: size(step.batch)),
    ("temporaries", lambda step: size(step.temporaries)),
    ("padding, results, program", lambda step: size(step.other)),
    ("total", lambda step: size(step.total)),
    ("fits", _fits),
    ("largest batch that fits", _batch),
    ("FLOPs a step", lambda step: _flops(step.flops)),
    ("bytes moved a step (estimate)", lambda step: size(step.moved)),
    ("seconds to trace, to compile", lambda step: ", ".join(f"{each:.1f}" for each in step.seconds)),
)


def _collectives(steps: list[StepPlan]) -> list[tuple[str, ...]]:
    kinds = dict.fromkeys(one.kind for step in steps for one in step.collectives)

    def cell(step: StepPlan, kind: str) -> str:
        found = next((one for one in step.collectives if one.kind == kind), None)
        return "0" if found is None else f"{found.count:,} x, {size(found.bytes)}"

    return [(f"{kind}s", *(cell(step, kind) for step in steps)) for kind in kinds]
