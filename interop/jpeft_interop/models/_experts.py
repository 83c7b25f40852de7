"""Mixture of experts (https://arxiv.org/abs/1701.06538): a router sends every token through some of many blocks.

Tokens are sorted by expert and multiplied group by group: no expert has a capacity, and no token is dropped.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ._activations import activation
from ._decoder import DecoderConfig
from ._layers import Linear
from ._parameters import Piece, Pieces, normal, parameter, whole

EXPERT_LAYOUTS = {r".*experts\.(gate_up_proj|down_proj)": "bio"}
"""For `Family.layouts`: the kernels `(experts, in, out)`."""


class MixtureOfExperts(nnx.Module):
    """The experts that the router likes best, weighted by how much it likes them.

    `names`: what checkpoints that hold the experts one by one call gate, up and down projection.
    """

    def __init__(self, config: DecoderConfig, names: tuple[str, str, str]):
        self.gate = Linear(config.hidden_size, config.num_experts, bias=False)
        self.experts = Experts(
            config.num_experts, config.hidden_size, config.moe_intermediate_size, config.hidden_act, names
        )
        self.count, self.normalised = config.num_experts_per_tok, config.norm_topk_prob

    def __call__(self, x: jax.Array) -> jax.Array:
        """`(..., features) -> (..., features)`."""
        tokens = x.reshape(-1, x.shape[-1])
        scores = jax.nn.softmax(self.gate(tokens).astype(jnp.float32), axis=-1)
        weights, chosen = jax.lax.top_k(scores, self.count)
        if self.normalised:
            weights = weights / weights.sum(axis=-1, keepdims=True)
        return self.experts(tokens, chosen, weights).reshape(x.shape)


class Experts(nnx.Module):
    """Gated feed-forward blocks with stacked kernels `(experts, in, out)`; gate and up projection are one."""

    def __init__(self, experts: int, features: int, hidden: int, act: str, names: tuple[str, str, str]):
        gate, up, down = names
        self.gate_up_proj = parameter(
            (experts, features, 2 * hidden),
            normal,
            one_by_one(experts, {gate: slice(0, hidden), up: slice(hidden, 2 * hidden)}),
            whole("gate_up_proj", (0, 2, 1)),
        )
        self.down_proj = parameter(
            (experts, hidden, features),
            normal,
            one_by_one(experts, {down: slice(None)}),
            whole("down_proj", (0, 2, 1)),
        )
        self.act = act

    def __call__(self, tokens: jax.Array, chosen: jax.Array, weights: jax.Array) -> jax.Array:
        """The sum of the chosen experts' outputs: `chosen`, `weights (tokens, k)`, `tokens (tokens, features)`."""
        count = chosen.shape[1]
        order = jnp.argsort(chosen.reshape(-1))
        sizes = jnp.bincount(chosen.reshape(-1), length=self.gate_up_proj.shape[0]).astype(jnp.int32)
        gate_up = jax.lax.ragged_dot(tokens[order // count], self.gate_up_proj[...].astype(tokens.dtype), sizes)
        gate, up = jnp.split(gate_up, 2, axis=-1)
        y = jax.lax.ragged_dot(activation(self.act)(gate) * up, self.down_proj[...].astype(tokens.dtype), sizes)
        y = y[jnp.argsort(order)].reshape(*chosen.shape, -1)
        return (y.astype(jnp.float32) * weights[..., None]).sum(axis=1).astype(tokens.dtype)


def one_by_one(experts: int, columns: Mapping[str, slice]) -> Pieces:
    """A stacked kernel as tensors of single experts: the columns of the kernel that each of them fills, by name."""
    return tuple(
        Piece(f"{expert}.{name}.weight", (expert, slice(None), part), (1, 0))
        for expert in range(experts)
        for name, part in columns.items()
    )


def number_of_experts(raw: Mapping[str, Any]) -> int:
    """How many experts a config.json names: `transformers` 5 writes `num_local_experts` for all families.

    >>> number_of_experts({"num_experts": 128}), number_of_experts({"num_experts": 128, "num_local_experts": 4})
    (128, 4)
    """
    return raw["num_local_experts"] if "num_local_experts" in raw else raw["num_experts"]
