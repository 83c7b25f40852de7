"""The settings of OFT (`oft.py`) and BOFT (`boft.py`)."""

import dataclasses

from .._config import PeftType, TunerConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class OFTConfig(TunerConfig):
    """What OFT trains and where; PEFT's fields and defaults.

    One of r, the number of blocks, and oft_block_size, their size, is 0 and follows from the other; where it does not
    divide the layer's inputs, the nearest that does is taken, with a warning. block_share: whether one block is used
    for all. use_cayley_neumann: the series, of num_cayley_neumann_terms, or else the exact form. coft, eps: whether
    rotations stay small: |Q_i| at most eps / sqrt(blocks). module_dropout: the part of the blocks, in [0, 1), that do
    nothing in a step of training. init_weights: False for random rotations. fan_in_fan_out: as PEFT has it.
    Raises ValueError for values out of range.

    >>> OFTConfig(r=4, oft_block_size=0, target_modules=["q_proj"]).r
    4
    """

    peft_type: PeftType | None = PeftType.OFT
    r: int = 0
    oft_block_size: int = 32
    module_dropout: float = 0.0
    fan_in_fan_out: bool = False
    init_weights: bool = True
    coft: bool = False
    eps: float = 6e-5
    block_share: bool = False
    use_cayley_neumann: bool = True
    num_cayley_neumann_terms: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.r < 0 or self.oft_block_size < 0 or (self.r == 0) == (self.oft_block_size == 0):
            raise ValueError(
                f"r is {self.r} and oft_block_size is {self.oft_block_size}; expected one of them to be 0 and the "
                "other at least 1, as r * oft_block_size is the number of a layer's inputs"
            )
        if not 0.0 <= self.module_dropout < 1.0:
            raise ValueError(f"module_dropout is {self.module_dropout!r}; expected a rate in [0, 1)")
        if self.num_cayley_neumann_terms < 1:
            raise ValueError(f"num_cayley_neumann_terms is {self.num_cayley_neumann_terms}; expected at least 1")
        if self.bias not in ("none", "all", "oft_only"):
            raise ValueError(f"bias is {self.bias!r}; expected 'none', 'all' or 'oft_only'")


@dataclasses.dataclass(frozen=True, kw_only=True)
class BOFTConfig(TunerConfig):
    """What BOFT trains and where; PEFT's fields and defaults.

    One of boft_block_size and boft_block_num is 0 and follows from the other, which has to divide the layer's inputs.
    boft_n_butterfly_factor: number of factors m, at least 1; for more than one, blocks have an even size, and their
    number is a multiple of 2^(m-1). boft_dropout: the part of the blocks of one factor, in [0, 1), that do nothing in a
    step of training. init_weights: False for random rotations and scales. fan_in_fan_out: as PEFT has it.
    Raises ValueError for values out of range.

    >>> BOFTConfig(boft_block_size=8, boft_n_butterfly_factor=2, target_modules=["q_proj"]).boft_block_num
    0
    """

    peft_type: PeftType | None = PeftType.BOFT
    boft_block_size: int = 4
    boft_block_num: int = 0
    boft_n_butterfly_factor: int = 1
    boft_dropout: float = 0.0
    fan_in_fan_out: bool = False
    init_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        size, number = self.boft_block_size, self.boft_block_num
        if size < 0 or number < 0 or (size == 0) == (number == 0):
            raise ValueError(
                f"boft_block_size is {size} and boft_block_num is {number}; expected one of them to be 0 and the other "
                "at least 1, as their product is the number of a layer's inputs"
            )
        if self.boft_n_butterfly_factor < 1:
            raise ValueError(f"boft_n_butterfly_factor is {self.boft_n_butterfly_factor}; expected at least 1")
        if not 0.0 <= self.boft_dropout < 1.0:
            raise ValueError(f"boft_dropout is {self.boft_dropout!r}; expected a rate in [0, 1)")
        if self.bias not in ("none", "all", "boft_only"):
            raise ValueError(f"bias is {self.bias!r}; expected 'none', 'all' or 'boft_only'")
