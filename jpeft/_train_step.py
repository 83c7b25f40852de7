"""One step of training, made of a model's function, a loss and an optimizer; loops of one's own need none of it."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ._contract import wide_dtype
from ._lift import lift
from ._micro_batches import Gradient, averaged
from ._params import PeftParams, Rng
from ._quantized import Quantized, is_quantized
from ._train import combine, partition, trainable_mask
from ._train_state import TrainState, mesh_sharding, strong

Metrics = dict[str, jax.Array]
Apply = Callable[..., Any]
Loss = Callable[[Apply, PeftParams, Any], Any]
Arguments = tuple[list[Any], list[Any], Any, jax.Array, Rng | None, Any]

RESERVED = ("loss", "grad_norm")


@dataclasses.dataclass(frozen=True)
class TrainStep:
    """A compiled step: `state, metrics = step(state, batch)`. `lower` takes the same, or shapes in place of arrays."""

    compiled: Callable[..., Any]

    def __call__(self, state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        function, arguments, join = self._prepared(state, batch)
        (trained, opt_state, step), metrics = function(*arguments)
        return TrainState(join(trained), opt_state, step, state.rng), metrics

    def lower(self, state: TrainState, batch: Any) -> Any:
        """As `jax.jit(...).lower`: for `.compile()`, and with it for memory, FLOPs and the program's text."""
        function, arguments, _ = self._prepared(state, batch)
        return function.lower(*arguments)

    def _prepared(self, state: TrainState, batch: Any) -> tuple[Any, Arguments, Callable[[list[Any]], PeftParams]]:
        # Leaves alone pass into the program: to take trees of thousands apart in every step would take milliseconds.
        if not isinstance(state, TrainState):
            raise TypeError(f"state is a {type(state).__name__}; expected the TrainState of jpeft.train_state")
        leaves, structure = jax.tree.flatten(state.params)
        trains = _trains(structure)
        trained, frozen = _halves(leaves, trains)
        given, of_optimizer = jax.tree.flatten(state.opt_state)
        shardings = tuple(map(mesh_sharding, (*trained, *given, state.step)))
        function = self.compiled(structure, (of_optimizer, shardings) if any(shardings) else None)
        arguments = (trained, frozen, state.opt_state, state.step, state.rng, batch)
        return function, arguments, lambda new: structure.unflatten(_whole(new, frozen, trains))


@functools.lru_cache(maxsize=64)
def _trains(structure: Any) -> tuple[bool, ...]:
    """Which leaves of parameters of a structure train; raises as `jpeft.partition`."""
    numbered = structure.unflatten(range(structure.num_leaves))
    partition(numbered)
    return tuple(jax.tree.leaves(trainable_mask(numbered)))


def _halves(leaves: list[Any], trains: tuple[bool, ...]) -> tuple[list[Any], list[Any]]:
    return list(itertools.compress(leaves, trains)), [leaf for leaf, own in zip(leaves, trains, strict=True) if not own]


def _whole(trained: list[Any], frozen: list[Any], trains: tuple[bool, ...]) -> list[Any]:
    first, second = iter(trained), iter(frozen)
    return [next(first) if own else next(second) for own in trains]


