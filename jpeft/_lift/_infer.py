"""`infer_layouts`: what each axis of each weight is, read off the function that uses it."""

from collections.abc import Callable
from typing import Any

import jax

from .._paths import BIAS_NAMES, last_name
from .._quantized import is_quantized
from ._codes import Codes
from ._explain import split_arrays
from ._lift import interpret
from ._record import Record
from ._weight import UNKNOWN, AdaptedWeight, weight_axes


def infer_layouts(function: Callable[..., Any], params: Any, *args: Any, **kwargs: Any) -> dict[str, str]:
    """The layout of every weight of two axes or more that a function multiplies with, looks up or convolves.

    function: called as `function(params, *args, **kwargs)`; traced, not computed, so that all arrays may be
    `jax.ShapeDtypeStruct`s. Returns {leaf path: layout}, as `wrap(..., layouts=...)` takes it; leaves whose use
    does not tell (or that are not used) are left out.

    >>> import jax.numpy as jnp, jpeft
    >>> params = {"query": {"kernel": jnp.ones((8, 2, 4))}}
    >>> jpeft.infer_layouts(lambda p, x: jnp.einsum("td,dnh->tnh", x, p["query"]["kernel"]), params, jnp.ones((3, 8)))
    {'query.kernel': 'ioo'}
    """
    record = Record()
    shapes: dict[str, tuple[int, ...]] = {}
    arrays, rebuild = split_arrays((params, args, kwargs))

    def adapt(path: str, leaf: Any) -> Any:
        if leaf.ndim < 2 or last_name(path) in BIAS_NAMES or not jax.numpy.issubdtype(leaf.dtype, jax.numpy.floating):
            return leaf
        shapes[path] = leaf.shape
        base = Codes(leaf) if is_quantized(leaf) else leaf
        return AdaptedWeight(base, (), weight_axes(UNKNOWN * leaf.ndim, leaf.shape), path)

    def traced(arrays: list[Any]) -> None:
        own_params, own_args, own_kwargs = rebuild(arrays)
        leaves, structure = jax.tree.flatten((own_args, own_kwargs))

        def call(params: Any, others: list[Any]) -> Any:
            call_args, call_kwargs = jax.tree.unflatten(structure, others)
            return function(params, *call_args, **call_kwargs)

        interpret(call, own_params, leaves, adapt, record)

    jax.eval_shape(traced, arrays)
    layouts = {
        path: "".join(record.roles.get(path, {}).get(place, UNKNOWN) for place in range(len(shape)))
        for path, shape in shapes.items()
    }
    return {path: layout for path, layout in layouts.items() if UNKNOWN not in layout}
