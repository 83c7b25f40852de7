"""Plans of LoRA on large models, compiled for TPUs that are not there: memory, operations, collectives.

    pip install "jpeft[plan]"
    python examples/benchmarks/plans.py                      # all rows: an hour or two on two cores
    python examples/benchmarks/plans.py --only llama-2-7b/v5e:4x4
    python examples/benchmarks/plans.py --table              # of the results so far
    python examples/benchmarks/plans.py --depth              # does compiling take longer for more layers?

Each row is one model on one TPU topology: LoRA, the same LoRA with its formula left to autodiff, full fine-tuning, and
the frozen model; the Llamas on quantised bases, too. Results are kept in a file as they come, and rows that it holds
are not compiled again. The rows on one v5p chip repeat what PEFT's README measured on one A100, with the batch of its
example scripts.
"""

import argparse
import dataclasses
import functools
import json
import math
import os
import pathlib
import time
from collections.abc import Mapping
from typing import Any

# Nothing runs, so nothing may wait for a TPU that is not there.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp

import jpeft
from jpeft._contract import Base, Site, additive, dropped, register
from jpeft.methods import lora
from jpeft_interop import plan
from jpeft_interop.models import FlaxAutoModelForCausalLM, FlaxAutoModelForSeq2SeqLM
from jpeft_interop.plan import Plan

HERE = pathlib.Path(__file__).parent
GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Row:
    """One plan. published: GB that PEFT's README gives for LoRA and in full on one A100; None: out of its memory.

    formats: of quantised bases that LoRA is planned on, too.
    """

    model: str
    topology: str
    mesh: Mapping[str, int]
    batch: int
    seq: int
    target_seq: int | None = None
    r: int = 16
    targets: str | None = "all-linear"
    param_dtype: str = "bfloat16"
    published: tuple[float, float | None] | None = None
    formats: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.model}/{self.topology}"


# Targets None: PEFT's own, q and v. Tweets of RAFT's twitter_complaints are at most some 64 tokens, its labels 8.
TWEETS: dict[str, Any] = dict(
    topology="v5p:1x1x1", mesh={"fsdp": 1}, batch=8, seq=64, r=8, targets=None, param_dtype="float32"
)
ROWS = (
    Row("llama-2-7b", "v5e:4x4", {"fsdp": 16}, 64, 2048),
    Row("llama-3-70b", "v5p:4x4x4", {"fsdp": 64}, 64, 4096),
    Row("llama-3-70b", "v5e:16x16", {"fsdp": 256}, 256, 2048),
    Row("llama-2-7b", "v5e:1x1", {"fsdp": 1}, 2, 2048, formats=("int8", "nf4")),
    Row("llama-3-70b", "v5e:4x4", {"fsdp": 16}, 16, 2048, formats=("int8", "nf4")),
    Row("t0-3b", "v5e:2x4", {"fsdp": 8}, 64, 512, 128, r=8, targets=None),
    Row("mt0-xxl", "v5e:2x4", {"fsdp": 8}, 32, 512, 128, r=8, targets=None),
    Row("bloomz-7b1", "v5e:2x4", {"fsdp": 8}, 32, 512, r=8, targets=None),
    Row("t0-3b", target_seq=8, published=(14.4, 47.14), **TWEETS),
    Row("mt0-xxl", target_seq=8, published=(56.0, None), **TWEETS),
    Row("bloomz-7b1", published=(32.0, None), **TWEETS),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AutodiffLoraConfig(jpeft.LoraConfig):
    """LoRA by its formula as it stands, x W + s (x Aᵀ) Bᵀ, all axes kept, its gradient left to autodiff."""


def _as_written(p: Any, x: jax.Array, base: Base, site: Site, context: Mapping[str, Any]) -> jax.Array:
    y, (a, b) = base(x), (p[name].astype(x.dtype) for name in ("lora_A", "lora_B"))
    return y + p["scaling"].astype(x.dtype) * ((dropped(x, context) @ a.T) @ b.T)


register(
    additive(
        config=AutodiffLoraConfig,
        init=lora.init,
        delta=lambda p, site: p["scaling"] * (p["lora_B"] @ p["lora_A"]).T,
        forward=_as_written,
        scaling=lora.scaling,
    )
)


def main() -> None:
    args = arguments()
    if args.depth:
        return print(seconds_by_depth(args.effort))
    results: dict[str, Any] = json.loads(args.results.read_text()) if args.results.exists() else {}
    for row in ROWS:
        if args.table or (args.only and row.name not in args.only):
            continue
        quantised = ((name, functools.partial(on_quantised, name)) for name in row.formats)
        for kind, compile_it in (("plan", compared), ("autodiff", by_autodiff), *quantised):
            if kind not in results.setdefault(row.name, {}):
                results[row.name][kind] = compile_it(row, args.effort).as_dict()
                args.results.write_text(json.dumps(results, indent=1))
        print(table(results), flush=True)
    if args.table:
        print(table(results))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=[row.name for row in ROWS], metavar="MODEL/TOPOLOGY")
    parser.add_argument("--table", action="store_true", help="print what the results hold, and compile nothing")
    parser.add_argument("--depth", action="store_true", help="compile 8 and 80 layers, several times, and nothing else")
    parser.add_argument("--effort", type=float, default=0.0, help="of the compiler: at -1 a sixth of the time")
    parser.add_argument("--results", type=pathlib.Path, default=pathlib.Path("plans.results.json"))
    return parser.parse_args()


