"""The settings of PSOFT (`psoft.py`)."""

import dataclasses

from .._config import PeftType, TunerConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class PsoftConfig(TunerConfig):
    """What PSOFT trains and where; PEFT's fields and defaults.

    r: singular vectors that are turned, at least 1 and at most the lesser of a layer's inputs and outputs.
    psoft_alpha: the factors are scaled by r / psoft_alpha, and the change by its inverse. psoft_dropout: rate in [0, 1)
    on the input of the change. ab_svd_init: "psoft_init", all singular values on the outputs' side, or "pissa_init",
    their roots on both. psoft_svd: "full", or "lowrank" for an approximation by random projections, which random_seed
    draws, with psoft_svd_lowrank_niter iterations. psoft_orth: whether R is orthogonal, or any matrix. psoft_mag_a,
    psoft_mag_b: whether inputs and outputs of R are scaled. use_cayley_neumann, num_cayley_neumann_terms: a series in
    place of the exact orthogonal matrix; cayley_neumann_eps: its largest |Q|, in (0, 1), or None for any.
    init_weights: False for a random R. fan_in_fan_out: as PEFT has it. Raises ValueError for values out of range.

    >>> PsoftConfig(r=16, target_modules=["q_proj"]).psoft_alpha
    32
    """

    peft_type: PeftType | None = PeftType.PSOFT
    r: int = 32
    psoft_alpha: float = 32
    psoft_dropout: float = 0.0
    fan_in_fan_out: bool = False
    ab_svd_init: str = "psoft_init"
    psoft_svd: str = "full"
    psoft_svd_lowrank_niter: int = 10
    random_seed: int = 0
    psoft_orth: bool = True
    psoft_mag_b: bool = True
    psoft_mag_a: bool = True
    use_cayley_neumann: bool = False
    num_cayley_neumann_terms: int = 5
    cayley_neumann_eps: float | None = None
    init_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.r, int) or self.r <= 0:
            raise ValueError(f"r is {self.r!r}; expected an integer of at least 1")
        if not self.psoft_alpha > 0:
            raise ValueError(f"psoft_alpha is {self.psoft_alpha!r}; expected a number above 0")
        if not 0.0 <= self.psoft_dropout < 1.0:
            raise ValueError(f"psoft_dropout is {self.psoft_dropout!r}; expected a rate in [0, 1)")
        if self.ab_svd_init not in ("psoft_init", "pissa_init"):
            raise ValueError(f"ab_svd_init is {self.ab_svd_init!r}; expected 'psoft_init' or 'pissa_init'")
        if self.psoft_svd not in ("full", "lowrank"):
            raise ValueError(f"psoft_svd is {self.psoft_svd!r}; expected 'full' or 'lowrank'")
        if self.psoft_svd_lowrank_niter < 0:
            raise ValueError(f"psoft_svd_lowrank_niter is {self.psoft_svd_lowrank_niter}; expected at least 0")
        if self.use_cayley_neumann and self.num_cayley_neumann_terms < 1:
            raise ValueError(f"num_cayley_neumann_terms is {self.num_cayley_neumann_terms}; expected at least 1")
        eps = self.cayley_neumann_eps
        if self.use_cayley_neumann and eps is not None and not 0.0 < eps < 1.0:
            raise ValueError(f"cayley_neumann_eps is {eps!r}; expected a number in (0, 1), or None")
