"""EVA: Explained Variance Adaptation (Paischer et al., 2024, https://arxiv.org/abs/2410.07170).

A starts as the principal components of its layer's inputs, found by incremental PCA, and the ranks go to the layers
whose components explain most.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ._capture import capture_inputs
from ._contract import LINEAR, Site, method_of
from ._params import Adapter, PeftParams, Sites
from ._patterns import value_for
from ._wrap import checked_names, checked_params

MOST_PASSES = 100
"""Over the batches; PEFT goes on for ever."""

# Above it rho stands for "no limit", and the largest sizes of a weight are the limit.
LARGEST_RHO = 1000


def initialize_lora_eva_weights(
    wrapped: PeftParams,
    function: Callable[..., Any],
    batches: Iterable[Any],
    *,
    mask: Callable[[Any], Any] | None = None,
    adapter_name: str = "default",
) -> PeftParams:
    """The same parameters with an adapter that starts from the principal components of its layers' inputs.

    wrapped: with an adapter of init_lora_weights="eva". function: called as `function(base parameters, batch)`.
    batches: of inputs; gone through again and again until the components have converged. mask: a function from a batch
    to booleans (batch, tokens), False where inputs do not count; by default, of a dict, the attention_mask, without
    tokens whose label is eva_config's label_mask_value. Layers end up with other ranks, written to rank_pattern and
    alpha_pattern, or without an adapter; lora_B is zero. Layers that are no linear ones keep their initial values.
    Raises ValueError for an adapter of another initialisation, no batches, layers that get no inputs, too few of them
    or too narrow ones, stacks of layers with rho above 1, and components that do not converge.

    >>> import jpeft
    >>> params = {"dense": {"kernel": jnp.ones((3, 2))}}
    >>> wrapped = jpeft.wrap(params, jpeft.LoraConfig(r=1, target_modules=["dense"], init_lora_weights="eva"))
    >>> batch = jnp.array([[1.0, 2.0, 0.0], [-1.0, -2.0, 0.0], [3.0, 6.0, 0.0]])
    >>> wrapped = initialize_lora_eva_weights(wrapped, lambda p, x: x @ p["dense"]["kernel"], [batch])
    >>> np.asarray(wrapped.adapters["default"].weights["dense"]["lora_A"]).round(3)
    array([[0.447, 0.894, 0.   ]], dtype=float32)
    """
    (name,) = checked_names(checked_params(wrapped), adapter_name)
    adapter = wrapped.adapters[name]
    config: Any = adapter.config
    if getattr(config, "init_lora_weights", None) != "eva":
        raise ValueError(
            f"adapter {name!r} has init_lora_weights={getattr(config, 'init_lora_weights', None)!r}; expected 'eva'"
        )
    chosen = mask or (lambda batch: _token_mask(batch, config.eva_config))
    units = _units(adapter)
    capture = jax.jit(
        lambda wrapped, batch, kept: capture_inputs(function, wrapped, batch, mask=kept, adapter_name=name)[1]
    )

    def moments(batch: Any) -> dict[Unit, dict[str, Any]]:
        found = capture(wrapped, batch, chosen(batch))
        return {unit: _of_unit(found[unit[0]], adapter.sites[unit[0]], unit[1]) for unit in units}

    data = list(batches)
    if not data:
        raise ValueError("there are no batches; expected at least one")
    components = _components(units, moments, data, config)
    return dataclasses.replace(wrapped, adapters={**wrapped.adapters, name: _initialised(adapter, components)})


Unit = tuple[str, int]
"""(module path, index in its stack): what has components of its own."""


def _token_mask(batch: Any, eva_config: Any) -> Any:
    if not isinstance(batch, Mapping):
        return None
    kept = None if batch.get("attention_mask") is None else np.asarray(batch["attention_mask"]).astype(bool)
    if eva_config.use_label_mask and batch.get("labels") is not None:
        labelled = np.asarray(batch["labels"]) != eva_config.label_mask_value
        kept = labelled if kept is None else kept & labelled
    return kept


def _units(adapter: Adapter) -> dict[Unit, Site]:
    config: Any = adapter.config
    linear = {path: site for path, site in adapter.sites.items() if site.kind == LINEAR}
    stacked = [path for path, site in linear.items() if site.stack]
    if stacked and config.eva_config.rho > 1:
        raise ValueError(
            f"eva_config has rho={config.eva_config.rho}, which gives layers ranks of their own, but {stacked[0]!r} is "
            "a stack of layers; expected rho=1.0, or a model loaded with scan_layers=False"
        )
    return {(path, index): site for path, site in linear.items() for index in range(math.prod(site.stack))}


def _of_unit(found: Mapping[str, jax.Array], site: Site, index: int) -> dict[str, jax.Array]:
    depth = len(site.stack)
    return {name: array.reshape(-1, *array.shape[depth:])[index] for name, array in found.items()}


@dataclasses.dataclass
class _Pca:
    """Incremental PCA of one layer's inputs. count: the number of components that are followed."""

    count: int
    state: dict[str, jax.Array] | None = None
    converged: np.ndarray | None = None

    def update(self, moments: Mapping[str, jax.Array], tau: float) -> None:
        before, after = self.state, _updated(self.count, self.state, moments)
        if before is not None:
            # Both of unit length.
            cosines = (before["components"] * after["components"]).sum(1)
            self.converged = np.asarray(cosines) >= tau
        self.state = after


