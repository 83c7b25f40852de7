"""Encoders of images in the table of families; what is theirs alone is in test_vision.py and test_clip.py."""

import numpy as np
import transformers

from tests.interop.models.family_case import Case

TASKS = ("base", "image-classification")
SIZES = {
    "hidden_size": 24,
    "intermediate_size": 44,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
    "num_channels": 2,
    "image_size": 12,
    "patch_size": 4,
    "layer_norm_eps": 1e-3,
}
DINO_SIZES = {key: value for key, value in SIZES.items() if key != "intermediate_size"}
TEXT = {
    "vocab_size": 40,
    "hidden_size": 18,
    "intermediate_size": 34,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "max_position_embeddings": 13,
    "layer_norm_eps": 1e-3,
    "bos_token_id": 1,
    "eos_token_id": 7,
    "pad_token_id": 0,
}
VISION = {**SIZES, "hidden_act": "gelu"}


def images(height=12, width=12):
    return np.random.default_rng(4).normal(size=(2, 2, height, width)).astype(np.float32)


def pictures(*sizes):
    return lambda: [{"pixel_values": images(*size)} for size in sizes or [(12, 12)]]


def with_masked_patches():
    return [{"pixel_values": images(), "bool_masked_pos": np.arange(18).reshape(2, 9) % 4 == 1}]


def texts():
    """Three texts that end with token 7, the last of them earlier than the others, and with the last token again."""
    ids = np.random.default_rng(5).integers(8, 40, (3, 11))
    ids[:, -1], ids[-1, 6:] = 7, [7, 0, 0, 0, 7]
    mask = np.ones_like(ids)
    mask[-1, 7:] = 0
    return [{"input_ids": ids}, {"input_ids": ids, "attention_mask": mask}]


def texts_and_pictures():
    return [{**text, "pixel_values": images()} for text in texts()]


def clip(**changes):
    return transformers.CLIPConfig(text_config={**TEXT, **changes}, vision_config=VISION, projection_dim=15)


CASES = [
    Case(
        "vit",
        lambda: transformers.ViTConfig(
            **SIZES, qkv_bias=False, hidden_act="gelu_new", pooler_output_size=10, pooler_act="relu"
        ),
        TASKS,
        pictures(),
        tokens=None,
    ),
    Case(
        "vit-oblong",
        lambda: transformers.ViTConfig(**{**SIZES, "image_size": [8, 12], "patch_size": [2, 4]}),
        TASKS[:1],
        pictures((8, 12)),
        tokens=None,
        full=False,
    ),
    Case(
        "dinov2",
        lambda: transformers.Dinov2Config(**DINO_SIZES, mlp_ratio=3, layerscale_value=0.5),
        TASKS,
        pictures((12, 12), (8, 20), (17, 12)),
        tokens=None,
    ),
    Case(
        "dinov2-swiglu",
        lambda: transformers.Dinov2Config(**DINO_SIZES, use_swiglu_ffn=True, mlp_ratio=3, use_mask_token=False),
        TASKS,
        pictures(),
        tokens=None,
    ),
    Case(
        "dinov2-masked",
        lambda: transformers.Dinov2Config(**DINO_SIZES, hidden_act="relu", qkv_bias=False),
        TASKS[:1],
        with_masked_patches,
        tokens=None,
        full=False,
    ),
    Case("clip", clip, TASKS[:1], texts_and_pictures, tokens=None),
    Case("clip-legacy", lambda: clip(eos_token_id=2), TASKS[:1], texts_and_pictures, tokens=None, full=False),
    Case("clip-images", clip, TASKS[1:], pictures(), tokens=None),
    Case("clip-text-model", lambda: transformers.CLIPTextConfig(**TEXT), TASKS[:1], texts),
    Case("clip-vision-model", lambda: transformers.CLIPVisionConfig(**VISION), TASKS[:1], pictures(), tokens=None),
]
