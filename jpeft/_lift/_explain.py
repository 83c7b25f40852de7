"""`explain`: how each use of each adapted module is computed."""

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import jax

from .._params import PeftParams, is_peft_params
from ._entry import adapted_modules
from ._lift import run
from ._record import UNUSED, Use


@dataclasses.dataclass(frozen=True)
class Explanation:
    """A table of uses; `str` of it is what people read.

    uses: one `Use(module, adapter, how, primitive)` a row. `how` is "low-rank", "lookup", "transformed" (the
    method's own formula), "replaced" (a table that trains in full), "merged: <primitive> (<reason>)" or "unused".
    It speaks of the forward pass. The backward pass is of the same kind, except inside a function with a custom
    derivative: the rule is kept, and it gives (or takes) the derivative by the whole weight.
    """

    uses: tuple[Use, ...]

    def of(self, module: str) -> list[str]:
        """How the uses of one module are computed."""
        return [use.how for use in self.uses if use.module == module]

    def __str__(self) -> str:
        rows = [("module", "adapter", "computed as", "by"), *(_row(use) for use in self.uses)]
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def _row(use: Use) -> tuple[str, str, str, str]:
    return use.module, use.adapter, use.how, use.primitive


def explain(function: Callable[..., Any], wrapped: PeftParams, *args: Any, **kwargs: Any) -> Explanation:
    """Say how a lifted function would compute each use of each adapted module; nothing is computed.

    function: the plain function, as given to `lift`. Arrays may be `jax.ShapeDtypeStruct`s.
    Raises TypeError if `wrapped` is not `PeftParams`, and ValueError, as the lifted function, where a weight would have
    to be merged whose method cannot be.

    >>> import jax, jax.numpy as jnp, jpeft
    >>> params = {"dense": {"kernel": jnp.ones((4, 3))}}
    >>> wrapped = jpeft.wrap(params, jpeft.LoraConfig(r=2, target_modules=["dense"]), rng=jax.random.key(0))
    >>> print(jpeft.explain(lambda p, x: x @ p["dense"]["kernel"], wrapped, jnp.ones((2, 4))))
    module  adapter  computed as  by
    -----------------------------------------
    dense   default  low-rank     dot_general
    """
    if not is_peft_params(wrapped):
        raise TypeError(
            f"explain expects PeftParams from jpeft.wrap as its second argument, not {type(wrapped).__name__}"
        )
    records: list[Any] = []

    def traced(wrapped: PeftParams, arrays: list[Any]) -> None:
        own_args, own_kwargs = rebuild(arrays)
        records.append(run(function, (wrapped, *own_args), own_kwargs)[1])

    arrays, rebuild = split_arrays((args, kwargs))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        jax.eval_shape(traced, wrapped, arrays)
    record = records[-1]
    used = record.used()
    unused = [Use(path, name, UNUSED, "") for name, path in adapted_modules(wrapped) if (name, path) not in used]
    return Explanation((*record.uses(), *unused))


def split_arrays(tree: Any) -> tuple[list[Any], Callable[[list[Any]], Any]]:
    """The arrays of a tree, and the function that puts others in their place; all else stays as it is."""
    leaves, structure = jax.tree.flatten(tree)
    places = [index for index, leaf in enumerate(leaves) if hasattr(leaf, "shape") and hasattr(leaf, "dtype")]

    def rebuild(arrays: list[Any]) -> Any:
        entries = list(leaves)
        for index, array in zip(places, arrays, strict=True):
            entries[index] = array
        return jax.tree.unflatten(structure, entries)

    return [leaves[index] for index in places], rebuild
