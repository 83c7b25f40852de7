"""Ten steps of SGD on a prompt in PyTorch PEFT and here, from the same arrays."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch

import jpeft
import jpeft_interop
from tests.interop.prompt_models import Pair, torch_inputs
from tests.interop.test_round_trip import quietly

STEPS, TOLERANCE = 10, 1e-3


def encoder_of(theirs: Any, name: str = "default") -> dict[str, jax.Array]:
    """The arrays of PEFT's module, which its files do not hold."""
    held = theirs.prompt_encoder[name].state_dict()
    return {key: jnp.asarray(value.detach().numpy().copy()) for key, value in held.items()}


def with_arrays(params: Any, arrays: dict[str, jax.Array], name: str = "default") -> Any:
    """The parameters with an adapter's arrays replaced by others of the same names and shapes."""
    adapter = params.adapters[name]
    assert jax.tree.map(jnp.shape, dict(adapter.shared)) == jax.tree.map(jnp.shape, arrays)
    return dataclasses.replace(
        params, adapters={**params.adapters, name: dataclasses.replace(adapter, shared=dict(arrays))}
    )


def their_steps(theirs: Any, batch: dict[str, np.ndarray], rate: float) -> list[float]:
    optimizer, losses = torch.optim.SGD([p for p in theirs.parameters() if p.requires_grad], lr=rate), []
    for _ in range(STEPS):
        loss = quietly(theirs, **torch_inputs(batch)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def our_steps(
    own: Pair, params: Any, batch: dict[str, np.ndarray], rate: float, *after: Any, **context: Any
) -> tuple[Any, list[float]]:
    """The parameters after the steps, and the losses. after: transforms that follow the optimizer."""
    apply = jpeft.lift(own.ours.apply)
    tx = optax.chain(optax.masked(optax.sgd(rate), jpeft.trainable_mask), *after)

    def loss_of(params):
        params = jpeft.with_context(params, **context)
        prepared, given = jpeft_interop.prepare_inputs(own.ours, params, batch)
        types = given.pop("input_type_mask", None)
        output = apply(prepared, **given)
        if types is None:
            return output.loss
        return jpeft.cpt_loss(output.logits, given["labels"], types, params.adapters[params.active[0]].config)

    @jax.jit
    def step(params, state):
        value, gradients = jpeft.value_and_grad(loss_of)(params)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value

    state, losses = tx.init(params), []
    for _ in range(STEPS):
        params, state, value = step(params, state)
        losses.append(float(value))
    assert step._cache_size() == 1
    return params, losses


def assert_same_way(got: list[float], want: list[float]) -> None:
    np.testing.assert_allclose(got, want, atol=TOLERANCE, rtol=TOLERANCE)
    assert want[-1] < want[0]


def assert_same_arrays(params: Any, theirs: Any, name: str = "default") -> None:
    """What was learned on both sides."""
    want = encoder_of(theirs, name)
    for key, array in params.adapters[name].shared.items():
        np.testing.assert_allclose(array, want[key], atol=TOLERANCE, rtol=TOLERANCE, err_msg=key)
