"""OFT whose rotations stay small: clipped after each step here, and in PyTorch PEFT inside forward."""

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

import jpeft  # noqa: E402
from tests.interop.methods import parity  # noqa: E402
from tests.interop.methods.parity import Row  # noqa: E402
from tests.interop.trajectories import STEPS, jax_loss, quietly, torch_loss, torch_steps  # noqa: E402

RATE = 0.05


@pytest.mark.parametrize("share", [False, True])
def test_steps_with_the_projection_after_each_are_those_of_peft(tmp_path, share):
    settings = {"oft_block_size": 4, "coft": True, "eps": 0.5, "block_share": share, "target_modules": ["head"]}
    row = Row("oft", "OFTConfig", settings, "squares")
    pair, model = parity.twin(row.twin), parity.torch_adapter(row)
    quietly(model.save_pretrained, tmp_path / "start")
    wrapped = parity.read(row, tmp_path / "start", is_trainable=True)
    parameters = [p for p in model.train().parameters() if p.requires_grad]
    theirs = torch_steps(torch_loss(pair, model), parameters, RATE)
    loss = jax_loss(pair)

    def step(wrapped):
        value, gradient = jpeft.value_and_grad(loss)(wrapped)
        mask = jpeft.trainable_mask(wrapped)
        moved = jax.tree.map(lambda leaf, g, trains: leaf - RATE * g if trains else leaf, wrapped, gradient, mask)
        return value, jpeft.oft_projection(moved)

    step, ours = jax.jit(step), []
    wrapped = jpeft.oft_projection(wrapped)
    for _ in range(STEPS):
        value, wrapped = step(wrapped)
        ours.append(float(value))
    np.testing.assert_allclose(ours, theirs[:STEPS], rtol=1e-4)
    with torch.no_grad():
        model(torch.tensor(pair.ids))  # clips what the last step left
    (stored,) = [p.detach().numpy() for name, p in model.named_parameters() if "oft_R" in name]
    np.testing.assert_allclose(wrapped.adapters["default"].weights["head"]["oft_R"], stored, rtol=1e-3, atol=1e-4)
    assert np.all(np.sqrt(2 * np.sum(stored**2, axis=1)) <= 0.5 / np.sqrt(len(stored)) * 1.001)
