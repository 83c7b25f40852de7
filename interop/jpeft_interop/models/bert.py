"""BERT (Devlin et al. 2018, https://arxiv.org/abs/1810.04805): encoder with a pooler, classifier, masked LM."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from ._attention import (
    AttentionMask,
    attend,
    bidirectional_mask,
    check_position_ids,
    split_heads,
)
from ._config import number_of_labels, read_fields
from ._family import Architecture, Family
from ._layers import (
    Embed,
    LayerNorm,
    Linear,
    Stored,
    activation,
    embed_tokens,
    in_order,
    numbered,
    parameter,
    zeros,
)
from ._outputs import BaseModelOutputWithPooling, LMOutput, SequenceClassifierOutput


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


_NO_EFFECT = (
    "directionality",
    "pooler_fc_size",
    "pooler_num_attention_heads",
    "pooler_num_fc_layers",
    "pooler_size_per_head",
    "pooler_type",
)
"""Keys of the first conversions from TensorFlow, which no PyTorch code has ever read."""


def read_config(raw: Mapping[str, Any], ignore: Collection[str] = ()) -> BertConfig:
    """The `BertConfig` of a config.json. Raises ValueError for what is not implemented, by name."""
    given = read_fields(
        BertConfig, raw, implemented={"position_embedding_type": ("absolute",)}, known=_NO_EFFECT, ignore=ignore
    )
    config = BertConfig(**{**given, "num_labels": number_of_labels(raw)})
    if config.hidden_size % config.num_attention_heads:
        raise ValueError(
            f"hidden_size {config.hidden_size} is not a multiple of num_attention_heads {config.num_attention_heads}"
        )
    activation(config.hidden_act)
    return config


class Embeddings(nnx.Module):
    def __init__(self, config: BertConfig, dtype: DTypeLike | None):
        self.word_embeddings = Embed(config.vocab_size, config.hidden_size)
        self.position_embeddings = Embed(config.max_position_embeddings, config.hidden_size)
        self.token_type_embeddings = Embed(config.type_vocab_size, config.hidden_size)
        self.LayerNorm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.max_positions = config.max_position_embeddings
        self.dtype = dtype

    def __call__(
        self,
        input_ids: jax.Array | None,
        token_type_ids: jax.Array | None,
        position_ids: jax.Array | None,
        inputs_embeds: jax.Array | None,
    ) -> jax.Array:
        x = embed_tokens(self.word_embeddings, input_ids, inputs_embeds, self.dtype)
        batch, length = x.shape[:2]
        check_position_ids(position_ids, batch, length)
        if position_ids is None:
            if length > self.max_positions:
                raise ValueError(
                    f"{length} tokens exceed max_position_embeddings={self.max_positions}: truncate the input"
                )
            position_ids = jnp.arange(length)[None]
        if token_type_ids is None:
            token_type_ids = jnp.zeros((1, length), jnp.int32)
        x = x + self.token_type_embeddings(token_type_ids, x.dtype) + self.position_embeddings(position_ids, x.dtype)
        return self.LayerNorm(x)


class SelfAttention(nnx.Module):
    def __init__(self, config: BertConfig):
        self.query = Linear(config.hidden_size, config.hidden_size)
        self.key = Linear(config.hidden_size, config.hidden_size)
        self.value = Linear(config.hidden_size, config.hidden_size)
        self.head_dim = config.hidden_size // config.num_attention_heads

    def __call__(self, x: jax.Array, mask: AttentionMask) -> jax.Array:
        query, key, value = (split_heads(layer(x), self.head_dim) for layer in (self.query, self.key, self.value))
        return attend(query, key, value, mask)


class Residual(nnx.Module):
    """A projection added to what came before, then normalised: BertSelfOutput and BertOutput."""

    def __init__(self, in_features: int, config: BertConfig):
        self.dense = Linear(in_features, config.hidden_size)
        self.LayerNorm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def __call__(self, x: jax.Array, before: jax.Array) -> jax.Array:
        return self.LayerNorm(self.dense(x) + before)


class Attention(nnx.Module):
    def __init__(self, config: BertConfig):
        self.self = SelfAttention(config)
        self.output = Residual(config.hidden_size, config)

    def __call__(self, x: jax.Array, mask: AttentionMask) -> jax.Array:
        return self.output(self.self(x, mask), x)


class Intermediate(nnx.Module):
    def __init__(self, config: BertConfig):
        self.dense = Linear(config.hidden_size, config.intermediate_size)
        self.act = config.hidden_act

    def __call__(self, x: jax.Array) -> jax.Array:
        return activation(self.act)(self.dense(x))


class Layer(nnx.Module):
    def __init__(self, config: BertConfig):
        self.attention = Attention(config)
        self.intermediate = Intermediate(config)
        self.output = Residual(config.intermediate_size, config)

    def __call__(self, x: jax.Array, mask: AttentionMask) -> jax.Array:
        x = self.attention(x, mask)
        return self.output(self.intermediate(x), x)


class Encoder(nnx.Module):
    def __init__(self, config: BertConfig):
        self.layer = numbered(Layer(config) for _ in range(config.num_hidden_layers))

    def __call__(self, x: jax.Array, mask: AttentionMask) -> jax.Array:
        for layer in in_order(self.layer):
            x = layer(x, mask)
        return x


class Pooler(nnx.Module):
    def __init__(self, config: BertConfig):
        self.dense = Linear(config.hidden_size, config.hidden_size)

    def __call__(self, x: jax.Array) -> jax.Array:
        return jnp.tanh(self.dense(x[:, 0]))


class BertModel(nnx.Module):
    """The encoder, and with `pooler` the projection of its first token."""

    def __init__(self, config: BertConfig, dtype: DTypeLike | None, *, pooler: bool = True):
        self.embeddings = Embeddings(config, dtype)
        self.encoder = Encoder(config)
        self.pooler = Pooler(config) if pooler else None

    def encode(
        self,
        input_ids: jax.Array | None = None,
        attention_mask: jax.Array | None = None,
        token_type_ids: jax.Array | None = None,
        position_ids: jax.Array | None = None,
        inputs_embeds: jax.Array | None = None,
    ) -> jax.Array:
        x = self.embeddings(input_ids, token_type_ids, position_ids, inputs_embeds)
        return self.encoder(x, bidirectional_mask(attention_mask, *x.shape[:2]))

    def __call__(self, **inputs: jax.Array) -> BaseModelOutputWithPooling:
        x = self.encode(**inputs)
        assert self.pooler is not None
        return BaseModelOutputWithPooling(x, self.pooler(x))


class BertForSequenceClassification(nnx.Module):
    """A linear layer on the pooled first token."""

    def __init__(self, config: BertConfig, dtype: DTypeLike | None):
        self.bert = BertModel(config, dtype)
        self.classifier = Linear(config.hidden_size, config.num_labels)

    def __call__(self, **inputs: jax.Array) -> SequenceClassifierOutput:
        return SequenceClassifierOutput(self.classifier(self.bert(**inputs).pooler_output))


class Transform(nnx.Module):
    def __init__(self, config: BertConfig):
        self.dense = Linear(config.hidden_size, config.hidden_size)
        self.LayerNorm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.act = config.hidden_act

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.LayerNorm(activation(self.act)(self.dense(x)))


class Predictions(nnx.Module):
    """Scores of every token of the vocabulary; the weight is the embedding's unless the config unties them."""

    def __init__(self, config: BertConfig):
        self.transform = Transform(config)
        tied = config.tie_word_embeddings
        self.bias = parameter((config.vocab_size,), zeros, Stored("bias", (0,))) if tied else None
        self.decoder = None if tied else Linear(config.hidden_size, config.vocab_size)

    def __call__(self, x: jax.Array, embedding: Embed) -> jax.Array:
        x = self.transform(x)
        if self.decoder is not None:
            return self.decoder(x)
        assert self.bias is not None
        return embedding.attend(x) + self.bias[...].astype(x.dtype)


class MaskedLMHead(nnx.Module):
    def __init__(self, config: BertConfig):
        self.predictions = Predictions(config)


class BertForMaskedLM(nnx.Module):
    """The encoder without a pooler, and the head that predicts the masked tokens."""

    def __init__(self, config: BertConfig, dtype: DTypeLike | None):
        self.bert = BertModel(config, dtype, pooler=False)
        self.cls = MaskedLMHead(config)

    def __call__(self, **inputs: jax.Array) -> LMOutput:
        x = self.bert.encode(**inputs)
        return LMOutput(self.cls.predictions(x, self.bert.embeddings.word_embeddings))


BERT = Family(
    model_type="bert",
    read_config=read_config,
    prefix="bert",
    inputs=("input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds"),
    architectures={
        "base": Architecture("BertModel", BertModel),
        "sequence-classification": Architecture("BertForSequenceClassification", BertForSequenceClassification),
        "masked-lm": Architecture(
            "BertForMaskedLM",
            BertForMaskedLM,
            tied={
                "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
                "cls.predictions.decoder.bias": "cls.predictions.bias",
            },
        ),
    },
    heads=("cls", "classifier", "pooler", "qa_outputs"),
    new_heads=("classifier", "pooler"),
)
