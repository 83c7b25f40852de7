"""Base models of the Hugging Face families, in Flax NNX: parameters named as in `transformers`, as a plain dict."""

from ._model import FlaxModel as FlaxModel
from ._outputs import BaseModelOutput as BaseModelOutput
from ._outputs import BaseModelOutputWithPooling as BaseModelOutputWithPooling
from ._outputs import LMOutput as LMOutput
from ._outputs import SequenceClassifierOutput as SequenceClassifierOutput
from .auto import FAMILIES as FAMILIES
from .auto import FlaxAutoModel as FlaxAutoModel
from .auto import FlaxAutoModelForCausalLM as FlaxAutoModelForCausalLM
from .auto import FlaxAutoModelForMaskedLM as FlaxAutoModelForMaskedLM
from .auto import (
    FlaxAutoModelForSequenceClassification as FlaxAutoModelForSequenceClassification,
)
