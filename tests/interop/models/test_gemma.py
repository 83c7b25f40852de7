"""Gemma, Gemma 2 and Gemma 3: the keys of their configs, their norms, embeddings and stacks of layers."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jpeft
from jpeft_interop import save_pretrained
from jpeft_interop.models import FlaxAutoModelForCausalLM
from jpeft_interop.models.gemma import RMSNorm

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
oracle = importlib.import_module("tests.interop.models.torch_oracle")

VOCABULARY = 40
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 24,
    "intermediate_size": 28,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "max_position_embeddings": 64,
}
FULL, SLIDING = "full_attention", "sliding_attention"


def config_of(model_type, **keys):
    return FlaxAutoModelForCausalLM.from_config({"model_type": model_type, **SIZES, **keys}, abstract=True).config


def random_gemma3(**changes):
    keys = {**SIZES, "sliding_window": 4, "query_pre_attn_scalar": 7, **changes}
    return oracle.random_model("Gemma3ForCausalLM", transformers.Gemma3TextConfig(**keys))


@pytest.mark.parametrize(
    "keys, act",
    [
        ({"hidden_act": "gelu"}, "gelu_pytorch_tanh"),
        ({"hidden_act": "gelu", "hidden_activation": None}, "gelu_pytorch_tanh"),
        ({"hidden_act": "gelu", "hidden_activation": "gelu_pytorch_tanh"}, "gelu_pytorch_tanh"),
        ({"hidden_act": "silu"}, "silu"),
    ],
)
def test_activation_of_gemma(keys, act):
    assert config_of("gemma", **keys).hidden_act == act


def test_activation_of_gemma_2_and_3_has_another_key():
    for model_type in ("gemma2", "gemma3_text"):
        assert config_of(model_type, hidden_act="silu", hidden_activation="relu").hidden_act == "relu"


@pytest.mark.parametrize(
    "keys",
    [
        {"rope_theta": 5e5, "rope_local_base_freq": 300.0, "sliding_window_pattern": 2},
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
        {"num_hidden_layers": 7},
    ],
)
def test_a_gemma_3_config_of_transformers_4(keys):
    # The one given is changed by transformers.
    written = transformers.Gemma3TextConfig(**{**SIZES, **keys}).to_dict()
    assert set(written["rope_parameters"]) == {FULL, SLIDING}
    assert config_of("gemma3_text", **keys) == config_of(**written)


def test_rotary_settings_by_kind():
    scaling = {"type": "linear", "factor": 8.0}
    old = config_of(
        "gemma3_text", rope_theta=5e5, rope_scaling=scaling, rope_local_base_freq=300.0, num_hidden_layers=6
    )
    ropes = dict(old.ropes)
    assert (ropes[FULL].rope_type, ropes[FULL].rope_theta, ropes[FULL].factor) == ("linear", 5e5, 8.0)
    assert (ropes[SLIDING].rope_type, ropes[SLIDING].rope_theta) == ("default", 300.0)


@pytest.mark.parametrize(
    "model_type, keys, message",
    [
        ("gemma", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
        (
            "gemma",
            {"hidden_act": "silu", "hidden_activation": "relu"},
            r"hidden_activation='relu' \(.*None or 'silu'\)",
        ),
        ("gemma", {"sliding_window": 7}, r"sliding_window=7 \(expected None\)"),
        ("gemma", {"query_pre_attn_scalar": 7}, "query_pre_attn_scalar=7"),
        ("gemma", {"attn_logit_softcapping": 7.0}, "attn_logit_softcapping=7.0"),
        ("gemma2", {"sliding_window_size": 7}, r"sliding_window_size=7 \(expected None or 4096\)"),
        (
            "gemma2",
            {"sliding_window": None},
            "layer_types holds sliding_attention, but the config has no sliding_window",
        ),
        ("gemma2", {"rope_local_base_freq": 7.0}, "rope_local_base_freq=7.0"),
        ("gemma3_text", {"attn_logit_softcapping": 7.0}, r"attn_logit_softcapping=7\.0 \(expected None\)"),
        (
            "gemma3_text",
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0}},
            r"rope_parameters .* rope_type='linear', factor=2\.0 \(expected full_attention and sliding_attention\)",
        ),
    ],
)
def test_what_is_refused(model_type, keys, message):
    with pytest.raises(ValueError, match=message):
        config_of(model_type, **keys)


def test_the_norm_scales_before_it_rounds():
    x = np.random.default_rng(0).normal(size=(50, 24)).astype(np.float32)
    weight = np.random.default_rng(1).normal(size=24).astype(np.float32)
    norm = nnx.merge(nnx.graphdef(RMSNorm(24, eps=1e-6)), nnx.State({"scale": nnx.Param(jnp.asarray(weight))}))
    theirs = importlib.import_module("transformers.models.gemma.modeling_gemma").GemmaRMSNorm(24, eps=1e-6)
    theirs.load_state_dict({"weight": torch.tensor(weight)})
    expected = theirs(torch.tensor(x).bfloat16()).detach().float().numpy()
    actual = np.asarray(norm(jnp.asarray(x, jnp.bfloat16)), np.float32)
    np.testing.assert_array_equal(actual, expected)


def test_inputs_embeds_are_not_scaled(tmp_path):
    theirs = random_gemma3()
    ours = FlaxAutoModelForCausalLM.from_pretrained(oracle.saved(theirs, tmp_path))
    ids = oracle.token_ids((2, 5), VOCABULARY)
    embeds = np.asarray(ours.params["model"]["embed_tokens"]["embedding"])[ids]
    raw, scaled = (
        oracle.jax_output(ours, "logits", inputs_embeds=value) for value in (embeds, embeds * np.float32(24**0.5))
    )
    oracle.assert_close(raw, oracle.torch_output(theirs, "logits", inputs_embeds=embeds))
    oracle.assert_close(scaled, oracle.torch_output(theirs, "logits", input_ids=ids))


@pytest.mark.parametrize(
    "layers, names",
    [
        (8, {"0:5", "5", "6:8"}),
        (14, {*(f"{first}:12:6" for first in range(6)), "12", "13"}),
    ],
)
def test_stacks_of_a_period_of_six(layers, names):
    raw = {"model_type": "gemma3_text", **SIZES, "num_hidden_layers": layers}
    leaves = FlaxAutoModelForCausalLM.from_config(raw, abstract=True, scan_layers=True).blueprint.leaves
    assert {path.split(".")[2] for path in leaves if path.startswith("model.layers.")} == names


@pytest.mark.parametrize("layers, pattern", [(8, 6), (7, 3)])
def test_outputs_of_stacked_layers(tmp_path, layers, pattern):
    theirs = random_gemma3(num_hidden_layers=layers, sliding_window_pattern=pattern)
    ours = FlaxAutoModelForCausalLM.from_pretrained(oracle.saved(theirs, tmp_path), scan_layers=True)
    ids = oracle.token_ids((2, 9), VOCABULARY)
    oracle.assert_close(
        oracle.jax_output(ours, "logits", input_ids=ids), oracle.torch_output(theirs, "logits", input_ids=ids)
    )


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_an_adapter_of_the_embedding_is_scaled_as_the_embedding_is(tmp_path):
    theirs = random_gemma3(tie_word_embeddings=False)
    ours = FlaxAutoModelForCausalLM.from_pretrained(oracle.saved(theirs, tmp_path / "base"))
    wrapped = jpeft.wrap(ours.params, jpeft.LoraConfig(r=3, target_modules=["embed_tokens"], init_lora_weights=False))
    save_pretrained(wrapped, tmp_path / "adapter")
    ids = oracle.token_ids((2, 6), VOCABULARY)
    actual = np.asarray(jax.jit(jpeft.lift(ours.apply))(wrapped, ids).logits)
    adapted = peft.PeftModel.from_pretrained(theirs, str(tmp_path / "adapter")).eval()
    oracle.assert_close(actual, oracle.torch_output(adapted, "logits", input_ids=ids))
    assert np.abs(actual - oracle.jax_output(ours, "logits", input_ids=ids)).max() > 1e-2 * np.abs(actual).max()
