"""What a prompt's config leaves to the model: its sizes, as PEFT reads them off the model's config, and its text."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jpeft
from jpeft import PromptLearningConfig

from ._base_model import BaseModel

_SIZES: Mapping[str, Sequence[str]] = {
    "num_layers": ("num_hidden_layers", "num_layers", "n_layer"),
    "token_dim": ("hidden_size", "n_embd", "d_model", "dim"),
    "num_attention_heads": ("num_attention_heads", "n_head", "num_heads", "encoder_attention_heads", "n_heads"),
}
"""What the fields are called in config.json; the first that is there counts."""


def with_prompt_sizes(config: jpeft.PeftConfig, base: BaseModel) -> jpeft.PeftConfig:
    """The config of a prompt with the sizes that it leaves open, of the model's config.json; others as they are.

    >>> import jax.numpy as jnp
    >>> from ._base_model import base_model
    >>> params = {"embed_tokens": {"embedding": jnp.ones((9, 4))}}
    >>> base = base_model((lambda params, input_ids: params["embed_tokens"]["embedding"][input_ids], params))
    >>> with_prompt_sizes(jpeft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"), base).submodules
    1
    """
    if not isinstance(config, PromptLearningConfig):
        return config
    text = base.config.get("text_config") or base.config
    told = {field: _first(text, names) for field, names in _SIZES.items() if getattr(config, field) is None}
    told = {field: value for field, value in told.items() if value is not None}
    return dataclasses.replace(
        config, **told, num_transformer_submodules=config.submodules, embedding_scale=_scale(base)
    )


def _scale(base: BaseModel) -> float:
    """What the model multiplies the rows of its table with."""
    own = getattr(base.given, "config", None)
    if getattr(own, "scale_embedding", False):
        return math.sqrt(own.d_model)  # pyright: ignore[reportOptionalMemberAccess]
    return float(getattr(own, "embedding_scale", None) or 1.0)


def _first(entries: Mapping[str, Any], names: Sequence[str]) -> Any:
    return next((entries[name] for name in names if entries.get(name) is not None), None)


def with_initial_tokens(config: jpeft.PeftConfig) -> jpeft.PeftConfig:
    """The config of a prompt that begins as a text, with the text's tokens; others as they are.

    Raises ImportError without `transformers`, which reads the tokenizer, and what that raises.
    """
    own: Any = config
    text, ids = (getattr(config, name, None) for name in ("prompt_tuning_init_text", "prompt_tuning_init_ids"))
    if getattr(config, "prompt_tuning_init", None) != "TEXT" or text is None or ids is not None:
        return config
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise ImportError(
            f"prompt_tuning_init_text={text!r} is read by the tokenizer of `transformers`, which is not installed; "
            "install it, or give prompt_tuning_init_ids=[...], the text's tokens"
        ) from error
    # As in PEFT: what a config may ask for does not go as far as running code.
    options = {name: value for name, value in (own.tokenizer_kwargs or {}).items() if name != "trust_remote_code"}
    tokenizer = AutoTokenizer.from_pretrained(own.tokenizer_name_or_path, **options)
    return dataclasses.replace(own, prompt_tuning_init_ids=tuple(tokenizer(text)["input_ids"]))
