"""Adaption prompts (LLaMA-Adapter) in a call: those of the active adapter, as an input of a model that takes them."""

import inspect
from typing import Any

import jpeft
from jpeft import AdaptionPromptConfig, PeftParams
from jpeft._adaption import ADAPTION_PROMPTS

from ._base_model import BaseModel


def with_adaption_prompts(
    base: BaseModel, wrapped: PeftParams, batch: dict[str, Any]
) -> tuple[PeftParams, dict[str, Any]]:
    """The parameters, and the batch with the prompts of the active adapter, if it has some and the batch has none.

    Raises TypeError for a model that takes none, ValueError for several active adapters with prompts.
    """
    prompts = jpeft.adaption_prompts(wrapped)
    if not prompts or ADAPTION_PROMPTS in batch:
        return wrapped, batch
    check_attention(base)
    return wrapped, {**batch, ADAPTION_PROMPTS: prompts}


def check_attention_of(config: jpeft.PeftConfig, base: BaseModel) -> None:
    """Raise TypeError if a config is that of adaption prompts, which the model does not take.

    Raises ValueError if it means other modules than those that take them.
    """
    if isinstance(config, AdaptionPromptConfig):
        name = check_attention(base)
        if name is not None and config.target_modules not in (None, name):
            raise ValueError(
                f"target_modules is {config.target_modules!r}, but what takes adaption prompts in a {base.model_type} "
                f"model is its attention: expected {name!r}, or None"
            )


def check_attention(base: BaseModel) -> str | None:
    """The name of a layer's attention, if the model's family tells it.

    Raises TypeError for a model that does not take adaption prompts, as far as its family or its function tells.
    """
    blueprint = getattr(base.given, "blueprint", None)
    if blueprint is not None:
        # Late, as a model of the family is here, and so is Flax.
        from .models._adaption import check_takes_prompts

        return check_takes_prompts(blueprint.family)
    taken = inspect.signature(base.apply).parameters.values()
    if not any(own.name == ADAPTION_PROMPTS or own.kind is own.VAR_KEYWORD for own in taken):
        raise TypeError(
            f"the model's function takes no {ADAPTION_PROMPTS}; expected an argument of this name, {{path of a layer's "
            "attention: its prompt and gate}, which the attention adds by jpeft.adaption_attention"
        )
    return None
