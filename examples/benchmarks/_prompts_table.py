"""What `prompts.py` measures: the methods of prompts, prefixes, attention and routers, and their sizes."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from _models import PROJECTIONS

TOKENS = 16
"""Virtual tokens of a prompt or a prefix, and tokens of a context."""

TASKS, EXPERTS = 3, 4


@dataclasses.dataclass(frozen=True)
class Method:
    """A row: the name of the config class in both packages, and its settings. by_task: whether it asks for task_ids."""

    config: str
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    by_task: bool = False


def of_length(**settings: Any) -> dict[str, Any]:
    return {"num_virtual_tokens": TOKENS, "task_type": "CAUSAL_LM", **settings}


def methods(layers: int) -> dict[str, Method]:
    """The rows for a model of so many layers; X-LoRA's config is without its experts."""
    examples = {"cpt_token_ids": list(range(TOKENS)), "cpt_tokens_type_mask": list(range(1, TOKENS + 1))}
    poly = {"r": 8, "n_tasks": TASKS, "n_skills": 4, "target_modules": list(PROJECTIONS), "task_type": "CAUSAL_LM"}
    return {
        "prompt tuning": Method("PromptTuningConfig", of_length()),
        "P-tuning, MLP": Method("PromptEncoderConfig", of_length(encoder_hidden_size=128)),
        "P-tuning, LSTM": Method(
            "PromptEncoderConfig", of_length(encoder_hidden_size=128, encoder_reparameterization_type="LSTM")
        ),
        "multitask prompt tuning": Method("MultitaskPromptTuningConfig", of_length(num_tasks=TASKS), by_task=True),
        "CPT": Method("CPTConfig", {**examples, "task_type": "CAUSAL_LM"}),
        "prefix tuning": Method("PrefixTuningConfig", of_length()),
        "prefix tuning, projected": Method(
            "PrefixTuningConfig", of_length(prefix_projection=True, encoder_hidden_size=128)
        ),
        "Cartridge": Method("CartridgeConfig", of_length()),
        "LLaMA-Adapter": Method(
            "AdaptionPromptConfig", {"adapter_len": TOKENS, "adapter_layers": layers, "task_type": "CAUSAL_LM"}
        ),
        "ShadowPEFT": Method("ShadowConfig", {"task_type": "CAUSAL_LM"}),
        "Poly": Method("PolyConfig", poly, by_task=True),
        "X-LoRA": Method("XLoraConfig", {"task_type": "CAUSAL_LM"}),
    }


def config_of(package: Any, method: Method, **more: Any) -> Any:
    """The config of a method. package: jpeft or peft."""
    return getattr(package, method.config)(**method.settings, **more)


def expert_of(package: Any) -> Any:
    return package.LoraConfig(r=8, lora_alpha=8, target_modules=list(PROJECTIONS), task_type="CAUSAL_LM")
