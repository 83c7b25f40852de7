"""CPT's loss: that of the labels in the context and in the text, later examples counting more."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from ._contract import wide_dtype
from ._virtual_labels import IGNORED


def cpt_loss(logits: ArrayLike, labels: ArrayLike, type_mask: ArrayLike, config: Any) -> jax.Array:
    """CPT's loss: the mean of -log softmax(logits)[label] of tokens by those before them, later examples counting more.

    logits: (rows, length, vocab). labels: whole numbers (rows, length), -100 where no token counts. type_mask: whole
    numbers (rows, length), in which the labels of an example are a multiple of four above zero, greater for later
    examples; both as `jpeft.with_virtual_tokens` makes them, as `labels` and `input_type_mask`. config: of the adapter;
    with `opt_weighted_loss_type="decay"` a label counts `opt_loss_decay_factor` to the power of how many examples of
    its row come after its own. The mean is over all labels, whatever they count; NaN if there are none. In float32 or
    wider.
    Raises ValueError for other shapes or dtypes. PEFT: `CPTEmbedding.calculate_loss`.

    >>> import jpeft
    >>> config = jpeft.CPTConfig(opt_weighted_loss_type="decay", opt_loss_decay_factor=0.5)
    >>> labels, types = [[-100, 1, -100, 1]], [[1, 4, 5, 8]]
    >>> float(cpt_loss(jnp.zeros((1, 4, 2)), labels, types, config)).__round__(4)
    0.5199
    """
    logits, labels, types = jnp.asarray(logits), jnp.asarray(labels), jnp.asarray(type_mask)
    shapes = {"labels": labels, "type_mask": types}
    wrong = [
        f"{name} are {array.dtype} {array.shape}"
        for name, array in shapes.items()
        if array.shape != logits.shape[:-1] or not jnp.issubdtype(array.dtype, jnp.integer)
    ]
    if wrong or logits.ndim != 3:
        raise ValueError(
            f"{', '.join(wrong) or 'logits'} for logits {logits.shape}; expected logits (rows, length, vocab), and "
            "whole numbers (rows, length)"
        )
    decays = config.opt_weighted_loss_type == "decay"
    return weighted_loss(logits, labels, label_weights(types, config.opt_loss_decay_factor) if decays else None)


def weighted_loss(logits: jax.Array, labels: jax.Array, weights: jax.Array | None = None) -> jax.Array:
    """`cpt_loss` of labels that count as much as the weights (rows, length) say."""
    logits = logits[:, :-1].astype(wide_dtype(logits.dtype))
    labels = labels[:, 1:]
    counts, known = labels != IGNORED, (labels >= 0) & (labels < logits.shape[-1])
    picked = jnp.take_along_axis(logits, jnp.where(known, labels, 0)[..., None], axis=-1)[..., 0]
    losses = jnp.where(known, jax.nn.logsumexp(logits, axis=-1) - picked, jnp.nan)
    losses = losses if weights is None else losses * weights[:, 1:].astype(losses.dtype)
    return jnp.where(counts, losses, 0.0).sum() / counts.sum().astype(losses.dtype)


def label_weights(types: jax.Array, factor: ArrayLike) -> jax.Array:
    """What each place (rows, length) counts: labels `factor` to how many examples come after theirs, the rest in full.

    factor: one, or one a row, (rows, 1). The first place, which nothing comes before, is no label.
    """
    own = jnp.where((types > 0) & (types % 4 == 0), types, 0).at[:, 0].set(0)

    def after(own: jax.Array) -> jax.Array:
        ordered = jnp.sort(own)
        first = (ordered > 0) & jnp.concatenate([jnp.ones(1, bool), ordered[1:] != ordered[:-1]])
        number = jnp.cumsum(first)
        return number[-1] - number[jnp.searchsorted(ordered, own, side="right") - 1]

    decay = jnp.asarray(factor, jnp.float32) ** jax.vmap(after)(own).astype(jnp.float32)
    return jnp.where(own > 0, decay, jnp.float32(1))
