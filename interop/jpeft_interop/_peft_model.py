"""PEFT's familiar face: a thin mutable shell around a frozen value and the pure functions that change it."""

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar, Literal, Unpack

import jax

import jpeft
from jpeft import PeftConfig, PeftParams, TaskType

from ._base_model import laid_out
from ._calling import compiled
from ._face import (
    Face,
    activated,
    check_combines,
    in_rows,
    in_use,
    is_convertible,
    merged_in,
    merged_tree,
    modules_to_save,
    rows_by_prompts,
    taken_out,
    trained,
    with_enabled,
    with_parameters,
    with_training,
    without,
)
from ._face_files import check_safe, loaded, save_face, write_card
from ._forwarding import Tuner, forwarded
from ._hub import HubOptions
from ._idle import warn_idle
from ._inject import injected
from ._inputs import prepared_call
from ._invocations import with_found_offsets, with_told
from ._prompt_inputs import weighing
from ._push import PushOptions, push_folder
from ._status import TunerLayerStatus, TunerModelStatus, layer_status, model_status
from ._task_classes import CLASSES, class_for, of_task


class PeftModel:
    """A model with adapters, as PyTorch's PEFT has it; usually made by `get_peft_model` or `from_pretrained`.

    The base model is never changed. Every method is a call of a pure function whose result is kept in `face`.
    `params` is what the model computes with, and may be set: a training loop is `model.params = step(model.params)`,
    with `model.apply`, a pure function of parameters and inputs, in its loss. The arguments are `get_peft_model`'s.

    >>> import jax.numpy as jnp, jpeft
    >>> base = (lambda params, x: x @ params["q"]["kernel"], {"q": {"kernel": jnp.ones((2, 3))}})
    >>> model = PeftModel(base, jpeft.LoraConfig(r=1, target_modules=["q"]))
    >>> model([[1.0, 1.0]]), model.active_adapter
    (Array([[2., 2., 2.]], dtype=float32), 'default')
    """

    task_type: ClassVar[TaskType | None] = None
    """Of the adapters that the class is for."""

    def __init_subclass__(cls) -> None:
        if cls.task_type is not None:
            CLASSES.setdefault(cls.task_type, cls)

    def __init__(
        self,
        model: Any,
        peft_config: PeftConfig,
        adapter_name: str = "default",
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        *,
        rng: jax.Array | None = None,
        layouts: Mapping[str, str] | None = None,
        mixed: bool = False,
    ):
        base = laid_out(model, layouts)
        config = of_task(peft_config, type(self).task_type)
        self._begin(Face(base, base.bare, mixed=mixed))
        self._inject(adapter_name, config, rng, autocast_adapter_dtype, low_cpu_mem_usage)

    def _begin(self, face: Face) -> None:
        self.face = face
        self.apply = jpeft.lift(face.base.apply)
        self._call = compiled(weighing(face.base.apply), partial(prepared_call, face.base))

    @classmethod
    def from_pretrained(
        cls,
        model: Any,
        model_id: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: Mapping[str, str] | None = None,
        *,
        ignore_mismatched_sizes: bool = False,
        torch_device: Any = None,
        layouts: Mapping[str, str] | None = None,
        **hub: Unpack[HubOptions],
    ) -> "PeftModel":
        """A model with a saved adapter, of the class that is for the adapter's task.

        model, layouts: as for `get_peft_model`. model_id: a folder, or a Hub id. config: in place of the file's.
        autocast_adapter_dtype: whether an adapter of 16 bits is read as float32. low_cpu_mem_usage: always so.
        ephemeral_gpu_offload, torch_device: of no effect, with a UserWarning. hub: revision, subfolder, token,
        cache_dir, local_files_only, force_download. The rest, and what is raised, is as for `load_pretrained`; further
        ValueError, if the class is for another task.
        """
        warn_idle(ephemeral_gpu_offload=ephemeral_gpu_offload or None, torch_device=torch_device)
        base = laid_out(model, layouts)
        wrapped = loaded(
            base.bare, base, model_id, adapter_name, is_trainable=is_trainable, config=config, key_mapping=key_mapping,
            autocast=autocast_adapter_dtype, ignore_mismatched_sizes=ignore_mismatched_sizes, hub=hub,
        )  # fmt: skip
        of_task(wrapped.adapters[adapter_name].config, cls.task_type)
        kind = class_for(wrapped.adapters[adapter_name].config)
        made = object.__new__(cls if kind is PeftModel else kind)
        made._begin(Face(base, wrapped))
        return made

    # ---- what it computes -------------------------------------------------------------------------------------------

    def __call__(
        self,
        *args: Any,
        adapter_names: Sequence[str] | None = None,
        alora_offsets: Any = None,
        task_ids: Any = None,
        **kwargs: Any,
    ) -> Any:
        """The model's outputs: one compiled program for a shape of the arrays and for a value of each switch.

        adapter_names: of each row of the batch, "__base__" for none, in place of the active adapters. alora_offsets:
        of each row, where activated adapters begin, counted from the end; of a language model its `input_ids` tell.
        task_ids: of each row, for methods that learn several tasks.
        """
        params = with_told(in_rows(self.face, adapter_names), alora_offsets=alora_offsets, task_ids=task_ids)
        if rows_by_prompts(self.face, adapter_names):
            kwargs["adapter_names"] = adapter_names
        return self._call(with_found_offsets(params, self.task_type, args, kwargs), *args, **kwargs)

    def generate(
        self,
        *args: Any,
        adapter_names: Sequence[str] | None = None,
        alora_offsets: Any = None,
        task_ids: Any = None,
        **kwargs: Any,
    ) -> Any:
        """`FlaxModel.generate` with the adapters; raises TypeError for a model that does not generate.

        adapter_names, alora_offsets, task_ids: as for a call of the model.
        """
        if self.face.base.generate is None:
            raise TypeError(f"{self.face.base.class_name} has no generate; expected a model of jpeft_interop.models")
        params = with_told(in_rows(self.face, adapter_names), alora_offsets=alora_offsets, task_ids=task_ids)
        if rows_by_prompts(self.face, adapter_names):
            kwargs["adapter_names"] = adapter_names
        return self.face.base.generate(params, *args, **kwargs)

    @property
    def params(self) -> PeftParams:
        """What the model computes with: no adapter is active in it while they are disabled, or merged."""
        return in_use(self.face)

    @params.setter
    def params(self, params: PeftParams) -> None:
        self.face = with_parameters(self.face, params)

    @property
    def layouts(self) -> Mapping[str, str]:
        return self.face.base.layouts

    @property
    def config(self) -> Mapping[str, Any]:
        """The base model's, as config.json has it."""
        return self.face.base.config

    def get_base_model(self) -> Any:
        """As it was given."""
        return self.face.base.given

    @property
    def base_model(self) -> Tuner:
        """`model.base_model.model` is the base model, as in PEFT."""
        return Tuner(self)

    def __getattr__(self, name: str) -> Any:
        if name in ("face", "apply", "_call"):  # there is no base model as yet
            raise AttributeError(name)
        return forwarded(self.face.base, type(self).__name__, name)

    # ---- adapters ---------------------------------------------------------------------------------------------------

    @property
    def peft_config(self) -> dict[str, PeftConfig]:
        return {name: adapter.config for name, adapter in self.face.wrapped.adapters.items()}

    @property
    def active_peft_config(self) -> PeftConfig:
        return self.peft_config[self.active_adapters[0]]

    @property
    def active_adapters(self) -> list[str]:
        """The adapters in use, whether or not they are disabled just now."""
        return list(self.face.wrapped.active)

    @property
    def active_adapter(self) -> str | list[str]:
        """The name of the one adapter in use, or a list of names."""
        names = self.active_adapters
        return names[0] if len(names) == 1 else names

    @property
    def has_active_enabled_adapter(self) -> bool:
        """Whether any adapter acts, or would if it were not merged."""
        return self.face.enabled and bool(self.face.wrapped.active)

    @property
    def peft_type(self) -> Any:
        """The method of the adapter in use."""
        return self.active_peft_config.peft_type

    @property
    def modules_to_save(self) -> set[str] | None:
        return modules_to_save(self.face)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether `jpeft.convert_to_lora` takes the adapter."""
        return is_convertible(self.face, adapter_name)

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: PeftConfig,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
        *,
        rng: jax.Array | None = None,
    ) -> None:
        """A new adapter, which waits for `set_adapter`. Raises ValueError for a taken name or another method."""
        check_combines(self.face, adapter_name, peft_config)
        config = of_task(peft_config, type(self).task_type)
        self._inject(adapter_name, config, rng, autocast_adapter_dtype, low_cpu_mem_usage)

    def load_adapter(
        self,
        model_id: str | os.PathLike[str],
        adapter_name: str,
        is_trainable: bool = False,
        torch_device: Any = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: Mapping[str, str] | None = None,
        *,
        config: PeftConfig | None = None,
        ignore_mismatched_sizes: bool = False,
        **hub: Unpack[HubOptions],
    ) -> None:
        """A saved adapter, which waits for `set_adapter`; the arguments are those of `from_pretrained`."""
        warn_idle(ephemeral_gpu_offload=ephemeral_gpu_offload or None, torch_device=torch_device)
        wrapped = loaded(
            self.face.wrapped, self.face.base, model_id, adapter_name, is_trainable=is_trainable, config=config,
            key_mapping=key_mapping, autocast=autocast_adapter_dtype, ignore_mismatched_sizes=ignore_mismatched_sizes,
            hub=hub,
        )  # fmt: skip
        check_combines(self.face, adapter_name, wrapped.adapters[adapter_name].config)
        self._keep(wrapped)

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[Any] | jax.Array,
        adapter_name: str,
        combination_type: str = "svd",
        svd_rank: int | None = None,
        svd_clamp: float | None = None,
        svd_full_matrices: bool = True,
        svd_driver: str | None = None,
        density: float | None = None,
        majority_sign_method: str = "total",
        *,
        rng: jax.Array | None = None,
    ) -> None:
        """A LoRA adapter made of others, which waits for `set_adapter`: `jpeft.add_weighted_adapter`."""
        warn_idle(svd_full_matrices=None if svd_full_matrices else False, svd_driver=svd_driver)
        wrapped = jpeft.add_weighted_adapter(
            self.face.wrapped, adapters, weights, adapter_name, combination_type, svd_rank, svd_clamp, density,
            majority_sign_method, rng,
        )  # fmt: skip
        self._keep(wrapped)

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Use one adapter, or several in the order given; they train, unless inference_mode."""
        self.face = activated(self.face, adapter_name, inference_mode)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Whether adapters train while they are active."""
        self._keep(with_training(self.face.wrapped, adapter_names, requires_grad))

    def delete_adapter(self, adapter_name: str) -> None:
        """If it was the only active one, the first of the others is in use then, with a UserWarning."""
        self.face = without(self.face, adapter_name)

    def enable_adapters(self) -> None:
        self.face = with_enabled(self.face, True)

    def disable_adapters(self) -> None:
        """Compute with the base model alone, until `enable_adapters`."""
        self.face = with_enabled(self.face, False)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """`with model.disable_adapter():` computes with the base model alone."""
        before = self.face.enabled
        self.disable_adapters()
        try:
            yield
        finally:
            self.face = with_enabled(self.face, before)

    enable_adapter_layers, disable_adapter_layers = enable_adapters, disable_adapters

    def _inject(self, name: str, config: PeftConfig, rng: jax.Array | None, autocast: bool, abstract: bool) -> None:
        base = self.face.base
        self._keep(injected(self.face.wrapped, base, config, name, rng=rng, autocast=autocast, abstract=abstract))

    def _keep(self, wrapped: PeftParams) -> None:
        self.face = dataclasses.replace(self.face, wrapped=wrapped)

    # ---- merging ----------------------------------------------------------------------------------------------------

    def merge_adapter(self, adapter_names: str | Sequence[str] | None = None, safe_merge: bool = False) -> None:
        """Compute with merged weights, in which the active adapters are (or those named), and nothing else acts."""
        self.face = merged_in(self.face, adapter_names, safe_merge)

    def unmerge_adapter(self) -> None:
        """Compute with the base and the adapters again: the very arrays of before."""
        self.face = taken_out(self.face)

    def merge_and_unload(self, *, safe_merge: bool = False, adapter_names: str | Sequence[str] | None = None) -> Any:
        """A model of the base's own kind, with the active adapters (or those named) in its weights."""
        return self.face.base.with_params(merged_tree(self.face, adapter_names, safe_merge))

    unload = get_base_model

    # ---- what it tells ----------------------------------------------------------------------------------------------

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """The numbers of trainable parameters and of all."""
        return jpeft.count_parameters(trained(self.face))

    def print_trainable_parameters(self) -> None:
        jpeft.print_trainable_parameters(trained(self.face))

    def get_layer_status(self) -> list[TunerLayerStatus]:
        return layer_status(self.face)

    def get_model_status(self) -> TunerModelStatus:
        return model_status(self.face)

    def __repr__(self) -> str:
        adapters = ", ".join(f"{name}: {type(config).__name__}" for name, config in self.peft_config.items())
        return f"{type(self).__name__}({self.face.base.class_name}, {{{adapters}}}, active={self.active_adapters})"

    # ---- files ------------------------------------------------------------------------------------------------------

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        safe_serialization: bool = True,
        selected_adapters: Sequence[str] | None = None,
        save_embedding_layers: bool | Literal["auto"] = "auto",
        is_main_process: bool = True,
        path_initial_model_for_weight_conversion: str | os.PathLike[str] | bool | None = None,
    ) -> None:
        """Write the adapters and the model card; the arguments are those of `jpeft_interop.save_pretrained`.

        safe_serialization=False, pickles, raises ValueError. is_main_process: False writes nothing; where JAX has
        several processes all of them take part, and which one writes is known.
        """
        check_safe(safe_serialization)
        if is_main_process or jax.process_count() > 1:
            save_face(
                self.face, save_directory, selected_adapters=selected_adapters,
                save_embedding_layers=save_embedding_layers, initial=path_initial_model_for_weight_conversion,
            )  # fmt: skip
            self.create_or_update_model_card(save_directory)

    def create_or_update_model_card(self, output_dir: str | os.PathLike[str]) -> None:
        """Make README.md, or bring up to date what the Hub reads in it: library, base model, tags."""
        write_card(self.face, output_dir, self.task_type)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        selected_adapters: Sequence[str] | None = None,
        save_embedding_layers: bool | Literal["auto"] = "auto",
        **hub: Unpack[PushOptions],
    ) -> Any:
        """Upload what `save_pretrained` writes to the Hub; returns what the Hub says of it (`CommitInfo`).

        hub: commit_message, private, token, revision, create_pr.
        """
        options: Any = {"selected_adapters": selected_adapters, "save_embedding_layers": save_embedding_layers}
        return push_folder(partial(self.save_pretrained, **options), repo_id, **hub)


CLASSES[None] = PeftModel