def compared(row: Row, effort: float) -> Plan:
    """LoRA as jpeft computes it, full fine-tuning, and the frozen model."""
    return _plan(row, effort, jpeft.LoraConfig, full=True, floor=True)


def by_autodiff(row: Row, effort: float) -> Plan:
    return _plan(row, effort, AutodiffLoraConfig, full=False, floor=False)


def on_quantised(name: str, row: Row, effort: float) -> Plan:
    return _plan(row, effort, jpeft.LoraConfig, full=False, floor=False, quantize=name)


def _plan(row: Row, effort: float, config: type[jpeft.LoraConfig], **others: Any) -> Plan:
    return plan(
        HERE / "plans" / f"{row.model}.json",
        method=config(r=row.r, lora_alpha=2 * row.r, target_modules=row.targets),
        topology=row.topology,
        mesh=row.mesh,
        batch=row.batch,
        seq=row.seq,
        target_seq=row.target_seq,
        param_dtype=jnp.dtype(row.param_dtype),
        search=False,
        effort=effort,
        **others,
    )


def seconds_by_depth(effort: float, depths: tuple[int, ...] = (8, 80), rounds: int = 3) -> str:
    """CPU seconds that tracing and compiling LoRA's step take, a line for each round and a column for each depth."""
    config = json.loads((HERE / "plans" / "llama-2-7b.json").read_text())
    config |= {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 8, "num_key_value_heads": 8}
    lines = [f"{' '.join(f'{depth} layers' for depth in depths)} ratio"]
    for _ in range(rounds):
        taken = []
        for depth in depths:
            start = time.process_time()
            plan(
                {**config, "num_hidden_layers": depth},
                topology="v5e:2x2",
                batch=4,
                seq=512,
                full=False,
                floor=False,
                search=False,
                effort=effort,
                progress=False,
            )
            taken.append(time.process_time() - start)
            jax.clear_caches()
        lines.append(f"{' '.join(f'{each:.1f} s' for each in taken)} {taken[-1] / taken[0]:.2f}")
    return "\n".join(lines)


