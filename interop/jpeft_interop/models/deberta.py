"""DeBERTa v2 and v3 (https://arxiv.org/abs/2006.03654, https://arxiv.org/abs/2111.09543): disentangled attention.

To the product of query and key comes that of the query with the embedding of the distance to the key ("c2p", content
to position), and that of the key with it ("p2c").
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ._activations import activation
from ._attention import AttentionMask, attend, bidirectional_mask, split_heads, visible
from ._config import check_heads, number_of_labels, read_fields
from ._convolution import Conv
from ._encoder import counted, encoder_family, positions_of, run_encoder, scores
from ._family import Options
from ._layers import Embed, LayerNorm, Linear, embed_tokens
from ._losses import soft_classification_loss
from ._outputs import BaseModelOutput, ClassifierOutput, LMOutput
from ._parameters import parameter, whole, zeros
from ._stack import layers
from .bert import Intermediate, MaskedLMHead, Residual

C2P, P2C = "c2p", "p2c"


@dataclass(frozen=True)
class DebertaConfig:
    """The keys of a config.json that decide what is computed, with the defaults of `transformers`.

    `pos_att_type`: which of the two terms there are. `span`: how far apart two tokens may be before the distance is
    cut, in buckets if `position_buckets` is positive.
    """

    vocab_size: int = 128100
    hidden_size: int = 1536
    num_hidden_layers: int = 24
    num_attention_heads: int = 24
    intermediate_size: int = 6144
    hidden_act: str = "gelu"
    max_position_embeddings: int = 512
    type_vocab_size: int = 0
    layer_norm_eps: float = 1e-7
    relative_attention: bool = False
    max_relative_positions: int = -1
    position_buckets: int = -1
    position_biased_input: bool = True
    pos_att_type: tuple[str, ...] = ()
    share_att_key: bool = False
    norm_rel_ebd: str = "none"
    conv_kernel_size: int = 0
    conv_groups: int = 1
    conv_act: str = "tanh"
    embedding_size: int | None = None
    pooler_hidden_act: str = "gelu"
    legacy: bool = True
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True
    num_labels: int = 2

    @property
    def embedded(self) -> int:
        return self.hidden_size if self.embedding_size is None else self.embedding_size

    @property
    def span(self) -> int:
        return self.position_buckets if self.position_buckets > 0 else self.max_relative_positions


_NO_EFFECT = ("pooler_dropout", "cls_dropout")


def read_config(raw: Mapping[str, Any], ignore: Collection[str] = ()) -> DebertaConfig:
    """The `DebertaConfig` of a config.json. Raises ValueError for what is not implemented, by name."""
    hidden = raw.get("hidden_size", DebertaConfig.hidden_size)
    heads = raw.get("num_attention_heads", DebertaConfig.num_attention_heads)
    implemented = {
        "pooler_hidden_size": (hidden, None),
        "attention_head_size": (hidden // heads, None),
        "norm_rel_ebd": ("none", "layer_norm"),
        "tie_word_embeddings": (True,) if raw.get("legacy", True) is False else (True, False),
    }
    given = read_fields(DebertaConfig, raw, implemented=implemented, known=_NO_EFFECT, ignore=ignore)
    terms = given.get("pos_att_type") or ()
    terms = tuple(term.strip() for term in terms.lower().split("|")) if isinstance(terms, str) else tuple(terms)
    if unknown := set(terms) - {C2P, P2C}:
        raise ValueError(f"pos_att_type holds {', '.join(sorted(unknown))}; expected {C2P} or {P2C}")
    if given.get("max_relative_positions", -1) < 1:
        given["max_relative_positions"] = given.get("max_position_embeddings", DebertaConfig.max_position_embeddings)
    config = DebertaConfig(**{**given, "pos_att_type": terms, "num_labels": number_of_labels(raw)})
    check_heads(config.hidden_size, config.num_attention_heads)
    if config.conv_kernel_size > 0 and config.conv_kernel_size % 2 == 0:
        raise ValueError(
            f"conv_kernel_size is {config.conv_kernel_size}; expected an odd number, which keeps the length"
        )
    for act in (config.hidden_act, config.pooler_hidden_act, config.conv_act):
        activation(act)
    return config


class Embeddings(nnx.Module):
    def __init__(self, config: DebertaConfig, options: Options):
        features = config.embedded
        self.word_embeddings = Embed(config.vocab_size, features)
        biased, typed = config.position_biased_input, config.type_vocab_size > 0
        self.position_embeddings = Embed(config.max_position_embeddings, features) if biased else None
        self.token_type_embeddings = Embed(config.type_vocab_size, features) if typed else None
        projected = features != config.hidden_size
        self.embed_proj = Linear(features, config.hidden_size, bias=False) if projected else None
        self.LayerNorm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.config, self.options = config, options

    def __call__(
        self,
        input_ids: jax.Array | None,
        token_type_ids: jax.Array | None,
        position_ids: jax.Array | None,
        inputs_embeds: jax.Array | None,
    ) -> jax.Array:
        x = embed_tokens(self.word_embeddings, input_ids, inputs_embeds, self.options)
        if self.position_embeddings is not None:
            position_ids = positions_of(position_ids, input_ids, x, self.config, counted)
            x = x + self.position_embeddings(position_ids, x.dtype)
        if self.token_type_embeddings is not None:
            types = jnp.zeros((1, x.shape[1]), jnp.int32) if token_type_ids is None else token_type_ids
            x = x + self.token_type_embeddings(types, x.dtype)
        return self.LayerNorm(x if self.embed_proj is None else self.embed_proj(x))


def distances(length: int, config: DebertaConfig) -> np.ndarray:
    """The row `(queries, keys)` of the relative embeddings for each query and key.

    With buckets, a distance beyond half of them shares one with others, the more the farther it is. In float32, as in
    `transformers`: on which side of a border between buckets a distance falls may hang on the last bit.
    """
    span = config.span
    distance = np.arange(length)[:, None] - np.arange(length)[None, :]
    if config.position_buckets > 0 and config.max_relative_positions > 0:
        middle = config.position_buckets // 2
        far = np.maximum(np.abs(distance), middle).astype(np.float32)
        largest = np.log(np.float32((config.max_relative_positions - 1) / middle))
        logarithmic = np.ceil(np.log(far / np.float32(middle)) / largest * np.float32(middle - 1)) + middle
        distance = np.where(far <= middle, distance, logarithmic * np.sign(distance)).astype(np.int64)
    return np.clip(distance + span, 0, 2 * span - 1).astype(np.int32)


class DisentangledAttention(nnx.Module):
    def __init__(self, config: DebertaConfig):
        hidden = config.hidden_size
        own = config.relative_attention and not config.share_att_key
        self.query_proj = Linear(hidden, hidden)
        self.key_proj = Linear(hidden, hidden)
        self.value_proj = Linear(hidden, hidden)
        self.pos_key_proj = Linear(hidden, hidden) if own and C2P in config.pos_att_type else None
        self.pos_query_proj = Linear(hidden, hidden) if own and P2C in config.pos_att_type else None
        self.head_dim = hidden // config.num_attention_heads
        self.terms = config.pos_att_type

    def __call__(self, x: jax.Array, mask: AttentionMask, relative: jax.Array | None, rows: np.ndarray) -> jax.Array:
        """`relative (distances, features)`: the embeddings of distances, if they are used; `rows`: see `distances`."""
        projections = (self.query_proj, self.key_proj, self.value_proj)
        query, key, value = (split_heads(layer(x), self.head_dim) for layer in projections)
        scale = (self.head_dim * (1 + len(set(self.terms)))) ** -0.5
        bias = None if relative is None else self._bias(query, key, relative, rows)
        return attend(query, key, value, mask, scale=scale, bias=None if bias is None else bias * scale)

    def _bias(self, query: jax.Array, key: jax.Array, relative: jax.Array, rows: np.ndarray) -> jax.Array | None:
        """`(batch, heads, queries, keys)`."""
        terms = []
        if C2P in self.terms:
            layer = self.key_proj if self.pos_key_proj is None else self.pos_key_proj
            products = jnp.einsum("bqnd,pnd->bnqp", query, split_heads(layer(relative), self.head_dim))
            terms.append(jnp.take_along_axis(products, jnp.asarray(rows)[None, None], axis=3))
        if P2C in self.terms:
            layer = self.query_proj if self.pos_query_proj is None else self.pos_query_proj
            products = jnp.einsum("bknd,pnd->bnpk", key, split_heads(layer(relative), self.head_dim))
            terms.append(jnp.take_along_axis(products, jnp.asarray(rows)[None, None], axis=2))
        return sum(terms[1:], terms[0]) if terms else None


class Attention(nnx.Module):
    def __init__(self, config: DebertaConfig):
        self.self = DisentangledAttention(config)
        self.output = Residual(config.hidden_size, config)


class Layer(nnx.Module):
    def __init__(self, config: DebertaConfig):
        self.attention = Attention(config)
        self.intermediate = Intermediate(config)
        self.output = Residual(config.intermediate_size, config)

    def __call__(self, x: jax.Array, mask: AttentionMask, relative: jax.Array | None, rows: np.ndarray) -> jax.Array:
        x = self.attention.output(self.attention.self(x, mask, relative, rows), x)
        return self.output(self.intermediate(x), x)


class ConvLayer(nnx.Module):
    """A convolution of the embeddings, added to what the first layer made of them."""

    def __init__(self, config: DebertaConfig):
        hidden, width = config.hidden_size, config.conv_kernel_size
        self.conv = Conv(hidden, hidden, (width,), padding=((width - 1) // 2,), groups=config.conv_groups)
        self.LayerNorm = LayerNorm(hidden, eps=config.layer_norm_eps)
        self.act = config.conv_act

    def __call__(self, x: jax.Array, before: jax.Array, seen: jax.Array | None) -> jax.Array:
        return masked(self.LayerNorm(x + activation(self.act)(masked(self.conv(before), seen))), seen)


def masked(x: jax.Array, seen: jax.Array | None) -> jax.Array:
    """`x (batch, length, features)`, zero where there is no token."""
    return x if seen is None else jnp.where(seen[:, :, None], x, jnp.zeros((), x.dtype))


class Encoder(nnx.Module):
    def __init__(self, config: DebertaConfig, options: Options):
        hidden, depth = config.hidden_size, config.num_hidden_layers
        convolved = config.conv_kernel_size > 0
        # What the first layer made must be at hand by itself if the convolution is to be added to it.
        kinds = ("first",) * convolved + ("layer",) * (depth - convolved)
        self.layer = layers(lambda number: Layer(config), kinds, options)
        self.rel_embeddings = Embed(2 * config.span, hidden) if config.relative_attention else None
        normed = config.norm_rel_ebd == "layer_norm"
        self.LayerNorm = LayerNorm(hidden, eps=config.layer_norm_eps) if normed else None
        self.conv = ConvLayer(config) if convolved else None
        self.config, self.options = config, options

    def __call__(
        self, x: jax.Array, attention_mask: jax.Array | None, *, collect: bool
    ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        batch, length = x.shape[:2]
        mask, seen = bidirectional_mask(attention_mask, batch, length), visible(attention_mask, batch, length)
        relative, rows = self._relative(x), distances(length, self.config)

        def run(modules: nnx.Dict, x: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
            return run_encoder(
                modules, x, lambda layer, x: layer(x, mask, relative, rows), self.options, collect=collect
            )

        before = masked(x, seen)
        if self.conv is None:
            return run(self.layer, before)
        first, *rest = sorted(self.layer, key=lambda name: int(name.partition(":")[0]))
        x, entered = run(nnx.Dict({first: self.layer[first]}), before)
        x = self.conv(x, before, seen)
        x, entered_after = run(nnx.Dict({name: self.layer[name] for name in rest}), x)
        return x, (*entered, *entered_after)

    def _relative(self, x: jax.Array) -> jax.Array | None:
        if self.rel_embeddings is None:
            return None
        relative = self.rel_embeddings.embedding[...].astype(x.dtype)
        return relative if self.LayerNorm is None else self.LayerNorm(relative)


class DebertaModel(nnx.Module):
    """The encoder."""

    def __init__(self, config: DebertaConfig, options: Options):
        self.embeddings = Embeddings(config, options)
        self.encoder = Encoder(config, options)

    def __call__(
        self,
        input_ids: jax.Array | None = None,
        attention_mask: jax.Array | None = None,
        token_type_ids: jax.Array | None = None,
        position_ids: jax.Array | None = None,
        inputs_embeds: jax.Array | None = None,
        output_hidden_states: bool = False,
    ) -> BaseModelOutput:
        x = self.embeddings(input_ids, token_type_ids, position_ids, inputs_embeds)
        x, entered = self.encoder(x, attention_mask, collect=output_hidden_states)
        return BaseModelOutput(x, hidden_states=(*entered, x) if output_hidden_states else None)


class ContextPooler(nnx.Module):
    def __init__(self, config: DebertaConfig):
        self.dense = Linear(config.hidden_size, config.hidden_size)
        self.act = config.pooler_hidden_act

    def __call__(self, x: jax.Array) -> jax.Array:
        return activation(self.act)(self.dense(x[:, 0]))


class DebertaForSequenceClassification(nnx.Module):
    """Two layers on the first token."""

    def __init__(self, config: DebertaConfig, options: Options):
        self.deberta = DebertaModel(config, options)
        self.pooler = ContextPooler(config)
        self.classifier = Linear(config.hidden_size, config.num_labels)

    def __call__(self, **inputs: Any) -> ClassifierOutput:
        output = self.deberta(**inputs)
        return ClassifierOutput(self.classifier(self.pooler(output.last_hidden_state)), output.hidden_states)


class LMHead(nnx.Module):
    """The head of the original code: the weight is always the embedding's."""

    def __init__(self, config: DebertaConfig):
        self.dense = Linear(config.hidden_size, config.hidden_size)
        self.LayerNorm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.bias = parameter((config.vocab_size,), zeros, whole("bias", (0,)))
        self.act = config.hidden_act

    def __call__(self, x: jax.Array, embedding: Embed) -> jax.Array:
        return scores(self.LayerNorm(activation(self.act)(self.dense(x))), embedding, self.bias, None)


