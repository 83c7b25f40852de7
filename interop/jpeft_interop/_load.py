"""Files to adapters: `load_pretrained`, `load_adapter`, `load_config`."""

import dataclasses
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jpeft
from jpeft import PeftParams, PromptLearningConfig
from jpeft._arrow import with_routes
from jpeft._contract import method_of
from jpeft._params import Adapter, is_peft_params
from jpeft._paths import leaves_by_path
from jpeft._sites import candidates
from jpeft._stacks import unstacked
from jpeft._targets import module_paths
from jpeft._wrap import completed

from ._config_json import SECOND_NAMES, read_config
from ._extra_file import kept_arrays, with_encoder, with_kept
from ._family import Family, family_of
from ._files import read_tensors
from ._fit import Fitted, fit
from ._hub import adapter_folder
from ._keys import PREFIX
from ._listed import listed
from ._mismatched import without_mismatched
from ._pair import find_config, find_pair
from ._processes import placed
from ._resolve import check_replicated, with_heads
from ._segments import check_segments, has_segments, joined
from ._shadow import with_shadow_of_file
from ._single_experts import with_stacked_experts
from ._stacked import restacked_adapter, unstacked_adapter, unstacked_layouts
from ._topk import lengthened
from ._xlora_files import read_router


def load_config(name_or_path: str | os.PathLike[str]) -> jpeft.PeftConfig:
    """The config of a saved adapter.

    name_or_path: a folder, or a Hub id. Raises FileNotFoundError if there is none, and ValueError for a method or
    settings that are not implemented.

    >>> import tempfile, pathlib
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     _ = pathlib.Path(directory, "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4}')
    ...     load_config(directory).r
    4
    """
    return read_config(find_config(adapter_folder(name_or_path, weights=False)))


def load_pretrained(
    params: Any,
    name_or_path: str | os.PathLike[str],
    *,
    adapter_name: str = "default",
    is_trainable: bool = False,
    family: str = "hf",
    layouts: Mapping[str, str] | None = None,
    config: jpeft.PeftConfig | None = None,
    key_mapping: Mapping[str, str] | None = None,
    ignore_mismatched_sizes: bool = False,
) -> PeftParams:
    """Parameters with a saved adapter beside them, which PyTorch PEFT or `save_pretrained` wrote.

    params: the base model's tree, kept by reference. name_or_path: a folder, or a Hub id. is_trainable: whether the
    adapter trains further; without it nothing does. family: how the tree's names lead to those of the PyTorch model.
    layouts: as for `jpeft.wrap`. config: to be taken instead of the file's. key_mapping: {regular expression:
    replacement}, applied to the file's keys, which are paths of modules then, without `base_model.model.`.
    ignore_mismatched_sizes: whether tensors of another shape than the model asks for are left out, with a UserWarning
    that lists them; what they were for begins as `jpeft.wrap` makes it.
    Stacks of layers, named by the slice of their numbers, are filled from the file's single layers, which have to be
    alike. The experts of an X-LoRA adapter are those in its folder, or else where its config says that they were;
    where `config` says, if it is given.
    The arrays keep the file's dtypes, and go onto the mesh that the base is on, if it is, as `jpeft.shardings` says.
    Embeddings that the file holds in full, as they were resized or are another model's, become part of the adapter.
    Raises FileNotFoundError if a file is absent; ValueError if one is damaged, pickled, asks for what is not
    implemented, or does not fit the parameters: all missing, unexpected and misshapen tensors in one message.

    >>> import tempfile, jax.numpy as jnp, jpeft
    >>> from jpeft_interop import save_pretrained
    >>> params = {"query": {"kernel": jnp.ones((4, 6))}}
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     save_pretrained(jpeft.wrap(params, jpeft.LoraConfig(r=2, target_modules=["query"])), directory)
    ...     wrapped = load_pretrained(params, directory)
    >>> wrapped.adapters["default"].weights["query"]["lora_A"].shape
    (2, 4)
    """
    if is_peft_params(params):
        raise TypeError("params has adapters already; expected the base tree, or load_adapter to add another adapter")
    wrapped = PeftParams(base=params, adapters={}, active=())
    return _load(
        wrapped, name_or_path, adapter_name, is_trainable, family_of(family), layouts or {}, config, key_mapping,
        ignore_mismatched_sizes,
    )  # fmt: skip


