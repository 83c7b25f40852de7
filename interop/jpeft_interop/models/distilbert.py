"""DistilBERT (Sanh et al. 2019, https://arxiv.org/abs/1910.01108): BERT with half the layers, without token types."""

from collections.abc import Collection, Mapping
from typing import Any

import jax
from flax import nnx

from ._activations import activation
from ._attention import AttentionMask, attend, bidirectional_mask, split_heads
from ._config import check_heads, number_of_labels, read_fields
from ._encoder import counted, encoder_family, output_layer, positions_of, run_encoder, scores
from ._family import Options
from ._layers import Embed, LayerNorm, Linear, embed_tokens
from ._outputs import BaseModelOutput, ClassifierOutput, LMOutput
from ._stack import layers
from .bert import BertConfig

_NAMES = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "hidden_dim": "intermediate_size",
    "activation": "hidden_act",
}
_DEFAULTS = {"num_hidden_layers": 6}
_NO_EFFECT = ("sinusoidal_pos_embds", "tie_weights_", "qa_dropout", "seq_classif_dropout")
"""The sinusoids are only what the position embeddings start from."""


def read_config(raw: Mapping[str, Any], ignore: Collection[str] = ()) -> BertConfig:
    """The config of a DistilBERT's config.json, under BERT's names. Raises ValueError for what is not implemented."""
    raw = {**_DEFAULTS, **{_NAMES.get(key, key): value for key, value in raw.items()}}
    given = read_fields(BertConfig, raw, known=_NO_EFFECT, ignore=ignore)
    config = BertConfig(**{**given, "num_labels": number_of_labels(raw)})
    check_heads(config.hidden_size, config.num_attention_heads)
    activation(config.hidden_act)
    return config


def _norm(config: BertConfig) -> LayerNorm:
    return LayerNorm(config.hidden_size, eps=1e-12)


class Embeddings(nnx.Module):
    def __init__(self, config: BertConfig, options: Options):
        self.word_embeddings = Embed(config.vocab_size, config.hidden_size)
        self.position_embeddings = Embed(config.max_position_embeddings, config.hidden_size)
        self.LayerNorm = _norm(config)
        self.config, self.options = config, options

    def __call__(
        self, input_ids: jax.Array | None, position_ids: jax.Array | None, inputs_embeds: jax.Array | None
    ) -> jax.Array:
        x = embed_tokens(self.word_embeddings, input_ids, inputs_embeds, self.options)
        position_ids = positions_of(position_ids, input_ids, x, self.config, counted)
        return self.LayerNorm(x + self.position_embeddings(position_ids, x.dtype))


class Attention(nnx.Module):
    def __init__(self, config: BertConfig):
        self.q_lin = Linear(config.hidden_size, config.hidden_size)
        self.k_lin = Linear(config.hidden_size, config.hidden_size)
        self.v_lin = Linear(config.hidden_size, config.hidden_size)
        self.out_lin = Linear(config.hidden_size, config.hidden_size)
        self.head_dim = config.hidden_size // config.num_attention_heads

    def __call__(self, x: jax.Array, mask: AttentionMask) -> jax.Array:
        query, key, value = (split_heads(layer(x), self.head_dim) for layer in (self.q_lin, self.k_lin, self.v_lin))
        return self.out_lin(attend(query, key, value, mask))


class FeedForward(nnx.Module):
    def __init__(self, config: BertConfig):
        self.lin1 = Linear(config.hidden_size, config.intermediate_size)
        self.lin2 = Linear(config.intermediate_size, config.hidden_size)
        self.act = config.hidden_act

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.lin2(activation(self.act)(self.lin1(x)))


class Layer(nnx.Module):
    def __init__(self, config: BertConfig):
        self.attention = Attention(config)
        self.sa_layer_norm = _norm(config)
        self.ffn = FeedForward(config)
        self.output_layer_norm = _norm(config)

    def __call__(self, x: jax.Array, mask: AttentionMask) -> jax.Array:
        x = self.sa_layer_norm(self.attention(x, mask) + x)
        return self.output_layer_norm(self.ffn(x) + x)


class Transformer(nnx.Module):
    def __init__(self, config: BertConfig, options: Options):
        self.layer = layers(lambda number: Layer(config), ("layer",) * config.num_hidden_layers, options)


class DistilBertModel(nnx.Module):
    """The encoder."""

    def __init__(self, config: BertConfig, options: Options):
        self.embeddings = Embeddings(config, options)
        self.transformer = Transformer(config, options)
        self.options = options

    def __call__(
        self,
        input_ids: jax.Array | None = None,
        attention_mask: jax.Array | None = None,
        position_ids: jax.Array | None = None,
        inputs_embeds: jax.Array | None = None,
        output_hidden_states: bool = False,
    ) -> BaseModelOutput:
        x = self.embeddings(input_ids, position_ids, inputs_embeds)
        mask = bidirectional_mask(attention_mask, *x.shape[:2])
        x, entered = run_encoder(
            self.transformer.layer, x, lambda layer, x: layer(x, mask), self.options, collect=output_hidden_states
        )
        return BaseModelOutput(x, hidden_states=(*entered, x) if output_hidden_states else None)


class DistilBertForSequenceClassification(nnx.Module):
    """Two layers on the first token."""

    def __init__(self, config: BertConfig, options: Options):
        self.distilbert = DistilBertModel(config, options)
        self.pre_classifier = Linear(config.hidden_size, config.hidden_size)
        self.classifier = Linear(config.hidden_size, config.num_labels)

    def __call__(self, **inputs: Any) -> ClassifierOutput:
        output = self.distilbert(**inputs)
        x = jax.nn.relu(self.pre_classifier(output.last_hidden_state[:, 0]))
        return ClassifierOutput(self.classifier(x), output.hidden_states)


class Bias(nnx.Module):
    def __init__(self, bias: nnx.Param | None):
        self.bias = bias


class DistilBertForMaskedLM(nnx.Module):
    """The encoder and the head that predicts the masked tokens."""

    def __init__(self, config: BertConfig, options: Options):
        self.distilbert = DistilBertModel(config, options)
        self.vocab_transform = Linear(config.hidden_size, config.hidden_size)
        self.vocab_layer_norm = _norm(config)
        bias, layer = output_layer(config.hidden_size, config)
        self.vocab_projector = Bias(bias) if layer is None else layer
        self.act = config.hidden_act

    def __call__(self, **inputs: Any) -> LMOutput:
        output = self.distilbert(**inputs)
        x = self.vocab_layer_norm(activation(self.act)(self.vocab_transform(output.last_hidden_state)))
        head = self.vocab_projector
        bias, layer = (None, head) if isinstance(head, Linear) else (head.bias, None)
        logits = scores(x, self.distilbert.embeddings.word_embeddings, bias, layer)
        return LMOutput(logits, hidden_states=output.hidden_states)


DISTILBERT = encoder_family(
    "distilbert",
    read_config,
    "DistilBert",
    "distilbert",
    base=DistilBertModel,
    classifier=DistilBertForSequenceClassification,
    masked_lm=DistilBertForMaskedLM,
    tied={"vocab_projector.weight": "distilbert.embeddings.word_embeddings.weight"},
    inputs=("input_ids", "attention_mask", "position_ids", "inputs_embeds"),
    heads=("vocab_transform", "vocab_layer_norm", "vocab_projector", "pre_classifier", "classifier", "qa_outputs"),
    new_heads=("pre_classifier", "classifier", "qa_outputs"),
)
