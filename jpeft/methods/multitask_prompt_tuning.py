"""Multitask prompt tuning, MPT (Wang et al., 2023, https://arxiv.org/abs/2303.02861).

    input = [P * (U_t V_t); E[tokens]],   P (n submodules, dim) of all tasks, U_t V_t of a row's own task t

`prompt_embeddings (n submodules, dim)`, `prefix_task_cols (tasks, n submodules, ranks)` and `prefix_task_rows (tasks,
ranks, dim)`. Costs n dim + tasks ranks (n + dim) parameters. `task_ids (rows,)`: of each row of a batch.
Of an encoder-decoder the first n rows come before the encoder's text, the others before the decoder's
(`num_transformer_submodules=1`: there are none). There PEFT takes labels alone, no decoder_input_ids, and generates
without the rows that the decoder was trained with; here both are as in training. Its models for
questions and for features do not pass task_ids on.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from .._begin import Beginning, Tree
from .._config import PeftType, PromptLearningConfig
from .._contract import Arrays, beside, fold_in_name, register
from ._prompts import OF_TEXT, as_begun, check_text, checked_sizes
from ._source_prompts import AVERAGE, COLS, EXACT, PROMPT, ROWS, SHARED, SOURCES, array_shapes, of_source
from ._task_ids import of_tasks, task_ids_of
from .prompt_tuning import RANDOM, SAMPLE_VOCAB, TEXT, initial_rows

INITS = (RANDOM, TEXT, SAMPLE_VOCAB, *SOURCES)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MultitaskPromptTuningConfig(PromptLearningConfig):
    """What MPT trains and how it begins; PEFT's fields and defaults.

    num_tasks: `task_ids` are 0 to num_tasks - 1. num_ranks: rank of what a task has of its own.
    prompt_tuning_init: as of `PromptTuningConfig` (also its fields), or from a prompt trained before for one task more:
    "AVERAGE_SOURCE_TASKS" with the mean of its tasks, "EXACT_SOURCE_TASK" with its task `prompt_tuning_init_task`,
    "ONLY_SOURCE_SHARED" with its P alone. prompt_tuning_init_state_dict_path: its safetensors file, which
    `jpeft_interop.get_peft_model` reads. prompt_tuning_init_state_dict: its arrays by name, in place of the file.
    Raises ValueError for values out of range.

    >>> import jax.numpy as jnp, jpeft
    >>> config = MultitaskPromptTuningConfig(num_virtual_tokens=2, num_tasks=3)
    >>> adapter = jpeft.wrap({"embed_tokens": {"embedding": jnp.ones((9, 4))}}, config).adapters["default"]
    >>> adapter.shared["prefix_task_cols"].shape
    (3, 2, 1)
    """

    peft_type: PeftType | None = PeftType.MULTITASK_PROMPT_TUNING
    prompt_tuning_init: str = RANDOM
    prompt_tuning_init_text: str | None = None
    tokenizer_name_or_path: str | None = None
    tokenizer_kwargs: Mapping[str, Any] | None = None
    prompt_tuning_init_ids: tuple[int, ...] | list[int] | None = None
    prompt_tuning_init_state_dict_path: str | None = None
    prompt_tuning_init_state_dict: Mapping[str, Any] | None = dataclasses.field(default=None, repr=False, compare=False)
    prompt_tuning_init_task: int = 0
    num_ranks: int = 1
    num_tasks: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prompt_tuning_init not in INITS:
            raise ValueError(f"prompt_tuning_init is {self.prompt_tuning_init!r}; expected one of {', '.join(INITS)}")
        check_text(self)
        for name, least in (("num_ranks", 1), ("num_tasks", 1), ("prompt_tuning_init_task", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name} is {value!r}; expected a whole number of at least {least}")
        if self.prompt_tuning_init in (AVERAGE, EXACT) and self.num_tasks != 1:
            raise ValueError(
                f"num_tasks is {self.num_tasks} with prompt_tuning_init={self.prompt_tuning_init!r}; expected 1, as it "
                f"makes one task of those of the source, or {SHARED!r}"
            )


def begin(key: jax.Array, tree: Tree, config: MultitaskPromptTuningConfig) -> Beginning:
    site = tree.token_table()
    config = checked_sizes(config, site)
    shared = {PROMPT: initial_rows(key, tree, config)}
    for name, shape in array_shapes(config).items():
        shared.setdefault(name, 0.02 * jax.random.normal(fold_in_name(key, name), shape))
    if config.prompt_tuning_init in SOURCES and not config.inference_mode:
        shared.update(of_source(config))
    # The arrays are no part of what is compiled for.
    config = dataclasses.replace(config, prompt_tuning_init_state_dict=None)
    path = ("prompt_tuning_init_state_dict_path",)
    config = as_begun(config, {TEXT: OF_TEXT, **dict.fromkeys(SOURCES, path)})
    return Beginning(config, sites={site.path: site}, shared=shared)


def prompt(p: Arrays, config: Any, context: Mapping[str, Any]) -> jax.Array:
    cols, rows = (of_tasks(p[name], context["task_ids"]) for name in (COLS, ROWS))
    return p[PROMPT] * (cols @ rows)


MULTITASK_PROMPT_TUNING = register(
    beside(
        what="a prompt",
        config=MultitaskPromptTuningConfig,
        begin=begin,
        prompt=prompt,
        row_inputs=task_ids_of(lambda config: config.num_tasks),
        in_decoder=True,
    )
)
