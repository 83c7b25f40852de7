"""What a training step of every method costs over its floor, in jpeft and in PyTorch PEFT.

    python examples/benchmarks/methods.py --json methods.json --plot methods.png

A step is forward, backward and the AdamW update of what trains, on a small Llama with the method on all seven
projections. The floor is the same model with its weights frozen and nothing trained but a shift of the first layer's q,
k and v: the gradient passes every activation, and no product is adapted. Each framework is divided by a floor of its
own, run right beside each step; methods come in another order in each round, those of both frameworks mixed. The table
gives the median and the quartiles of that ratio in wall time, and its median in CPU time, which other programs disturb
less; what trains and the size of `adapter_model.safetensors`; and the temporaries of the compiled step over those of
the floor.
"""

import argparse
import dataclasses
import functools
import json
import os
import tempfile
from pathlib import Path
from typing import Any

# PyTorch's threads would otherwise spin for a while after each of its steps, on the cores of JAX's next one.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("KMP_BLOCKTIME", "0")

import jax
import jax.numpy as jnp
from _methods_table import INVOCATION, METHODS, Method, checked_complete, config_of
from _models import Shape, by_jpeft, decoder_loss, frozen_floor, random_parameters
from _rows import Pair, medians, paired, ratio
from _steps import Step, environment, jax_step
from tqdm import tqdm

import jpeft
import jpeft_interop

SIDES = ("jpeft", "PEFT")
Report = dict[str, dict[str, Any]]  # {method: {side: what is known of it}}


def main() -> None:
    args = arguments()
    checked_complete()
    shape = Shape(args.width, args.width * 11 // 4, args.width // 64, args.layers, args.vocabulary)
    tokens = random_tokens(shape, args.tokens)
    makers, known = {"jpeft": Jpeft(shape, tokens)}, {config_of(jpeft, METHODS[name]).peft_type for name in METHODS}
    extra: list[str] = []
    if not args.skip_torch:
        import _methods_peft

        makers["PEFT"] = _methods_peft.Peft(shape, tokens)
        extra = _methods_peft.others(known) if args.methods is None else []
    pairs, report = made(makers, args.methods or list(METHODS))
    for key, seconds in paired(pairs, args.repeats).items():
        own, floor = zip(*seconds, strict=True)
        times = {"wall": ratio(own, floor), "cpu": ratio(own, floor, 1), "ms": medians(own), "floor_ms": medians(floor)}
        report[key[1]][SIDES[key[0]]].update(times)
    for name in extra:
        report[name] = {"jpeft": {"why": "jpeft has it not"}}
    print(heading(args), table(report), judgement(report), sep="\n\n")
    if args.json:
        whole = {"environment": environment(), "options": vars(args), "methods": report}
        Path(args.json).write_text(json.dumps(whole, indent=1))
    if args.plot:
        plot(report, args.plot)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=METHODS, metavar="NAME", help=f"of {', '.join(METHODS)}")
    parser.add_argument("--width", type=int, default=512, help="a multiple of 512; the MLP's is 2.75 times that")
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--vocabulary", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=1024, help="tokens a step, in two sequences")
    parser.add_argument("--repeats", type=int, default=7, help="rounds")
    parser.add_argument("--skip-torch", action="store_true")
    parser.add_argument("--json", help="write the report to this file")
    parser.add_argument("--plot", help="draw the ratios to this PNG file")
    return parser.parse_args()


