"""LoRA on a pod: parameters split over `fsdp` x `tp`, checkpoints, preemption, and an adapter that PyTorch PEFT reads.

On one machine as it stands (eight virtual devices where there is only a CPU, and a tiny model of its own):

    python examples/05_pod_training.py --steps 60

Run it again with more steps, or after a SIGTERM (or a `kill -9`), and it goes on where it was. On a pod, on every host:

    python examples/05_pod_training.py --pod --model /shared/llama --out /shared/run --fsdp 32 --tp 8

and where JAX cannot tell by itself which hosts there are, with `--coordinator HOST:PORT --processes N --process I`.
`--out` is a folder that all hosts see, or a `gs://` path for the checkpoints (`--checkpoints`).
"""

import argparse
import socket
from pathlib import Path

import jax
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from tqdm import tqdm

import jpeft
import jpeft_interop
from jpeft_interop.models import FlaxAutoModelForCausalLM

TINY = {
    "model_type": "llama",
    "vocab_size": 32,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "tie_word_embeddings": False,
    "initializer_range": 0.2,
}


def join(given: argparse.Namespace) -> None:
    """Become one of the processes. One that is alone joins itself: so JAX listens for a SIGTERM."""
    jax.config.update("jax_num_cpu_devices", given.cpu_devices)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    if given.pod:
        jax.distributed.initialize()
    elif given.coordinator:
        jax.distributed.initialize(given.coordinator, given.processes, given.process)
    else:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        jax.distributed.initialize(f"localhost:{port}", num_processes=1, process_id=0)


def tiny_model(folder: Path) -> Path:
    """A folder with a model in it, as the Hub would give it; one process writes it."""
    if jax.process_index() == 0 and not (folder / "model.safetensors").exists():
        FlaxAutoModelForCausalLM.from_config(TINY, rng=jax.random.key(0)).save_pretrained(folder)
    multihost_utils.sync_global_devices("the model is written")
    return folder


def rows(number: int, batch: int, length: int, vocabulary: int) -> np.ndarray:
    """This process's rows of a batch: sequences that count on, each from a start and by a stride of its own."""
    own = np.arange(jax.process_index(), batch, jax.process_count())  # No process reads another's rows.
    start, stride = np.random.default_rng(number).integers(1, 6, (2, batch, 1))[:, own]
    return ((start * 11 + stride * np.arange(length)) % vocabulary).astype(np.int32)


def loss(apply, params, batch):
    return apply(params, input_ids=batch, labels=batch).loss


def train(given: argparse.Namespace) -> None:
    tp = given.tp or (2 if jax.device_count() % 2 == 0 else 1)
    sizes = (given.fsdp or jax.device_count() // tp, tp)
    mesh = jax.make_mesh(sizes, ("fsdp", "tp"), axis_types=(AxisType.Auto,) * 2)

    # Each process reads the parts of the base that its devices hold, and nothing else.
    folder = given.model or tiny_model(given.out / "base")
    model = FlaxAutoModelForCausalLM.from_pretrained(folder, mesh=mesh)
    config = jpeft.LoraConfig(r=8, lora_alpha=16, lora_dropout=0.05, target_modules="all-linear", task_type="CAUSAL_LM")
    wrapped = jpeft.wrap(model.params, config, rng=jax.random.key(1))
    wrapped = jax.device_put(wrapped, jpeft.shardings(wrapped, mesh))

    tx = optax.adamw(1e-2)
    step = jpeft.make_train_step(model.apply, loss, tx, clip_norm=1.0)
    state = jpeft.train_state(wrapped, tx, rng=jax.random.key(2))
    place = NamedSharding(mesh, P("fsdp"))

    with jpeft.Checkpointer(given.checkpoints or given.out / "checkpoints", keep=2, every=given.every) as checkpoints:
        state, position = checkpoints.restore(state)
        first = position["batch"] + 1 if position else 0
        bar = tqdm(range(first, given.steps), initial=first, total=given.steps, disable=jax.process_index() > 0)
        for number in bar:
            local = rows(number, given.batch, given.length, model.config.vocab_size)
            state, metrics = step(state, jax.make_array_from_process_local_data(place, local))
            checkpoints.save(state, position={"batch": number}, step=number + 1)
            if checkpoints.reached_preemption(number + 1):
                bar.write(f"preempted: saved at step {number + 1}; run again to go on")
                return
            bar.set_postfix(loss=f"{float(metrics['loss']):.3f}")  # Waits for the step: at scale, not every time.
        checkpoints.save(state, position={"batch": given.steps - 1}, force=True)

    jpeft_interop.save_pretrained(state.params, given.out / "adapter", base_model_name_or_path=str(folder))
    if jax.process_index() == 0:
        print(f"adapter in {given.out / 'adapter'}: peft.PeftModel.from_pretrained(model, folder) reads it")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of a Llama, or of another model for text (a tiny one)")
    parser.add_argument("--out", type=Path, default=Path("pod-out"), help="folder for the results (%(default)s)")
    parser.add_argument("--checkpoints", help="where the checkpoints go (in --out)")
    parser.add_argument("--steps", type=int, default=60, help="steps in all, over all runs (%(default)s)")
    parser.add_argument("--every", type=int, default=20, help="steps from one checkpoint to the next (%(default)s)")
    parser.add_argument("--batch", type=int, default=16, help="rows of a batch, over all processes (%(default)s)")
    parser.add_argument("--length", type=int, default=16, help="tokens of a row (%(default)s)")
    parser.add_argument("--fsdp", type=int, help="devices that parameters and batch are split over (all, by --tp)")
    parser.add_argument("--tp", type=int, help="devices that layers are split over (2, if they are even in number)")
    parser.add_argument("--pod", action="store_true", help="one process of several that JAX finds by itself")
    parser.add_argument("--coordinator", help="HOST:PORT of process 0, where JAX does not")
    parser.add_argument("--processes", type=int, help="with --coordinator: how many there are")
    parser.add_argument("--process", type=int, help="with --coordinator: which one this is, from 0")
    parser.add_argument(
        "--cpu-devices", type=int, default=8, help="virtual devices where there is no other (%(default)s)"
    )
    given = parser.parse_args()
    join(given)
    train(given)


if __name__ == "__main__":
    main()
