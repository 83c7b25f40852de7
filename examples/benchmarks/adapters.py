"""What it costs to have many adapters: wrap, load, switch, hot-swap, mixed batches, populations; PyTorch PEFT beside.

    python examples/benchmarks/adapters.py --json adapters.json

Everything is timed in rounds, in random order, after one round that does not count. The table gives medians of the wall
time and of the processor's time, and the ratio of wall times to PEFT's and to another row's in the same round, with
quartiles. That one program is compiled is checked for what says so: a hot-swap and a mixed batch compile nothing.
"""

import argparse
import functools
import json
import os
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("KMP_BLOCKTIME", "0")

import jax
import jax.numpy as jnp
import optax
from _adapters_sizes import LLAMA, LOADED, MIXED, SMALL, population_names
from _models import PROJECTIONS, random_parameters
from _rows import Row, Rows, summary, table, timed
from _steps import environment

import jpeft
import jpeft_interop


def main() -> None:
    args = arguments()
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        ours: Rows = {**wrapping(), **loading(folder), **mixing(args), **populations(args)}
        theirs: Rows = {}
        if not args.skip_torch:
            import _adapters_peft

            theirs = _adapters_peft.rows(args, folder)
        runs = {(0, name): row.run for name, row in ours.items()} | {(1, name): row.run for name, row in theirs.items()}
        seconds = timed(runs, args.repeats)
    report = [summary(name, row.to, name in theirs, seconds) for name, row in ours.items()]
    print(", ".join(f"{name} {value}" for name, value in environment().items()))
    print(table(report))
    if args.json:
        times = [{"peft": bool(side), "name": name, "seconds": own} for (side, name), own in seconds.items()]
        Path(args.json).write_text(json.dumps({"environment": environment(), "rows": report, "times": times}))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=1024, help="width of the layers of the mixed batch")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=128, help="tokens of each of the 8 rows")
    parser.add_argument("--members", type=int, default=16, help="adapters of the populations")
    parser.add_argument("--widths", type=int, nargs="+", default=[32, 64], help="of the populations' models")
    parser.add_argument("--repeats", type=int, default=9, help="rounds")
    parser.add_argument("--skip-torch", action="store_true")
    parser.add_argument("--json", help="write the report and every time to this file")
    return parser.parse_args()


def wrapping() -> Rows:
    shapes = jax.eval_shape(lambda: random_parameters(LLAMA, "bfloat16"))
    params, config = small_parameters(), jpeft.LoraConfig(r=16, target_modules=list(PROJECTIONS))
    return {
        "wrap, 7B shapes": Row(lambda: jpeft.wrap(shapes, config)),
        "wrap, 32 small layers": Row(lambda: block(jpeft.wrap(params, config).adapters)),
    }


def small_parameters() -> dict[str, Any]:
    """A small model with the names of `transformers`, so that its adapters are PEFT's as they are."""

    def layer(own: dict[str, Any]) -> dict[str, Any]:
        parts = {"self_attn": PROJECTIONS[:4], "mlp": PROJECTIONS[4:]}
        return {part: {name: own[name] for name in names} for part, names in parts.items()}

    layers = random_parameters(SMALL, "float32")["layers"]
    return {"model": {"layers": {str(number): layer(own) for number, own in enumerate(layers)}}}


def all_projections(params: Any, x: jax.Array) -> jax.Array:
    for layer in params["model"]["layers"].values():
        own = {name: module["kernel"] for part in layer.values() for name, module in part.items()}
        x = x + jnp.tanh(sum(x @ own[name] for name in PROJECTIONS[:4]))
        x = x + jnp.tanh(x @ own["gate_proj"] + x @ own["up_proj"]) @ own["down_proj"]
    return x


def loading(folder: Path) -> Rows:
    params = small_parameters()
    config = jpeft.LoraConfig(r=8, target_modules=list(PROJECTIONS), init_lora_weights=False)
    wrapped = jpeft.wrap(params, config)
    jpeft_interop.save_pretrained(wrapped, folder)
    many = wrapped
    for number in range(LOADED):
        many = jpeft_interop.load_adapter(many, folder, f"number {number}")
    slot, x = wrapped, jnp.ones((4, SMALL.hidden))
    apply: Any = jax.jit(jpeft.lift(all_projections))

    def compiles_nothing(swapped: jpeft.PeftParams) -> None:
        block(apply(swapped, x))
        assert apply._cache_size() == 1

    def swap(new: Callable[[], jpeft.PeftParams]) -> Callable[[], None]:
        swapped = jpeft.hotswap(slot, "default", new())
        block(swapped.adapters["default"])
        return functools.partial(compiles_nothing, swapped)

    load_first = functools.partial(jpeft_interop.load_pretrained, params, folder)
    load_next = functools.partial(jpeft_interop.load_adapter, many, folder, "next")
    names = [f"number {number}" for number in range(LOADED)]
    return {
        "load the first adapter": Row(lambda: block(load_first().adapters["default"])),
        "load the 20th": Row(lambda: block(load_next().adapters["next"]), "load the first adapter"),
        "switch": Row(lambda: jpeft.set_adapter(many, random.choice(names)).active),
        "hot-swap, from a file": Row(lambda: swap(load_first)),
        "hot-swap, in memory": Row(lambda: swap(lambda: wrapped)),
    }


