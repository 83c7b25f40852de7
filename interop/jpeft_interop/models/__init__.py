"""Base models of the Hugging Face families, in Flax NNX: parameters named as in `transformers`, as a plain dict."""

from ._model import FlaxModel as FlaxModel
from ._outputs import (
    BaseModelOutput as BaseModelOutput,
    BaseModelOutputWithPooling as BaseModelOutputWithPooling,
    LMOutput as LMOutput,
    SequenceClassifierOutput as SequenceClassifierOutput,
)
from .auto import (
    FAMILIES as FAMILIES,
    FlaxAutoModel as FlaxAutoModel,
    FlaxAutoModelForCausalLM as FlaxAutoModelForCausalLM,
    FlaxAutoModelForMaskedLM as FlaxAutoModelForMaskedLM,
    FlaxAutoModelForSequenceClassification as FlaxAutoModelForSequenceClassification,
)
