"""The cost of a LoRA training step over its floor, on this machine: jpeft, other ways in JAX, and PyTorch PEFT.

    python examples/benchmarks/step_vs_floor.py --rank 8

A step is forward, backward and the AdamW update of LoRA on all seven projections of a small Llama. The floor is the
same model with its weights frozen and nothing trained but a shift of the first layer's q, k and v: the gradient
passes every activation that LoRA's passes, and no product is adapted. Each round runs one step of every variant, in
random order, and divides it by the floor of the same round, so that a machine that is busy for a while moves both.
The table gives the median and quartiles of that ratio, and its median in CPU time, which other programs disturb less.
"""

import argparse
import functools
import json
import os
import random
import statistics
import time
from typing import Any

# PyTorch's threads would otherwise spin for a while after each of its steps, on the cores of JAX's next one.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("KMP_BLOCKTIME", "0")

import jax
import jax.numpy as jnp
from _models import (
    PROJECTIONS,
    Shape,
    Variant,
    as_written,
    beside,
    by_hand,
    by_jpeft,
    decoder_loss,
    frozen_floor,
    full_fine_tuning,
    hand_written,
    in_two_axes,
    materialised,
    random_parameters,
    shared_first_factor,
    small_first,
    thin_first,
)
from _steps import Step, environment, jax_step
from tqdm import tqdm

import jpeft

Times = dict[str, dict[str, list[float]]]  # seconds of each round: {"wall" or "cpu": {variant: [...]}}
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def main() -> None:
    args = arguments()
    shape = Shape(args.hidden, args.hidden * 11 // 4, args.hidden // 64, args.layers, args.vocabulary)
    steps = jax_steps(args, shape)
    if not args.skip_torch:
        steps.update(torch_steps(args, shape))
    times = timed(steps, args.repeats)
    rows = [summary(name, times) for name in steps]
    report = {"environment": environment(), "options": vars(args), "rows": rows}
    print(table(report))
    if args.json:
        with open(args.json, "w") as file:
            json.dump({**report, "seconds": times}, file, indent=1)
    if args.plot:
        plot(report, args.plot)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument(
        "--hidden", type=int, default=1024, help="width, a multiple of 64; the MLP's is 2.75 times that"
    )
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--tokens", type=int, default=1024, help="tokens a step, in two sequences")
    parser.add_argument("--dtype", default="float32", help="of the frozen weights; adapters are float32")
    parser.add_argument("--repeats", type=int, default=15, help="rounds")
    parser.add_argument("--only", nargs="*", help="names of JAX variants besides the floor")
    parser.add_argument("--skip-torch", action="store_true")
    parser.add_argument("--json", help="write the report and every time to this file")
    parser.add_argument("--plot", help="draw the ratios to this PNG file")
    return parser.parse_args()


def jax_variants(args: argparse.Namespace, shape: Shape) -> dict[str, Variant]:
    base = random_parameters(shape, args.dtype)
    loss = functools.partial(decoder_loss, shape=shape)
    config = jpeft.LoraConfig(r=args.rank, lora_alpha=args.rank, target_modules=list(PROJECTIONS))
    wrapped = jpeft.wrap(base, config)
    hand = functools.partial(by_hand, wrapped, loss)
    made = {
        "jpeft": by_jpeft(wrapped, loss),
        "autodiff": hand(beside(as_written)),
        "two axes": hand(beside(in_two_axes)),
        "custom_vjp": hand(beside(hand_written)),
        "thin first": hand(beside(thin_first)),
        "small first": hand(beside(small_first)),
        "shared A": hand(shared_first_factor),
        "W + BA": hand(materialised),
        "full fine-tuning": full_fine_tuning(base, loss),
    }
    chosen = {name: made[name] for name in (made if args.only is None else args.only)}
    return {"floor": frozen_floor(base, loss, shape, jnp.zeros), **chosen}


def jax_steps(args: argparse.Namespace, shape: Shape) -> dict[str, Step]:
    tokens = jax.random.randint(jax.random.key(1), (2, args.tokens // 2), 0, shape.vocabulary)
    variants = tqdm(jax_variants(args, shape).items(), desc="compiling")
    return {name: jax_step(variant, tokens).run for name, variant in variants}


def torch_steps(args: argparse.Namespace, shape: Shape) -> dict[str, Step]:
    import _torch_steps
    import peft

    floor, adapted = (_torch_steps.llama(shape, args.dtype).train() for _ in range(2))
    config = peft.LoraConfig(r=args.rank, lora_alpha=args.rank, target_modules=list(PROJECTIONS))
    tokens = _torch_steps.random_tokens(shape, args.tokens)
    return {
        "PyTorch floor": _torch_steps.floor_step(floor, tokens),
        "PyTorch PEFT": _torch_steps.step(peft.get_peft_model(adapted, config), tokens),
    }


def timed(steps: dict[str, Step], repeats: int) -> Times:
    """Each step in each round, after one round that does not count."""
    order, shuffle = list(steps), random.Random(0).shuffle
    times: Times = {clock: {name: [] for name in steps} for clock in CLOCKS}
    for number in tqdm(range(repeats + 1), desc="rounds"):
        shuffle(order)
        for name in order:
            starts = {clock: read() for clock, read in CLOCKS.items()}
            steps[name]()
            for clock, read in CLOCKS.items() if number else ():
                times[clock][name].append(read() - starts[clock])
    return times


def summary(name: str, times: Times) -> dict[str, Any]:
    wall, cpu = (ratios(name, times[clock]) for clock in CLOCKS)
    low, middle, high = statistics.quantiles(wall, n=4)
    milliseconds = 1000 * statistics.median(times["wall"][name])
    return {"name": name, "ratio": middle, "low": low, "high": high, "cpu": statistics.median(cpu), "ms": milliseconds}


def ratios(name: str, seconds: dict[str, list[float]]) -> list[float]:
    floor = seconds["PyTorch floor" if name.startswith("PyTorch") else "floor"]
    return [own / other for own, other in zip(seconds[name], floor, strict=True)]


def table(report: dict[str, Any]) -> str:
    options, known = report["options"], report["environment"]
    lines = [
        "",
        ", ".join(f"{name} {options[name]}" for name in ("rank", "hidden", "layers", "tokens", "dtype", "repeats")),
        ", ".join(f"{name} {value}" for name, value in known.items()),
        "",
        "| variant | step / floor | quartiles | in CPU time | ms |",
        "|---|---|---|---|---|",
    ]
    for row in report["rows"]:
        spread = f"{row['low']:.3f} to {row['high']:.3f}"
        lines.append(f"| {row['name']} | {row['ratio']:.3f} | {spread} | {row['cpu']:.3f} | {row['ms']:.0f} |")
    return "\n".join(lines)


def plot(report: dict[str, Any], path: str) -> None:
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    rows = report["rows"][::-1]
    figure, axes = plt.subplots(figsize=(7, 0.4 * len(rows) + 1), layout="constrained")
    spread = [[row["ratio"] - row["low"] for row in rows], [row["high"] - row["ratio"] for row in rows]]
    colours = ["tab:orange" if row["name"] == "jpeft" else "tab:grey" for row in rows]
    axes.barh([row["name"] for row in rows], [row["ratio"] for row in rows], xerr=spread, color=colours, capsize=3)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlabel(f"training step / floor (rank {report['options']['rank']}; median and quartiles)")
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
