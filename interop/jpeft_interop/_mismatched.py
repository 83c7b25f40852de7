"""`ignore_mismatched_sizes`: tensors of another shape than the model's are left out, and its own values stay."""

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jpeft._params import Adapter

from ._family import Family
from ._keys import leaf_slots, slots
from ._listed import listed
from ._stacked import is_abstract, unstacked_adapter
from ._surplus import first_name, possible_embeddings, second_names


def without_mismatched(
    path: Path,
    tensors: Mapping[str, np.ndarray],
    planned: Adapter,
    initial: Callable[[], Adapter],
    leaves: Mapping[str, Any],
    family: Family,
    layouts: Mapping[str, str],
) -> dict[str, np.ndarray]:
    """The tensors of a file, with the adapter's own values where the file's have another shape; warns of each.

    path: the file's, for messages. planned: the adapter, layer by layer, abstract. initial: makes it with values, and
    is called if they are needed. leaves: of the base, layer by layer; base weights of another shape are left out.
    Raises ValueError if the values are abstract.
    """
    table = slots(planned, leaves, family, layouts)
    known = {**leaf_slots(possible_embeddings(leaves), planned, leaves, family, layouts), **table}
    wrong = {key: slot for key, slot in known.items() if key in tensors and tensors[key].shape != slot.shape}
    if not wrong:
        return dict(tensors)
    told = [f"{key} is {tensors[key].shape}, the model has {slot.shape}" for key, slot in wrong.items()]
    warnings.warn(
        f"{path} has tensors of another shape, which are left out, as ignore_mismatched_sizes is True: {listed(told)}",
        stacklevel=2,
    )
    adapter = unstacked_adapter(initial())
    if any(map(is_abstract, jax.tree.leaves((adapter.weights, adapter.replaced)))):
        raise ValueError(
            "ignore_mismatched_sizes=True puts initial values in the place of misshapen tensors, but the parameters "
            "are abstract; expected real arrays, or an adapter of this very model"
        )
    own = {key: np.asarray(table[key].take(adapter)) for key in wrong if key in table}
    seconds = second_names(table, family)
    repeated = {key: seconds.get(key) or first_name(key, table) for key in tensors if key not in known}
    kept = {key: tensor for key, tensor in tensors.items() if key not in wrong and repeated.get(key) not in own}
    return {**kept, **own}
