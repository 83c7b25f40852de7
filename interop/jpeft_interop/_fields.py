"""The fields of PEFT's config files that a config here does not have: those of no consequence, and those refused."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jpeft

PEFT_VERSION = "0.21.2"
"""The version of PEFT whose files are written."""


@dataclass(frozen=True)
class Format:
    """How one method's config file differs from its config.

    passive: {field: PEFT's default} of fields that change nothing once an adapter is trained; kept and written back.
    neutral: {field: values with which it changes nothing, PEFT's default first}; with any other it is refused.
    """

    config: type[jpeft.PeftConfig]
    passive: Mapping[str, Any]
    neutral: Mapping[str, tuple[Any, ...]]

    def defaults(self) -> dict[str, Any]:
        return {**self.passive, **{name: values[0] for name, values in self.neutral.items()}}


FORMATS: Mapping[str, Format] = {
    "LORA": Format(
        config=jpeft.LoraConfig,
        passive={
            "corda_config": None,
            "eva_config": None,
            "loftq_config": {},
            "lora_ga_config": None,
            "megatron_config": None,
            "megatron_core": "megatron.core",
            "qalora_group_size": 16,
        },
        neutral={
            "alora_invocation_tokens": (None,),
            "arrow_config": (None,),
            "ensure_weight_tying": (False,),
            "kasa_config": (None,),
            "layer_replication": (None, []),
            "lora_bias": (False,),
            "monteclora_config": (None,),
            "trainable_token_indices": (None,),
            "use_bdlora": (None,),
            "use_dora": (False,),
            "use_qalora": (False,),
            "velora_config": (None,),
        },
    ),
}
"""By the `peft_type` of the file."""

PLAIN_ONCE_TRAINED = ("eva", "mica")
"""Values of init_lora_weights that are not implemented, but leave the base alone: a trained one is plain LoRA."""


def stand_in(name: str, value: Any) -> Any:
    """What a config holds in memory for a value of its file that it cannot hold itself; mostly the value.

    >>> stand_in("init_lora_weights", "eva"), stand_in("rank_pattern", None), stand_in("r", 8)
    (True, {}, 8)
    """
    if name == "init_lora_weights" and isinstance(value, str):
        return True if value.lower() in PLAIN_ONCE_TRAINED else value.lower()
    if name in ("rank_pattern", "alpha_pattern") and value is None:
        return {}
    return value
