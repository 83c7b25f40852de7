"""`lift`: any function of a parameter tree, made to understand the pair of base tree and adapters."""

import functools
import warnings
from collections.abc import Callable
from typing import Any

import jax

from .._contract import is_quantised
from .._mixed import is_mixed
from .._params import PeftParams, is_peft_params
from .._paths import leaf_path, map_leaves
from .._quantized import is_quantized
from ._codes import Codes, stand_in
from ._consumers import CONSUMERS
from ._control import CONTROL
from ._custom import CUSTOM
from ._entry import adapted_modules, replaced_leaves, terms_by_leaf
from ._jaxpr import is_array, trace
from ._products import PRODUCTS
from ._record import Record
from ._rows import run_rows
from ._views import VIEWS
from ._walk import Context, plain, walk
from ._weight import UNKNOWN, AdaptedWeight, weight_axes

RULES = {**VIEWS, **PRODUCTS, **CONSUMERS, **CONTROL, **CUSTOM}


def lift(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make a function of a parameter tree accept `PeftParams` in that tree's place.

    function: any traceable function, such as the `apply` of a linen, NNX, Equinox or Haiku model. It runs
    unchanged; where an adapted weight is used, the method's own formula takes the place of the product. The
    result composes with `jit`, `grad`, `vmap`, `scan`; jit it, as each call traces. Called with a plain tree it
    is `function`. Where the tree holds leaves of `jpeft.quantize`, with or without an adapter, the function sees the
    dense weights, which are made where they are used. Of other quantised leaves (integers, 8-bit floats) the adapter
    acts on the dequantised weight: the function has to make it, as `(kernel.astype(dtype) - zero) * scale` or by
    blocks, before it multiplies with it; ValueError says where it does not. Warns of adapters that the function does
    not use; raises ValueError for two `PeftParams`.

    >>> import jax, jax.numpy as jnp, jpeft
    >>> params = {"dense": {"kernel": jnp.ones((4, 3))}}
    >>> wrapped = jpeft.wrap(params, jpeft.LoraConfig(r=2, target_modules=["dense"]), rng=jax.random.key(0))
    >>> apply = jpeft.lift(lambda params, x: x @ params["dense"]["kernel"])
    >>> apply(wrapped, jnp.ones((2, 4))).shape
    (2, 3)
    """

    @functools.wraps(function)
    def lifted(*args: Any, **kwargs: Any) -> Any:
        outputs, _ = run(function, args, kwargs)
        return outputs

    return lifted


def run(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Record]:
    """Call a function on adapted parameters: (what it returns, the record of every use)."""
    record = Record()
    leaves, structure = jax.tree.flatten((args, kwargs), is_leaf=is_peft_params)
    places = [index for index, leaf in enumerate(leaves) if is_peft_params(leaf)]
    if not places:
        return _run_plain(function, args, kwargs, record), record
    if len(places) > 1:
        raise ValueError(f"a lifted function takes one PeftParams; {len(places)} were given")
    wrapped: PeftParams = leaves[places[0]]
    if is_mixed(wrapped):
        return run_rows(run, function, leaves, structure, places[0])
    terms, leaves_instead = terms_by_leaf(wrapped), replaced_leaves(wrapped)

    def call(params: Any, others: list[Any]) -> Any:
        entries = [*others[: places[0]], params, *others[places[0] :]]
        own_args, own_kwargs = jax.tree.unflatten(structure, entries)
        return function(*own_args, **own_kwargs)

    def adapt(path: str, leaf: Any) -> Any:
        if path not in terms:
            return _unadapted(path, leaf)
        if is_quantized(leaf):
            leaf = Codes(leaf)
        scaled = False if is_quantised(leaf.dtype) else None
        return AdaptedWeight(leaf, terms[path], weight_axes(terms[path][0].site.layout, leaf.shape), path, scaled)

    others = [leaf for index, leaf in enumerate(leaves) if index != places[0]]
    params = map_leaves(functools.partial(_instead, leaves_instead), wrapped.base)
    outputs = interpret(call, params, others, adapt, record)
    _warn_of_unused(wrapped, record)
    return outputs, record


def _run_plain(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], record: Record) -> Any:
    """Call a function on parameters without adapters; only quantised leaves make a difference."""
    if not any(map(is_quantized, jax.tree.leaves((args, kwargs), is_leaf=is_quantized))):
        return function(*args, **kwargs)

    def call(given: Any, others: list[Any]) -> Any:
        own_args, own_kwargs = given
        return function(*own_args, **own_kwargs)

    return interpret(call, (args, kwargs), [], _unadapted, record)


def _unadapted(path: str, leaf: Any) -> Any:
    if not is_quantized(leaf):
        return leaf
    return AdaptedWeight(Codes(leaf), (), weight_axes(UNKNOWN * leaf.ndim, leaf.shape), path)


def interpret(
    function: Callable[[Any, list[Any]], Any],
    params: Any,
    others: list[Any],
    adapt: Callable[[str, Any], Any],
    record: Record,
) -> Any:
    """Trace `function(params, others)` and walk it, with `adapt(path, leaf)` in place of each leaf of params."""
    named, structure = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_quantized)
    flat = [*(leaf for _, leaf in named), *others]
    # What is not an array (flags, names, functions) is part of the function, as under `jit` with static arguments.
    dynamic = [index for index, leaf in enumerate(flat) if is_array(leaf) or is_quantized(leaf)]
    returned: list[Any] = []

    def traced(arrays: list[Any]) -> list[Any]:
        entries = list(flat)
        for index, array in zip(dynamic, arrays, strict=True):
            entries[index] = array
        outputs = function(jax.tree.unflatten(structure, entries[: len(named)]), entries[len(named) :])
        leaves, out_structure = jax.tree.flatten(outputs)
        returned[:] = [leaves, out_structure]
        return [leaf for leaf in leaves if is_array(leaf)]

    jaxpr = trace(traced, [_stand_in(flat[index]) for index in dynamic])
    values = [adapt(leaf_path(named[i][0]), flat[i]) if i < len(named) else flat[i] for i in dynamic]
    context = Context(RULES, record)
    arrays = iter(plain(context, None, value, "the function returns it") for value in walk(context, jaxpr, values))
    leaves, out_structure = returned
    return jax.tree.unflatten(out_structure, [next(arrays) if is_array(leaf) else leaf for leaf in leaves])


def _stand_in(leaf: Any) -> Any:
    return stand_in(Codes(leaf)) if is_quantized(leaf) else leaf


def _instead(replaced: dict[str, Any], path: str, leaf: Any) -> Any:
    # In the leaf's own dtype, for the function may mix it with others of that dtype.
    return replaced[path].astype(leaf.dtype) if path in replaced else leaf


def _warn_of_unused(wrapped: PeftParams, record: Record) -> None:
    used = record.used()
    unused = [(name, path) for name, path in adapted_modules(wrapped) if (name, path) not in used]
    if unused:
        shown = ", ".join(f"{path} (adapter {name!r})" for name, path in unused[:5])
        more = f" and {len(unused) - 5} more" if len(unused) > 5 else ""
        warnings.warn(f"the function uses no weight of: {shown}{more}; its adapter has no effect", stacklevel=4)
