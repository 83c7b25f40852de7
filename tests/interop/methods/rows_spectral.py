"""Rows of the methods that work on blocks, projections or parts of the spectrum of a weight."""

from tests.interop.methods.parity import Row

LINEARS = ["first", "second"]
PROJECTS = "PEFT projects the gradients by hooks: see tests/interop/test_spectral_vs_peft.py"

ROWS = [
    Row(
        "gralora",
        "GraloraConfig",
        {"r": 4, "alpha": 3, "gralora_k": 2, "target_modules": ["q_proj", "down_proj"]},
        "blocks",
    ),
    Row(
        "gralora, hybrid",
        "GraloraConfig",
        {"r": 4, "hybrid_r": 2, "alpha": 3, "gralora_k": 4, "target_modules": ["second"]},
    ),
    Row(
        "gralora, transposed",
        "GraloraConfig",
        {"r": 2, "alpha": 3, "target_modules": LINEARS, "fan_in_fan_out": True},
        "transposed",
    ),
    Row("peanut", "PeanutConfig", {"r": 3, "target_modules": LINEARS}),
    Row(
        "peanut, deep",
        "PeanutConfig",
        {"r": 3, "depth": 2, "act_fn": "gelu", "scaling": 0.5, "target_modules": ["v_proj", "up_proj"]},
        "blocks",
        scale=0.5,
    ),
    Row("deft", "DeftConfig", {"r": 3, "alpha": 4, "target_modules": LINEARS}),
    Row("deft, capped", "DeftConfig", {"r": 5, "alpha": 4, "target_modules": ["second"]}),
    Row(
        "deft, orthogonal",
        "DeftConfig",
        {"r": 3, "decomposition_method": "qr", "target_modules": ["q_proj", "down_proj"]},
        "blocks",
    ),
    Row("deft, para", "DeftConfig", {"r": 2, "para": True, "target_modules": ["up_proj"]}, "blocks"),
    Row(
        "deft, transposed",
        "DeftConfig",
        {"r": 2, "target_modules": LINEARS, "fan_in_fan_out": True},
        "transposed",
    ),
    Row(
        "adamss",
        "AdamssConfig",
        {"r": 3, "num_subspaces": 3, "subspace_rank": 2, "target_modules": LINEARS},
        precious=True,
    ),
    Row(
        "adamss, dynamic",
        "AdamssConfig",
        {
            "r": 3,
            "num_subspaces": 2,
            "subspace_rank": 3,
            "use_dynamic_rank": True,
            "svd_threshold": 0.3,
            "random_seed": 5,
            "target_modules": ["q_proj", "up_proj", "down_proj"],
        },
        "blocks",
        precious=True,
    ),
    Row("osf", "OSFConfig", {"effective_rank": 3, "target_modules": LINEARS}, no_steps=PROJECTS),
    Row(
        "osf, patterns",
        "OSFConfig",
        {
            "effective_rank": 0.7,
            "rank_pattern": {"layers.1": 2, "up": 0.5},
            "target_svd_config": {"q_proj.weight": 2},
            "target_modules": ["q_proj", "up_proj", "down_proj"],
        },
        "blocks",
        no_steps=PROJECTS,
    ),
]
