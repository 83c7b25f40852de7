"""The prompt that multitask prompt tuning begins with, read from the file that its config names."""

import dataclasses
from pathlib import Path
from typing import Any

import jpeft
from jpeft.methods._source_prompts import SOURCES

from ._files import read_tensors


def with_source_prompt(config: jpeft.PeftConfig) -> jpeft.PeftConfig:
    """The config of a prompt that begins as one trained before, with the arrays of that; others as they are.

    Raises ValueError for a file that is no safetensors file, FileNotFoundError if there is none.
    """
    own: Any = config
    given = getattr(config, "prompt_tuning_init_state_dict_path", None)
    if given is None or own.prompt_tuning_init not in SOURCES or own.prompt_tuning_init_state_dict is not None:
        return config
    path = Path(given)
    if path.suffix != ".safetensors":
        raise ValueError(
            f"prompt_tuning_init_state_dict_path is {str(path)!r}; expected a .safetensors file, such as the "
            "adapter_model.safetensors of the source: pickles can run code and are not read"
        )
    return dataclasses.replace(own, prompt_tuning_init_state_dict=read_tensors(path))
