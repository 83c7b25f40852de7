"""Adapters beside a model's parameters, with PEFT's ways of choosing where: default targets, heads, a state dict."""

import dataclasses
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

import jpeft
from jpeft import PeftParams, PeftType, TunerConfig
from jpeft._paths import leaves_by_path
from jpeft._sites import candidates
from jpeft._stacks import unstacked
from jpeft._targets import module_paths, saved_modules

from ._adaption_inputs import check_attention_of
from ._base_model import BaseModel, laid_out
from ._default_targets import with_default_targets
from ._family import FAMILIES
from ._keys import PREFIX
from ._listed import listed
from ._prefix_inputs import with_prefix_sizes
from ._prompt_sizes import with_initial_tokens, with_prompt_sizes
from ._resolve import with_heads
from ._shadow import with_shadow_of_model
from ._source_prompts import with_source_prompt
from ._stacked import unstacked_layouts
from ._xlora import with_read_experts


def inject_adapter_in_model(
    peft_config: jpeft.PeftConfig,
    model: Any,
    adapter_name: str = "default",
    *,
    state_dict: Mapping[str, Any] | None = None,
    low_cpu_mem_usage: bool = False,
    rng: jax.Array | None = None,
    layouts: Mapping[str, str] | None = None,
) -> PeftParams:
    """The model's parameters with a new adapter beside them, for `jpeft.lift(model.apply)`; the model is not changed.

    model: as for `get_peft_model`. state_dict: whose keys, PEFT's, say which modules are adapted, in place of
    target_modules; its values are not used. low_cpu_mem_usage: whether the adapter is abstract, shapes without values,
    which `set_peft_model_state_dict` gives it. rng, layouts: as for `jpeft.wrap`. Raises as `jpeft.wrap`, and
    ValueError for keys that belong to no module.

    >>> import jax.numpy as jnp, jpeft
    >>> model = (lambda params, x: x @ params["q"]["kernel"], {"q": {"kernel": jnp.ones((4, 6))}})
    >>> list(inject_adapter_in_model(jpeft.LoraConfig(target_modules=["q"]), model).adapters)
    ['default']
    """
    base = laid_out(model, layouts)
    if state_dict is not None:
        peft_config = _with_targets_of(peft_config, state_dict, base)
    return injected(base.bare, base, peft_config, adapter_name, rng=rng, abstract=low_cpu_mem_usage)


def injected(
    wrapped: PeftParams,
    base: BaseModel,
    config: jpeft.PeftConfig,
    adapter_name: str,
    *,
    rng: jax.Array | None = None,
    autocast: bool = True,
    abstract: bool = False,
) -> PeftParams:
    """`jpeft.wrap` with what PEFT fills in: default targets, the head of the task, the name of the base model.

    wrapped: perhaps with no adapter as yet. autocast: whether the adapter is float32, or of its base weights' dtype.
    abstract: whether it has shapes alone.
    """
    config = resolved(config, base, wrapped.base, base.layouts)
    if config.peft_type == PeftType.XLORA:
        found = with_read_experts(wrapped, base, config, adapter_name, rng)
        return autocast_adapter(found, adapter_name) if autocast else found
    options: dict[str, Any] = {} if autocast else {"dtype": _weight_dtype(wrapped.base, config, base.layouts)}

    def added(wrapped: PeftParams) -> PeftParams:
        params = wrapped if wrapped.adapters else wrapped.base
        return jpeft.wrap(params, config, rng=rng, adapter_name=adapter_name, layouts=base.layouts, **options)

    if not abstract:
        return added(wrapped)
    planned = added(jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), wrapped))
    adapters = {**wrapped.adapters, adapter_name: planned.adapters[adapter_name]}
    return dataclasses.replace(planned, base=wrapped.base, adapters=adapters)


