"""The classes of `PeftModel`, by the task that they are for."""

import dataclasses
from typing import TYPE_CHECKING

from jpeft import PeftConfig, TaskType

if TYPE_CHECKING:
    from ._peft_model import PeftModel

CLASSES: dict[TaskType | None, type["PeftModel"]] = {}
"""None: of no task in particular."""


def class_for(config: PeftConfig) -> type["PeftModel"]:
    """The class for the config's task."""
    return CLASSES[config.task_type if isinstance(config.task_type, TaskType) else None]


def of_task(config: PeftConfig, task: TaskType | None) -> PeftConfig:
    """The config with the task of a class; raises ValueError if it has another one."""
    if task is None or config.task_type == task:
        return config
    if config.task_type is not None:
        raise ValueError(
            f"task_type of the config is {str(config.task_type)!r}, and the class is for {str(task)!r}; expected "
            f"{class_for(config).__name__}, or another config"
        )
    return dataclasses.replace(config, task_type=task)
