"""Rows of the methods that go by more than the input: Poly."""

from tests.interop.methods.parity import Row

NOISE = "in training the two draw other noise; without it: tests/interop/test_poly_vs_peft.py"

ROWS = [
    Row(
        "poly",
        "PolyConfig",
        {"r": 3, "n_tasks": 3, "target_modules": ["q_proj", "up_proj"]},
        "blocks",
        scale=1.0,
        no_steps=NOISE,
        merges=False,
        context={"task_ids": (2, 0, 1, 2)},
    ),
    Row(
        "poly, split",
        "PolyConfig",
        {"r": 2, "n_tasks": 2, "n_skills": 3, "n_splits": 2, "target_modules": "layers.*(v|down)_proj"},
        "blocks",
        scale=1.0,
        no_steps=NOISE,
        merges=False,
        context={"task_ids": (1, 0, 1, 1)},
    ),
]
