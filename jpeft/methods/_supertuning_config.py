"""The config of Super-Tuning."""

import dataclasses

from .._config import PeftType, TunerConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class SupertuningConfig(TunerConfig):
    """What Super-Tuning trains and where; PEFT's fields and defaults.

    sparsity: the share in [0, 1) of a weight's entries that do not train. select_top: whether the largest entries train
    or the smallest. r: rank of the LoRA beside them, at least 1, or None for none; lora_alpha: its change is scaled by
    lora_alpha / r, 2 r if None; lora_dropout: rate in [0, 1) on its input. init_weights: whether a fresh adapter
    changes nothing. save_precomputed_indices: whether files say which entries train; without it the base's weights
    say it again. Raises ValueError for values out of range.

    >>> SupertuningConfig(sparsity=0.98, r=4, target_modules=["q_proj"]).lora_alpha
    8
    """

    peft_type: PeftType | None = PeftType.SUPERTUNING
    sparsity: float = 0.99
    select_top: bool = True
    r: int | None = None
    lora_alpha: float | None = None
    lora_dropout: float = 0.0
    init_weights: bool = True
    save_precomputed_indices: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.sparsity < 1.0:
            raise ValueError(f"sparsity is {self.sparsity!r}; expected a share in [0, 1)")
        if self.r is not None and (not isinstance(self.r, int) or self.r <= 0):
            raise ValueError(f"r is {self.r!r}; expected an integer of at least 1, or None")
        if self.r is None and self.lora_alpha is not None:
            raise ValueError(f"lora_alpha is {self.lora_alpha!r} and r is None; expected a rank, too")
        if self.r is not None and self.lora_alpha is None:
            object.__setattr__(self, "lora_alpha", 2 * self.r)
        if not 0.0 <= self.lora_dropout < 1.0:
            raise ValueError(f"lora_dropout is {self.lora_dropout!r}; expected a rate in [0, 1)")
