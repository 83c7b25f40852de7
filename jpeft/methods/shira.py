"""SHiRA: Sparse High Rank Adapters (Bhardwaj et al., 2024, https://arxiv.org/abs/2406.13175).

    W' = W + S,   S zero but for n = r (in + out) entries, as many numbers as LoRA has

`shira_weight` (n) trains; `shira_indices (2, n)`, int32: outputs and inputs of the entries, row by row of PyTorch's
weight, does not. Costs n parameters. For each token 2 n FLOPs and n numbers of memory where 2 rows n <= in out for the
rows of all tokens, as in decoding; else, for each use, one matrix (in, out), and no FLOPs where it can be added to the
weight (`_dense.py`), 2 in out where it cannot.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from .._config import PeftType, TunerConfig
from .._contract import Arrays, Base, Method, Site, register
from ._sparse import check_count, check_seed, drawn_places, sparsely_changed

# What `torch.Generator()` begins with.
_TORCH_SEED = 67280421310721


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShiraConfig(TunerConfig):
    """What SHiRA trains and where; PEFT's fields and defaults.

    r: r (in + out) entries of a weight train; at least 1, and no more entries than there are. mask_type: "random", or
    the name of a rule of your own. random_seed: of the random entries, which are those that PyTorch draws; without one
    its generator's first. mask_fn: with another mask_type, mask_fn(weight (in, out), r) -> array (in, out) of ones at
    r (in + out) entries and zeros, on which the adapter begins; files hold the entries, not the function.
    init_weights: False for normal values instead of zeros. Raises ValueError for values out of range.

    >>> ShiraConfig(r=8, target_modules=["q_proj"]).mask_type
    'random'
    """

    peft_type: PeftType | None = PeftType.SHIRA
    r: int = 32
    mask_type: str = "random"
    random_seed: int | None = None
    fan_in_fan_out: bool = False
    init_weights: bool = True
    mask_fn: Callable[[Any, int], Any] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.r, int) or self.r <= 0:
            raise ValueError(f"r is {self.r!r}; expected an integer of at least 1")
        if not isinstance(self.mask_type, str):
            raise ValueError(f"mask_type is {self.mask_type!r}; expected 'random', or a name beside a mask_fn")
        if self.mask_fn is not None and self.mask_type == "random":
            raise ValueError(f"mask_fn is {self.mask_fn!r} and mask_type is 'random'; expected another name for it")
        if self.random_seed is not None:
            check_seed("random_seed", self.random_seed)


def init(key: jax.Array, site: Site, config: ShiraConfig, weight: Callable[[], Any]) -> dict[str, jax.Array]:
    count = config.r * (site.in_features + site.out_features)
    check_count(f"r (in + out) of r={config.r}", count, site.path, site.in_features, site.out_features)
    values = jnp.zeros(count) if config.init_weights else jax.random.normal(key, (count,))
    return {"shira_weight": values, "shira_indices": _entries(key, site, config, count, weight).astype(jnp.int32)}


def _entries(key: jax.Array, site: Site, config: ShiraConfig, count: int, weight: Callable[[], Any]) -> jax.Array:
    """(2, count): outputs and inputs."""
    n_in, n_out = site.in_features, site.out_features
    if config.mask_type == "random":
        seed = _TORCH_SEED if config.random_seed is None else config.random_seed
        inputs, outputs = drawn_places(n_in, n_out, count, seed)
        order = np.lexsort((inputs, outputs))
        return jnp.asarray(np.stack([outputs[order], inputs[order]]))
    if config.mask_fn is None:
        if not isinstance(key, Tracer):
            raise ValueError(
                f"mask_type is {config.mask_type!r} at {site.path!r} without a mask_fn; expected mask_fn(weight, r), "
                "which says where a new adapter has its entries"
            )
        # A file is to bring them; until then they are outside of the weight, where they change nothing.
        return jnp.broadcast_to(jnp.array([[n_out], [0]]), (2, count))
    mask = jnp.asarray(config.mask_fn(weight(), config.r)).astype(bool)
    ones = jnp.sum(mask)
    if mask.shape != (n_in, n_out) or (not isinstance(ones, Tracer) and ones != count):
        given = mask.shape if mask.shape != (n_in, n_out) else f"{int(ones)} entries"
        raise ValueError(
            f"mask_fn gives {given} at {site.path!r}; expected a mask of shape {(n_in, n_out)} with {count} entries "
            f"that are not zero, r (in + out) of r={config.r}"
        )
    # In a stack the entries cannot be counted: those that lack are outside of the weight, too.
    return jnp.stack(jnp.nonzero(mask.T, size=count, fill_value=n_out))


def forward(p: Arrays, x: jax.Array, base: Base, site: Site, context: Mapping[str, Any]) -> jax.Array:
    outputs, inputs = p["shira_indices"]
    return sparsely_changed(x, base, _values(p), inputs, outputs)


def merge(p: Arrays, w: jax.Array, b: jax.Array | None, site: Site) -> tuple[jax.Array, jax.Array | None]:
    outputs, inputs = p["shira_indices"]
    return w.at[inputs, outputs].add(_values(p).astype(w.dtype)), b


def _values(p: Arrays) -> jax.Array:
    return p["scaling"].astype(p["shira_weight"].dtype) * p["shira_weight"]


SHIRA = register(
    Method(config=ShiraConfig, init=init, forward=forward, merge=merge, frozen=frozenset({"shira_indices"}))
)
