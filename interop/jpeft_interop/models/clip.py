"""CLIP (Radford et al. 2021, https://arxiv.org/abs/2103.00020): an encoder of texts and one of images, compared."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ._activations import activation
from ._attention import AttentionMask, causal_mask
from ._config import check_heads, number_of_labels, read_fields
from ._encoder import MLP, Constant, SelfAttention, counted, positions_of, run_encoder
from ._family import Architecture, Family, Options
from ._layers import Embed, LayerNorm, Linear, embed_tokens
from ._outputs import BaseModelOutputWithPooling, ClassifierOutput, CLIPOutput
from ._parameters import normal, parameter, whole
from ._stack import layers
from ._vision import (
    Size,
    check_size,
    embed_patches,
    number_of_patches,
    patch_convolution,
    read_size,
    with_class_token,
)


@dataclass(frozen=True)
class TextConfig:
    """The keys of a text_config that decide what is computed, with the defaults of `transformers`."""

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    eos_token_id: int = 49407
    initializer_range: float = 0.02


@dataclass(frozen=True)
class VisionConfig:
    """The keys of a vision_config that decide what is computed, with the defaults of `transformers`."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: Size = (224, 224)
    patch_size: Size = (32, 32)
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02


@dataclass(frozen=True)
class CLIPConfig:
    """The keys of a config.json that decide what is computed, with the defaults of `transformers`."""

    text_config: TextConfig = TextConfig()
    vision_config: VisionConfig = VisionConfig()
    projection_dim: int = 512
    logit_scale_init_value: float = 2.6592
    initializer_range: float = 0.02
    num_labels: int = 2


_NO_EFFECT = ("projection_dim", "tie_word_embeddings")
"""Of a tower, whose projection, if it has one, is made by the whole model."""


def read_text(raw: Mapping[str, Any], ignore: Collection[str] = ()) -> TextConfig:
    """The config of the text's tower. Raises ValueError for what is not implemented, by name."""
    config = TextConfig(**read_fields(TextConfig, raw, known=_NO_EFFECT, ignore=ignore))
    if not isinstance(config.eos_token_id, int):
        raise ValueError(f"eos_token_id is {config.eos_token_id!r}; expected the one number whose place is pooled")
    check_heads(config.hidden_size, config.num_attention_heads)
    activation(config.hidden_act)
    return config


def read_vision(raw: Mapping[str, Any], ignore: Collection[str] = ()) -> VisionConfig:
    """The config of the images' tower. Raises ValueError for what is not implemented, by name."""
    given = read_fields(VisionConfig, raw, known=_NO_EFFECT, ignore=ignore)
    sizes = {name: read_size(given[name]) for name in ("image_size", "patch_size") if name in given}
    config = VisionConfig(**{**given, **sizes})
    check_heads(config.hidden_size, config.num_attention_heads)
    activation(config.hidden_act)
    return config


def read_config(raw: Mapping[str, Any], ignore: Collection[str] = ()) -> CLIPConfig:
    """The config of both towers. Raises ValueError for what is not implemented, by name."""
    known = ("text_config_dict", "vision_config_dict", "tie_word_embeddings")
    given = read_fields(CLIPConfig, raw, known=known, ignore=ignore)
    given |= {
        "text_config": read_text(_nested(raw, "text_config"), ignore),
        "vision_config": read_vision(_nested(raw, "vision_config"), ignore),
    }
    return CLIPConfig(**{**given, "num_labels": number_of_labels(raw)})


