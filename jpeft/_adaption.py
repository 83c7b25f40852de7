"""Adaption prompts (LLaMA-Adapter) in a model: those that are in use, and what attention to one of them adds."""

from typing import Any

import jax
import jax.numpy as jnp

from ._config import PeftType
from ._contract import wide_dtype
from ._params import Adapter
from ._wrap import checked_params

ADAPTION_PROMPTS = "adaption_prompts"
"""The name under which a model is given them."""


def adaption_attention(query: jax.Array, key: jax.Array, value: jax.Array, gate: jax.Array) -> jax.Array:
    """What an adaption prompt adds to an attention's output: `gate * softmax(q kᵀ / sqrt(head_dim)) v`.

    query (..., length, heads, head_dim): as the attention scores it, rotated if the model rotates. key, value
    (..., n, kv_heads, head_dim): what the attention's own projections make of the n rows of the prompt, not rotated;
    kv_heads divides heads. gate: a scalar, or (1,). The softmax, over the prompt alone, and the gate are in float32
    or wider; the result has the query's shape and dtype. To be added to the attention's output, before its output
    projection. Raises ValueError for shapes that do not fit one another.

    Two lines make a model's attention take the prompt that `jpeft.wrap` puts beside it:

    >>> import jax, jpeft
    >>> params = {"attn": {name: {"kernel": jax.numpy.ones((8, 8))} for name in ("q", "k", "v")}}
    >>> wrapped = jpeft.wrap(params, jpeft.AdaptionPromptConfig(adapter_len=3, adapter_layers=1, target_modules="attn"))
    >>> def attention(params, x, adaption):
    ...     def heads(x, name):
    ...         return (x @ params["attn"][name]["kernel"]).reshape(*x.shape[:-1], 2, 4)
    ...     y = jax.nn.dot_product_attention(heads(x, "q"), heads(x, "k"), heads(x, "v"))
    ...     key, value = (heads(adaption["adaption_prompt"], name) for name in ("k", "v"))
    ...     return y + jpeft.adaption_attention(heads(x, "q"), key, value, adaption["adaption_gate"])
    >>> jpeft.lift(attention)(wrapped, jax.numpy.ones((2, 5, 8)), jpeft.adaption_prompts(wrapped)["attn"]).shape
    (2, 5, 2, 4)

    Source: https://arxiv.org/abs/2303.16199, and PEFT's AdaptedAttention.
    """
    if query.ndim < 3 or key.ndim < 3 or key.shape != value.shape or query.shape[-1] != key.shape[-1]:
        raise ValueError(
            f"query {query.shape}, key {key.shape} and value {value.shape} do not fit; expected (..., length, heads, "
            "head_dim), and twice (..., n, kv_heads, head_dim) of the prompt"
        )
    heads, kv_heads, head_dim = query.shape[-2], key.shape[-2], query.shape[-1]
    if heads % kv_heads:
        raise ValueError(f"the query has {heads} heads, the prompt's key {kv_heads}; expected a multiple of them")
    if jnp.size(gate) != 1:
        raise ValueError(f"gate has the shape {jnp.shape(gate)}; expected one number")
    grouped = query.reshape(*query.shape[:-2], kv_heads, heads // kv_heads, head_dim)
    key, value, wide = key.astype(query.dtype), value.astype(query.dtype), wide_dtype(query.dtype)
    scores = jnp.einsum("...qkgd,...nkd->...kgqn", grouped, key, preferred_element_type=wide)
    weights = jax.nn.softmax(scores * head_dim**-0.5, axis=-1) * jnp.reshape(gate, ()).astype(wide)
    return jnp.einsum("...kgqn,...nkd->...qkgd", weights.astype(query.dtype), value).reshape(query.shape)


def adaption_prompts(wrapped: Any) -> dict[str, dict[str, jax.Array]]:
    """The prompts of the active adapter of `AdaptionPromptConfig`, for the model's function; none if there is none.

    {path of a layer's attention: {"adaption_prompt": (1, n, hidden), "adaption_gate": (1,)}}. Raises ValueError if
    several such adapters are active, of which PEFT, too, has one at a time; TypeError if `wrapped` does not come from
    `jpeft.wrap`.

    >>> import jax.numpy as jnp, jpeft
    >>> params = {"attn": {name: {"kernel": jnp.ones((8, 8))} for name in "qkv"}}
    >>> wrapped = jpeft.wrap(params, jpeft.AdaptionPromptConfig(adapter_len=3, adapter_layers=1))
    >>> list(adaption_prompts(wrapped)), adaption_prompts(jpeft.disable_adapters(wrapped))
    (['attn'], {})
    """
    own = [name for name in checked_params(wrapped).active if _is_of_prompts(wrapped.adapters[name])]
    if len(own) > 1:
        raise ValueError(
            f"the active adapters {', '.join(map(repr, own))} have adaption prompts for the same attention; expected "
            "one of them: jpeft.set_adapter(params, name)"
        )
    return dict(wrapped.adapters[own[0]].weights) if own else {}


def _is_of_prompts(adapter: Adapter) -> bool:
    return adapter.config.peft_type == PeftType.ADAPTION_PROMPT
