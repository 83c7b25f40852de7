"""BART (https://arxiv.org/abs/1910.13461): an encoder-decoder with learned positions and norms after each block."""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ._activations import activation
from ._attention import Context
from ._cache import Memory
from ._call import DecoderCall
from ._config import number_of_labels, read_fields
from ._family import Architecture, Family, Options
from ._layers import Embed, LayerNorm, Linear, embed_tokens, scaled
from ._outputs import BaseModelOutput, QuestionAnsweringOutput, Seq2SeqLMOutput, Seq2SeqModelOutput
from ._parameters import parameter, whole, zeros
from ._seq2seq import (
    ENCODER_DECODER,
    EPS,
    SOURCE,
    TARGET,
    Layer,
    LayerSizes,
    SequenceClassification,
    check_heads,
    check_length,
    encode_and_decode,
    encoder_context,
    last_states,
    post_norm,
    run_layers,
    scored,
    shifted,
    spans,
    with_aliases,
)
from ._stack import layers

OFFSET = 2
"""The row of the table of positions that belongs to the first token: a remnant of fairseq's padding ids."""


@dataclass(frozen=True)
class BartConfig:
    """The keys of a BART config.json that decide what is computed, with the defaults of `transformers`."""

    vocab_size: int = 50265
    d_model: int = 1024
    encoder_layers: int = 12
    decoder_layers: int = 12
    encoder_attention_heads: int = 16
    decoder_attention_heads: int = 16
    encoder_ffn_dim: int = 4096
    decoder_ffn_dim: int = 4096
    max_position_embeddings: int = 1024
    activation_function: str = "gelu"
    scale_embedding: bool = False
    init_std: float = 0.02
    tie_word_embeddings: bool = True
    pad_token_id: int | None = 1
    eos_token_id: int | None = 2
    decoder_start_token_id: int | None = 2
    num_labels: int = 3

    @property
    def hidden_size(self) -> int:
        """The width of the model, by its usual name."""
        return self.d_model

    @property
    def initializer_range(self) -> float:
        """The standard deviation of initial values, by its usual name."""
        return self.init_std


_ALIASES = {
    "hidden_size": "d_model",
    "num_hidden_layers": "encoder_layers",
    "num_attention_heads": "encoder_attention_heads",
}
_ACCEPTED = {
    **ENCODER_DECODER,
    "tie_word_embeddings": (True,),
    # Settings of fairseq, for BART's relatives, that the first conversions wrote down.
    "add_bias_logits": (False,),
    "add_final_layer_norm": (False,),
    "extra_pos_embeddings": (OFFSET,),
    "normalize_before": (False,),
    "normalize_embedding": (True,),
    "static_position_embeddings": (False,),
}
_NO_EFFECT = ("classif_dropout", "encoder_layerdrop", "decoder_layerdrop", "force_bos_token_to_be_generated")


def read_config(raw: Mapping[str, Any], ignore: Collection[str] = ()) -> BartConfig:
    """The `BartConfig` of a config.json. Raises ValueError for what is not implemented, by name."""
    raw, aliases = with_aliases(raw, _ALIASES)
    given = read_fields(BartConfig, raw, implemented={**_ACCEPTED, **aliases}, known=_NO_EFFECT, ignore=ignore)
    labels = number_of_labels({"num_labels": BartConfig.num_labels, **raw})
    config = BartConfig(**{**given, "num_labels": labels})
    check_heads(config)
    activation(config.activation_function)
    return config


class Stack(nnx.Module):
    """The layers of the encoder or, with `cross`, of the decoder, and the positions before them."""

    def __init__(self, config: BartConfig, options: Options, *, depth: int, sizes: LayerSizes, cross: bool):
        self.embed_positions = Embed(config.max_position_embeddings + OFFSET, config.d_model)
        self.layers = layers(lambda number: Layer(sizes, cross=cross), ("layer",) * depth, options)
        self.layernorm_embedding = LayerNorm(config.d_model, eps=EPS)
        self.max_positions, self.options = config.max_position_embeddings, options

    def encode(self, x: jax.Array, attention_mask: jax.Array | None, collect: bool) -> BaseModelOutput:
        """What an encoder does with its embedded input."""
        context = encoder_context(x, attention_mask)
        x, _, entered = run_layers(
            self.layers, self._placed(x, jnp.arange(x.shape[1])[None]), context, self.options, collect=collect
        )
        return BaseModelOutput(x, hidden_states=(*entered, x) if collect else None)

    def decode(
        self, x: jax.Array, call: DecoderCall, context: Context, *, collect: bool
    ) -> tuple[jax.Array, Mapping[str, Memory], tuple[jax.Array, ...]]:
        """What a decoder does with its embedded input."""
        x = self._placed(x, call.positions, call.virtual)
        return run_layers(self.layers, x, context, self.options, call=call, collect=collect)

    def _placed(self, x: jax.Array, positions: jax.Array, virtual: int = 0) -> jax.Array:
        check_length(x.shape[1], self.max_positions, "max_position_embeddings", virtual)
        return self.layernorm_embedding(x + self.embed_positions(positions + OFFSET, x.dtype))


