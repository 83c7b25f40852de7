"""What a model returns: frozen dataclasses registered as pytrees, with the field names of `transformers`."""

from dataclasses import dataclass

import jax


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class BaseModelOutput:
    """`last_hidden_state (batch, length, hidden)`."""

    last_hidden_state: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class BaseModelOutputWithPooling:
    """`last_hidden_state (batch, length, hidden)` and `pooler_output (batch, hidden)`."""

    last_hidden_state: jax.Array
    pooler_output: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LMOutput:
    """`logits (batch, length, vocab)`, of a causal or a masked language model."""

    logits: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SequenceClassifierOutput:
    """`logits (batch, num_labels)`."""

    logits: jax.Array