def load_adapter(
    wrapped: PeftParams,
    name_or_path: str | os.PathLike[str],
    adapter_name: str,
    *,
    is_trainable: bool = False,
    family: str = "hf",
    layouts: Mapping[str, str] | None = None,
    config: jpeft.PeftConfig | None = None,
    key_mapping: Mapping[str, str] | None = None,
    ignore_mismatched_sizes: bool = False,
) -> PeftParams:
    """The same parameters with one more saved adapter, which waits for `jpeft.set_adapter`.

    Arguments and errors are those of `load_pretrained`; further, it raises TypeError if `wrapped` does not come from
    `jpeft.wrap`, and ValueError if the name is taken.

    >>> import tempfile, jax.numpy as jnp, jpeft
    >>> from jpeft_interop import save_pretrained
    >>> params = {"query": {"kernel": jnp.ones((4, 6))}}
    >>> wrapped = jpeft.wrap(params, jpeft.LoraConfig(r=2, target_modules=["query"]))
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     save_pretrained(wrapped, directory)
    ...     list(load_adapter(wrapped, directory, "other").adapters)
    ['default', 'other']
    """
    if not is_peft_params(wrapped):
        raise TypeError(f"expected the PeftParams that jpeft.wrap returns, not a {type(wrapped).__name__}")
    return _load(
        wrapped, name_or_path, adapter_name, is_trainable, family_of(family), layouts or {}, config, key_mapping,
        ignore_mismatched_sizes,
    )  # fmt: skip


def _load(
    wrapped: PeftParams,
    name_or_path: str | os.PathLike[str],
    adapter_name: str,
    is_trainable: bool,
    family: Family,
    layouts: Mapping[str, str],
    config: jpeft.PeftConfig | None,
    key_mapping: Mapping[str, str] | None,
    ignore_mismatched_sizes: bool,
) -> PeftParams:
    if adapter_name in wrapped.adapters:
        raise ValueError(
            f"there already is an adapter {adapter_name!r}; expected a name other than: {', '.join(wrapped.adapters)}"
        )
    files, told = find_pair(adapter_folder(name_or_path)), config is not None
    leaves = leaves_by_path(wrapped.base)
    layouts = unstacked_layouts({**family.layouts, **layouts}, leaves)
    layers = unstacked(leaves)
    paths = module_paths(layers, candidates(layers, layouts))
    config = with_heads(read_config(files.config) if config is None else config, paths)
    check_replicated(config, paths)
    config = dataclasses.replace(config, inference_mode=not is_trainable)
    arrow = getattr(config, "arrow_config", None)
    if arrow is not None:
        # What its file holds is plain LoRA; the router itself is made of the adapters that are there.
        config = dataclasses.replace(config, arrow_config=None)  # pyright: ignore[reportCallIssue]
    tensors = narrowed(files.weights, with_mapped_keys(read_tensors(files.weights), key_mapping or {}))
    if config.peft_type == jpeft.PeftType.XLORA:

        def expert(params: PeftParams, folder: Path | str, name: str) -> PeftParams:
            return _load(params, folder, name, is_trainable, family, layouts, None, None, False)

        return placed(read_router(wrapped, files, config, adapter_name, told, tensors, expert), adapter_name)
    config = with_shadow_of_file(config, tensors)
    config, tensors = with_stacked_experts(files.weights, config, tensors, layers, paths)
    abstract = dataclasses.replace(wrapped, base=jax.tree.map(_abstract, wrapped.base))
    try:
        planned = jpeft.wrap(abstract, _as_in_files(config), adapter_name=adapter_name, layouts=layouts)
    except ValueError as error:
        raise ValueError(f"{files.config} does not fit the parameters: {error}") from error
    if ignore_mismatched_sizes:
        tensors = without_mismatched(
            files.weights,
            tensors,
            unstacked_adapter(planned.adapters[adapter_name]),
            lambda: jpeft.wrap(wrapped, config, adapter_name=adapter_name, layouts=layouts).adapters[adapter_name],
            layers,
            family,
            layouts,
        )
    adapter = adapter_from(files.weights, tensors, planned.adapters[adapter_name], leaves, family, layouts)
    if arrow is not None:
        adapter = with_routes(wrapped, adapter, arrow)
    if isinstance(config, PromptLearningConfig) and is_trainable:
        adapter = _trained_on(adapter, abstract, files.weights, layouts)
    found = dataclasses.replace(planned, base=wrapped.base, adapters={**wrapped.adapters, adapter_name: adapter})
    return placed(found, adapter_name)


def _as_in_files(config: jpeft.PeftConfig) -> jpeft.PeftConfig:
    """The config for which an adapter has the arrays that files hold: a prompt, not the encoder that it is made of."""
    return dataclasses.replace(config, inference_mode=True) if isinstance(config, PromptLearningConfig) else config


