"""An adapter as a flat dict with PEFT's keys: `get_peft_model_state_dict` and its inverse."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from jpeft import PeftParams
from jpeft._paths import leaves_by_path
from jpeft._stacks import unstacked
from jpeft._xlora import is_router

from ._base_model import parameters_of
from ._face import Face
from ._face_files import chosen_in
from ._family import family_of
from ._load import adapter_from, with_mapped_keys
from ._mismatched import without_mismatched
from ._processes import placed, with_whole_adapters
from ._save import contents_of
from ._stacked import unstacked_adapter, unstacked_layouts
from ._xlora_files import filled_router


def get_peft_model_state_dict(
    model: Any,
    adapter_name: str = "default",
    *,
    save_embedding_layers: bool | Literal["auto"] = "auto",
    family: str = "hf",
    layouts: Mapping[str, str] | None = None,
) -> dict[str, np.ndarray]:
    """The tensors of one adapter under the keys, in the shapes and in the dtypes of `adapter_model.safetensors`.

    model: a `PeftModel`, or `PeftParams`. The other arguments are those of `save_pretrained`. Raises ValueError for an
    unknown adapter name, and what `save_pretrained` raises.

    >>> import jax.numpy as jnp, jpeft
    >>> wrapped = jpeft.wrap({"q": {"kernel": jnp.ones((4, 6))}}, jpeft.LoraConfig(r=2, target_modules=["q"]))
    >>> {key: tensor.shape for key, tensor in get_peft_model_state_dict(wrapped).items()}
    {'base_model.model.q.lora_A.weight': (2, 4), 'base_model.model.q.lora_B.weight': (6, 2)}
    """
    wrapped = parameters_of(model)
    _check_name(wrapped, adapter_name)
    layouts = _layouts(model, layouts)
    if save_embedding_layers == "auto" and isinstance(face := getattr(model, "face", None), Face):
        save_embedding_layers = chosen_in(face, wrapped.adapters[adapter_name])
    wrapped = with_whole_adapters(wrapped, [adapter_name])
    contents = contents_of(wrapped, adapter_name, None, family_of(family), layouts, save_embedding_layers)
    return dict(contents.tensors)


def set_peft_model_state_dict(
    model: Any,
    state_dict: Mapping[str, Any],
    adapter_name: str = "default",
    *,
    family: str = "hf",
    layouts: Mapping[str, str] | None = None,
    key_mapping: Mapping[str, str] | None = None,
    ignore_mismatched_sizes: bool = False,
    low_cpu_mem_usage: bool = False,
) -> Any:
    """The model with one adapter's values taken from a dict with PEFT's keys.

    model: a `PeftModel`, which is changed and returned, or `PeftParams`, which are not. state_dict: numpy, JAX or CPU
    tensors, all that the adapter has and no others. They keep their dtypes. family, layouts, key_mapping: as for
    `load_pretrained`. ignore_mismatched_sizes: whether tensors of another shape are left out, with a UserWarning that
    lists them; the adapter keeps its own. low_cpu_mem_usage: of no effect, for an adapter may be abstract anyhow.
    Raises ValueError for an unknown adapter name, and if tensors are missing, unexpected or misshapen, all of them in
    one message.

    >>> import jax.numpy as jnp, jpeft
    >>> wrapped = jpeft.wrap({"q": {"kernel": jnp.ones((4, 6))}}, jpeft.LoraConfig(r=2, target_modules=["q"]))
    >>> state = {key: tensor + 1 for key, tensor in get_peft_model_state_dict(wrapped).items()}
    >>> float(set_peft_model_state_dict(wrapped, state).adapters["default"].weights["q"]["lora_B"][0, 0])
    1.0
    """
    wrapped = parameters_of(model)
    _check_name(wrapped, adapter_name)
    leaves = leaves_by_path(wrapped.base)
    table = family_of(family)
    known = unstacked_layouts({**table.layouts, **_layouts(model, layouts)}, leaves)
    tensors = {key: np.asarray(tensor) for key, tensor in state_dict.items()}
    planned = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), wrapped.adapters[adapter_name])
    tensors = with_mapped_keys(tensors, key_mapping or {})
    if ignore_mismatched_sizes:
        own = wrapped.adapters[adapter_name]
        single = unstacked_adapter(planned)
        tensors = without_mismatched(Path("state_dict"), tensors, single, lambda: own, unstacked(leaves), table, known)
    if is_router(wrapped.adapters[adapter_name]):
        adapter = filled_router(Path("state_dict"), tensors, wrapped.adapters[adapter_name])
    else:
        adapter = adapter_from(Path("state_dict"), tensors, planned, leaves, table, known)
    filled = placed(dataclasses.replace(wrapped, adapters={**wrapped.adapters, adapter_name: adapter}), adapter_name)
    if isinstance(model, PeftParams):
        return filled
    model.params = filled
    return model


def _layouts(model: Any, layouts: Mapping[str, str] | None) -> Mapping[str, str]:
    return {**getattr(model, "layouts", {}), **(layouts or {})}


def _check_name(wrapped: PeftParams, name: str) -> None:
    if name not in wrapped.adapters:
        raise ValueError(f"there is no adapter {name!r}; expected one of: {', '.join(wrapped.adapters)}")
