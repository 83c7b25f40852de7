"""What it costs to have many adapters: wrap, load, switch, hot-swap, mixed batches, populations; PyTorch PEFT beside.

    python examples/benchmarks/adapters.py --json adapters.json

Every row is timed in rounds, in random order, after one round that does not count, and compared with the row named in
its last column in the same round: the table gives the medians and the quartiles of the ratio. For what is compiled, the
number of programs compiled is checked to stay one: a switch among stacked adapters or a hot-swap compiles nothing.
"""

import argparse
import functools
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("KMP_BLOCKTIME", "0")

import jax
import jax.numpy as jnp
import optax
from _models import PROJECTIONS, Shape, random_parameters
from step_vs_floor import environment

import jpeft
import jpeft_interop

Rows = dict[str, tuple[Callable[[], Any], str | None]]  # name: (what is timed, the row it is compared with)
LLAMA = Shape(4096, 11008, 32, 32, 32000)


def main() -> None:
    args = arguments()
    with tempfile.TemporaryDirectory() as folder:
        rows: Rows = {**wrapping(), **loading(args, Path(folder)), **mixing(args), **populations(args)}
        if not args.skip_torch:
            rows.update(torch_rows(args, Path(folder)))
        seconds = timed({name: run for name, (run, _) in rows.items()}, args.repeats)
    report = [summary(name, other, seconds) for name, (_, other) in rows.items()]
    print(", ".join(f"{name} {value}" for name, value in environment().items()))
    print("| what | ms | ratio | quartiles | to |\n|---|---|---|---|---|")
    for row in report:
        ratio = "" if row["to"] is None else f"{row['ratio']:.2f} | {row['low']:.2f} to {row['high']:.2f} | {row['to']}"
        print(f"| {row['name']} | {row['ms']:.1f} | {ratio or ' | |'} |")
    if args.json:
        Path(args.json).write_text(json.dumps({"environment": environment(), "rows": report, "seconds": seconds}))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=1024, help="width of the layers of the mixed batch")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=128, help="tokens of each of the 8 rows")
    parser.add_argument("--members", type=int, default=16, help="adapters of the population")
    parser.add_argument("--repeats", type=int, default=9, help="rounds")
    parser.add_argument("--skip-torch", action="store_true")
    parser.add_argument("--json", help="write the report and every time to this file")
    return parser.parse_args()


def wrapping() -> Rows:
    shapes = jax.eval_shape(lambda: random_parameters(LLAMA, "bfloat16"))
    config = jpeft.LoraConfig(r=16, target_modules=list(PROJECTIONS))
    return {"wrap, 7B shapes": (lambda: jpeft.wrap(shapes, config), None)}


def loading(args: argparse.Namespace, folder: Path) -> Rows:
    shape = Shape(64, 128, 2, 32, 256)
    params = random_parameters(shape, "float32")
    wrapped = jpeft.wrap(params, jpeft.LoraConfig(r=8, target_modules=list(PROJECTIONS)))
    jpeft_interop.save_pretrained(wrapped, folder / "ours")
    many = wrapped
    for number in range(18):
        many = jpeft_interop.load_adapter(many, folder / "ours", f"number {number}")
    slot = jpeft.prepare_for_hotswap(wrapped, "default", rank=8)
    return {
        "load the first adapter": (lambda: jpeft_interop.load_pretrained(params, folder / "ours"), None),
        "load the 20th": (lambda: jpeft_interop.load_adapter(many, folder / "ours", "x"), "load the first adapter"),
        "switch": (lambda: jpeft.set_adapter(many, "number 3"), None),
        "hot-swap": (lambda: jax.block_until_ready(jpeft.hotswap(slot, "default", wrapped).adapters), None),
    }


def network(params: Any, x: jax.Array) -> jax.Array:
    for layer in params["layers"].values():
        x = x + jnp.tanh(x @ layer["query"]["kernel"]) @ layer["value"]["kernel"]
    return x


def layers(args: argparse.Namespace, hidden: int) -> Any:
    keys = jax.random.split(jax.random.key(0), 2 * args.layers)
    kernels = [{"kernel": jax.random.normal(key, (hidden, hidden)) / hidden} for key in keys]
    return {"layers": {str(i): {"query": kernels[2 * i], "value": kernels[2 * i + 1]} for i in range(args.layers)}}


def mixing(args: argparse.Namespace) -> Rows:
    x = jax.random.normal(jax.random.key(1), (8, args.tokens, args.hidden))
    config = jpeft.LoraConfig(r=args.rank, target_modules=["query", "value"], init_lora_weights=False)
    params = layers(args, args.hidden)
    single = jpeft.wrap(params, config)
    one = jax.jit(jpeft.lift(network))
    rows: Rows = {"a single adapter, 8 rows": (lambda: one(single, x).block_until_ready(), None)}
    for count in (4, 32):
        wrapped = params
        for number in range(count):
            wrapped = jpeft.wrap(wrapped, config, adapter_name=str(number), rng=jax.random.key(number))
        run = functools.partial(mixed_batch, jax.jit(jpeft.lift(network)), jpeft.mixed_batch(wrapped), count, x)
        rows[f"mixed batch over {count} adapters"] = (run, "a single adapter, 8 rows")
    return rows


