"""Rows of the methods whose change is sparse, in entries, frequencies or wavelets, and of DeLoRA."""

import torch

from tests.interop.methods.parity import Row

# PEFT's SHiRA makes sparse tensors, of which PyTorch warns unless it has been told whether to check them.
torch.sparse.check_sparse_tensor_invariants.enable()

LINEARS = {"target_modules": ["first", "second"]}
TURNED = {**LINEARS, "fan_in_fan_out": True}
BLOCKS = {"target_modules": ["q_proj", "up_proj", "down_proj"]}
PART = {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1], "layers_pattern": "layers"}

ROWS = [
    Row("delora", "DeloraConfig", {"r": 3, **LINEARS}, initial=frozenset({"delora_lambda"})),
    Row(
        "delora, patterns",
        "DeloraConfig",
        {"r": 2, "delora_lambda": 1, "rank_pattern": {"up_proj": 3}, "lambda_pattern": {"q_proj": 2}, **BLOCKS},
        "blocks",
        initial=frozenset({"delora_lambda"}),
    ),
    Row("shira", "ShiraConfig", {"r": 2, **LINEARS}),
    Row("shira, seed", "ShiraConfig", {"r": 1, "random_seed": 5, **BLOCKS}, "blocks"),
    Row("supertuning", "SupertuningConfig", {"sparsity": 0.6, **LINEARS}),
    Row("supertuning, lora", "SupertuningConfig", {"sparsity": 0.9, "r": 2, "lora_alpha": 3, **LINEARS}),
    Row(
        "supertuning, smallest, found again",
        "SupertuningConfig",
        {"sparsity": 0.7, "select_top": False, "save_precomputed_indices": False, **BLOCKS},
        "blocks",
    ),
    Row("fourierft", "FourierFTConfig", {"n_frequency": 12, "scaling": 9.0, **LINEARS}),
    Row("fourierft, transposed", "FourierFTConfig", {"n_frequency": 20, "scaling": 9.0, **TURNED}, "transposed"),
    Row(
        "fourierft, pattern",
        "FourierFTConfig",
        {"n_frequency": 10, "scaling": 9.0, "n_frequency_pattern": {"q_proj": 36}, "random_loc_seed": 3, **PART},
        "blocks",
    ),
    Row("waveft", "WaveFTConfig", {"n_frequency": 12, "scaling": 3.0, **LINEARS}),
    Row(
        "waveft, transposed",
        "WaveFTConfig",
        {"n_frequency": 20, "scaling": 3.0, "wavelet_family": "sym4", **TURNED},
        "transposed",
    ),
    Row(
        "waveft, in proportion",
        "WaveFTConfig",
        {"n_frequency": 9, "scaling": 3.0, "wavelet_family": "coif1", "proportional_parameters": True, **PART},
        "blocks",
    ),
    Row(
        "waveft, bare, pattern",
        "WaveFTConfig",
        {"n_frequency": 9, "use_idwt": False, "n_frequency_pattern": {"first": 30}, "scaling": 3.0, **LINEARS},
    ),
]
