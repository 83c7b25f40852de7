"""DINOv2 (Oquab et al. 2023, https://arxiv.org/abs/2304.07193): ViT with scaled residuals, for images of any size."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ._activations import activation
from ._attention import AttentionMask
from ._config import check_heads, number_of_labels, read_fields
from ._encoder import MLP, Constant, SelfAttention, run_encoder
from ._family import Architecture, Family, Options
from ._layers import GatedMLP, LayerNorm, Linear
from ._outputs import BaseModelOutputWithPooling, ClassifierOutput
from ._parameters import normal, parameter, whole, zeros
from ._stack import layers
from ._vision import (
    TOKEN_LAYOUTS,
    PatchEmbeddings,
    Size,
    embed_patches,
    number_of_patches,
    read_size,
    resized_positions,
    with_class_token,
)


@dataclass(frozen=True)
class Dinov2Config:
    """The keys of a config.json that decide what is computed, with the defaults of `transformers`."""

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    mlp_ratio: int = 4
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-6
    image_size: Size = (224, 224)
    patch_size: Size = (14, 14)
    num_channels: int = 3
    qkv_bias: bool = True
    layerscale_value: float = 1.0
    use_swiglu_ffn: bool = False
    use_mask_token: bool = True
    initializer_range: float = 0.02
    num_labels: int = 2


_NO_EFFECT = (
    "apply_layernorm",
    "drop_path_rate",
    "out_features",
    "out_indices",
    "reshape_hidden_states",
    "stage_names",
    "tie_word_embeddings",
)
"""Of the backbone of a detector, but for the stochastic depth of training."""


def read_config(raw: Mapping[str, Any], ignore: Collection[str] = ()) -> Dinov2Config:
    """The `Dinov2Config` of a config.json. Raises ValueError for what is not implemented, by name."""
    given = read_fields(Dinov2Config, raw, known=_NO_EFFECT, ignore=ignore)
    sizes = {name: read_size(given[name]) for name in ("image_size", "patch_size") if name in given}
    config = Dinov2Config(**{**given, **sizes, "num_labels": number_of_labels(raw)})
    check_heads(config.hidden_size, config.num_attention_heads)
    activation(config.hidden_act)
    return config


class Embeddings(nnx.Module):
    def __init__(self, config: Dinov2Config, options: Options):
        hidden, patches = config.hidden_size, number_of_patches(config.image_size, config.patch_size)
        masked = config.use_mask_token
        self.cls_token = parameter((1, 1, hidden), normal, whole("cls_token", (0, 1, 2)))
        self.mask_token = parameter((1, hidden), zeros, whole("mask_token", (0, 1))) if masked else None
        self.patch_embeddings = PatchEmbeddings(config)
        self.position_embeddings = parameter((1, patches + 1, hidden), normal, whole("position_embeddings", (0, 1, 2)))
        self.patch_size, self.dtype = config.patch_size, options.dtype

    def __call__(self, pixel_values: jax.Array | None, bool_masked_pos: jax.Array | None) -> jax.Array:
        x = embed_patches(self.patch_embeddings.projection, pixel_values, self.dtype)
        assert pixel_values is not None
        if bool_masked_pos is not None:
            if self.mask_token is None:
                raise ValueError("bool_masked_pos needs a model with use_mask_token=True in its config")
            if bool_masked_pos.shape != x.shape[:2]:
                raise ValueError(
                    f"bool_masked_pos must be (batch, patches) = {x.shape[:2]}, got {bool_masked_pos.shape}"
                )
            x = jnp.where(bool_masked_pos.astype(bool)[:, :, None], self.mask_token[...].astype(x.dtype), x)
        height, width = pixel_values.shape[2:]
        positions = resized_positions(self.position_embeddings[...], (height, width), self.patch_size)
        return with_class_token(self.cls_token[...], x) + positions.astype(x.dtype)


class LayerScale(nnx.Module):
    def __init__(self, config: Dinov2Config):
        self.lambda1 = parameter((config.hidden_size,), Constant(config.layerscale_value), whole("lambda1", (0,)))

    def __call__(self, x: jax.Array) -> jax.Array:
        return x * self.lambda1[...].astype(x.dtype)


def feed_forward(config: Dinov2Config) -> nnx.Module:
    """Two layers, or three gated ones with two thirds of the size, rounded up to a multiple of eight."""
    hidden = int(config.hidden_size * config.mlp_ratio)
    if config.use_swiglu_ffn:
        return GatedMLP(config.hidden_size, (int(hidden * 2 / 3) + 7) // 8 * 8, "silu", bias=True)
    return MLP(config.hidden_size, hidden, config.hidden_act)


class Layer(nnx.Module):
    def __init__(self, config: Dinov2Config):
        self.norm1 = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = SelfAttention(config.hidden_size, config.num_attention_heads, bias=config.qkv_bias)
        self.layer_scale1 = LayerScale(config)
        self.norm2 = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = feed_forward(config)
        self.layer_scale2 = LayerScale(config)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.layer_scale1(self.attention(self.norm1(x), AttentionMask()))
        return x + self.layer_scale2(self.mlp(self.norm2(x)))


class Encoder(nnx.Module):
    def __init__(self, config: Dinov2Config, options: Options):
        self.layer = layers(lambda number: Layer(config), ("layer",) * config.num_hidden_layers, options)


class Dinov2Model(nnx.Module):
    """The encoder; its `pooler_output` is the class token."""

    def __init__(self, config: Dinov2Config, options: Options):
        self.embeddings = Embeddings(config, options)
        self.encoder = Encoder(config, options)
        self.layernorm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.options = options

    def __call__(
        self,
        pixel_values: jax.Array | None = None,
        bool_masked_pos: jax.Array | None = None,
        output_hidden_states: bool = False,
    ) -> BaseModelOutputWithPooling:
        x, entered = run_encoder(
            self.encoder.layer,
            self.embeddings(pixel_values, bool_masked_pos),
            lambda layer, x: layer(x),
            self.options,
            collect=output_hidden_states,
        )
        states = (*entered, x) if output_hidden_states else None
        x = self.layernorm(x)
        return BaseModelOutputWithPooling(x, x[:, 0], states)


class Dinov2ForImageClassification(nnx.Module):
    """A linear layer on the class token beside the mean of the patches."""

    def __init__(self, config: Dinov2Config, options: Options):
        self.dinov2 = Dinov2Model(config, options)
        self.classifier = Linear(2 * config.hidden_size, config.num_labels)

    def __call__(self, **inputs: Any) -> ClassifierOutput:
        output = self.dinov2(**inputs)
        x = output.last_hidden_state
        pooled = jnp.concatenate([x[:, 0], x[:, 1:].mean(axis=1)], axis=-1)
        return ClassifierOutput(self.classifier(pooled), output.hidden_states)


DINOV2 = Family(
    model_type="dinov2",
    read_config=read_config,
    prefix="dinov2",
    inputs=("pixel_values", "bool_masked_pos"),
    architectures={
        "base": Architecture("Dinov2Model", Dinov2Model),
        "image-classification": Architecture("Dinov2ForImageClassification", Dinov2ForImageClassification),
    },
    heads=("classifier",),
    new_heads=("classifier",),
    renames=(
        (r"\.attention\.attention\.query\.", ".attention.q_proj."),
        (r"\.attention\.attention\.key\.", ".attention.k_proj."),
        (r"\.attention\.attention\.value\.", ".attention.v_proj."),
        (r"\.attention\.output\.dense\.", ".attention.o_proj."),
        (r"\.mlp\.weights_out\.", ".mlp.down_proj."),
    ),
    splits=((r"\.mlp\.weights_in\.", (".mlp.gate_proj.", ".mlp.up_proj.")),),
    unused=(r"embeddings\.mask_token$",),
    layouts=TOKEN_LAYOUTS,
)
