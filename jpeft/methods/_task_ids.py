"""`task_ids`: the task of each row of a batch, for methods that learn several tasks at once."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from .._config import FrozenMapping
from .._contract import RowInput


def task_ids_of(count: Callable[[Any], int]) -> FrozenMapping:
    """The row inputs of a method whose configs know `count(config)` tasks."""

    def check(ids: jax.Array, config: Any) -> None:
        tasks, held = count(config), None if _is_unknown(ids) else np.asarray(ids)
        if held is not None and (held.min() < 0 or held.max() >= tasks):
            wrong = sorted({int(task) for task in held if not 0 <= task < tasks})
            raise ValueError(f"task_ids hold {wrong}; expected 0 to {tasks - 1}, as the adapter knows {tasks} tasks")

    return FrozenMapping({"task_ids": RowInput(read_task_ids, check=check)})


def read_task_ids(value: Any) -> jax.Array:
    """Numbers of tasks (rows,) as int32."""
    array = value if isinstance(value, jax.ShapeDtypeStruct) else jnp.asarray(value)
    if array.ndim != 1 or not array.size or not jnp.issubdtype(array.dtype, jnp.integer):
        raise ValueError(f"task_ids are {array.dtype} of shape {array.shape}; expected integers of shape (rows,)")
    if isinstance(array, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(array.shape, jnp.int32)  # type: ignore[return-value]
    return array.astype(jnp.int32)


def of_tasks(table: jax.Array, ids: jax.Array) -> jax.Array:
    """The rows of a table (tasks, ...) for the tasks of a batch; NaN for a task that it does not have.

    >>> of_tasks(jnp.array([[1.0], [2.0]]), jnp.array([1, -1])).tolist()
    [[2.0], [nan]]
    """
    return of_known(jnp.take(table, ids, axis=0, mode="clip"), ids, table.shape[0])


def of_known(values: jax.Array, ids: jax.Array, tasks: int) -> jax.Array:
    """What was made for the tasks of a batch, (rows, ...), with NaN for a task that there is not.

    A wrong task cannot be refused under jit, and an index below zero would count from the end. Not every function of a
    NaN is one (compiled for CPU by JAX 0.12, an exponential is zero), so that this comes after such functions.
    """
    known = (ids >= 0) & (ids < tasks)
    return jnp.where(known.reshape(-1, *(1 for _ in values.shape[1:])), values, jnp.nan)


def _is_unknown(ids: Any) -> bool:
    return isinstance(ids, (Tracer, jax.ShapeDtypeStruct))
