"""What stands on a decoder: the scores of the next token, of a sequence's class, of each token's, of an answer's span.

Every head takes `backbone(config, options)`, which makes the bare decoder, the name that it has in the PyTorch class,
and the key of the config that says how many `features` come out of it.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ._family import Architecture, Family, Options
from ._layers import Linear
from ._losses import chunked_causal_lm_loss
from ._outputs import ClassifierOutput, LMOutput, QuestionAnsweringOutput
from ._shadow import SHADOW
from ._shadow_loss import of_sequences, of_tokens

Backbone = Callable[[Any, Options], Any]


class CausalLM(nnx.Module):
    """The decoder and the scores of the next token, by a linear layer or by the embedding if the config ties them."""

    def __init__(
        self,
        config: Any,
        options: Options,
        *,
        backbone: Backbone,
        prefix: str = "model",
        head: str = "lm_head",
        features: str = "hidden_size",
    ):
        setattr(self, prefix, backbone(config, options))
        if not config.tie_word_embeddings:
            setattr(self, head, Linear(getattr(config, features), config.vocab_size, bias=False))
        self.names = (prefix, None if config.tie_word_embeddings else head)
        self.softcap = getattr(config, "final_logit_softcapping", None)

    def __call__(
        self,
        *,
        logits_to_keep: int | None = None,
        labels: jax.Array | None = None,
        loss_chunk_size: int | None = None,
        **inputs: Any,
    ) -> LMOutput:
        output = getattr(self, self.names[0])(**inputs)
        beside = of_tokens(inputs.get(SHADOW), output.shadow_state, self.unbounded_scores, labels, loss_chunk_size)
        if labels is not None and loss_chunk_size is not None:
            loss = chunked_causal_lm_loss(output.last_hidden_state, self.scores, labels, loss_chunk_size)
            return LMOutput(None, output.past_key_values, output.hidden_states, loss, beside)
        x = output.last_hidden_state if logits_to_keep is None else output.last_hidden_state[:, -logits_to_keep:]
        return LMOutput(self.scores(x), output.past_key_values, output.hidden_states, shadow_loss=beside)

    def scores(self, x: jax.Array) -> jax.Array:
        """`(..., features) -> (..., vocab)`."""
        logits = self.unbounded_scores(x)
        return logits if self.softcap is None else self.softcap * jnp.tanh(logits / self.softcap)

    def unbounded_scores(self, x: jax.Array) -> jax.Array:
        """The same without the config's bound: what a shadow is judged by."""
        prefix, head = self.names
        return getattr(self, prefix).input_embedding.attend(x) if head is None else getattr(self, head)(x)


class SequenceClassification(nnx.Module):
    """The decoder and a linear layer on the last token that is not padding."""

    def __init__(
        self,
        config: Any,
        options: Options,
        *,
        backbone: Backbone,
        prefix: str = "model",
        head: str = "score",
        features: str = "hidden_size",
    ):
        setattr(self, prefix, backbone(config, options))
        setattr(self, head, Linear(getattr(config, features), config.num_labels, bias=False))
        self.names = (prefix, head)
        self.pad_token_id = config.pad_token_id

    def __call__(self, *, labels: jax.Array | None = None, **inputs: Any) -> ClassifierOutput:
        prefix, head = self.names
        output = getattr(self, prefix)(**inputs)
        beside = of_sequences(inputs.get(SHADOW), output.shadow_state, inputs.get("attention_mask"), labels)
        x = output.last_hidden_state
        last = last_token(inputs.get("input_ids"), self.pad_token_id, *x.shape[:2])
        logits = getattr(self, head)(jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0])
        return ClassifierOutput(logits, output.hidden_states, shadow_loss=beside)


class TokenClassification(nnx.Module):
    """The model and a linear layer on every token."""

    def __init__(
        self,
        config: Any,
        options: Options,
        *,
        backbone: Backbone,
        prefix: str = "model",
        head: str = "score",
        features: str = "hidden_size",
    ):
        setattr(self, prefix, backbone(config, options))
        setattr(self, head, Linear(getattr(config, features), config.num_labels))
        self.names = (prefix, head)

    def __call__(self, **inputs: Any) -> ClassifierOutput:
        prefix, head = self.names
        output = getattr(self, prefix)(**inputs)
        return ClassifierOutput(getattr(self, head)(output.last_hidden_state), output.hidden_states)


