"""What trains and what does not: masks, partitions and gradients of wrapped parameters."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ._config import TunerConfig
from ._contract import method_of
from ._params import Adapter, PeftParams
from ._paths import BIAS_NAMES, last_name, leaf_path
from ._quantized import is_quantized
from ._targets import saved_modules, targeted_holder
from ._wrap import checked_params


def trainable_mask(wrapped: PeftParams) -> PeftParams:
    """The same tree with True at each leaf that trains, as `optax.masked(tx, jpeft.trainable_mask)` asks for it.

    Those are the arrays and the replaced leaves of the active adapters, without what their method keeps frozen and
    without adapters whose config has inference_mode. Raises TypeError if `wrapped` does not come from `wrap`.

    >>> import jax.numpy as jnp, jpeft
    >>> wrapped = jpeft.wrap({"query": {"kernel": jnp.ones((4, 6))}}, jpeft.LoraConfig(target_modules=["query"]))
    >>> mask = trainable_mask(wrapped)
    >>> mask.base, mask.adapters["default"].weights
    ({'query': {'kernel': False}}, {'query': {'lora_A': True, 'lora_B': True}})
    """
    checked_params(wrapped)
    adapters = {name: _adapter_mask(adapter, name in wrapped.active) for name, adapter in wrapped.adapters.items()}
    return dataclasses.replace(
        wrapped, base=_filled(wrapped.base, False), adapters=adapters, context=_filled(wrapped.context, False)
    )


def _adapter_mask(adapter: Adapter, active: bool) -> Adapter:
    trains, method = active and not adapter.config.inference_mode, method_of(adapter.config)
    return dataclasses.replace(
        adapter,
        weights={
            path: {name: _filled(array, trains and method.trains(name)) for name, array in arrays.items()}
            for path, arrays in adapter.weights.items()
        },
        shared={name: _filled(array, trains and method.trains(name)) for name, array in adapter.shared.items()},
        replaced=_filled(adapter.replaced, trains),
        rows=_filled(adapter.rows, trains),
        scaling=_filled(adapter.scaling, False),
    )


def _filled(tree: Any, value: bool) -> Any:
    return jax.tree.map(lambda _: value, tree)


def partition(wrapped: PeftParams) -> tuple[PeftParams, PeftParams]:
    """Two halves of wrapped parameters: what trains, with None for the rest, and the rest.

    Raises TypeError if `wrapped` does not come from `wrap`, and ValueError if nothing trains.

    >>> import jax, jax.numpy as jnp, jpeft
    >>> wrapped = jpeft.wrap({"query": {"kernel": jnp.ones((4, 6))}}, jpeft.LoraConfig(target_modules=["query"]))
    >>> trainable, frozen = partition(wrapped)
    >>> [leaf.shape for leaf in jax.tree.leaves(trainable)]
    [(8, 4), (6, 8)]
    """
    mask = trainable_mask(wrapped)
    if not any(jax.tree.leaves(mask.adapters)):
        settings = ", ".join(
            f"{n!r} with inference_mode={a.config.inference_mode}" for n, a in wrapped.adapters.items()
        )
        raise ValueError(
            f"nothing trains: the active adapters are {list(wrapped.active)}, of: {settings or 'none'}. Activate one "
            "with jpeft.set_adapter, and wrap or load it with inference_mode=False (load_pretrained: is_trainable=True)"
        )
    trainable = jax.tree.map(lambda trains, leaf: leaf if trains else None, mask.adapters, wrapped.adapters)
    frozen = jax.tree.map(lambda trains, leaf: None if trains else leaf, mask.adapters, wrapped.adapters)
    return (
        dataclasses.replace(wrapped, base=None, adapters=trainable, context={}),
        dataclasses.replace(wrapped, adapters=frozen),
    )


def combine(trainable: PeftParams, frozen: PeftParams) -> PeftParams:
    """The wrapped parameters that `partition` took apart; raises ValueError if the halves do not fit.

    >>> import jax, jax.numpy as jnp, jpeft
    >>> wrapped = jpeft.wrap({"query": {"kernel": jnp.ones((4, 6))}}, jpeft.LoraConfig(target_modules=["query"]))
    >>> jax.tree.structure(combine(*partition(wrapped))) == jax.tree.structure(wrapped)
    True
    """
    checked_params(trainable)
    checked_params(frozen)
    if trainable.base is not None or frozen.base is None:
        raise ValueError("expected combine(trainable, frozen), in this order, with the two halves of jpeft.partition")
    ours, theirs = (jax.tree.structure(half.adapters, is_leaf=_is_none) for half in (trainable, frozen))
    if ours != theirs or trainable.active != frozen.active:
        raise ValueError(
            "the halves come from different parameters: expected the same adapters and active names, not "
            f"{sorted(trainable.adapters)}, active {trainable.active}, and {sorted(frozen.adapters)}, "
            f"active {frozen.active}, with the same configs and leaves"
        )
    adapters = jax.tree_util.tree_map_with_path(_either, trainable.adapters, frozen.adapters, is_leaf=_is_none)
    return dataclasses.replace(frozen, adapters=adapters)


def _either(key_path: tuple[Any, ...], first: Any, second: Any) -> Any:
    if (first is None) == (second is None):
        found = "in neither half" if first is None else "in both halves"
        raise ValueError(f"adapter leaf {leaf_path(key_path)!r} is {found}; expected the two halves of jpeft.partition")
    return second if first is None else first


def _is_none(leaf: Any) -> bool:
    return leaf is None


def value_and_grad(fn: Callable[..., Any], has_aux: bool = False) -> Callable[..., tuple[Any, PeftParams]]:
    """`jax.value_and_grad` of a function whose first argument is wrapped parameters, in what trains alone.

    The gradient has the structure of the parameters. At a frozen leaf it is a scalar zero of the leaf's dtype, so
    that nothing of its size is made and `optax.apply_updates` leaves the leaf as it is. The function returned raises
    TypeError if its first argument does not come from `wrap` or holds a leaf that cannot be added to, such as a
    typed PRNG key, and ValueError if nothing trains.

    >>> import jax.numpy as jnp, jpeft
    >>> wrapped = jpeft.wrap({"query": {"kernel": jnp.ones((4, 6))}}, jpeft.LoraConfig(target_modules=["query"]))
    >>> loss, gradient = value_and_grad(lambda params: jpeft.merge(params)["query"]["kernel"].sum())(wrapped)
    >>> float(loss), gradient.base["query"]["kernel"].shape
    (24.0, ())
    >>> gradient.adapters["default"].weights["query"]["lora_B"].shape
    (6, 8)
    """

    @functools.wraps(fn)
    def differentiated(wrapped: PeftParams, /, *args: Any, **kwargs: Any) -> tuple[Any, PeftParams]:
        trainable, frozen = partition(wrapped)
        zeros = jax.tree_util.tree_map_with_path(_scalar_zero, frozen)

        def of_trainable(trainable: PeftParams) -> Any:
            return fn(combine(trainable, frozen), *args, **kwargs)

        value, gradient = jax.value_and_grad(of_trainable, has_aux=has_aux)(trainable)
        return value, combine(gradient, zeros)

    return differentiated


def grad(fn: Callable[..., Any], has_aux: bool = False) -> Callable[..., Any]:
    """`jax.grad` of a function whose first argument is wrapped parameters; see `value_and_grad`.

    Returns the gradient, or with has_aux the gradient and what else the function returns. Raises as `value_and_grad`.

    >>> import jax.numpy as jnp, jpeft
    >>> wrapped = jpeft.wrap({"query": {"kernel": jnp.ones((4, 6))}}, jpeft.LoraConfig(target_modules=["query"]))
    >>> gradient = grad(lambda params: jpeft.merge(params)["query"]["kernel"].sum())(wrapped)
    >>> gradient.adapters["default"].weights["query"]["lora_B"].shape
    (6, 8)
    """
    differentiated = value_and_grad(fn, has_aux)

    @functools.wraps(fn)
    def gradient_of(wrapped: PeftParams, /, *args: Any, **kwargs: Any) -> Any:
        value, gradient = differentiated(wrapped, *args, **kwargs)
        return (gradient, value[1]) if has_aux else gradient

    return gradient_of


def _scalar_zero(key_path: tuple[Any, ...], leaf: Any) -> jax.Array:
    dtype = getattr(leaf, "dtype", None)
    if dtype is None and isinstance(leaf, (bool, int, float, complex)):
        dtype = jnp.result_type(leaf)
    if dtype is None or jnp.issubdtype(dtype, jax.dtypes.prng_key):
        raise TypeError(
            f"parameter leaf {leaf_path(key_path)!r} is {'a PRNG key' if dtype is not None else repr(leaf)}, to which "
            "no update can be added; keep it out of the tree that is wrapped (nnx: split off nnx.Param; equinox: "
            "eqx.partition), or use jpeft.partition and jpeft.combine"
        )
    return jnp.zeros((), jax.dtypes.canonicalize_dtype(dtype))


def count_parameters(wrapped: PeftParams) -> tuple[int, int]:
    """The numbers of trainable parameters and of all parameters, counted as PEFT counts them.

    All is the base (of a quantised weight, the numbers that it stands for) and every adapter; a module saved in full
    counts twice, a trained bias once, and arrays that a method keeps frozen not at all. Works on abstract trees.
    Raises TypeError if `wrapped` does not come from `wrap`.

    >>> import jax.numpy as jnp, jpeft
    >>> wrapped = jpeft.wrap({"query": {"kernel": jnp.ones((4, 6))}}, jpeft.LoraConfig(target_modules=["query"]))
    >>> count_parameters(wrapped)
    (80, 104)
    """
    mask = trainable_mask(wrapped)
    trainable = jax.tree.map(lambda trains, leaf: _size(leaf) if trains else 0, mask.adapters, wrapped.adapters)
    beside = sum(_size_beside(adapter) for adapter in wrapped.adapters.values())
    leaves = jax.tree.leaves(wrapped.base, is_leaf=is_quantized)
    return sum(jax.tree.leaves(trainable)), sum(map(_size, leaves)) + beside


def _size(leaf: Any) -> int:
    return math.prod(np.shape(leaf))


def _size_beside(adapter: Adapter) -> int:
    method = method_of(adapter.config)
    arrays = [item for own in (*adapter.weights.values(), adapter.shared) for item in own.items()]
    copies = [leaf for path, leaf in adapter.replaced.items() if not _is_bias_alone(path, adapter)]
    copies += jax.tree.leaves(adapter.rows)
    return sum(_size(array) for name, array in arrays if method.trains(name)) + sum(map(_size, copies))


def _is_bias_alone(path: str, adapter: Adapter) -> bool:
    names, config = path.split("."), adapter.config
    modules = (".".join(names[:count]) for count in range(1, len(names)))
    if last_name(path) not in BIAS_NAMES or saved_modules(modules, config):
        return False
    if not isinstance(config, TunerConfig) or not method_of(config).in_full:
        return True
    return targeted_holder(path, config) is None


def print_trainable_parameters(wrapped: PeftParams) -> None:
    """Print how much trains, in PEFT's words; raises TypeError if `wrapped` does not come from `wrap`.

    >>> import jax.numpy as jnp, jpeft
    >>> wrapped = jpeft.wrap({"query": {"kernel": jnp.ones((4, 6))}}, jpeft.LoraConfig(target_modules=["query"]))
    >>> print_trainable_parameters(wrapped)
    trainable params: 80 || all params: 104 || trainable%: 76.9231
    """
    trainable, everything = count_parameters(wrapped)
    share = 100 * trainable / everything
    print(f"trainable params: {trainable:,d} || all params: {everything:,d} || trainable%: {share:.4f}")
