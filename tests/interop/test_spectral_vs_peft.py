"""What rows of tests/interop/methods cannot say of GraLoRA, PEANuT, DEFT, OSF and AdaMSS against PyTorch PEFT."""

import numpy as np
import optax
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from safetensors.numpy import load_file, save_file  # noqa: E402
from transformers.activations import ACT2FN  # noqa: E402

import jpeft  # noqa: E402
from jpeft.methods._activations import ACTIVATIONS  # noqa: E402
from jpeft.methods._clusters import approximate_vectors, clusters  # noqa: E402
from jpeft_interop import load_adapter  # noqa: E402
from tests.interop.methods import parity  # noqa: E402
from tests.interop.methods.parity import Row  # noqa: E402
from tests.interop.trajectories import STEPS, jax_loss, quietly, torch_loss, torch_steps  # noqa: E402

LINEARS = ["first", "second"]


# ---- PEANuT ---------------------------------------------------------------------------------------------------------


def test_every_activation_of_transformers_is_known():
    x = np.linspace(-12, 12, 97, dtype=np.float32)
    for name in ACT2FN:
        theirs = quietly(ACT2FN.__getitem__, name)(torch.tensor(x)).detach().numpy()
        np.testing.assert_allclose(ACTIVATIONS[name](jnp.asarray(x)), theirs, rtol=1e-4, atol=1e-5, err_msg=name)
    assert ACTIVATIONS.keys() == ACT2FN.keys()


# ---- DEFT -----------------------------------------------------------------------------------------------------------