class QuestionAnswering(nnx.Module):
    """The model and two scores of every token: that the answer starts there, and that it ends there."""

    def __init__(
        self,
        config: Any,
        options: Options,
        *,
        backbone: Backbone,
        prefix: str = "model",
        features: str = "hidden_size",
    ):
        setattr(self, prefix, backbone(config, options))
        self.qa_outputs = Linear(getattr(config, features), 2)
        self.prefix = prefix

    def __call__(self, **inputs: Any) -> QuestionAnsweringOutput:
        output = getattr(self, self.prefix)(**inputs)
        scores = self.qa_outputs(output.last_hidden_state)
        return QuestionAnsweringOutput(scores[..., 0], scores[..., 1], output.hidden_states)


def last_token(input_ids: jax.Array | None, pad_token_id: int | None, batch: int, length: int) -> jax.Array:
    """The place `(batch,)` of the last token of each row that is not padding.

    By the token's id, whatever the attention mask says: the rule of `transformers`. Raises ValueError if several rows
    are given and the config has no `pad_token_id`.
    """
    if pad_token_id is None and batch > 1:
        raise ValueError(
            f"the config has no pad_token_id, so the ends of {batch} sequences cannot be found: set it in config.json"
        )
    if pad_token_id is None or input_ids is None:
        return jnp.full((batch,), length - 1)
    return jnp.argmax(jnp.where(input_ids != pad_token_id, jnp.arange(length), 0), axis=-1)


def decoder_family(
    model_type: str,
    read_config: Callable[..., Any],
    backbone: Backbone,
    classes: Mapping[str, str],
    *,
    prefix: str = "model",
    qa_prefix: str = "transformer",
    head: str = "lm_head",
    embedding: str = "embed_tokens",
    token_head: str = "score",
    features: str = "hidden_size",
    **fields: Any,
) -> Family:
    """The family of a decoder with the usual heads.

    `classes`: the name of the `transformers` class of each task. `prefix` and `qa_prefix`: the name of the bare
    decoder in them, `head` that of the language model's head, `token_head` that of the head of token classification,
    `embedding` that of the embedding in the decoder. `features`: the key of the config that says how many come out of
    the decoder.
    """
    tied = {f"{head}.weight": f"{prefix}.{embedding}.weight"}
    body = {"backbone": backbone, "features": features}
    modules: dict[str, tuple[Any, Mapping[str, str], str]] = {
        "base": (backbone, {}, prefix),
        "causal-lm": (partial(CausalLM, **body, prefix=prefix, head=head), tied, prefix),
        "sequence-classification": (partial(SequenceClassification, **body, prefix=prefix), {}, prefix),
        "token-classification": (partial(TokenClassification, **body, prefix=prefix, head=token_head), {}, prefix),
        "question-answering": (partial(QuestionAnswering, **body, prefix=qa_prefix), {}, qa_prefix),
    }
    architectures = {
        task: Architecture(classes[task], module, tied=tied, prefix=within)
        for task, (module, tied, within) in modules.items()
        if task in classes
    }
    heads = (head, "score", "qa_outputs", token_head)
    return Family(
        **{
            "model_type": model_type,
            "read_config": read_config,
            "prefix": prefix,
            "inputs": ("input_ids", "attention_mask", "position_ids", "inputs_embeds"),
            "architectures": architectures,
            "heads": heads,
            "new_heads": ("score", "qa_outputs", token_head),
            "decodes": True,
            **fields,
        }
    )


TASKS = {
    "base": "Model",
    "causal-lm": "ForCausalLM",
    "sequence-classification": "ForSequenceClassification",
    "token-classification": "ForTokenClassification",
    "question-answering": "ForQuestionAnswering",
}
"""The tasks of decoders, and what their classes' names end in."""


def class_names(name: str, *, without: tuple[str, ...] = ()) -> dict[str, str]:
    """The classes of a family that `transformers` calls `name`, but for the tasks that it has none for.

    >>> class_names("Gemma", without=("question-answering",))["causal-lm"]
    'GemmaForCausalLM'
    """
    return {task: f"{name}{ending}" for task, ending in TASKS.items() if task not in without}
