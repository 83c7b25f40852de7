"""`plan`: a training step compiled for devices that need not be there, and what the compiler says of it."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from tqdm import tqdm

import jpeft

from ._devices import Target, target
from ._measure import measured
from ._results import Plan, StepPlan
from ._search import largest
from ._steps import Step, adapter_step, floor_step, full_step
from ._workload import Workload, method_config, workload


def plan(
    model: str | Path | Mapping[str, Any],
    *,
    method: str | jpeft.PeftConfig = "lora",
    r: int | None = None,
    target_modules: Any = None,
    platform: str = "tpu",
    topology: str | None = None,
    mesh: Mapping[str, int] | None = None,
    batch: int,
    seq: int,
    target_seq: int | None = None,
    task: str | None = None,
    dtype: Any = jnp.bfloat16,
    param_dtype: Any = None,
    quantize: str | None = None,
    scan_layers: bool = True,
    remat: str | None = "nothing_saveable",
    loss_chunk_size: int | None = None,
    accumulate: int = 1,
    optimizer: optax.GradientTransformation | None = None,
    full: bool = True,
    floor: bool = True,
    search: bool = True,
    memory: float | None = None,
    effort: float = 0.0,
    progress: bool = True,
) -> Plan:
    """Compile a training step for devices that need not be there: does it fit, what does it cost, how far can it go.

    Nothing is run and no parameter is made; the TPU's compiler comes with `pip install "jpeft[plan]"`. Beside the
    adapter's step it compiles that of full fine-tuning and that of the frozen model, for comparison.

    model: a folder with a config.json, the file, or its dict; of any family of `jpeft_interop.models`.
    method: PEFT's name for it, with `r` and `target_modules` (None: PEFT's for this type of model), or its config.
    platform, topology: "tpu" with a topology such as "v5e:4x4" (None: that); "cpu" and "gpu" take what is installed.
    mesh: {axis: size} of "data", "fsdp" (batch and parameters) and "tp"; None: {"fsdp": all devices}.
    batch, seq, target_seq: rows of one step over all devices, tokens of a row, and of a decoder's (None: seq).
    task: of `jpeft_interop.models`; None: causal-lm, or seq2seq-lm, whichever the family has.
    dtype, param_dtype: of the computation and of the stored parameters (None: the same). quantize: of the base, as
    `jpeft.quantize` takes it; full fine-tuning stays dense. scan_layers, remat, loss_chunk_size: as for the models.
    accumulate: micro-batches a step. optimizer: None is `optax.adamw(1e-4)`, whose moments are in the dtype of what
    trains. full, floor: whether those steps are compiled, too. search: whether the largest batch that fits is searched
    for, with about four more compilations for each step. memory: GiB of a device, in the place of what is known.
    effort: of the compiler, from -1 to 1; at -1 it can be several times as quick; its program's memory is another
    (not with JAX 0.12, which has no such setting).
    progress: whether a bar is shown.

    A step that does not fit is an answer: `fits` is False, and `refusal` has the compiler's words. Raises ValueError
    for names, meshes and sizes that do not go together, with the numbers, and ImportError without libtpu.

    >>> sizes = dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48)
    >>> llama = {"model_type": "llama", **sizes}
    >>> found = plan(llama, platform="cpu", mesh={"fsdp": 1}, batch=2, seq=8, full=False, progress=False)
    >>> found.adapter.adapter < found.adapter.parameters, found.adapter.flops > found.floor.flops
    (True, True)
    """
    if not -1 <= effort <= 1:
        raise ValueError(f"effort is {effort!r}; expected a number from -1, the quickest compilation, to 1")
    _check_sizes(batch=batch, seq=seq, target_seq=target_seq, accumulate=accumulate, loss_chunk_size=loss_chunk_size)
    topology = "v5e:4x4" if platform == "tpu" and topology is None else topology
    where = target(platform, topology, mesh, memory)
    param_dtype = dtype if param_dtype is None else param_dtype
    work = workload(
        model,
        task=task,
        mesh=where.mesh,
        dtype=dtype,
        param_dtype=param_dtype,
        scan_layers=scan_layers,
        remat=remat,
        seq=seq,
        target_seq=target_seq,
        loss_chunk_size=loss_chunk_size,
    )
    unit = work.rows * accumulate
    if batch % unit:
        raise ValueError(
            f"batch is {batch}, which {unit} does not divide: the mesh {dict(work.mesh.shape)} splits rows over "
            f"{work.rows} devices, in {accumulate} micro-batches a step; nearest: {max(batch // unit, 1) * unit}"
        )
    config = method_config(method, r, target_modules, work.model.blueprint.family.model_type)
    tx = optax.adamw(1e-4) if optimizer is None else optimizer
    steps = {"adapter": adapter_step(work, config, tx, accumulate, quantize)}
    steps |= {"full": full_step(work, tx, accumulate)} if full else {}
    steps |= {"floor": floor_step(work, tx, accumulate, quantize)} if floor else {}

    with tqdm(total=len(steps), desc="compiling", disable=not progress) as bar:
        found = {
            name: _found(name, step, work, batch, unit, where, search, effort, bar) for name, step in steps.items()
        }
    settings = {
        "model_type": work.model.blueprint.family.model_type,
        "task": work.task,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(work.model.params)),
        "trainable": steps["adapter"].trainable,
        "method": method_name(config),
        "platform": platform,
        "topology": where.topology,
        "device": where.kind,
        "mesh": dict(where.mesh.shape),
        "batch": batch,
        "seq": seq,
        "target_seq": work.target_seq,
        "dtype": jnp.dtype(dtype).name,
        "param_dtype": jnp.dtype(param_dtype).name,
        "quantize": quantize,
        "scan_layers": scan_layers,
        "remat": remat,
        "loss_chunk_size": loss_chunk_size,
        "accumulate": accumulate,
        "effort": effort,
        "jax": jax.__version__,
    }
    return Plan(settings, where.memory, found["adapter"], found.get("full"), found.get("floor"))


def method_name(config: jpeft.PeftConfig) -> str:
    rank = getattr(config, "r", None)
    return str(config.peft_type) + (f" r={rank}" if isinstance(rank, int) and rank else "")


def _check_sizes(**sizes: int | None) -> None:
    for name, size in sizes.items():
        if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
            raise ValueError(f"{name} is {size!r}; expected a whole number of at least 1")


def _found(
    name: str, step: Step, work: Workload, batch: int, unit: int, where: Target, search: bool, effort: float, bar: Any
) -> StepPlan:
    bar.set_postfix_str(f"{name}, batch {batch}")
    found = measured(step, work, batch, where.memory, effort)
    bar.update()
    if not search or where.memory is None:
        return found

    def total(units: int) -> tuple[bool, int | None]:
        bar.total += 1
        bar.set_postfix_str(f"{name}, batch {units * unit}")
        tried = measured(step, work, units * unit, where.memory, effort, details=False)
        bar.update()
        return bool(tried.fits), tried.total

    units = largest(total, where.memory, batch // unit, (bool(found.fits), found.total))
    return dataclasses.replace(found, largest_batch=units * unit)
