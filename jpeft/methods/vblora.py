"""VB-LoRA: Extreme Parameter Efficient Fine-Tuning with Vector Banks (Li et al., 2024, arXiv:2405.15179).

    W' = W + A B,   A (in, r) and B (r, out) made of pieces of L numbers, each  sum_k softmax(top_k(logits))_k bank[k]
    (https://arxiv.org/abs/2405.15179)

`vblora_vector_bank (h, L)` trains for all layers together, `vblora_logits_A (r, in / L, h)` and `vblora_logits_B
(out / L, r, h)` for each. Costs r (in + out) h / L parameters and h L for the whole model, 2 r (in + out) FLOPs for
each token and 2 topk r (in + out) for each use of a layer, and topk r (in + out) numbers while A and B are made. With
save_only_topk_weights files hold the topk largest alone; PEFT loses such a file to NaN where rounding makes the last
weight negative, which here is zero then.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from .._config import PeftType, TunerConfig
from .._contract import Arrays, Base, Method, Site, dropped, register
from ._projections import check_bias, of_each


@dataclasses.dataclass(frozen=True, kw_only=True)
class VBLoRAConfig(TunerConfig):
    """What VB-LoRA trains and where; PEFT's fields and defaults.

    r: rank, at least 1. num_vectors: of the bank, at least topk. vector_length: has to divide the inputs and outputs of
    all layers. topk: how many vectors a piece is mixed of. vblora_dropout: rate in [0, 1) on the input of the low-rank
    path. init_vector_bank_bound: the bank begins uniform between it and its negative. init_logits_std: standard
    deviation of the first logits. save_only_topk_weights: whether files hold the topk largest logits alone, for
    inference. Raises ValueError for values out of range.

    >>> VBLoRAConfig(num_vectors=90, target_modules=["q_proj", "v_proj"]).vector_length
    256
    """

    peft_type: PeftType | None = PeftType.VBLORA
    r: int = 4
    num_vectors: int = 256
    vector_length: int = 256
    topk: int = 2
    save_only_topk_weights: bool = False
    vblora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    init_vector_bank_bound: float = 0.02
    init_logits_std: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("r", "num_vectors", "vector_length", "topk"):
            value = getattr(self, name)
            if not isinstance(value, int) or value <= 0:
                raise ValueError(f"{name} is {value!r}; expected an integer of at least 1")
        if self.topk > self.num_vectors:
            raise ValueError(f"topk is {self.topk}; expected at most num_vectors={self.num_vectors}")
        if not 0.0 <= self.vblora_dropout < 1.0:
            raise ValueError(f"vblora_dropout is {self.vblora_dropout!r}; expected a rate in [0, 1)")
        check_bias(self, "vblora")


def init(key: jax.Array, site: Site, config: VBLoRAConfig) -> dict[str, jax.Array]:
    length = config.vector_length
    if site.in_features % length or site.out_features % length:
        raise ValueError(
            f"VB-LoRA at {site.path!r}: vector_length is {length}; expected a number that divides its "
            f"{site.in_features} inputs and {site.out_features} outputs"
        )
    key_a, key_b = jax.random.split(key)
    a = jax.random.normal(key_a, (config.r, site.in_features // length, config.num_vectors))
    b = jax.random.normal(key_b, (site.out_features // length, config.r, config.num_vectors))
    return {"vblora_logits_A": config.init_logits_std * a, "vblora_logits_B": config.init_logits_std * b}


def together(
    key: jax.Array, sites: Mapping[str, Site], config: VBLoRAConfig, weights: Mapping[str, Callable[[], jax.Array]]
) -> tuple[dict[str, jax.Array], dict[str, dict[str, jax.Array]]]:
    shape, bound = (config.num_vectors, config.vector_length), config.init_vector_bank_bound
    bank = jax.random.uniform(jax.random.fold_in(key, 0), shape, minval=-bound, maxval=bound)
    return {"vblora_vector_bank": bank}, of_each(init, key, sites, config)


def mixed(logits: jax.Array, bank: jax.Array, topk: int) -> jax.Array:
    """Pieces (..., L) for logits (..., h)."""
    largest, chosen = jax.lax.top_k(logits, topk)
    return jnp.einsum("...k,...kl->...l", jax.nn.softmax(largest).astype(bank.dtype), bank[chosen])


def thin(p: Arrays, config: VBLoRAConfig) -> tuple[jax.Array, jax.Array]:
    """(A (in, r), B (r, out))."""
    bank = p["vblora_vector_bank"]
    a = mixed(p["vblora_logits_A"], bank, config.topk)
    b = mixed(p["vblora_logits_B"], bank, config.topk).swapaxes(0, 1)
    return a.reshape(config.r, -1).T, b.reshape(config.r, -1)


def forward(p: Arrays, x: jax.Array, base: Base, site: Site, context: Mapping[str, Any]) -> jax.Array:
    y, (a, b) = base(x), thin(p, context["config"])
    h = base.apply(dropped(x, context), a)
    return y + (h @ b.astype(h.dtype)).astype(y.dtype)


def merge(p: Arrays, w: jax.Array, b: jax.Array | None, site: Site) -> tuple[jax.Array, jax.Array | None]:
    config: Any = p["config"]
    left, right = thin(p, config)
    return w + (left @ right).astype(w.dtype), b


VBLORA = register(
    Method(
        config=VBLoRAConfig,
        together=together,
        forward=forward,
        merge=merge,
        dropout=lambda config: config.vblora_dropout,
        needs_config=True,
    )
)