def random_tokens(shape: Shape, count: int) -> jax.Array:
    tokens = jax.random.randint(jax.random.key(1), (2, count // 2), 0, shape.vocabulary)
    return jax.lax.dynamic_update_slice(tokens, jnp.array([INVOCATION] * 2), (0, count // 4))


class Jpeft:
    """Adapters on one decoder."""

    def __init__(self, shape: Shape, tokens: jax.Array) -> None:
        self._base, self._tokens = random_parameters(shape, "float32"), tokens
        self._loss = functools.partial(decoder_loss, shape=shape)
        self._shape = shape
        self._floor = jax_step(frozen_floor(self._base, self._loss, shape, jnp.zeros), tokens)

    def floor(self) -> Step:
        return self._floor.run

    def measured(self, method: Method) -> tuple[Step, dict[str, Any]]:
        """(step, what is known of it): parameters that train, and bytes."""
        wrapped = jpeft.wrap(self._base, config_of(jpeft, method))
        with tempfile.TemporaryDirectory() as folder:
            jpeft_interop.save_pretrained(wrapped, folder)
            size = (Path(folder) / "adapter_model.safetensors").stat().st_size
        wrapped = jpeft.with_context(wrapped, **method.context(self._tokens))
        variant = by_jpeft(wrapped, self._loss, method.added)
        step = jax_step(dataclasses.replace(variant, projected=method.projected), self._tokens)
        temporaries = step.temporaries - self._floor.temporaries
        return step.run, {
            "trains": jpeft.count_parameters(wrapped)[0],
            "file": size,
            "temporaries": temporaries,
        }


def made(makers: dict[str, Any], names: list[str]) -> tuple[dict[tuple[int, str], Pair], Report]:
    floors = {side: maker.floor() for side, maker in makers.items()}
    report: Report = {name: {} for name in names}
    pairs: dict[tuple[int, str], Pair] = {}
    for name in (bar := tqdm(names, desc="compiling")):
        bar.set_postfix_str(name)
        for side, maker in makers.items():
            why = METHODS[name].without.get(side)
            if why is not None:
                report[name][side] = {"why": why}
                continue
            step, report[name][side] = maker.measured(METHODS[name])
            pairs[SIDES.index(side), name] = step, floors[side]
    return pairs, report


def heading(args: argparse.Namespace) -> str:
    sizes = {name: getattr(args, name) for name in ("width", "layers", "vocabulary", "tokens", "repeats")}
    return ", ".join(f"{name} {value}" for name, value in {**sizes, **environment()}.items())


def table(report: Report) -> str:
    columns = "method", "trains", "file", "step / floor, jpeft", "PyTorch PEFT", "temporaries"
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for name, sides in report.items():
        ours, theirs = (sides.get(side, {}) for side in SIDES)
        trains = _both(ours, theirs, "trains", lambda count: f"{count:,}")
        file = _both(ours, theirs, "file", lambda size: f"{size / 1024:,.0f} KiB")
        more = f"{ours['temporaries'] / 2**20:+.1f} MiB" if "temporaries" in ours else ""
        lines.append(f"| {' | '.join([name, trains, file, _ratio(ours), _ratio(theirs), more])} |")
    return "\n".join(lines)


def _both(ours: dict[str, Any], theirs: dict[str, Any], what: str, text: Any) -> str:
    own, others = (text(side[what]) if what in side else None for side in (ours, theirs))
    return own or "" if others in (None, own) else f"{own}; PEFT {others}"


def _ratio(side: dict[str, Any]) -> str:
    if "wall" not in side:
        return side.get("why", "")
    middle, low, high = side["wall"]
    return f"{middle:.2f} ({low:.2f} to {high:.2f}), CPU {side['cpu'][0]:.2f}"


def judgement(report: Report) -> str:
    """Which methods miss the goals, in CPU time."""
    cpu = {
        name: [sides[side]["cpu"][0] for side in SIDES if "cpu" in sides.get(side, {})]
        for name, sides in report.items()
    }
    slow = [name for name, own in cpu.items() if "cpu" in report[name]["jpeft"] and own[0] > 2]
    behind = [name for name, own in cpu.items() if len(own) == 2 and own[0] > own[1]]
    return "\n".join(
        f"{what}: {', '.join(names) or 'none'}"
        for what, names in (("above twice the floor", slow), ("further above its floor than in PEFT", behind))
    )


def plot(report: Report, path: str) -> None:
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    names = [name for name, sides in report.items() if any("wall" in side for side in sides.values())]
    figure, axes = plt.subplots(figsize=(8, 0.32 * len(names) + 1), layout="constrained")
    for offset, side, colour in ((-0.2, "jpeft", "tab:orange"), (0.2, "PEFT", "tab:grey")):
        drawn = [(i, report[name][side]["cpu"]) for i, name in enumerate(names) if "cpu" in report[name].get(side, {})]
        middle = [own[0] for _, own in drawn]
        spread = [[own[0] - own[1] for _, own in drawn], [own[2] - own[0] for _, own in drawn]]
        axes.barh([i + offset for i, _ in drawn], middle, 0.38, xerr=spread, color=colour, label=side)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.axvline(2, color="black", linewidth=0.8, linestyle=":")
    axes.set_xlabel("training step / floor, CPU time (median and quartiles; dotted: the goal)")
    axes.legend()
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
