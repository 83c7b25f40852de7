"""BERT (Devlin et al. 2018, https://arxiv.org/abs/1810.04805): encoder with a pooler, classifier, masked LM."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ._activations import activation
from ._attention import AttentionMask, attend, bidirectional_mask, split_heads, visible
from ._cache import Memory
from ._config import check_heads, number_of_labels, read_fields
from ._encoder import (
    Positions,
    counted,
    encoder_family,
    output_layer,
    positions_of,
    scores,
)
from ._family import Options
from ._layers import Embed, LayerNorm, Linear, embed_tokens
from ._outputs import BaseModelOutputWithPooling, ClassifierOutput, LMOutput
from ._prefix import KeyValuePrefix, after, check_rows
from ._stack import layers, run


@dataclass(frozen=True)
class BertConfig:
    """The keys of a BERT config.json that decide what is computed, with the defaults of `transformers`."""

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True
    num_labels: int = 2
    pad_token_id: int | None = 0


_NO_EFFECT = (
    "directionality",
    "pooler_fc_size",
    "pooler_num_attention_heads",
    "pooler_num_fc_layers",
    "pooler_size_per_head",
    "pooler_type",
)
"""Keys of the first conversions from TensorFlow, which no PyTorch code has ever read."""


def read_config(
    raw: Mapping[str, Any], ignore: Collection[str] = (), *, defaults: Mapping[str, Any] | None = None
) -> BertConfig:
    """The `BertConfig` of a config.json, `defaults` where it is silent.

    Raises ValueError for what is not implemented, by name.
    """
    raw = {**(defaults or {}), **raw}
    given = read_fields(
        BertConfig, raw, implemented={"position_embedding_type": ("absolute",)}, known=_NO_EFFECT, ignore=ignore
    )
    config = BertConfig(**{**given, "num_labels": number_of_labels(raw)})
    check_heads(config.hidden_size, config.num_attention_heads)
    activation(config.hidden_act)
    return config


class Embeddings(nnx.Module):
    def __init__(self, config: BertConfig, options: Options, positions: Positions):
        self.word_embeddings = Embed(config.vocab_size, config.hidden_size)
        self.position_embeddings = Embed(config.max_position_embeddings, config.hidden_size)
        self.token_type_embeddings = Embed(config.type_vocab_size, config.hidden_size)
        self.LayerNorm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.config, self.positions, self.options = config, positions, options

    def __call__(
        self,
        input_ids: jax.Array | None,
        token_type_ids: jax.Array | None,
        position_ids: jax.Array | None,
        inputs_embeds: jax.Array | None,
        prefix: KeyValuePrefix | None,
    ) -> jax.Array:
        x = embed_tokens(self.word_embeddings, input_ids, inputs_embeds, self.options)
        position_ids = positions_of(position_ids, input_ids, x, self.config, self.positions, prefix)
        if token_type_ids is None:
            token_type_ids = jnp.zeros((1, x.shape[1]), jnp.int32)
        x = x + self.token_type_embeddings(token_type_ids, x.dtype) + self.position_embeddings(position_ids, x.dtype)
        return self.LayerNorm(x)


class SelfAttention(nnx.Module):
    def __init__(self, config: BertConfig):
        self.query = Linear(config.hidden_size, config.hidden_size)
        self.key = Linear(config.hidden_size, config.hidden_size)
        self.value = Linear(config.hidden_size, config.hidden_size)
        self.head_dim = config.hidden_size // config.num_attention_heads

    def __call__(self, x: jax.Array, mask: AttentionMask, memory: Memory | None) -> jax.Array:
        query, key, value = (split_heads(layer(x), self.head_dim) for layer in (self.query, self.key, self.value))
        if memory is not None:
            key, value = after(memory, key, value)
        return attend(query, key, value, mask)


class Residual(nnx.Module):
    """A projection added to what came before, then normalised: BertSelfOutput and BertOutput."""

    def __init__(self, in_features: int, config: Any):
        self.dense = Linear(in_features, config.hidden_size)
        self.LayerNorm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def __call__(self, x: jax.Array, before: jax.Array) -> jax.Array:
        return self.LayerNorm(self.dense(x) + before)


class Attention(nnx.Module):
    def __init__(self, config: BertConfig):
        self.self = SelfAttention(config)
        self.output = Residual(config.hidden_size, config)

    def __call__(self, x: jax.Array, mask: AttentionMask, memory: Memory | None) -> jax.Array:
        return self.output(self.self(x, mask, memory), x)


class Intermediate(nnx.Module):
    def __init__(self, config: Any):
        self.dense = Linear(config.hidden_size, config.intermediate_size)
        self.act = config.hidden_act

    def __call__(self, x: jax.Array) -> jax.Array:
        return activation(self.act)(self.dense(x))


class Layer(nnx.Module):
    def __init__(self, config: BertConfig):
        self.attention = Attention(config)
        self.intermediate = Intermediate(config)
        self.output = Residual(config.intermediate_size, config)

    def __call__(self, x: jax.Array, mask: AttentionMask, memory: Memory | None) -> jax.Array:
        x = self.attention(x, mask, memory)
        return self.output(self.intermediate(x), x)


class Encoder(nnx.Module):
    def __init__(self, config: BertConfig, options: Options):
        self.layer = layers(lambda number: Layer(config), ("layer",) * config.num_hidden_layers, options)
        self.options = options

    def __call__(
        self, x: jax.Array, mask: AttentionMask, prefix: KeyValuePrefix | None, *, collect: bool
    ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        x, _, entered = run(
            self.layer,
            x,
            lambda layer, x, memory, *_: (layer(x, mask, memory), None),
            memories=None if prefix is None else prefix.memories(self.layer),
            options=self.options,
            collect=collect,
        )
        return x, entered


class Pooler(nnx.Module):
    def __init__(self, config: BertConfig):
        self.dense = Linear(config.hidden_size, config.hidden_size)

    def __call__(self, x: jax.Array) -> jax.Array:
        return jnp.tanh(self.dense(x[:, 0]))


class BertModel(nnx.Module):
    """The encoder, and with `pooler` the projection of its first token. `positions` numbers the tokens.

    Of `past_key_values` it takes a prefix, which every token sees.
    """

    def __init__(self, config: BertConfig, options: Options, *, pooler: bool = True, positions: Positions = counted):
        self.embeddings = Embeddings(config, options, positions)
        self.encoder = Encoder(config, options)
        self.pooler = Pooler(config) if pooler else None

    def __call__(
        self,
        input_ids: jax.Array | None = None,
        attention_mask: jax.Array | None = None,
        token_type_ids: jax.Array | None = None,
        position_ids: jax.Array | None = None,
        inputs_embeds: jax.Array | None = None,
        past_key_values: KeyValuePrefix | None = None,
        output_hidden_states: bool = False,
    ) -> BaseModelOutputWithPooling:
        x = self.embeddings(input_ids, token_type_ids, position_ids, inputs_embeds, past_key_values)
        mask = bidirectional_mask(attention_mask, *x.shape[:2])
        if past_key_values is not None:
            check_rows(past_key_values, x.shape[0])
            seen = past_key_values.seen(visible(attention_mask, *x.shape[:2]), x.shape[1])
            mask = AttentionMask(seen[:, None, None, :])
        x, entered = self.encoder(x, mask, past_key_values, collect=output_hidden_states)
        pooled = None if self.pooler is None else self.pooler(x)
        return BaseModelOutputWithPooling(x, pooled, (*entered, x) if output_hidden_states else None)


class BertForSequenceClassification(nnx.Module):
    """A linear layer on the pooled first token."""

    def __init__(self, config: BertConfig, options: Options):
        self.bert = BertModel(config, options)
        self.classifier = Linear(config.hidden_size, config.num_labels)

    def __call__(self, **inputs: Any) -> ClassifierOutput:
        output = self.bert(**inputs)
        assert output.pooler_output is not None
        return ClassifierOutput(self.classifier(output.pooler_output), output.hidden_states)


class Transform(nnx.Module):
    """What comes before the scores: a layer from `hidden_size` to the `features` of the embedding."""

    def __init__(self, config: Any, features: int):
        self.dense = Linear(config.hidden_size, features)
        self.LayerNorm = LayerNorm(features, eps=config.layer_norm_eps)
        self.act = config.hidden_act

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.LayerNorm(activation(self.act)(self.dense(x)))


class Predictions(nnx.Module):
    """Scores of every token of the vocabulary; the weight is the embedding's unless the config unties them."""

    def __init__(self, config: Any, features: int):
        self.transform = Transform(config, features)
        self.bias, self.decoder = output_layer(features, config)

    def __call__(self, x: jax.Array, embedding: Embed) -> jax.Array:
        return scores(self.transform(x), embedding, self.bias, self.decoder)


class MaskedLMHead(nnx.Module):
    def __init__(self, config: Any, features: int):
        self.predictions = Predictions(config, features)


class BertForMaskedLM(nnx.Module):
    """The encoder without a pooler, and the head that predicts the masked tokens."""

    def __init__(self, config: BertConfig, options: Options):
        self.bert = BertModel(config, options, pooler=False)
        self.cls = MaskedLMHead(config, config.hidden_size)

    def __call__(self, **inputs: Any) -> LMOutput:
        output = self.bert(**inputs)
        logits = self.cls.predictions(output.last_hidden_state, self.bert.embeddings.word_embeddings)
        return LMOutput(logits, hidden_states=output.hidden_states)


BERT = encoder_family(
    "bert",
    read_config,
    "Bert",
    "bert",
    base=BertModel,
    bare=partial(BertModel, pooler=False),
    classifier=BertForSequenceClassification,
    masked_lm=BertForMaskedLM,
    prefixed=True,
    tied={
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    },
    heads=("cls", "classifier", "pooler", "qa_outputs"),
)
