"""What the methods with sparse changes take from PyTorch and PEFT without a file that says it."""

import copy

import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from peft.tuners.waveft.constants import WAVELET_REDUCTIONS  # noqa: E402
from peft.tuners.waveft.wavelet import Wavelet  # noqa: E402

import jpeft  # noqa: E402
from jpeft.methods._wavelets import FAMILIES, scaling_filter  # noqa: E402
from jpeft_interop import load_pretrained, save_pretrained  # noqa: E402
from tests.interop.methods import parity, rows_sparse  # noqa: E402, F401 (it says to PyTorch whether to check)
from tests.interop.trajectories import quietly  # noqa: E402


@pytest.mark.parametrize("family", FAMILIES)
def test_filters_are_those_of_pefts_tables(family):
    np.testing.assert_allclose(scaling_filter(family), Wavelet(family).rec_lo, atol=1e-10)
    assert WAVELET_REDUCTIONS[family] == (len(scaling_filter(family)) - 2,) * 2


@pytest.mark.parametrize("family", sorted(WAVELET_REDUCTIONS.keys() - FAMILIES))
def test_families_that_are_refused_are_wrong_in_peft_or_not_there(family):
    try:
        low = np.array(Wavelet(family).rec_lo)
    except ValueError:
        return
    assert abs(low.sum() - np.sqrt(2)) > 5e-3 and abs(low @ low - 1) > 5e-3


@pytest.mark.parametrize("seed", [None, 3])
def test_random_entries_are_pefts(seed):
    settings = {"r": 2, "random_seed": seed, "target_modules": ["first", "second"]}
    pair = parity.twin("net")
    model = quietly(peft.get_peft_model, copy.deepcopy(pair.torch_model), peft.ShiraConfig(**settings))
    ours = jpeft.wrap(pair.params, jpeft.ShiraConfig(**settings), layouts=pair.layouts).adapters["default"].weights
    for path in ("first", "second"):
        theirs = model.get_submodule(f"base_model.model.{path}").shira_indices["default"]
        np.testing.assert_array_equal(ours[path]["shira_indices"], theirs.numpy())


def test_entries_of_ones_own_rule_are_in_the_file_and_the_rule_is_not(tmp_path):
    pair = parity.twin("net")
    config = jpeft.ShiraConfig(
        r=1,
        mask_type="first columns",
        mask_fn=lambda weight, r: np.arange(weight.size).reshape(weight.shape) < r * sum(weight.shape),
        init_weights=False,
        target_modules=["first", "second"],
    )
    wrapped = jpeft.wrap(pair.params, config, layouts=pair.layouts)
    save_pretrained(wrapped, tmp_path, layouts=pair.layouts)
    expected = np.asarray(jpeft.lift(pair.apply)(wrapped, pair.ids))
    for trainable in (False, True):
        loaded = load_pretrained(pair.params, tmp_path, layouts=pair.layouts, is_trainable=trainable)
        np.testing.assert_array_equal(jpeft.lift(pair.apply)(loaded, pair.ids), expected)
    model = quietly(peft.PeftModel.from_pretrained, copy.deepcopy(pair.torch_model), tmp_path)
    with torch.no_grad():
        parity.assert_close(model(torch.tensor(pair.ids)).numpy(), expected, "forward")
