"""What the encoders share, of text and of images: positions, layers, attention, the family with the usual heads."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ._activations import activation
from ._attention import AttentionMask, attend, check_position_ids, split_heads
from ._family import Architecture, Family, Options
from ._heads import Backbone, QuestionAnswering, TokenClassification
from ._layers import Embed, Linear
from ._parameters import parameter, whole, zeros
from ._prefix import KeyValuePrefix, too_long
from ._stack import run

INPUTS = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds")

Positions = Callable[[jax.Array | None, int, Any, KeyValuePrefix | None], jax.Array]
"""`(input_ids or None, length, config, prefix) -> position_ids (batch or 1, length)`, where the caller gives none."""


def counted(input_ids: jax.Array | None, length: int, config: Any, prefix: KeyValuePrefix | None) -> jax.Array:
    """Positions `0, 1, ...`, or those after the prefix. Raises ValueError if the model has fewer."""
    return _count(length, 0, config.max_position_embeddings, prefix)


def counted_without_padding(
    input_ids: jax.Array | None, length: int, config: Any, prefix: KeyValuePrefix | None
) -> jax.Array:
    """Tokens are counted from `pad_token_id + 1` on, and padding, told by its id, has the position `pad_token_id`.

    Embeddings do not tell it, so all of them count. Raises ValueError if the model has fewer positions.
    """
    places = _count(length, config.pad_token_id + 1, config.max_position_embeddings, prefix)
    if input_ids is None:
        return places
    tokens = (input_ids != config.pad_token_id).astype(jnp.int32)
    return (_start(prefix) + jnp.cumsum(tokens, axis=-1)) * tokens + config.pad_token_id


def _count(length: int, first: int, available: int, prefix: KeyValuePrefix | None) -> jax.Array:
    virtual = 0 if prefix is None else prefix.length
    if first + virtual + length > available:
        most = f"the {available - first} that max_position_embeddings={available} has room for"
        raise ValueError(too_long(length, virtual, most))
    return first + _start(prefix) + jnp.arange(length, dtype=jnp.int32)[None]


def _start(prefix: KeyValuePrefix | None) -> jax.Array | int:
    return 0 if prefix is None else prefix.starts


def positions_of(
    position_ids: jax.Array | None,
    input_ids: jax.Array | None,
    x: jax.Array,
    config: Any,
    positions: Positions,
    prefix: KeyValuePrefix | None = None,
) -> jax.Array:
    """The positions of `x (batch, length, features)`: as given, which is checked, or by the family's rule."""
    check_position_ids(position_ids, *x.shape[:2])
    return positions(input_ids, x.shape[1], config, prefix) if position_ids is None else position_ids


def run_encoder(
    modules: nnx.Dict, x: jax.Array, layer: Callable[[Any, jax.Array], jax.Array], options: Options, *, collect: bool
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Put `x` through all layers by `layer(module, x)`. Returns it and, if `collect`, what went into every layer."""
    x, _, entered = run(modules, x, lambda module, x, *_: (layer(module, x), None), options=options, collect=collect)
    return x, entered


@dataclass(frozen=True)
class Constant:
    """The initialiser of a parameter whose entries all begin at `value`."""

    value: float

    def __call__(self, key: jax.Array, shape: tuple[int, ...], dtype: Any, std: float) -> jax.Array:
        return jnp.full(shape, self.value, dtype)


class SelfAttention(nnx.Module):
    """Attention with projections of equal size; that of the result has the name `output`."""

    def __init__(self, features: int, heads: int, *, bias: bool = True, output: str = "o_proj"):
        self.q_proj = Linear(features, features, bias=bias)
        self.k_proj = Linear(features, features, bias=bias)
        self.v_proj = Linear(features, features, bias=bias)
        setattr(self, output, Linear(features, features))
        self.output, self.head_dim = output, features // heads

    def __call__(self, x: jax.Array, mask: AttentionMask) -> jax.Array:
        query, key, value = (split_heads(layer(x), self.head_dim) for layer in (self.q_proj, self.k_proj, self.v_proj))
        return getattr(self, self.output)(attend(query, key, value, mask))


class MLP(nnx.Module):
    """`fc2(act(fc1(x)))`."""

    def __init__(self, features: int, hidden: int, act: str):
        self.fc1 = Linear(features, hidden)
        self.fc2 = Linear(hidden, features)
        self.act = act

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.fc2(activation(self.act)(self.fc1(x)))


def output_layer(features: int, config: Any) -> tuple[nnx.Param | None, Linear | None]:
    """What scores the tokens of the vocabulary: a bias where the weight is the embedding's, or else a layer."""
    if config.tie_word_embeddings:
        return parameter((config.vocab_size,), zeros, whole("bias", (0,))), None
    return None, Linear(features, config.vocab_size)


def scores(x: jax.Array, embedding: Embed, bias: nnx.Param | None, layer: Linear | None) -> jax.Array:
    """`(..., features) -> (..., vocab)`, by one of the two that `output_layer` made."""
    if layer is not None:
        return layer(x)
    assert bias is not None
    return embedding.attend(x) + bias[...].astype(x.dtype)


def encoder_family(
    model_type: str,
    read_config: Callable[..., Any],
    name: str,
    prefix: str,
    *,
    base: Backbone,
    classifier: Backbone,
    masked_lm: Backbone,
    tied: Mapping[str, str],
    bare: Backbone | None = None,
    **fields: Any,
) -> Family:
    """The family of an encoder of text with the usual heads.

    `name`: what its classes are called in `transformers`, before `Model` or `ForMaskedLM`. `base` makes the bare
    model, `bare` that of the classes for tokens and answers if it is another, `classifier` and `masked_lm` the whole
    classes of those tasks. `tied`: of the latter.
    """
    bare = base if bare is None else bare
    tokens = partial(TokenClassification, backbone=bare, prefix=prefix, head="classifier")
    answers = partial(QuestionAnswering, backbone=bare, prefix=prefix)
    return Family(
        **{
            "model_type": model_type,
            "read_config": read_config,
            "prefix": prefix,
            "inputs": INPUTS,
            "architectures": {
                "base": Architecture(f"{name}Model", base),
                "sequence-classification": Architecture(f"{name}ForSequenceClassification", classifier),
                "token-classification": Architecture(f"{name}ForTokenClassification", tokens),
                "question-answering": Architecture(f"{name}ForQuestionAnswering", answers),
                "masked-lm": Architecture(f"{name}ForMaskedLM", masked_lm, tied=tied),
            },
            "new_heads": ("classifier", "pooler", "qa_outputs"),
            **fields,
        }
    )
