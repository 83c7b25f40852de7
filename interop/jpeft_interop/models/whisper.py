"""Whisper (https://arxiv.org/abs/2212.04356): an encoder of speech, given as log-mel frames, and a decoder of text."""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from ._activations import activation
from ._attention import Context
from ._cache import Memory
from ._call import DecoderCall
from ._config import number_of_labels, read_fields
from ._family import Architecture, Family, Options
from ._layers import Embed, LayerNorm, Linear, embed_tokens
from ._outputs import BaseModelOutput, Seq2SeqLMOutput, Seq2SeqModelOutput
from ._parameters import normal, parameter, whole, zeros
from ._seq2seq import (
    ENCODER_DECODER,
    EPS,
    TARGET,
    Layer,
    LayerSizes,
    check_heads,
    check_length,
    encode_and_decode,
    encoder_context,
    last_states,
    pre_norm,
    run_layers,
    scored,
    with_aliases,
)
from ._stack import layers

WINDOW = 3
"""Frames that each convolution sees at a time."""


@dataclass(frozen=True)
class WhisperConfig:
    """The keys of a Whisper config.json that decide what is computed, with the defaults of `transformers`."""

    vocab_size: int = 51865
    num_mel_bins: int = 80
    d_model: int = 384
    encoder_layers: int = 4
    decoder_layers: int = 4
    encoder_attention_heads: int = 6
    decoder_attention_heads: int = 6
    encoder_ffn_dim: int = 1536
    decoder_ffn_dim: int = 1536
    max_source_positions: int = 1500
    max_target_positions: int = 448
    activation_function: str = "gelu"
    init_std: float = 0.02
    tie_word_embeddings: bool = True
    pad_token_id: int | None = 50256
    eos_token_id: int | None = 50256
    decoder_start_token_id: int | None = 50257
    num_labels: int = 2

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
    "num_key_value_heads": "encoder_attention_heads",
}
_NO_EFFECT = (
    # The PyTorch class computes a scale from it that it never uses.
    "scale_embedding",
    # Training, time stamps, generation and classification.
    "apply_spec_augment",
    "mask_time_prob",
    "mask_time_length",
    "mask_time_min_masks",
    "mask_feature_prob",
    "mask_feature_length",
    "mask_feature_min_masks",
    "encoder_layerdrop",
    "decoder_layerdrop",
    "median_filter_width",
    "forced_decoder_ids",
    "use_weighted_layer_sum",
    "classifier_proj_size",
)


def read_config(raw: Mapping[str, Any], ignore: Collection[str] = ()) -> WhisperConfig:
    """The `WhisperConfig` of a config.json. Raises ValueError for what is not implemented, by name."""
    raw, aliases = with_aliases(raw, _ALIASES)
    given = read_fields(WhisperConfig, raw, implemented={**ENCODER_DECODER, **aliases}, known=_NO_EFFECT, ignore=ignore)
    config = WhisperConfig(**{**given, "num_labels": number_of_labels(raw)})
    check_heads(config)
    activation(config.activation_function)
    return config


class Conv1d(nnx.Module):
    """A convolution over frames, kernel `(window, in, out)`: `nn.Conv1d` of torch has `(out, in, window)`."""

    def __init__(self, in_features: int, out_features: int, *, stride: int):
        self.kernel = parameter((WINDOW, in_features, out_features), normal, whole("weight", (2, 1, 0)))
        self.bias = parameter((out_features,), zeros, whole("bias", (0,)))
        self.stride = stride

    def __call__(self, x: jax.Array) -> jax.Array:
        """`(batch, frames, in) -> (batch, frames / stride, out)`."""
        kernel = self.kernel[...].astype(x.dtype)
        pad = WINDOW // 2
        y = jax.lax.conv_general_dilated(
            x, kernel, (self.stride,), [(pad, pad)], dimension_numbers=("NWC", "WIO", "NWC")
        )
        return y + self.bias[...].astype(x.dtype)


