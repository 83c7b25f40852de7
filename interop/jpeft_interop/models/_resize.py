"""A model for another number of tokens: its embedding and its output layer with more rows, or fewer."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jpeft._paths import fold_in_name, last_name
from jpeft._quantized import as_dense, is_abstract

from ._blueprint import blueprint
from ._leaves import Leaf, flatten, initial_value, nest
from ._model import FlaxModel

SPREAD = 1e-9
"""Variance of new rows, as a part of that of the old ones."""

_ZEROS = ("final_logits_bias",)
"""Biases that are no parameters in PyTorch."""


def resize_token_embeddings(
    model: FlaxModel, new_num_tokens: int, *, mean_resizing: bool = True, rng: jax.Array | None = None
) -> FlaxModel:
    """A model of `new_num_tokens` tokens, as `transformers` makes it: the old rows, and new ones after them.

    mean_resizing: new rows are drawn around the mean of the old ones, with 1e-9 of their covariance, so that new
    tokens take next to no probability from the others (https://nlp.stanford.edu/~johnhew/vocab-expansion.html);
    else as the model's initial values are. Biases of the output are drawn likewise, but for BART's constant one, whose
    new entries are 0. rng: of the draw, `jax.random.key(0)` if not given. The model's `config_dict` says the new
    number; arrays that do not change are those of `model`, which stays as it is. A mesh's shardings are not kept by
    what is resized.
    Raises ValueError for a number below 1 and for a model whose config has no vocab_size.

    >>> from jpeft_interop.models import FlaxAutoModelForCausalLM
    >>> sizes = dict(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    >>> model = FlaxAutoModelForCausalLM.from_config({"model_type": "llama", **sizes})
    >>> bigger = resize_token_embeddings(model, 12)
    >>> bigger.params["model"]["embed_tokens"]["embedding"].shape, bigger.params["lm_head"]["kernel"].shape
    ((12, 8), (8, 12))
    """
    if not hasattr(model.config, "vocab_size"):
        name = model.blueprint.architecture.name
        raise ValueError(f"{name} has no vocab_size in its config; expected a model of text")
    if new_num_tokens < 1:
        raise ValueError(f"new_num_tokens is {new_num_tokens}; expected at least 1")
    if new_num_tokens == model.config.vocab_size:
        return model
    plan, config = model.blueprint, dataclasses.replace(model.config, vocab_size=new_num_tokens)
    new = blueprint(plan.family, plan.architecture, config, plan.options)
    key = jax.random.key(0) if rng is None else rng
    params = {
        path: array
        if array.shape == new.leaves[path].shape
        else _resized(path, array, new.leaves[path], key, mean_resizing, config.initializer_range)
        for path, array in flatten(model.params)
    }
    raw = {**model.config_dict, "vocab_size": new_num_tokens}
    return dataclasses.replace(model, params=nest(params), config=config, config_dict=raw, blueprint=new)


def _resized(path: str, array: Any, leaf: Leaf, key: jax.Array, mean: bool, std: float) -> Any:
    if is_abstract(array):
        return jax.ShapeDtypeStruct(leaf.shape, array.dtype)
    axis = next(place for place, size in enumerate(leaf.shape) if size != array.shape[place])
    rows, count = jnp.moveaxis(jnp.asarray(as_dense(array)), axis, 0), leaf.shape[axis]
    added = count - rows.shape[0]
    if added < 0:
        return jnp.moveaxis(rows[:count], 0, axis)
    if last_name(path) in _ZEROS:
        new = jnp.zeros((added, *rows.shape[1:]), rows.dtype)
    elif mean:
        new = _around_mean(rows, added, fold_in_name(key, path))
    else:
        new = jnp.moveaxis(initial_value(leaf, key, rows.dtype, std), axis, 0)[-added:]
    return jnp.moveaxis(jnp.concatenate([rows, new]), 0, axis)


def _around_mean(rows: jax.Array, added: int, key: jax.Array) -> jax.Array:
    count = rows.shape[0]
    wide = rows.reshape(count, -1).astype(jnp.float32)
    mean = wide.mean(axis=0)
    # Normal numbers times the centred rows have these rows' covariance, which need not be factored for it.
    mixed = jax.random.normal(key, (added, count), jnp.float32) @ (wide - mean)
    return (mean + (SPREAD / count) ** 0.5 * mixed).reshape(added, *rows.shape[1:]).astype(rows.dtype)
