"""Cross-entropy over large vocabularies without the scores of all tokens at once."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ._contract import wide_dtype
from ._lift import DIFFERENTIATED_THROUGH

Head = Callable[[jax.Array], jax.Array]


def chunked_cross_entropy(
    hidden: jax.Array,
    head: jax.Array | Head,
    labels: Any,
    *,
    chunk_size: int = 512,
    weights: Any = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> jax.Array:
    """The cross-entropy of `head(hidden)`, made chunk by chunk, in the backward pass too: a scalar, float32 or wider.

    hidden: (..., length, features), the input of the output layer. head: a kernel (features, vocab), such as
    `embedding.T`, or a function of a chunk (..., chunk, features) that gives its scores (..., chunk, vocab), with what
    bias or soft-capping there is; it may close over parameters, which get their gradients.
    labels: whole numbers (..., length) in [0, vocab), or ignore_index for what does not count; any other makes the loss
    NaN. To predict the next token, shift them: `hidden[:, :-1], head, ids[:, 1:]`.
    chunk_size: the most positions of the length at once; chunks are of one size, and a last, shorter one is filled up.
    The other axes are not cut, so that a batch stays where it lies on a mesh.
    weights: of the labels, (..., length), without a gradient. reduction: "mean", the weighted mean, NaN if nothing
    counts, or "sum".

    A chunk's gradient is made beside its loss, so that nothing is computed twice; if the output layer is adapted and
    lifted, the chunk's scores are made again in the backward pass. Forward-mode differentiation is refused by JAX.
    Raises ValueError for shapes, labels or settings of another kind.

    >>> import jax, jax.numpy as jnp, jpeft, optax
    >>> hidden = jax.random.normal(jax.random.key(0), (2, 6, 4))
    >>> head = jax.random.normal(jax.random.key(1), (4, 9))
    >>> labels = jnp.array([[1, 2, 3, 4, 5, 6], [0, 0, 8, 8, -100, -100]])
    >>> loss = jpeft.chunked_cross_entropy(hidden, head, labels, chunk_size=2)
    >>> whole = optax.softmax_cross_entropy_with_integer_labels(hidden @ head, jnp.maximum(labels, 0))
    >>> bool(jnp.allclose(loss, whole[labels >= 0].mean()))
    True
    """
    hidden, labels = jnp.asarray(hidden), jnp.asarray(labels)
    weights = None if weights is None else lax.stop_gradient(jnp.asarray(weights))
    _check(hidden, head, labels, chunk_size, weights, reduction)
    kept = labels != ignore_index
    wide = wide_dtype(hidden.dtype)
    shares = kept.astype(wide) if weights is None else jnp.where(kept, weights.astype(wide), 0)
    cut = functools.partial(_chunks, axis=labels.ndim - 1, size=chunk_size)
    chunks = (cut(hidden), cut(jnp.where(kept, labels, 0)), cut(shares))
    scores = head if callable(head) else lambda h: h @ head.astype(h.dtype)
    # What the head closes over becomes arguments, so that its gradient can be asked for.
    converted, closed = jax.closure_convert(scores, jax.ShapeDtypeStruct(chunks[0].shape[1:], hidden.dtype))
    total: Any = _summed(functools.partial(_chunk_loss, converted), tuple(closed), *chunks)
    return total if reduction == "sum" else total / shares.sum()


def _chunk_loss(
    scores: Callable[..., jax.Array], closed: tuple[Any, ...], hidden: jax.Array, labels: jax.Array, shares: jax.Array
) -> jax.Array:
    logits = scores(hidden, *closed)
    logits = logits.astype(wide_dtype(logits.dtype))
    known = (labels >= 0) & (labels < logits.shape[-1])
    picked = jnp.take_along_axis(logits, jnp.where(known, labels, 0)[..., None], axis=-1)[..., 0]
    losses = jnp.where(known, jax.nn.logsumexp(logits, axis=-1) - picked, jnp.nan)
    return jnp.sum(jnp.where(shares == 0, 0, losses * shares.astype(losses.dtype)))


ChunkLoss = Callable[[tuple[Any, ...], jax.Array, jax.Array, jax.Array], jax.Array]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _summed(loss: ChunkLoss, closed: tuple[Any, ...], hidden: jax.Array, labels: jax.Array, shares: jax.Array) -> Any:
    """The sum of the losses of chunks (chunks, ..., size, features), (chunks, ..., size)."""

    def through(closed: tuple[Any, ...], hidden: jax.Array, labels: jax.Array, shares: jax.Array) -> jax.Array:
        def add(total: jax.Array, chunk: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
            return total + jax.checkpoint(loss, prevent_cse=False)(closed, *chunk), None

        return lax.scan(add, jnp.zeros((), shares.dtype), (hidden, labels, shares))[0]

    through.__name__ = DIFFERENTIATED_THROUGH
    return jax.jit(through)(closed, hidden, labels, shares)


def _forward(loss: ChunkLoss, closed: Any, hidden: Any, labels: Any, shares: Any) -> tuple[Any, tuple[Any, ...]]:
    wanted = [leaf.perturbed for leaf in closed]
    values = [leaf.value for leaf in closed]
    rest = [None if want else value for want, value in zip(wanted, values, strict=True)]

    def add(state: tuple[jax.Array, list[jax.Array]], chunk: tuple[jax.Array, ...]) -> tuple[Any, jax.Array]:
        def of(own: list[jax.Array], hidden: jax.Array) -> jax.Array:
            given = iter(own)
            return loss(tuple(next(given) if value is None else value for value in rest), hidden, *chunk[1:])

        total, sums = state
        value, pull = jax.vjp(of, trained, chunk[0])
        changes, change = pull(jnp.ones_like(value))
        sums = [own + each.astype(own.dtype) for own, each in zip(sums, changes, strict=True)]
        return (total + value, sums), change

    trained = [value for want, value in zip(wanted, values, strict=True) if want]
    zeros = [jnp.zeros_like(value, dtype=wide_dtype(value.dtype)) for value in trained]
    start = (jnp.zeros((), shares.value.dtype), zeros)
    (total, sums), changes = lax.scan(add, start, (hidden.value, labels.value, shares.value))
    sums = iter(own.astype(value.dtype) for own, value in zip(sums, trained, strict=True))
    return total, (tuple(next(sums) if want else None for want in wanted), changes)


def _backward(loss: ChunkLoss, saved: tuple[Any, ...], cotangent: Any) -> tuple[Any, ...]:
    sums, changes = saved
    scaled = [None if own is None else own * cotangent.astype(own.dtype) for own in sums]
    return tuple(scaled), changes * cotangent.astype(changes.dtype), None, None


_summed.defvjp(_forward, _backward, symbolic_zeros=True)


def _chunks(array: jax.Array, *, axis: int, size: int) -> jax.Array:
    """An axis cut into a first axis of chunks, of one size, with zeros at the end."""
    length = array.shape[axis]
    count = -(-length // size)
    size = -(-length // count)
    array = jnp.pad(array, [(0, count * size - length if place == axis else 0) for place in range(array.ndim)])
    array = jnp.reshape(array, (*array.shape[:axis], count, size, *array.shape[axis + 1 :]))
    return jnp.moveaxis(array, axis, 0)


def _check(hidden: jax.Array, head: Any, labels: jax.Array, size: Any, weights: Any, reduction: str) -> None:
    if hidden.ndim < 2 or not jnp.issubdtype(hidden.dtype, jnp.floating):
        raise ValueError(f"hidden is {hidden.dtype} {hidden.shape}; expected floating-point (..., length, features)")
    if labels.shape != hidden.shape[:-1] or not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(
            f"labels are {labels.dtype} {labels.shape}; expected whole numbers {hidden.shape[:-1]} for hidden "
            f"{hidden.shape}"
        )
    if not callable(head) and (jnp.ndim(head) != 2 or jnp.shape(head)[0] != hidden.shape[-1]):
        raise ValueError(
            f"head is an array {jnp.shape(head)}; expected a kernel ({hidden.shape[-1]}, vocab), of a tied embedding "
            "its transpose, or a function of a chunk of hidden"
        )
    if weights is not None and weights.shape != labels.shape:
        raise ValueError(f"weights have the shape {weights.shape}; expected {labels.shape}, one for each label")
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ValueError(f"chunk_size is {size!r}; expected a whole number of positions, at least 1")
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction is {reduction!r}; expected 'mean' or 'sum'")
