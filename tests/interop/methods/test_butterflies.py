"""BOFT with several factors, which PyTorch PEFT has only with its CUDA extension: against its permutations."""

import dataclasses
import types
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

from peft.tuners.boft.layer import BOFTLayer  # noqa: E402

import jpeft  # noqa: E402
from jpeft_interop import load_config  # noqa: E402
from tests.interop.methods import parity  # noqa: E402
from tests.interop.methods.parity import Row  # noqa: E402
from tests.interop.trajectories import quietly  # noqa: E402


def butterfly_of_peft(a):
    """B_m ... B_1 as PEFT multiplies it where the extension is there. a: (m, D, size, size)."""
    factors, number, size, _ = a.shape
    features, total = number * size, torch.eye(number * size)
    layer: Any = types.SimpleNamespace()
    for level in range(factors):
        order = BOFTLayer.block_butterfly_perm(layer, features, number // 2**level, size // 2, factors - 1)
        p = BOFTLayer.perm2mat(layer, order)
        blocks = BOFTLayer.cayley_batch(layer, torch.tensor(a[level]))
        total = p @ torch.block_diag(*blocks) @ p.T @ total
    return total.numpy()


@pytest.mark.parametrize(("factors", "size", "features"), [(2, 2, 8), (3, 2, 16), (2, 4, 24), (4, 2, 16)])
def test_factors_are_those_of_peft(factors, size, features):
    w = np.random.default_rng(0).normal(size=(features, 5)).astype(np.float32)
    config = jpeft.BOFTConfig(boft_block_size=size, boft_n_butterfly_factor=factors, target_modules=["q"])
    wrapped = jpeft.wrap({"q": {"kernel": w}}, config)
    adapter = wrapped.adapters["default"]
    shape = adapter.weights["q"]["boft_R"].shape
    a = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    weights = {"q": {**adapter.weights["q"], "boft_R": a}}
    wrapped = dataclasses.replace(wrapped, adapters={"default": dataclasses.replace(adapter, weights=weights)})
    np.testing.assert_allclose(jpeft.merge(wrapped)["q"]["kernel"], butterfly_of_peft(a) @ w, rtol=1e-4, atol=1e-5)


def test_a_file_with_fewer_factors_than_its_config_says_is_refused(tmp_path):
    """PEFT trains one factor, whatever it was asked for; with the config that it means, the file is read."""
    settings = {"boft_block_size": 2, "boft_n_butterfly_factor": 2, "target_modules": ["down_proj"]}
    row = Row("boft", "BOFTConfig", settings, "blocks")
    model = parity.torch_adapter(row)
    quietly(model.save_pretrained, tmp_path)
    with pytest.raises(ValueError, match=r"boft_R.*\(1, 4, 2, 2\).*\(2, 4, 2, 2\)"):
        parity.read(row, tmp_path)
    config = dataclasses.replace(load_config(tmp_path), boft_n_butterfly_factor=1)
    wrapped = parity.read(row, tmp_path, config=config)
    parity.assert_close(parity.jax_outputs(row, wrapped), parity.torch_outputs(row, model), "forward")