def sinusoids(key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike, std: float) -> jax.Array:
    """Sines, then cosines, of each position, with wave lengths from 1 to 10000: the encoder's positions."""
    length, features = shape
    frequencies = jnp.exp(-math.log(10000) / (features // 2 - 1) * jnp.arange(features // 2, dtype=jnp.float32))
    angles = jnp.arange(length, dtype=jnp.float32)[:, None] * frequencies
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=1).astype(dtype)


def _layers(config: WhisperConfig, options: Options, *, depth: int, heads: int, hidden: int, cross: bool) -> nnx.Dict:
    sizes = LayerSizes(config.d_model, heads, hidden, config.activation_function, pre_norm, key_bias=False)
    return layers(lambda number: Layer(sizes, cross=cross), ("layer",) * depth, options)


class Encoder(nnx.Module):
    """Two convolutions, the second of which halves the number of frames, and the layers."""

    def __init__(self, config: WhisperConfig, options: Options):
        self.conv1 = Conv1d(config.num_mel_bins, config.d_model, stride=1)
        self.conv2 = Conv1d(config.d_model, config.d_model, stride=2)
        self.embed_positions = Embed(config.max_source_positions, config.d_model)
        self.embed_positions.embedding = parameter(
            (config.max_source_positions, config.d_model), sinusoids, whole("weight", (0, 1))
        )
        self.layers = _layers(
            config,
            options,
            depth=config.encoder_layers,
            heads=config.encoder_attention_heads,
            hidden=config.encoder_ffn_dim,
            cross=False,
        )
        self.layer_norm = LayerNorm(config.d_model, eps=EPS)
        self.config, self.options = config, options

    def __call__(
        self, attention_mask: jax.Array | None, collect: bool, input_features: jax.Array | None = None
    ) -> BaseModelOutput:
        bins, frames = self.config.num_mel_bins, 2 * self.config.max_source_positions
        if input_features is None or input_features.ndim != 3 or input_features.shape[1:] != (bins, frames):
            raise ValueError(
                f"expected input_features (batch, {bins}, {frames}), padded with silence to that many frames, or "
                f"encoder_last_hidden_state; got {None if input_features is None else input_features.shape}"
            )
        dtype = self.conv1.kernel.dtype if self.options.dtype is None else self.options.dtype
        x = input_features.astype(dtype).transpose(0, 2, 1)
        # This activation is not the config's.
        gelu = activation("gelu")
        x = gelu(self.conv2(gelu(self.conv1(x))))
        # Not trained, in PyTorch either.
        x = x + jax.lax.stop_gradient(self.embed_positions.embedding[...]).astype(x.dtype)
        # Every frame is seen: silence is something that can be heard.
        x, _, entered = run_layers(self.layers, x, encoder_context(x, None), self.options, collect=collect)
        x = self.layer_norm(x)
        return BaseModelOutput(x, hidden_states=(*entered, x) if collect else None)


class Decoder(nnx.Module):
    """The layers of the decoder, and the embeddings before them."""

    def __init__(self, config: WhisperConfig, options: Options):
        self.embed_tokens = Embed(config.vocab_size, config.d_model)
        self.embed_positions = Embed(config.max_target_positions, config.d_model)
        self.layers = _layers(
            config,
            options,
            depth=config.decoder_layers,
            heads=config.decoder_attention_heads,
            hidden=config.decoder_ffn_dim,
            cross=True,
        )
        self.layer_norm = LayerNorm(config.d_model, eps=EPS)
        self.max_positions, self.options = config.max_target_positions, options

    def __call__(
        self, x: jax.Array, call: DecoderCall, context: Context, *, collect: bool
    ) -> tuple[jax.Array, Mapping[str, Memory], tuple[jax.Array, ...]]:
        check_length(x.shape[1], self.max_positions, "max_target_positions", call.virtual)
        x = x + self.embed_positions(call.positions, x.dtype)
        x, memories, entered = run_layers(self.layers, x, context, self.options, call=call, collect=collect)
        return self.layer_norm(x), memories, entered

    def embed(self, ids: jax.Array | None, embeds: jax.Array | None) -> jax.Array:
        """The embedded input of the decoder."""
        return embed_tokens(self.embed_tokens, ids, embeds, self.options)


class WhisperModel(nnx.Module):
    """The bare encoder and decoder. An `attention_mask` of the frames has no effect: the model hears all of them."""

    def __init__(self, config: WhisperConfig, options: Options):
        self.encoder = Encoder(config, options)
        self.decoder = Decoder(config, options)

    def __call__(self, *, attention_mask: jax.Array | None = None, **inputs: Any) -> Seq2SeqModelOutput:
        return encode_and_decode(self.encoder, self.decoder.embed, self.decoder, **inputs)


class WhisperForConditionalGeneration(nnx.Module):
    """The scores of the decoder's next token, by its embedding unless the config unties them."""

    def __init__(self, config: WhisperConfig, options: Options):
        self.model = WhisperModel(config, options)
        tied = config.tie_word_embeddings
        self.proj_out = None if tied else Linear(config.d_model, config.vocab_size, bias=False)

    def __call__(self, *, logits_to_keep: int | None = None, **inputs: Any) -> Seq2SeqLMOutput:
        output = self.model(**inputs)
        x, embedding = last_states(output, logits_to_keep), self.model.decoder.embed_tokens
        return scored(output, embedding.attend(x) if self.proj_out is None else self.proj_out(x))


WHISPER = Family(
    model_type="whisper",
    read_config=read_config,
    prefix="model",
    inputs=("input_features", "attention_mask", *TARGET),
    architectures={
        "base": Architecture("WhisperModel", WhisperModel),
        "speech-seq2seq": Architecture(
            "WhisperForConditionalGeneration",
            WhisperForConditionalGeneration,
            {"proj_out.weight": "model.decoder.embed_tokens.weight"},
        ),
    },
    heads=("proj_out",),
    layouts={r"(.*\.)?encoder\.conv[12]\.kernel": ".io"},
    decodes=True,
)