def resolved(
    config: jpeft.PeftConfig, base: BaseModel, params: Any, layouts: Mapping[str, str] | None = None
) -> jpeft.PeftConfig:
    """The config with default targets, the head of its task and the name of the base model."""
    check_attention_of(config, base)
    config = with_shadow_of_model(config, base)
    config = with_source_prompt(config)
    config = with_initial_tokens(with_prompt_sizes(with_prefix_sizes(config, base), base))
    config = with_heads(with_default_targets(config, base.model_type), _modules(params, layouts or {}))
    if base.name_or_path is None or config.base_model_name_or_path == base.name_or_path:
        return config
    if config.base_model_name_or_path is not None:
        warnings.warn(
            f"base_model_name_or_path of the config is {config.base_model_name_or_path!r}, and the model's name is "
            f"{base.name_or_path!r}, which is written from now on",
            stacklevel=5,
        )
    return dataclasses.replace(config, base_model_name_or_path=base.name_or_path)


def autocast_adapter(wrapped: PeftParams, adapter_name: str) -> PeftParams:
    """The same parameters with the adapter's arrays of 16 bits or fewer in float32, as training asks for."""
    adapter = wrapped.adapters[adapter_name]
    weights, shared = jax.tree.map(_widened, (adapter.weights, adapter.shared))
    adapter = dataclasses.replace(adapter, weights=weights, shared=shared)
    return dataclasses.replace(wrapped, adapters={**wrapped.adapters, adapter_name: adapter})


def _widened(array: Any) -> Any:
    if not jnp.issubdtype(array.dtype, jnp.floating) or jnp.finfo(array.dtype).bits > 16:
        return array
    return jax.ShapeDtypeStruct(array.shape, jnp.float32) if _is_abstract(array) else array.astype(jnp.float32)


def _is_abstract(array: Any) -> bool:
    return isinstance(array, jax.ShapeDtypeStruct)


def _weight_dtype(params: Any, config: jpeft.PeftConfig, layouts: Mapping[str, str]) -> Any:
    shapes = jax.eval_shape(lambda params: params, params)
    adapter = jpeft.wrap(shapes, config, layouts=layouts).adapters["default"]
    dtypes = sorted({site.dtype for site in adapter.sites.values()} or _dtypes_around(shapes, adapter.weights))
    if len(dtypes) > 1:
        raise ValueError(
            f"autocast_adapter_dtype=False gives adapters the dtype of their weights, which are {listed(dtypes)}; "
            "expected weights of one dtype, or autocast_adapter_dtype=True"
        )
    return jnp.dtype(dtypes[0])


def _dtypes_around(params: Any, modules: Iterable[str]) -> set[str]:
    """The floating-point dtypes of the leaves of some modules, or of all leaves if no module is given."""
    within = tuple(f"{path}." for path in modules)
    own = [leaf for path, leaf in unstacked(leaves_by_path(params)).items() if not within or path.startswith(within)]
    return {str(leaf.dtype) for leaf in own if jnp.issubdtype(leaf.dtype, jnp.floating)} or {"float32"}


def _modules(params: Any, layouts: Mapping[str, str]) -> list[str]:
    leaves = leaves_by_path(params)
    layouts = unstacked_layouts({**FAMILIES["hf"].layouts, **layouts}, leaves)
    layers = unstacked(leaves)
    return module_paths(layers, candidates(layers, layouts))


def _with_targets_of(config: jpeft.PeftConfig, keys: Iterable[str], base: BaseModel) -> jpeft.PeftConfig:
    if not isinstance(config, TunerConfig):
        raise TypeError(f"state_dict names modules, which a {type(config).__name__} has none of; expected none")
    if getattr(config, "target_parameters", None):
        raise ValueError("state_dict cannot stand for target_parameters; expected one of them")
    modules, found, strange = _modules(base.params, base.layouts), dict[str, str](), list[str]()
    for key in keys:
        # The longest path: a key continues with the names of the method's arrays.
        path = max((m for m in modules if key.removeprefix(PREFIX).startswith(f"{m}.")), key=len, default=None)
        if path is None:
            strange.append(key)
        else:
            found.setdefault(path, key)
    if strange or not found:
        raise ValueError(
            f"state_dict has keys that belong to no module of the model: {listed(strange) or 'none at all'}"
        )
    resolved = with_heads(config, modules)
    saved = saved_modules(found, resolved) if isinstance(resolved, TunerConfig) else []
    # Layers were chosen when the file was written.
    none: dict[str, Any] = {"layers_to_transform": None, "layers_pattern": None, "exclude_modules": None}
    return dataclasses.replace(config, target_modules=tuple(path for path in found if path not in saved), **none)
