"""Memory of a training step of a 1B Llama on one device, with and without each means to save it: nothing runs.

    pip install libtpu
    python examples/benchmarks/memory.py                  # as compiled for one TPU v5e chip (16 GiB)
    python examples/benchmarks/memory.py --platform cpu   # by the compiler at hand, in float32

The sizes are those of Llama 3.2 1B: layers stacked and scanned, LoRA of rank 16 on all seven projections, AdamW,
bfloat16 weights. The compiler lays out the whole step and says what it needs; donated state is counted once.
"""

import argparse
import dataclasses
import json
import os
from typing import Any

# Read by libtpu when it loads: what it would otherwise ask the TPU's host for. Nothing runs, on no TPU.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import optax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from tqdm import tqdm

import jpeft
from jpeft_interop.models import FlaxAutoModelForCausalLM

GIB = 2**30
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LLAMA = {
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": True,
}


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table. chunk: tokens a chunk of the loss, or None for all logits. base: "full" trains it."""

    name: str
    remat: str | None = "nothing_saveable"
    chunk: int | None = 512
    base: str = "bfloat16"
    adapter: str = "float32"


ROWS = (
    Row("full fine-tuning, all saved", None, None, "full"),
    Row("full fine-tuning, nothing saved, loss by chunks", base="full"),
    Row("LoRA, all saved", None, None),
    Row("LoRA, nothing saved", chunk=None),
    Row("LoRA, nothing saved, loss by chunks"),
    Row("the same, `save_adapted_products`", "save_adapted_products"),
    Row("the same, `dots_with_no_batch_dims_saveable`", "dots_with_no_batch_dims_saveable"),
    Row("nothing saved, loss by chunks, bfloat16 adapter and moments", adapter="bfloat16"),
    Row("nothing saved, loss by chunks, int8 base", base="int8"),
    Row("nothing saved, loss by chunks, nf4 base", base="nf4"),
)


def main() -> None:
    args = arguments()
    place = placement(args.platform)
    measured = []
    for row in tqdm([row for row in ROWS if args.only in row.name], unit="row"):
        measured.append({"row": row.name, **figures(row, args, place)})
        tqdm.write(json.dumps(measured[-1]))
    print(table(args, measured))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--platform", choices=("tpu", "cpu"), default="tpu")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=LLAMA["num_hidden_layers"])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--only", default="", help="rows whose names hold this")
    return parser.parse_args()


def placement(platform: str) -> Any:
    """`tree -> tree` of shapes on the described chip, or on the device at hand."""
    if platform == "cpu":
        return lambda tree: tree
    devices = topologies.get_topology_desc("v5e:2x2", platform="tpu").devices
    chip = NamedSharding(Mesh(devices[:1], ("chip",)), P())
    return lambda tree: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=chip), tree)


def figures(row: Row, args: argparse.Namespace, place: Any) -> dict[str, Any]:
    """What a step needs in GiB, or why the compiler refuses it."""
    # The compiler for CPUs makes bfloat16 products in float32, and would count copies that no accelerator makes.
    dtype = jnp.float32 if args.platform == "cpu" else jnp.bfloat16
    sizes = {**LLAMA, "num_hidden_layers": args.layers}
    model = FlaxAutoModelForCausalLM.from_config(
        sizes, abstract=True, param_dtype=dtype, scan_layers=True, remat=row.remat
    )
    batch = place({"ids": jax.ShapeDtypeStruct((args.batch, args.length), jnp.int32)})

    def loss(apply: Any, params: Any, batch: Any) -> jax.Array:
        return apply(params, input_ids=batch["ids"], labels=batch["ids"], loss_chunk_size=row.chunk).loss

    lowered = full(model, loss, place, batch) if row.base == "full" else lora(row, model, args.rank, loss, place, batch)
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        return {"refused": next(line for line in str(error).splitlines() if line.strip())[:160]}
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
    given, temporaries = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    total = given + temporaries + memory.output_size_in_bytes - memory.alias_size_in_bytes
    # The compiler counts the body of a loop once, so that FLOPs compare rows, and are no total of a step.
    return {
        "arguments": given / GIB,
        "temporaries": temporaries / GIB,
        "total": total / GIB,
        "flops": cost["flops"],
    }


def lora(row: Row, model: Any, rank: int, loss: Any, place: Any, batch: Any) -> Any:
    base = model.params if row.base == "bfloat16" else jpeft.quantize(model.params, row.base)
    config = jpeft.LoraConfig(r=rank, target_modules=PROJECTIONS)
    wrapped, tx = place(jpeft.wrap(base, config, dtype=row.adapter)), optax.adamw(1e-4)
    return jpeft.make_train_step(model.apply, loss, tx).lower(jpeft.train_state(wrapped, tx), batch)


def full(model: Any, loss: Any, place: Any, batch: Any) -> Any:
    tx, params = optax.adamw(1e-4), place(model.params)

    def step(params: Any, state: Any, batch: Any) -> Any:
        value, grads = jax.value_and_grad(lambda params: loss(model.apply, params, batch))(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    return jax.jit(step, donate_argnums=(0, 1)).lower(params, place(jax.eval_shape(tx.init, params)), batch)


def table(args: argparse.Namespace, measured: list[dict[str, Any]]) -> str:
    lines = [
        "",
        f"{args.layers} layers, rank {args.rank}, {args.batch} x {args.length} tokens, {args.platform}, "
        f"jax {jax.__version__}",
        "",
        "| step | arguments, GiB | temporaries, GiB | in all, GiB | TFLOP, loops once |",
        "|---|---|---|---|---|",
    ]
    for row in measured:
        cells = [row["refused"], "", "", ""] if "refused" in row else [
            *(f"{row[name]:.2f}" for name in ("arguments", "temporaries", "total")),
            f"{row['flops'] / 1e12:.2f}",
        ]  # fmt: skip
        lines.append(f"| {row['row']} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
