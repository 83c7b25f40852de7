"""A prefix of keys and values in a call: that of the active adapter, as what a model takes in place of a cache."""

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp

import jpeft
from jpeft import PeftParams, PromptLearningConfig
from jpeft._contract import method_of
from jpeft._key_value_prefix import prefixed_names

from ._base_model import BaseModel

PAST = "past_key_values"


def with_prefix(
    base: BaseModel, wrapped: PeftParams, batch: dict[str, Any], adapter_names: Sequence[str] | None = None
) -> dict[str, Any]:
    """The batch with the active adapter's prefix as `past_key_values`, unless it brings a cache of its own.

    `position_ids`, where they are given, begin after it. adapter_names: of each row, where several have a prefix. A
    function that is no model of this package gets the pair that `jpeft.key_value_prefix` returns.
    Raises TypeError for a model that takes no prefix, ValueError for what does not fit the batch.
    """
    if not prefixed_names(wrapped) or batch.get(PAST) is not None:
        return batch
    check_takes_prefix(base)
    model = base.given
    if not hasattr(model, "blueprint"):
        return {**batch, PAST: jpeft.key_value_prefix(wrapped)}
    # Late, as a model of the package is here, and so is Flax.
    from .models._prefix import prefix_of

    prefix = prefix_of(wrapped, model.config, _rows(batch), adapter_names)
    assert prefix is not None
    places = batch.get("position_ids")
    shifted = {} if places is None else {"position_ids": jnp.asarray(places) + prefix.starts}
    return {**batch, **shifted, PAST: prefix}


def _rows(batch: Mapping[str, Any]) -> int:
    return next((jnp.shape(value)[0] for value in batch.values() if jnp.ndim(value) > 1), 0)


def with_prefix_sizes(config: jpeft.PeftConfig, base: BaseModel) -> jpeft.PeftConfig:
    """The config of a prefix with the sizes of the model's keys and values, where it leaves them open.

    Others come back as they are, and so do all for models that are not of this package. Raises TypeError for a model
    that takes no prefix, ValueError for sizes that are not the model's, or a prefix that leaves no place for a text.
    """
    if not isinstance(config, PromptLearningConfig) or method_of(config).prefix is None:
        return config
    check_takes_prefix(base)
    if not hasattr(base.given, "blueprint"):
        return config
    own = base.given.config
    layers, heads, size = _layers(own), _heads(own), _head_size(own)
    found = {"num_layers": layers, "num_attention_heads": heads, "token_dim": heads * size}
    wrong = [name for name, value in found.items() if getattr(config, name) not in (None, value)]
    if wrong:
        raise ValueError(
            f"the prefix has {', '.join(f'{name}={getattr(config, name)}' for name in wrong)}, but the model has "
            f"{layers} layers with keys and values of {heads} heads of {size}; expected "
            f"{', '.join(f'{name}={found[name]}' for name in wrong)}, or None"
        )
    most = getattr(own, "max_target_positions", getattr(own, "max_position_embeddings", None))
    if most is not None and config.num_virtual_tokens is not None and config.num_virtual_tokens >= most:
        raise ValueError(
            f"num_virtual_tokens is {config.num_virtual_tokens}, which leaves no position for a text: the model has "
            f"{most}; expected fewer"
        )
    return dataclasses.replace(config, **found)


def _layers(config: Any) -> int:
    """As PEFT has it, the encoder's of an encoder-decoder; the decoder's where that is deeper, and PEFT fails."""
    depths = ("num_hidden_layers", "num_layers", "num_decoder_layers", "encoder_layers", "decoder_layers")
    return max(getattr(config, name, None) or 0 for name in depths)


def _heads(config: Any) -> int:
    names = ("num_key_value_heads", "decoder_attention_heads", "num_heads", "num_attention_heads")
    return next(value for name in names if (value := getattr(config, name, None)) is not None)


def _head_size(config: Any) -> int:
    stated = getattr(config, "head_dim", None) or getattr(config, "d_kv", None)
    width = getattr(config, "hidden_size", None) or getattr(config, "d_model", 0)
    return stated or width // _heads(config)


def check_takes_prefix(base: BaseModel) -> None:
    """Raise TypeError for a model that takes no prefix, as far as its family or its function tells."""
    blueprint = getattr(base.given, "blueprint", None)
    if blueprint is not None:
        family = blueprint.family
        # An encoder-decoder's class for tokens has the encoder alone.
        halved = "decoder_input_ids" in family.inputs and not any("decoder." in leaf for leaf in blueprint.leaves)
        if halved or not (family.decodes or family.prefixed):
            raise TypeError(
                f"{base.class_name} takes no keys and values that come before its tokens; expected a decoder, an "
                "encoder-decoder, BERT or RoBERTa: for this model, a method that adapts modules, such as LoRA"
            )
        return
    taken = inspect.signature(base.apply).parameters.values()
    if not any(own.name == PAST or own.kind is own.VAR_KEYWORD for own in taken):
        raise TypeError(
            f"the model's function takes no {PAST}; expected an argument of this name, keys and values each (layers, "
            "n, kv_heads, head_dim), which every layer's attention puts before its own: see jpeft.key_value_prefix"
        )