def _nested(raw: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    # Of the two keys that files of 2022 hold, transformers lets the longer one decide, its silence included.
    older = raw.get(f"{name}_dict")
    return (raw.get(name) or {}) if older is None else older


class Layer(nnx.Module):
    def __init__(self, config: TextConfig | VisionConfig):
        self.self_attn = SelfAttention(config.hidden_size, config.num_attention_heads, output="out_proj")
        self.layer_norm1 = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = MLP(config.hidden_size, config.intermediate_size, config.hidden_act)
        self.layer_norm2 = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def __call__(self, x: jax.Array, mask: AttentionMask) -> jax.Array:
        x = x + self.self_attn(self.layer_norm1(x), mask)
        return x + self.mlp(self.layer_norm2(x))


class Encoder(nnx.Module):
    def __init__(self, config: TextConfig | VisionConfig, options: Options):
        self.layers = layers(lambda number: Layer(config), ("layer",) * config.num_hidden_layers, options)
        self.options = options

    def __call__(self, x: jax.Array, mask: AttentionMask, *, collect: bool) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        return run_encoder(self.layers, x, lambda layer, x: layer(x, mask), self.options, collect=collect)


class TextEmbeddings(nnx.Module):
    def __init__(self, config: TextConfig, options: Options):
        self.token_embedding = Embed(config.vocab_size, config.hidden_size)
        self.position_embedding = Embed(config.max_position_embeddings, config.hidden_size)
        self.config, self.options = config, options

    def __call__(self, input_ids: jax.Array | None, position_ids: jax.Array | None) -> jax.Array:
        x = embed_tokens(self.token_embedding, input_ids, None, self.options)
        return x + self.position_embedding(positions_of(position_ids, input_ids, x, self.config, counted), x.dtype)


def end_of_text(input_ids: jax.Array, eos_token_id: int) -> jax.Array:
    """The place `(batch,)` of the first `eos_token_id` of each row, 0 if there is none.

    An id of 2 stands in the files of the first models, and is not that of their tokenizer, whose last token is meant.
    """
    return jnp.argmax(input_ids if eos_token_id == 2 else input_ids == eos_token_id, axis=-1)


class CLIPTextModel(nnx.Module):
    """The tower of texts; its `pooler_output` is the token that ends a text."""

    def __init__(self, config: TextConfig, options: Options):
        self.embeddings = TextEmbeddings(config, options)
        self.encoder = Encoder(config, options)
        self.final_layer_norm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.eos_token_id = config.eos_token_id

    def __call__(
        self,
        input_ids: jax.Array | None = None,
        attention_mask: jax.Array | None = None,
        position_ids: jax.Array | None = None,
        output_hidden_states: bool = False,
    ) -> BaseModelOutputWithPooling:
        x = self.embeddings(input_ids, position_ids)
        assert input_ids is not None
        mask = causal_mask(attention_mask, None, *x.shape[:2])
        x, entered = self.encoder(x, mask, collect=output_hidden_states)
        states = (*entered, x) if output_hidden_states else None
        x = self.final_layer_norm(x)
        end = end_of_text(input_ids, self.eos_token_id)
        pooled = jnp.take_along_axis(x, end[:, None, None], axis=1)[:, 0]
        return BaseModelOutputWithPooling(x, pooled, states)


class VisionEmbeddings(nnx.Module):
    def __init__(self, config: VisionConfig, options: Options):
        hidden, patches = config.hidden_size, number_of_patches(config.image_size, config.patch_size)
        self.class_embedding = parameter((hidden,), normal, whole("class_embedding", (0,)))
        self.patch_embedding = patch_convolution(config, bias=False)
        self.position_embedding = Embed(patches + 1, hidden)
        self.image_size, self.dtype = config.image_size, options.dtype

    def __call__(self, pixel_values: jax.Array | None) -> jax.Array:
        x = embed_patches(self.patch_embedding, pixel_values, self.dtype)
        assert pixel_values is not None
        check_size(pixel_values, self.image_size)
        return with_class_token(self.class_embedding[...], x) + self.position_embedding.embedding[...].astype(x.dtype)


class CLIPVisionModel(nnx.Module):
    """The tower of images; its `pooler_output` is the class token."""

    def __init__(self, config: VisionConfig, options: Options):
        self.embeddings = VisionEmbeddings(config, options)
        self.pre_layrnorm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.encoder = Encoder(config, options)
        self.post_layernorm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def __call__(
        self, pixel_values: jax.Array | None = None, output_hidden_states: bool = False
    ) -> BaseModelOutputWithPooling:
        x = self.pre_layrnorm(self.embeddings(pixel_values))
        x, entered = self.encoder(x, AttentionMask(), collect=output_hidden_states)
        states = (*entered, x) if output_hidden_states else None
        return BaseModelOutputWithPooling(x, self.post_layernorm(x[:, 0]), states)


class CLIPModel(nnx.Module):
    """Both towers, and how well each text fits each image."""

    def __init__(self, config: CLIPConfig, options: Options):
        text, vision = config.text_config, config.vision_config
        self.text_model = CLIPTextModel(text, options)
        self.vision_model = CLIPVisionModel(vision, options)
        self.visual_projection = Linear(vision.hidden_size, config.projection_dim, bias=False)
        self.text_projection = Linear(text.hidden_size, config.projection_dim, bias=False)
        self.logit_scale = parameter((), Constant(config.logit_scale_init_value), whole("logit_scale", ()))

    def __call__(
        self,
        input_ids: jax.Array | None = None,
        pixel_values: jax.Array | None = None,
        attention_mask: jax.Array | None = None,
        position_ids: jax.Array | None = None,
        output_hidden_states: bool = False,
    ) -> CLIPOutput:
        images = self.vision_model(pixel_values, output_hidden_states)
        texts = self.text_model(input_ids, attention_mask, position_ids, output_hidden_states)
        assert images.pooler_output is not None and texts.pooler_output is not None
        of_images, of_texts = self.visual_projection(images.pooler_output), self.text_projection(texts.pooler_output)
        images, texts = replace(images, pooler_output=of_images), replace(texts, pooler_output=of_texts)
        image_embeds, text_embeds = _of_length_one(of_images), _of_length_one(of_texts)
        scale = jnp.exp(self.logit_scale[...]).astype(text_embeds.dtype)
        logits = scale * (text_embeds @ image_embeds.T)
        return CLIPOutput(logits.T, logits, text_embeds, image_embeds, texts, images)


def _of_length_one(x: jax.Array) -> jax.Array:
    return x / jnp.sqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True))