def test_changes_of_two_adapters_add_up(tmp_path):
    row = Row("deft", "DeftConfig", {"r": 3, "target_modules": LINEARS})
    pair, model = parity.twin("net"), parity.torch_adapter(row)
    settings = {"r": 2, "alpha": 3, "decomposition_method": "qr", "init_weights": False, "target_modules": LINEARS}
    quietly(model.add_adapter, "other", peft.DeftConfig(**settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "other" in name:
                parameter.copy_(0.4 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    model.base_model.set_adapter(["default", "other"])
    quietly(model.save_pretrained, tmp_path)
    wrapped = load_adapter(parity.read(row, tmp_path), tmp_path / "other", "other", layouts=pair.layouts)
    wrapped = jpeft.set_adapter(wrapped, ["default", "other"])
    expected = parity.torch_outputs(row, model)
    parity.assert_close(parity.jax_outputs(row, wrapped), expected, "forward")
    parity.assert_close(parity.merged_outputs(row, wrapped), expected, "merged")


# ---- OSF ------------------------------------------------------------------------------------------------------------


def test_osf_trains_as_with_the_hooks_of_peft(tmp_path):
    row = Row("osf", "OSFConfig", {"effective_rank": 2, "target_modules": ["q_proj", "up_proj", "down_proj"]}, "blocks")
    pair, rate = parity.twin(row.twin), 0.05
    model = parity.torch_adapter(row)
    quietly(model.save_pretrained, tmp_path / "start")
    wrapped = parity.read(row, tmp_path / "start", is_trainable=True)
    parameters = [p for p in model.train().parameters() if p.requires_grad]
    theirs = torch_steps(torch_loss(pair, model), parameters, rate)
    tx, loss = optax.chain(jpeft.osf_gradient_projection(), optax.sgd(rate)), jax_loss(pair)
    mask = jpeft.trainable_mask(wrapped)

    @jax.jit
    def step(wrapped):
        value, gradient = jpeft.value_and_grad(loss)(wrapped)
        updates, _ = tx.update(gradient, tx.init(wrapped), wrapped)
        return value, jax.tree.map(lambda t, p, u: p + u if t else p, mask, wrapped, updates)

    ours = []
    for _ in range(STEPS):
        value, wrapped = step(wrapped)
        ours.append(float(value))
    assert abs(theirs[-1] - theirs[0]) > 1e-3 * theirs[0]
    np.testing.assert_allclose(ours, theirs, rtol=1e-4)
    quietly(model.save_pretrained, tmp_path / "end")
    ended = parity.read(row, tmp_path / "end", is_trainable=True).adapters["default"]
    for path, arrays in wrapped.adapters["default"].weights.items():
        for name in arrays:
            np.testing.assert_allclose(arrays[name], ended.weights[path][name], atol=1e-4, err_msg=f"{path} {name}")


# ---- AdaMSS ---------------------------------------------------------------------------------------------------------

ASA = {
    "r": 3,
    "num_subspaces": 3,
    "subspace_rank": 2,
    "use_asa": True,
    "asa_target_subspaces": 2,
    "init_warmup": 1,
    "final_warmup": 7,
    "mask_interval": 2,
    "asa_importance_beta": 0.7,
    "asa_uncertainty_beta": 0.6,
    "asa_schedule_exponent": 2.0,
    "target_modules": LINEARS,
}


def test_groups_are_those_of_torch_and_scikit_learn():
    from peft.tuners.adamss.utils import clustering_Z, slice_pca

    found = jax.jit(lambda w: clusters(approximate_vectors(w, 6, 3)[0], 4))
    for seed, shape in enumerate([(40, 30)] * 6 + [(24, 60)] * 6):
        w = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
        _, u = slice_pca(torch.tensor(w)[None, None], 6, "cpu", torch.float32, random_seed=3)
        np.testing.assert_array_equal(found(jnp.asarray(w)), clustering_Z(u[0, 0], 4, 10)[0])


def test_groups_are_found_again_with_a_warning(tmp_path):
    row = Row("adamss", "AdamssConfig", {"r": 3, "num_subspaces": 3, "target_modules": LINEARS})
    model = parity.torch_adapter(row)
    quietly(model.save_pretrained, tmp_path)
    with pytest.warns(UserWarning, match="so that adamss_labels, adamss_ranks are made anew from the base"):
        wrapped = parity.read(row, tmp_path)
    parity.assert_close(parity.jax_outputs(row, wrapped), parity.torch_outputs(row, model), "forward")


def test_files_of_other_groups_are_refused(tmp_path):
    row = Row("adamss", "AdamssConfig", {"r": 3, "num_subspaces": 2, "subspace_rank": 2, "target_modules": ["first"]})
    quietly(parity.torch_adapter(row).save_pretrained, tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    key = "base_model.model.first.adamss_B"
    whole = np.concatenate([tensors[f"{key}.0"], tensors[f"{key}.1"]])
    size = 2 if len(tensors[f"{key}.0"]) != 2 else 3
    save_file({**tensors, f"{key}.0": whole[:size], f"{key}.1": whole[size:]}, path)
    with pytest.raises(ValueError, match=rf"the groups of .*first have \(outputs, rank\) \[\({size}, 2\), .* but the"):
        quietly(parity.read, row, tmp_path)
    save_file({**tensors, f"{key}.0": np.zeros((4, 3), np.float32)}, path)
    with pytest.raises(
        ValueError, match=r"has a part of shape \(4, 3\); expected a matrix of at most subspace_rank=2 c"
    ):
        quietly(parity.read, row, tmp_path)


def test_allocation_follows_the_schedule_of_peft(tmp_path):
    """Step by step from the same state; PEFT keeps one group too few, that of least score among ours."""
    row, rate = Row("adamss", "AdamssConfig", ASA), 0.1
    model = parity.torch_adapter(row)
    quietly(model.save_pretrained, tmp_path)
    wrapped = quietly(parity.read, row, tmp_path, is_trainable=True)
    layers = {path: model.get_submodule(f"base_model.model.{path}") for path in LINEARS}
    tx = jpeft.adamss_allocation(optax.sgd(rate))
    state, update, generator = tx.init(wrapped), jax.jit(tx.update), np.random.default_rng(0)
    chosen = []
    for step in range(9):
        grads = jax.tree.map(lambda leaf: jnp.zeros((), leaf.dtype), wrapped)
        for path, layer in layers.items():
            own = {}
            for name in ("adamss_A", "adamss_B"):
                parts = []
                for parameter in getattr(layer, name)["default"]:
                    drawn = generator.normal(size=parameter.shape).astype(np.float32)
                    parameter.grad = torch.tensor(drawn) if parameter.requires_grad else None
                    parts.append(np.pad(drawn, ((0, 2 - len(drawn)), (0, 0))) if name == "adamss_A" else
                                 np.pad(drawn, ((0, 0), (0, 2 - drawn.shape[1]))))  # fmt: skip
                    if parameter.requires_grad:
                        with torch.no_grad():
                            parameter -= rate * parameter.grad
                own[name] = jnp.asarray(np.stack(parts) if name == "adamss_A" else np.concatenate(parts))
            grads.adapters["default"].weights[path].update(own)
        before = {path: np.asarray(known.active) for path, known in state.modules["default"].items()}
        model.base_model.update_and_allocate(step)
        updates, state = update(grads, state, wrapped)
        wrapped = jax.tree.map(lambda p, u: p + u if jnp.issubdtype(p.dtype, jnp.floating) else p, wrapped, updates)
        known = state.modules["default"]
        kept = {path: np.array([a.requires_grad for a in layer.adamss_A["default"]]) for path, layer in layers.items()}
        if 1 <= step <= 7 and step % 2 == 0:
            target = model.base_model._schedule_threshold(step, model.peft_config["default"])
            ours = {path: np.asarray(known[path].active) for path in LINEARS}
            trained = sum(own.sum() for own in before.values())
            assert sum(own.sum() for own in ours.values()) == min(target, trained)
            assert all((ours[path] >= kept[path]).all() for path in LINEARS)
            assert sum(own.sum() for own in kept.values()) == (target - 1 if target < trained else trained)
            chosen.append(target)
        for path, layer in layers.items():
            averages = [getattr(layer, f"exp_avg_{kind}_{side}")["default"] for kind in ("ipt", "unc") for side in "AB"]
            of = np.sort(wrapped.adapters["default"].weights[path]["adamss_labels"])
            for index, theirs in enumerate(averages):
                array = np.asarray(known[path][1 + index // 2][f"adamss_{'AB'[index % 2]}"])
                for group, part in enumerate(theirs):
                    held = array[of == group] if index % 2 else array[group]
                    if part is None:
                        assert not held.any() or not kept[path][group]
                    else:
                        np.testing.assert_allclose(held[: part.shape[0], : part.shape[1]], part, rtol=1e-3, atol=1e-5)
        state = state._replace(modules={"default": {
            path: own._replace(active=jnp.asarray(kept[path])) for path, own in known.items()
        }})  # fmt: skip
    assert len(set(chosen)) > 1
    for path, layer in layers.items():
        mine = wrapped.adapters["default"].weights[path]["adamss_B"]
        theirs = [np.pad(b.detach().numpy(), ((0, 0), (0, 2 - b.shape[1]))) for b in layer.adamss_B["default"]]
        np.testing.assert_allclose(mine, np.concatenate(theirs), atol=1e-5)
