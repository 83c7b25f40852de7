"""The gradients of OSF, orthogonal to the part of each weight that it leaves alone, as an optax transform."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ._config import PeftType
from ._contract import config_class, wide_dtype
from ._params import Adapter, PeftParams

_OF = "osf_svd_params"


def osf_gradient_projection() -> optax.GradientTransformation:
    """OSF's projection: what a step changes stays orthogonal to the largest singular vectors of the weights.

    Of `U_low` (out, k) and `V_low` (k, in) the gradients lose their parts along those vectors, in float32 or wider, as
    by the hooks of PEFT; all else passes as it is. First in a chain: `optax.chain(osf_gradient_projection(),
    optax.adamw(1e-4))`. It takes the gradients of `jpeft.value_and_grad`, or those by the trainable half of
    `jpeft.partition`, and always the wrapped parameters themselves, not a half of them: the vectors are among what
    does not train. It keeps no state. Raises ValueError if `update` gets no parameters, or half of them.
    https://arxiv.org/abs/2504.07097

    >>> import jpeft
    >>> wrapped = jpeft.wrap({"query": {"kernel": jnp.eye(4)}}, jpeft.OSFConfig(target_modules=["query"]))
    >>> tx = osf_gradient_projection()
    >>> updates, _ = tx.update(jax.tree.map(jnp.ones_like, wrapped), tx.init(wrapped), wrapped)
    >>> own, kept = updates.adapters["default"].weights["query"], wrapped.base["query"]["kernel"][:, :2]
    >>> float(abs(kept.T @ own["osf_svd_params.U_low"]).max())
    0.0
    """

    def init(params: PeftParams) -> optax.EmptyState:
        return optax.EmptyState()

    def update(grads: PeftParams, state: optax.EmptyState, params: PeftParams | None = None) -> tuple[PeftParams, Any]:
        if params is None:
            raise ValueError("update got no parameters; expected tx.update(grads, state, params)")
        kind = config_class(PeftType.OSF)
        projected = {
            name: dataclasses.replace(grads.adapters[name], weights=_projected(grads.adapters[name], adapter))
            for name, adapter in params.adapters.items()
            if isinstance(adapter.config, kind)
        }
        return dataclasses.replace(grads, adapters={**grads.adapters, **projected}), state

    return optax.GradientTransformation(init, update)  # pyright: ignore[reportArgumentType]


def _projected(grads: Adapter, adapter: Adapter) -> dict[str, dict[str, Any]]:
    return {path: _of_module(path, own, adapter.weights[path]) for path, own in grads.weights.items()}


def _of_module(path: str, grads: Mapping[str, Any], arrays: Mapping[str, Any]) -> dict[str, Any]:
    found = dict(grads)
    u, v = grads[f"{_OF}.U_low"], grads[f"{_OF}.V_low"]
    for name, gradient, turned in (("U", u, False), ("V", v, True)):
        if gradient is None:
            continue
        low, high = arrays[f"osf_{name}_low_init"], arrays.get(f"osf_{name}_high")
        if low is None:
            raise ValueError(
                f"params hold no osf_{name}_low_init at {path!r}: they are the trainable half of a partition; expected "
                "tx.update(grads, state, wrapped) with the wrapped parameters, or jpeft.combine of both halves"
            )
        wide = wide_dtype(gradient.dtype)
        columns = [_transposed(each) if turned else each for each in (gradient, low if high is None else high)]
        own, basis = (each.astype(wide) for each in columns)
        with jax.default_matmul_precision("highest"):
            along = basis @ (_transposed(basis) @ own)
        # Of a square factor the small vectors span all that is orthogonal to the large ones.
        own = along if high is None else own - along
        found[f"{_OF}.{name}_low"] = (_transposed(own) if turned else own).astype(gradient.dtype)
    return found


def _transposed(array: jax.Array) -> jax.Array:
    return jnp.swapaxes(array, -1, -2)
