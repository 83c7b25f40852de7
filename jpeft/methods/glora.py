"""GLoRA: One-for-All, Generalized LoRA for Parameter-Efficient Fine-tuning (Chavan et al., 2023, arXiv:2306.07967).

    W' = W + W * A + B,   b' = b + b * D + E + C W      (https://arxiv.org/abs/2306.07967, equation 10)

In PyTorch's orientation A and B are `glora_A.Xd (out, r)` times `glora_A.Xu (r, in)`, or `.X (out, 1)`, or `.X (1)`; C
is `.Xd (in, r)` times `.Xu (r, 1)`, or `.X (in, 1)`; D and E are `.X (out)` or `.X (1)`. What is switched off, as C, D
and E are in layers without a bias, PEFT's files hold as `.zeros`, which do not train and are not used. Costs 2 r (in +
out) + r (in + 1) + 2 parameters as it is by default, 2 in out FLOPs for each token where the change cannot be added to
the weight (`_dense.py`), and (4 r + 2) in out for each pass to build W * A + B; with vectors or constants 4 out + in
for each token and no matrix. Of several active adapters D is of the base's bias in PEFT, and here of what the adapters
before have made of it.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from .._config import PeftType, TunerConfig
from .._contract import Arrays, Base, Method, Site, register, wider
from ._dense import changed_product
from ._elementwise import multiplied
from ._lycoris import kaiming_uniform

CHOICES = {
    "config_A_B": ("lora", "vector", "constant", "none"),
    "config_C": ("lora", "vector", "none"),
    "config_D_E": ("vector", "constant", "none"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class GloraConfig(TunerConfig):
    """What GLoRA trains and where; PEFT's fields and defaults.

    r: rank of products, at least 1. config_A_B: "lora" (a product), "vector" (a number for each output), "constant"
    (one number) or "none". config_C: "lora", "vector" or "none". config_D_E: "vector", "constant" or "none".
    init_weights: whether a fresh adapter changes nothing. Raises ValueError for values out of range.

    >>> GloraConfig(config_A_B="vector", target_modules=["q_proj"]).config_D_E
    'constant'
    """

    peft_type: PeftType | None = PeftType.GLORA
    r: int = 8
    config_A_B: str = "lora"
    config_C: str = "lora"
    config_D_E: str = "constant"
    init_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.r, int) or self.r <= 0:
            raise ValueError(f"r is {self.r!r}; expected an integer of at least 1")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected one of {', '.join(map(repr, choices))}")


def init(key: jax.Array, site: Site, config: GloraConfig, weight: Callable[[], Any]) -> dict[str, jax.Array]:
    inputs, outputs = site.in_features, site.out_features
    of_c, of_d = ("none", "none") if site.bias is None else (config.config_C, config.config_D_E)
    of_weight, of_bias = (config.config_A_B, (outputs, inputs), (outputs, 1)), (of_d, (outputs,), (outputs,))
    parts = {"A": of_weight, "B": of_weight, "C": (of_c, (inputs, 1), (inputs, 1)), "D": of_bias, "E": of_bias}
    arrays: dict[str, jax.Array] = {}
    for own, (letter, part) in zip(jax.random.split(key, len(parts)), parts.items(), strict=True):
        arrays |= {f"glora_{letter}.{name}": array for name, array in _part(own, config, *part).items()}
    return arrays


def _part(
    key: jax.Array, config: GloraConfig, kind: str, whole: tuple[int, ...], vector: tuple[int, ...]
) -> dict[str, jax.Array]:
    def drawn(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        return jnp.zeros(shape) if config.init_weights else kaiming_uniform(key, (1, *shape)[-2:]).reshape(shape)

    if kind == "lora":
        key_d, key_u = jax.random.split(key)
        return {"Xd": drawn(key_d, (whole[0], config.r)), "Xu": kaiming_uniform(key_u, (config.r, whole[1]))}
    if kind == "vector":
        return {"X": drawn(key, vector)}
    if kind == "constant":
        return {"X": jnp.zeros(1) if config.init_weights else 0.02 * jax.random.normal(key, (1,))}
    return {"zeros": jnp.zeros(whole)}


def part(p: Arrays, letter: str) -> jax.Array | None:
    """One of the five in PyTorch's orientation: a matrix (out, in), a vector or (1); None if it is switched off."""
    name = f"glora_{letter}"
    if f"{name}.Xd" in p:
        return p[f"{name}.Xd"] @ p[f"{name}.Xu"]
    return p[f"{name}.X"].reshape(-1) if f"{name}.X" in p else None


def forward(p: Arrays, x: jax.Array, base: Base, site: Site, context: Mapping[str, Any]) -> jax.Array:
    a, b = part(p, "A"), part(p, "B")
    if a is None or b is None:
        return base(x)
    if a.ndim == 2:
        w = base.weight()
        return changed_product(x, base, multiplied(w.astype(wider(w.dtype, a.dtype)), a.T) + b.T)
    y, change = base(x), multiplied(base.apply(x, base.weight()), a)
    return y + change.astype(y.dtype) + multiplied(x.sum(-1, keepdims=True).astype(y.dtype), b)


def merge(p: Arrays, w: jax.Array, b: jax.Array | None, site: Site) -> tuple[jax.Array, jax.Array | None]:
    found, base = ((letter, part(p, letter)) for letter in "ABCDE"), p["base"].astype(w.dtype)
    own = {letter: value.astype(w.dtype) for letter, value in found if value is not None}
    changed = w + base * own["A"].T + own["B"].T if "A" in own else w
    if b is None:
        return changed, b
    bias = b + b * own["D"].astype(b.dtype) + own["E"].astype(b.dtype) if "D" in own else b
    if "C" in own:
        bias = bias + jnp.matmul(own["C"].reshape(-1), base, precision="highest").astype(b.dtype)
    return changed, bias


GLORA = register(
    Method(
        config=GloraConfig,
        init=init,
        forward=forward,
        merge=merge,
        frozen=frozenset(f"glora_{letter}.zeros" for letter in "ABCDE"),
        changes_bias=True,
        needs_base=True,
    )
)
