"""Rematerialisation that knows adapters: names for what adapted products make, and the policy that keeps them."""

from typing import Any, TypeVar

import jax
from jax.ad_checkpoint import checkpoint_name

HIDDEN, OUTPUT = "jpeft_hidden", "jpeft_output"

_KEPT = jax.checkpoint_policies.save_only_these_names(HIDDEN, OUTPUT)

Value = TypeVar("Value")


def named_hidden(h: Value) -> Value:
    """x A of a low-rank term, which the gradient of B needs: of the rank's size, so that it costs next to nothing."""
    return checkpoint_name(h, HIDDEN)


def named_output(y: Value) -> Value:
    """The whole of an adapted product, base and terms: once it is kept, neither is computed again."""
    return checkpoint_name(y, OUTPUT)


def save_adapted_products(primitive: Any, *args: Any, **params: Any) -> Any:
    """A policy for `jax.checkpoint`: of a lifted function keep what adapted products give, and compute the rest again.

    Inside, the result `x W + s (x A) B` has the name "jpeft_output" and `x A` the name "jpeft_hidden", for
    `jax.checkpoint_policies.save_only_these_names` and its kind. This policy keeps both. If all large products of a
    layer are adapted, its backward pass then makes none of them again, as with `dots_with_no_batch_dims_saveable`,
    which however keeps the parts of every result, `x W` and `s (x A) B`, and so takes twice the memory. Products
    without an adapter are made again: `jax.checkpoint_policies.save_from_both_policies` adds to it. Without adapters it
    is `nothing_saveable`. The input x, which the gradient of A needs, follows from the results before it by what is
    cheap: norms, activations, attention. For `jpeft_interop.models`: `remat="save_adapted_products"`.
    JAX does not transpose names, so that it refuses `jax.linear_transpose` of a lifted function; `jax.vjp` does it.

    >>> import jax, jax.numpy as jnp, jpeft
    >>> params = {"up": {"kernel": jnp.ones((4, 8))}}
    >>> wrapped = jpeft.wrap(params, jpeft.LoraConfig(r=2, target_modules=["up"]), rng=jax.random.key(0))
    >>> layer = jax.checkpoint(lambda p, x: jnp.tanh(x @ p["up"]["kernel"]), policy=jpeft.save_adapted_products)
    >>> gradient = jpeft.grad(lambda p, x: jpeft.lift(layer)(p, x).sum())(wrapped, jnp.ones((3, 4)))
    >>> gradient.adapters["default"].weights["up"]["lora_B"].shape
    (8, 2)
    """
    return _KEPT(primitive, *args, **params)
