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
            "megatron_config": None,
            "megatron_core": "megatron.core",
        },
        neutral={
            "alora_invocation_tokens": (None,),
            "arrow_config": (None,),
        },
    ),
}
"""By the `peft_type` of the file."""


def is_replayed(how: Any) -> bool:
    """Whether base and config tell again what an initialisation took out of the base, if it took anything.

    how: a value of init_lora_weights. Others need data, the quantised base, or the numbers that were drawn.

    >>> is_replayed("pissa"), is_replayed("pissa_niter_4"), is_replayed("corda")
    (True, False, False)
    """
    return not (isinstance(how, str) and (how.startswith("pissa_niter_") or how in ("corda", "lora_ga", "loftq")))


def stand_in(name: str, value: Any) -> Any:
    """What a config holds in memory for a value of its file that it cannot hold itself; mostly the value.

    >>> stand_in("init_lora_weights", "OLoRA"), stand_in("rank_pattern", None), stand_in("r", 8)
    ('olora', {}, 8)
    """
    if name == "init_lora_weights" and isinstance(value, str):
        return value.lower()
    if name in ("rank_pattern", "alpha_pattern") and value is None:
        return {}
    return value