class LMPredictions(nnx.Module):
    def __init__(self, config: DebertaConfig):
        self.lm_head = LMHead(config)


class DebertaForMaskedLM(nnx.Module):
    """The encoder and the head that predicts the masked tokens: BERT's if `legacy`, or that of the original code."""

    def __init__(self, config: DebertaConfig, options: Options):
        self.deberta = DebertaModel(config, options)
        if config.legacy:
            self.cls = MaskedLMHead(config, config.embedded)
        else:
            self.lm_predictions = LMPredictions(config)
        self.legacy = config.legacy

    def __call__(self, **inputs: Any) -> LMOutput:
        output = self.deberta(**inputs)
        head = self.cls.predictions if self.legacy else self.lm_predictions.lm_head
        logits = head(output.last_hidden_state, self.deberta.embeddings.word_embeddings)
        return LMOutput(logits, hidden_states=output.hidden_states)


DEBERTA_V2 = encoder_family(
    "deberta-v2",
    read_config,
    "DebertaV2",
    "deberta",
    base=DebertaModel,
    classifier=DebertaForSequenceClassification,
    masked_lm=DebertaForMaskedLM,
    tied={
        "cls.predictions.decoder.weight": "deberta.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    },
    heads=("cls", "lm_predictions", "mask_predictions", "pooler", "classifier", "qa_outputs"),
    unused=(r"embeddings\.position_embeddings\.",),
    layouts={r".*encoder\.conv\.conv\.kernel": ".io"},
    classification_loss=soft_classification_loss,
)
