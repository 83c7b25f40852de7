"""The config of FRoD."""

import dataclasses

from .._config import PeftType, TunerConfig
from ._projections import check_bias


@dataclasses.dataclass(frozen=True, kw_only=True)
class FrodConfig(TunerConfig):
    """What FRoD trains and where; PEFT's fields and defaults.

    sparse_rate: part of the entries of S that train, from 0 to 1. projection_prng_key: seed of their places, which are
    those that PyTorch draws. regularization_alpha: ridge of the decomposition, at least 0. save_projection: whether
    files hold V and the places. frod_dropout: rate in [0, 1) on the input. init_weights: False for lengths and entries
    with normal noise of standard deviation 0.1. Raises ValueError for values out of range.

    >>> FrodConfig(sparse_rate=0.02, target_modules=["q_proj", "v_proj"]).regularization_alpha
    0.001
    """

    peft_type: PeftType | None = PeftType.FROD
    projection_prng_key: int = 0
    save_projection: bool = True
    frod_dropout: float = 0.0
    fan_in_fan_out: bool = False
    init_weights: bool = True
    sparse_rate: float = 0.01
    regularization_alpha: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.sparse_rate <= 1.0:
            raise ValueError(f"sparse_rate is {self.sparse_rate!r}; expected a number from 0 to 1")
        if not 0.0 <= self.frod_dropout < 1.0:
            raise ValueError(f"frod_dropout is {self.frod_dropout!r}; expected a rate in [0, 1)")
        if self.regularization_alpha < 0:
            raise ValueError(f"regularization_alpha is {self.regularization_alpha!r}; expected at least 0")
        if not isinstance(self.projection_prng_key, int) or not -(2**63) <= self.projection_prng_key < 2**64:
            raise ValueError(f"projection_prng_key is {self.projection_prng_key!r}; expected an integer of 64 bits")
        check_bias(self, "frod")
