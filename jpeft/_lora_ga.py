"""LoRA-GA: Low-Rank Adaptation with Gradient Approximation (Wang et al., 2024, https://arxiv.org/abs/2407.05000).

A0 and B0 are singular vectors of the gradient of the weight, so that the first step of LoRA is near that of W itself.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from ._initial import adapter_to_initialise, linear_sites, over_stack, rank_and_scaling, weights_of, with_factors
from ._lift import lift
from ._params import PeftParams
from ._paths import fold_in_name, leaves_by_path, map_leaves
from ._quantized import as_dense
from ._sites import canonical


def lora_ga_gradients(
    wrapped: PeftParams, loss_fn: Callable[..., Any], batches: Iterable[Any], *, adapter_name: str = "default"
) -> dict[str, jax.Array]:
    """The mean over batches of a loss's gradient by the weights (*stack, in, out) that an adapter acts on, float32.

    loss_fn: called as `loss_fn(base parameters, batch)`, returns a scalar. Other weights get no gradient.
    Raises ValueError for no batches.

    >>> import jpeft
    >>> params = {"dense": {"kernel": jnp.ones((2, 2))}}
    >>> config = jpeft.LoraConfig(r=1, target_modules=["dense"], init_lora_weights="lora_ga")
    >>> loss = lambda p, x: (x @ p["dense"]["kernel"]).sum()
    >>> lora_ga_gradients(jpeft.wrap(params, config), loss, [jnp.array([[1.0, 2.0]])])["dense"]
    Array([[1., 1.],
           [2., 2.]], dtype=float32)
    """
    sites = linear_sites(adapter_to_initialise(wrapped, adapter_name, "lora_ga"))
    leaves = leaves_by_path(wrapped.base)
    targets = {site.leaf: as_dense(leaves[site.leaf]) for site in sites.values()}

    @jax.jit
    def gradient(targets: Mapping[str, Any], base: Any, batch: Any) -> dict[str, jax.Array]:
        def loss(targets: Mapping[str, Any]) -> jax.Array:
            chosen = map_leaves(lambda path, leaf: targets.get(path, leaf), base)
            return lift(loss_fn)(chosen, batch)

        return {path: leaf.astype(jnp.float32) for path, leaf in jax.grad(loss)(targets).items()}

    total, count = None, 0
    for batch in batches:
        found = gradient(targets, wrapped.base, batch)
        total, count = (found if total is None else jax.tree.map(jnp.add, total, found)), count + 1
    if total is None:
        raise ValueError("there are no batches; expected at least one")
    return {path: canonical(total[site.leaf], site.layout) / count for path, site in sites.items()}


def initialize_lora_ga_weights(
    wrapped: PeftParams,
    gradients: Mapping[str, jax.Array],
    *,
    rng: jax.Array | None = None,
    adapter_name: str = "default",
) -> PeftParams:
    """The same parameters with an adapter that starts from the singular vectors of its weights' gradients.

    wrapped: with an adapter of init_lora_weights="lora_ga", whose lora_ga_config says which vectors and how long.
    gradients: from `lora_ga_gradients`. rng: key for direction="random" (default: seed 0). What the adapted function
    computes stays as it is: only changes of the factors act. Saving makes plain LoRA of it.
    Raises ValueError for an adapter of another initialisation, missing or misshapen gradients, and layers with fewer
    than 2 r inputs or outputs.

    >>> import jpeft
    >>> params = {"dense": {"kernel": jnp.ones((2, 3))}}
    >>> config = jpeft.LoraConfig(r=1, target_modules=["dense"], init_lora_weights="lora_ga")
    >>> gradient = jnp.array([[5.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    >>> wrapped = initialize_lora_ga_weights(jpeft.wrap(params, config), {"dense": gradient})
    >>> abs(wrapped.adapters["default"].weights["dense"]["lora_A"])
    Array([[1., 0.]], dtype=float32)
    """
    adapter = adapter_to_initialise(wrapped, adapter_name, "lora_ga")
    config: Any = adapter.config
    sites = linear_sites(adapter)
    key = jax.random.key(0) if rng is None else rng
    factors = {}
    for path, weight in weights_of(wrapped, sites).items():
        site = sites[path]
        rank, scaling = rank_and_scaling(site, config)
        given = None if path not in gradients else jnp.shape(gradients[path])
        if given != weight.shape:
            raise ValueError(f"the gradient of {path!r} has shape {given}; expected {weight.shape}")
        if 2 * rank > min(site.in_features, site.out_features):
            raise ValueError(
                f"init_lora_weights='lora_ga' at {path!r}: r is {rank}; expected at most half of "
                f"{min(site.in_features, site.out_features)}, as A and B take {2 * rank} singular vectors"
            )
        order = jax.random.permutation(fold_in_name(key, path), 2 * rank)[:rank]

        def vectors(w: jax.Array, g: jax.Array, rank=rank, scaling=scaling, order=order) -> Any:
            return _factors(w, g.astype(w.dtype), rank, scaling, order, config.lora_ga_config)

        factors[path] = over_stack(vectors, site)(weight, jnp.asarray(gradients[path]))
    return with_factors(wrapped, adapter_name, factors, initial=True)


def _factors(
    w: jax.Array, gradient: jax.Array, rank: int, scaling: float, order: jax.Array, config: Any
) -> tuple[jax.Array, jax.Array]:
    # In PEFT's orientation: the gradient is (out, in) = u s vh.
    u, s, vh = jnp.linalg.svd(gradient.T, full_matrices=False)
    of_a, of_b = {
        "ArBr": (slice(1, 2 * rank, 2), slice(0, 2 * rank, 2)),
        "A2rBr": (slice(rank, 2 * rank), slice(0, rank)),
        "ArB2r": (slice(0, rank), slice(rank, 2 * rank)),
        "random": (order, order),
    }[config.direction]
    a, b = vh[of_a], u[:, of_b] * s[of_b]
    if config.scale == "stable":
        return a, b * (w.shape[1] ** 0.25 / config.stable_gamma**0.5)
    if config.scale == "gd_scale":
        return a / scaling, b / scaling
    if config.scale == "weight_svd":
        largest, first = jnp.linalg.norm(w, 2), s[of_b][0]
        return a, b * jnp.where(first > 0, largest / jnp.where(first > 0, first, 1), 1)
    return a, b
