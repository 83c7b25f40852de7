"""Base models of the Hugging Face families, in Flax NNX: parameters named as in `transformers`, as a plain dict."""

from ._cache import Cache as Cache
from ._losses import (
    causal_lm_loss as causal_lm_loss,
    classification_loss as classification_loss,
    cross_entropy as cross_entropy,
    question_answering_loss as question_answering_loss,
    soft_classification_loss as soft_classification_loss,
)
from ._model import FlaxModel as FlaxModel
from ._outputs import (
    BaseModelOutput as BaseModelOutput,
    BaseModelOutputWithPooling as BaseModelOutputWithPooling,
    ClassifierOutput as ClassifierOutput,
    CLIPOutput as CLIPOutput,
    LMOutput as LMOutput,
    QuestionAnsweringOutput as QuestionAnsweringOutput,
    Seq2SeqLMOutput as Seq2SeqLMOutput,
    Seq2SeqModelOutput as Seq2SeqModelOutput,
)
from ._replication import replicate_layers as replicate_layers
from ._resize import resize_token_embeddings as resize_token_embeddings
from .auto import (
    FAMILIES as FAMILIES,
    FlaxAutoModel as FlaxAutoModel,
    FlaxAutoModelForCausalLM as FlaxAutoModelForCausalLM,
    FlaxAutoModelForFeatureExtraction as FlaxAutoModelForFeatureExtraction,
    FlaxAutoModelForImageClassification as FlaxAutoModelForImageClassification,
    FlaxAutoModelForMaskedLM as FlaxAutoModelForMaskedLM,
    FlaxAutoModelForQuestionAnswering as FlaxAutoModelForQuestionAnswering,
    FlaxAutoModelForSeq2SeqLM as FlaxAutoModelForSeq2SeqLM,
    FlaxAutoModelForSequenceClassification as FlaxAutoModelForSequenceClassification,
    FlaxAutoModelForSpeechSeq2Seq as FlaxAutoModelForSpeechSeq2Seq,
    FlaxAutoModelForTokenClassification as FlaxAutoModelForTokenClassification,
)
