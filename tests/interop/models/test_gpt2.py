"""GPT-2 alone: token types, and the names in old checkpoints."""

import importlib

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jpeft_interop.models import FlaxAutoModel, FlaxAutoModelForCausalLM
from jpeft_interop.models.gpt2 import attention_scales, read_config

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
oracle = importlib.import_module("tests.interop.models.torch_oracle")

IDS = oracle.token_ids((2, 7), 40)


def causal_model(**changes):
    sizes = {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 20}
    return oracle.random_model("GPT2LMHeadModel", transformers.GPT2Config(**{**sizes, **changes}))


def test_token_type_ids(tmp_path):
    theirs = causal_model()
    ours = FlaxAutoModelForCausalLM.from_pretrained(oracle.saved(theirs, tmp_path))
    inputs = {"input_ids": IDS, "token_type_ids": oracle.token_ids((2, 7), 40, seed=1)}
    oracle.assert_close(oracle.jax_output(ours, "logits", **inputs), oracle.torch_output(theirs, "logits", **inputs))


def test_checkpoints_of_the_hub_lack_the_prefix_and_hold_buffers(tmp_path):
    theirs = causal_model()
    oracle.saved(theirs, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    old = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    assert "wte.weight" in old and "lm_head.weight" not in old
    for layer in range(2):
        old[f"h.{layer}.attn.bias"] = np.tril(np.ones((1, 1, 20, 20), np.float32))
        old[f"h.{layer}.attn.masked_bias"] = np.asarray(-1e4, np.float32)
    save_file(old, tmp_path / "model.safetensors", metadata={"format": "pt"})
    expected = oracle.torch_output(theirs, "logits", input_ids=IDS)
    ours = FlaxAutoModelForCausalLM.from_pretrained(tmp_path)
    oracle.assert_close(oracle.jax_output(ours, "logits", input_ids=IDS), expected)
    bare = FlaxAutoModel.from_pretrained(tmp_path)
    np.testing.assert_array_equal(bare.params["wte"]["embedding"], tensors["transformer.wte.weight"])


def test_layers_of_different_scales_are_not_stacked(tmp_path):
    theirs = causal_model(scale_attn_by_inverse_layer_idx=True)
    ours = FlaxAutoModelForCausalLM.from_pretrained(oracle.saved(theirs, tmp_path), scan_layers=True)
    assert set(ours.params["transformer"]["h"]) == {"0", "1"}
    assert attention_scales(ours.config) == pytest.approx((8**-0.5, 8**-0.5 / 2))
    oracle.assert_close(
        oracle.jax_output(ours, "logits", input_ids=IDS), oracle.torch_output(theirs, "logits", input_ids=IDS)
    )


def test_refused_keys():
    with pytest.raises(ValueError, match=r"add_cross_attention=True \(expected False\)"):
        read_config({"add_cross_attention": True})
    with pytest.raises(ValueError, match="activation 'laplace' is not known"):
        read_config({"activation_function": "laplace"})
    assert read_config({"n_embd": 8, "n_head": 2}).intermediate_size == 32
