"""CorDA: Context-Oriented Decomposition Adaptation (Yang et al., 2024, https://arxiv.org/abs/2406.05223).

With C the covariance of a layer's inputs, W^T C = U S V^T; A0 and B0 are its first or last terms, C taken out again.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from ._capture import capture_inputs
from ._initial import adapter_to_initialise, linear_sites, over_stack, rank_and_scaling, weights_of, with_factors
from ._params import PeftParams

# PEFT's: the share of the mean variance that is added to all, doubled until the inverse is as good as this.
DAMPING, LARGEST_INVERSION_ERROR = 0.01, 0.05


def corda_covariances(
    wrapped: PeftParams,
    function: Callable[..., Any],
    batches: Iterable[Any],
    *,
    mask: Callable[[Any], Any] | None = None,
    adapter_name: str = "default",
) -> dict[str, jax.Array]:
    """The covariances (*stack, in, in) of the inputs of an adapter's linear layers: the mean over calls.

    function: called as `function(base parameters, batch)`. Each call's inputs are divided by their largest entry.
    mask: a function from a batch to booleans (batch, tokens), False where inputs do not count. They depend on no rank:
    save them to use them again. Raises ValueError for no batches and for layers without inputs, or with ones that are
    not finite.

    >>> import jpeft
    >>> params = {"dense": {"kernel": jnp.ones((2, 2))}}
    >>> config = jpeft.LoraConfig(r=1, target_modules=["dense"], init_lora_weights="corda")
    >>> batches = [jnp.array([[1.0, 2.0]]), jnp.array([[4.0, 0.0]])]
    >>> corda_covariances(jpeft.wrap(params, config), lambda p, x: x @ p["dense"]["kernel"], batches)["dense"]
    Array([[0.625, 0.25 ],
           [0.25 , 0.5  ]], dtype=float32)
    """
    adapter_to_initialise(wrapped, adapter_name, "corda")

    @jax.jit
    def capture(wrapped: PeftParams, batch: Any, kept: Any) -> Any:
        settings = {"statistic": "normalised_moments", "mask": kept, "adapter_name": adapter_name}
        return capture_inputs(function, wrapped, batch, **settings)[1]

    total: Any = None
    for batch in batches:
        found = capture(wrapped, batch, None if mask is None else mask(batch))
        total = found if total is None else jax.tree.map(jnp.add, total, found)
    if total is None:
        raise ValueError("there are no batches; expected at least one")
    covariances = {path: found["outer"] / found["calls"][..., None, None] for path, found in total.items()}
    for path, covariance in covariances.items():
        if not jnp.isfinite(covariance).all():
            raise ValueError(
                f"the covariance of the inputs of {path!r} is not finite; expected a function that uses it, with "
                "finite inputs whose largest entry is not 0"
            )
    return covariances


def initialize_lora_corda_weights(
    wrapped: PeftParams, covariances: Mapping[str, jax.Array], *, adapter_name: str = "default"
) -> PeftParams:
    """The same parameters with an adapter that starts from the context-oriented decomposition of its weights.

    wrapped: with an adapter of init_lora_weights="corda", whose corda_config says which method. covariances: from
    `corda_covariances`. What the adapted function computes stays as it is: only changes of the factors act. Saving
    makes plain LoRA of it. Raises ValueError for an adapter of another initialisation, missing or misshapen
    covariances, and ranks above a layer's sizes.

    >>> import jpeft
    >>> params = {"dense": {"kernel": jnp.array([[3.0, 0.0], [0.0, 1.0]])}}
    >>> config = jpeft.LoraConfig(r=1, lora_alpha=1, target_modules=["dense"], init_lora_weights="corda")
    >>> wrapped = initialize_lora_corda_weights(jpeft.wrap(params, config), {"dense": jnp.eye(2)})
    >>> abs(wrapped.adapters["default"].weights["dense"]["lora_A"]).round(1) > 1.5
    Array([[ True, False]], dtype=bool)
    """
    adapter = adapter_to_initialise(wrapped, adapter_name, "corda")
    config: Any = adapter.config
    sites = linear_sites(adapter)
    factors = {}
    for path, weight in weights_of(wrapped, sites).items():
        site = sites[path]
        rank, scaling = rank_and_scaling(site, config)
        expected = (*site.stack, site.in_features, site.in_features)
        given = None if path not in covariances else jnp.shape(covariances[path])
        if given != expected:
            raise ValueError(f"the covariance of {path!r} has shape {given}; expected {expected}, of corda_covariances")
        if rank > min(site.in_features, site.out_features) or scaling <= 0:
            raise ValueError(
                f"init_lora_weights='corda' at {path!r}: r is {rank}, the scaling {scaling}; expected at most "
                f"{min(site.in_features, site.out_features)}, and a scaling above 0"
            )
        covariance = jnp.asarray(covariances[path], weight.dtype)
        covariance = covariance.reshape(-1, *expected[-2:])
        damped = jnp.stack([_damped(path, one) for one in covariance]).reshape(expected)
        first = config.corda_config.corda_method == "ipm"

        def decomposed(w: jax.Array, c: jax.Array, rank=rank, scaling=scaling, first=first) -> Any:
            with jax.default_matmul_precision("highest"):
                u, s, vh = jnp.linalg.svd(w.T @ c, full_matrices=False)
                v = vh @ jnp.linalg.inv(c)
            part = slice(None, rank) if first else slice(s.shape[0] - rank, None)
            root = jnp.sqrt(s[part] / scaling)
            return root[:, None] * v[part], u[:, part] * root

        factors[path] = over_stack(decomposed, site)(weight, damped)
    return with_factors(wrapped, adapter_name, factors, initial=True)


def _damped(path: str, covariance: jax.Array) -> jax.Array:
    """The covariance with enough on its diagonal to be inverted."""
    identity = jnp.eye(covariance.shape[0], dtype=covariance.dtype)
    damping = DAMPING
    while damping < 1e6:
        damped = covariance + damping * jnp.mean(jnp.diag(covariance)) * identity
        error = jnp.linalg.norm(jnp.matmul(damped, jnp.linalg.inv(damped), precision="highest") - identity)
        if float(error) < LARGEST_INVERSION_ERROR:
            return damped
        damping *= 2
    raise ValueError(f"the covariance of {path!r} cannot be inverted; expected inputs that are finite and not all 0")
