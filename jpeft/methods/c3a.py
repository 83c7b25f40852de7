"""C3A: Circular Convolution Adaptation (Chen et al., 2024, https://arxiv.org/abs/2407.19342).

    y_m = (x W)_m + 1/in sum_n x_n C_mn,   C_mn[s, k] = c_mn[(s - k) mod b]      (blocks of b features)

`c3a_kernel`: c (out / b, in / b, b). Every product with a circulant matrix is one of its discrete Fourier transform:
conj(F c) F x, taken back. Costs in out / b parameters; for each token about 4 in out / b FLOPs, for complex products of
b / 2 + 1 frequencies, and 5 (in + out) log2(b) for the transforms; twice (in + out) numbers of memory. These are in
float32 or wider. PEFT gives the second of several adapters the first one's output for x; here each gets x.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from .._config import PeftType, TunerConfig
from .._contract import Arrays, Base, Site, additive, register, wide_dtype, wider
from .._patterns import value_for


@dataclasses.dataclass(frozen=True, kw_only=True)
class C3AConfig(TunerConfig):
    """What C3A trains and where; PEFT's fields and defaults.

    block_size: features of a block, a divisor of every layer's inputs and outputs; block_size_pattern: {name or regular
    expression: value} for layers that have another, the first match wins. init_weights: "xavier_uniform" (or False),
    "kaiming_uniform", "gaussian", or True for zeros, with which a fresh adapter changes nothing.
    Raises ValueError for values out of range.

    >>> C3AConfig(block_size=64, target_modules=["q_proj"]).init_weights
    'xavier_uniform'
    """

    peft_type: PeftType | None = PeftType.C3A
    block_size: int = 256
    block_size_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)
    init_weights: bool | str = "xavier_uniform"

    def __post_init__(self) -> None:
        super().__post_init__()
        own = {f"block_size_pattern[{key!r}]": size for key, size in self.block_size_pattern.items()}
        sizes = {"block_size": self.block_size, **own}
        for where, size in sizes.items():
            if not isinstance(size, int) or size <= 0:
                raise ValueError(f"{where} is {size!r}; expected an integer of at least 1")
        if self.init_weights not in (True, False, "xavier_uniform", "kaiming_uniform", "gaussian"):
            raise ValueError(
                f"init_weights is {self.init_weights!r}; expected 'xavier_uniform', 'kaiming_uniform', 'gaussian', "
                "True or False"
            )
        if self.bias not in ("none", "all", "c3a_only"):
            raise ValueError(f"bias is {self.bias!r}; expected 'none', 'all' or 'c3a_only'")


def init(key: jax.Array, site: Site, config: C3AConfig, weight: Callable[[], Any]) -> dict[str, jax.Array]:
    n_in, n_out = site.in_features, site.out_features
    size = value_for(site.path, config.block_size_pattern, config.block_size)
    if n_in % size or n_out % size:
        raise ValueError(
            f"block_size is {size} at {site.path!r}; expected a divisor of its {n_in} inputs and of its {n_out} outputs"
        )
    shape, how = (n_out // size, n_in // size, size), config.init_weights
    if how is True:
        return {"c3a_kernel": jnp.zeros(shape)}
    if how == "gaussian":
        return {"c3a_kernel": jax.random.normal(key, shape)}
    bound = math.sqrt(1 / n_in) if how == "kaiming_uniform" else math.sqrt(6 / (n_in + n_out))
    return {"c3a_kernel": jax.random.uniform(key, shape, minval=-bound, maxval=bound)}


def delta(p: Arrays, site: Site) -> jax.Array:
    kernel = p["c3a_kernel"]
    blocks_out, blocks_in, size = kernel.shape
    places = jnp.arange(size)
    circulant = kernel[:, :, (places[:, None] - places) % size]
    return circulant.transpose(1, 2, 0, 3).reshape(blocks_in * size, blocks_out * size) / (blocks_in * size)


def forward(p: Arrays, x: jax.Array, base: Base, site: Site, context: Mapping[str, Any]) -> jax.Array:
    kernel, y = p["c3a_kernel"], base(x)
    kernel = kernel.astype(wide_dtype(wider(kernel.dtype, x.dtype)))
    size = kernel.shape[-1]
    if size == 1:  # A matrix; JAX 0.12 on CPU cannot always compile a transform of one number.
        return y + base.apply(x, delta(p, site)).astype(y.dtype)
    parts = x.astype(kernel.dtype).reshape(*x.shape[:-1], -1, size)
    spectrum = jnp.einsum("...nf,mnf->...mf", jnp.fft.rfft(parts), jnp.conj(jnp.fft.rfft(kernel)))
    change = jnp.fft.irfft(spectrum, n=size) / site.in_features
    return y + change.reshape(y.shape).astype(y.dtype)


C3A = register(additive(config=C3AConfig, init=init, delta=delta, forward=forward))
