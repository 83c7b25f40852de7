"""WaveFT: Exploring Sparsity for Parameter Efficient Fine Tuning Using Wavelets (Bilican et al., 2025).

    W' = W + s T_in C T_out^T,   T the synthesis of one level of a wavelet transform, C zero but for n coefficients
    (https://arxiv.org/abs/2505.12532)

`waveft_spectrum` (n) trains; where the coefficients are, a seed says. With filters of L taps C is (in + L - 2, out + L
- 2), made even. Costs n parameters. Where 2 rows n <= in out for the rows of all tokens the change is not built: x
T_in, times C, times T_out^T, for each token 2 n FLOPs and, with use_idwt, 2 L (in + out); else it is built for each use
and costs 2 in out more, or nothing where it can be added to the weight. PEFT swaps the quadrants of C beside its
diagonal, and files are trained so, so here, too.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from .._config import PeftType, TunerConfig
from .._contract import Arrays, Base, Method, Site, register, wide_dtype, wider
from .._patterns import value_for
from ._dense import changed_product
from ._projections import of_each
from ._sparse import check_count, check_frequencies, drawn_places, is_dense, product, scattered
from ._wavelets import analysis, coefficient_places, coefficients, scaling_filter, synthesis


@dataclasses.dataclass(frozen=True, kw_only=True)
class WaveFTConfig(TunerConfig):
    """What WaveFT trains and where; PEFT's fields and defaults.

    n_frequency: how many coefficients of a layer train, at least 1, at most the entries of its weight;
    n_frequency_pattern: {name or regular expression: value} for layers that have another number, the first match wins;
    proportional_parameters: whether each layer has a part of the sum by its size instead. scaling: of the change.
    wavelet_family: db1 to db10, sym2 to sym10, coif1 to coif3. use_idwt: whether the numbers are coefficients, or the
    change itself. random_loc_seed: the seed of their places, which are those that PyTorch draws. init_weights: False
    for small normal values instead of zeros. Raises ValueError for values out of range.

    >>> WaveFTConfig(n_frequency=500, wavelet_family="sym4", target_modules=["q_proj"]).scaling
    25.0
    """

    peft_type: PeftType | None = PeftType.WAVEFT
    n_frequency: int = 2592
    scaling: float = 25.0
    wavelet_family: str = "db1"
    use_idwt: bool = True
    random_loc_seed: int = 777
    fan_in_fan_out: bool = False
    n_frequency_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)
    proportional_parameters: bool = False
    init_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_frequencies(self, "waveft")
        scaling_filter(self.wavelet_family)


def initial(key: jax.Array, site: Site, config: WaveFTConfig, count: int) -> dict[str, jax.Array]:
    check_count("n_frequency", count, site.path, site.in_features, site.out_features)
    drawn = jnp.zeros(count) if config.init_weights else 0.01 * jax.random.normal(key, (count,))
    return {"waveft_spectrum": drawn}


def init(key: jax.Array, site: Site, config: WaveFTConfig, weight: Callable[[], Any]) -> dict[str, jax.Array]:
    return initial(key, site, config, value_for(site.path, config.n_frequency_pattern, config.n_frequency))


def together(
    key: jax.Array, sites: Mapping[str, Site], config: WaveFTConfig, weights: Mapping[str, Callable[[], jax.Array]]
) -> tuple[dict[str, jax.Array], dict[str, dict[str, jax.Array]]]:
    sizes = {site.path: site.in_features * site.out_features for site in sites.values()}
    whole, budget = sum(sizes.values()), config.n_frequency * len(sizes)
    each = {path: max(1, round(size / whole * budget)) for path, size in sizes.items()}
    return {}, of_each(lambda key, site, config: initial(key, site, config, each[site.path]), key, sites, config)


def forward(p: Arrays, x: jax.Array, base: Base, site: Site, context: Mapping[str, Any]) -> jax.Array:
    values, config = p["waveft_spectrum"], context["config"]
    values = values.astype(wide_dtype(wider(values.dtype, x.dtype)))
    values = p["scaling"].astype(values.dtype) * values
    n_in, n_out, family = site.in_features, site.out_features, config.wavelet_family
    if is_dense(x, values, n_out):
        return changed_product(x, base, change_of(values, n_in, n_out, config))
    if config.use_idwt:
        places = coefficient_places(n_in, n_out, values.size, config.random_loc_seed, family)
        found = analysis(family, x.astype(values.dtype))
        change = synthesis(family, n_out, product(found, values, *places, coefficients(family, n_out)))
    else:
        places = drawn_places(n_in, n_out, values.size, config.random_loc_seed)
        change = product(x, values, *places, n_out)
    y = base(x)
    return y + change.astype(y.dtype)


def change_of(values: jax.Array, n_in: int, n_out: int, config: WaveFTConfig) -> jax.Array:
    """T_in C T_out^T (in, out) for the values of C."""
    family, seed = config.wavelet_family, config.random_loc_seed
    if not config.use_idwt:
        return scattered(values, *drawn_places(n_in, n_out, values.size, seed), (n_in, n_out))
    places = coefficient_places(n_in, n_out, values.size, seed, family)
    c = scattered(values, *places, (coefficients(family, n_in), coefficients(family, n_out)))
    return synthesis(family, n_in, synthesis(family, n_out, c).T).T


def merge(p: Arrays, w: jax.Array, b: jax.Array | None, site: Site) -> tuple[jax.Array, jax.Array | None]:
    config: Any = p["config"]
    values = p["scaling"].astype(w.dtype) * p["waveft_spectrum"].astype(w.dtype)
    return w + change_of(values, w.shape[0], w.shape[1], config), b


WAVEFT = register(
    Method(
        config=WaveFTConfig,
        init=init,
        forward=forward,
        merge=merge,
        scaling=lambda site, config: config.scaling,
        needs_config=True,
    )
)
WAVEFT_IN_PROPORTION = register(
    dataclasses.replace(WAVEFT, init=None, together=together),
    applies=lambda config: config.proportional_parameters,
)
