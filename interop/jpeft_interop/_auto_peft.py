"""From the folder of an adapter to its base model with the adapter: `AutoPeftModelFor...` and `PeftConfig`."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jpeft
from jpeft import TaskType

from ._face_files import config_of
from ._peft_model import PeftModel
from ._task_classes import class_for
from ._tokenizer import tokenizer_size

_TASKS = {
    "FlaxAutoModelForCausalLM": TaskType.CAUSAL_LM,
    "FlaxAutoModelForSeq2SeqLM": TaskType.SEQ_2_SEQ_LM,
    "FlaxAutoModelForSequenceClassification": TaskType.SEQ_CLS,
    "FlaxAutoModelForTokenClassification": TaskType.TOKEN_CLS,
    "FlaxAutoModelForQuestionAnswering": TaskType.QUESTION_ANS,
    "FlaxAutoModel": TaskType.FEATURE_EXTRACTION,
}
"""What makes the base model, and the task that it is for."""


@dataclass(frozen=True)
class AutoPeft:
    """The models with adapters of one task, or of none in particular; `from_pretrained` makes a `PeftModel`."""

    auto_model: str | None

    def from_pretrained(
        self,
        name_or_path: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: jpeft.PeftConfig | None = None,
        *,
        revision: str | None = None,
        subfolder: str | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        torch_device: Any = None,
        key_mapping: Mapping[str, str] | None = None,
        ignore_mismatched_sizes: bool = False,
        **base: Any,
    ) -> PeftModel:
        """A saved adapter on the base model that its config names.

        name_or_path: of the adapter, and revision and subfolder too; those of the base model are in its config. Without
        a task, the config says of which class the base is, and may not have a task either. base: as for
        `FlaxAutoModel.from_pretrained`: dtype, param_dtype, mesh, sharding_rules, scan_layers, remat, num_labels, ...
        If a tokenizer with more tokens than the base model has was saved with the adapter, the base is resized for it:
        `resize_token_embeddings`. ignore_mismatched_sizes: of the base's tensors and of the adapter's.
        The rest is as for `PeftModel.from_pretrained`. Raises ValueError if the config names no base model or another
        task, and what loading them raises.
        """
        config = config_of(name_or_path, revision=revision, subfolder=subfolder) if config is None else config
        if config.base_model_name_or_path is None:
            raise ValueError(
                f"base_model_name_or_path in the adapter_config.json of {os.fspath(name_or_path)!r} is null; load the "
                "base model yourself, and the adapter with PeftModel.from_pretrained(model, ...)"
            )
        from . import models

        auto = getattr(models, self._checked(config))
        options = {"revision": config.revision, "ignore_mismatched_sizes": ignore_mismatched_sizes, **base}
        model = auto.from_pretrained(config.base_model_name_or_path, **options)
        size = tokenizer_size(name_or_path, revision=revision, subfolder=subfolder)
        if size is not None and size > getattr(model.config, "vocab_size", size):
            model = models.resize_token_embeddings(model, size)
        kind = PeftModel if self.auto_model is None else class_for(jpeft.PeftConfig(task_type=_TASKS[self.auto_model]))
        return kind.from_pretrained(
            model,
            name_or_path,
            adapter_name,
            is_trainable,
            config,
            autocast_adapter_dtype,
            ephemeral_gpu_offload,
            low_cpu_mem_usage,
            key_mapping,
            ignore_mismatched_sizes=ignore_mismatched_sizes,
            torch_device=torch_device,
            revision=revision,
            subfolder=subfolder,
        )

    def _checked(self, config: jpeft.PeftConfig) -> str:
        """The name of what makes the base model; raises ValueError if the adapter is of another task."""
        fitting = {task: f"AutoPeftModel{name.removeprefix('FlaxAutoModel')}" for name, task in _TASKS.items()}
        fitting[TaskType.FEATURE_EXTRACTION] = "AutoPeftModelForFeatureExtraction"
        if config.task_type is not None:
            if self.auto_model is None or _TASKS[self.auto_model] != config.task_type:
                raise ValueError(
                    f"the adapter's task_type is {str(config.task_type)!r}; expected "
                    f"{fitting[TaskType(config.task_type)]}.from_pretrained"
                )
            return self.auto_model
        mapping = config.auto_mapping or {}
        named = _auto_model_of(mapping.get("base_model_class"))
        if self.auto_model is None and named is None:
            raise ValueError(
                f"the adapter's config has neither a task_type nor a base_model_class that is known here (auto_mapping "
                f"is {dict(mapping) or None}); expected one of: {', '.join(fitting.values())}"
            )
        if self.auto_model is not None and named not in (None, self.auto_model):
            raise ValueError(
                f"the adapter is of a {mapping['base_model_class']}; expected AutoPeftModel.from_pretrained"
            )
        return self.auto_model or str(named)


def _auto_model_of(class_name: str | None) -> str | None:
    """The name of the `FlaxAutoModel...` that makes models of a class of `transformers`."""
    from . import models

    tasks = {name: getattr(models, name).task for name in dir(models) if name.startswith("FlaxAutoModel")}
    for family in models.FAMILIES.values():
        for task, architecture in family.architectures.items():
            if architecture.name == class_name:
                return next((name for name, own in tasks.items() if own == task), None)
    return None


AutoPeftModel = AutoPeft(None)
"""The base model is of the class that the adapter's config names (`auto_mapping`)."""

AutoPeftModelForCausalLM = AutoPeft("FlaxAutoModelForCausalLM")
"""`logits (batch, length, vocab)` of the next token."""

AutoPeftModelForSeq2SeqLM = AutoPeft("FlaxAutoModelForSeq2SeqLM")
"""`logits (batch, length, vocab)` of the decoder's next token."""

AutoPeftModelForSequenceClassification = AutoPeft("FlaxAutoModelForSequenceClassification")
"""`logits (batch, num_labels)` of a sequence."""

AutoPeftModelForTokenClassification = AutoPeft("FlaxAutoModelForTokenClassification")
"""`logits (batch, length, num_labels)` of every token."""

AutoPeftModelForQuestionAnswering = AutoPeft("FlaxAutoModelForQuestionAnswering")
"""`start_logits` and `end_logits (batch, length)` of the first and last token of an answer."""

AutoPeftModelForFeatureExtraction = AutoPeft("FlaxAutoModel")
"""`last_hidden_state`."""


class PeftConfig(jpeft.PeftConfig):
    """`jpeft.PeftConfig`, which knows no files, with PEFT's way to read one."""

    @staticmethod
    def from_pretrained(
        name_or_path: str | os.PathLike[str], *, revision: str | None = None, subfolder: str | None = None
    ) -> jpeft.PeftConfig:
        """The config of a saved adapter, of its method's class, such as `jpeft.LoraConfig`; see `load_config`.

        >>> import tempfile, pathlib
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     _ = pathlib.Path(directory, "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4}')
        ...     PeftConfig.from_pretrained(directory).r
        4
        """
        return config_of(name_or_path, revision=revision, subfolder=subfolder)
