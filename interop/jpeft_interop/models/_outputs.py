"""What a model returns: frozen dataclasses registered as pytrees, with the field names of `transformers`.

Fields that a call did not ask for, or that a model does not have, are None; so is `loss` without labels. `shadow_loss`
is that of a shadow's own predictions.
"""

from dataclasses import dataclass

import jax

from ._cache import Cache

HiddenStates = tuple[jax.Array, ...] | None
"""The embeddings, what each layer but the last made of them, and the last hidden state."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class BaseModelOutput:
    """`last_hidden_state (batch, length, hidden)`; with a cache, `past_key_values`; a shadow's `shadow_state` alike."""

    last_hidden_state: jax.Array
    past_key_values: Cache | None = None
    hidden_states: HiddenStates = None
    shadow_state: jax.Array | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class BaseModelOutputWithPooling:
    """`last_hidden_state (batch, length, hidden)` and `pooler_output (batch, hidden)`."""

    last_hidden_state: jax.Array
    pooler_output: jax.Array | None = None
    hidden_states: HiddenStates = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LMOutput:
    """`logits (batch, length, vocab)`, of a causal or a masked language model; None where the loss came by chunks."""

    logits: jax.Array | None
    past_key_values: Cache | None = None
    hidden_states: HiddenStates = None
    loss: jax.Array | None = None
    shadow_loss: jax.Array | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Seq2SeqModelOutput:
    """`last_hidden_state (batch, length, hidden)` of the decoder, and that of the encoder unless a cache was given."""

    last_hidden_state: jax.Array
    encoder_last_hidden_state: jax.Array | None = None
    past_key_values: Cache | None = None
    decoder_hidden_states: HiddenStates = None
    encoder_hidden_states: HiddenStates = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Seq2SeqLMOutput:
    """`logits (batch, length, vocab)` of the decoder, and the last hidden state of the encoder."""

    logits: jax.Array
    encoder_last_hidden_state: jax.Array | None = None
    past_key_values: Cache | None = None
    decoder_hidden_states: HiddenStates = None
    encoder_hidden_states: HiddenStates = None
    loss: jax.Array | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ClassifierOutput:
    """`logits (batch, labels)` of a sequence or an image, or `(batch, length, labels)` of its tokens."""

    logits: jax.Array
    hidden_states: HiddenStates = None
    loss: jax.Array | None = None
    shadow_loss: jax.Array | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class QuestionAnsweringOutput:
    """`start_logits` and `end_logits (batch, length)` of the answer's first and last token."""

    start_logits: jax.Array
    end_logits: jax.Array
    hidden_states: HiddenStates = None
    loss: jax.Array | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class CLIPOutput:
    """`logits_per_image (images, texts)`, how well they fit, and the same as `logits_per_text (texts, images)`.

    `text_embeds (texts, projection)` and `image_embeds` have length one. The outputs of the two models have the
    projection before it was given that length as their `pooler_output`, and the hidden states.
    """

    logits_per_image: jax.Array
    logits_per_text: jax.Array
    text_embeds: jax.Array
    image_embeds: jax.Array
    text_model_output: BaseModelOutputWithPooling
    vision_model_output: BaseModelOutputWithPooling
