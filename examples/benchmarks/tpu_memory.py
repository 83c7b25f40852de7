"""Memory of a training step of a 7B Llama on 16 TPU v5e chips, from compilation alone: no TPU is needed.

    pip install libtpu
    python examples/benchmarks/tpu_memory.py

The compiler for TPUs is in `libtpu`; it compiles the whole step for a described topology and reports the memory of one
chip. FSDP over the 16 chips, layers scanned and rematerialised, bfloat16 weights, float32 adapters and AdamW.
"""

import argparse
import functools
import json
import os
from typing import Any

# Read by libtpu when it loads: what it would otherwise ask the TPU's host for.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-16")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
# Several programs may compile at once, as no device is theirs.
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
# Nothing runs, so nothing may wait for a TPU that is not there.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import optax
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
    is_shape,
    materialised,
    parameter_shapes,
    thin_first,
    training_step,
)
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from tqdm import tqdm

import jpeft

GIB = 2**30
# The axis that FSDP splits: the one of the model's width, as MaxText does.
SPLIT = {**dict.fromkeys(PROJECTIONS, 1), "o_proj": 2, "down_proj": 2}


def main() -> None:
    args = arguments()
    mesh = Mesh(topologies.get_topology_desc("v5e:4x4", platform="tpu").devices, ("fsdp",))
    shape = Shape(4096, 11008, 32, args.layers, 32000, scan=True, query_block=args.query_block)
    tokens = abstract(mesh, (args.batch * mesh.size, args.length), jnp.int32, P("fsdp"))
    rows = []
    made = variants(mesh, shape, args.rank)
    for name in tqdm(args.only or made, desc="compiling"):
        rows.append({"variant": name, **measured(made[name], tokens, args.dump and f"{args.dump}.{name}")})
        tqdm.write(json.dumps(rows[-1]))
    print(table(args, rows))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--batch", type=int, default=4, help="sequences a chip")
    parser.add_argument("--length", type=int, default=2048, help="tokens a sequence")
    parser.add_argument("--query-block", type=int, default=512, help="queries that attention takes at a time; 0: all")
    parser.add_argument("--only", nargs="*", help="names of variants")
    parser.add_argument("--dump", help="write each compiled program to this path, with the variant's name added")
    return parser.parse_args()


def abstract(mesh: Mesh, size: tuple[int, ...], dtype: Any, spec: P) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(size, dtype, sharding=NamedSharding(mesh, spec))


def base_parameters(mesh: Mesh, shape: Shape) -> dict[str, Any]:
    def leaf(path: tuple[Any, ...], size: tuple[int, ...]) -> jax.ShapeDtypeStruct:
        names = [entry.key for entry in path]
        split = SPLIT.get(names[-2]) if names[-1] == "kernel" else {"embedding": 1, "head": 0}.get(names[-1])
        return abstract(mesh, size, jnp.bfloat16, P(*("fsdp" if axis == split else None for axis in range(len(size)))))

    return jax.tree_util.tree_map_with_path(leaf, parameter_shapes(shape), is_leaf=is_shape)


def wrapped_parameters(mesh: Mesh, base: dict[str, Any], rank: int) -> jpeft.PeftParams:
    config = jpeft.LoraConfig(r=rank, lora_alpha=rank, target_modules=list(PROJECTIONS))
    wrapped = jpeft.wrap(base, config, layouts={r"layers\..*_proj": "bio"})

    def leaf(path: tuple[Any, ...], array: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        # lora_A (layers, r, in), lora_B (layers, out, r): split where the weight is, else replicated.
        where = jax.tree_util.keystr(path)
        inward = SPLIT[next(name for name in PROJECTIONS if name in where)] == 1
        own = {(True, "lora_A"): P(None, None, "fsdp"), (False, "lora_B"): P(None, "fsdp")}
        name = next((name for name in ("lora_A", "lora_B") if name in where), None)
        return abstract(mesh, array.shape, array.dtype, own.get((inward, name), P()))

    adapters = jax.tree_util.tree_map_with_path(leaf, wrapped.adapters)
    return jpeft.PeftParams(base, adapters, wrapped.active)


def variants(mesh: Mesh, shape: Shape, rank: int) -> dict[str, Variant]:
    rows = NamedSharding(mesh, P("fsdp"))
    loss = functools.partial(decoder_loss, shape=shape, constrain=lambda x: jax.lax.with_sharding_constraint(x, rows))
    base = base_parameters(mesh, shape)
    wrapped = wrapped_parameters(mesh, base, rank)
    zeros = lambda size: abstract(mesh, size, jnp.float32, P())  # noqa: E731
    return {
        "floor": frozen_floor(base, loss, shape, zeros),
        "jpeft": by_jpeft(wrapped, loss),
        "autodiff": by_hand(wrapped, loss, beside(as_written)),
        "two axes": by_hand(wrapped, loss, beside(in_two_axes)),
        "thin first": by_hand(wrapped, loss, beside(thin_first)),
        "custom_vjp": by_hand(wrapped, loss, beside(hand_written)),
        "W + BA": by_hand(wrapped, loss, materialised),
        "full fine-tuning": full_fine_tuning(base, loss),
    }


def measured(variant: Variant, tokens: jax.ShapeDtypeStruct, dump: str | None) -> dict[str, Any]:
    """What one chip needs, or why the compiler refuses the step."""
    optimizer, step = training_step(variant)
    state = placed(optimizer, variant.trainable)
    try:
        compiled = step.lower(variant.trainable, state, variant.frozen, tokens).compile()
    except jax.errors.JaxRuntimeError as error:
        return {"refused": str(error).strip().splitlines()[0][:200]}
    memory, cost, text = compiled.memory_analysis(), compiled.cost_analysis(), compiled.as_text()
    if dump:
        with open(dump, "w") as file:
            file.write(text)
    return {
        "temporaries": memory.temp_size_in_bytes / GIB,
        "arguments": memory.argument_size_in_bytes / GIB,
        # The compiler counts the body of a loop once, so these compare variants, and are no totals of a step.
        "teraflops": cost["flops"] / 1e12,
        "moved": cost["bytes accessed"] / GIB,
    }


def placed(optimizer: optax.GradientTransformation, trainable: Any) -> Any:
    """The abstract optimizer state, each moment sharded as its parameter."""
    return optax.tree.map_params(
        optimizer,
        lambda leaf, parameter: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=parameter.sharding),
        jax.eval_shape(optimizer.init, trainable),
        trainable,
    )


def table(args: argparse.Namespace, rows: list[dict[str, Any]]) -> str:
    columns = ("temporaries", "arguments", "teraflops", "moved")
    lines = [
        "",
        f"{args.layers} layers, rank {args.rank}, {args.batch} x {args.length} tokens a chip, "
        f"queries in blocks of {args.query_block or args.length}, jax {jax.__version__}",
        "",
        "| variant | temporaries, GiB | arguments, GiB | TFLOP, loops once | GiB moved, loops once |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [row["refused"]] if "refused" in row else [f"{row[column]:.2f}" for column in columns]
        lines.append(f"| {row['variant']} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
