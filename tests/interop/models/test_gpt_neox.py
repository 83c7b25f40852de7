"""GPT-NeoX alone: the settings and the names of old checkpoints."""

import importlib
import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jpeft_interop.models import FlaxAutoModelForCausalLM
from jpeft_interop.models.gpt_neox import read_config

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
oracle = importlib.import_module("tests.interop.models.torch_oracle")

SIZES = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 20,
}
IDS = oracle.token_ids((2, 7), 40)


def test_a_checkpoint_of_transformers_4(tmp_path):
    rope = {"rope_type": "default", "rope_theta": 300.0, "partial_rotary_factor": 0.5}
    theirs = oracle.random_model("GPTNeoXForCausalLM", transformers.GPTNeoXConfig(**SIZES, rope_parameters=rope))
    oracle.saved(theirs, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["rope_parameters"]
    (tmp_path / "config.json").write_text(json.dumps({**config, "rotary_pct": 0.5, "rotary_emb_base": 300}))
    tensors = load_file(tmp_path / "model.safetensors")
    assert "embed_out.weight" in tensors
    for layer in range(2):
        module = f"gpt_neox.layers.{layer}.attention"
        tensors[f"{module}.bias"] = np.tril(np.ones((1, 1, 20, 20), np.float32))
        tensors[f"{module}.masked_bias"] = np.asarray(-1e9, np.float32)
        tensors[f"{module}.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    ours = FlaxAutoModelForCausalLM.from_pretrained(tmp_path)
    oracle.assert_close(
        oracle.jax_output(ours, "logits", input_ids=IDS), oracle.torch_output(theirs, "logits", input_ids=IDS)
    )


def test_rotary_settings_wherever_they_stand():
    sizes = {"hidden_size": 32, "num_attention_heads": 2}
    assert read_config(sizes).rope.dim == 4
    assert read_config({**sizes, "rotary_pct": 0.5}).rope.dim == 8
    assert read_config({**sizes, "partial_rotary_factor": 1.0}).rope.dim == 16
    scaled = read_config({**sizes, "rope_scaling": {"type": "linear", "factor": 4.0}, "rotary_emb_base": 500}).rope
    assert (scaled.dim, scaled.rope_type, scaled.factor, scaled.rope_theta) == (4, "linear", 4.0, 500)
    with pytest.raises(ValueError, match="rotary_pct=0.5 and partial_rotary_factor=0.25, two names"):
        read_config({**sizes, "rotary_pct": 0.5, "partial_rotary_factor": 0.25})


def test_refused_keys():
    with pytest.raises(ValueError, match="rope_type='bent'"):
        read_config({"rope_parameters": {"rope_type": "bent"}})
    with pytest.raises(ValueError, match="activation 'laplace' is not known"):
        read_config({"hidden_act": "laplace"})
    assert read_config({"is_decoder": True}) == read_config({})
