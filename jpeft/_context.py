"""What a call needs besides its inputs: a key for dropout, an adapter for each row of a mixed batch."""

import dataclasses
from typing import Any

import jax

from ._mixed import indices_of
from ._params import PeftParams, Rng


def with_context(params: PeftParams, *, rng: jax.Array | None = None, adapter_indices: Any = None) -> PeftParams:
    """The same parameters with what a training step needs besides its batch.

    rng: a key for dropout; without one dropout is off. Give each step a key of its own.
    adapter_indices: for parameters of `mixed_batch`, which adapter each row of the batch gets: integers (rows,), -1 for
    none, or a list of names, "__base__" for none.
    Raises TypeError if `rng` is not a PRNG key, and ValueError for indices or names that the mixture does not have.

    >>> import jax, jpeft
    >>> params = {"dense": {"kernel": jax.numpy.ones((4, 4))}}
    >>> wrapped = jpeft.wrap(params, jpeft.LoraConfig(r=2, target_modules=["dense"]), rng=jax.random.key(0))
    >>> sorted(jpeft.with_context(wrapped, rng=jax.random.key(1)).context)
    ['rng']
    """
    context: dict[str, Any] = {}
    if rng is not None:
        typed = isinstance(rng, jax.Array) and jax.numpy.issubdtype(rng.dtype, jax.dtypes.prng_key)
        legacy = isinstance(rng, jax.Array) and rng.dtype == jax.numpy.uint32 and rng.ndim >= 1
        if not (typed or legacy):
            raise TypeError(f"rng is {type(rng).__name__} {rng!r}; expected a key from jax.random.key(seed)")
        context["rng"] = Rng.of(rng)
    if adapter_indices is not None:
        context["adapter_indices"] = indices_of(params, adapter_indices)
    return dataclasses.replace(params, context=context)
