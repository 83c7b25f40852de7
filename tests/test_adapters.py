"""Adapters taken away, renamed, rescaled, converted to LoRA and freed of intruders."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft
from jpeft._paths import leaves_by_path
from tests.cases import DenseDeltaConfig, GainConfig
from tests.stacked_trees import layer_tree, randomised, stacked

TREE = {
    "table": {"embedding": jnp.ones((7, 4))},
    "conv": {"kernel": jnp.ones((2, 3, 4, 5))},
    "q": {"kernel": jnp.ones((4, 2, 3))},
    "k": {"kernel": jnp.ones((4, 6))},
}
LAYOUTS = {"q.kernel": "ioo"}
EVERY = ("table", "conv", "q", "k")
LORA = jpeft.LoraConfig(r=3, lora_alpha=7, target_modules=EVERY)


def adapted(config=LORA, tree=TREE, names=("one", "two")):
    wrapped = tree
    for name in names:
        wrapped = jpeft.wrap(wrapped, config, adapter_name=name, layouts=LAYOUTS)
    return randomised(wrapped)


def changes(wrapped, name):
    merged, base = (leaves_by_path(tree) for tree in (jpeft.merge(wrapped, adapter_names=name), wrapped.base))
    return {path: np.asarray(merged[path] - base[path], np.float64) for path in merged}


def assert_same_changes(got, want, tolerance=1e-5):
    for path, change in want.items():
        np.testing.assert_allclose(got[path], change, atol=tolerance * max(np.abs(change).max(), 1), err_msg=path)


def test_deleted():
    wrapped = jpeft.set_adapter(adapted(), ["two", "one"])
    left = jpeft.delete_adapter(wrapped, "two")
    assert (list(left.adapters), left.active, left.base is wrapped.base) == (["one"], ("one",), True)
    none = jpeft.delete_adapter(left, "one")
    assert (none.adapters, none.active) == ({}, ())
    assert jpeft.merge(none)["k"]["kernel"] is TREE["k"]["kernel"]
    assert jpeft.wrap(none, LORA, layouts=LAYOUTS).active == ("default",)
    assert list(wrapped.adapters) == ["one", "two"]


def test_renamed():
    wrapped = jpeft.set_adapter(adapted(), ["two", "one"])
    renamed = jpeft.rename_adapter(wrapped, "one", "uno")
    assert (list(renamed.adapters), renamed.active) == (["uno", "two"], ("two", "uno"))
    assert renamed.adapters["uno"] is wrapped.adapters["one"]
    assert jpeft.rename_adapter(wrapped, "one", "one").adapters == wrapped.adapters


@pytest.mark.parametrize("multiplier", [0, -0.5, jnp.float32(2)])
def test_rescaled(multiplier):
    wrapped = adapted()
    every = jax.jit(jpeft.rescale_adapter_scale)(wrapped, multiplier)
    alone = jpeft.rescale_adapter_scale(wrapped, multiplier, "two")
    for name in ("one", "two"):
        once = changes(wrapped, name)
        want = {path: float(multiplier) * change for path, change in once.items()}
        assert_same_changes(changes(every, name), want)
        assert_same_changes(changes(alone, name), want if name == "two" else once)


def test_rescaling_passes_over_other_methods():
    wrapped = jpeft.wrap(adapted(names=("one",)), DenseDeltaConfig(target_modules=["k"]), adapter_name="two")
    assert jpeft.rescale_adapter_scale(wrapped, 2.0).adapters["two"] is wrapped.adapters["two"]
    shapes = jax.eval_shape(lambda wrapped: wrapped, wrapped)
    assert jpeft.rescale_adapter_scale(shapes, 2.0) == shapes


@pytest.mark.parametrize("config", [LORA, DenseDeltaConfig(target_modules=EVERY)], ids=["lora", "dense delta"])
@pytest.mark.parametrize("rank", [2, 4, 0.6, 1.0])
def test_converted(config, rank):
    """The best approximation of each module's change: what is lost is what the singular values say."""
    wrapped = jpeft.convert_to_lora(adapted(config, names=("one",)), "one", rank, "lora")
    own = wrapped.adapters["lora"]
    got, want = changes(wrapped, "lora"), changes(wrapped, "one")
    for path, site in own.sites.items():
        matrix = lambda change, site=site: change.reshape(-1, site.out_features)  # noqa: E731
        values = np.linalg.svd(matrix(want[site.leaf]), compute_uv=False)
        found = own.weights[path][next(name for name in own.weights[path] if name.endswith("A"))].shape[0]
        if isinstance(rank, int):
            assert found == rank
        elif rank < 1:
            energy = np.cumsum(values**2) / np.sum(values**2)
            assert energy[found - 1] >= rank and (found == 1 or energy[found - 2] < rank)
        lost = np.linalg.norm(matrix(got[site.leaf] - want[site.leaf]))
        assert lost == pytest.approx(np.linalg.norm(values[found:]), abs=1e-4 * values[0])
    again = jpeft.wrap(TREE, own.config, layouts=LAYOUTS).adapters["default"]
    shapes = lambda adapter: jax.tree.map(jnp.shape, (adapter.weights, adapter.scaling))  # noqa: E731
    assert shapes(again) == shapes(own)
    assert {float(scaling) for scaling in again.scaling.values()} == {1.0}


