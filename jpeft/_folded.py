"""Arrays that an encoder makes a prompt of, as files hold them: folded into the prompt itself, and taken up again."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from ._contract import method_of
from ._params import Adapter


def folded(adapter: Adapter) -> Adapter:
    """The adapter with what files hold in the place of the arrays that it is made of; abstract if it is.

    >>> import jax.numpy as jnp, jpeft
    >>> params = {"embed_tokens": {"embedding": jnp.ones((9, 4))}}
    >>> wrapped = jpeft.wrap(params, jpeft.PromptTuningConfig(num_virtual_tokens=2))
    >>> list(folded(wrapped.adapters["default"]).shared)
    ['prompt_embeddings']
    """
    if is_folded(adapter):
        return adapter
    fold, config = method_of(adapter.config).folded, adapter.config
    assert fold is not None
    arrays = dict(adapter.shared)
    abstract = any(isinstance(array, jax.ShapeDtypeStruct) for array in arrays.values())
    made = jax.eval_shape(lambda p: fold(p, config), arrays) if abstract else fold(arrays, config)
    return dataclasses.replace(adapter, shared=dict(made))


def is_folded(adapter: Adapter) -> bool:
    """Whether the adapter's arrays are those that files hold."""
    return method_of(adapter.config).folded is None or "prompt_embeddings" in adapter.shared


def unfolded(adapter: Adapter) -> Mapping[str, Any] | None:
    """The arrays that train, of an adapter that is folded; None if they cannot be told from it."""
    method = method_of(adapter.config)
    if method.folded is None:
        return adapter.shared
    return None if method.unfolded is None else method.unfolded(adapter.shared, adapter.config)
