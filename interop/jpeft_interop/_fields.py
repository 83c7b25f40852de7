"""How the files of each method differ from what is in memory here: fields of the config, and names of tensors."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jpeft
from jpeft._contract import config_classes

PEFT_VERSION = "0.21.2"
"""The version of PEFT whose files are written."""


@dataclasses.dataclass(frozen=True)
class Format:
    """How one method's files differ from its config and its arrays.

    passive: {field: PEFT's default} of fields that change nothing once an adapter is trained; kept and written back.
    neutral: {field: values with which it changes nothing, PEFT's default first}; with any other it is refused.
    layers: arrays that are the weight of a small layer of their own in PyTorch, so that their keys end in ".weight";
    a name stands for those with a number after it and a dot, too. copies: shared arrays of which the file has a copy in
    each module that uses them. both: shared arrays of which it has the copies and the one of the whole model.
    integers: {array: its dtype in the file} where that is wider than JAX has by default. lacks: fields of every config
    here that PEFT's config of the method does not have; files do not hold them. unwritten: fields that only tell how an
    adapter begins, in a form that no file can hold.
    """

    config: type[jpeft.PeftConfig]
    passive: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    neutral: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    layers: frozenset[str] = frozenset()
    copies: frozenset[str] = frozenset()
    both: frozenset[str] = frozenset()
    integers: Mapping[str, str] = dataclasses.field(default_factory=dict)
    lacks: frozenset[str] = frozenset()
    unwritten: frozenset[str] = frozenset()

    def is_layer(self, name: str) -> bool:
        first, _, number = name.partition(".")
        return name in self.layers or (first in self.layers and number.isdigit())

    def defaults(self) -> dict[str, Any]:
        return {**self.passive, **{name: values[0] for name, values in self.neutral.items()}}


# By the `peft_type` of the file; a method that is not here has nothing to tell.
_DIFFERENCES: Mapping[str, Mapping[str, Any]] = {
    "BEFT": {"lacks": frozenset({"bias", "exclude_modules", "layers_pattern", "layers_to_transform"})},
    "LN_TUNING": {"lacks": frozenset({"bias", "layers_pattern", "layers_to_transform"})},
    "TRAINABLE_TOKENS": {
        "lacks": frozenset({"bias", "exclude_modules", "layers_pattern", "layers_to_transform", "modules_to_save"})
    },
    "SHADOW": {"lacks": frozenset({"bias"}), "unwritten": frozenset({"shadow_tensors"})},
    "SHIRA": {
        "lacks": frozenset({"bias", "exclude_modules", "layers_pattern", "layers_to_transform"}),
        "unwritten": frozenset({"mask_fn"}),
    },
    "SUPERTUNING": {
        "layers": frozenset({"supertuning_lora_A", "supertuning_lora_B"}),
        "lacks": frozenset({"bias", "exclude_modules", "layers_pattern", "layers_to_transform"}),
    },
    "PVERA": {"lacks": frozenset({"exclude_modules"})},
    "RANDLORA": {"both": frozenset({"randlora_A", "randlora_B"}), "lacks": frozenset({"exclude_modules"})},
    "FROD": {
        "passive": {"progressbar": True, "runtime_offload_base_weight": False},
        "integers": {"frod_s_indices": "int64", "frod_s_size": "int64"},
        "lacks": frozenset({"exclude_modules"}),
    },
    "TINYLORA": {"lacks": frozenset({"exclude_modules"})},
    "UNILORA": {
        "integers": {"unilora_indices_A": "int64", "unilora_indices_B": "int64"},
        "lacks": frozenset({"exclude_modules"}),
    },
    "VERA": {"lacks": frozenset({"exclude_modules"})},
    # A config of LoRA's in PEFT, of which most fields are ignored.
    "ADALORA": {
        "passive": {
            "use_rslora": False,
            "alpha_pattern": {},
            "megatron_config": None,
            "megatron_core": "megatron.core",
            "qalora_group_size": 16,
            "eva_config": None,
            "corda_config": None,
            "lora_ga_config": None,
            "loftq_config": {},
        },
        "neutral": {
            "use_dora": (False,),
            "lora_bias": (False,),
            "use_qalora": (False,),
            "ensure_weight_tying": (False,),
            **dict.fromkeys(
                (
                    "use_bdlora",
                    "kasa_config",
                    "arrow_config",
                    "velora_config",
                    "monteclora_config",
                    "target_parameters",
                    "trainable_token_indices",
                    "alora_invocation_tokens",
                    "layer_replication",
                ),
                (None,),
            ),
        },
    },
    "GLORA": {"lacks": frozenset({"exclude_modules", "layers_pattern", "layers_to_transform"})},
    "IA3": {"lacks": frozenset({"bias", "layers_pattern", "layers_to_transform"})},
    "ROAD": {"lacks": frozenset({"bias", "exclude_modules", "layers_pattern", "layers_to_transform"})},
    "OFT": {"layers": frozenset({"oft_R", "oft_embedding_R"})},
    "LOHA": {"lacks": frozenset({"bias"})},
    "LOKR": {"lacks": frozenset({"bias"})},
    "HIRA": {"lacks": frozenset({"bias"})},
    "C3A": {"lacks": frozenset({"exclude_modules"})},
    "ADAMSS": {"lacks": frozenset({"bias", "exclude_modules"})},
    "GRALORA": {
        "layers": frozenset({"gralora_A_general", "gralora_B_general"}),
        "lacks": frozenset({"exclude_modules"}),
    },
    "OSF": {"lacks": frozenset({"bias", "exclude_modules", "layers_pattern", "layers_to_transform"})},
    "PEANUT": {
        "layers": frozenset({"peanut_A", "peanut_B", "peanut_encoders", "peanut_decoders"}),
        "lacks": frozenset({"bias"}),
    },
    "MULTITASK_PROMPT_TUNING": {"unwritten": frozenset({"prompt_tuning_init_ids", "prompt_tuning_init_state_dict"})},
    "POLY": {"lacks": frozenset({"bias", "layers_pattern", "layers_to_transform"})},
    "PROMPT_TUNING": {"unwritten": frozenset({"prompt_tuning_init_ids"})},
    "PSOFT": {"lacks": frozenset({"bias"})},
    "LILY": {
        "layers": frozenset({"lily_A", "lily_B", "lily_router"}),
        "copies": frozenset({"lily_A", "lily_B"}),
        "lacks": frozenset({"bias"}),
    },
    "XLORA": {"unwritten": frozenset({"experts"})},
    "LORA": {
        "passive": {"megatron_config": None, "megatron_core": "megatron.core"},
        "layers": frozenset({"lora_A", "lora_B"}),
    },
}


def formats() -> dict[str, Format]:
    """The format of each method that is implemented, by the `peft_type` of its files.

    >>> formats()["LORA"].is_layer("lora_A")
    True
    """
    found = {kind: Format(config, **_DIFFERENCES.get(kind, {})) for kind, config in config_classes().items()}
    return {
        str(kind): dataclasses.replace(form, unwritten=form.unwritten | {"embedding_scale"})
        if issubclass(form.config, jpeft.PromptLearningConfig)
        else form
        for kind, form in found.items()
    }


def format_of(config: jpeft.PeftConfig) -> Format:
    """The format of a config's method; of one that PEFT does not have, one without differences."""
    return formats().get(str(config.peft_type), Format(type(config)))


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
