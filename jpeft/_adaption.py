"""The attention to an adaption prompt (LLaMA-Adapter), for any model to add to its own."""

import jax
import jax.numpy as jnp


def adaption_attention(query: jax.Array, key: jax.Array, value: jax.Array, gate: jax.Array) -> jax.Array:
    """What an adaption prompt adds to an attention's output: `gate * softmax(q kᵀ / sqrt(head_dim)) v`.

    query (..., length, heads, head_dim): as the attention scores it, rotated if the model rotates. key, value
    (..., n, kv_heads, head_dim): what the attention's own projections make of the n rows of the prompt, not rotated;
    kv_heads divides heads. gate: a scalar, or (1,). The softmax, over the prompt alone, and the gate are in float32;
    the result has the query's shape and dtype. To be added to the attention's output, before its output projection.
    Raises ValueError for shapes that do not fit one another.

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
    >>> prompts = wrapped.adapters["default"].weights
    >>> jpeft.lift(attention)(wrapped, jax.numpy.ones((2, 5, 8)), prompts["attn"]).shape
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
    key, value = key.astype(query.dtype), value.astype(query.dtype)
    scores = jnp.einsum("...qkgd,...nkd->...kgqn", grouped, key, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(scores.astype(jnp.float32) * head_dim**-0.5, axis=-1)
    weights = weights * jnp.reshape(gate, ()).astype(jnp.float32)
    return jnp.einsum("...kgqn,...nkd->...qkgd", weights.astype(query.dtype), value).reshape(query.shape)
