"""FourierFT: Parameter-Efficient Fine-Tuning with Discrete Fourier Transform (Gao et al., 2024, arXiv:2405.03003).

    W' = W + s Re(F_in V F_out),   V (in, out) zero but for n entries, F the inverse discrete Fourier transforms
    (https://arxiv.org/abs/2405.03003)

`fourierft_spectrum` (n) trains; where its entries are, a seed says. The change is not built: with the transform X of x
(in / 2 + 1 frequencies) and that of y, which is real, an entry v at frequencies (t, u) adds v X_t, or its conjugate, to
the frequency u of y. Costs n parameters; for each token the transforms, 5 in log2 in + 5 out log2 out FLOPs, with in +
out numbers of memory, and 4 n FLOPs where 8 rows n <= in out for the rows of all tokens; else in out FLOPs and, for
each use, in out / 2 numbers. The transforms are in float32 or wider.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._config import PeftType, TunerConfig
from .._contract import Arrays, Base, Method, Site, register, wide_dtype, wider
from .._patterns import value_for
from ._sparse import check_count, check_frequencies, drawn_places, product, scattered


@dataclasses.dataclass(frozen=True, kw_only=True)
class FourierFTConfig(TunerConfig):
    """What FourierFT trains and where; PEFT's fields and defaults.

    n_frequency: how many entries of the spectrum train, at least 1, at most those of the weight; n_frequency_pattern:
    {name or regular expression: value} for layers that have another number, the first match wins. scaling: of the
    change. random_loc_seed: the seed of the entries' places, which are those that PyTorch draws. init_weights: True
    for zeros, with which a fresh adapter changes nothing, instead of normal values.
    Raises ValueError for values out of range.

    >>> FourierFTConfig(n_frequency=500, target_modules=["q_proj"]).scaling
    150.0
    """

    peft_type: PeftType | None = PeftType.FOURIERFT
    n_frequency: int = 1000
    scaling: float = 150.0
    random_loc_seed: int = 777
    fan_in_fan_out: bool = False
    n_frequency_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)
    init_weights: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_frequencies(self, "fourier")


def init(key: jax.Array, site: Site, config: FourierFTConfig, weight: Callable[[], Any]) -> dict[str, jax.Array]:
    count = value_for(site.path, config.n_frequency_pattern, config.n_frequency)
    check_count("n_frequency", count, site.path, site.in_features, site.out_features)
    return {"fourierft_spectrum": jnp.zeros(count) if config.init_weights else jax.random.normal(key, (count,))}


@dataclasses.dataclass(frozen=True)
class Halves:
    """Where and how entries act on the halves of the spectra of x and y that determine them."""

    inputs: np.ndarray
    outputs: np.ndarray
    shares: np.ndarray
    signs: np.ndarray


@functools.lru_cache(maxsize=64)
def halves(n_in: int, n_out: int, count: int, seed: int) -> Halves:
    inputs, outputs = drawn_places(n_in, n_out, count, seed)
    far_in, far_out = inputs > n_in // 2, outputs > n_out // 2
    alone = (outputs == 0) | (2 * outputs == n_out)
    return Halves(
        inputs=np.where(far_in, n_in - inputs, inputs),
        outputs=np.where(far_out, n_out - outputs, outputs),
        shares=np.where(alone, 1.0, 0.5),
        signs=np.where(far_in == far_out, -1.0, 1.0),
    )


def forward(p: Arrays, x: jax.Array, base: Base, site: Site, context: Mapping[str, Any]) -> jax.Array:
    y, values = base(x), p["fourierft_spectrum"]
    values = values.astype(wide_dtype(wider(values.dtype, x.dtype)))
    at = halves(site.in_features, site.out_features, values.size, context["config"].random_loc_seed)
    found = jnp.fft.rfft(x.astype(values.dtype))
    values = values * at.shares.astype(values.dtype)
    features = site.out_features // 2 + 1
    real = product(found.real, values, at.inputs, at.outputs, features)
    imaginary = product(found.imag, values * at.signs.astype(values.dtype), at.inputs, at.outputs, features)
    change = jnp.fft.irfft(jax.lax.complex(real, imaginary), n=site.out_features) / site.in_features
    return y + (p["scaling"].astype(change.dtype) * change).astype(y.dtype)


def merge(p: Arrays, w: jax.Array, b: jax.Array | None, site: Site) -> tuple[jax.Array, jax.Array | None]:
    config: Any = p["config"]
    shape, values = (site.in_features, site.out_features), p["fourierft_spectrum"].astype(w.dtype)
    inputs, outputs = drawn_places(*shape, values.size, config.random_loc_seed)
    change = jnp.fft.ifft2(scattered(values, inputs, outputs, shape)).real
    return w + p["scaling"].astype(w.dtype) * change.astype(w.dtype), b


FOURIERFT = register(
    Method(
        config=FourierFTConfig,
        init=init,
        forward=forward,
        merge=merge,
        scaling=lambda site, config: config.scaling,
        needs_config=True,
    )
)
