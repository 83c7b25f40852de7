"""BLOOM alone: ALiBi, and the settings and names of the checkpoints on the Hub."""

import importlib
import json

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jpeft_interop.models import FlaxAutoModelForCausalLM
from jpeft_interop.models._call import begin
from jpeft_interop.models.bloom import alibi, alibi_slopes, read_config

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
oracle = importlib.import_module("tests.interop.models.torch_oracle")
theirs_of_bloom = importlib.import_module("transformers.models.bloom.modeling_bloom")

HUB = {
    "attention_softmax_in_fp32": True,
    "bias_dropout_fusion": True,
    "masked_softmax_fusion": True,
    "n_embed": 16,
    "n_inner": None,
    "n_layer": 2,
    "num_attention_heads": 2,
    "offset_alibi": 100,
    "pretraining_tp": 2,
    "seq_length": 2048,
    "skip_bias_add": True,
    "skip_bias_add_qkv": False,
    "slow_but_exact": False,
}
IDS = oracle.token_ids((2, 7), 40)


@pytest.mark.parametrize("heads", [1, 2, 3, 5, 8, 12, 14, 16, 71, 112])
def test_slopes(heads):
    expected = theirs_of_bloom._get_alibi_slopes(heads, torch.device("cpu")).numpy()
    np.testing.assert_allclose(alibi_slopes(heads), expected, rtol=1e-6)


def test_the_bias_counts_tokens():
    mask = jnp.asarray([[1, 1, 1, 1, 0], [0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    ours = alibi(begin(3, 5, mask, None, None, None), 3)
    expected = theirs_of_bloom.build_alibi_tensor(torch.tensor(np.asarray(mask)), 3, torch.float32).numpy()
    seen = np.asarray(mask, bool)[:, None, None, :]
    np.testing.assert_allclose(np.where(seen, ours, 0.0), np.where(seen, expected.reshape(3, 3, 1, 5), 0.0), rtol=1e-6)
    np.testing.assert_allclose(alibi(begin(1, 5, None, None, None, None), 3), ours[2:])


def test_the_settings_and_names_of_the_hub(tmp_path):
    theirs = oracle.random_model(
        "BloomForCausalLM", transformers.BloomConfig(vocab_size=40, hidden_size=16, n_layer=2, n_head=2)
    )
    oracle.saved(theirs, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    assert "word_embeddings.weight" in bare
    save_file(bare, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bloom", "vocab_size": 40, **HUB}))
    ours = FlaxAutoModelForCausalLM.from_pretrained(tmp_path)
    oracle.assert_close(
        oracle.jax_output(ours, "logits", input_ids=IDS), oracle.torch_output(theirs, "logits", input_ids=IDS)
    )


def test_position_ids_are_refused():
    model = FlaxAutoModelForCausalLM.from_config({"model_type": "bloom", "vocab_size": 40, **HUB}, abstract=True)
    with pytest.raises(TypeError, match="takes input_ids, attention_mask, inputs_embeds; got position_ids"):
        model.apply(model.params, IDS, position_ids=np.arange(7)[None])


def test_refused_keys():
    with pytest.raises(ValueError, match=r"slow_but_exact=True \(expected False\)"):
        read_config({"slow_but_exact": True})
    with pytest.raises(ValueError, match=r"n_inner=64 \(expected None\)"):
        read_config({"n_inner": 64})
