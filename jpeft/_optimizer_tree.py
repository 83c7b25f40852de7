"""What optimizers need of the tree of wrapped parameters: LoRA's pairs of factors, and labels for its leaves."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ._contract import Site, method_of, wide_dtype
from ._low_rank import as_arrays, as_matrices
from ._params import Adapter, PeftParams
from ._stacks import layer_paths
from ._train import trainable_mask

FROZEN = "frozen"


class Pair(NamedTuple):
    """The factors of one module, (*stack, rank, inputs) and (*stack, outputs, rank), and their gradients."""

    a: jax.Array
    b: jax.Array
    grad_a: jax.Array
    grad_b: jax.Array
    scaling: jax.Array


def on_pairs(
    change: Callable[[Pair], tuple[jax.Array, jax.Array]], kinds: tuple[str, ...], required: bool = False
) -> optax.GradientTransformation:
    """A transform that puts other gradients in the place of those of LoRA's pairs in modules of these kinds."""

    def init(params: PeftParams) -> optax.EmptyState:
        if required and not any(_pairs(adapter, kinds) for adapter in trainable_mask(params).adapters.values()):
            raise ValueError(
                "no pair of LoRA's factors of a linear layer trains, so that there is nothing to precondition: wrap "
                "with a jpeft.LoraConfig, activate it with jpeft.set_adapter, or use the optimizer itself"
            )
        return optax.EmptyState()

    def update(grads: PeftParams, state: optax.EmptyState, params: PeftParams | None = None) -> tuple[PeftParams, Any]:
        if params is None:
            raise ValueError("update got no parameters; expected tx.update(grads, state, params)")
        adapters = dict(grads.adapters)
        for name, mask in trainable_mask(params).adapters.items():
            own, found = params.adapters[name], adapters[name]
            changed = {path: _changed(change, own, found, path) for path in _pairs(mask, kinds)}
            adapters[name] = dataclasses.replace(found, weights={**found.weights, **changed})
        return dataclasses.replace(grads, adapters=adapters), state

    return optax.GradientTransformation(init, update)  # pyright: ignore[reportArgumentType]


def _pairs(mask: Adapter, kinds: tuple[str, ...]) -> list[str]:
    """The modules whose two factors train."""
    trained = {path for path, own in mask.weights.items() if own.get("lora_A") and own.get("lora_B")}
    return [path for path, site in mask.sites.items() if path in trained and site.kind in kinds]


def _changed(
    change: Callable[[Pair], tuple[jax.Array, jax.Array]], params: Adapter, grads: Adapter, path: str
) -> dict[str, Any]:
    site, found = params.sites[path], grads.weights[path]
    scaling = params.scaling[path]
    # Not in the trainable half of a partition.
    scaling = method_of(params.config).scaling(site, params.config) if scaling is None else scaling
    wide = wide_dtype(found["lora_B"].dtype)
    a, b = (each.astype(wide) for each in as_matrices(params.weights[path], site))
    grad_a, grad_b = (each.astype(wide) for each in as_matrices(found, site))
    with jax.default_matmul_precision("highest"):
        a, b = change(Pair(a, b, grad_a, grad_b, jnp.asarray(scaling, wide)[..., None, None]))
    new = as_arrays(a, b, site)
    return {**found, **{name: array.astype(found[name].dtype) for name, array in new.items()}}


def marked(
    params: PeftParams,
    label: Callable[[Site | None, str, int], str],
    of_replaced: Callable[[str, int], str],
) -> PeftParams:
    """The tree with a label at each leaf: `FROZEN`, or what the functions say, which also get the number of axes."""
    mask = trainable_mask(params)

    def one(trains: Any, array: Any, own: Callable[[int], str], stack: int) -> Any:
        return jax.tree.map(lambda trains, leaf: own(jnp.ndim(leaf) - stack) if trains else FROZEN, trains, array)

    def of(adapter: Adapter, mask: Adapter) -> Adapter:
        def site_labels(site: Site | None, arrays: Mapping[str, Any], trains: Mapping[str, Any]) -> dict[str, Any]:
            stack = 0 if site is None else len(site.stack)
            return {
                name: one(trains[name], array, lambda axes, name=name: label(site, name, axes), stack)
                for name, array in arrays.items()
            }

        return dataclasses.replace(
            adapter,
            weights={
                path: site_labels(adapter.sites.get(path), arrays, mask.weights[path])
                for path, arrays in adapter.weights.items()
            },
            shared=site_labels(None, adapter.shared, mask.shared),
            replaced={
                path: one(
                    mask.replaced[path],
                    leaf,
                    lambda axes, path=path: of_replaced(path, axes),
                    0 if layer_paths(path) is None else 1,
                )
                for path, leaf in adapter.replaced.items()
            },
            scaling=jax.tree.map(lambda _: FROZEN, mask.scaling),
        )

    adapters = {name: of(adapter, mask.adapters[name]) for name, adapter in params.adapters.items()}
    base, context = jax.tree.map(lambda _: FROZEN, (mask.base, mask.context))
    return dataclasses.replace(mask, base=base, adapters=adapters, context=context)
