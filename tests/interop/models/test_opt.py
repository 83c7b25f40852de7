"""OPT alone: its sizes, its positions, and the keys of its configs."""

import importlib

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jpeft
from jpeft_interop.models import FlaxAutoModelForCausalLM
from jpeft_interop.models.opt import read_config

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
oracle = importlib.import_module("tests.interop.models.torch_oracle")

OPT_350M = {
    "model_type": "opt",
    "vocab_size": 50272,
    "hidden_size": 1024,
    "ffn_dim": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "max_position_embeddings": 2048,
    "word_embed_proj_dim": 512,
    "do_layer_norm_before": False,
    "_remove_final_layer_norm": False,
    "activation_dropout": 0.0,
    "layerdrop": 0.0,
    "prefix": "</s>",
}
SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "ffn_dim": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 20,
}
IDS = oracle.token_ids((2, 7), 40)


@pytest.mark.parametrize("scan_layers", [False, True])
def test_the_parameters_of_the_350m_model(scan_layers):
    model = FlaxAutoModelForCausalLM.from_config(OPT_350M, abstract=True, scan_layers=scan_layers)
    assert sum(leaf.size for leaf in jax.tree.leaves(model.params)) == 331_196_416
    config = jpeft.LoraConfig(r=16, target_modules=["q_proj", "v_proj"])
    wrapped = jax.eval_shape(lambda params: jpeft.wrap(params, config, rng=jax.random.key(0)), model.params)
    mask = jpeft.trainable_mask(wrapped)
    leaves = zip(jax.tree.leaves(wrapped), jax.tree.leaves(mask), strict=True)
    trained = [leaf for leaf, trains in leaves if trains]
    assert sum(leaf.size for leaf in trained) == 1_572_864
    assert round(sum(leaf.size * leaf.dtype.itemsize for leaf in trained) / 1e6, 1) == 6.3


def test_position_ids_choose_rows_and_tell_no_sequences_apart(tmp_path):
    theirs = oracle.random_model("OPTForCausalLM", transformers.OPTConfig(**SIZES, use_cache=False))
    ours = FlaxAutoModelForCausalLM.from_pretrained(oracle.saved(theirs, tmp_path))
    for positions in ([[0, 1, 2, 0, 1, 2, 3]] * 2, [[3, 4, 5, 6, 7, 8, 9]]):
        inputs = {"input_ids": IDS, "position_ids": np.asarray(positions)}
        oracle.assert_close(
            oracle.jax_output(ours, "logits", **inputs), oracle.torch_output(theirs, "logits", **inputs)
        )


def test_positions_count_the_tokens_that_are_not_padding():
    model = FlaxAutoModelForCausalLM.from_config({"model_type": "opt", **SIZES})
    mask = np.asarray([[0, 0, 0, 1, 1, 1, 1]])
    padded = oracle.jax_output(model, "logits", input_ids=IDS[:1], attention_mask=mask)
    alone = oracle.jax_output(model, "logits", input_ids=IDS[:1, 3:])
    np.testing.assert_allclose(padded[:, 3:], alone, atol=1e-5)


def test_a_checkpoint_of_the_bare_decoder(tmp_path):
    theirs = oracle.random_model("OPTForCausalLM", transformers.OPTConfig(**SIZES))
    oracle.saved(theirs, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(
        {name.removeprefix("model."): tensor for name, tensor in tensors.items()},
        tmp_path / "model.safetensors",
        metadata={"format": "pt"},
    )
    ours = FlaxAutoModelForCausalLM.from_pretrained(tmp_path)
    oracle.assert_close(
        oracle.jax_output(ours, "logits", input_ids=IDS), oracle.torch_output(theirs, "logits", input_ids=IDS)
    )


def test_refused_keys():
    with pytest.raises(ValueError, match=r"learned_embeddings=False \(expected True\)"):
        read_config({"learned_embeddings": False})
    with pytest.raises(ValueError, match=r"scale_embeddings=True \(expected False\)"):
        read_config({"scale_embeddings": True})
    with pytest.raises(ValueError, match="activation 'laplace' is not known"):
        read_config({"activation_function": "laplace"})
    assert read_config({"hidden_size": 24, "num_attention_heads": 2}).word_embed_proj_dim == 24
