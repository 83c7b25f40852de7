"""A pure function called as PyTorch models are: with lists, arrays and switches, compiled once for each shape."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

import jpeft
from jpeft._config import freeze

Prepare = Callable[[Any, tuple[Any, ...], Mapping[str, Any]], tuple[Any, Sequence[Any], Mapping[str, Any]]]


def compiled(apply: Callable[..., Any], prepare: Prepare | None = None) -> Callable[..., Any]:
    """`jpeft.lift(apply)` as one compiled program for each shape of the arguments and each value of a switch.

    prepare(params, args, kwargs) -> the same, as `apply` is to get them: a part of the program.
    Numbers with a fraction, arrays and trees of them, among them lists of numbers, are traced; None, booleans, whole
    numbers, texts and lists of texts are compiled in. The function returned raises TypeError for what is neither.

    >>> import jax.numpy as jnp, jpeft
    >>> params = jpeft.wrap({"q": {"kernel": jnp.ones((2, 3))}}, jpeft.LoraConfig(target_modules=["q"]))
    >>> compiled(lambda params, x, twice: (1 + twice) * (x @ params["q"]["kernel"]))(params, [[1.0, 1.0]], twice=True)
    Array([[4., 4., 4.]], dtype=float32)
    """
    lifted = jpeft.lift(apply)

    @partial(jax.jit, static_argnums=0)
    def run(switches: Mapping[Any, Any], params: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        args = tuple(switches.get(place, value) for place, value in enumerate(args))
        named = {name: value for name, value in switches.items() if isinstance(name, str)}
        given = {**kwargs, **named}
        if prepare is not None:
            params, args, given = prepare(params, args, given)
        return lifted(params, *args, **given)

    def call(params: Any, *args: Any, **kwargs: Any) -> Any:
        given = {**dict(enumerate(args)), **kwargs}
        switches = {name: value for name, value in given.items() if _is_switch(value)}
        traced = {name: _traced(name, value) for name, value in given.items() if name not in switches}
        positional = tuple(traced.get(place) for place in range(len(args)))
        return run(freeze(switches), params, positional, {name: traced[name] for name in kwargs if name in traced})

    return call


def _is_switch(value: Any) -> bool:
    texts = isinstance(value, (list, tuple)) and len(value) > 0 and all(isinstance(entry, str) for entry in value)
    return value is None or isinstance(value, (bool, int, str)) or texts


def _traced(name: Any, value: Any) -> Any:
    if isinstance(value, (list, tuple)) and all(
        isinstance(leaf, (bool, int, float)) for leaf in jax.tree.leaves(value)
    ):
        value = np.asarray(value)
    for leaf in jax.tree.leaves(value):
        if not isinstance(leaf, (bool, int, float, complex)) and not (
            hasattr(leaf, "shape") and hasattr(leaf, "dtype")
        ):
            raise TypeError(
                f"argument {name!r} holds a {type(leaf).__name__}; expected arrays, numbers, or a text or list of texts"
            )
        if type(leaf).__module__.partition(".")[0] == "torch":
            raise TypeError(f"argument {name!r} is a PyTorch tensor; give its numbers: tensor.numpy()")
    return value
