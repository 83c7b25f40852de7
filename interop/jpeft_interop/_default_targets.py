"""The modules that a method adapts when its config names none, by `model_type`: PEFT's choices, as data.

Source: the tables of PEFT 0.21.2 (`peft/utils/constants.py`), which tests/interop/test_face_vs_peft.py compares.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jpeft import PeftConfig, TunerConfig
from jpeft._targets import ALL_LINEAR

from ._listed import listed

Targets = tuple[str, ...] | str
Table = Mapping[str, Targets]


def _table(rows: Mapping[str, str]) -> dict[str, Targets]:
    """{names of modules: model types}, both with blanks between, turned round."""
    return {model_type: tuple(names.split()) for names, types in rows.items() for model_type in types.split()}


COMMON: Table = {
    **_table(
        {
            "q v": "t5 mt5",
            "q_proj v_proj": "bart opt gptj gpt_neo llama llama4 mistral mixtral stablelm gemma gemma2 gemma3_text "
            "qwen2 qwen3",
            "query value": "bert roberta xlm-roberta electra layoutlm",
            "query_key_value": "bloom gpt_neox chatglm RefinedWebModel RefinedWeb falcon",
            "c_attn": "gpt2 gpt_bigcode",
            "q v q_proj v_proj": "blip-2",
            "query_proj value_proj": "deberta-v2",
            "in_proj": "deberta",
            "Wqkv": "mpt",
            "c_proj c_attn": "btlm",
            "qkv_proj": "codegen",
            "q_proj v_proj fc1 fc2": "phi",
            "q_proj k_proj v_proj o_proj": "nemotron_h",
            "key value receptance output": "rwkv",
            "r_proj k_proj v_proj o_proj key value": "rwkv7",
        }
    ),
    "gemma4": r".*language_model\..*\.(q_proj|v_proj)",
}
"""Of LoRA, and of the methods that do as it does."""

_AS_LORA = (
    "LORA BOFT DEFT DELORA GLORA GRALORA HIRA HRA LILY LOHA LOKR MISS OFT PEANUT POLY PSOFT RANDLORA ROAD SUPERTUNING "
    "TINYLORA UNILORA"
)
_OUTPUT_OF_MLP = _table({"mlp.c_proj": "gpt2 gpt_bigcode"})
_SMALL_PHI = _table({"q_proj v_proj": "phi"})
_ALL_OF_T5_BART_OPT = _table(
    {
        "q k v o wi wo": "t5",
        "q k v o wi_0 wi_1 wo": "mt5",
        "q_proj k_proj v_proj out_proj fc1 fc2": "bart opt",
        "query_proj key_proj value_proj dense": "deberta-v2",
    }
)


def _without(table: Table, types: str) -> Table:
    return {model_type: targets for model_type, targets in table.items() if model_type not in types.split()}


_VECTOR_BANK: Table = {
    **_without(
        COMMON,
        "blip-2 xlm-roberta electra layoutlm chatglm mpt RefinedWebModel RefinedWeb falcon btlm codegen mistral "
        "mixtral stablelm phi rwkv rwkv7",
    ),
    **_ALL_OF_T5_BART_OPT,
}

TARGETS: Mapping[str, Table] = {
    **dict.fromkeys(_AS_LORA.split(), COMMON),
    "ADALORA": {**_VECTOR_BANK, **_table({"query key value dense": "roberta"})},
    "ADAMSS": {**COMMON, **_table({"query value": "vit"})},
    "BEFT": _table(
        {
            "v": "t5 mt5",
            "value": "roberta bert",
            "v_proj": "opt gptj gpt_neo bart llama llama4 mistral mixtral phi gemma gemma2 gemma3_text qwen2 qwen3",
            "value_proj": "deberta-v2",
        }
    ),
    "C3A": {**COMMON, **_OUTPUT_OF_MLP},
    "FOURIERFT": {**COMMON, **_OUTPUT_OF_MLP},
    "FROD": {**COMMON, **_SMALL_PHI, **_table({"query value": "vit"})},
    "IA3": _table(
        {
            "k v wo": "t5",
            "k v wi_1": "mt5",
            "c_attn mlp.c_proj": "gpt2 gpt_bigcode",
            "query_key_value mlp.dense_4h_to_h": "bloom",
            "key value output.dense": "roberta bert",
            "q_proj k_proj fc2": "opt",
            "q_proj v_proj fc_out": "gptj",
            "query_key_value dense_4h_to_h": "gpt_neox RefinedWebModel RefinedWeb falcon",
            "q_proj v_proj c_proj": "gpt_neo",
            "q_proj v_proj fc2": "bart phi",
            "k_proj v_proj down_proj": "llama mistral",
            "q_proj v_proj down_proj": "llama4 gemma gemma2 gemma3_text qwen2 qwen3",
            "k_proj v_proj w2": "mixtral",
            "key_proj value_proj output.dense": "deberta-v2",
            "in_proj output.dense": "deberta",
        }
    ),
    "LN_TUNING": _table(
        {
            "input_layernorm post_attention_layernorm norm": "llama mistral gemma",
            "input_layernorm post_attention_layernorm ln_f": "bloom falcon",
            "multi_modal_projector input_layernorm post_attention_layernorm norm embed_tokens lm_head": "llava",
            "layer_norm final_layer_norm": "t5 mt5",
            "self_attn_layer_norm encoder_attn_layer_norm final_layer_norm": "bart",
            "ln_1 ln_2 ln_f": "gpt2",
            "layernorm LayerNorm final_layer_norm self_attn_layer_norm": "blip-2",
            "ln_1 ln_f": "gptj",
            "input_layernorm final_layernorm": "phi",
            "input_layernorm post_attention_layernorm pre_feedforward_layernorm post_feedforward_layernorm norm": (
                "gemma2 gemma3_text"
            ),
            "post_attention_layernorm": "qwen2 qwen3",
        }
    ),
    "OSF": _table(
        {
            "q_proj k_proj v_proj o_proj gate_proj down_proj up_proj": (
                "llama llama4 mistral mixtral gemma gemma2 gemma3_text qwen2 qwen3 phi"
            ),
            "c_attn c_proj": "gpt2 gpt_bigcode",
            "query_key_value dense_4h_to_h": "bloom gpt_neox falcon",
            "q_proj k_proj v_proj out_proj fc1 fc2": "opt",
            "q_proj k_proj v_proj out_proj fc_in fc_out": "gptj",
        }
    ),
    "PVERA": {**COMMON, **_SMALL_PHI, **_table({"query value": "dinov2"})},
    "SHIRA": {**COMMON, **_SMALL_PHI},
    "VBLORA": _VECTOR_BANK,
    "VERA": {**COMMON, **_SMALL_PHI},
    "WAVEFT": {**_without(COMMON, "btlm rwkv rwkv7"), **_OUTPUT_OF_MLP},
}
"""By the `peft_type`; methods that are not here have no target modules, or a rule of their own."""

FEEDFORWARD: Table = {
    **_table(
        {
            "wo": "t5",
            "mlp.c_proj": "gpt2 gpt_bigcode",
            "mlp.dense_4h_to_h": "bloom",
            "output.dense": "roberta bert deberta-v2 deberta",
            "fc2": "opt bart phi",
            "fc_out": "gptj",
            "dense_4h_to_h": "gpt_neox RefinedWebModel RefinedWeb falcon",
            "c_proj": "gpt_neo",
            "down_proj": "llama llama4 mistral gemma gemma2 gemma3_text qwen2 qwen3",
            "w2": "mixtral",
        }
    ),
    "mt5": (),
}
"""IA3's `feedforward_modules`: of which of its targets the input is scaled."""