def network(params: Any, x: jax.Array) -> jax.Array:
    for layer in params["layers"].values():
        x = x + jnp.tanh(x @ layer["query"]["kernel"]) @ layer["value"]["kernel"]
    return x


def layers(count: int, hidden: int) -> Any:
    keys = jax.random.split(jax.random.key(0), 2 * count)
    kernels = [{"kernel": jax.random.normal(key, (hidden, hidden)) / hidden} for key in keys]
    return {"layers": {str(i): {"query": kernels[2 * i], "value": kernels[2 * i + 1]} for i in range(count)}}


def mixing(args: argparse.Namespace) -> Rows:
    x = jax.random.normal(jax.random.key(1), (8, args.tokens, args.hidden))
    config = jpeft.LoraConfig(r=args.rank, target_modules=["query", "value"], init_lora_weights=False)
    params = layers(args.layers, args.hidden)
    single = jpeft.wrap(params, config)
    one = jax.jit(jpeft.lift(network))
    rows: Rows = {"a single adapter, 8 rows": Row(lambda: block(one(single, x)))}
    for count in MIXED:
        wrapped = params
        for number in range(count):
            wrapped = jpeft.wrap(wrapped, config, adapter_name=str(number), rng=jax.random.key(number))
        run = functools.partial(mixed_batch, jax.jit(jpeft.lift(network)), jpeft.mixed_batch(wrapped), count, x)
        rows[f"mixed batch over {count}"] = Row(run, "a single adapter, 8 rows")
    return rows


def mixed_batch(apply: Any, mixed: jpeft.PeftParams, count: int, x: jax.Array) -> None:
    chosen = jnp.asarray([random.randrange(-1, count) for _ in range(len(x))])
    block(apply(jpeft.with_context(mixed, adapter_indices=chosen), x))
    assert apply._cache_size() == 1


def populations(args: argparse.Namespace) -> Rows:
    return {name: row for hidden in args.widths for name, row in population(args.members, args.layers, hidden).items()}


def population(members: int, count: int, hidden: int) -> Rows:
    params = layers(count, hidden)
    x, target = jax.random.normal(jax.random.key(2), (2, 4, 16, hidden))
    config = jpeft.LoraConfig(r=8, target_modules=["query", "value"])
    wrapped: list[Any] = [jpeft.wrap(params, config, rng=jax.random.key(seed)) for seed in range(members)]
    apply: Any = jpeft.lift(network)
    tx: Any = optax.masked(optax.adamw(1e-3), jpeft.trainable_mask)

    def step(wrapped: Any, state: Any) -> Any:
        gradient = jpeft.grad(lambda own: ((apply(own, x) - target) ** 2).mean())(wrapped)
        updates, state = tx.update(gradient, state, wrapped)
        return optax.apply_updates(wrapped, updates), state

    stacked: Any = jpeft.stack_adapters(wrapped)
    axes = jpeft.population_axes(stacked)
    states, state = [tx.init(member) for member in wrapped], jax.vmap(tx.init, in_axes=(axes,))(stacked)
    alone, together = jax.jit(step), jax.jit(jax.vmap(step, in_axes=(axes, 0), out_axes=(axes, 0)))
    everything = jnp.broadcast_to(x, (members, *x.shape))
    floor = jax.jit(jax.grad(lambda x: ((network(params, x) - target) ** 2).mean()))

    one_by_one, as_population, products = population_names(members, hidden)
    return {
        one_by_one: Row(lambda: block([alone(*own) for own in zip(wrapped, states, strict=True)])),
        as_population: Row(lambda: block(together(stacked, state)), one_by_one),
        # What no way of having adapters can save: the frozen model, forward and backward, for the rows of all members.
        products: Row(lambda: block(floor(everything)), as_population),
    }


def block(tree: Any) -> None:
    jax.block_until_ready(tree)


if __name__ == "__main__":
    main()
