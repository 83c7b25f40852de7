"""What a prompt of several tasks begins with: the arrays of one that was trained before, for one task more."""

from typing import Any

import jax
import jax.numpy as jnp

AVERAGE, EXACT, SHARED = SOURCES = ("AVERAGE_SOURCE_TASKS", "EXACT_SOURCE_TASK", "ONLY_SOURCE_SHARED")
"""The values of `prompt_tuning_init` that mean one."""

PROMPT, COLS, ROWS = "prompt_embeddings", "prefix_task_cols", "prefix_task_rows"


def array_shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """{name: shape} of the arrays of a prompt of several tasks."""
    rows, dim = config.num_virtual_tokens * config.submodules, config.token_dim
    ranks, tasks = config.num_ranks, config.num_tasks
    return {PROMPT: (rows, dim), COLS: (tasks, rows, ranks), ROWS: (tasks, ranks, dim)}


def of_source(config: Any) -> dict[str, jax.Array]:
    """The arrays that `prompt_tuning_init` takes from a source; raises ValueError for a source that does not fit."""
    how, task, given = config.prompt_tuning_init, config.prompt_tuning_init_task, config.prompt_tuning_init_state_dict
    names = (PROMPT,) if how == SHARED else (PROMPT, COLS, ROWS)
    if given is None:
        raise ValueError(
            f"prompt_tuning_init is {how!r}, and jpeft reads no files; expected prompt_tuning_init_state_dict, the "
            f"arrays {', '.join(names)}, or jpeft_interop.get_peft_model, which reads "
            "prompt_tuning_init_state_dict_path"
        )
    found = {name: jnp.asarray(given[name], jnp.float32) for name in names if name in given}
    _check_shapes({name: array.shape for name, array in found.items()}, names, config)
    if how == EXACT and task >= found[COLS].shape[0]:
        raise ValueError(
            f"prompt_tuning_init_task is {task}; expected 0 to {found[COLS].shape[0] - 1}, as the source has "
            f"{found[COLS].shape[0]} tasks"
        )
    if how == SHARED:
        return found
    own = {name: found[name][task] if how == EXACT else found[name].mean(axis=0) for name in (COLS, ROWS)}
    return {PROMPT: found[PROMPT], **{name: array[None] for name, array in own.items()}}


def _check_shapes(shapes: dict[str, tuple[int, ...]], names: tuple[str, ...], config: Any) -> None:
    tasks = shapes.get(COLS, (0,))[0]
    expected = {name: shape for name, shape in array_shapes(config).items() if name in names}
    if shapes != {name: shape if name == PROMPT else (tasks, *shape[1:]) for name, shape in expected.items()}:
        told = {name: shape if name == PROMPT else ("tasks", *shape[1:]) for name, shape in expected.items()}
        raise ValueError(f"the arrays of the source have the shapes {shapes}; expected {told}, as of the config")
