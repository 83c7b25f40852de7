"""Rows of the methods whose layers share arrays: VeRA, PVeRA, RandLoRA, VB-LoRA."""

from tests.interop.methods.parity import Row

BLOCKS = {"target_modules": ["q_proj", "up_proj", "down_proj"]}
TURNED = {"target_modules": ["first", "second"], "fan_in_fan_out": True}

ROWS = [
    Row("vera", "VeraConfig", {"r": 3, **BLOCKS}, "blocks", scale=1.0),
    Row(
        "vera, transposed, drawn again",
        "VeraConfig",
        {"r": 3, "projection_prng_key": 5, "save_projection": False, **TURNED},
        "transposed",
        scale=1.0,
    ),
    Row("pvera", "PveraConfig", {"r": 3, **BLOCKS}, "blocks", scale=1.0, no_steps="the two draw other noise"),
    Row(
        "pvera, transposed, drawn again",
        "PveraConfig",
        {"r": 3, "projection_prng_key": 5, "save_projection": False, **TURNED},
        "transposed",
        scale=1.0,
        no_steps="the two draw other noise",
    ),
    Row("randlora", "RandLoraConfig", {"r": 4, "randlora_alpha": 2, **BLOCKS}, "blocks"),
    Row(
        "randlora, transposed, drawn again",
        "RandLoraConfig",
        {"r": 3, "randlora_alpha": 2, "projection_prng_key": 5, "save_projection": False, **TURNED},
        "transposed",
    ),
    Row(
        "randlora, sparse",
        "RandLoraConfig",
        {"r": 4, "randlora_alpha": 2, "sparse": True, "save_projection": False, **BLOCKS},
        "blocks",
    ),
    Row(
        "randlora, very sparse",
        "RandLoraConfig",
        {"r": 4, "randlora_alpha": 2, "very_sparse": True, "save_projection": False, **BLOCKS},
        "blocks",
    ),
    Row("vblora", "VBLoRAConfig", {"r": 2, "num_vectors": 7, "vector_length": 2, **BLOCKS}, "blocks", scale=1.0),
    Row(
        "vblora, transposed",
        "VBLoRAConfig",
        {"r": 2, "num_vectors": 7, "vector_length": 2, "topk": 3, **TURNED},
        "transposed",
        scale=1.0,
    ),
    Row(
        "vblora, largest alone",
        "VBLoRAConfig",
        {"r": 2, "num_vectors": 7, "vector_length": 2, "topk": 3, "save_only_topk_weights": True, **BLOCKS},
        "blocks",
        scale=1.0,
        no_steps="such a file is for inference alone",
        same_bytes=False,
    ),
]
