"""Rows of the methods that multiply: vectors, rotations, Hadamard and Kronecker products."""

from tests.interop.methods.parity import Row

# In PEFT the derivative of a product with windows of its own takes the second product's factors for those of the first.
WRONG_GRADIENT = "PEFT's backward pass of HadaWeightCP gives hada_w1_a and hada_w2_a other gradients than its forward"

ROWS = [
    Row(
        "ia3",
        "IA3Config",
        {"target_modules": ["first", "second"], "feedforward_modules": ["second"]},
        scale=1.0,
    ),
    Row(
        "ia3, images",
        "IA3Config",
        {"target_modules": ["conv", "next", "head"], "feedforward_modules": ["next"]},
        "images",
        scale=1.0,
    ),
    Row("ia3, volumes", "IA3Config", {"target_modules": "conv", "feedforward_modules": []}, "volumes", scale=1.0),
    Row(
        "ia3, blocks",
        "IA3Config",
        {"target_modules": ["q_proj", "down_proj"], "feedforward_modules": r"layers\.1\.q_proj"},
        "blocks",
        scale=1.0,
    ),
    Row(
        "ia3, transposed",
        "IA3Config",
        {"target_modules": ["first", "second"], "feedforward_modules": ["second"], "fan_in_fan_out": True},
        "transposed",
        scale=1.0,
    ),
    Row(
        "road_1", "RoadConfig", {"target_modules": ["q_proj", "up_proj"], "group_size": 2}, "blocks", scale=1.0, rate=0.02
    ),
    Row(
        "road_2",
        "RoadConfig",
        {"target_modules": ["first", "second"], "variant": "road_2", "group_size": 4},
        scale=1.0,
    ),
    Row(
        "road_4",
        "RoadConfig",
        {"target_modules": ["first", "second"], "variant": "road_4", "group_size": 4},
        scale=1.0,
    ),
    Row("loha", "LoHaConfig", {"r": 2, "alpha": 5, "target_modules": ["conv", "first"]}, scale=0.8, rate=0.02),
    Row(
        "loha, effective",
        "LoHaConfig",
        {"r": 2, "target_modules": ["conv", "second"], "use_effective_conv2d": True, "rank_pattern": {"second": 1}},
        scale=0.8,
        no_steps=WRONG_GRADIENT,
    ),
    Row("loha, images", "LoHaConfig", {"r": 3, "target_modules": ["conv", "next"]}, "images", scale=0.8, rate=0.02),
    Row(
        "loha, effective images",
        "LoHaConfig",
        {"r": 2, "target_modules": ["conv", "next"], "use_effective_conv2d": True},
        "images",
        scale=0.8,
        no_steps=WRONG_GRADIENT,
    ),
    Row("lokr", "LoKrConfig", {"r": 3, "alpha": 5, "target_modules": ["conv", "first"]}, scale=0.8, rate=0.02),
    Row(
        "lokr, factors",
        "LoKrConfig",
        {"r": 1, "target_modules": ["conv", "first", "second"], "decompose_both": True},
        scale=0.5,
        rate=0.005,
    ),
    Row("lokr, images", "LoKrConfig", {"r": 1, "target_modules": ["conv", "next", "head"]}, "images", rate=0.02),
    Row(
        "lokr, whole images",
        "LoKrConfig",
        {"r": 4, "target_modules": ["conv", "next"], "decompose_factor": 2},
        "images",
        scale=0.8,
        rate=0.02,
    ),
    Row(
        "lokr, effective images",
        "LoKrConfig",
        {"r": 1, "target_modules": ["conv", "next"], "use_effective_conv2d": True, "decompose_factor": 1},
        "images",
        scale=0.8,
        rate=0.02,
    ),
]
