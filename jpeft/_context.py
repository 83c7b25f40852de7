"""What a call needs besides its inputs: a key for dropout, an adapter for each row, what methods ask of each row."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from ._contract import RowInput, method_of
from ._mixed import MixedConfig, indices_of, row_inputs_of
from ._params import PeftParams, Rng


def with_context(
    params: PeftParams, *, rng: jax.Array | None = None, adapter_indices: Any = None, **row_inputs: Any
) -> PeftParams:
    """The same parameters with what a call needs besides its batch, in place of what they had of it.

    rng: a key for dropout; without one dropout is off. Give each step a key of its own.
    adapter_indices: for parameters of `mixed_batch`, which adapter each row of the batch gets: integers (rows,), -1 for
    none, or a list of names, "__base__" for none.
    row_inputs: what the adapters' methods ask for, by name, an entry a row: `alora_offsets` (rows,), see
    `jpeft.alora_offsets`; `task_ids` (rows,), of Poly and of prompts for several tasks. An array is for all adapters
    that ask for it, a dict {adapter: array} for each its own.
    Raises TypeError if `rng` is not a PRNG key, or for a name that no adapter asks for, and ValueError for indices or
    names that the parameters do not have, and for arrays of another form or of another number of rows.

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
    given = {name: value for name, value in row_inputs.items() if value is not None}
    asked = row_inputs_of(params) if given else {}
    for name, value in given.items():
        if name not in asked:
            known = ", ".join(["rng", "adapter_indices", *asked])
            raise TypeError(f"no adapter asks for {name}; expected one of: {known}")
        context[name] = _read(params, name, value, asked[name])
    _check_rows(context)
    return dataclasses.replace(params, context=context)


def brought(params: PeftParams, name: str) -> dict[str, jax.Array]:
    """What the context brings for each row, as far as the method of an adapter asks for it; raises ValueError."""
    found = {}
    for asked in method_of(params.adapters[name].config).row_inputs:
        value = params.context.get(asked)
        array = value.get(name) if isinstance(value, Mapping) else value
        if array is None:
            raise ValueError(
                f"adapter {name!r} needs {asked} for each row of the batch, and the parameters bring none; expected "
                f"jpeft.with_context(params, {asked}=...)"
            )
        found[asked] = array
    return found


def _read(params: PeftParams, name: str, value: Any, asked: RowInput) -> Any:
    if not isinstance(value, Mapping):
        array = asked.read(value)
        for adapter in params.active:
            _check_entries(params.adapters[adapter].config, name, array)
        return array
    unknown = [adapter for adapter in value if adapter not in params.adapters]
    if unknown:
        raise ValueError(f"{name} are for {unknown}; expected adapters among: {', '.join(params.adapters)}")
    arrays = {adapter: asked.read(own) for adapter, own in value.items()}
    for adapter, array in arrays.items():
        _check_entries(params.adapters[adapter].config, name, array)
    return arrays


def _check_entries(config: Any, name: str, array: jax.Array) -> None:
    # In a mixture an entry is for the adapter of its row.
    asked = None if isinstance(config, MixedConfig) else method_of(config).row_inputs.get(name)
    if asked is not None and asked.check is not None:
        asked.check(array, config)


def _check_rows(context: Mapping[str, Any]) -> None:
    of_rows = {name: jax.tree.leaves(value) for name, value in context.items() if name != "rng"}
    counts = {name: sorted({array.shape[0] for array in arrays}) for name, arrays in of_rows.items()}
    if len({count for own in counts.values() for count in own}) > 1:
        raise ValueError(f"the context is for batches of another number of rows each: {counts}; expected one number")
