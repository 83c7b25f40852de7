"""The oracle of the model tests: tiny random PyTorch models of transformers, and how their outputs are compared."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

ATOL = 1e-4
"""Largest difference allowed, as a part of the largest value."""


def random_model(name: str, config: Any, seed: int = 0) -> Any:
    """The transformers class `name`, in float32, with every parameter random: norms and biases too."""
    model = getattr(transformers, name)(config).float().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            values = torch.randn(parameter.shape, generator=generator)
            centre = 1.0 if "norm" in parameter_name.lower() and parameter_name.endswith("weight") else 0.0
            parameter.copy_(centre + 0.25 * values)
    return model


def saved(model: Any, folder: Path, **options: Any) -> Path:
    model.save_pretrained(folder, **options)
    return folder


def torch_output(model: Any, field: str, **inputs: Any) -> np.ndarray:
    with torch.no_grad():
        output = model(**{name: torch.tensor(np.asarray(value)) for name, value in inputs.items()})
    return output[field].float().numpy()


def jax_output(model: Any, field: str, **inputs: Any) -> np.ndarray:
    with jax.numpy_dtype_promotion("strict"):
        return np.asarray(getattr(jax.jit(model.apply)(model.params, **inputs), field), np.float32)


def assert_close(actual: np.ndarray, expected: np.ndarray, tokens: np.ndarray | None = None) -> None:
    """Equal up to `ATOL`; of the positions that hold no token, nothing is asked."""
    assert actual.shape == expected.shape
    if tokens is not None:
        actual, expected = actual[tokens != 0], expected[tokens != 0]
    assert np.isfinite(actual).all()
    assert np.abs(actual - expected).max() <= ATOL * np.abs(expected).max()


def token_ids(shape: tuple[int, int], vocabulary: int, seed: int = 0) -> np.ndarray:
    """Ids from 1 up; 0 is left for padding."""
    return np.random.default_rng(seed).integers(1, vocabulary, shape)


def padded(side: str, batch: int, length: int, pads: int) -> np.ndarray:
    """An attention mask whose last row has `pads` positions of padding, on one side."""
    mask = np.ones((batch, length), np.int64)
    mask[-1, slice(length - pads, None) if side == "right" else slice(0, pads)] = 0
    return mask
