"""Rows of the methods that train parts of the base: biases, rows of tables, modules in full."""

import jax
import jax.numpy as jnp
import torch

from tests.interop import trajectories
from tests.interop.methods.parity import Row
from tests.interop.trajectories import WORDS, linear


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up = torch.nn.LayerNorm(6), torch.nn.Linear(6, 6)

    def forward(self, x):
        return x + torch.tanh(self.up(self.norm(x)))


class Normed(torch.nn.Module):
    """A lookup, and a block of a norm and a linear layer; a norm without a bias at the end."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(WORDS, 6)
        self.block = Block()
        self.final_norm = torch.nn.LayerNorm(6, bias=False)

    def forward(self, ids):
        return self.final_norm(self.block(self.embed(ids)))


def normed(params, ids):
    def norm(own, x):
        x = (x - x.mean(-1, keepdims=True)) * jax.lax.rsqrt(x.var(-1, keepdims=True) + 1e-5)
        return x * own["weight"] + own.get("bias", 0.0)

    x = params["embed"]["embedding"][ids]
    x = x + jnp.tanh(linear(params["block"]["up"], norm(params["block"]["norm"], x)))
    return norm(params["final_norm"], x)


trajectories.KINDS["normed"] = (Normed, normed)

TOKENS = {"token_indices": [3, 0, 1]}
NORMS = ["norm", "final_norm"]

ROWS = [
    Row("beft", "BeftConfig", {"target_modules": ["first"]}),
    Row("beft, also without bias", "BeftConfig", {"target_modules": ["q_proj", "v_proj"]}, "blocks", merges=False),
    Row("ln tuning", "LNTuningConfig", {"target_modules": NORMS}, "normed", rate=0.5),
    Row(
        "ln tuning, linear and saved",
        "LNTuningConfig",
        {"target_modules": r"block\.up|final_norm", "modules_to_save": ["block.norm"]},
        "normed",
    ),
    Row("trainable tokens", "TrainableTokensConfig", {**TOKENS, "target_modules": ["embed", "second"]}),
    Row("trainable tokens, tied", "TrainableTokensConfig", {**TOKENS, "target_modules": "model.embed_tokens"}, "tied"),
]
