"""PEFT's familiar face: a thin mutable shell around a frozen value and the pure functions that change it."""

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Literal

import jax

import jpeft
from jpeft import PeftConfig, PeftParams, TaskType

from ._base_model import BaseModel, base_model
from ._calling import compiled
from ._face import (
    Face,
    activated,
    check_combines,
    in_rows,
    in_use,
    merged_in,
    merged_tree,
    taken_out,
    trained,
    with_enabled,
    with_parameters,
    with_training,
    without,
)
from ._face_files import loaded, save_face, write_card
from ._inject import injected
from ._push import push_folder
from ._status import TunerLayerStatus, TunerModelStatus, layer_status, model_status

_CLASSES: dict[TaskType, type["PeftModel"]] = {}


def class_for(config: PeftConfig) -> type["PeftModel"]:
    """The class for the config's task."""
    return _CLASSES[config.task_type] if isinstance(config.task_type, TaskType) else PeftModel


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
            _CLASSES.setdefault(cls.task_type, cls)

    def __init__(
        self,
        model: Any,
        peft_config: PeftConfig,
        adapter_name: str = "default",
        autocast_adapter_dtype: bool = True,
        *,
        rng: jax.Array | None = None,
        layouts: Mapping[str, str] | None = None,
        mixed: bool = False,
    ):
        base = _base(model, layouts)
        config = _of_task(peft_config, type(self).task_type)
        wrapped = injected(_bare(base), base, config, adapter_name, rng=rng, autocast=autocast_adapter_dtype)
        self._begin(Face(base, wrapped, mixed=mixed))

    def _begin(self, face: Face) -> None:
        self.face = face
        self.apply = jpeft.lift(face.base.apply)
        self._call = compiled(face.base.apply)

    @classmethod
    def from_pretrained(
        cls,
        model: Any,
        model_id: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        autocast_adapter_dtype: bool = True,
        *,
        revision: str | None = None,
        subfolder: str | None = None,
        key_mapping: Mapping[str, str] | None = None,
        layouts: Mapping[str, str] | None = None,
    ) -> "PeftModel":
        """A model with a saved adapter, of the class that is for the adapter's task.

        model, layouts: as for `get_peft_model`. model_id: a folder, or a Hub id, of that revision and subfolder.
        config: in place of the file's. autocast_adapter_dtype: whether an adapter of 16 bits is read as float32.
        The rest, and what is raised, is as for `load_pretrained`; further ValueError, if the class is for another task.
        """
        base = _base(model, layouts)
        wrapped = loaded(
            _bare(base), base, model_id, adapter_name, is_trainable=is_trainable, config=config,
            autocast=autocast_adapter_dtype, revision=revision, subfolder=subfolder, key_mapping=key_mapping,
        )  # fmt: skip
        found = wrapped.adapters[adapter_name].config
        _of_task(found, cls.task_type)
        made = object.__new__(class_for(found) if found.task_type else cls)
        made._begin(Face(base, wrapped))
        return made

    # ---- what it computes -------------------------------------------------------------------------------------------

    def __call__(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """The model's outputs: one compiled program for a shape of the arrays and for a value of each switch.

        adapter_names: of each row of the batch, "__base__" for none, in place of the active adapters.
        """
        return self._call(in_rows(self.face, adapter_names), *args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """`FlaxModel.generate` with the adapters; raises TypeError for a model that does not generate."""
        if self.face.base.generate is None:
            raise TypeError(f"{self.face.base.class_name} has no generate; expected a model of jpeft_interop.models")
        return self.face.base.generate(self.params, *args, **kwargs)

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
        return self.face.base.given

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
    def modules_to_save(self) -> set[str] | None:
        return {
            name for config in self.peft_config.values() for name in getattr(config, "modules_to_save", None) or ()
        } or None

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: PeftConfig,
        autocast_adapter_dtype: bool = True,
        *,
        rng: jax.Array | None = None,
    ) -> None:
        """A new adapter, which waits for `set_adapter`. Raises ValueError for a taken name or another method."""
        check_combines(self.face, adapter_name, peft_config)
        config = _of_task(peft_config, type(self).task_type)
        self._keep(
            injected(self.face.wrapped, self.face.base, config, adapter_name, rng=rng, autocast=autocast_adapter_dtype)
        )

    def load_adapter(
        self,
        model_id: str | os.PathLike[str],
        adapter_name: str,
        is_trainable: bool = False,
        autocast_adapter_dtype: bool = True,
        *,
        config: PeftConfig | None = None,
        revision: str | None = None,
        subfolder: str | None = None,
        key_mapping: Mapping[str, str] | None = None,
    ) -> None:
        """A saved adapter, which waits for `set_adapter`; the arguments are those of `from_pretrained`."""
        wrapped = loaded(
            self.face.wrapped, self.face.base, model_id, adapter_name, is_trainable=is_trainable, config=config,
            autocast=autocast_adapter_dtype, revision=revision, subfolder=subfolder, key_mapping=key_mapping,
        )  # fmt: skip
        check_combines(self.face, adapter_name, wrapped.adapters[adapter_name].config)
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
        self.face = with_enabled(self.face, False)
        try:
            yield
        finally:
            self.face = with_enabled(self.face, before)

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

    def unload(self) -> Any:
        """The base model, as it was given."""
        return self.face.base.given

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
        *,
        selected_adapters: Sequence[str] | None = None,
        save_embedding_layers: bool | Literal["auto"] = "auto",
        path_initial_model_for_weight_conversion: str | os.PathLike[str] | bool | None = None,
    ) -> None:
        """Write the adapters and the model card; the arguments are those of `jpeft_interop.save_pretrained`."""
        save_face(
            self.face,
            save_directory,
            selected_adapters=selected_adapters,
            save_embedding_layers=save_embedding_layers,
            initial=path_initial_model_for_weight_conversion,
        )
        self.create_or_update_model_card(save_directory)

    def create_or_update_model_card(self, output_dir: str | os.PathLike[str]) -> None:
        """Make README.md, or bring up to date what the Hub reads in it: library, base model, tags."""
        causal = type(self).task_type == TaskType.CAUSAL_LM
        write_card(self.face, output_dir, pipeline_tag="text-generation" if causal else None)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        selected_adapters: Sequence[str] | None = None,
        save_embedding_layers: bool | Literal["auto"] = "auto",
    ) -> Any:
        """Upload what `save_pretrained` writes to the Hub; returns what the Hub says of it (`CommitInfo`)."""

        def write(folder: str) -> None:
            self.save_pretrained(
                folder, selected_adapters=selected_adapters, save_embedding_layers=save_embedding_layers
            )

        return push_folder(
            write, repo_id, commit_message=commit_message, private=private, token=token, revision=revision,
            create_pr=create_pr,
        )  # fmt: skip


def _base(model: Any, layouts: Mapping[str, str] | None) -> BaseModel:
    if isinstance(model, PeftModel):
        raise TypeError(
            "the model is a PeftModel already; expected a base model (model.unload() gives it), or model.add_adapter"
        )
    base = base_model(model)
    return dataclasses.replace(base, layouts={**base.layouts, **(layouts or {})})


def _bare(base: BaseModel) -> PeftParams:
    return PeftParams(base=base.params, adapters={}, active=())


def _of_task(config: PeftConfig, task: TaskType | None) -> PeftConfig:
    """The config with the task of a class; raises ValueError if it has another one."""
    if task is None or config.task_type == task:
        return config
    if config.task_type is not None:
        raise ValueError(
            f"task_type of the config is {str(config.task_type)!r}, and the class is for {str(task)!r}; expected "
            f"{class_for(config).__name__}, or another config"
        )
    return dataclasses.replace(config, task_type=task)
