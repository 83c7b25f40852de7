"""AdaLoRA's schedule: which singular values stay, as pure functions, and what keeps the factors orthogonal.

Source: Zhang et al., 2023 (https://arxiv.org/abs/2303.10512, sections 3.2 and 3.3); steps and ties as in PEFT.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ._config import PeftType
from ._contract import config_class, wide_dtype, wider
from ._params import Adapter, PeftParams
from ._wrap import checked_params

A, B, E = "lora_A", "lora_B", "lora_E"


class AdaLoraState(NamedTuple):
    """What the allocator remembers.

    step: steps so far. sensitivity, uncertainty: {module path: {name: moving average, shaped like the array}}.
    kept: {module path: booleans (*stack, init_r)}: the singular values that the last allocation left.
    """

    step: jax.Array
    sensitivity: Any
    uncertainty: Any
    kept: dict[str, jax.Array]


class RankAllocator(NamedTuple):
    """init(wrapped) -> state; update(gradient, state, wrapped) -> (wrapped, state)."""

    init: Callable[[PeftParams], AdaLoraState]
    update: Callable[[Any, AdaLoraState, PeftParams], tuple[PeftParams, AdaLoraState]]


def adalora_rank_allocator(config: Any) -> RankAllocator:
    """AdaLoRA's allocation of ranks as two pure functions, like an optax transform, fit for `jit`.

    config: the adapter's AdaLoraConfig. Call `update` after every step of the optimizer, with the gradient that it
    took and the parameters that it made; the first call is step 1 of total_step. It averages |w dL/dw| and how much
    that varies, and masks the `lora_E` of the least important ranks: at every deltaT-th step between tinit and
    total_step - tfinal, and from then on for good. PEFT's `update_and_allocate(step)`, the steps counted from 1.
    Where nothing is to be taken away (init_r is target_r) nothing is masked; PEFT raises an error there.
    Raises TypeError for a config of another method; `init` and `update` raise ValueError unless exactly one active
    adapter is AdaLoRA's and trains.

    >>> import jax.numpy as jnp, jpeft
    >>> config = jpeft.AdaLoraConfig(init_r=3, target_r=1, total_step=10, target_modules=["query"])
    >>> wrapped = jpeft.wrap({"query": {"kernel": jnp.ones((4, 6))}}, config)
    >>> allocator = adalora_rank_allocator(config)
    >>> wrapped, state = allocator.update(wrapped, allocator.init(wrapped), wrapped)
    >>> int(state.step), state.kept["query"].shape
    (1, (3,))
    """
    if not isinstance(config, config_class(PeftType.ADALORA)):
        raise TypeError(f"config is {config!r}; expected a jpeft.AdaLoraConfig")
    return RankAllocator(_init, functools.partial(_update, config))


def _init(wrapped: PeftParams) -> AdaLoraState:
    weights = wrapped.adapters[_name(wrapped)].weights
    zeros = jax.tree.map(jnp.zeros_like, weights)
    kept = {path: jnp.ones(own[E].shape[:-1], bool) for path, own in weights.items()}
    return AdaLoraState(jnp.zeros((), jnp.int32), zeros, jax.tree.map(jnp.zeros_like, weights), kept)


def _update(config: Any, gradient: Any, state: AdaLoraState, wrapped: PeftParams) -> tuple[PeftParams, AdaLoraState]:
    name = _name(wrapped)
    adapter, step, last = wrapped.adapters[name], state.step + 1, config.total_step - config.tfinal
    averages = _averaged(config, adapter.weights, gradient.adapters[name].weights, state, step < last)
    allocates = ((step > config.tinit) & (step < last) & (step % config.deltaT == 0)) | (step == last)
    kept = _allocated(config, *averages, step)
    kept = {path: jnp.where(allocates, kept[path], old) for path, old in state.kept.items()}
    masked = allocates | (step > last)
    weights = {
        path: {**own, E: jnp.where(masked & ~kept[path][..., None], 0, own[E])} for path, own in adapter.weights.items()
    }
    adapters = {**wrapped.adapters, name: dataclasses.replace(adapter, weights=weights)}
    return dataclasses.replace(wrapped, adapters=adapters), AdaLoraState(step, *averages, kept)


def _averaged(config: Any, weights: Any, gradient: Any, state: AdaLoraState, grows: jax.Array) -> tuple[Any, Any]:
    """The moving averages of sensitivity and uncertainty (equations 9 and 10), as they were after the last step."""

    def sensitivity(w: jax.Array, g: jax.Array, old: jax.Array) -> jax.Array:
        return jnp.where(grows, config.beta1 * old + (1 - config.beta1) * jnp.abs(w * g.astype(w.dtype)), old)

    def uncertainty(w: jax.Array, g: jax.Array, mean: jax.Array, old: jax.Array) -> jax.Array:
        distance = jnp.abs(jnp.abs(w * g.astype(w.dtype)) - mean)
        return jnp.where(grows, config.beta2 * old + (1 - config.beta2) * distance, old)

    means = jax.tree.map(sensitivity, weights, gradient, state.sensitivity)
    return means, jax.tree.map(uncertainty, weights, gradient, means, state.uncertainty)


def _allocated(config: Any, sensitivity: Any, uncertainty: Any, step: jax.Array) -> dict[str, jax.Array]:
    """The singular values that stay at a step: those above the score that the budget asks for, of all modules."""
    scores = {}
    for path, own in jax.tree.map(jnp.multiply, sensitivity, uncertainty).items():
        # Equation 8: of a singular value, and the means over its two vectors.
        scores[path] = own[E][..., 0] + own[A].mean(-1) + own[B].mean(-2)
    ordered = jnp.sort(jnp.concatenate([score.reshape(-1) for score in scores.values()]))
    modules = sum(score.size // score.shape[-1] for score in scores.values())
    budgets = jnp.asarray(_budgets(config, ordered.size, config.target_r * modules))
    removed = ordered.size - budgets[jnp.minimum(step, config.total_step)]
    threshold = jnp.where(removed > 0, ordered[removed - 1], -jnp.inf)
    return {path: score > threshold for path, score in scores.items()}


@functools.lru_cache(maxsize=8)
def _budgets(config: Any, first: int, last: int) -> np.ndarray:
    """How many singular values may stay at each step: a cubic decrease (equation 12), in float64 as in PEFT."""
    span = config.total_step - config.tfinal - config.tinit

    def budget(step: int) -> int:
        left = min(max(1 - (step - config.tinit) / span, 0.0), 1.0)
        return int((first - last) * left**3 + last)

    return np.array([budget(step) for step in range(config.total_step + 1)], np.int32)


def adalora_orthogonality_loss(wrapped: PeftParams) -> jax.Array:
    """What AdaLoRA adds to the loss: a scalar, float32 or wider.

    The mean of |A A^T - 1| and |B^T B - 1| over all modules of an adapter, times its orth_reg_weight (equation 4);
    adapters of other methods add nothing. wrapped: from `jpeft.wrap`. In PEFT the model adds it to a loss of its own.

    >>> import jax.numpy as jnp, jpeft
    >>> config = jpeft.AdaLoraConfig(total_step=10, target_modules=["query"])
    >>> adalora_orthogonality_loss(jpeft.wrap({"query": {"kernel": jnp.eye(4)}}, config)).shape
    ()
    """
    kind, total = config_class(PeftType.ADALORA), jnp.zeros((), jnp.float32)
    adapters = [checked_params(wrapped).adapters[name] for name in wrapped.active]
    for config, weights in ((a.config, a.weights) for a in adapters if isinstance(a.config, kind)):
        distances = [_distance(rows) for own in weights.values() for rows in (own[A], jnp.swapaxes(own[B], -1, -2))]
        count, summed = sum(d.size for d in distances), functools.reduce(jnp.add, (d.sum() for d in distances))
        loss = getattr(config, "orth_reg_weight") * summed / count  # noqa: B009 (a config of this kind has it)
        total = total.astype(wider(total.dtype, loss.dtype)) + loss
    return total


def _distance(rows: jax.Array) -> jax.Array:
    """|R R^T - 1| of rows (*stack, r, size): (*stack)."""
    rows = rows.astype(wide_dtype(rows.dtype))
    gram = jnp.matmul(rows, jnp.swapaxes(rows, -1, -2), precision="highest")
    squares = jnp.sum((gram - jnp.eye(gram.shape[-1], dtype=gram.dtype)) ** 2, axis=(-1, -2))
    # The root has no derivative at zero, where it is least.
    return jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1)), 0)


def adalora_sliced(wrapped: PeftParams, state: AdaLoraState) -> PeftParams:
    """The parameters with nothing but the ranks that the last allocation left, as PEFT saves them.

    The ranks, which then differ from module to module, are in the config's rank_pattern; without an allocation nothing
    changes. Not under `jit`, as shapes depend on values. Raises ValueError for modules stacked in one leaf, whose
    ranks cannot differ, and unless exactly one active adapter is AdaLoRA's and trains.

    >>> import jax.numpy as jnp, jpeft
    >>> config = jpeft.AdaLoraConfig(init_r=2, total_step=10, target_r=1, target_modules=["query"])
    >>> wrapped = jpeft.wrap({"query": {"kernel": jnp.ones((4, 6))}}, config)
    >>> state = adalora_rank_allocator(config).init(wrapped)._replace(kept={"query": jnp.array([True, False])})
    >>> adalora_sliced(wrapped, state).adapters["default"].weights["query"]["lora_B"].shape
    (6, 1)
    """
    name = _name(wrapped)
    adapter, kept = wrapped.adapters[name], {path: np.asarray(own) for path, own in state.kept.items()}
    if all(own.all() for own in kept.values()):
        return wrapped
    stacked = [path for path, site in adapter.sites.items() if site.stack]
    if stacked:
        raise ValueError(
            f"the layers of {stacked[0]!r} are stacked in one leaf and cannot have different ranks; load the model "
            "with scan_layers=False, or save the adapter as it is: what is masked is zero in its lora_E"
        )
    weights = {
        path: {A: own[A][kept[path]], E: own[E][kept[path]], B: own[B][:, kept[path]]}
        for path, own in adapter.weights.items()
    }
    pattern = {f"{path}.{E}": own.tolist() for path, own in kept.items()}
    config: Any = dataclasses.replace(adapter.config, rank_pattern=pattern)  # pyright: ignore[reportCallIssue]
    sliced = dataclasses.replace(adapter, weights=weights, config=config)
    return dataclasses.replace(wrapped, adapters={**wrapped.adapters, name: sliced})


def _name(wrapped: PeftParams) -> str:
    kind = config_class(PeftType.ADALORA)

    def trains(adapter: Adapter) -> bool:
        return isinstance(adapter.config, kind) and not adapter.config.inference_mode

    names = [name for name in checked_params(wrapped).active if trains(wrapped.adapters[name])]
    if len(names) != 1:
        raise ValueError(f"the active adapters of AdaLoRA that train are {names}; expected exactly one")
    return names[0]