def mixed_batch(apply: Any, mixed: jpeft.PeftParams, count: int, x: jax.Array) -> None:
    chosen = jnp.asarray([random.randrange(-1, count) for _ in range(len(x))])
    apply(jpeft.with_context(mixed, adapter_indices=chosen), x).block_until_ready()
    assert apply._cache_size() == 1


def populations(args: argparse.Namespace) -> Rows:
    params = layers(args, 64)
    x, target = jax.random.normal(jax.random.key(2), (2, 4, 16, 64))
    config = jpeft.LoraConfig(r=8, target_modules=["query", "value"])
    members = [jpeft.wrap(params, config, rng=jax.random.key(seed)) for seed in range(args.members)]
    apply, tx = jpeft.lift(network), optax.masked(optax.adamw(1e-3), jpeft.trainable_mask)

    def step(wrapped: jpeft.PeftParams, state: Any) -> Any:
        gradient = jpeft.grad(lambda own: ((apply(own, x) - target) ** 2).mean())(wrapped)
        updates, state = tx.update(gradient, state, wrapped)
        return optax.apply_updates(wrapped, updates), state

    population = jpeft.stack_adapters(members)
    axes = jpeft.population_axes(population)
    states, state = [tx.init(member) for member in members], jax.vmap(tx.init, in_axes=(axes,))(population)
    alone, together = jax.jit(step), jax.jit(jax.vmap(step, in_axes=(axes, 0), out_axes=(axes, 0)))

    def one_by_one() -> None:
        jax.block_until_ready([alone(*own) for own in zip(members, states, strict=True)])

    name = f"a step of {args.members} adapters, one by one"
    return {
        name: (one_by_one, None),
        f"a step of {args.members} adapters as a population": (
            lambda: jax.block_until_ready(together(population, state)),
            name,
        ),
    }


def torch_rows(args: argparse.Namespace, folder: Path) -> Rows:
    import peft
    import torch

    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query = torch.nn.Linear(args.hidden, args.hidden, bias=False)
            self.value = torch.nn.Linear(args.hidden, args.hidden, bias=False)

        def forward(self, x: Any) -> Any:
            return x + self.value(torch.tanh(self.query(x)))

    class Network(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.ModuleList(Layer() for _ in range(args.layers))

        def forward(self, x: Any) -> Any:
            for layer in self.layers:
                x = layer(x)
            return x

    config = peft.LoraConfig(r=args.rank, target_modules=["query", "value"], init_lora_weights=False)
    model = peft.get_peft_model(Network(), config, adapter_name="0").eval()
    for number in range(1, 32):
        model.add_adapter(str(number), config)
    x = torch.randn(8, args.tokens, args.hidden)

    def run(count: int | None) -> None:
        names = None if count is None else [str(random.randrange(count)) for _ in range(len(x))]
        with torch.no_grad():
            model(x) if names is None else model(x, adapter_names=names)

    single = "PyTorch PEFT: a single adapter, 8 rows"
    mixed: Rows = {f"PyTorch PEFT: mixed over {n}": (functools.partial(run, n), single) for n in (4, 32)}
    wrapping = {"PyTorch PEFT: wrap and unload, 7B shapes": (torch_wrap(), None)}
    return {single: (lambda: run(None), None), **mixed, **wrapping}


def torch_wrap() -> Callable[[], Any]:
    import peft
    import torch
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=LLAMA.vocabulary, hidden_size=LLAMA.hidden, intermediate_size=LLAMA.intermediate,
        num_hidden_layers=LLAMA.layers, num_attention_heads=LLAMA.heads,
    )  # fmt: skip
    lora = peft.LoraConfig(r=16, target_modules=list(PROJECTIONS))
    with torch.device("meta"):
        base = transformers.LlamaForCausalLM(config)

    def run() -> None:
        peft.get_peft_model(base, lora, low_cpu_mem_usage=True).unload()

    return run


def timed(runs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    order, shuffle = list(runs), random.Random(0).shuffle
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(repeats + 1):
        shuffle(order)
        for name in order:
            start = time.perf_counter()
            runs[name]()
            if number:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def summary(name: str, other: str | None, seconds: dict[str, list[float]]) -> dict[str, Any]:
    row = {"name": name, "to": other, "ms": 1000 * statistics.median(seconds[name])}
    if other is None:
        return row
    ratios = [own / to for own, to in zip(seconds[name], seconds[other], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {**row, "low": low, "ratio": middle, "high": high}


if __name__ == "__main__":
    main()
