"""One process of a training run of several, as a pod has one on each host: what `test_many_hosts.py` starts and kills.

It trains LoRA on a Llama read from a folder, over a mesh of all devices of all processes (`fsdp` x `tp`), goes on from
the newest checkpoint if there is one, and tells a file what it does, a line of JSON for each step.
"""

import argparse
import dataclasses
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P

import jpeft
import jpeft_interop
from jpeft_interop.models import FlaxAutoModelForCausalLM, FlaxModel

BATCH, LENGTH, EVERY = 8, 6, 2
CONFIG = jpeft.LoraConfig(
    r=4,
    lora_alpha=16,
    lora_dropout=0.1,
    target_modules=["q_proj", "v_proj", "o_proj", "down_proj"],
    task_type="CAUSAL_LM",
)


@dataclasses.dataclass(frozen=True)
class Run:
    """What trains: the state it begins with, its step, and the batch of a number, on whatever devices there are."""

    state: jpeft.TrainState
    step: Callable[[jpeft.TrainState, Any], Any]
    batch: Callable[[int], Any]


def begun(model: FlaxModel, mesh: Mesh | None) -> Run:
    """mesh: None on a single device. The numbers are the same either way."""
    wrapped = jpeft.wrap(model.params, CONFIG, rng=jax.random.key(1))
    if mesh is not None:
        wrapped = jax.device_put(wrapped, jpeft.shardings(wrapped, mesh, tiny=0))
    tx = optax.adamw(3e-2)

    def loss(apply: Any, params: jpeft.PeftParams, batch: Any) -> jax.Array:
        return apply(params, input_ids=batch, labels=batch).loss

    def batch(number: int) -> Any:
        rows = np.random.default_rng(number).integers(1, model.config.vocab_size, (BATCH, LENGTH), np.int32)
        if mesh is None:
            return jnp.asarray(rows)
        # The rows of this process: a real program reads no others.
        own = np.split(rows, jax.process_count())[jax.process_index()]
        return jax.make_array_from_process_local_data(NamedSharding(mesh, P("fsdp")), own)

    state = jpeft.train_state(wrapped, tx, rng=jax.random.key(2))
    return Run(state, jpeft.make_train_step(model.apply, loss, tx), batch)


def counted_reading() -> Callable[[], int]:
    """Count what is read of the base from now on; returns a function that tells the bytes."""
    from jpeft_interop.models._tensors import Tensor

    read, original = [0], Tensor.read

    def counting(tensor: Any, index: Any) -> np.ndarray:
        block = original(tensor, index)
        read[0] += block.nbytes
        return block

    Tensor.read = counting
    return lambda: read[0]


def counted_gathering() -> Callable[[], int]:
    """Count what is gathered from all processes from now on; returns a function that tells the bytes."""
    gathered, original = [0], multihost_utils.process_allgather

    def counting(array: Any, **options: Any) -> Any:
        gathered[0] += array.nbytes
        return original(array, **options)

    multihost_utils.process_allgather = counting
    return lambda: gathered[0]


def held_here(params: Any) -> int:
    """Bytes of the different parts of parameters that this process's devices hold."""
    found = 0
    for leaf in jax.tree.leaves(params):
        found += sum({str(shard.index): shard.data.nbytes for shard in leaf.addressable_shards}.values())
    return found


def killed_at(function: Callable[..., None], name: str) -> Callable[..., None]:
    """os.rename or os.replace that kills this process instead of giving a file or folder its last name."""

    def deadly(source: Any, target: Any, **options: Any) -> None:
        if os.path.basename(target) == name:
            os.kill(os.getpid(), signal.SIGKILL)
        function(source, target, **options)

    return deadly


def teller(path: Path) -> Callable[..., None]:
    """Not on standard output, where the network's own messages break lines in two."""
    file = path.open("w")

    def say(**facts: Any) -> None:
        print(json.dumps(facts), file=file, flush=True)

    return say


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--process", type=int, required=True)
    parser.add_argument("--port", required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--killed", choices=["step", "checkpoint", "save", "term"])
    parser.add_argument("--at", type=int, default=0, help="the step at which this process is killed")
    parser.add_argument("--facts", type=Path, required=True, help="the file to tell")
    given = parser.parse_args()
    say = teller(given.facts)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_num_cpu_devices", 4)
    jax.distributed.initialize(
        f"localhost:{given.port}",
        num_processes=2,
        process_id=given.process,
        initialization_timeout=60,
        heartbeat_timeout_seconds=30,
        shutdown_timeout_seconds=60,
    )
    mesh = jax.make_mesh((4, 2), ("fsdp", "tp"), axis_types=(AxisType.Auto,) * 2)
    read = counted_reading()
    model = FlaxAutoModelForCausalLM.from_pretrained(given.model, mesh=mesh)
    say(read=read(), held=held_here(model.params), whole=sum(leaf.nbytes for leaf in jax.tree.leaves(model.params)))
    run = begun(model, mesh)
    adapter = given.out / "adapter"
    with jpeft.Checkpointer(given.out / "checkpoints", every=EVERY) as checkpoints:
        state, position = checkpoints.restore(run.state)
        first = 0 if position is None else position["batch"] + 1
        say(first=first, step=int(state.step))
        for number in range(first, given.steps):
            state, metrics = run.step(state, run.batch(number))
            if given.killed == "step" and number + 1 == given.at:
                os.kill(os.getpid(), signal.SIGKILL)  # The step is under way: nobody has waited for it.
            say(step=number + 1, loss=float(metrics["loss"]).hex())
            dying = given.killed == "checkpoint" and number + 1 == given.at
            if dying:
                os.rename = killed_at(os.rename, str(given.at))
            checkpoints.save(state, position={"batch": number}, step=number + 1)
            if dying:
                checkpoints.wait()
            if given.killed == "term" and number + 1 == given.at:
                os.kill(os.getpid(), signal.SIGTERM)
            if checkpoints.reached_preemption(number + 1):
                say(preempted=number + 1)
                return
            if number + 1 == EVERY:
                checkpoints.wait()
                jpeft_interop.save_pretrained(state.params, adapter, base_model_name_or_path=str(given.model))
    try:
        jpeft_interop.save_pretrained(state.params, given.model / "config.json")
    except ValueError as error:
        say(refused=str(error))
    if given.killed == "save":
        os.replace = killed_at(os.replace, ".adapter_config.json.next")
    gathered = counted_gathering()
    jpeft_interop.save_pretrained(state.params, adapter, base_model_name_or_path=str(given.model))
    say(gathered=gathered(), trained=sum(array.nbytes for array in jax.tree.leaves(jpeft.partition(state.params)[0])))
    again = jpeft_interop.load_pretrained(model.params, adapter, is_trainable=True)
    pairs = zip(jax.tree.leaves(again.adapters), jax.tree.leaves(state.params.adapters), strict=True)
    say(reloaded=all(bool((a == b).all()) and a.sharding.device_set == b.sharding.device_set for a, b in pairs))


if __name__ == "__main__":
    main()