ALL_OF_OTHERS = frozenset({"OSF"})
"""Methods that adapt all linear layers of a model for which their table has no row."""


def with_default_targets(config: PeftConfig, model_type: str | None) -> PeftConfig:
    """The config with the target modules that PEFT chooses for a type of model, if it names none.

    model_type: of the model's config; None if it has none. Raises ValueError if PEFT has no choice for it.

    >>> import jpeft
    >>> with_default_targets(jpeft.LoraConfig(), "llama").target_modules
    ('q_proj', 'v_proj')
    """
    table = TARGETS.get(str(getattr(config.peft_type, "value", config.peft_type)))
    if not isinstance(config, TunerConfig) or table is None:
        return config
    fields: dict[str, Any] = {}
    if config.target_modules is None:
        if (targets := table.get(model_type or "")) is not None:
            fields["target_modules"] = targets
        elif config.peft_type in ALL_OF_OTHERS:
            fields["target_modules"] = ALL_LINEAR
        elif getattr(config, "target_parameters", None):
            return config
        else:
            raise ValueError(_unknown(config, model_type, table))
    if getattr(config, "feedforward_modules", ()) is None:
        fields["feedforward_modules"] = FEEDFORWARD.get(model_type or "")
    return dataclasses.replace(config, **fields) if fields else config


def _unknown(config: TunerConfig, model_type: str | None, table: Table) -> str:
    found = "the model has no config with a model_type" if model_type is None else f"model_type is {model_type!r}"
    method = getattr(config.peft_type, "value", config.peft_type)
    return (
        f"target_modules is None and {found}, for which {method} has no default; name the modules to adapt in "
        f"target_modules, or use 'all-linear' (there are defaults for: {listed(table, most=len(table))})"
    )
