"""Rows of the methods that rotate the inputs of a layer, or change its weight block by block."""

from typing import Any

from tests.interop.methods.parity import Row

LINEARS = ["first", "second"]
OVERLAP = "PEFT turns patches of the input and adds up where they overlap; by the paper, and merged, it is the kernel"
CLIPS = (
    "PEFT clips the arrays inside forward, and so leaves the last step unclipped: see tests/interop/test_oft_vs_peft.py"
)


def psoft(name: str, twin: str = "net", modules: Any = LINEARS, **settings: Any) -> Row:
    return Row(name, "PsoftConfig", {"r": 3, "target_modules": modules, **settings}, twin, rate=0.5, precious=True)


ROWS = [
    Row("hra", "HRAConfig", {"r": 2, "target_modules": LINEARS}),
    Row("hra, orthogonal", "HRAConfig", {"r": 3, "apply_GS": True, "target_modules": ["second"]}),
    Row("hra, images", "HRAConfig", {"r": 4, "target_modules": ["conv", "head"]}, "squares"),
    Row("oft", "OFTConfig", {"oft_block_size": 2, "target_modules": ["q_proj", "down_proj"]}, "blocks"),
    Row(
        "oft, exact",
        "OFTConfig",
        {"r": 2, "oft_block_size": 0, "use_cayley_neumann": False, "target_modules": ["down_proj"]},
        "blocks",
    ),
    Row(
        "oft, one block of three terms",
        "OFTConfig",
        {"oft_block_size": 4, "block_share": True, "num_cayley_neumann_terms": 3, "target_modules": ["head"]},
        "squares",
    ),
    Row("oft, lookup", "OFTConfig", {"oft_block_size": 3, "target_modules": ["embed"]}),
    Row("oft, small window", "OFTConfig", {"oft_block_size": 2, "target_modules": ["next"]}, "images"),
    Row(
        "oft, images",
        "OFTConfig",
        {"oft_block_size": 4, "target_modules": ["conv"]},
        "squares",
        no_forward=OVERLAP,
        no_steps=OVERLAP,
    ),
    Row(
        "oft, constrained",
        "OFTConfig",
        {"oft_block_size": 4, "coft": True, "eps": 0.5, "target_modules": ["head"]},
        "squares",
        no_steps=CLIPS,
    ),
    Row("boft", "BOFTConfig", {"boft_block_size": 2, "target_modules": ["q_proj", "v_proj"]}, "blocks"),
    Row(
        "boft, images", "BOFTConfig", {"boft_block_size": 0, "boft_block_num": 2, "target_modules": ["conv"]}, "squares"
    ),
    Row("miss", "MissConfig", {"r": 3, "target_modules": LINEARS}),
    Row("miss, mini", "MissConfig", {"r": 2, "init_weights": "mini", "mini_r": 2, "target_modules": LINEARS}),
    Row("miss, bat", "MissConfig", {"r": 2, "init_weights": "bat", "target_modules": ["up_proj", "v_proj"]}, "blocks"),
    Row("c3a", "C3AConfig", {"block_size": 2, "target_modules": ["q_proj", "up_proj"]}, "blocks"),
    Row(
        "c3a, pattern",
        "C3AConfig",
        {"block_size": 2, "block_size_pattern": {"q_proj": 3}, "target_modules": ["q_proj", "down_proj"]},
        "blocks",
    ),
    psoft("psoft"),
    psoft("psoft, roots and no scales", ab_svd_init="pissa_init", psoft_mag_a=False, psoft_mag_b=False, psoft_alpha=7),
    psoft("psoft, free", modules=["first"], psoft_orth=False, psoft_mag_a=False),
    psoft("psoft, series", modules=["first"], use_cayley_neumann=True, cayley_neumann_eps=0.4, psoft_mag_b=False),
    psoft("psoft, approximate", modules=["first"], psoft_svd="lowrank", psoft_svd_lowrank_niter=200),
]
