"""Adapters combined into one: sums, stacks of layers, tracing, configs and refusals."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft
from jpeft._paths import leaves_by_path
from jpeft._weighted import COMBINATIONS
from tests.cases import DenseDeltaConfig
from tests.stacked_trees import assert_same_adapter, layer_tree, randomised, stacked, taken_apart

TREE = {
    "table": {"embedding": jnp.zeros((7, 4))},
    "conv1": {"kernel": jnp.zeros((3, 4, 5))},
    "conv3": {"kernel": jnp.zeros((2, 1, 3, 4, 5))},
    "experts": {"kernel": jnp.zeros((3, 4, 6))},
    "q": {"kernel": jnp.zeros((4, 2, 3))},
}
LAYOUTS = {"conv1.kernel": ".io", "experts.kernel": "bio", "q.kernel": "ioo"}
EVERY = ("table", "conv1", "conv3", "experts", "q")
KEY = jax.random.key(3)


def wrapped_with(tree=TREE, layouts=LAYOUTS, **settings):
    wrapped = tree
    for name, own in settings.items():
        wrapped = jpeft.wrap(wrapped, jpeft.LoraConfig(**own), adapter_name=name, layouts=layouts)
    return randomised(wrapped)


def two(**changes):
    one = {"r": 2, "lora_alpha": 5, "target_modules": EVERY}
    return wrapped_with(one=one, two={**one, "lora_alpha": 3, **changes})


def changes(wrapped, name):
    return leaves_by_path(jpeft.merge(wrapped, adapter_names=name))


def options_of(kind):
    return {"density": 0.5} if kind not in ("svd", "linear", "cat") else {}


@pytest.mark.parametrize("kind", ["svd", "cat", "linear", "dare_linear_svd", "magnitude_prune_svd"])
def test_the_sum_of_changes_whatever_the_layer(kind):
    """Exact for what is exact: every rank kept, and every entry."""
    names = ["one", "two"] if kind != "linear" else ["one"]
    weights = [0.7, -1.2][: len(names)]
    wrapped = two()
    rank = 4 if kind.endswith("svd") else None
    options = {"density": 1.0} if options_of(kind) else {}
    wrapped = jpeft.add_weighted_adapter(wrapped, names, weights, "sum", kind, svd_rank=rank, **options)
    parts = [changes(wrapped, name) for name in names]
    for path, got in changes(wrapped, "sum").items():
        want = sum(w * np.asarray(part[path], np.float64) for w, part in zip(weights, parts, strict=True))
        assert np.abs(want).max() > 0.1
        np.testing.assert_allclose(got, want, atol=2e-5 * np.abs(want).max(), err_msg=path)
    adapter = wrapped.adapters["sum"]
    assert adapter.config.r == adapter.config.lora_alpha == (4 if kind != "linear" else 2)
    assert wrapped.active == ("one",)


def test_the_best_rank_and_its_clamp():
    wrapped = two(target_modules=("q",))
    truncated = jpeft.add_weighted_adapter(wrapped, ["one", "two"], [1.0, 1.0], "less", svd_rank=1)
    parts = [np.asarray(changes(wrapped, name)["q.kernel"], np.float64).reshape(4, 6) for name in ("one", "two")]
    u, s, vh = np.linalg.svd(sum(parts).T, full_matrices=False)
    want = (u[:, :1] * s[:1]) @ vh[:1]
    got = np.asarray(changes(truncated, "less")["q.kernel"]).reshape(4, 6).T
    np.testing.assert_allclose(got, want, atol=1e-5 * s[0])
    clamped = jpeft.add_weighted_adapter(wrapped, ["one", "two"], [1.0, 1.0], "less", svd_rank=1, svd_clamp=0.7)
    before, after = truncated.adapters["less"].weights["q"], clamped.adapters["less"].weights["q"]
    high = np.quantile(np.concatenate([np.asarray(array).ravel() for array in before.values()]), 0.7)
    for name, array in before.items():
        np.testing.assert_allclose(after[name], np.clip(array, -high, high), rtol=1e-5)


@pytest.mark.parametrize("kind", COMBINATIONS)
def test_stacks_are_combined_like_single_layers(kind):
    tree = layer_tree()
    first = {"r": 2, "target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["norm"]}
    second = {"r": 2, "lora_alpha": 3, "target_modules": ["q_proj", "v_proj"]}
    single = wrapped_with(tree, one=first, two=second)
    whole = wrapped_with(stacked(tree), one=first, two=second)
    single = taken_apart(whole, tree, single)
    got, want = (
        jpeft.add_weighted_adapter(each, ["one", "two"], [1.0, -0.5], "both", kind, rng=KEY, **options_of(kind))
        for each in (whole, single)
    )
    got = taken_apart(got, tree, dataclasses.replace(want, base=tree))
    leaves = lambda wrapped: leaves_by_path(jpeft.merge(wrapped, adapter_names="both"))  # noqa: E731
    for path, leaf in leaves(want).items():
        np.testing.assert_allclose(leaves(got)[path], leaf, atol=1e-5, err_msg=path)
    assert got.adapters["both"].config == want.adapters["both"].config
    assert got.adapters["both"].config.modules_to_save == ("norm",)


def test_the_random_choice_depends_on_key_and_path_alone():
    wrapped = two()
    combine = lambda wrapped, key: jpeft.add_weighted_adapter(  # noqa: E731
        wrapped, ["one", "two"], [1.0, 1.0], "both", "dare_linear", density=0.5, rng=key
    )
    first, again, other = (combine(wrapped, key).adapters["both"] for key in (KEY, KEY, jax.random.key(9)))
    assert_same_adapter(first, again)
    assert any((first.weights[path]["lora_A"] != other.weights[path]["lora_A"]).any() for path in ("q", "conv1"))
    fewer = {
        name: dataclasses.replace(
            adapter, sites=type(adapter.sites)({"q": adapter.sites["q"]}), weights={"q": adapter.weights["q"]}
        )
        for name, adapter in wrapped.adapters.items()
    }
    alone = combine(dataclasses.replace(wrapped, adapters=fewer), KEY).adapters["both"]
    assert (alone.weights["q"]["lora_A"] == first.weights["q"]["lora_A"]).all()
    # Experts are stacked, and each draws for itself.
    kept = np.asarray(first.weights["experts"]["lora_A"]) != 0
    assert (kept[0] != kept[1]).any()


def test_dare_keeps_the_expected_value():
    wrapped = two(target_modules=("q",))
    exact = changes(jpeft.add_weighted_adapter(wrapped, ["one", "two"], [1.0, 0.5], "x", "cat"), "x")["q.kernel"]

    def once(key):
        options = {"density": 0.6, "svd_rank": 4, "rng": key}
        found = jpeft.add_weighted_adapter(wrapped, ["one", "two"], [1.0, 0.5], "x", "dare_linear_svd", **options)
        return jpeft.merge(found, adapter_names="x")["q"]["kernel"]

    drawn = jax.jit(jax.vmap(once))(jax.random.split(KEY, 2000))
    error = np.asarray(drawn.std(0)) / np.sqrt(2000)
    assert (np.abs(np.asarray(drawn.mean(0)) - exact) < 5 * error).all()


@pytest.mark.parametrize("kind", ["svd", "cat", "linear", "ties"])
def test_under_jit_with_weights_that_are_learned(kind):
    wrapped = two()

    def total(weights):
        combined = jpeft.add_weighted_adapter(wrapped, ["one", "two"], weights, "x", kind, svd_rank=2, density=0.5)
        return jnp.sin(jpeft.merge(combined, adapter_names="x")["q"]["kernel"]).sum()

    weights = jnp.array([0.4, -0.3])
    value, gradient = jax.jit(jax.value_and_grad(total))(weights)
    assert float(value) == pytest.approx(float(total(weights)), abs=1e-4)
    if kind in ("cat", "linear"):
        for index in range(2):
            step = jnp.zeros(2).at[index].set(1e-2)
            slope = (total(weights + step) - total(weights - step)) / 2e-2
            assert float(gradient[index]) == pytest.approx(float(slope), rel=2e-2, abs=2e-3)


def test_abstract_trees():
    shapes = jax.eval_shape(lambda tree: tree, TREE)
    one = {"r": 2, "target_modules": EVERY}
    wrapped = shapes
    for name in ("one", "two"):
        wrapped = jpeft.wrap(wrapped, jpeft.LoraConfig(**one), adapter_name=name, layouts=LAYOUTS)
    got = jpeft.add_weighted_adapter(wrapped, ["one", "two"], [1.0, 2.0], "both", "cat").adapters["both"]
    want = jpeft.add_weighted_adapter(two(), ["one", "two"], [1.0, 2.0], "both", "cat").adapters["both"]
    shape = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, str(leaf.dtype)), tree)  # noqa: E731
    assert shape((got.weights, got.scaling)) == shape((want.weights, want.scaling))


TARGETS = {
    "the same": (["a", "b"], ["a", "b"], {}, ("a", "b")),
    "names": (["a"], ["b"], {}, ("a", "b")),
    "regex": ("a", "x.a|b", {}, "(a)|(x.a|b)"),
    "names and regex": (["b"], r"a", {}, ("b", "a")),
    "all-linear": ("all-linear", "all-linear", {}, "all-linear"),
    "all-linear and names": ("all-linear", ["b"], {}, ("a", "b", "x.a")),
    "a name that another ends in": (["b"], r"a", {}, "(b)|(a)"),
    "exclude": (["a"], ["b"], {"exclude_modules": ["x.a"]}, ("a", "b")),
}


@pytest.mark.parametrize("case", TARGETS)
def test_the_config_selects_what_the_adapters_have(case):
    first, second, fields, want = TARGETS[case]
    kernel = lambda: {"kernel": jnp.zeros((2, 2))}  # noqa: E731
    tree = {"a": kernel(), "b": kernel(), "x": {"a": kernel(), "c": {"bias": jnp.zeros(2)}}}
    if case == "names and regex":
        del tree["x"]
    one, other = {"r": 1, "target_modules": first, **fields}, {"r": 1, "target_modules": second}
    wrapped = wrapped_with(tree, {}, one=one, two=other)
    adapter = jpeft.add_weighted_adapter(wrapped, ["one", "two"], [1.0, 1.0], "both", "cat").adapters["both"]
    assert adapter.config.target_modules == want
    assert set(adapter.sites) == {path for each in ("one", "two") for path in wrapped.adapters[each].sites}
    again = jpeft.wrap(tree, adapter.config)
    assert set(again.adapters["default"].sites) == set(adapter.sites)
    shapes = lambda adapter: jax.tree.map(jnp.shape, (adapter.weights, adapter.scaling))  # noqa: E731
    assert shapes(again.adapters["default"]) == shapes(adapter)
    assert jax.tree.map(float, again.adapters["default"].scaling) == jax.tree.map(float, adapter.scaling)


def test_modules_saved_in_full_come_along():
    wrapped = wrapped_with(
        {"a": {"kernel": jnp.zeros((2, 2))}, "head": {"kernel": jnp.zeros((2, 3))}},
        {},
        one={"r": 1, "target_modules": ["a"]},
        two={"r": 1, "target_modules": ["a"], "modules_to_save": ["head"]},
    )
    both = jpeft.add_weighted_adapter(wrapped, ["one", "two"], [1.0, 1.0], "both").adapters["both"]
    assert (both.replaced["head.kernel"] == wrapped.adapters["two"].replaced["head.kernel"]).all()
    assert both.replaced["head.kernel"] is not wrapped.adapters["two"].replaced["head.kernel"]
    assert both.config.modules_to_save == ("head",)


def test_a_field_that_the_finished_factors_do_not_need_is_reset():
    wrapped = wrapped_with(
        one={"r": 2, "target_modules": ["experts"], "use_rslora": True, "init_lora_weights": "orthogonal"}
    )
    config = jpeft.add_weighted_adapter(wrapped, ["one"], [0.5], "x", svd_rank=3).adapters["x"].config
    assert (config.r, config.lora_alpha, config.use_rslora, config.init_lora_weights) == (3, 3, False, True)


BASE = {"r": 2, "target_modules": ["q"]}
REFUSED = {
    "unknown name": ({}, {"adapters": ["one", "none"]}, ValueError, r"\['one', 'none'\]; expected at least one, all"),
    "no name": ({}, {"adapters": []}, ValueError, r"adapter names are \[\]; expected at least one"),
    "name taken": ({}, {"adapter_name": "two"}, ValueError, "there already is an adapter 'two'"),
    "weights": ({}, {"weights": [1.0]}, ValueError, r"weights have shape \(1,\); expected one number for each of: one"),
    "type": ({}, {"combination_type": "mean"}, ValueError, "combination_type is 'mean'; expected one of 'svd', 'lin"),
    "svd_rank": ({}, {"svd_rank": 0}, ValueError, "svd_rank is 0; expected an integer of at least 1, or None"),
    "svd_clamp": ({}, {"svd_clamp": 1.5}, ValueError, r"svd_clamp is 1.5; expected a quantile in \(0, 1\]"),
    "no density": ({}, {"combination_type": "ties"}, ValueError, "density is None; combination_type 'ties' needs the"),
    "density": ({}, {"combination_type": "dare_ties", "density": 2}, ValueError, "density is 2; combination_type"),
    "sign": (
        {},
        {"combination_type": "ties", "density": 0.5, "majority_sign_method": "mode"},
        ValueError,
        "majority_sign_method is 'mode'; expected one of",
    ),
    "ranks": (
        {"r": 3},
        {"combination_type": "linear"},
        ValueError,
        "'linear' needs adapters of the same rank, but 'one' has 2, 'two' has 3; use 'svd' or 'cat'",
    ),
    "ranks by pattern": (
        {"rank_pattern": {"q": 1}},
        {"combination_type": "linear"},
        ValueError,
        "'linear' needs adapters of the same rank, but at 'q' they have 1, 2, by their rank_pattern",
    ),
    "bias": ({"bias": "lora_only"}, {}, ValueError, "adapter 'two' has bias='lora_only', and trained biases cannot"),
    "dora": ({"use_dora": True}, {}, TypeError, "adapter 'two' is a variant of LoRA .*lora_magnitude_vector"),
    "saved": (
        {"target_modules": ["table"], "modules_to_save": ["q"]},
        {},
        ValueError,
        "adapter 'one' adapts 'q', which 'two' saves in full; a combination cannot do both",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case):
    changed, given, error, message = REFUSED[case]
    wrapped = wrapped_with(one=BASE, two={**BASE, **changed})
    arguments = {"adapters": ["one", "two"], "weights": [1.0, 1.0], "adapter_name": "both", **given}
    with pytest.raises(error, match=message):
        jpeft.add_weighted_adapter(wrapped, **arguments)


def test_refusals_of_other_adapters():
    wrapped = wrapped_with(one=BASE)
    other = jpeft.wrap(wrapped, DenseDeltaConfig(target_modules=["q"]), adapter_name="two", layouts=LAYOUTS)
    with pytest.raises(TypeError, match="adapter 'two' has a DenseDeltaConfig; expected a LoraConfig: make a LoRA"):
        jpeft.add_weighted_adapter(other, ["one", "two"], [1.0, 1.0], "both")
    config = jpeft.LoraConfig(r=2, target_modules=[], target_parameters=["k.kernel"])
    tree = {**TREE, "k": {"kernel": jnp.zeros((4, 6))}}
    wrapped_parameter = jpeft.wrap(
        jpeft.wrap(tree, jpeft.LoraConfig(**BASE), layouts=LAYOUTS), config, adapter_name="p"
    )
    with pytest.raises(TypeError, match=r"adapter 'p' has target_parameters=\('k.kernel',\); expected none"):
        jpeft.add_weighted_adapter(wrapped_parameter, ["default", "p"], [1.0, 1.0], "both")
    table = {**TREE, "embed": {"embedding": jnp.ones((7, 4))}}
    tokens = jpeft.wrap(table, jpeft.LoraConfig(**BASE, trainable_token_indices={"embed": [1, 2]}), layouts=LAYOUTS)
    with pytest.raises(TypeError, match=r"trains single rows of embed\.embedding \(trainable_token_indices\)"):
        jpeft.add_weighted_adapter(tokens, ["default"], [1.0], "both")
    turned = jpeft.wrap(wrapped, jpeft.LoraConfig(**BASE), adapter_name="two", layouts={"q.kernel": "ooi"})
    with pytest.raises(ValueError, match="adapter 'two' sees 'q' as .* wrapped with the same layouts"):
        jpeft.add_weighted_adapter(turned, ["one", "two"], [1.0, 1.0], "both")
    same = {**BASE, "modules_to_save": ["conv1"]}
    with pytest.raises(ValueError, match="adapters 'one' and 'two' both replace 'conv1.kernel' in full"):
        jpeft.add_weighted_adapter(wrapped_with(one=same, two=same), ["one", "two"], [1.0, 1.0], "both")
