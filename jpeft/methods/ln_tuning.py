"""LN tuning: Tuning LayerNorm in Attention (Zhao et al., 2023, https://arxiv.org/abs/2312.11420).

    y = norm(x; gamma', beta')   instead of   norm(x; gamma, beta)

A full trainable copy of each targeted module, which begins as the module is: `ln_tuning_layers.weight` (features) and
`ln_tuning_layers.bias` (features) of a norm. Costs as many parameters as the module has and the memory for them, and no
FLOPs. One adapter at a time can act on a module.
"""

import dataclasses

from .._config import PeftType, TunerConfig
from .._contract import register, without_sites


@dataclasses.dataclass(frozen=True, kw_only=True)
class LNTuningConfig(TunerConfig):
    """Which modules train in full; PEFT's fields and defaults.

    target_modules: modules of any kind, the norms as a rule; the leaves of each keep their dtypes. A module that holds
    others trains with all of them.

    >>> import jax.numpy as jnp, jpeft
    >>> params = {"norm": {"scale": jnp.ones(4)}, "query": {"kernel": jnp.ones((4, 4))}}
    >>> list(jpeft.wrap(params, LNTuningConfig(target_modules=["norm"])).adapters["default"].replaced)
    ['norm.scale']
    """

    peft_type: PeftType | None = PeftType.LN_TUNING


LN_TUNING = register(without_sites(config=LNTuningConfig, in_full=True))
