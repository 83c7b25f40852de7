"""The settings of AdaMSS (`adamss.py`)."""

import dataclasses

from .._config import PeftType, TunerConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdamssConfig(TunerConfig):
    """What AdaMSS trains and where; PEFT's fields and defaults.

    r: singular vectors of each weight that are used, at least 1; at most the lesser of its sides counts. num_subspaces:
    groups of outputs; at most the outputs count. subspace_rank: rank of each group's change. init_weights: "orthogonal"
    for changes that begin at zero, None or False for random ones. use_dynamic_rank: whether a group's rank is lower if
    it has fewer squared singular values above svd_threshold times its largest. random_seed: of the random projections.
    use_asa and the rest: the schedule of `jpeft.adamss_allocation`: asa_target_subspaces, how many groups of the whole
    model train in the end; init_warmup, final_warmup: the first and the last step at which groups are chosen, every
    mask_interval steps; asa_importance_beta, asa_uncertainty_beta: of the moving averages, in [0, 1);
    asa_schedule_exponent: of the decay, above 0. Raises ValueError for values out of range.

    >>> AdamssConfig(r=64, num_subspaces=4, target_modules=["q_proj"]).subspace_rank
    1
    """

    peft_type: PeftType | None = PeftType.ADAMSS
    r: int = 100
    num_subspaces: int = 5
    subspace_rank: int = 1
    init_weights: str | bool | None = "orthogonal"
    use_asa: bool = False
    asa_target_subspaces: int = 50
    init_warmup: int = 50
    final_warmup: int = 1000
    mask_interval: int = 100
    asa_importance_beta: float = 0.85
    asa_uncertainty_beta: float = 0.85
    asa_schedule_exponent: float = 3.0
    use_dynamic_rank: bool = False
    svd_threshold: float = 0.1
    random_seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("r", "num_subspaces", "subspace_rank"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected an integer of at least 1")
        if self.init_weights is False:
            object.__setattr__(self, "init_weights", None)
        if self.init_weights not in ("orthogonal", None):
            raise ValueError(f"init_weights is {self.init_weights!r}; expected 'orthogonal' or None")
        if not self.use_asa:
            return
        for name in ("mask_interval", "asa_target_subspaces", "asa_schedule_exponent"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)!r} with use_asa=True; expected a number above 0")
        for name in ("asa_importance_beta", "asa_uncertainty_beta"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)!r} with use_asa=True; expected a number in [0, 1)")
        if self.init_warmup >= self.final_warmup:
            raise ValueError(
                f"init_warmup is {self.init_warmup} and final_warmup is {self.final_warmup} with use_asa=True; "
                "expected the first to be less"
            )
