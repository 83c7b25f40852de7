"""Qwen 2 and Qwen 3: the keys of their configs."""

import pytest

from jpeft_interop.models import FlaxAutoModelForCausalLM

transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 20,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
FULL, SLIDING = "full_attention", "sliding_attention"
WINDOW = {"use_sliding_window": True, "sliding_window": 4}


def config_of(model_type, ignore=(), **keys):
    raw = {"model_type": model_type, **SIZES, **keys}
    return FlaxAutoModelForCausalLM.from_config(raw, abstract=True, ignore_config_keys=ignore).config


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
@pytest.mark.parametrize(
    "keys, window, types",
    [
        ({"sliding_window": 4, "max_window_layers": 1}, None, (FULL,) * 4),
        ({**WINDOW, "max_window_layers": 3}, 4, (FULL, FULL, FULL, SLIDING)),
        ({**WINDOW, "max_window_layers": 9}, 4, (FULL,) * 4),
        ({**WINDOW, "sliding_window": None, "max_window_layers": 0}, None, (FULL,) * 4),
        ({**WINDOW, "max_window_layers": 0, "layer_types": [FULL, SLIDING] * 2}, 4, (FULL, SLIDING) * 2),
    ],
)
def test_windows(model_type, keys, window, types):
    config = config_of(model_type, **keys)
    assert (config.sliding_window, config.layer_types) == (window, types)
    reference = transformers.AutoConfig.for_model(model_type, **SIZES, **keys)
    assert (reference.sliding_window, tuple(reference.layer_types)) == (window, types)


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
def test_a_config_of_transformers_4(model_type):
    keys = {
        "rope_theta": 1e6,
        "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
        **WINDOW,
        "max_window_layers": 2,
    }
    written = transformers.AutoConfig.for_model(model_type, **SIZES, **keys).to_dict()
    assert "rope_theta" not in written
    assert config_of(model_type, **keys) == config_of(**written)


def test_layers_with_and_without_a_window_are_stacked_apart():
    raw = {"model_type": "qwen2", **SIZES, "num_hidden_layers": 7, **WINDOW, "max_window_layers": 4}
    leaves = FlaxAutoModelForCausalLM.from_config(raw, abstract=True, scan_layers=True).blueprint.leaves
    assert {path.split(".")[2] for path in leaves if path.startswith("model.layers.")} == {"0:4", "4:7"}


@pytest.mark.parametrize(
    "model_type, keys, message",
    [
        ("qwen2", {"attention_bias": False}, r"attention_bias=False \(expected True\)"),
        ("qwen2", {"use_mrope": True}, r"use_mrope=True \(expected False\)"),
        ("qwen3", {"mlp_bias": True}, r"mlp_bias=True \(expected False\)"),
        (
            "qwen2",
            {"layer_types": [FULL, SLIDING] * 2},
            "layer_types holds sliding_attention, but .* no sliding_window",
        ),
        ("qwen3", {"layer_types": [FULL] * 3}, "layer_types has 3 entries, but num_hidden_layers is 4"),
        ("qwen3", {"final_logit_softcapping": 30.0}, r"final_logit_softcapping=30\.0 \(expected None\)"),
        ("qwen3", {"embedding_scale": 2.0}, r"embedding_scale=2\.0 \(expected None\)"),
        ("qwen3", {"num_experts": 4}, r"num_experts=4 \(expected None\)"),
        (
            "qwen3",
            {**WINDOW, "max_window_layers": 2, "rope_parameters": {FULL: {"rope_theta": 5.0}}},
            "rope_parameters is given by kind of layer, but not for sliding_attention, which layer_types holds",
        ),
    ],
)
def test_what_is_refused(model_type, keys, message):
    with pytest.raises(ValueError, match=message):
        config_of(model_type, **keys)


def test_a_key_of_another_family_can_be_ignored():
    config = config_of("qwen2", ignore=("final_logit_softcapping",), final_logit_softcapping=30.0)
    assert config == config_of("qwen2")
