"""What a model is trained to make small: the losses of `transformers`, as pure functions of scores and labels.

All are means, computed in float32 or wider. A label that is neither a class nor ignored makes a loss NaN: under jit
nothing can be raised for it, and PyTorch refuses it.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jpeft import chunked_cross_entropy

IGNORED = -100
"""The label of what is left out of a loss."""

ClassificationLoss = Callable[[ArrayLike, ArrayLike, str | None], jax.Array]
"""`(logits, labels, problem_type) -> loss`."""

PROBLEMS = ("regression", "single_label_classification", "multi_label_classification")
"""The values of `problem_type` in a config."""


def cross_entropy(logits: ArrayLike, labels: ArrayLike, *, ignore_index: int = IGNORED) -> jax.Array:
    """The mean of -log softmax(logits)[label] over all labels but those that are ignored; NaN if all are.

    logits: (..., classes). labels: whole numbers (...) in [0, classes), or ignore_index. The loss of masked and
    sequence-to-sequence language models and of token classification. Raises ValueError for other shapes or dtypes.

    >>> float(cross_entropy([[0.0, 0.0], [9.0, 1.0]], [1, -100])).__round__(4)
    0.6931
    """
    logits, labels = _wide(logits), jnp.asarray(labels)
    if labels.shape != logits.shape[:-1] or not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(
            f"labels are {labels.dtype} {labels.shape}; expected whole numbers {logits.shape[:-1]} for logits of the "
            f"shape {logits.shape}"
        )
    kept = labels != ignore_index
    known = (labels >= 0) & (labels < logits.shape[-1])
    picked = jnp.take_along_axis(logits, jnp.where(kept & known, labels, 0)[..., None], axis=-1)[..., 0]
    losses = jnp.where(known, jax.nn.logsumexp(logits, axis=-1) - picked, jnp.nan)
    return jnp.where(kept, losses, 0.0).sum() / kept.sum().astype(logits.dtype)


def causal_lm_loss(logits: ArrayLike, labels: ArrayLike) -> jax.Array:
    """`cross_entropy` of each token as the one that follows those before it.

    logits: (batch, length, vocab). labels: (batch, length), usually the input_ids, with -100 where no token counts;
    they are shifted here.
    """
    logits, labels = jnp.asarray(logits), jnp.asarray(labels)
    _check_rows(logits.shape[:-1], labels.shape, logits.shape)
    return cross_entropy(logits[..., :-1, :], labels[..., 1:])


def chunked_causal_lm_loss(
    hidden: jax.Array, scores: Callable[[jax.Array], jax.Array], labels: ArrayLike, chunk_size: int
) -> jax.Array:
    """`causal_lm_loss` of `scores(hidden)`, made of `chunk_size` tokens of each row at a time.

    hidden: (batch, length, features). labels: as there.
    """
    labels = jnp.asarray(labels)
    _check_rows(hidden.shape[:-1], labels.shape, (*hidden.shape[:-1], "vocab"))
    return chunked_cross_entropy(
        hidden[..., :-1, :], scores, labels[..., 1:], chunk_size=chunk_size, ignore_index=IGNORED
    )


def classification_loss(logits: ArrayLike, labels: ArrayLike, problem_type: str | None = None) -> jax.Array:
    """The loss of a classifier of sequences or images.

    logits: (batch, classes). labels and problem_type: "regression", numbers of that shape, or (batch,) for one class,
    and the mean of the squares; "single_label_classification", whole numbers (batch,), and `cross_entropy`;
    "multi_label_classification", (batch, classes) in [0, 1], and the binary cross entropy of each. None: regression
    for one class, a single label for whole numbers, else several. Raises ValueError for anything else.

    >>> float(classification_loss([[1.0], [3.0]], [1.0, 1.0]))
    2.0
    """
    logits, labels = _wide(logits), jnp.asarray(labels)
    if problem_type is None:
        whole = jnp.issubdtype(labels.dtype, jnp.integer)
        problem_type = PROBLEMS[0 if logits.shape[-1] == 1 else 1 if whole else 2]
    if problem_type not in PROBLEMS:
        raise ValueError(f"problem_type is {problem_type!r}; expected one of {', '.join(map(repr, PROBLEMS))}, or None")
    if problem_type == "single_label_classification":
        return cross_entropy(logits, labels.reshape(-1) if labels.ndim > 1 else labels)
    if logits.shape[-1] == 1 and labels.ndim == logits.ndim - 1:
        labels = labels[..., None]
    _check_rows(logits.shape, labels.shape, logits.shape)
    labels = labels.astype(logits.dtype)
    if problem_type == "regression":
        return jnp.square(logits - labels).mean()
    return (jax.nn.softplus(logits) - logits * labels).mean()


def soft_classification_loss(logits: ArrayLike, labels: ArrayLike, problem_type: str | None = None) -> jax.Array:
    """`classification_loss` as DeBERTa has it: without a problem_type, labels may be weights of the classes.

    Then labels (batch, classes) are summed up with -log softmax, all negative labels (batch,) are ignored, and if all
    of them are the loss is 0.
    """
    logits, labels = _wide(logits), jnp.asarray(labels)
    if problem_type is not None or logits.shape[-1] == 1:
        return classification_loss(logits, labels, problem_type)
    if labels.ndim > 1 and labels.shape[-1] > 1:
        _check_rows(logits.shape, labels.shape, logits.shape)
        return -(jax.nn.log_softmax(logits) * labels.astype(logits.dtype)).sum(axis=-1).mean()
    labels = labels.reshape(-1).astype(jnp.int32)
    loss = cross_entropy(logits, jnp.where(labels < 0, IGNORED, labels))
    return jnp.where((labels < 0).all(), 0.0, loss)


def question_answering_loss(
    start_logits: ArrayLike, end_logits: ArrayLike, start_positions: ArrayLike, end_positions: ArrayLike
) -> jax.Array:
    """The mean of two `cross_entropy`s: of the first token of each answer, and of the last.

    Scores (batch, length), positions (batch,) or (batch, 1); those past the end are ignored, those below 0 are 0.
    """

    def one(logits: ArrayLike, positions: ArrayLike) -> jax.Array:
        logits, positions = jnp.asarray(logits), jnp.asarray(positions)
        length = logits.shape[-1]
        positions = positions[..., 0] if positions.ndim > 1 else positions
        return cross_entropy(logits, jnp.clip(positions, 0, length), ignore_index=length)

    return (one(start_logits, start_positions) + one(end_logits, end_positions)) / 2


_TOKENS = ("masked-lm", "seq2seq-lm", "speech-seq2seq", "token-classification")
_WHOLES = ("sequence-classification", "image-classification")


def targets_of(task: str) -> tuple[str, ...]:
    """The inputs of which a model of the task computes its loss.

    >>> targets_of("question-answering"), targets_of("base")
    (('start_positions', 'end_positions'), ())
    """
    if task == "question-answering":
        return ("start_positions", "end_positions")
    return ("labels",) if task in ("causal-lm", *_TOKENS, *_WHOLES) else ()


def with_loss(
    output: Any, targets: Mapping[str, ArrayLike], task: str, classify: ClassificationLoss, problem_type: str | None
) -> Any:
    """The output of a model with its loss. classify: the family's. problem_type: the config's.

    Raises ValueError if a target is absent, and as the losses.
    """
    absent = [name for name in targets_of(task) if name not in targets]
    if absent:
        raise ValueError(f"got {', '.join(targets)}, but no {', '.join(absent)}; a loss needs both")
    if task == "question-answering":
        return replace(output, loss=question_answering_loss(output.start_logits, output.end_logits, **targets))
    labels = targets["labels"]
    if task in _WHOLES:
        return replace(output, loss=classify(output.logits, labels, problem_type))
    return replace(output, loss=(causal_lm_loss if task == "causal-lm" else cross_entropy)(output.logits, labels))


def decoder_inputs(labels: ArrayLike, start: int | None, pad: int | None) -> jax.Array:
    """The labels of a decoder as its input: moved on by one token, begun with `start`, `pad` for what is ignored.

    Raises ValueError if either is None.

    >>> decoder_inputs([[5, 6, -100]], 2, 1).tolist()
    [[2, 5, 6]]
    """
    if start is None or pad is None:
        raise ValueError(
            f"the config has decoder_start_token_id {start} and pad_token_id {pad}, with which labels become the "
            "decoder's input: give decoder_input_ids, or set both in config.json"
        )
    labels = jnp.asarray(labels)
    moved = jnp.concatenate([jnp.full_like(labels[:, :1], start), labels[:, :-1]], axis=1)
    return jnp.where(moved == IGNORED, pad, moved)


def _wide(logits: ArrayLike) -> jax.Array:
    logits = jnp.asarray(logits)
    return logits.astype(jnp.float32) if logits.dtype.itemsize < 4 else logits


def _check_rows(expected: tuple[int, ...], given: tuple[int, ...], logits: tuple[Any, ...]) -> None:
    if expected != given:
        raise ValueError(f"labels have the shape {given}; expected {expected} for logits of the shape {logits}")
