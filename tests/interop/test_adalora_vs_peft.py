"""AdaLoRA's schedule against PyTorch PEFT's: a whole run, the files that it leaves, and the orthogonality loss."""

import copy
import json
import types

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

from safetensors.numpy import load_file  # noqa: E402

import jpeft  # noqa: E402
from jpeft_interop import load_pretrained, save_pretrained, verify  # noqa: E402
from tests.interop.methods import parity  # noqa: E402
from tests.interop.methods.parity import Row  # noqa: E402
from tests.interop.trajectories import jax_loss, quietly, torch_loss  # noqa: E402

STEPS, RATE = 12, 0.02
SCHEDULE = {"init_r": 4, "target_r": 2, "tinit": 2, "tfinal": 3, "deltaT": 2, "total_step": STEPS, "lora_alpha": 6}
WEIGHTS = "adapter_model.safetensors"


def torch_run(row, model, pair):
    """PEFT's loop; after each step the loss and every lora_E."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], RATE)
    loss = torch_loss(pair, model.train())
    for step in range(1, STEPS + 1):
        optimizer.zero_grad()
        value = loss()
        value.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        values = {
            name.split("base_model.model.")[1].split(".lora_E")[0]: p.detach().numpy().copy()
            for name, p in model.named_parameters()
            if ".lora_E." in name
        }
        yield value.item(), values


def jax_run(wrapped, pair):
    allocator, mask = jpeft.adalora_rank_allocator(wrapped.adapters["default"].config), jpeft.trainable_mask(wrapped)
    state, loss = allocator.init(wrapped), jax_loss(pair)

    @jax.jit
    def step(wrapped, state):
        value, gradient = jpeft.value_and_grad(loss)(wrapped)
        wrapped = jax.tree.map(lambda t, p, g: p - RATE * g if t else p, mask, wrapped, gradient)
        return value, *allocator.update(gradient, state, wrapped)

    for _ in range(STEPS):
        value, wrapped, state = step(wrapped, state)
        yield float(value), wrapped, state


@pytest.mark.parametrize(
    ("kind", "targets", "target_r"),
    [("net", ["first", "second"], 2), ("images", ["conv", "next", "head"], 1)],
    ids=["linear", "images"],
)
def test_a_whole_run_goes_the_same_way(kind, targets, target_r, tmp_path):
    row = Row("run", "AdaLoraConfig", {**SCHEDULE, "target_modules": targets, "target_r": target_r}, kind, scale=0.8)
    pair, model = parity.twin(kind), parity.torch_adapter(row)
    quietly(model.save_pretrained, tmp_path / "start")
    wrapped = parity.read(row, tmp_path / "start", is_trainable=True)
    masked, own, ours = [], {}, list(jax_run(wrapped, pair))
    for (expected, values), (loss, stepped, _) in zip(torch_run(row, model, pair), ours, strict=True):
        np.testing.assert_allclose(loss, expected, rtol=1e-3)
        own = {path: arrays["lora_E"] for path, arrays in stepped.adapters["default"].weights.items()}
        assert own.keys() == values.keys()
        for path, value in own.items():
            np.testing.assert_array_equal(value == 0, values[path] == 0)
            np.testing.assert_allclose(value, values[path], rtol=2e-3, atol=1e-4)
        masked.append(sum(int((value == 0).sum()) for value in own.values()))
    budget = (SCHEDULE["init_r"] - target_r) * len(own)
    assert not any(masked[:3]) and masked[3] > 0 and masked[-1] == budget, masked
    _, wrapped, state = ours[-1]
    check_files(row, model, wrapped, state, tmp_path)


def check_files(row, model, wrapped, state, folder):
    """PEFT's file of the run and ours are alike, and each is loaded on the other side."""
    pair, sliced = parity.twin(row.twin), jpeft.adalora_sliced(wrapped, state)
    quietly(model.save_pretrained, folder / "theirs")
    save_pretrained(sliced, folder / "ours", layouts=pair.layouts)
    theirs, ours = (load_file(folder / name / WEIGHTS) for name in ("theirs", "ours"))
    assert {key: a.shape for key, a in theirs.items()} == {key: a.shape for key, a in ours.items()}
    ranks = {a.shape[0] for key, a in ours.items() if key.endswith("lora_E")}
    assert len(ranks) > 1, "every module has kept the same rank: the test proves little"
    configs = [json.loads((folder / name / "adapter_config.json").read_text()) for name in ("theirs", "ours")]
    assert configs[0] == configs[1] and configs[0]["rank_pattern"]
    expected = parity.torch_outputs(row, model.eval())
    for name in ("theirs", "ours"):
        loaded = load_pretrained(pair.params, folder / name, layouts=pair.layouts)
        np.testing.assert_allclose(parity.jax_outputs(row, loaded), expected, rtol=2e-3, atol=2e-3)
        there = quietly(peft.PeftModel.from_pretrained, copy.deepcopy(pair.torch_model), folder / name)
        np.testing.assert_allclose(parity.torch_outputs(row, there.eval()), expected, rtol=2e-3, atol=2e-3)
    assert verify(folder / "ours", pair.torch_model).torch
    loaded = load_pretrained(pair.params, folder / "theirs", layouts=pair.layouts)
    save_pretrained(loaded, folder / "again", layouts=pair.layouts)
    assert (folder / "again" / WEIGHTS).read_bytes() == (folder / "theirs" / WEIGHTS).read_bytes()


def test_the_orthogonality_loss_is_the_one_that_peft_adds(tmp_path):
    settings = {**SCHEDULE, "orth_reg_weight": 0.7, "target_modules": ["conv", "head"]}
    row = Row("loss", "AdaLoraConfig", settings, "images")
    model = parity.torch_adapter(row)
    quietly(model.save_pretrained, tmp_path)
    model.base_model.model.forward = lambda: types.SimpleNamespace(loss=torch.zeros(()))
    expected = float(model.base_model.forward().loss.detach())
    wrapped = parity.read(row, tmp_path, is_trainable=True)
    np.testing.assert_allclose(jpeft.adalora_orthogonality_loss(wrapped), expected, rtol=1e-5)
