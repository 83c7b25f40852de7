"""CLIP: what is its alone; the laws are in test_families.py."""

import importlib

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jpeft_interop.models import FlaxAutoModel, FlaxAutoModelForImageClassification

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
oracle = importlib.import_module("tests.interop.models.torch_oracle")
cases = importlib.import_module("tests.interop.models.cases_vision")

INPUTS = cases.texts_and_pictures()[-1]


@pytest.fixture(scope="module")
def theirs():
    return oracle.random_model("CLIPModel", cases.clip(num_hidden_layers=2))


@pytest.fixture
def folder(theirs, tmp_path):
    return oracle.saved(theirs, tmp_path)


def test_both_towers(theirs, folder):
    ours = FlaxAutoModel.from_pretrained(folder, scan_layers=True, remat="nothing_saveable")
    actual = jax.jit(lambda params: ours.apply(params, **INPUTS, output_hidden_states=True))(ours.params)
    with torch.no_grad():
        inputs = {name: torch.tensor(value) for name, value in INPUTS.items()}
        expected = theirs(**inputs, output_hidden_states=True)
    for name in ("logits_per_image", "logits_per_text", "text_embeds", "image_embeds"):
        oracle.assert_close(np.asarray(getattr(actual, name)), expected[name].numpy())
    for name in ("text_model_output", "vision_model_output"):
        ours_of, theirs_of = getattr(actual, name), expected[name]
        oracle.assert_close(np.asarray(ours_of.pooler_output), theirs_of.pooler_output.numpy())
        assert len(ours_of.hidden_states) == len(theirs_of.hidden_states)
        for state, reference in zip(ours_of.hidden_states, theirs_of.hidden_states, strict=True):
            tokens = INPUTS["attention_mask"] if name == "text_model_output" else None
            oracle.assert_close(np.asarray(state), reference.numpy(), tokens)


def test_a_classifier_from_the_checkpoint_of_both_towers(theirs, folder):
    with pytest.warns(UserWarning, match=r"newly initialised: classifier\.bias, classifier\.weight; train them"):
        ours = FlaxAutoModelForImageClassification.from_pretrained(folder, num_labels=5)
    kernel = ours.params["vision_model"]["embeddings"]["patch_embedding"]["kernel"]
    stored = theirs.vision_model.embeddings.patch_embedding.weight.detach().numpy()
    np.testing.assert_array_equal(np.asarray(kernel), stored.transpose(2, 3, 1, 0))
    assert ours.apply(ours.params, pixel_values=INPUTS["pixel_values"]).logits.shape == (2, 5)


def test_names_of_old_checkpoints(tmp_path):
    theirs = oracle.random_model("CLIPTextModel", transformers.CLIPTextConfig(**{**cases.TEXT, "num_hidden_layers": 1}))
    file = oracle.saved(theirs, tmp_path) / "model.safetensors"
    old = {f"text_model.{name.removeprefix('text_model.')}": value for name, value in load_file(file).items()}
    save_file({**old, "text_model.embeddings.position_ids": np.arange(13)[None]}, file, metadata={"format": "pt"})
    ours = FlaxAutoModel.from_pretrained(tmp_path)
    inputs = cases.texts()[0]
    oracle.assert_close(
        oracle.jax_output(ours, "pooler_output", **inputs), oracle.torch_output(theirs, "pooler_output", **inputs)
    )


def test_the_longer_of_two_keys_decides():
    short, longer = {"hidden_size": 16, "num_attention_heads": 4}, {"hidden_size": 24, "num_hidden_layers": 3}
    raw = {"text_config": {**short, "num_hidden_layers": 2}, "text_config_dict": longer}
    expected = transformers.CLIPConfig(**raw).text_config
    ours = FlaxAutoModel.from_config({"model_type": "clip", **raw}, abstract=True).config.text_config
    for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"):
        assert getattr(ours, name) == getattr(expected, name)
    plain = {"model_type": "clip", "vision_config": short, "vision_config_dict": None}
    assert FlaxAutoModel.from_config(plain, abstract=True).config.vision_config.hidden_size == 16


@pytest.mark.parametrize(
    "raw, message",
    [
        ({"text_config": {"a_new_invention": 3}}, "a_new_invention=3"),
        ({"vision_config": {"a_new_invention": 3}}, "a_new_invention=3"),
        ({"text_config": {"eos_token_id": [2, 7]}}, r"eos_token_id is \[2, 7\]; expected the one number"),
        ({"text_config": {"hidden_act": "sine"}}, "activation 'sine' is not known"),
        ({"vision_config": {"hidden_size": 10, "num_attention_heads": 4}}, "hidden_size 10 is not a multiple of"),
    ],
)
def test_what_is_refused(raw, message):
    with pytest.raises(ValueError, match=message):
        FlaxAutoModel.from_config({"model_type": "clip", **raw}, abstract=True)


def test_texts_and_images_of_a_wrong_shape():
    model = FlaxAutoModel.from_config({**cases.clip().to_dict(), "model_type": "clip"}, abstract=True)

    def called(ids, *image):
        inputs = {"input_ids": np.ones(ids, int), "pixel_values": np.ones(image, np.float32)}
        return jax.eval_shape(lambda params: model.apply(params, **inputs), model.params)

    assert called((3, 13), 2, 2, 12, 12).logits_per_image.shape == (2, 3)
    with pytest.raises(ValueError, match="14 tokens exceed the 13 .*max_position_embeddings=13"):
        called((3, 14), 2, 2, 12, 12)
    with pytest.raises(ValueError, match="pixel_values are 16 x 12, the model's image_size is 12 x 12"):
        called((3, 13), 2, 2, 16, 12)