def _trained_on(adapter: Adapter, abstract: PeftParams, weights: Path, layouts: Mapping[str, str]) -> Adapter:
    """A prompt read from its files, to train further."""
    config = dataclasses.replace(adapter.config, inference_mode=False)
    adapter = dataclasses.replace(adapter, config=config)
    if method_of(config).folded is None:
        return adapter
    planned = jpeft.wrap(abstract.base, config, layouts=layouts).adapters["default"]
    return with_encoder(adapter, planned, weights)


def adapter_from(
    path: Path,
    tensors: Mapping[str, np.ndarray],
    planned: Adapter,
    leaves: Mapping[str, Any],
    family: Family,
    layouts: Mapping[str, str],
) -> Adapter:
    """The adapter that was planned, filled with the tensors of a file.

    path: the file's, for messages. leaves: of the base tree. layouts: with those of single layers. Raises ValueError
    if the tensors do not fit.
    """
    given, tensors = tensors, joined(path, lengthened(path, tensors, planned.config), planned.config)
    layers, single = unstacked(leaves), unstacked_adapter(planned)
    filled = _filled(single, fit(path, tensors, single, layers, family, layouts), tensors)
    if path.is_file():
        filled = with_kept(filled, single, path, family)
    adapter = completed(restacked_adapter(path, filled, planned, layers), planned, leaves)
    if has_segments(adapter.config):
        check_segments(path, given, kept_arrays(unstacked_adapter(adapter), family), adapter.config)
    return adapter


def with_mapped_keys(tensors: Mapping[str, np.ndarray], mapping: Mapping[str, str]) -> dict[str, np.ndarray]:
    """The tensors under the keys that the first matching regular expression of the mapping makes of theirs.

    Raises ValueError if two tensors get the same key.
    """
    if not mapping:
        return dict(tensors)
    found: dict[str, np.ndarray] = {}
    for key, tensor in tensors.items():
        renamed = key.removeprefix(PREFIX)
        for pattern, replacement in mapping.items():
            renamed, count = re.subn(pattern, replacement, renamed)
            if count:
                break
        renamed = key[: len(key) - len(key.removeprefix(PREFIX))] + renamed
        if renamed in found:
            raise ValueError(f"key_mapping makes {renamed!r} of several keys, of {key!r} for one; expected one each")
        found[renamed] = tensor
    return found


def _abstract(leaf: Any) -> Any:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if hasattr(leaf, "shape") and hasattr(leaf, "dtype") else leaf


def narrowed(path: Path, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors of the file at `path`, with integers that JAX would narrow in the narrower type.

    Raises ValueError for floating-point tensors that JAX would narrow, and for integers that do not fit.
    """
    found, refused = dict(tensors), []
    for key, tensor in tensors.items():
        dtype = jax.dtypes.canonicalize_dtype(tensor.dtype)
        if dtype == tensor.dtype:
            continue
        if np.issubdtype(dtype, np.integer) and np.array_equal(tensor.astype(dtype), tensor):
            found[key] = tensor.astype(dtype)
        else:
            refused.append(f"{key} {tensor.dtype}")
    if refused:
        raise ValueError(
            f"{path}: JAX would narrow {listed(refused)}; expected float32 or narrower, or JAX with jax_enable_x64"
        )
    return found


def _filled(planned: Adapter, fitted: Fitted, tensors: Mapping[str, np.ndarray]) -> Adapter:
    """The adapter that was planned, with the file's arrays in the places of its abstract ones."""
    weights: dict[str, dict[str, Any]] = {path: {} for path in planned.weights}
    shared: dict[str, Any] = {}
    replaced: dict[str, Any] = {}
    rows: dict[str, Any] = {}
    for key, slot in fitted.slots.items():
        array = slot.turned(tensors[key])
        if slot.group == "weights":
            weights[slot.path][slot.name] = array
        elif slot.group == "shared":
            if not np.array_equal(shared.setdefault(slot.name, array), array, equal_nan=True):
                raise ValueError(f"{key} differs from its copies in other modules; expected one array that they share")
        elif slot.group == "rows":
            rows[slot.path] = dataclasses.replace(planned.rows[slot.path], values=array)
        else:
            replaced[slot.path] = array
    method, config = method_of(planned.config), planned.config
    if fitted.second_names:
        config = dataclasses.replace(config, extra={**config.extra, SECOND_NAMES: fitted.second_names})
    scaling = {
        path: jnp.full(site.stack, method.scaling(site, config), jnp.float32) for path, site in planned.sites.items()
    }
    return dataclasses.replace(
        planned, weights=weights, shared=shared, replaced=replaced, rows=rows, scaling=scaling, config=config
    )