def own_flops(row: Row) -> float:
    """What LoRA's own products take a step on one device, every layer's forward pass done twice (remat).

    Of 2 r (in + out) for a token forward, once more, and twice that for the gradients of x and of the factors.
    """
    config = json.loads((HERE / "plans" / f"{row.model}.json").read_text())
    auto = FlaxAutoModelForCausalLM if row.target_seq is None else FlaxAutoModelForSeq2SeqLM
    model = auto.from_config(config, abstract=True, scan_layers=True)
    targets = row.targets or {"t5": ["q", "v"], "mt5": ["q", "v"], "bloom": ["query_key_value"]}[config["model_type"]]
    wrapped = jpeft.wrap(model.params, jpeft.LoraConfig(r=row.r, target_modules=targets))
    total = 0
    for path, site in wrapped.adapters["default"].sites.items():
        # The keys and values of attention to the encoder are of the encoder's tokens.
        crossed = "EncDecAttention" in path and path.endswith((".k", ".v"))
        decodes = row.target_seq is not None and path.startswith("decoder.") and not crossed
        tokens = row.batch * (row.target_seq if decodes and row.target_seq else row.seq)
        total += 8 * tokens * row.r * (site.in_features + site.out_features) * math.prod(site.stack)
    return total / math.prod(row.mesh.values())


HEAD = (
    "model, TPU, batch",
    "way to train",
    "parameters",
    "adapter, optimizer",
    "temporaries",
    "total",
    "fits",
    "TFLOP",
    "collectives",
    "compiled in",
)
GOALS = (
    "model, TPU",
    "temporaries to autodiff's",
    "FLOP to floor and LoRA's own",
    "PEFT on one A100: LoRA, full, GB",
    "here: LoRA, full, GB",
)
WAYS = {
    "LoRA": ("plan", "adapter"),
    "LoRA by autodiff": ("autodiff", "adapter"),
    "full": ("plan", "full"),
    "frozen": ("plan", "floor"),
    "LoRA on int8": ("int8", "adapter"),
    "LoRA on nf4": ("nf4", "adapter"),
}


def table(results: Mapping[str, Any]) -> str:
    """Of one device, in GiB; then what the goals ask for."""
    lines = ["| " + " | ".join(HEAD) + " |", "|" + "---|" * len(HEAD)]
    goals = ["| " + " | ".join(GOALS) + " |", "|" + "---|" * len(GOALS)]
    for row in ROWS:
        found = results.get(row.name, {})
        steps = {name: found.get(kind, {}).get(step) for name, (kind, step) in WAYS.items()}
        for name, step in steps.items():
            if step:
                lines.append("| " + " | ".join([_described(row) if name == "LoRA" else "", name, *_cells(step)]) + " |")
        if steps["LoRA"]:
            goals.append("| " + " | ".join([row.name, *_goals(row, steps)]) + " |")
    return "\n".join([*lines, "", *goals])


def _described(row: Row) -> str:
    target = f" to {row.target_seq}" if row.target_seq else ""
    where = f"r {row.r}, {row.targets or 'q, v'}, {row.param_dtype}"
    return f"{row.model}, {row.topology}, {row.batch} x {row.seq}{target}, {where}"


def _cells(step: Mapping[str, Any]) -> list[str]:
    def gib(*names: str) -> str:
        values = [step[name] for name in names]
        return "?" if None in values else f"{sum(values) / GIB:.2f}"

    moved = "?" if step["flops"] is None else f"{sum(one['bytes'] for one in step['collectives']) / GIB:.1f}"
    flops = "?" if step["flops"] is None else f"{step['flops'] / 1e12:.1f}"
    given = [gib("parameters"), gib("adapter", "optimizer"), gib("temporaries"), gib("total")]
    return [*given, "yes" if step["fits"] else "no", flops, moved, f"{sum(step['seconds']):.0f} s"]


def _goals(row: Row, steps: Mapping[str, Any]) -> list[str]:
    def of(name: str, field: str) -> float:
        value = (steps[name] or {}).get(field)
        return math.nan if value is None else value

    memory = of("LoRA", "temporaries") / of("LoRA by autodiff", "temporaries")
    flops = of("LoRA", "flops") / (of("frozen", "flops") + own_flops(row))
    here, theirs = [], []
    if row.published:
        here = [f"{of(name, 'total') / 1e9:.1f}" for name in ("LoRA", "full")]
        theirs = ["out of memory" if value is None else str(value) for value in row.published]
    return [f"{memory:.3f}", f"{flops:.3f}", ", ".join(theirs), ", ".join(here)]


if __name__ == "__main__":
    main()
