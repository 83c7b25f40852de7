"""X-LoRA's config, PEFT's fields and what its experts were, and the layers of its classifier."""

import dataclasses
import warnings
from collections.abc import Mapping

from .._config import FrozenMapping, PeftConfig, PeftType
from .lora import LoraConfig

CLASSIFIER = "internal_xlora_classifier"


@dataclasses.dataclass(frozen=True)
class XLoraExpert:
    """One expert as it was by itself: its config, and {module path: rank}, of single layers."""

    config: LoraConfig
    ranks: FrozenMapping


@dataclasses.dataclass(frozen=True, kw_only=True)
class XLoraConfig(PeftConfig):
    """How X-LoRA weighs its experts; PEFT's fields and defaults.

    hidden_size: of the model; None: told by the model where that is known. adapters: {name: where it is} of the
    experts. enable_softmax: whether the weights of a token are a softmax, at softmax_temperature. top_k_lora: how many
    experts a token keeps; None: all. enable_softmax_topk: whether those get a softmax of their weights.
    layerwise_scalings: whether each layer has weights of its own. xlora_depth: layers of the classifier; with more than
    one they have xlora_size features, ReLU between, and xlora_dropout_p in training. use_trainable_adapters: whether
    the experts train, too. scaling_pass_value: the weight of every expert while hidden states are made.
    global_scaling_weight: factor of what all experts add. experts: filled in by `jpeft.create_xlora_adapter`.
    Raises ValueError for values out of range.

    >>> XLoraConfig(hidden_size=64, xlora_depth=2).layers
    ('internal_xlora_classifier.layers.0', 'internal_xlora_classifier.layers.3')
    """

    peft_type: PeftType | None = PeftType.XLORA
    hidden_size: int | None = None
    adapters: Mapping[str, str] = dataclasses.field(default_factory=dict)
    enable_softmax: bool = True
    enable_softmax_topk: bool = False
    layerwise_scalings: bool = False
    xlora_depth: int = 1
    xlora_size: int = 2048
    xlora_dropout_p: float = 0.2
    use_trainable_adapters: bool = False
    softmax_temperature: float = 1.0
    top_k_lora: int | None = None
    scaling_pass_value: float = 0.0
    global_scaling_weight: float = 1.0
    experts: tuple[XLoraExpert, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.adapters, Mapping):
            raise TypeError(f"adapters is {self.adapters!r}; expected a dict: the path of each expert by its name")
        for name in ("hidden_size", "xlora_depth", "xlora_size", "top_k_lora"):
            value = getattr(self, name)
            optional = name in ("hidden_size", "top_k_lora") and value is None
            if not optional and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} is {value!r}; expected an integer of at least 1")
        if not 0.0 <= self.xlora_dropout_p < 1.0:
            raise ValueError(f"xlora_dropout_p is {self.xlora_dropout_p!r}; expected a rate in [0, 1)")
        if self.softmax_temperature <= 0.0:
            raise ValueError(f"softmax_temperature is {self.softmax_temperature!r}; expected a number above 0")
        if self.enable_softmax_topk and (self.top_k_lora is None or self.enable_softmax):
            warnings.warn(
                f"enable_softmax_topk is True with top_k_lora={self.top_k_lora} and enable_softmax="
                f"{self.enable_softmax}; it is meant for a number of experts, in place of enable_softmax",
                stacklevel=3,
            )

    def with_experts(self, experts: Mapping[str, tuple[LoraConfig, Mapping[str, int]]]) -> "XLoraConfig":
        """The config of a router of these experts: {name: (config, {module path: rank})}."""
        return dataclasses.replace(
            self,
            adapters={name: self.adapters.get(name, name) for name in experts},
            experts=tuple(XLoraExpert(config, FrozenMapping(ranks)) for config, ranks in experts.values()),
        )

    @property
    def layers(self) -> tuple[str, ...]:
        """The names of the classifier's linear layers; ReLU and dropout between them have numbers, too."""
        step = 3 if self.xlora_dropout_p > 0.0 else 2
        return tuple(f"{CLASSIFIER}.layers.{step * number}" for number in range(self.xlora_depth))
