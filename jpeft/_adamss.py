"""AdaMSS's adaptive subspace allocation: which groups of outputs train, as an optax transform around an optimizer."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ._config import PeftType
from ._contract import config_class, wide_dtype
from ._params import Adapter, PeftParams
from ._train import trainable_mask

_A, _B, _LABELS, _RANKS = "adamss_A", "adamss_B", "adamss_labels", "adamss_ranks"
Factors = dict[str, jax.Array]


class Allocation(NamedTuple):
    """What is known of one module: which groups train, (*stack, groups), and moving averages like its factors."""

    active: jax.Array
    importance: Factors
    uncertainty: Factors


class AllocationState(NamedTuple):
    """step: of the next update, from 0. inner: the optimizer's state. modules: {adapter: {module: Allocation}}."""

    step: jax.Array
    inner: Any
    modules: dict[str, dict[str, Allocation]]


def adamss_allocation(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """AdaMSS's schedule around an optimizer: groups that matter least stop training, until few enough are left.

    For adapters of `AdamssConfig(use_asa=True)`: from step init_warmup to final_warmup, the first update being step 0,
    |w g| of each weight after the step and its change are averaged; every mask_interval steps the groups of the whole
    adapter whose averages multiply to most are kept, asa_target_subspaces + (all - asa_target_subspaces) *
    progress^asa_schedule_exponent of them, and the averages begin anew. Others move no more, whatever the optimizer
    does, and never train again. PEFT keeps one group less each time; here it is the number of the config.
    It takes the gradients of `jpeft.value_and_grad` and the wrapped parameters, not a half of them; the optimizer sees
    what trains alone. Under `jit` nothing is compiled again when groups stop. Raises ValueError if `init` gets
    half of the parameters or no such adapter, or `update` no parameters. https://openreview.net/forum?id=8ZdWmpYxT0

    >>> import jpeft
    >>> config = jpeft.AdamssConfig(r=2, num_subspaces=3, use_asa=True, target_modules=["query"])
    >>> wrapped = jpeft.wrap({"query": {"kernel": jnp.eye(6, 8)}}, config)
    >>> adamss_allocation(optax.sgd(0.1)).init(wrapped).modules["default"]["query"].active.tolist()
    [True, True, True]
    """

    trained = optax.masked(optimizer, trainable_mask)  # pyright: ignore[reportArgumentType]

    def init(params: PeftParams) -> AllocationState:
        modules = {name: _begun(adapter) for name, adapter in _allocated(params)}
        if not any(modules.values()):
            raise ValueError(
                f"the adapters are {list(params.adapters)}, and none has groups to choose among; expected one of "
                "jpeft.AdamssConfig(use_asa=True), or the optimizer itself"
            )
        return AllocationState(jnp.zeros((), jnp.int32), trained.init(params), modules)  # pyright: ignore[reportArgumentType]

    def update(
        grads: PeftParams, state: AllocationState, params: PeftParams | None = None
    ) -> tuple[PeftParams, AllocationState]:
        if params is None:
            raise ValueError("update got no parameters; expected tx.update(grads, state, params)")
        grads = _masked(grads, params, state)
        updates, inner = trained.update(grads, state.inner, params)  # pyright: ignore[reportArgumentType]
        updates = _masked(updates, params, state)  # pyright: ignore[reportArgumentType]
        modules = dict(state.modules)
        for name, adapter in _allocated(params):
            own = {
                path: _averaged(adapter, path, grads.adapters[name], updates.adapters[name], known, state.step)
                for path, known in modules[name].items()
            }
            modules[name] = _chosen(adapter, own, state.step)
        return updates, AllocationState(state.step + 1, inner, modules)

    return optax.GradientTransformation(init, update)  # pyright: ignore[reportArgumentType]


def _allocated(params: PeftParams) -> Iterator[tuple[str, Adapter]]:
    kind: Any = config_class(PeftType.ADAMSS)
    for name, adapter in params.adapters.items():
        config: Any = adapter.config
        if isinstance(config, kind) and config.use_asa:
            yield name, adapter


def _begun(adapter: Adapter) -> dict[str, Allocation]:
    for path, arrays in adapter.weights.items():
        if arrays[_LABELS] is None:
            raise ValueError(
                f"params hold no {_LABELS} at {path!r}: they are the trainable half of a partition; expected the "
                "wrapped parameters"
            )
    return {
        path: Allocation(
            jnp.ones(arrays[_RANKS].shape, bool),
            *({name: jnp.zeros(arrays[name].shape, wide_dtype(arrays[name].dtype)) for name in (_A, _B)} for _ in "iu"),
        )
        for path, arrays in adapter.weights.items()
    }


def _masked(tree: PeftParams, params: PeftParams, state: AllocationState) -> PeftParams:
    """Gradients or updates without those of groups that do not train."""
    adapters = dict(tree.adapters)
    for name, adapter in _allocated(params):
        weights = {path: dict(arrays) for path, arrays in tree.adapters[name].weights.items()}
        for path, known in state.modules[name].items():
            of_rows = jnp.take_along_axis(known.active, jnp.sort(adapter.weights[path][_LABELS], axis=-1), axis=-1)
            for part, mask in ((_A, known.active[..., None, None]), (_B, of_rows[..., None])):
                given = weights[path][part]
                weights[path][part] = jnp.where(mask, given, jnp.zeros_like(given))
        adapters[name] = dataclasses.replace(tree.adapters[name], weights=weights)
    return dataclasses.replace(tree, adapters=adapters)


def _within(config: Any, step: jax.Array) -> jax.Array:
    return (config.init_warmup <= step) & (step <= config.final_warmup)


def _averaged(
    adapter: Adapter, path: str, grads: Adapter, updates: Adapter, known: Allocation, step: jax.Array
) -> Allocation:
    config: Any = adapter.config
    within = _within(config, step)

    def moved(old: jax.Array, new: jax.Array, beta: float) -> jax.Array:
        return jnp.where(within, beta * old + (1 - beta) * new, old)

    importance, uncertainty = {}, {}
    for name in (_A, _B):
        old = known.importance[name]
        weight, step_of, gradient = (tree.weights[path][name].astype(old.dtype) for tree in (adapter, updates, grads))
        now = jnp.abs((weight + step_of) * gradient)
        uncertainty[name] = moved(known.uncertainty[name], jnp.abs(now - old), config.asa_uncertainty_beta)
        importance[name] = moved(old, now, config.asa_importance_beta)
    return known._replace(importance=importance, uncertainty=uncertainty)


def _scores(known: Allocation, arrays: dict[str, Any]) -> jax.Array:
    """The mean of both factors' importance times uncertainty, (*stack, groups)."""
    product = {name: known.importance[name] * known.uncertainty[name] for name in (_A, _B)}
    groups, dtype = known.active.shape[-1], product[_A].dtype
    of = jnp.sort(arrays[_LABELS], axis=-1)[..., None, :] == jnp.arange(groups, dtype=arrays[_LABELS].dtype)[:, None]
    ranks, sizes = arrays[_RANKS].astype(dtype), jnp.maximum(of.sum(-1), 1).astype(dtype)
    of_a = product[_A].sum((-1, -2)) / (ranks * product[_A].shape[-1])
    of_b = (of.astype(dtype) * product[_B].sum(-1)[..., None, :]).sum(-1) / (ranks * sizes)
    return of_a + of_b


def schedule(config: Any, total: int) -> Callable[[int], int]:
    """How many of `total` groups train after a step of the schedule."""

    def target(step: int) -> int:
        progress = 1.0 - (step - config.init_warmup) / (config.final_warmup - config.init_warmup)
        aim = config.asa_target_subspaces
        return int(aim + (total - aim) * progress**config.asa_schedule_exponent)

    return target


def _chosen(adapter: Adapter, modules: dict[str, Allocation], step: jax.Array) -> dict[str, Allocation]:
    """The modules with the groups that go on, and with averages begun anew, at a step that chooses; else themselves."""
    config: Any = adapter.config
    total = sum(known.active.size for known in modules.values())
    first = -(-config.init_warmup // config.mask_interval)
    steps = range(first * config.mask_interval, config.final_warmup + 1, config.mask_interval)
    if not steps:
        return modules
    targets = np.array([schedule(config, total)(each) for each in steps], np.int32)
    chooses = _within(config, step) & (step % config.mask_interval == 0)
    target = jnp.asarray(targets)[jnp.clip(step // config.mask_interval - first, 0, len(targets) - 1)]
    scores = [_scores(known, dict(adapter.weights[path])) for path, known in modules.items()]
    flat = jnp.concatenate(
        [jnp.where(known.active, own, -1).reshape(-1) for known, own in zip(modules.values(), scores, strict=True)]
    )
    places = jnp.argsort(jnp.argsort(-flat, stable=True), stable=True)
    kept = jnp.split(places < target, np.cumsum([own.size for own in scores])[:-1])
    return {
        path: Allocation(
            jnp.where(chooses, known.active & own.reshape(known.active.shape), known.active),
            *jax.tree.map(lambda old: jnp.where(chooses, 0, old).astype(old.dtype), known[1:]),
        )
        for (path, known), own in zip(modules.items(), kept, strict=True)
    }
