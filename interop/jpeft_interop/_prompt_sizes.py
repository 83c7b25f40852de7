"""What a prompt's config leaves to the model: its sizes, as PEFT reads them off the model's config, and its text."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jpeft
from jpeft import PromptLearningConfig
from jpeft._contract import method_of

_SIZES: Mapping[str, Sequence[str]] = {
    "num_layers": ("num_hidden_layers", "num_layers", "n_layer"),
    "token_dim": ("hidden_size", "n_embd", "d_model", "dim"),
    "num_attention_heads": ("num_attention_heads", "n_head", "num_heads", "encoder_attention_heads", "n_heads"),
}
"""What the fields are called in config.json; the first that is there counts."""


def with_prompt_sizes(config: jpeft.PeftConfig, model_config: Mapping[str, Any]) -> jpeft.PeftConfig:
    """The config of a prompt with the sizes that it leaves open, of the model's config.json; others as they are.

    Of a prefix, what counts is the keys and values: with grouped queries there are fewer heads of them.

    >>> sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 4}
    >>> with_prompt_sizes(jpeft.PromptTuningConfig(num_virtual_tokens=3), sizes).num_layers
    2
    """
    if not isinstance(config, PromptLearningConfig):
        return config
    text = model_config.get("text_config") or model_config
    told = {field: _first(text, names) for field, names in _SIZES.items() if getattr(config, field) is None}
    told = {field: value for field, value in told.items() if value is not None}
    if config.num_transformer_submodules is None:
        told["num_transformer_submodules"] = config.submodules
    config = dataclasses.replace(config, **told)
    return _of_keys(config, text) if method_of(config).prefix is not None else config


def _of_keys(config: PromptLearningConfig, model_config: Mapping[str, Any]) -> PromptLearningConfig:
    """The config with the sizes of keys and values in the place of those of queries."""
    groups = model_config.get("num_key_value_heads")
    if groups is None or config.token_dim is None or config.num_attention_heads is None:
        return config
    head_dim = model_config.get("head_dim") or config.token_dim // config.num_attention_heads
    return dataclasses.replace(config, token_dim=head_dim * groups, num_attention_heads=groups)


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
