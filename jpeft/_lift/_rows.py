"""A lifted function with an adapter a row: mapped over the rows of its arguments, each as a batch of one.

Under `vmap` the products with base weights, which no row owns, stay one product for the batch; those with the rows'
factors become batched ones. Which axis of an intermediate value is the batch is then never guessed. Of the results
it is known from their shapes for the whole batch and for one row.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from .._mixed import row_params
from .._params import PeftParams
from .._paths import leaf_path
from .._stacks import stacked_numbers
from ._jaxpr import is_array
from ._record import Record

Run = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], tuple[Any, Record]]


def run_rows(run: Run, function: Callable[..., Any], leaves: Sequence[Any], structure: Any, place: int) -> Any:
    """(what the function returns, the record of every use). leaves: of (args, kwargs), parameters at `place`."""
    mixed: PeftParams = leaves[place]
    indices = mixed.context.get("adapter_indices")
    if indices is None:
        raise ValueError(
            "the parameters hold a mixture of adapters, and no row has one; expected "
            "jpeft.with_context(mixed, adapter_indices=...), an index a row"
        )

    def call(entries: Sequence[Any]) -> tuple[Any, Record]:
        args, kwargs = jax.tree.unflatten(structure, entries)
        return run(function, args, kwargs)

    rows = indices.shape[0]
    named = jax.tree_util.tree_leaves_with_path(jax.tree.unflatten(structure, [*range(len(leaves))]))
    axes = [None if i == place else _row_axis(path, leaves[i], rows) for i, (path, _) in enumerate(named)]
    cut = {index: axis for index, axis in enumerate(axes) if axis is not None}
    if not cut:
        shapes = [f"{leaf_path(path)} {jnp.shape(leaves[i])}" for i, (path, _) in enumerate(named) if i != place]
        raise ValueError(
            f"adapter_indices are for {rows} rows, but no array among the arguments has a first axis of {rows}: "
            f"{', '.join(shapes[:8]) or 'there is none'}"
        )
    if rows == 1:
        return call([*leaves[:place], row_params(mixed, indices[0], 0), *leaves[place + 1 :]])
    whole = _shapes_of_whole(call, leaves, place)
    returned: list[Any] = []

    def one(index: jax.Array, row: jax.Array, arrays: list[Any], keys: list[Any]) -> tuple[list[Any], list[Any]]:
        entries = list(leaves)
        entries[place] = row_params(mixed, index, row)
        for (at, axis), array in zip(cut.items(), arrays, strict=True):
            entries[at] = jnp.expand_dims(array, axis)
        for at, key in zip(drawn, keys, strict=True):
            entries[at] = key
        outputs, record = call(entries)
        flat, out_structure = jax.tree_util.tree_flatten_with_path(outputs)
        values = [leaf for _, leaf in flat if is_array(leaf)]
        out_axes = [
            _axis_of_result(f"result {leaf_path(path)!r}", tuple(w.shape), tuple(leaf.shape), rows)
            for w, (path, leaf) in zip(whole, [item for item in flat if is_array(item[1])], strict=True)
        ]
        returned[:] = [[leaf for _, leaf in flat], out_structure, out_axes, record]
        of_rows = [jnp.squeeze(v, axis) for v, axis in zip(values, out_axes, strict=True) if axis is not None]
        return of_rows, [value for value, axis in zip(values, out_axes, strict=True) if axis is None]

    # A key that the function draws from: rows have draws of their own, as they have in one batch.
    drawn = [i for i, leaf in enumerate(leaves) if i != place and _is_key(leaf)]
    keys = [jax.random.split(leaves[i], rows) for i in drawn]
    mapped = jax.vmap(one, in_axes=(0, 0, list(cut.values()), 0), out_axes=(0, None))
    try:
        of_rows, shared = mapped(indices, jnp.arange(rows), [jnp.asarray(leaves[i]) for i in cut], keys)
    except ValueError as error:
        if "out_axes" not in str(error):
            raise
        raise ValueError(
            "a result of the function has no axis for the batch and yet depends on its rows, such as a mean loss; in a "
            "mixed batch, expected a function that keeps rows apart: lift the model, and reduce its results outside"
        ) from error
    flat, out_structure, out_axes, record = returned
    values_of_rows, values_shared = iter(of_rows), iter(shared)
    values = iter(
        next(values_shared) if axis is None else jnp.moveaxis(next(values_of_rows), 0, axis) for axis in out_axes
    )
    return jax.tree.unflatten(out_structure, [next(values) if is_array(leaf) else leaf for leaf in flat]), record


def _row_axis(path: tuple[Any, ...], leaf: Any, rows: int) -> int | None:
    """The axis of an argument that is the batch: the first, or the second where layers are stacked."""
    if not is_array(leaf):
        return None
    axis = 1 if any(stacked_numbers(name) for name in leaf_path(path).split(".")) else 0
    shape = jnp.shape(leaf)
    return axis if len(shape) > axis and shape[axis] == rows else None


def _is_key(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and leaf.ndim == 0 and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _shapes_of_whole(call: Callable[[Sequence[Any]], Any], leaves: Sequence[Any], place: int) -> list[Any]:
    """The shapes of the results for the whole batch, which the base alone gives as well."""
    base = leaves[place].base
    dynamic = [index for index, leaf in enumerate(leaves) if is_array(leaf)]

    def traced(base: Any, arrays: list[Any]) -> list[Any]:
        entries = list(leaves)
        entries[place] = base
        for index, array in zip(dynamic, arrays, strict=True):
            entries[index] = array
        return [leaf for leaf in jax.tree.leaves(call(entries)[0]) if is_array(leaf)]

    parameters, rebuild = jax.tree.flatten(base)
    kept = [index for index, leaf in enumerate(parameters) if is_array(leaf)]

    def of_arrays(own: list[Any], arrays: list[Any]) -> list[Any]:
        entries = list(parameters)
        for index, array in zip(kept, own, strict=True):
            entries[index] = array
        return traced(jax.tree.unflatten(rebuild, entries), arrays)

    return jax.eval_shape(of_arrays, [parameters[i] for i in kept], [leaves[i] for i in dynamic])


def _axis_of_result(name: str, whole: tuple[int, ...], row: tuple[int, ...], rows: int) -> int | None:
    """The axis of a result that is the batch, or None if it has none; raises ValueError if it cannot be told."""
    if whole == row:
        return None
    differing = [axis for axis, (w, r) in enumerate(zip(whole, row, strict=False)) if w != r]
    if len(whole) == len(row) and len(differing) == 1:
        axis = differing[0]
        if (whole[axis], row[axis]) == (rows, 1):
            return axis
    raise ValueError(
        f"{name} has the shape {whole} for a batch of {rows}, and {row} for one row; in a mixed batch, expected "
        f"results with an axis of {rows} rows by itself: reshape outside the lifted function"
    )
