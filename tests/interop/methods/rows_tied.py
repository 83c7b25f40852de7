"""Rows of the methods whose layers share arrays by their names or places: Lily, Uni-LoRA, TinyLoRA, FRoD."""

from tests.interop.methods.parity import Row

BLOCKS = {"target_modules": ["q_proj", "up_proj", "down_proj"]}
TURNED = {"target_modules": ["first", "second"], "fan_in_fan_out": True}

ROWS = [
    Row("lily", "LilyConfig", {"r": 3, "num_B": 3, "scaling": 0.7, **BLOCKS}, "blocks", scale=0.6, merges=False),
    Row(
        "lily, shared among all of a shape",
        "LilyConfig",
        {"r": 3, "stride_A": 3, "target_modules": r".*(q|v)_proj"},
        "blocks",
        scale=0.6,
        merges=False,
    ),
    Row("unilora", "UniLoraConfig", {"r": 3, "theta_d_length": 13, **BLOCKS}, "blocks", scale=0.7),
    Row(
        "unilora, transposed, indices in files",
        "UniLoraConfig",
        {"r": 3, "theta_d_length": 300, "proj_seed": 7, "save_indices": True, **TURNED},
        "transposed",
        scale=0.7,
    ),
    Row(
        "tinylora",
        "TinyLoraConfig",
        {"u": 5, "weight_tying": 0.6, "target_modules": [*BLOCKS["target_modules"], "embed"]},
        "blocks",
        scale=0.5,
    ),
    Row(
        "tinylora, drawn again",
        "TinyLoraConfig",
        {"r": 8, "u": 5, "projection_seed": 7, "save_projection": False, **BLOCKS},
        "blocks",
        scale=0.3,
    ),
    Row(
        "tinylora, transposed",
        "TinyLoraConfig",
        {"u": 5, "weight_tying": 1.0, **TURNED},
        "transposed",
        scale=1.0,
    ),
    Row("frod", "FrodConfig", {"sparse_rate": 0.2, "projection_prng_key": 3, **BLOCKS}, "blocks", rate=0.01),
    Row("frod, transposed", "FrodConfig", {"sparse_rate": 0.0, **TURNED}, "transposed"),
]