class BartModel(nnx.Module):
    """The bare encoder and decoder; without a decoder's input, it is given the encoder's, shifted right."""

    def __init__(self, config: BartConfig, options: Options):
        def sizes(heads: int, hidden: int) -> LayerSizes:
            return LayerSizes(config.d_model, heads, hidden, config.activation_function, post_norm)

        encoder = sizes(config.encoder_attention_heads, config.encoder_ffn_dim)
        decoder = sizes(config.decoder_attention_heads, config.decoder_ffn_dim)
        self.shared = Embed(config.vocab_size, config.d_model)
        self.encoder = Stack(config, options, depth=config.encoder_layers, sizes=encoder, cross=False)
        self.decoder = Stack(config, options, depth=config.decoder_layers, sizes=decoder, cross=True)
        self.scale = math.sqrt(config.d_model) if config.scale_embedding else None
        self.start, self.options = config.decoder_start_token_id, options

    def __call__(self, **inputs: Any) -> Seq2SeqModelOutput:
        return encode_and_decode(self._encode, self._embed, self.decoder.decode, **shifted(inputs, self.start))

    def _embed(self, ids: jax.Array | None, embeds: jax.Array | None) -> jax.Array:
        x = embed_tokens(self.shared, ids, embeds, self.options)
        return scaled(x, self.shared, ids, embeds, self.scale)

    def _encode(
        self,
        mask: jax.Array | None,
        collect: bool,
        input_ids: jax.Array | None = None,
        inputs_embeds: jax.Array | None = None,
    ) -> BaseModelOutput:
        return self.encoder.encode(self._embed(input_ids, inputs_embeds), mask, collect)


class BartForConditionalGeneration(nnx.Module):
    """The scores of the decoder's next token, by the embedding and a bias that is not trained."""

    def __init__(self, config: BartConfig, options: Options):
        self.model = BartModel(config, options)
        shape = (1, config.vocab_size)
        self.final_logits_bias = parameter(shape, zeros, whole("final_logits_bias", (0, 1)))

    def __call__(self, *, logits_to_keep: int | None = None, **inputs: Any) -> Seq2SeqLMOutput:
        output = self.model(**inputs)
        logits = self.model.shared.attend(last_states(output, logits_to_keep))
        # A buffer in PyTorch, which no optimizer sees.
        bias = jax.lax.stop_gradient(self.final_logits_bias[...])
        return scored(output, logits + bias.astype(logits.dtype))


class BartForQuestionAnswering(nnx.Module):
    """Two scores of every token of the decoder: that the answer starts there, and that it ends there."""

    def __init__(self, config: BartConfig, options: Options):
        self.model = BartModel(config, options)
        self.qa_outputs = Linear(config.d_model, 2)

    def __call__(self, **inputs: Any) -> QuestionAnsweringOutput:
        output = self.model(**inputs)
        return spans(output, self.qa_outputs(output.last_hidden_state))


def _tied(prefix: str) -> dict[str, str]:
    return {f"{prefix}{stack}.embed_tokens.weight": f"{prefix}shared.weight" for stack in ("encoder", "decoder")}


BART = Family(
    model_type="bart",
    read_config=read_config,
    prefix="model",
    inputs=(*SOURCE, *TARGET),
    architectures={
        "base": Architecture("BartModel", BartModel, _tied("")),
        "seq2seq-lm": Architecture(
            "BartForConditionalGeneration",
            BartForConditionalGeneration,
            {**_tied("model."), "lm_head.weight": "model.shared.weight"},
        ),
        "sequence-classification": Architecture(
            "BartForSequenceClassification",
            partial(SequenceClassification, backbone=BartModel, prefix="model"),
            _tied("model."),
        ),
        "question-answering": Architecture("BartForQuestionAnswering", BartForQuestionAnswering, _tied("model.")),
    },
    heads=("lm_head", "final_logits_bias", "classification_head", "qa_outputs"),
    new_heads=("final_logits_bias", "classification_head", "qa_outputs"),
    unused=(r"(encoder|decoder)\.version$",),
    # By its two axes it would pass for a kernel, and "all-linear" would mean it, too.
    layouts={"final_logits_bias": "vo"},
    decodes=True,
)