def make_train_step(
    apply: Callable[..., Any],
    loss: Loss,
    tx: optax.GradientTransformation,
    *,
    accumulate: int = 1,
    weight: Callable[[Any], jax.Array] | None = None,
    clip_norm: float | None = None,
    compute_dtype: Any = None,
    donate: bool = True,
) -> TrainStep:
    """A compiled training step, `state, metrics = step(state, batch)`, for a state of `jpeft.train_state`.

    apply: the model's function of plain parameters, lifted here (one that is lifted already is as good).
    loss(apply, params, batch) -> a scalar, or a scalar and a dict of metrics: `apply` takes the wrapped `params` in the
    place of the plain ones. Terms of the adapter itself (`adalora_orthogonality_loss`) may be added. With the state's
    `rng`, `params` bring dropout a key that is new in every step and micro-batch, and the same after a restart:
    `fold_in(fold_in(rng, step), micro_batch)`; `params.context["rng"].key()` is it, for draws of the model's own.
    tx: an optax transform, not masked, as it sees what trains alone; those that look at more need a loop of your own
    (`osf_gradient_projection`, `adamss_allocation`, `adalora_rank_allocator`). One that wants `value=`, as
    `reduce_on_plateau`, gets the loss. Its state keeps its dtypes, and it runs under standard dtype promotion.
    `optax.MultiSteps` and `optax.apply_if_finite` (a step whose gradient is not finite changes nothing) go around it
    as ever.
    accumulate: micro-batches a step, one after the other: row i of the batch is in micro-batch i mod accumulate, so
    that each device keeps its rows. Arrays of the batch are split along the first axis; scalars go to all. Losses are
    taken for means over equally many; if they are not, say of tokens that count, weight(batch) -> a scalar, how many
    there are in a micro-batch. The gradient, the loss and floating-point metrics are then those of the whole batch
    (their sums are carried in float32 or wider); metrics of whole numbers are summed.
    clip_norm: the largest norm that the gradient of all that trains may have; longer ones are scaled down to it.
    compute_dtype: what wider floating-point leaves of the base, and of the batch, are cast to; quantised leaves
    dequantise to it. Adapters are cast where they meet such activations, and stay, as gradients and the optimizer's
    state do, in their own dtype. A base that is stored in it costs no copy.
    donate: whether the arrays that train, and the optimizer's state, are written in place: those of the state that was
    given are gone then. Base and frozen arrays are never copied, returned or given up.
    metrics: "loss", "grad_norm" (before clipping, float32 or wider), and those of the loss.

    Inside `jit`, `scan` and `vmap` it is part of the program; mapped over a population, each member has its own norm.
    Results lie on a mesh as the state did. Raises ValueError for settings out of range, for losses and metrics of
    another form, and for batches that `accumulate` does not divide; TypeError for a state that is none.

    >>> import jax, jax.numpy as jnp, jpeft, optax
    >>> params = {"dense": {"kernel": jnp.ones((4, 3))}}
    >>> wrapped = jpeft.wrap(params, jpeft.LoraConfig(r=2, target_modules=["dense"]), rng=jax.random.key(0))
    >>> def loss(apply, params, batch):
    ...     return jnp.mean((apply(params, batch["x"]) - batch["y"]) ** 2)
    >>> tx = optax.sgd(0.1)
    >>> model = lambda params, x: x @ params["dense"]["kernel"]
    >>> step = jpeft.make_train_step(model, loss, tx, accumulate=2, clip_norm=1.0)
    >>> state = jpeft.train_state(wrapped, tx)
    >>> state, metrics = step(state, {"x": jnp.ones((8, 4)), "y": jnp.zeros((8, 3))})
    >>> int(state.step), sorted(metrics), float(metrics["loss"])
    (1, ['grad_norm', 'loss'], 16.0)
    """
    if isinstance(accumulate, bool) or not isinstance(accumulate, int) or accumulate < 1:
        raise ValueError(f"accumulate is {accumulate!r}; expected a whole number of micro-batches, at least 1")
    if clip_norm is not None and not clip_norm > 0:
        raise ValueError(f"clip_norm is {clip_norm!r}; expected a norm above 0, or None for no bound")
    if compute_dtype is not None and not jnp.issubdtype(jnp.dtype(compute_dtype), jnp.floating):
        raise ValueError(f"compute_dtype is {jnp.dtype(compute_dtype)}; expected a floating-point dtype, or None")
    lifted, cast = lift(apply), functools.partial(_computed_in, compute_dtype)
    update = optax.with_extra_args_support(tx).update

    def gradient(trainable: PeftParams, frozen: PeftParams, rng: Rng | None, batch: Any) -> Gradient:
        def of_trainable(trainable: PeftParams) -> tuple[jax.Array, Metrics]:
            params = combine(trainable, frozen)
            params = params if rng is None else dataclasses.replace(params, context={**params.context, "rng": rng})
            return _checked(loss(lifted, params, batch))

        (value, metrics), grads = jax.value_and_grad(of_trainable, has_aux=True)(trainable)
        return Gradient(value, metrics, grads)

    def step(
        structure: Any,
        trained: list[Any],
        fixed: list[Any],
        opt_state: Any,
        step: jax.Array,
        rng: Rng | None,
        batch: Any,
    ) -> tuple[tuple[list[Any], Any, jax.Array], Metrics]:
        trainable, frozen = partition(structure.unflatten(_whole(trained, fixed, _trains(structure))))
        key = None if rng is None else jax.random.fold_in(rng.key(), step)
        computed = dataclasses.replace(frozen, base=jax.tree.map(cast, frozen.base, is_leaf=is_quantized))
        of_batch = functools.partial(gradient, trainable, computed)
        found = averaged(of_batch, trainable, key, jax.tree.map(cast, batch), accumulate, weight)
        norm = global_norm(found.grads)
        grads = _clipped(found.grads, norm, clip_norm)
        grads = jax.tree.map(lambda grad, array: grad.astype(array.dtype), grads, trainable)
        with jax.numpy_dtype_promotion("standard"):
            changed, new = _updated(update, grads, opt_state, trainable, found.loss)
        new = jax.tree.map(lambda fresh, old: strong(fresh).astype(old.dtype), new, opt_state)
        metrics = {**found.metrics, "loss": found.loss, "grad_norm": norm}
        return (jax.tree.leaves(changed), new, step + 1), metrics

    donated = (0, 2, 3) if donate else ()

    @functools.lru_cache(maxsize=16)
    def compiled(structure: Any, placed: Any) -> Any:
        # Said to the compiler, or a step could come out elsewhere than it went in, and the next one compile again.
        shardings = None if placed is None else (_results(*placed), None)
        return jax.jit(functools.partial(step, structure), donate_argnums=donated, out_shardings=shardings)

    return TrainStep(compiled)


