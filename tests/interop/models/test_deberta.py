"""DeBERTa: what is its alone; the laws are in test_families.py."""

import importlib

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jpeft_interop.models import FlaxAutoModel, FlaxAutoModelForMaskedLM
from jpeft_interop.models.deberta import DebertaConfig, distances

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
oracle = importlib.import_module("tests.interop.models.torch_oracle")
cases = importlib.import_module("tests.interop.models.cases_encoders")
modelling = importlib.import_module("transformers.models.deberta_v2.modeling_deberta_v2")


@pytest.mark.parametrize("buckets, furthest", [(256, 512), (6, 19), (32, 128), (50, 512), (-1, 40), (256, 300)])
@pytest.mark.parametrize("length", [1, 600])
def test_distances_are_those_of_transformers(buckets, furthest, length):
    config = DebertaConfig(position_buckets=buckets, max_relative_positions=furthest)
    sequence = torch.zeros(1, length, 1)
    relative = modelling.build_relative_position(sequence, sequence, buckets, furthest)[0]
    expected = torch.clamp(relative + config.span, 0, 2 * config.span - 1)
    np.testing.assert_array_equal(distances(length, config), expected.numpy())


def test_the_head_of_the_published_v3_models(tmp_path):
    theirs = oracle.random_model("DebertaV2ForMaskedLM", cases.deberta(legacy=False, num_hidden_layers=1))
    file = oracle.saved(theirs, tmp_path) / "model.safetensors"
    unused = {
        "mask_predictions.dense.weight": np.zeros((3, 24), np.float32),
        "deberta.embeddings.position_embeddings.weight": np.zeros((29, 24), np.float32),
    }
    save_file({**load_file(file), **unused}, file, metadata={"format": "pt"})
    ours = FlaxAutoModelForMaskedLM.from_pretrained(tmp_path)
    ids = oracle.token_ids((2, 9), 40)
    oracle.assert_close(
        oracle.jax_output(ours, "logits", input_ids=ids), oracle.torch_output(theirs, "logits", input_ids=ids)
    )


def test_length_is_bounded_by_positions_only():
    def shape(config):
        model = FlaxAutoModel.from_config(config.to_dict(), abstract=True)
        return jax.eval_shape(model.apply, model.params, np.ones((1, 40), int)).last_hidden_state.shape

    assert shape(cases.deberta()) == (1, 40, 24)
    with pytest.raises(ValueError, match="40 tokens exceed the 29 .*max_position_embeddings=29"):
        shape(cases.deberta(position_biased_input=True))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"pos_att_type": "c2p|p2p"}, "pos_att_type holds p2p; expected c2p or p2c"),
        ({"norm_rel_ebd": "batch_norm"}, "norm_rel_ebd='batch_norm'.*expected 'none' or 'layer_norm'"),
        ({"pooler_hidden_size": 99}, "pooler_hidden_size=99.*expected 1536"),
        ({"attention_head_size": 99}, "attention_head_size=99.*expected 64"),
        ({"conv_kernel_size": 4}, "conv_kernel_size is 4; expected an odd number"),
        ({"legacy": False, "tie_word_embeddings": False}, "tie_word_embeddings=False.*expected True"),
        ({"conv_act": "sine"}, "activation 'sine' is not known"),
        ({"hidden_size": 1530}, "hidden_size 1530 is not a multiple of num_attention_heads 24"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        FlaxAutoModel.from_config({"model_type": "deberta-v2", **changes}, abstract=True)
