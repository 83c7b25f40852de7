"""Lily: Low-Rank Interconnected Adaptation across Layers (Zhong et al., 2024, https://arxiv.org/abs/2407.09946).

    y = x W + s h sum_e p_e B_e,   h = x A,   p = the mean over all tokens of softmax(h R)

`lily_A (r, in)` is shared by blocks of stride_A layers, `lily_B (num_B r, out)` by all layers of a group: those of one
name in target_modules, or of one regular expression, and one shape; `lily_router (num_B, r)`, R transposed, is each
layer's own. Costs r in for each block, num_B r out for each group and num_B r parameters for each layer,
2 r (in + out + num_B) FLOPs for each token and 2 num_B r out for each use of a layer.
As in PEFT, the mean is over all tokens that a layer sees at once: what a row gets depends on the rest of its batch and
on its padding; under vmap, and in a batch of several adapters, each row has its own mean. No weight does this, so it
cannot be merged. Of several names that fit a layer PEFT takes any, by the order of a set; here it is the longest.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from .._config import PeftType, TunerConfig
from .._contract import Arrays, Base, Method, Site, fold_in_name, register, wide_dtype

MANY = 20  # PEFT shortens as many names of modules or more, so that layers of one last name are a group.


@dataclasses.dataclass(frozen=True, kw_only=True)
class LilyConfig(TunerConfig):
    """What Lily trains and where; PEFT's fields and defaults.

    r: rank, at least 1; 2 to 4 times that of LoRA. stride_A: how many layers in a row share an A, at least 1. num_B:
    how many B a group of layers has, which its routers mix, at least 2. scaling: factor of the change.
    init_weights: whether B begins as zeros; if not, as A does, uniform. A group is formed by the names in
    target_modules: "all-linear" means none, so that fewer than 20 layers share nothing.
    Raises ValueError for values out of range.

    >>> LilyConfig(stride_A=3, target_modules=["q_proj", "v_proj"]).num_B
    2
    """

    peft_type: PeftType | None = PeftType.LILY
    r: int = 32
    stride_A: int = 1
    num_B: int = 2
    scaling: float = 1.0
    init_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("r", 1), ("stride_A", 1), ("num_B", 2)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name} is {value!r}; expected an integer of at least {least}")
        if self.bias != "none":
            raise ValueError(f"bias is {self.bias!r}; expected 'none', as Lily trains no biases")


def group(path: str, count: int, config: LilyConfig) -> str:
    """The name under which a layer shares arrays. count: of the adapted layers."""
    (module, bracket, part), names = path.partition("["), config.target_modules
    everything = isinstance(names, str) and names.lower() == "all-linear"
    if isinstance(names, str) and not everything:
        return names + bracket + part
    fitting = [] if everything else [name for name in names or () if module.endswith(name)]
    name = max(fitting, key=len, default=module)
    many = (count if everything else len(names or ())) >= MANY
    return (module.rpartition(".")[2] if many and name == module else name) + bracket + part


def uses(sites: Mapping[str, Site], config: LilyConfig) -> dict[str, dict[str, str]]:
    groups: dict[tuple[str, int, int], list[str]] = {}
    for path, site in sites.items():
        key = (group(path, len(sites), config), site.in_features, site.out_features)
        groups.setdefault(key, []).append(path)
    return {
        path: {"lily_A": f"lily_A.{paths[place - place % config.stride_A]}", "lily_B": f"lily_B.{paths[0]}"}
        for paths in groups.values()
        for place, path in enumerate(paths)
    }


def together(
    key: jax.Array, sites: Mapping[str, Site], config: LilyConfig, weights: Mapping[str, Callable[[], jax.Array]]
) -> tuple[dict[str, jax.Array], dict[str, dict[str, jax.Array]]]:
    shared: dict[str, jax.Array] = {}
    for path, own in uses(sites, config).items():
        inputs, outputs = sites[path].in_features, sites[path].out_features
        shapes = {own["lily_A"]: (config.r, inputs), own["lily_B"]: (config.num_B * config.r, outputs)}
        for name, shape in shapes.items():
            if name not in shared:
                zero = config.init_weights and name.startswith("lily_B.")
                shared[name] = jnp.zeros(shape) if zero else uniform(fold_in_name(key, name), shape)
    routers = {path: uniform(fold_in_name(key, path), (config.num_B, config.r)) for path in sites}
    return shared, {path: {"lily_router": router} for path, router in routers.items()}


def uniform(key: jax.Array, shape: tuple[int, int]) -> jax.Array:
    bound = 1 / math.sqrt(shape[1])
    return jax.random.uniform(key, shape, minval=-bound, maxval=bound)


def forward(p: Arrays, x: jax.Array, base: Base, site: Site, context: Mapping[str, Any]) -> jax.Array:
    y, (count, r) = base(x), p["lily_router"].shape
    h = base.apply(x, p["lily_A"].T)
    wide = wide_dtype(h.dtype)
    routed = jax.nn.softmax(h.astype(wide) @ p["lily_router"].T.astype(wide))
    mixture = routed.reshape(-1, count).mean(axis=0) * p["scaling"].astype(wide)
    b = jnp.einsum("e,ero->ro", mixture, p["lily_B"].reshape(count, r, -1).astype(wide))
    return y + (h @ b.astype(h.dtype)).astype(y.dtype)


def merge(p: Arrays, w: jax.Array, b: jax.Array | None, site: Site) -> tuple[jax.Array, jax.Array | None]:
    raise ValueError(
        f"Lily at {site.path!r} mixes its matrices by the tokens of each batch, which no weight does: it cannot be "
        "merged. Expected it beside the weight (jpeft.lift), in a function that uses the whole weight in products"
    )


LILY = register(
    Method(
        config=LilyConfig,
        together=together,
        uses=uses,
        forward=forward,
        merge=merge,
        scaling=lambda site, config: config.scaling,
        linear=False,
    )
)
