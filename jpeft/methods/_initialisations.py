"""What `init_lora_weights` may be, and the settings of those that have some: PEFT's fields and defaults."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

# Each leaves the function that is adapted as it is, except False.
INITIALIZATIONS = (True, False, "gaussian", "orthogonal", "mica", "eva", "pissa", "olora", "corda", "lora_ga", "loftq")
PISSA_ITERATIONS = re.compile(r"pissa_niter_(\d+)")

DIRECTIONS = ("ArBr", "A2rBr", "ArB2r", "random")
SCALES = ("stable", "weight_svd", "gd_scale", "unit")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaConfig:
    """Settings of init_lora_weights="eva" (Paischer et al., 2024, https://arxiv.org/abs/2410.07170).

    rho: at least 1; a layer gets at most rho times its rank, the ranks' sum stays. tau: in [0, 1]; a component has
    converged once its cosine with that of the step before is tau or more. use_label_mask, label_mask_value: leave out
    tokens whose label is that value. whiten: divide components by the square roots of their singular values.
    adjust_scaling_factors: change alpha along with the rank. Raises ValueError for values out of range.

    >>> EvaConfig(rho=1.5).tau
    0.99
    """

    rho: float = 2.0
    tau: float = 0.99
    use_label_mask: bool = True
    label_mask_value: int = -100
    whiten: bool = False
    adjust_scaling_factors: bool = True

    def __post_init__(self) -> None:
        if not self.rho >= 1.0:
            raise ValueError(f"rho is {self.rho!r}; expected at least 1")
        if not 0.0 <= self.tau <= 1.0:
            raise ValueError(f"tau is {self.tau!r}; expected a cosine in [0, 1]")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CordaConfig:
    """Settings of init_lora_weights="corda" (Yang et al., 2024, https://arxiv.org/abs/2406.05223).

    corda_method: "ipm" adapts the directions that the data use most, "kpm" those that they use least. The other fields
    are PEFT's; they say what its preprocessing reads, writes and prints, which is the caller's affair here.
    Raises ValueError for an unknown method.

    >>> CordaConfig(corda_method="kpm").corda_method
    'kpm'
    """

    cache_file: str | None = None
    covariance_file: str | None = None
    corda_method: str = "ipm"
    verbose: bool = False
    use_float16_for_covariance: bool = False
    prune_temporary_fields: bool = True

    def __post_init__(self) -> None:
        if self.corda_method not in ("ipm", "kpm"):
            raise ValueError(f"corda_method is {self.corda_method!r}; expected 'ipm' or 'kpm'")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraGAConfig:
    """Settings of init_lora_weights="lora_ga" (Wang et al., 2024, https://arxiv.org/abs/2407.05000).

    direction: which of the gradient's 2 r first singular vectors A and B get: "ArBr" (A the odd ones, B the even),
    "A2rBr" (A the second half), "ArB2r" (A the first half) or "random" (both the same ones). scale: "stable"
    (B times out ** 0.25 / sqrt(stable_gamma)), "weight_svd", "gd_scale" (both divided by the scaling) or "unit".
    stable_gamma: above 0. Raises ValueError for values out of range.

    >>> LoraGAConfig(scale="unit").direction
    'ArB2r'
    """

    direction: str = "ArB2r"
    scale: str = "stable"
    stable_gamma: int = 16

    def __post_init__(self) -> None:
        if self.direction not in DIRECTIONS:
            raise ValueError(f"direction is {self.direction!r}; expected one of {', '.join(DIRECTIONS)}")
        if self.scale not in SCALES:
            raise ValueError(f"scale is {self.scale!r}; expected one of {', '.join(SCALES)}")
        if not self.stable_gamma > 0:
            raise ValueError(f"stable_gamma is {self.stable_gamma!r}; expected a number above 0")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoftQConfig:
    """Settings of init_lora_weights="loftq" (Li et al., 2023, https://arxiv.org/abs/2310.08659).

    loftq_bits: 2, 4 or 8. loftq_iter: how often quantising and decomposing alternate, at least 1.
    Raises ValueError for values out of range.

    >>> LoftQConfig(loftq_bits=8).loftq_iter
    1
    """

    loftq_bits: int = 4
    loftq_iter: int = 1

    def __post_init__(self) -> None:
        if self.loftq_bits not in (2, 4, 8):
            raise ValueError(f"loftq_bits is {self.loftq_bits!r}; expected 2, 4 or 8")
        if self.loftq_iter < 1:
            raise ValueError(f"loftq_iter is {self.loftq_iter!r}; expected at least 1")


SETTINGS = {
    "eva_config": ("eva", EvaConfig),
    "corda_config": ("corda", CordaConfig),
    "lora_ga_config": ("lora_ga", LoraGAConfig),
    "loftq_config": ("loftq", LoftQConfig),
}
"""{field: (the value of init_lora_weights that it is for, its class)}"""


def settle_initialization(config: Any) -> None:
    """Check a new config's init_lora_weights, and put the settings that it needs in their places."""
    how = config.init_lora_weights
    known = how in INITIALIZATIONS or (isinstance(how, str) and PISSA_ITERATIONS.fullmatch(how))
    if not known:
        names = ", ".join(map(repr, (*INITIALIZATIONS, "pissa_niter_<number>")))
        raise ValueError(f"init_lora_weights is {how!r}; expected one of {names}")
    for field, (meant, cls) in SETTINGS.items():
        object.__setattr__(config, field, _settings(field, getattr(config, field), cls, needed=how == meant))


def _settings(field: str, value: Any, cls: type, *, needed: bool) -> Any:
    if isinstance(value, cls):
        return value
    if value is not None and not isinstance(value, Mapping):
        raise TypeError(f"{field} is {value!r}; expected a {cls.__name__}, a dict of its fields, or None")
    # PEFT's word for "none" differs from field to field: None, or an empty dict.
    return cls(**(value or {})) if value or needed else value
