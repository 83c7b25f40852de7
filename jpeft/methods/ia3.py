"""IA3: Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper (Liu et al., 2022, arXiv:2205.05638).

    y = l * (x W + b),   l (out);   in feedforward modules   y = (l * x) W + b,   l (in)
    (https://arxiv.org/abs/2205.05638, section 3.3)

`ia3_l (out, 1)`, or `(1, in)` in feedforward modules; for convolutions `(1, out or in, *ones)`. Costs out (or in)
parameters and as many multiplications for each token; no memory besides. Here and in PEFT a name of
feedforward_modules means every path that ends with its letters ("up" means "group", too), as files are made that way.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from .._config import PeftType, TunerConfig
from .._contract import CONVOLUTION, LINEAR, Arrays, Base, Method, Site, register
from .._patterns import checked_regex, same_for_layers
from ._elementwise import multiplied


@dataclasses.dataclass(frozen=True, kw_only=True)
class IA3Config(TunerConfig):
    """What IA3 trains and where; PEFT's fields and defaults.

    feedforward_modules: of which of the targets the input is scaled, and not the output: endings of paths, or one
    regular expression for the whole path; [] for none, and None for the choice that PEFT makes for a type of model.
    init_ia3_weights: whether l begins as ones; else it is normal.
    Raises ValueError if a list of names is not among the names of target_modules.

    >>> IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]).feedforward_modules
    ('down_proj',)
    """

    peft_type: PeftType | None = PeftType.IA3
    feedforward_modules: str | tuple[str, ...] | list[str] | None = None
    fan_in_fan_out: bool = False
    init_ia3_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        names, targets = self.feedforward_modules, self.target_modules
        if isinstance(names, str):
            checked_regex(names)
        elif names is not None and isinstance(targets, tuple) and not set(names) <= set(targets):
            raise ValueError(f"feedforward_modules is {names!r}; expected names of target_modules: {targets!r}")


def is_feedforward(site: Site, config: IA3Config) -> bool:
    names = config.feedforward_modules
    if names is None:
        raise ValueError(
            f"feedforward_modules is None at {site.path!r}; expected the targets of which the input is scaled, [] if "
            "there are none"
        )

    def of_layer(path: str) -> bool:
        return bool(re.fullmatch(names, path)) if isinstance(names, str) else path.endswith(tuple(names))

    return same_for_layers(site.path, of_layer, f"feedforward_modules={names!r}")


def init(key: jax.Array, site: Site, config: IA3Config, weight: Callable[[], Any]) -> dict[str, jax.Array]:
    if len(site.window) == 1:
        raise ValueError(f"IA3 at {site.path!r}: the window is {site.window}; expected one of two or three axes")
    before = is_feedforward(site, config)
    size = site.in_features if before else site.out_features
    shape = (1, size, *(1 for _ in site.window)) if before or site.window else (size, 1)
    return {"ia3_l": jnp.ones(shape) if config.init_ia3_weights else jax.random.normal(key, shape)}


def forward(p: Arrays, x: jax.Array, base: Base, site: Site, context: Mapping[str, Any]) -> jax.Array:
    gain = p["ia3_l"].reshape(-1)
    return base(multiplied(x, gain)) if is_feedforward(site, context["config"]) else multiplied(base(x), gain)


def merge(p: Arrays, w: jax.Array, b: jax.Array | None, site: Site) -> tuple[jax.Array, jax.Array | None]:
    config: Any = p["config"]
    gain = p["ia3_l"].reshape(-1)
    if is_feedforward(site, config):
        return multiplied(w, gain.reshape(-1, *(1 for _ in (*site.window, "out")))), b
    return multiplied(w, gain), None if b is None else multiplied(b, gain)


IA3 = register(
    Method(
        config=IA3Config,
        init=init,
        forward=forward,
        merge=merge,
        kinds=frozenset({LINEAR, CONVOLUTION}),
        changes_bias=True,
        needs_config=True,
        by_path=True,
    )
)
