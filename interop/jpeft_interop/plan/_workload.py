"""What is trained on what: a model of a config without arrays, the shapes of a batch, the config of a method."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jpeft import PeftConfig
from jpeft._contract import config_classes

from .._default_targets import with_default_targets

TASKS = ("causal-lm", "seq2seq-lm", "masked-lm", "sequence-classification", "token-classification")
BATCH_AXES = ("data", "fsdp")


@dataclass(frozen=True)
class Workload:
    """A model on a mesh, its task, and the sizes of its batches. target_seq: tokens of a decoder's text."""

    model: Any
    task: str
    mesh: Mesh
    seq: int
    target_seq: int | None
    loss_chunk_size: int | None

    def loss(self, apply: Callable[..., Any], params: Any, batch: Mapping[str, jax.Array]) -> jax.Array:
        """The model's own loss."""
        chunked = {} if self.loss_chunk_size is None else {"loss_chunk_size": self.loss_chunk_size}
        return apply(params, **batch, **chunked).loss

    def batch(self, rows: int) -> dict[str, jax.ShapeDtypeStruct]:
        """The shapes of a batch of this many rows, split over the mesh's batch axes."""
        axes = tuple(name for name in BATCH_AXES if name in self.mesh.axis_names)
        sharding = NamedSharding(self.mesh, PartitionSpec(axes) if axes else PartitionSpec())
        labels = {"seq2seq-lm": (rows, self.target_seq), "sequence-classification": (rows,)}
        shapes = {"input_ids": (rows, self.seq), "labels": labels.get(self.task, (rows, self.seq))}
        return {name: jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding) for name, shape in shapes.items()}

    @property
    def rows(self) -> int:
        """Devices that share out the rows of a batch: the least number of rows."""
        shape = dict(self.mesh.shape)
        count = 1
        for name in BATCH_AXES:
            count *= shape.get(name, 1)
        return count


def workload(
    model: str | Path | Mapping[str, Any],
    *,
    task: str | None,
    mesh: Mesh,
    dtype: Any,
    param_dtype: Any,
    scan_layers: bool,
    remat: str | None,
    seq: int,
    target_seq: int | None,
    loss_chunk_size: int | None,
) -> Workload:
    """The abstract model of a config, on a mesh. Raises ValueError for what its family cannot do."""
    from ..models import FAMILIES
    from ..models._config import read_json
    from ..models.auto import AutoModel

    raw = read_json(model)
    family = FAMILIES.get(str(raw.get("model_type")))
    tasks = [name for name in TASKS if family is not None and name in family.architectures]
    # A family that is not implemented is named by the model's own error.
    chosen = task or next(iter(tasks), TASKS[0])
    if task is not None and family is not None and task not in tasks:
        raise ValueError(
            f"task is {task!r}; for model_type {family.model_type!r} expected one of: {', '.join(tasks) or 'none'}"
        )
    if loss_chunk_size is not None and chosen != "causal-lm":
        raise ValueError(f"loss_chunk_size is {loss_chunk_size}, for task {chosen!r}; only causal-lm has such a loss")
    built = AutoModel(chosen).from_config(
        raw,
        abstract=True,
        mesh=mesh,
        dtype=dtype,
        param_dtype=param_dtype,
        scan_layers=scan_layers,
        remat=remat,
    )
    return Workload(built, chosen, mesh, seq, (target_seq or seq) if chosen == "seq2seq-lm" else None, loss_chunk_size)


def method_config(method: str | PeftConfig, r: int | None, targets: Any, model_type: str) -> PeftConfig:
    """The config of a method of this name, or as given; without targets, with those of PEFT for the model's type."""
    if isinstance(method, PeftConfig):
        given = {"r": r, "target_modules": targets}
        if any(value is not None for value in given.values()):
            raise ValueError(
                f"method is a {type(method).__name__}, and {given} are given beside it: put them into the config"
            )
        return with_default_targets(method, model_type)
    classes: dict[str, type[Any]] = {str(kind).lower(): config for kind, config in config_classes().items()}
    chosen = classes.get(str(method).lower().replace("-", "_"))
    if chosen is None:
        raise ValueError(f"method is {method!r}; expected the config of a method, or one of: {', '.join(classes)}")
    fields = {} if targets is None else {"target_modules": targets}
    if r is not None:
        if "r" not in chosen.__dataclass_fields__:
            raise ValueError(f"method {method!r} has no rank r; give its config, such as jpeft.{chosen.__name__}(...)")
        fields["r"] = r
    return with_default_targets(chosen(**fields), model_type)