@pytest.mark.parametrize("rank", [2, 0.8])
def test_converted_stacks_saved_modules_and_half_precision(rank):
    tree = stacked(jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), layer_tree()))
    config = DenseDeltaConfig(target_modules=["q_proj", "v_proj"], modules_to_save=["norm"])
    wrapped = randomised(jpeft.wrap(tree, config, adapter_name="one"))
    new = jpeft.convert_to_lora(wrapped, "one", rank, "lora").adapters["lora"]
    old = wrapped.adapters["one"]
    for path, own in new.weights.items():
        (delta,) = old.weights[path].values()
        product = np.einsum("lri,lor->lio", own["lora_A"], own["lora_B"])
        kept = own["lora_A"].shape[1]
        values = np.linalg.svd(np.asarray(delta), compute_uv=False)
        lost = np.linalg.norm(product - delta, axis=(1, 2))
        np.testing.assert_allclose(lost, np.linalg.norm(values[:, kept:], axis=1), atol=1e-4)
        if rank == 0.8:
            energy = np.cumsum(values**2, axis=1) / np.sum(values**2, axis=1, keepdims=True)
            assert (energy[:, kept - 1] >= rank).all() and (kept == 1 or (energy[:, kept - 2] < rank).any())
    assert new.config.modules_to_save == ("norm",) and new.replaced.keys() == old.replaced.keys()


def test_converted_under_jit():
    wrapped = adapted(names=("one",))
    got = jax.jit(lambda wrapped: jpeft.convert_to_lora(wrapped, "one", 3, "lora"))(wrapped)
    assert_same_changes(changes(got, "lora"), changes(wrapped, "one"))


def test_no_intruders_no_change():
    """The base's own directions are none, and of stacks only the layers with intruders change."""
    wrapped = randomised(jpeft.wrap(stacked(layer_tree()), jpeft.LoraConfig(r=2, target_modules=["q_proj"])))
    same = jpeft.reduce_intruder_dimension(wrapped, threshold_epsilon=0.0)
    for path, own in wrapped.adapters["default"].weights.items():
        for name, array in own.items():
            assert (same.adapters["intruder_reduced"].weights[path][name] == array).all()
    # Nothing is taken away of what is found, so the change stays although its factors do not.
    kept = jpeft.reduce_intruder_dimension(wrapped, threshold_epsilon=1.1, mitigation_lambda=1.0)
    assert_same_changes(changes(kept, "intruder_reduced"), changes(wrapped, "default"), 1e-4)


def with_bias(config=LORA):
    tree = {"k": {"kernel": jnp.ones((4, 6)), "bias": jnp.ones(6)}}
    return jpeft.wrap(tree, dataclasses.replace(config, target_modules=("k",), bias="all"), adapter_name="one")


ERRORS = {
    "delete unknown": (lambda: jpeft.delete_adapter(adapted(), "three"), ValueError, r"adapter names are \['three'\]"),
    "delete nothing": (lambda: jpeft.delete_adapter(TREE, "one"), TypeError, "expected the PeftParams"),
    "rename unknown": (lambda: jpeft.rename_adapter(adapted(), "three", "x"), ValueError, r"names are \['three'\]"),
    "rename taken": (lambda: jpeft.rename_adapter(adapted(), "one", "two"), ValueError, "already is an adapter 'two'"),
    "rename dots": (lambda: jpeft.rename_adapter(adapted(), "one", "a.b"), ValueError, "a name without dots"),
    "multiplier": (lambda: jpeft.rescale_adapter_scale(adapted(), "2"), TypeError, "multiplier is '2'; expected a num"),
    "not LoRA": (
        lambda: jpeft.rescale_adapter_scale(adapted(DenseDeltaConfig(target_modules=EVERY)), 2.0),
        ValueError,
        "only LoRA has a scaling that can be changed, but 'one' has a DenseDeltaConfig, 'two'",
    ),
    "rank zero": (
        lambda: jpeft.convert_to_lora(adapted(), "one", 0, "x"),
        ValueError,
        "rank is 0; expected an integer",
    ),
    "energy": (lambda: jpeft.convert_to_lora(adapted(), "one", 1.5, "x"), ValueError, r"rank is 1.5; .* in \(0, 1\]"),
    "rank too high": (
        lambda: jpeft.convert_to_lora(adapted(), "one", 5, "x"),
        ValueError,
        "rank is 5, but the weight of 'k' has rank 4 at most",
    ),
    "taken": (lambda: jpeft.convert_to_lora(adapted(), "one", 2, "two"), ValueError, "already is an adapter 'two'"),
    "bias": (
        lambda: jpeft.convert_to_lora(with_bias(), "one", 2, "x"),
        ValueError,
        "adapter 'one' has bias='all'; expected 'none', for LoRA would lose",
    ),
    "changes biases": (
        lambda: jpeft.convert_to_lora(adapted(GainConfig(target_modules=["k"])), "one", 2, "x"),
        TypeError,
        "adapter 'one' with its GainConfig changes biases, which LoRA cannot do",
    ),
    "intruders": (
        lambda: jpeft.reduce_intruder_dimension(adapted(DenseDeltaConfig(target_modules=EVERY)), "one"),
        TypeError,
        "adapter 'one' has a DenseDeltaConfig; expected plain LoRA",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case):
    call, error, message = ERRORS[case]
    with pytest.raises(error, match=message):
        call()
