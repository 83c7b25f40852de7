"""RoBERTa and DistilBERT: what is theirs alone; the laws are in test_families.py."""

import importlib

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jpeft_interop.models import FlaxAutoModel, FlaxAutoModelForMaskedLM, FlaxAutoModelForSequenceClassification

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
oracle = importlib.import_module("tests.interop.models.torch_oracle")
cases = importlib.import_module("tests.interop.models.cases_encoders")


def small(make, **changes):
    depth = {"n_layers": 1} if make is cases.distilbert else {"num_hidden_layers": 1}
    return make(**depth, **changes)


@pytest.mark.parametrize(
    "name, make", [("RobertaForMaskedLM", cases.roberta), ("DistilBertForMaskedLM", cases.distilbert)]
)
def test_untied_masked_lm(tmp_path, name, make):
    theirs = oracle.random_model(name, small(make, tie_word_embeddings=False))
    ours = FlaxAutoModelForMaskedLM.from_pretrained(oracle.saved(theirs, tmp_path))
    ids = oracle.token_ids((2, 9), 40)
    oracle.assert_close(
        oracle.jax_output(ours, "logits", input_ids=ids), oracle.torch_output(theirs, "logits", input_ids=ids)
    )


def test_names_of_old_checkpoints(tmp_path):
    theirs = oracle.random_model("RobertaForSequenceClassification", small(cases.roberta))
    file = oracle.saved(theirs, tmp_path) / "model.safetensors"
    old = {}
    for name, value in load_file(file).items():
        old[name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")] = value
    old["roberta.embeddings.position_ids"] = np.arange(29)[None]
    old["roberta.pooler.dense.weight"] = np.zeros((24, 24), np.float32)
    old["lm_head.bias"] = np.zeros(40, np.float32)
    save_file(old, file, metadata={"format": "pt"})
    ours = FlaxAutoModelForSequenceClassification.from_pretrained(tmp_path)
    ids = oracle.token_ids((2, 7), 40)
    oracle.assert_close(
        oracle.jax_output(ours, "logits", input_ids=ids), oracle.torch_output(theirs, "logits", input_ids=ids)
    )


@pytest.mark.parametrize("name, make", [("RobertaModel", cases.roberta), ("DistilBertModel", cases.distilbert)])
def test_bare_checkpoint_gets_a_new_head(tmp_path, name, make):
    theirs = oracle.random_model(name, small(make))
    oracle.saved(theirs, tmp_path)
    with pytest.warns(UserWarning, match=r"newly initialised: .*classifier\..*; train them"):
        ours = FlaxAutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=5)
    assert ours.apply(ours.params, np.ones((2, 3), int)).logits.shape == (2, 5)


@pytest.mark.parametrize("model_type, fits", [("roberta", 9), ("distilbert", 12)], ids=["roberta", "distilbert"])
def test_a_text_that_is_too_long(model_type, fits):
    sizes = {"vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "pad_token_id": 2}
    config = {"model_type": model_type, "max_position_embeddings": 12, **sizes}
    model = FlaxAutoModel.from_config(config, abstract=True)
    shape = jax.eval_shape(model.apply, model.params, np.ones((1, fits), int)).last_hidden_state.shape
    assert shape == (1, fits, 8)
    with pytest.raises(ValueError, match=rf"{fits + 1} tokens exceed the {fits} .*max_position_embeddings=12"):
        jax.eval_shape(model.apply, model.params, np.ones((1, fits + 1), int))


def test_positions_need_a_padding_token():
    with pytest.raises(ValueError, match="pad_token_id is None.*expected a number"):
        FlaxAutoModel.from_config({"model_type": "roberta", "pad_token_id": None}, abstract=True)


@pytest.mark.parametrize("model_type", ["roberta", "distilbert"])
def test_sizes_that_do_not_fit(model_type):
    sizes = {"hidden_size": 10, "num_attention_heads": 4}
    with pytest.raises(ValueError, match="hidden_size 10 is not a multiple of num_attention_heads 4"):
        FlaxAutoModel.from_config({"model_type": model_type, **sizes}, abstract=True)
