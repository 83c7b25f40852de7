"""The classes of `PeftModel`, by task, and `get_peft_model`, which chooses among them."""

import dataclasses
import warnings
from collections.abc import Mapping
from typing import Any

import jax

from jpeft import PeftConfig, TaskType

from ._peft_model import PeftModel
from ._task_classes import class_for


class PeftModelForCausalLM(PeftModel):
    """A language model with adapters: `model.generate(...)`, and `logits` of the next token."""

    task_type = TaskType.CAUSAL_LM


class PeftModelForSeq2SeqLM(PeftModel):
    """An encoder and decoder with adapters: `model.generate(...)`, and `logits` of the decoder's next token."""

    task_type = TaskType.SEQ_2_SEQ_LM


class PeftModelForSequenceClassification(PeftModel):
    """A classifier of sequences with adapters; its head trains in full."""

    task_type = TaskType.SEQ_CLS


class PeftModelForTokenClassification(PeftModel):
    """A classifier of tokens with adapters; its head trains in full."""

    task_type = TaskType.TOKEN_CLS


class PeftModelForQuestionAnswering(PeftModel):
    """A finder of answers with adapters; its head trains in full."""

    task_type = TaskType.QUESTION_ANS


class PeftModelForFeatureExtraction(PeftModel):
    """A bare network with adapters: `last_hidden_state`."""

    task_type = TaskType.FEATURE_EXTRACTION


def get_peft_model(
    model: Any,
    peft_config: PeftConfig,
    adapter_name: str = "default",
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
    *,
    rng: jax.Array | None = None,
    layouts: Mapping[str, str] | None = None,
) -> PeftModel:
    """A model with a new adapter, of the class that is for the config's `task_type`.

    model: of `jpeft_interop.models`, a Flax NNX module, a bound linen module, or a pair (linen module, variables) or
    (apply function, params); it stays as it is. peft_config: where it names no target modules, the defaults of PEFT for
    the type of model are taken; the head of its task trains in full. It stays as it is, too: the model has its own, in
    `peft_config`. mixed: whether adapters of other methods may be added. autocast_adapter_dtype: whether the adapter is
    float32, or else of the dtype of the weights that it is for. revision: of the base model, for the config.
    low_cpu_mem_usage: whether the adapter has shapes alone, until `set_peft_model_state_dict` gives it values. rng: key
    of the initial values. layouts: as for `jpeft.wrap`.
    Raises TypeError for a model of another kind, and as `jpeft.wrap`; warns (UserWarning) if the config names another
    base model or revision.

    >>> import jpeft
    >>> from jpeft_interop.models import FlaxAutoModelForCausalLM
    >>> sizes = dict(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    >>> base = FlaxAutoModelForCausalLM.from_config({"model_type": "llama", **sizes})
    >>> get_peft_model(base, jpeft.LoraConfig(task_type="CAUSAL_LM", r=2)).print_trainable_parameters()
    trainable params: 64 || all params: 680 || trainable%: 9.4118
    """
    config = _with_revision(peft_config, revision)
    kind = PeftModel if mixed else class_for(config)
    return kind(
        model,
        config,
        adapter_name,
        autocast_adapter_dtype,
        low_cpu_mem_usage,
        rng=rng,
        layouts=layouts,
        mixed=mixed,
    )


def _with_revision(config: PeftConfig, revision: str | None) -> PeftConfig:
    if revision is None or config.revision == revision:
        return config
    if config.revision is not None:
        warnings.warn(
            f"revision of the config is {config.revision!r}; {revision!r}, which was given, is written from now on",
            stacklevel=3,
        )
    return dataclasses.replace(config, revision=revision)
