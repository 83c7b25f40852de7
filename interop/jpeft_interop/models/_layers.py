"""Layers that all families share: Flax NNX modules named and shaped for Hugging Face checkpoints.

A module here is a description: its parameters are `jax.ShapeDtypeStruct`s, so that building a model of any size
allocates nothing. The arrays come from outside, as the plain dict given to `FlaxModel.apply`.

The dtype of the activations decides the dtype of the computation: every parameter is cast to it where it is used.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from ._activations import activation
from ._family import Options
from ._parameters import normal, ones, parameter, whole, zeros
from ._spread import spread, spread_lookup


class Linear(nnx.Module):
    """`y = x @ kernel + bias`, kernel `(in, out)`: torch's `nn.Linear`, whose weight is `(out, in)`."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool = True):
        self.kernel = parameter((in_features, out_features), normal, whole("weight", (1, 0)))
        self.bias = parameter((out_features,), zeros, whole("bias", (0,))) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """`(..., in) -> (..., out)`."""
        y = x @ self.kernel[...].astype(x.dtype)
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


class Conv1D(nnx.Module):
    """`y = x @ kernel + bias` like `Linear`, but stored `(in, out)`: the `Conv1D` of GPT-2."""

    def __init__(self, in_features: int, out_features: int):
        self.kernel = parameter((in_features, out_features), normal, whole("weight", (0, 1)))
        self.bias = parameter((out_features,), zeros, whole("bias", (0,)))

    def __call__(self, x: jax.Array) -> jax.Array:
        """`(..., in) -> (..., out)`."""
        return x @ self.kernel[...].astype(x.dtype) + self.bias[...].astype(x.dtype)


class Embed(nnx.Module):
    """Lookup in a table `embedding (num_embeddings, features)`: torch's `nn.Embedding`."""

    def __init__(self, num_embeddings: int, features: int):
        self.embedding = parameter((num_embeddings, features), normal, whole("weight", (0, 1)))

    def __call__(self, ids: jax.Array, dtype: DTypeLike | None = None) -> jax.Array:
        """`(...) int -> (..., features)`, in `dtype` or that of the table. An id outside the table gives NaN."""
        # JAX would otherwise clamp such an id, and a tokenizer with a larger vocabulary go unnoticed.
        rows = jnp.take(self.embedding[...], ids, axis=0, mode="fill")
        return rows if dtype is None else rows.astype(dtype)

    def attend(self, x: jax.Array) -> jax.Array:
        """`(..., features) -> (..., num_embeddings)`: the output product of a tied embedding."""
        return x @ self.embedding[...].astype(x.dtype).T


def normalised(x: jax.Array, eps: float) -> jax.Array:
    """`x (..., features)` over the root of its mean square, in float32."""
    wide = x.astype(jnp.float32)
    return wide * jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + eps)


class LayerNorm(nnx.Module):
    """Layer normalisation with scale and bias, computed in float32."""

    def __init__(self, features: int, *, eps: float):
        self.scale = parameter((features,), ones, whole("weight", (0,)))
        self.bias = parameter((features,), zeros, whole("bias", (0,)))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        """`(..., features) -> (..., features)`."""
        wide = x.astype(jnp.float32)
        y = normalised(wide - wide.mean(-1, keepdims=True), self.eps)
        return (y * self.scale[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)).astype(x.dtype)


class RMSNorm(nnx.Module):
    """Root-mean-square normalisation: statistics in float32, scaled after the cast back, as Llama does."""

    def __init__(self, features: int, *, eps: float):
        self.scale = parameter((features,), ones, whole("weight", (0,)))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        """`(..., features) -> (..., features)`."""
        return normalised(x, self.eps).astype(x.dtype) * self.scale[...].astype(x.dtype)


class GatedMLP(nnx.Module):
    """`down_proj(act(gate_proj(x)) * up_proj(x))`: the feed-forward block of Llama and most decoders since."""

    def __init__(self, features: int, hidden: int, act: str, *, bias: bool = False):
        self.gate_proj = Linear(features, hidden, bias=bias)
        self.up_proj = Linear(features, hidden, bias=bias)
        self.down_proj = Linear(hidden, features, bias=bias)
        self.act = act

    def __call__(self, x: jax.Array) -> jax.Array:
        """`(..., features) -> (..., features)`."""
        return self.down_proj(activation(self.act)(self.gate_proj(x)) * self.up_proj(x))


def scaled(
    x: jax.Array, table: Embed, input_ids: jax.Array | None, inputs_embeds: jax.Array | None, scale: float | None
) -> jax.Array:
    """Rows of the table times a scale. What was embedded elsewhere is as it is to be: also virtual tokens, whose ids
    follow the vocabulary."""
    if scale is None or inputs_embeds is not None or input_ids is None:
        return x
    known = (input_ids < table.embedding.shape[0])[..., None]
    return x * jnp.where(known, jnp.asarray(scale, x.dtype), jnp.ones((), x.dtype))


def embed_tokens(
    table: Embed, input_ids: jax.Array | None, inputs_embeds: jax.Array | None, options: Options
) -> jax.Array:
    """The embedded input `(batch, length, features)`, from ids or as given, in the dtype of the computation, spread.

    Raises ValueError unless exactly one of the two is given, with the rank that it needs.
    """
    mesh = options.mesh
    if (input_ids is None) == (inputs_embeds is None):
        given = "neither" if input_ids is None else "both"
        raise ValueError(f"expected one of input_ids and inputs_embeds, got {given}")
    if inputs_embeds is not None:
        features = table.embedding.shape[-1]
        if inputs_embeds.ndim != 3 or inputs_embeds.shape[-1] != features:
            raise ValueError(f"inputs_embeds must be (batch, length, {features}), got {inputs_embeds.shape}")
        return spread(inputs_embeds.astype(table.embedding.dtype if options.dtype is None else options.dtype), mesh)
    assert input_ids is not None
    if input_ids.ndim != 2 or not jnp.issubdtype(input_ids.dtype, jnp.integer):
        raise ValueError(f"input_ids must be integers (batch, length), got {input_ids.dtype} {input_ids.shape}")
    return spread_lookup(lambda ids: table(ids, options.dtype), input_ids, mesh)
