"""Layers that all families share: Flax NNX modules named and shaped for Hugging Face checkpoints.

A module here is a description: its parameters are `jax.ShapeDtypeStruct`s, so that building a model of any size
allocates nothing. The arrays come from outside, as the plain dict given to `FlaxModel.apply`.

The dtype of the activations decides the dtype of the computation: every parameter is cast to it where it is used.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

Initialiser = Callable[[jax.Array, tuple[int, ...], Any, float], jax.Array]
"""`(key, shape, dtype, initializer_range of the config) -> array`."""


def normal(key: jax.Array, shape: tuple[int, ...], dtype: Any, std: float) -> jax.Array:
    """Normal values of standard deviation `std`, drawn in float32."""
    return (std * jax.random.normal(key, shape, jnp.float32)).astype(dtype)


def zeros(key: jax.Array, shape: tuple[int, ...], dtype: Any, std: float) -> jax.Array:
    """Zeros."""
    return jnp.zeros(shape, dtype)


def ones(key: jax.Array, shape: tuple[int, ...], dtype: Any, std: float) -> jax.Array:
    """Ones."""
    return jnp.ones(shape, dtype)


@dataclass(frozen=True)
class Stored:
    """How a checkpoint holds a parameter: the torch name of the leaf, and `ours = theirs.transpose(axes)`."""

    name: str
    axes: tuple[int, ...]


def parameter(shape: tuple[int, ...], initial: Initialiser, stored: Stored) -> nnx.Param:
    """A parameter without a value, which knows its initial value and its place in a checkpoint."""
    return nnx.Param(jax.ShapeDtypeStruct(shape, jnp.float32), initial=initial, stored=stored)


class Linear(nnx.Module):
    """`y = x @ kernel + bias`, kernel `(in, out)`: torch's `nn.Linear`, whose weight is `(out, in)`."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool = True):
        self.kernel = parameter((in_features, out_features), normal, Stored("weight", (1, 0)))
        self.bias = parameter((out_features,), zeros, Stored("bias", (0,))) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """`(..., in) -> (..., out)`."""
        y = x @ self.kernel[...].astype(x.dtype)
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


class Embed(nnx.Module):
    """Lookup in a table `embedding (num_embeddings, features)`: torch's `nn.Embedding`."""

    def __init__(self, num_embeddings: int, features: int):
        self.embedding = parameter((num_embeddings, features), normal, Stored("weight", (0, 1)))

    def __call__(self, ids: jax.Array, dtype: DTypeLike | None = None) -> jax.Array:
        """`(...) int -> (..., features)`, in `dtype` or that of the table. An id outside the table gives NaN."""
        # JAX would otherwise clamp such an id, and a tokenizer with a larger vocabulary go unnoticed.
        rows = jnp.take(self.embedding[...], ids, axis=0, mode="fill")
        return rows if dtype is None else rows.astype(dtype)

    def attend(self, x: jax.Array) -> jax.Array:
        """`(..., features) -> (..., num_embeddings)`: the output product of a tied embedding."""
        return x @ self.embedding[...].astype(x.dtype).T


class LayerNorm(nnx.Module):
    """Layer normalisation with scale and bias, computed in float32."""

    def __init__(self, features: int, *, eps: float):
        self.scale = parameter((features,), ones, Stored("weight", (0,)))
        self.bias = parameter((features,), zeros, Stored("bias", (0,)))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        """`(..., features) -> (..., features)`."""
        wide = x.astype(jnp.float32)
        centred = wide - wide.mean(-1, keepdims=True)
        normed = centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + self.eps)
        return (normed * self.scale[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)).astype(x.dtype)


class RMSNorm(nnx.Module):
    """Root-mean-square normalisation: statistics in float32, scaled after the cast back, as Llama does."""

    def __init__(self, features: int, *, eps: float):
        self.scale = parameter((features,), ones, Stored("weight", (0,)))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        """`(..., features) -> (..., features)`."""
        wide = x.astype(jnp.float32)
        normed = wide * jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + self.eps)
        return normed.astype(x.dtype) * self.scale[...].astype(x.dtype)


def numbered(modules: Iterable[nnx.Module]) -> nnx.Dict:
    """The layers of a `torch.nn.ModuleList`: a module with children "0", "1", ..."""
    return nnx.Dict({str(index): module for index, module in enumerate(modules)})


def in_order(layers: nnx.Dict) -> Iterator[Any]:
    """The children of `numbered` by their number: NNX sorts names as text, "10" before "2"."""
    return (layers[str(index)] for index in range(len(layers)))


def embed_tokens(
    table: Embed, input_ids: jax.Array | None, inputs_embeds: jax.Array | None, dtype: DTypeLike | None
) -> jax.Array:
    """The embedded input `(batch, length, features)`, from ids or as given; its dtype is that of the computation.

    Raises ValueError unless exactly one of the two is given, with the rank that it needs.
    """
    if (input_ids is None) == (inputs_embeds is None):
        given = "neither" if input_ids is None else "both"
        raise ValueError(f"expected one of input_ids and inputs_embeds, got {given}")
    if inputs_embeds is not None:
        features = table.embedding.shape[-1]
        if inputs_embeds.ndim != 3 or inputs_embeds.shape[-1] != features:
            raise ValueError(f"inputs_embeds must be (batch, length, {features}), got {inputs_embeds.shape}")
        return inputs_embeds.astype(table.embedding.dtype if dtype is None else dtype)
    assert input_ids is not None
    if input_ids.ndim != 2 or not jnp.issubdtype(input_ids.dtype, jnp.integer):
        raise ValueError(f"input_ids must be integers (batch, length), got {input_ids.dtype} {input_ids.shape}")
    return table(input_ids, dtype)


def _quick_gelu(x: jax.Array) -> jax.Array:
    return x * jax.nn.sigmoid(1.702 * x)


def _gelu_erf(x: jax.Array) -> jax.Array:
    return 0.5 * x * (1.0 + jax.lax.erf(x * math.sqrt(0.5)))


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    # Written out: jax.nn.gelu(approximate=False) is made of erfc, 2.7 times as slow on CPU (4096 x 1536 floats).
    "gelu": _gelu_erf,
    "gelu_python": _gelu_erf,
    "gelu_new": partial(jax.nn.gelu, approximate=True),
    "gelu_fast": partial(jax.nn.gelu, approximate=True),
    "gelu_pytorch_tanh": partial(jax.nn.gelu, approximate=True),
    "quick_gelu": _quick_gelu,
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "tanh": jnp.tanh,
}
"""Activations by the name that a config gives them (`hidden_act`)."""


def activation(name: str) -> Callable[[jax.Array], jax.Array]:
    """The activation that a config calls `name`. Raises ValueError for an unknown one, with those that are known."""
    if name not in ACTIVATIONS:
        raise ValueError(f"activation {name!r} is not known; known ones: {', '.join(sorted(ACTIVATIONS))}")
    return ACTIVATIONS[name]
