"""The settings of ShadowPEFT (`shadow.py`)."""

import dataclasses
from collections.abc import Mapping

from .._config import PeftType, TunerConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShadowConfig(TunerConfig):
    """What ShadowPEFT trains and where; PEFT's fields and defaults.

    target_modules: whole blocks, one after another; None: all. r: rank of the injection, at least 1. shadow_alpha: its
    factor. shadow_dropout: rate in [0, 1) on the difference of the states. init_weights: whether `shadow_up` begins as
    zeros, so that the model begins as it was. shadow_model: "mirror", a decoder of the model's own kind, with
    shadow_num_hidden_layers (None: 1) and, where they are not None, other sizes. share_embeddings: whether it reads the
    model's embeddings, if it is as wide, rather than its own. update_hidden_size: of T and G; None: r.
    auxiliary_loss_weight: at least 0. shadow_tensors: no field of PEFT, {name: (shape, mean, standard deviation)} of
    the shadow's tensors as they begin; None: as the model's first blocks have them. `jpeft_interop` says it for its
    models; files do not hold it. Raises ValueError for values out of range, and for another shadow_model.

    >>> ShadowConfig(r=4).shadow_alpha
    0.1
    """

    peft_type: PeftType | None = PeftType.SHADOW
    r: int = 8
    shadow_alpha: float = 0.1
    shadow_dropout: float = 0.2
    init_weights: bool = True
    shadow_model: str = "mirror"
    shadow_num_hidden_layers: int | None = None
    shadow_hidden_size: int | None = None
    shadow_num_attention_heads: int | None = None
    shadow_intermediate_size: int | None = None
    share_embeddings: bool = True
    update_hidden_size: int | None = None
    auxiliary_loss_weight: float = 0.05
    shadow_tensors: Mapping[str, tuple[tuple[int, ...], float, float]] | None = dataclasses.field(
        default=None, repr=False
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shadow_model != "mirror":
            raise ValueError(
                f"shadow_model is {self.shadow_model!r}; expected 'mirror': a shadow that was trained before is not "
                "implemented here, nor that of a diffusion transformer"
            )
        sizes = [name for name in SIZES if getattr(self, name) is not None]
        for name in ("r", *sizes):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}; expected an integer of at least 1")
        if not 0.0 <= self.shadow_dropout < 1.0:
            raise ValueError(f"shadow_dropout is {self.shadow_dropout!r}; expected a rate in [0, 1)")
        if self.auxiliary_loss_weight < 0.0:
            raise ValueError(f"auxiliary_loss_weight is {self.auxiliary_loss_weight!r}; expected at least 0")
        if self.bias != "none":
            raise ValueError(f"bias is {self.bias!r}; expected 'none', as ShadowPEFT trains no biases of the model")


SIZES = (
    "shadow_num_hidden_layers",
    "shadow_hidden_size",
    "shadow_num_attention_heads",
    "shadow_intermediate_size",
    "update_hidden_size",
)