def _results(of_optimizer: Any, shardings: tuple[Any, ...]) -> tuple[list[Any], Any, Any]:
    """The shardings of what trains, of the optimizer's state and of the step's number, which come in this order."""
    first = len(shardings) - of_optimizer.num_leaves - 1
    return list(shardings[:first]), of_optimizer.unflatten(shardings[first:-1]), shardings[-1]


def _updated(update: Any, grads: Any, opt_state: Any, trainable: Any, loss: jax.Array) -> tuple[Any, Any]:
    updates, opt_state = update(grads, opt_state, trainable, value=loss)
    return optax.apply_updates(trainable, updates), opt_state


def global_norm(grads: Any) -> jax.Array:
    """The Euclidean norm of all arrays as one vector, float32 or wider."""
    wide = [leaf.astype(wide_dtype(leaf.dtype)) for leaf in jax.tree.leaves(grads)]
    squares = [jnp.sum(jnp.square(jnp.abs(leaf))) for leaf in wide]
    return jnp.sqrt(sum(squares[1:], squares[0]))


def _clipped(grads: Any, norm: jax.Array, bound: float | None) -> Any:
    if bound is None:
        return grads
    factor = jnp.minimum(1.0, bound / norm)
    return jax.tree.map(lambda leaf: leaf * factor.astype(leaf.dtype), grads)


def _computed_in(dtype: Any, leaf: Any) -> Any:
    if dtype is None:
        return leaf
    dtype = jnp.dtype(dtype)
    if not jnp.issubdtype(leaf.dtype, jnp.floating) or jnp.dtype(leaf.dtype).itemsize <= dtype.itemsize:
        return leaf
    if isinstance(leaf, Quantized):
        return dataclasses.replace(leaf, dtype=dtype)
    return jnp.asarray(leaf).astype(dtype)


def _checked(returned: Any) -> tuple[jax.Array, Metrics]:
    value, metrics = returned if isinstance(returned, tuple) and len(returned) == 2 else (returned, {})
    value = jnp.asarray(value)
    if value.shape != () or not jnp.issubdtype(value.dtype, jnp.floating):
        raise ValueError(
            f"the loss returned {value.dtype} {value.shape}; expected a floating-point scalar, or that and a dict of "
            "metrics: take the mean over the batch"
        )
    if not isinstance(metrics, Mapping):
        raise ValueError(f"beside its value the loss returned a {type(metrics).__name__}; expected a dict of metrics")
    taken = [name for name in RESERVED if name in metrics]
    if taken:
        raise ValueError(f"the loss's metrics are {sorted(metrics)}; {', '.join(taken)} are the step's own names")
    metrics = {name: jnp.asarray(metric) for name, metric in metrics.items()}
    wrong = [name for name, metric in metrics.items() if not jnp.issubdtype(metric.dtype, jnp.number)]
    if wrong:
        raise ValueError(
            f"metric {wrong[0]!r} is {metrics[wrong[0]].dtype}; expected numbers: floating-point ones are averaged "
            "over micro-batches, whole ones summed"
        )
    return value, metrics