class CLIPForImageClassification(nnx.Module):
    """The tower of images and a linear layer on the mean of its patches."""

    def __init__(self, config: CLIPConfig, options: Options):
        self.vision_model = CLIPVisionModel(config.vision_config, options)
        self.classifier = Linear(config.vision_config.hidden_size, config.num_labels)

    def __call__(self, **inputs: Any) -> ClassifierOutput:
        output = self.vision_model(**inputs)
        return ClassifierOutput(self.classifier(output.last_hidden_state[:, 1:].mean(axis=1)), output.hidden_states)


CLIP = Family(
    model_type="clip",
    read_config=read_config,
    prefix="",
    inputs=("input_ids", "pixel_values", "attention_mask", "position_ids"),
    architectures={
        "base": Architecture("CLIPModel", CLIPModel),
        "image-classification": Architecture("CLIPForImageClassification", CLIPForImageClassification),
    },
    heads=("text_model", "text_projection", "visual_projection", "logit_scale", "classifier"),
    new_heads=("classifier",),
)
CLIP_TEXT = Family(
    model_type="clip_text_model",
    read_config=read_text,
    prefix="text_model",
    inputs=("input_ids", "attention_mask", "position_ids"),
    architectures={"base": Architecture("CLIPTextModel", CLIPTextModel)},
    heads=("text_projection",),
)
CLIP_VISION = Family(
    model_type="clip_vision_model",
    read_config=read_vision,
    prefix="vision_model",
    inputs=("pixel_values",),
    architectures={"base": Architecture("CLIPVisionModel", CLIPVisionModel)},
    heads=("visual_projection",),
)