@functools.partial(jax.jit, static_argnums=0)
def _updated(count: int, state: Mapping[str, jax.Array] | None, new: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    return _first(count, new) if state is None else _next(count, state, new)


def _first(count: int, new: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    mean = new["sum"] / new["count"]
    scatter = new["outer"] - new["count"] * jnp.outer(mean, mean)
    return {"mean": mean, "seen": new["count"], "spread": jnp.trace(scatter), **_principal(scatter, count)}


def _next(count: int, state: Mapping[str, jax.Array], new: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """One step: the components so far, times their singular values, are rows beside the new, centred ones."""
    first = _first(count, new)
    seen = state["seen"] + new["count"]
    apart = state["mean"] - first["mean"]
    weight = state["seen"] / seen * new["count"]
    weighted = state["singular_values"][:, None] * state["components"]
    centred = new["outer"] - new["count"] * jnp.outer(first["mean"], first["mean"])
    gram = jnp.matmul(weighted.T, weighted, precision="highest") + centred + weight * jnp.outer(apart, apart)
    return {
        "mean": (state["mean"] * state["seen"] + new["sum"]) / seen,
        "seen": seen,
        "spread": state["spread"] + first["spread"] + weight * (apart**2).sum(),
        **_principal(gram, count),
    }


def _principal(gram: jax.Array, count: int) -> dict[str, jax.Array]:
    values, vectors = jnp.linalg.eigh(gram)
    components = vectors[:, ::-1][:, :count].T
    largest = jnp.take_along_axis(components, jnp.abs(components).argmax(1)[:, None], axis=1)
    return {
        "components": components * jnp.sign(largest),
        "singular_values": jnp.sqrt(jnp.maximum(values[::-1][:count], 0)),
    }


def _components(
    units: Mapping[Unit, Site], moments: Callable[[Any], Mapping[Unit, Any]], batches: list[Any], config: Any
) -> dict[Unit, np.ndarray]:
    """The components of each unit, as many as its share of the ranks."""
    ranks = {unit: value_for(unit[0], config.rank_pattern, config.r) for unit in units}
    limits = {unit: round(rank * _rho(units, config)) for unit, rank in ranks.items()}
    first = moments(batches[0])
    same = _same_inputs(first)
    for unit, leader in same.items():
        limits[leader] = max(limits[unit], limits[leader])
    limits.update({unit: limits[leader] for unit, leader in same.items()})
    for unit, site in units.items():
        if limits[unit] > site.in_features:
            raise ValueError(
                f"r times rho is {limits[unit]} at {unit[0]!r}, which has {site.in_features} inputs; expected at most "
                "that many: take a lower r, rank_pattern or rho"
            )
    followed = {unit: _Pca(limits[unit]) for unit in units if unit not in same}
    shares, done = dict(limits), dict.fromkeys(followed, False)
    for step, batch in enumerate(itertools.cycle(batches)):
        active = _still_active(followed, shares, done)
        if all(done.values()):
            break
        if step >= MOST_PASSES * len(batches):
            names = sorted({unit[0] for unit, is_done in done.items() if not is_done})
            raise ValueError(
                f"the components of {', '.join(names[:5])} have not converged after {MOST_PASSES} passes over the "
                "batches; expected more or larger batches, or a lower tau in eva_config"
            )
        found = moments(batch)
        for unit in active:
            if float(found[unit]["count"]) >= followed[unit].count:
                followed[unit].update(found[unit], config.eva_config.tau)
        unseen = [unit for unit, pca in followed.items() if pca.state is None]
        if unseen and step + 1 >= len(batches):
            counts = float(found[unseen[0]]["count"])
            raise ValueError(
                f"no batch gives {unseen[0][0]!r} the {followed[unseen[0]].count} inputs that its components need "
                f"(the last one: {counts:.0f}); expected larger batches, or a function that uses it"
            )
        if not unseen:
            shares = _shares(followed, same, sum(ranks.values()))
    return {unit: _taken(followed[same.get(unit, unit)], shares[unit], config) for unit in units}


def _rho(units: Mapping[Unit, Site], config: Any) -> float:
    rho = config.eva_config.rho
    if rho <= LARGEST_RHO:
        return rho
    return min(rho, max(max(site.in_features, site.out_features) for site in units.values()) // config.r)


def _same_inputs(moments: Mapping[Unit, Mapping[str, Any]]) -> dict[Unit, Unit]:
    """{unit: the first unit with the same inputs}, of those that are not the first themselves."""
    leaders: dict[bytes, Unit] = {}
    same = {}
    for unit, found in moments.items():
        leader = leaders.setdefault(np.asarray(found["sum"]).tobytes() + np.asarray(found["outer"]).tobytes(), unit)
        if leader != unit:
            same[unit] = leader
    return same


def _still_active(followed: Mapping[Unit, _Pca], shares: Mapping[Unit, int], done: dict[Unit, bool]) -> list[Unit]:
    """The units that need more data; one that has converged rests until its share of the ranks grows."""
    for unit, pca in followed.items():
        done[unit] = pca.converged is not None and bool(pca.converged[: shares[unit]].all())
    return [unit for unit, is_done in done.items() if not is_done]


def _shares(followed: Mapping[Unit, _Pca], same: Mapping[Unit, Unit], budget: int) -> dict[Unit, int]:
    """How many components each unit gets: over all units, those that explain the largest parts of the variance."""
    units = [*followed, *same]
    ratios = {}
    for unit in units:
        state = followed[same.get(unit, unit)].state
        assert state is not None
        ratios[unit] = np.asarray(state["singular_values"] ** 2 / state["spread"])
    owners = [unit for unit in units for _ in ratios[unit]]
    order = np.argsort(-np.concatenate([ratios[unit] for unit in units]), kind="stable")[:budget]
    counts = dict.fromkeys(units, 0)
    for index in order:
        counts[owners[index]] += 1
    for unit, leader in same.items():
        # What is followed for the leader has to reach as far as any that shares it.
        counts[unit], counts[leader] = sorted((counts[unit], counts[leader]))
    return counts


def _taken(pca: _Pca, rank: int, config: Any) -> np.ndarray:
    assert pca.state is not None
    components = np.asarray(pca.state["components"])[:rank]
    if config.eva_config.whiten:
        components = components / np.sqrt(np.asarray(pca.state["singular_values"])[:rank, None])
    return components


def _initialised(adapter: Adapter, components: Mapping[Unit, np.ndarray]) -> Adapter:
    """The adapter with its A's in their places, and with the ranks and scalings that follow."""
    config: Any = adapter.config
    ranks = {path: array.shape[0] for (path, _), array in components.items()}
    sites = {path: site for path, site in adapter.sites.items() if ranks.get(path, 1)}
    rank_pattern, alpha_pattern, weights = {}, {}, {}
    for path, site in sites.items():
        rank = value_for(path, config.rank_pattern, config.r)
        alpha = value_for(path, config.alpha_pattern, config.lora_alpha)
        weights[path] = adapter.weights[path]
        if path in ranks:
            if ranks[path] != rank and config.eva_config.adjust_scaling_factors:
                alpha *= ranks[path] / rank
            rank = ranks[path]
            dtype = weights[path]["lora_A"].dtype
            a = np.stack([components[path, index] for index in range(math.prod(site.stack))])
            weights[path] = {
                "lora_A": jnp.asarray(a.reshape(*site.stack, *a.shape[1:]), dtype),
                "lora_B": jnp.zeros((*site.stack, site.out_features, rank), weights[path]["lora_B"].dtype),
            }
        if rank != config.r:
            rank_pattern[path] = rank
        if alpha != config.lora_alpha:
            alpha_pattern[path] = alpha
    config = dataclasses.replace(
        config, target_modules=tuple(sites), rank_pattern=rank_pattern, alpha_pattern=alpha_pattern
    )
    scaling = method_of(config).scaling
    return dataclasses.replace(
        adapter,
        weights=weights,
        scaling={path: jnp.full(site.stack, scaling(site, config), jnp.float32) for path, site in sites.items()},
        config=config,
        sites=Sites(sites),
    )
