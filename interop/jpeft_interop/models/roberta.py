"""RoBERTa (https://arxiv.org/abs/1907.11692) and XLM-RoBERTa (https://arxiv.org/abs/1911.02116): BERT, trained longer.

What differs from BERT is how positions are numbered, and the heads.
"""

from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ._activations import activation
from ._encoder import counted_without_padding, encoder_family, output_layer, scores
from ._family import Family, Options
from ._layers import Embed, LayerNorm, Linear
from ._outputs import ClassifierOutput, LMOutput
from .bert import BertConfig, BertModel, read_config as read_bert


def read_config(raw: Mapping[str, Any], ignore: Collection[str] = (), *, vocab_size: int) -> BertConfig:
    """The config of a RoBERTa's config.json. Raises ValueError for what is not implemented, by name."""
    config = read_bert(raw, ignore, defaults={"vocab_size": vocab_size, "pad_token_id": 1})
    if config.pad_token_id is None:
        raise ValueError("pad_token_id is None, but the positions of a RoBERTa are counted from it; expected a number")
    return config


RobertaModel = partial(BertModel, positions=counted_without_padding)


class ClassificationHead(nnx.Module):
    def __init__(self, config: BertConfig):
        self.dense = Linear(config.hidden_size, config.hidden_size)
        self.out_proj = Linear(config.hidden_size, config.num_labels)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.out_proj(jnp.tanh(self.dense(x)))


class RobertaForSequenceClassification(nnx.Module):
    """Two layers on the first token."""

    def __init__(self, config: BertConfig, options: Options):
        self.roberta = RobertaModel(config, options, pooler=False)
        self.classifier = ClassificationHead(config)

    def __call__(self, **inputs: Any) -> ClassifierOutput:
        output = self.roberta(**inputs)
        return ClassifierOutput(self.classifier(output.last_hidden_state[:, 0]), output.hidden_states)


class LMHead(nnx.Module):
    """Scores of every token of the vocabulary; the weight is the embedding's unless the config unties them."""

    def __init__(self, config: BertConfig):
        self.dense = Linear(config.hidden_size, config.hidden_size)
        self.layer_norm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.bias, self.decoder = output_layer(config.hidden_size, config)

    def __call__(self, x: jax.Array, embedding: Embed) -> jax.Array:
        # The activation is this one whatever the config's hidden_act.
        x = self.layer_norm(activation("gelu")(self.dense(x)))
        return scores(x, embedding, self.bias, self.decoder)


class RobertaForMaskedLM(nnx.Module):
    """The encoder without a pooler, and the head that predicts the masked tokens."""

    def __init__(self, config: BertConfig, options: Options):
        self.roberta = RobertaModel(config, options, pooler=False)
        self.lm_head = LMHead(config)

    def __call__(self, **inputs: Any) -> LMOutput:
        output = self.roberta(**inputs)
        logits = self.lm_head(output.last_hidden_state, self.roberta.embeddings.word_embeddings)
        return LMOutput(logits, hidden_states=output.hidden_states)


def _family(model_type: str, name: str, vocab_size: int) -> Family:
    return encoder_family(
        model_type,
        partial(read_config, vocab_size=vocab_size),
        name,
        "roberta",
        base=RobertaModel,
        bare=partial(RobertaModel, pooler=False),
        classifier=RobertaForSequenceClassification,
        masked_lm=RobertaForMaskedLM,
        prefixed=True,
        tied={
            "lm_head.decoder.weight": "roberta.embeddings.word_embeddings.weight",
            "lm_head.decoder.bias": "lm_head.bias",
        },
        heads=("lm_head", "classifier", "pooler", "qa_outputs"),
    )


ROBERTA = _family("roberta", "Roberta", 50265)
XLM_ROBERTA = _family("xlm-roberta", "XLMRoberta", 30522)
