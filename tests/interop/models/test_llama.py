"""Llama and Mistral against the PyTorch models of transformers."""

import importlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jpeft_interop.models import (
    FlaxAutoModel,
    FlaxAutoModelForCausalLM,
    FlaxAutoModelForSequenceClassification,
)
from jpeft_interop.models._leaves import tensors_of
from jpeft_interop.models._rotary import read_rope, rotary_tables

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
oracle = importlib.import_module("tests.interop.models.torch_oracle")

VOCABULARY = 61
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 16}
ROPES = {
    "default": {"rope_type": "default", "rope_theta": 500.0},
    "linear": {"rope_type": "linear", "rope_theta": 100.0, "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 4.0},
    "llama3": LLAMA3,
    "yarn": YARN,
    "yarn-options": YARN
    | {"beta_fast": 8.0, "beta_slow": 2.0, "mscale": 0.7, "mscale_all_dim": 0.3, "truncate": False},
}


def llama_config(**changes):
    return transformers.LlamaConfig(**{**SIZES, "num_key_value_heads": 2, **changes})


def mistral_config(**changes):
    return transformers.MistralConfig(**{**SIZES, "num_key_value_heads": 2, **changes})


def causal_logits(theirs, folder, **inputs):
    ours = FlaxAutoModelForCausalLM.from_pretrained(oracle.saved(theirs, folder))
    return oracle.jax_output(ours, "logits", **inputs), oracle.torch_output(theirs, "logits", **inputs)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_causal_logits_with_padding(tmp_path, side, kv_heads):
    theirs = oracle.random_model("LlamaForCausalLM", llama_config(num_key_value_heads=kv_heads))
    mask = oracle.padded(side, batch=3, length=11, pads=4)
    actual, expected = causal_logits(
        theirs, tmp_path, input_ids=oracle.token_ids((3, 11), VOCABULARY), attention_mask=mask
    )
    oracle.assert_close(actual, expected, mask)


@pytest.mark.parametrize(
    "changes",
    [
        {"attention_bias": True, "mlp_bias": True},
        {"tie_word_embeddings": True},
        {"head_dim": 12},
        {"hidden_act": "gelu_pytorch_tanh", "rms_norm_eps": 1e-2},
        {"num_hidden_layers": 11, "hidden_size": 16},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_causal_logits_of_config(tmp_path, changes):
    theirs = oracle.random_model("LlamaForCausalLM", llama_config(**changes))
    oracle.assert_close(*causal_logits(theirs, tmp_path, input_ids=oracle.token_ids((2, 9), VOCABULARY)))


@pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES)
def test_rope_types(tmp_path, rope):
    length = 96  # beyond max_position_embeddings, where the dynamic type begins to act
    ids = oracle.token_ids((2, length), VOCABULARY)
    theirs = oracle.random_model("LlamaForCausalLM", llama_config(rope_parameters=dict(rope)))
    actual, expected = causal_logits(theirs, tmp_path, input_ids=ids)
    oracle.assert_close(actual, expected)
    if rope["rope_type"] != "default":
        unscaled = llama_config(rope_parameters={"rope_type": "default", "rope_theta": rope["rope_theta"]})
        without = oracle.torch_output(oracle.random_model("LlamaForCausalLM", unscaled), "logits", input_ids=ids)
        assert np.abs(without - expected).max() > 0.01 * np.abs(expected).max()


def test_dynamic_rope_within_the_trained_length_is_the_default():
    positions = jnp.arange(64)[None]
    dynamic = read_rope({"rope_parameters": ROPES["dynamic"]}, head_dim=8, max_positions=64)
    default = read_rope({"rope_theta": 100.0}, head_dim=8, max_positions=64)
    for ours, plain in zip(
        rotary_tables(dynamic, positions, jnp.float32), rotary_tables(default, positions, jnp.float32), strict=True
    ):
        np.testing.assert_allclose(ours, plain, atol=1e-5)


def test_rope_of_transformers_4(tmp_path):
    theirs = oracle.random_model("LlamaForCausalLM", llama_config(rope_parameters=dict(LLAMA3)))
    ids = oracle.token_ids((2, 40), VOCABULARY)
    expected, _ = causal_logits(theirs, tmp_path, input_ids=ids)
    config = json.loads((tmp_path / "config.json").read_text())
    scaling = config.pop("rope_parameters")
    config["rope_theta"] = scaling.pop("rope_theta")
    config["rope_scaling"] = {**scaling, "type": scaling["rope_type"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    ours = FlaxAutoModelForCausalLM.from_pretrained(tmp_path)
    np.testing.assert_array_equal(oracle.jax_output(ours, "logits", input_ids=ids), expected)


@pytest.mark.parametrize("window", [1, 3, None])
def test_sliding_window(tmp_path, window):
    theirs = oracle.random_model("MistralForCausalLM", mistral_config(sliding_window=window))
    ids, mask = oracle.token_ids((2, 12), VOCABULARY), oracle.padded("right", batch=2, length=12, pads=3)
    actual, expected = causal_logits(theirs, tmp_path, input_ids=ids, attention_mask=mask)
    oracle.assert_close(actual, expected, mask)
    if window is not None:
        wide = oracle.random_model("MistralForCausalLM", mistral_config(sliding_window=None))
        assert (
            np.abs(oracle.torch_output(wide, "logits", input_ids=ids) - expected).max() > 0.01 * np.abs(expected).max()
        )


def test_position_ids_and_packed_sequences(tmp_path):
    # With a cache, transformers does not look for packed sequences.
    theirs = oracle.random_model("LlamaForCausalLM", llama_config(use_cache=False))
    ids = oracle.token_ids((2, 10), VOCABULARY)
    shifted = np.arange(10)[None] + np.array([[0], [5]])
    packed = np.array([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5], [0, 1, 0, 1, 2, 0, 1, 2, 3, 4]])
    ours = FlaxAutoModelForCausalLM.from_pretrained(oracle.saved(theirs, tmp_path))
    for positions in (shifted, packed):
        oracle.assert_close(
            oracle.jax_output(ours, "logits", input_ids=ids, position_ids=positions),
            oracle.torch_output(theirs, "logits", input_ids=ids, position_ids=positions),
        )
    alone = oracle.jax_output(ours, "logits", input_ids=ids[:1, 4:])
    together = oracle.jax_output(ours, "logits", input_ids=ids[:1], position_ids=packed[:1])
    oracle.assert_close(together[:, 4:], alone)


def test_inputs_embeds(tmp_path):
    theirs = oracle.random_model("LlamaForCausalLM", llama_config())
    embeds = np.random.default_rng(0).normal(size=(2, 5, 32)).astype(np.float32)
    oracle.assert_close(*causal_logits(theirs, tmp_path, inputs_embeds=embeds))


@pytest.mark.parametrize("family", ["Llama", "Mistral"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_sequence_classification(tmp_path, family, side):
    config = {"Llama": llama_config, "Mistral": mistral_config}[family](num_labels=3)
    theirs = oracle.random_model(f"{family}ForSequenceClassification", config)
    mask = oracle.padded(side, batch=3, length=8, pads=3)
    inputs = {"input_ids": oracle.token_ids((3, 8), VOCABULARY) * mask, "attention_mask": mask}
    ours = FlaxAutoModelForSequenceClassification.from_pretrained(oracle.saved(theirs, tmp_path))
    assert ours.config.num_labels == 3
    oracle.assert_close(oracle.jax_output(ours, "logits", **inputs), oracle.torch_output(theirs, "logits", **inputs))


def test_bare_model(tmp_path):
    theirs = oracle.random_model("LlamaModel", llama_config())
    ids = oracle.token_ids((2, 7), VOCABULARY)
    ours = FlaxAutoModel.from_pretrained(oracle.saved(theirs, tmp_path))
    oracle.assert_close(
        oracle.jax_output(ours, "last_hidden_state", input_ids=ids),
        oracle.torch_output(theirs, "last_hidden_state", input_ids=ids),
    )


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "LlamaForSequenceClassification", "LlamaModel"])
def test_paths_are_those_of_the_torch_modules(tmp_path, name):
    theirs = oracle.random_model(name, llama_config(attention_bias=True))
    auto = {
        "LlamaForCausalLM": FlaxAutoModelForCausalLM,
        "LlamaForSequenceClassification": FlaxAutoModelForSequenceClassification,
        "LlamaModel": FlaxAutoModel,
    }[name]
    ours = auto.from_config(oracle.saved(theirs, tmp_path), abstract=True)
    assert {name: shape for leaf in ours.blueprint.leaves.values() for name, shape in tensors_of(leaf).items()} == {
        key: tuple(value.shape) for key, value in theirs.state_dict().items()
    }
    modules = {module for module, _ in theirs.named_modules()}
    assert {path.rpartition(".")[0] for path in ours.blueprint.leaves} <= modules


@pytest.mark.parametrize("source, target", [("LlamaForCausalLM", "base"), ("LlamaModel", "head")])
def test_prefix_of_the_checkpoint_may_differ(tmp_path, source, target):
    theirs = oracle.random_model(source, llama_config())
    oracle.saved(theirs, tmp_path)
    if target == "base":
        ours = FlaxAutoModel.from_pretrained(tmp_path)
        embedding = ours.params["embed_tokens"]["embedding"]
        expected = theirs.model.embed_tokens.weight
    else:
        with pytest.warns(UserWarning, match=r"newly initialised: score\.weight; train"):
            ours = FlaxAutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=4)
        assert ours.params["score"]["kernel"].shape == (32, 4)
        embedding = ours.params["model"]["embed_tokens"]["embedding"]
        expected = theirs.embed_tokens.weight
    np.testing.assert_array_equal(embedding, expected.detach().numpy())


def test_sharded_checkpoint(tmp_path):
    theirs = oracle.random_model("LlamaForCausalLM", llama_config())
    actual, expected = causal_logits(theirs, tmp_path / "whole", input_ids=oracle.token_ids((2, 6), VOCABULARY))
    folder = oracle.saved(theirs, tmp_path / "shards", max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    ours = FlaxAutoModelForCausalLM.from_pretrained(folder)
    np.testing.assert_array_equal(
        oracle.jax_output(ours, "logits", input_ids=oracle.token_ids((2, 6), VOCABULARY)), actual
    )
    oracle.assert_close(actual, expected)


def test_bfloat16_checkpoint(tmp_path):
    theirs = oracle.random_model("LlamaForCausalLM", llama_config()).bfloat16()
    ids = oracle.token_ids((2, 9), VOCABULARY)
    oracle.saved(theirs, tmp_path)
    stored = FlaxAutoModelForCausalLM.from_pretrained(tmp_path)
    assert {leaf.dtype for leaf in jax.tree.leaves(stored.params)} == {jnp.dtype(jnp.bfloat16)}
    wide = FlaxAutoModelForCausalLM.from_pretrained(tmp_path, param_dtype=jnp.float32)
    cast = FlaxAutoModelForCausalLM.from_pretrained(tmp_path, dtype="float32")
    # Loaded anew: .bfloat16() has rounded the rotary frequencies of `theirs`, which no checkpoint holds.
    reloaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    expected = oracle.torch_output(reloaded, "logits", input_ids=ids)
    oracle.assert_close(oracle.jax_output(wide, "logits", input_ids=ids), expected)
    oracle.assert_close(oracle.jax_output(cast, "logits", input_ids=ids), expected)
    rough = jax.jit(stored.apply)(stored.params, ids).logits
    assert rough.dtype == jnp.bfloat16
    assert np.abs(np.asarray(rough, np.float32) - expected).max() < 0.05 * np.abs(expected).max()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("max_shard_bytes", [10**9, 20_000])
def test_transformers_loads_what_is_saved(tmp_path, tied, max_shard_bytes):
    config = llama_config(tie_word_embeddings=tied, rope_parameters=dict(LLAMA3), attention_bias=True)
    theirs = oracle.random_model("LlamaForCausalLM", config)
    ids = oracle.token_ids((2, 9), VOCABULARY)
    ours = FlaxAutoModelForCausalLM.from_pretrained(oracle.saved(theirs, tmp_path / "theirs"))
    doubled = jax.tree.map(lambda leaf: 1.5 * leaf, ours.params)
    ours.save_pretrained(tmp_path / "ours", doubled, max_shard_bytes=max_shard_bytes)
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert type(back) is type(theirs)
    for name, value in theirs.state_dict().items():
        np.testing.assert_array_equal(back.state_dict()[name].numpy(), 1.5 * value.numpy())
    logits = np.asarray(jax.jit(ours.apply)(doubled, ids).logits)
    oracle.assert_close(logits, oracle.torch_output(back, "logits", input_ids=ids))


def test_the_defaults_are_those_of_transformers():
    for model_type, config in (("llama", transformers.LlamaConfig()), ("mistral", transformers.MistralConfig())):
        ours = FlaxAutoModelForCausalLM.from_config({"model_type": model_type}, abstract=True).config
        again = FlaxAutoModelForCausalLM.from_config(config.to_dict(), abstract=True).config
        assert ours == again
