"""ViT and DINOv2: what is theirs alone; the laws are in test_families.py."""

import importlib

import jax
import numpy as np
import pytest

from jpeft_interop.models import FlaxAutoModel, FlaxAutoModelForImageClassification
from jpeft_interop.models._vision import bicubic

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
oracle = importlib.import_module("tests.interop.models.torch_oracle")
cases = importlib.import_module("tests.interop.models.cases_vision")

CONFIGS = {
    "vit": {"model_type": "vit", **cases.SIZES, "num_hidden_layers": 1},
    "dinov2": {"model_type": "dinov2", **cases.DINO_SIZES, "num_hidden_layers": 1},
}


def called(config, shape, **inputs):
    model = FlaxAutoModel.from_config(config, abstract=True)
    return jax.eval_shape(lambda params, x: model.apply(params, pixel_values=x, **inputs), model.params, np.ones(shape))


@pytest.mark.parametrize("known, wanted", [(3, 5), (5, 3), (1, 4), (16, 37), (37, 16)])
def test_interpolation_is_that_of_torch(known, wanted):
    values = np.random.default_rng(0).normal(size=(1, 2, known, known)).astype(np.float32)
    expected = torch.nn.functional.interpolate(torch.tensor(values), size=(wanted, known + 1), mode="bicubic")
    actual = np.einsum("hi,wj,bcij->bchw", bicubic(known, wanted), bicubic(known, known + 1), values)
    np.testing.assert_allclose(actual, expected.numpy(), atol=1e-5)


@pytest.mark.parametrize("model_type", CONFIGS)
def test_images_of_a_wrong_shape(model_type):
    for shape in ((1, 3, 12, 12), (2, 12, 12)):
        with pytest.raises(
            ValueError, match=r"pixel_values must be \(batch, 2 channels, height, width\), got \(.*12\)"
        ):
            called(CONFIGS[model_type], shape)
    model = FlaxAutoModel.from_config(CONFIGS[model_type], abstract=True)
    with pytest.raises(ValueError, match="pixel_values must be .* got None"):
        jax.eval_shape(model.apply, model.params)


def test_vit_takes_images_of_one_size():
    assert called(CONFIGS["vit"], (1, 2, 12, 12)).last_hidden_state.shape == (1, 10, 24)
    with pytest.raises(ValueError, match="pixel_values are 12 x 16, the model's image_size is 12 x 12: resize"):
        called(CONFIGS["vit"], (1, 2, 12, 16))


def test_dinov2_interpolates_from_a_square():
    assert called(CONFIGS["dinov2"], (1, 2, 12, 16)).last_hidden_state.shape == (1, 13, 24)
    with pytest.raises(ValueError, match="6 positions are not those of a square image, so there are none for 16 x 12"):
        called({**CONFIGS["dinov2"], "image_size": [8, 12]}, (1, 2, 16, 12))


def test_masked_patches():
    with pytest.raises(ValueError, match=r"bool_masked_pos must be \(batch, patches\) = \(1, 9\), got \(1, 10\)"):
        called(CONFIGS["dinov2"], (1, 2, 12, 12), bool_masked_pos=np.ones((1, 10)))
    with pytest.raises(ValueError, match="bool_masked_pos needs a model with use_mask_token=True"):
        called({**CONFIGS["dinov2"], "use_mask_token": False}, (1, 2, 12, 12), bool_masked_pos=np.ones((1, 9)))


def test_gated_layers_of_the_giant(tmp_path):
    config = transformers.Dinov2Config(**cases.DINO_SIZES, use_swiglu_ffn=True, mlp_ratio=3, use_mask_token=False)
    theirs = oracle.random_model("Dinov2ForImageClassification", config)
    ours = FlaxAutoModelForImageClassification.from_pretrained(
        oracle.saved(theirs, tmp_path, save_original_format=False)
    )
    oracle.assert_close(
        oracle.jax_output(ours, "logits", pixel_values=cases.images()),
        oracle.torch_output(theirs, "logits", pixel_values=cases.images()),
    )


@pytest.mark.parametrize("model_type", CONFIGS)
def test_sizes_that_do_not_fit(model_type):
    with pytest.raises(ValueError, match="hidden_size 10 is not a multiple of num_attention_heads 4"):
        FlaxAutoModel.from_config({"model_type": model_type, "hidden_size": 10, "num_attention_heads": 4})
    with pytest.raises(ValueError, match="activation 'sine' is not known"):
        FlaxAutoModel.from_config({"model_type": model_type, "hidden_act": "sine"})
