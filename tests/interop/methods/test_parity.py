"""What PyTorch PEFT and jpeft agree on, over the rows of every method: `rows_*.py` beside this file."""

import copy
import importlib
import json
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

from safetensors.numpy import load_file  # noqa: E402

import jpeft  # noqa: E402
from jpeft_interop import save_pretrained, verify  # noqa: E402
from tests.interop.methods import parity  # noqa: E402
from tests.interop.methods.parity import Row  # noqa: E402
from tests.interop.trajectories import TOLERANCE, jax_loss, jax_steps, quietly, torch_loss, torch_steps  # noqa: E402

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
FILES = sorted(path.stem for path in Path(__file__).parent.glob("rows_*.py"))
ROWS: list[Row] = [row for name in FILES for row in importlib.import_module(f"tests.interop.methods.{name}").ROWS]

over_rows = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)


def test_names_are_unique():
    names = [row.name for row in ROWS]
    assert len(set(names)) == len(names)


@over_rows
def test_from_torch(row, tmp_path):
    """What PyTorch PEFT wrote computes the same here, merged or not, and is written back with the same bytes."""
    model = parity.torch_adapter(row)
    quietly(model.save_pretrained, tmp_path / "theirs")
    parity.keep_torchs_own(row, model, tmp_path / "theirs")
    wrapped = parity.read(row, tmp_path / "theirs")
    expected = parity.expected_outputs(row, model)
    before = parity.torch_outputs(row, parity.twin(row.twin).torch_model)
    assert np.abs(expected - before).max() > 1e-2 * np.abs(expected).max(), "the adapter changes nothing"
    parity.assert_close(parity.jax_outputs(row, wrapped), expected, "forward")
    if row.merges:
        merged = expected if row.no_merge else parity.torch_outputs(row, quietly(model.merge_and_unload))
        parity.assert_close(merged, expected, "PEFT's own merged weights")
        parity.assert_close(parity.merged_outputs(row, wrapped), expected, "merged")
    save_pretrained(wrapped, tmp_path / "ours", layouts=parity.twin(row.twin).layouts)
    theirs, ours = (load_file(tmp_path / name / WEIGHTS) for name in ("theirs", "ours"))
    assert theirs.keys() == ours.keys()
    for key, tensor in theirs.items():
        assert (tensor.dtype, tensor.shape) == (ours[key].dtype, ours[key].shape), key
        if row.same_bytes:
            assert tensor.tobytes() == ours[key].tobytes(), key
    theirs, ours = (json.loads((tmp_path / name / CONFIG).read_text()) for name in ("theirs", "ours"))
    assert theirs == ours


@over_rows
def test_to_torch(row, tmp_path):
    """What is written here is loaded by PyTorch PEFT: every key, the same settings, the same outputs."""
    wrapped, pair = parity.jax_adapter(row), parity.twin(row.twin)
    save_pretrained(wrapped, tmp_path, layouts=pair.layouts)
    model = quietly(peft.PeftModel.from_pretrained, copy.deepcopy(pair.torch_model), tmp_path)
    state = quietly(peft.get_peft_model_state_dict, model)
    held = load_file(tmp_path / WEIGHTS)
    assert state.keys() == held.keys()
    for key, tensor in held.items():
        tolerance = 0 if row.same_bytes else 1e-6
        np.testing.assert_allclose(_numpy(state[key]), tensor, tolerance, err_msg=key)
    expected = parity.expected_outputs(row, parity.settled(model.eval()))
    wrapped = parity.with_torchs_own(row, wrapped, model)
    parity.assert_close(parity.jax_outputs(row, wrapped), expected, "forward")
    theirs = parity.config_of(peft, row).to_dict()
    ours = quietly(peft.PeftConfig.from_pretrained, tmp_path).to_dict()
    assert {**ours, "inference_mode": None} == {**theirs, "inference_mode": None, "peft_version": ours["peft_version"]}
    assert quietly(verify, tmp_path, pair.torch_model).torch


@pytest.mark.parametrize("row", [row for row in ROWS if row.no_steps is None], ids=lambda row: row.name)
def test_ten_steps_of_sgd_go_the_same_way(row, tmp_path):
    pair, model = parity.twin(row.twin), parity.torch_adapter(row)
    quietly(model.save_pretrained, tmp_path / "start")
    parity.keep_torchs_own(row, model, tmp_path / "start")
    wrapped = parity.read(row, tmp_path / "start", is_trainable=True)
    parameters = [p for p in model.train().parameters() if p.requires_grad]
    theirs = torch_steps(torch_loss(pair, model), parameters, row.rate)
    ours, stepped = jax_steps(jax_loss(pair), wrapped, row.rate)
    assert abs(theirs[-1] - theirs[0]) > 1e-3 * theirs[0], "the loss stands still: the test proves nothing"
    np.testing.assert_allclose(ours, theirs, rtol=TOLERANCE)
    quietly(model.save_pretrained, tmp_path / "end")
    parity.keep_torchs_own(row, model, tmp_path / "end")
    mask = jpeft.trainable_mask(stepped).adapters["default"]
    ended = parity.read(row, tmp_path / "end", is_trainable=True).adapters["default"]
    for group in ("weights", "shared", "replaced"):
        _assert_same_arrays(getattr(stepped.adapters["default"], group), getattr(ended, group), getattr(mask, group))
    for leaf, part in stepped.adapters["default"].rows.items():
        np.testing.assert_allclose(part.values, ended.rows[leaf].values, rtol=1e-3, atol=1e-3, err_msg=leaf)


def _numpy(tensor):
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()


def _assert_same_arrays(ours, theirs, mask):
    for name, array in ours.items():
        if isinstance(array, dict):
            _assert_same_arrays(array, theirs[name], mask[name])
        elif mask[name]:
            np.testing.assert_allclose(array, theirs[name], rtol=1e-3, atol=1e-3, err_msg=name)
