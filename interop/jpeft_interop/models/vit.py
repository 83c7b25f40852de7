"""ViT (Dosovitskiy et al. 2020, https://arxiv.org/abs/2010.11929): an encoder of the patches of an image."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import jax
from flax import nnx

from ._activations import activation
from ._attention import AttentionMask
from ._config import check_heads, number_of_labels, read_fields
from ._encoder import MLP, SelfAttention, run_encoder
from ._family import Architecture, Family, Options
from ._layers import LayerNorm, Linear
from ._outputs import BaseModelOutputWithPooling, ClassifierOutput
from ._parameters import normal, parameter, whole
from ._stack import layers
from ._vision import (
    TOKEN_LAYOUTS,
    PatchEmbeddings,
    Size,
    check_size,
    embed_patches,
    number_of_patches,
    read_size,
    with_class_token,
)


@dataclass(frozen=True)
class ViTConfig:
    """The keys of a config.json that decide what is computed, with the defaults of `transformers`."""

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-12
    image_size: Size = (224, 224)
    patch_size: Size = (16, 16)
    num_channels: int = 3
    qkv_bias: bool = True
    pooler_output_size: int = 768
    pooler_act: str = "tanh"
    initializer_range: float = 0.02
    num_labels: int = 2


_NO_EFFECT = ("encoder_stride", "tie_word_embeddings")


def read_config(raw: Mapping[str, Any], ignore: Collection[str] = ()) -> ViTConfig:
    """The `ViTConfig` of a config.json. Raises ValueError for what is not implemented, by name."""
    given = read_fields(ViTConfig, raw, known=_NO_EFFECT, ignore=ignore)
    sizes = {name: read_size(given[name]) for name in ("image_size", "patch_size") if name in given}
    pooled = given.get("pooler_output_size") or given.get("hidden_size", ViTConfig.hidden_size)
    config = ViTConfig(**{**given, **sizes, "pooler_output_size": pooled, "num_labels": number_of_labels(raw)})
    check_heads(config.hidden_size, config.num_attention_heads)
    for act in (config.hidden_act, config.pooler_act):
        activation(act)
    return config


class Embeddings(nnx.Module):
    def __init__(self, config: ViTConfig, options: Options):
        hidden, patches = config.hidden_size, number_of_patches(config.image_size, config.patch_size)
        self.cls_token = parameter((1, 1, hidden), normal, whole("cls_token", (0, 1, 2)))
        self.patch_embeddings = PatchEmbeddings(config)
        self.position_embeddings = parameter((1, patches + 1, hidden), normal, whole("position_embeddings", (0, 1, 2)))
        self.image_size, self.dtype = config.image_size, options.dtype

    def __call__(self, pixel_values: jax.Array | None) -> jax.Array:
        x = embed_patches(self.patch_embeddings.projection, pixel_values, self.dtype)
        assert pixel_values is not None
        check_size(pixel_values, self.image_size)
        return with_class_token(self.cls_token[...], x) + self.position_embeddings[...].astype(x.dtype)


class Layer(nnx.Module):
    def __init__(self, config: ViTConfig):
        self.attention = SelfAttention(config.hidden_size, config.num_attention_heads, bias=config.qkv_bias)
        self.layernorm_before = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.layernorm_after = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = MLP(config.hidden_size, config.intermediate_size, config.hidden_act)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attention(self.layernorm_before(x), AttentionMask())
        return x + self.mlp(self.layernorm_after(x))


class Pooler(nnx.Module):
    def __init__(self, config: ViTConfig):
        self.dense = Linear(config.hidden_size, config.pooler_output_size)
        self.act = config.pooler_act

    def __call__(self, x: jax.Array) -> jax.Array:
        return activation(self.act)(self.dense(x[:, 0]))


class ViTModel(nnx.Module):
    """The encoder, and with `pooler` the projection of the class token."""

    def __init__(self, config: ViTConfig, options: Options, *, pooler: bool = True):
        self.embeddings = Embeddings(config, options)
        self.layers = layers(lambda number: Layer(config), ("layer",) * config.num_hidden_layers, options)
        self.layernorm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.pooler = Pooler(config) if pooler else None
        self.options = options

    def __call__(
        self, pixel_values: jax.Array | None = None, output_hidden_states: bool = False
    ) -> BaseModelOutputWithPooling:
        x, entered = run_encoder(
            self.layers,
            self.embeddings(pixel_values),
            lambda layer, x: layer(x),
            self.options,
            collect=output_hidden_states,
        )
        states = (*entered, x) if output_hidden_states else None
        x = self.layernorm(x)
        return BaseModelOutputWithPooling(x, None if self.pooler is None else self.pooler(x), states)


class ViTForImageClassification(nnx.Module):
    """A linear layer on the class token."""

    def __init__(self, config: ViTConfig, options: Options):
        self.vit = ViTModel(config, options, pooler=False)
        self.classifier = Linear(config.hidden_size, config.num_labels)

    def __call__(self, **inputs: Any) -> ClassifierOutput:
        output = self.vit(**inputs)
        return ClassifierOutput(self.classifier(output.last_hidden_state[:, 0]), output.hidden_states)


VIT = Family(
    model_type="vit",
    read_config=read_config,
    prefix="vit",
    inputs=("pixel_values",),
    architectures={
        "base": Architecture("ViTModel", ViTModel),
        "image-classification": Architecture("ViTForImageClassification", ViTForImageClassification),
    },
    heads=("pooler", "classifier", "decoder"),
    new_heads=("pooler", "classifier"),
    renames=(
        (r"\bencoder\.layer\.(\d+)\.", r"layers.\1."),
        (r"\.attention\.attention\.query\.", ".attention.q_proj."),
        (r"\.attention\.attention\.key\.", ".attention.k_proj."),
        (r"\.attention\.attention\.value\.", ".attention.v_proj."),
        (r"\.attention\.output\.dense\.", ".attention.o_proj."),
        (r"(\blayers\.\d+)\.intermediate\.dense\.", r"\1.mlp.fc1."),
        (r"(\blayers\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
    ),
    unused=(r"embeddings\.mask_token$",),
    layouts=TOKEN_LAYOUTS,
)
