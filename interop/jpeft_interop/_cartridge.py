"""Prefixes that begin as what a model has computed of a text, and cartridges put together from their folders."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

import jpeft
from jpeft._folded import folded
from jpeft._key_value_prefix import ROWS, composed_config, prefixed_names
from jpeft._stacks import stacked_numbers

from ._base_model import base_model
from ._card import model_card
from ._config_json import config_dict, to_json
from ._files import read_tensors
from ._load import load_config
from ._pair import find_pair, write_if_absent, write_pair
from ._save import CARD_NAME


def key_value_cache(model: Any, input_ids: ArrayLike) -> tuple[jax.Array, jax.Array]:
    """The keys and the values that a decoder computes of a text, each (layers, length, kv_heads, head_dim).

    model: a `FlaxModel`, or a `PeftModel` around one, whose adapters take no part. input_ids: (length,) or (1, length).
    For `jpeft.initialize_kv_prefix_from_past_key_values`. Raises TypeError for a model that keeps no cache of its
    input, ValueError for several rows.

    >>> from jpeft_interop.models import FlaxAutoModelForCausalLM
    >>> sizes = dict(vocab_size=9, hidden_size=8, num_hidden_layers=3, num_attention_heads=2, intermediate_size=8)
    >>> model = FlaxAutoModelForCausalLM.from_config({"model_type": "llama", **sizes})
    >>> keys, values = key_value_cache(model, [1, 2, 3, 4])
    >>> keys.shape
    (3, 4, 2, 4)
    """
    given = model.face.base.given if hasattr(model, "face") else base_model(model).given
    family = getattr(getattr(given, "blueprint", None), "family", None)
    if family is None or not family.decodes or "decoder_input_ids" in family.inputs:
        raise TypeError(
            f"{type(given).__name__ if family is None else family.model_type} keeps no cache of its input; expected a "
            "decoder of jpeft_interop.models, such as a FlaxAutoModelForCausalLM, or the cache of the model itself"
        )
    ids = jnp.atleast_2d(jnp.asarray(input_ids))
    if ids.ndim != 2 or ids.shape[0] != 1:
        raise ValueError(f"input_ids are of shape {np.shape(input_ids)}; expected one text: (length,) or (1, length)")

    @jax.jit
    def prefill(params: Any, ids: jax.Array) -> Any:
        return given.apply(params, ids, cache_length=ids.shape[1]).past_key_values

    return keys_and_values(prefill(given.params, ids))


def keys_and_values(cache: Any) -> tuple[jax.Array, jax.Array]:
    """What the first row of a model's `past_key_values` holds of the tokens so far, as `key_value_cache` has it.

    Raises ValueError for a row with padding in it.
    """
    length = int(cache.length)
    hidden = length - int(cache.mask[0, :length].sum())
    if hidden:
        raise ValueError(f"{hidden} of {length} tokens of the cache are padding; expected a text without")
    layers: dict[int, tuple[jax.Array, jax.Array]] = {}
    for name, memory in cache.layers.items():
        keys, values = memory["key"], memory["value"]
        numbers = stacked_numbers(name)
        if numbers is None:
            layers[int(name)] = keys[0, :length], values[0, :length]
            continue
        for place, number in enumerate(numbers):
            layers[number] = keys[place, 0, :length], values[place, 0, :length]
    keys, values = (jnp.stack([layers[number][part] for number in sorted(layers)]) for part in (0, 1))
    return keys, values


def initialize_kv_prefix_from_text(
    model: Any,
    tokenizer: Callable[..., Any],
    *,
    text: str,
    adapter_name: str | None = None,
    use_chat_template: bool = True,
    max_length: int | None = None,
) -> jax.Array:
    """Begin a prefix of a `PeftModel` as what the base model computes of a text's first tokens; returns its rows.

    tokenizer: of `transformers`; the text becomes a system message if it has a template for chats, unless
    use_chat_template is False. adapter_name: of an adapter of prefix tuning, or a cartridge; None: the active one.
    max_length: of the text, in tokens. As PEFT's function of that name; a pure way is
    `jpeft.initialize_kv_prefix_from_past_key_values(wrapped, key_value_cache(model, input_ids))`.
    Raises ValueError for a text of fewer tokens than the prefix has, and what these two raise.
    """
    ids = _token_ids(tokenizer, text, use_chat_template)[:max_length]
    cache = key_value_cache(model, np.asarray(ids, np.int32))
    model.params = jpeft.initialize_kv_prefix_from_past_key_values(model.params, cache, adapter_name)
    name = prefixed_names(model.params)[0] if adapter_name is None else adapter_name
    return folded(model.params.adapters[name]).shared[ROWS]


def _token_ids(tokenizer: Any, text: str, use_chat_template: bool) -> list[int]:
    if use_chat_template and hasattr(tokenizer, "apply_chat_template"):
        message = [{"role": "system", "content": text}]
        options: dict[str, Any] = {"tokenize": True, "add_generation_prompt": False, "return_dict": False}
        try:
            return list(tokenizer.apply_chat_template(message, **options))
        except (TypeError, ValueError):
            pass  # as in PEFT: a tokenizer without a template for chats
    return list(tokenizer(text)["input_ids"])


def compose_cartridge_adapters(
    adapter_paths: Sequence[str | os.PathLike[str]], *, output_path: str | os.PathLike[str]
) -> None:
    """Write a cartridge that is several, from their folders, one after another: `jpeft.compose_cartridges` of files.

    Raises ValueError for less than two folders, and for what is no cartridge or one of another model.
    """
    paths = [os.fspath(path) for path in adapter_paths]
    if isinstance(adapter_paths, str) or len(paths) < 2:
        raise ValueError(f"adapter_paths are {adapter_paths!r}; expected the folders of two cartridges or more")
    config = composed_config({path: load_config(path) for path in paths})
    tensors = [read_tensors(find_pair(Path(path)).weights) for path in paths]
    rows = np.concatenate([own[ROWS] for own in tensors])
    root = Path(output_path)
    write_pair(root, to_json(config_dict(config)), {**tensors[0], ROWS: rows}, {})
    write_if_absent(root / CARD_NAME, model_card(config, config.base_model_name_or_path))
