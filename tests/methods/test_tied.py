"""Lily, Uni-LoRA, TinyLoRA, FRoD: the papers' formulas in numpy float64, what layers share, costs and refusals."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft
from jpeft._arrays import shared_names
from jpeft.methods._joint import category, layer_number, lengths_and_rows, shared_basis
from jpeft.methods.unilora import dealt
from jpeft_interop import load_pretrained, save_pretrained
from tests.harness import random_like
from tests.stacked_trees import assert_same_arrays, forward, layer_tree, of_layers, stacked

IN, OUT, ROWS = 6, 8, 5
IDS = np.array([[0, 3, 6], [2, 2, 1]])


def layer(params, x):
    return x @ params["w"]["kernel"] + params["w"]["bias"]


def adapted(config, inputs=IN, outputs=OUT):
    """One layer with an adapter of random values in all that trains."""
    params = random_like({"w": {"kernel": (inputs, outputs), "bias": (outputs,)}}, 1, 1.0)
    return randomised(jpeft.wrap(params, config, dtype=jnp.result_type(float)))


def randomised(wrapped, seed=2):
    """Random values in place of all that trains."""
    trained, frozen = jpeft.partition(wrapped)
    return jpeft.combine(random_like(trained, seed, 0.5), frozen)


def numbers(wrapped):
    """The weight, the bias and the adapter's arrays by their names."""
    adapter, base = wrapped.adapters["default"], wrapped.base["w"]
    shared = {name.partition(".")[0]: np.asarray(array) for name, array in adapter.shared.items()}
    own = {name: np.asarray(array) for name, array in adapter.weights["w"].items()}
    return np.asarray(base["kernel"]), np.asarray(base["bias"]), {**shared, **own}


def check(wrapped, change):
    """The lifted and the merged function against W + change."""
    w, b, _ = numbers(wrapped)
    for found in (jax.jit(jpeft.lift(layer))(wrapped, X), layer(jpeft.merge(wrapped), X)):
        np.testing.assert_allclose(found, X @ (w + change) + b, rtol=1e-10, atol=1e-10)


def assert_refused(config, cases):
    for options, message in cases:
        with pytest.raises(ValueError, match=message):
            config(**options)


def flops(function, *args):
    return jax.jit(function).lower(*args).compile().cost_analysis()["flops"]


def added_flops(config, inputs, outputs, rows):
    """FLOPs that the adapter adds to a forward pass."""
    wrapped, x = adapted(config, inputs, outputs), jnp.ones((rows, inputs))
    return flops(jpeft.lift(layer), wrapped, x) - flops(layer, wrapped.base, x)


def uses(config, tree):
    """{module path: the names of its shared arrays}."""
    adapter = jpeft.wrap(tree, config).adapters["default"]
    return {path: [place for places in own.values() for place in places] for path, own in shared_names(adapter).items()}


X = np.random.default_rng(5).normal(size=(2, ROWS, IN))

# ---- Lily -----------------------------------------------------------------------------------------------------------


def lily_of(x, own, count, scaling):
    h = x @ own["lily_A"].T
    logits = np.exp(h @ own["lily_router"].T)
    mixture = (logits / logits.sum(-1, keepdims=True)).reshape(-1, count).mean(0)
    b = sum(share * part for share, part in zip(mixture, np.split(own["lily_B"], count), strict=True))
    return scaling * h @ b


def test_lily_is_its_formula(x64):
    wrapped = adapted(jpeft.LilyConfig(target_modules=["w"], r=2, num_B=3, scaling=0.75))
    w, b, own = numbers(wrapped)
    found = jax.jit(jpeft.lift(layer))(wrapped, X)
    np.testing.assert_allclose(found, X @ w + b + lily_of(X, own, 3, 0.75), rtol=1e-10, atol=1e-10)
    rows = jax.vmap(jpeft.lift(layer), in_axes=(None, 0))(wrapped, X)
    expected = np.stack([X[0] @ w + b + lily_of(X[0], own, 3, 0.75), X[1] @ w + b + lily_of(X[1], own, 3, 0.75)])
    np.testing.assert_allclose(rows, expected, rtol=1e-10, atol=1e-10)


def test_lily_shares_in_blocks_of_one_name_and_shape():
    tree = layer_tree()
    found = uses(jpeft.LilyConfig(target_modules=["q_proj", "v_proj"], stride_A=3), tree)
    assert found["model.layers.2.q_proj"] == ["lily_A.model.layers.0.q_proj", "lily_B.model.layers.0.q_proj"]
    assert found["model.layers.3.q_proj"] == ["lily_A.model.layers.3.q_proj", "lily_B.model.layers.0.q_proj"]
    assert found["model.layers.3.v_proj"] == ["lily_A.model.layers.3.v_proj", "lily_B.model.layers.0.v_proj"]
    # A regular expression is one name for all; names of the whole path are names of their own.
    found = uses(jpeft.LilyConfig(target_modules=r".*[qv]_proj", stride_A=3), tree)
    assert found["model.layers.1.v_proj"] == ["lily_A.model.layers.1.v_proj", "lily_B.model.layers.0.q_proj"]
    found = uses(jpeft.LilyConfig(target_modules=["q_proj", "layers.1.q_proj", "v_proj"], stride_A=3), tree)
    assert found["model.layers.1.q_proj"][1] == "lily_B.model.layers.1.q_proj"
    assert found["model.layers.2.q_proj"] == ["lily_A.model.layers.0.q_proj", "lily_B.model.layers.0.q_proj"]


def test_lily_shares_by_the_last_name_from_twenty_modules_on():
    def tree(count):
        return {"layers": {str(number): {"up": {"kernel": jnp.ones((2, 2))}} for number in range(count)}}

    for targets in ("all-linear", "{}"):
        for count, shared in ((19, False), (20, True)):
            names = targets if targets == "all-linear" else [f"layers.{number}.up" for number in range(count)]
            found = uses(jpeft.LilyConfig(target_modules=names), tree(count))
            assert found["layers.7.up"][1] == f"lily_B.layers.{0 if shared else 7}.up"


def test_lily_of_fused_parts_and_of_stacked_layers(x64):
    fused = {"layers": {str(n): {"qkv": {"kernel": jnp.ones((3, 4, 4))}} for n in range(2)}}
    config = jpeft.LilyConfig(target_modules=["qkv"])
    adapter = jpeft.wrap(fused, config, layouts={".*kernel": "bio"}).adapters["default"]
    assert shared_names(adapter)["layers.1.qkv"]["lily_B"] == [f"lily_B.layers.0.qkv[{part}]" for part in range(3)]
    config = jpeft.LilyConfig(target_modules=["q_proj", "v_proj"], r=2, stride_A=3)
    tree = layer_tree(jnp.float64)
    single = randomised(jpeft.wrap(tree, config, dtype=jnp.float64))
    whole = jpeft.wrap(stacked(tree), config, dtype=jnp.float64)
    adapter, other = single.adapters["default"], whole.adapters["default"]
    assert adapter.shared.keys() == other.shared.keys()
    weights = {
        path: {name: jnp.stack([adapter.weights[path.replace("0:4", str(n))][name] for n in range(4)]) for name in own}
        for path, own in other.weights.items()
    }
    assert jax.tree.map(jnp.shape, of_layers(weights)) == jax.tree.map(jnp.shape, dict(adapter.weights))
    other = dataclasses.replace(other, weights=weights, shared=adapter.shared)
    whole = dataclasses.replace(whole, adapters={"default": other})
    results = [jax.jit(jpeft.lift(forward))(wrapped, IDS) for wrapped in (single, whole)]
    np.testing.assert_allclose(*results, rtol=1e-10, atol=1e-10)
    assert np.abs(results[0] - forward(tree, IDS)).max() > 0.1


@pytest.mark.parametrize("zeros", [True, False])
def test_lily_begins_as_peft_does(zeros):
    config = jpeft.LilyConfig(target_modules=["w"], r=16, num_B=8, init_weights=zeros)
    wrapped = jpeft.wrap(random_like({"w": {"kernel": (400, 256)}}, 1), config)
    _, _, own = numbers(dataclasses.replace(wrapped, base={"w": {"kernel": 0, "bias": 0}}))
    for name, width in (("lily_A", 400), ("lily_router", 16), ("lily_B", 256)):
        bound = 0 if zeros and name == "lily_B" else width**-0.5
        assert 0.95 * bound <= np.abs(own[name]).max() <= bound
        assert abs(own[name].std() - bound / 3**0.5) <= 0.1 * bound


def test_lily_costs_thin_products():
    config = jpeft.LilyConfig(target_modules=["w"], r=4, num_B=3)
    assert jpeft.count_parameters(adapted(config, 64, 96))[0] == 4 * 64 + 3 * 4 * 96 + 3 * 4
    rows = 256
    expected = rows * 2 * 4 * (64 + 96 + 3) + 2 * 3 * 4 * 96
    # And a few for each output: the sum, softmax.
    assert 0 <= added_flops(config, 64, 96, rows) - expected <= 2 * rows * 96


def test_lily_refuses():
    assert_refused(
        jpeft.LilyConfig,
        [
            ({"r": 0}, "r is 0; expected an integer of at least 1"),
            ({"stride_A": 0}, "stride_A is 0; expected an integer of at least 1"),
            ({"num_B": 1}, "num_B is 1; expected an integer of at least 2"),
            ({"bias": "all"}, "bias is 'all'; expected 'none', as Lily trains no biases"),
        ],
    )
    wrapped = adapted(jpeft.LilyConfig(target_modules=["w"], r=2))
    with pytest.raises(ValueError, match="Lily at 'w' mixes its matrices by the tokens of each batch, .* cannot be"):
        jpeft.merge(wrapped)


# ---- Uni-LoRA -------------------------------------------------------------------------------------------------------


def test_unilora_is_its_formula(x64):
    wrapped = adapted(jpeft.UniLoraConfig(target_modules=["w"], r=3, theta_d_length=10))
    _, _, own = numbers(wrapped)
    theta, used = own["unilora_theta_d"], [own[f"unilora_indices_{side}"].reshape(-1) for side in "AB"]
    counts = np.bincount(np.concatenate(used), minlength=10)
    assert counts.sum() == 3 * (IN + OUT) and sorted(counts) == [4] * 8 + [5] * 2
    # PEFT's scales are of float32, so the formula is that of theirs.
    a, b = (theta[own[f"unilora_indices_{side}"]] * own[f"unilora_scales_{side}"] for side in "AB")
    check(wrapped, (b @ a).T)
    for side in "AB":
        exact = counts[own[f"unilora_indices_{side}"]] ** -0.5
        np.testing.assert_allclose(own[f"unilora_scales_{side}"], exact, rtol=1e-7)


def test_unilora_scales_have_the_precision_of_the_weight():
    shapes = {"w": {"kernel": jax.ShapeDtypeStruct((IN, OUT), jnp.bfloat16)}}
    params = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), shapes)
    wrapped = jpeft.wrap(params, jpeft.UniLoraConfig(target_modules=["w"], theta_d_length=19))
    scales = wrapped.adapters["default"].weights["w"]["unilora_scales_A"]
    assert scales.dtype == jnp.float32
    assert set(np.asarray(scales).ravel()) <= {float(jnp.bfloat16(count**-0.5)) for count in (2, 3)}


@pytest.mark.parametrize("uniform", [True, False])
def test_unilora_begins_as_peft_does(uniform):
    config = jpeft.UniLoraConfig(target_modules=["w"], theta_d_length=2000, init_weights=uniform)
    theta = jpeft.wrap({"w": {"kernel": jnp.ones((4, 4))}}, config).adapters["default"].shared["unilora_theta_d"]
    assert abs(theta.std() / (0.02 / 3**0.5 if uniform else 1) - 1) < 0.1
    assert not uniform or 0.019 < jnp.abs(theta).max() <= 0.02


def test_unilora_deals_out_in_the_order_of_pytorch_and_to_stacked_layers_alike():
    config, tree = jpeft.UniLoraConfig(target_modules=["q_proj", "v_proj"], theta_d_length=7), layer_tree()
    adapter, other = (jpeft.wrap(params, config).adapters["default"] for params in (tree, stacked(tree)))
    assert_same_arrays(of_layers(other.weights), dict(adapter.weights))
    indices = dealt(4 * 2 * 4 * (4 + 4), 7, 42).reshape(4, 2, 2, 16)
    for number, block in enumerate(indices):
        for name, own in zip(("q_proj", "v_proj"), block, strict=True):
            found = adapter.weights[f"model.layers.{number}.{name}"]
            np.testing.assert_array_equal([found[f"unilora_indices_{side}"].reshape(-1) for side in "AB"], own)


def test_files_that_go_by_an_unknown_order_say_so(tmp_path):
    tree = {"left": {"up": {"kernel": jnp.ones((4, 4))}}, "right": {"up": {"kernel": jnp.ones((4, 4))}}}
    wrapped = jpeft.wrap(tree, jpeft.UniLoraConfig(target_modules=["up"]))
    message = "UNILORA goes by the order .* do not tell it for left, right, .* in this order: left.up, right.up. If"
    with pytest.warns(UserWarning, match=message):
        save_pretrained(wrapped, tmp_path)
    with pytest.warns(UserWarning, match=message):
        load_pretrained(tree, tmp_path)
    save_pretrained(jpeft.wrap(tree, jpeft.UniLoraConfig(target_modules=["up"], save_indices=True)), tmp_path)
    load_pretrained(tree, tmp_path)


def test_unilora_costs_one_vector_and_thin_products():
    config = jpeft.UniLoraConfig(target_modules=["w"], r=4, theta_d_length=50)
    assert jpeft.count_parameters(adapted(config, 64, 96))[0] == 50
    rows = 256
    expected = rows * 2 * 4 * (64 + 96) + 4 * (64 + 96)
    # And the sum, one for each output.
    assert 0 <= added_flops(config, 64, 96, rows) - expected <= 2 * rows * 96


def test_unilora_refuses():
    assert_refused(
        jpeft.UniLoraConfig,
        [
            ({"r": 0}, "r is 0; expected an integer of at least 1"),
            ({"theta_d_length": 0}, "theta_d_length is 0; expected an integer of at least 1"),
            ({"proj_seed": -1}, "proj_seed is -1; expected an integer of at least 0"),
            ({"unilora_dropout": 1.0}, r"unilora_dropout is 1.0; expected a rate in \[0, 1\)"),
            ({"init_theta_d_bound": 0.0}, "init_theta_d_bound is 0.0; expected a positive number"),
            ({"bias": "lora_only"}, "bias is 'lora_only'; expected 'none', 'all' or 'unilora_only'"),
        ],
    )


# ---- TinyLoRA -------------------------------------------------------------------------------------------------------

TABLE = np.array([[1, 4, 0], [2, 2, 3]])


def lookup(params, ids):
    return params["w"]["embedding"][ids]


def table(config, **options):
    params = random_like({"w": {"embedding": (7, 5)}}, 1, 1.0)
    return randomised(jpeft.wrap(params, config, dtype=jnp.result_type(float), **options))


def test_tinylora_is_its_formula(x64):
    wrapped = adapted(jpeft.TinyLoraConfig(target_modules=["w"], r=3, u=4))
    w, _, own = numbers(wrapped)
    left, values, right = np.linalg.svd(w, full_matrices=False)
    r = np.einsum("i,ijk->jk", own["tinylora_v"], own["tinylora_P"])
    check(wrapped, (own["tinylora_B"] @ r @ own["tinylora_A"]).T)
    np.testing.assert_allclose(
        (own["tinylora_B"] @ own["tinylora_A"]).T, left[:, :3] * values[:3] @ right[:3], atol=1e-12
    )
    np.testing.assert_allclose((own["tinylora_A"] ** 2).sum(1), values[:3], rtol=1e-12)
    np.testing.assert_allclose((own["tinylora_B"] ** 2).sum(0), values[:3], rtol=1e-12)


def test_tinylora_of_a_table_is_its_formula(x64):
    wrapped = table(jpeft.TinyLoraConfig(target_modules=["w"], r=9, u=4))
    adapter, w = wrapped.adapters["default"], np.asarray(wrapped.base["w"]["embedding"])
    own = adapter.weights["w"]
    assert own["tinylora_P"].shape == (4, 5, 5)
    np.testing.assert_allclose(own["tinylora_B"] @ own["tinylora_A"], w, atol=1e-12)
    r = np.einsum("i,ijk->jk", adapter.shared["tinylora_v.0"], own["tinylora_P"])
    expected = (w + own["tinylora_B"] @ r @ own["tinylora_A"])[TABLE]
    for found in (jax.jit(jpeft.lift(lookup))(wrapped, TABLE), lookup(jpeft.merge(wrapped), TABLE)):
        np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-10)


def test_tinylora_drops_what_is_looked_up(x64):
    wrapped = table(jpeft.TinyLoraConfig(target_modules=["w"], r=2, u=4, tinylora_dropout=0.5))
    run, plain = jax.jit(jpeft.lift(lookup)), jpeft.lift(lookup)(wrapped, TABLE)
    own = wrapped.adapters["default"].weights["w"]
    base, a = lookup(wrapped.base, TABLE), np.asarray(own["tinylora_A"])
    r = np.einsum("i,ijk->jk", wrapped.adapters["default"].shared["tinylora_v.0"], own["tinylora_P"])
    h = np.asarray(own["tinylora_B"])[TABLE]
    seen = set()
    for seed in range(8):
        change = run(jpeft.with_context(wrapped, rng=jax.random.key(seed)), TABLE) - base
        kept = np.asarray(change) @ np.linalg.pinv(r @ a) / (2 * h)
        np.testing.assert_allclose(kept, np.round(kept), atol=1e-8)
        seen |= set(np.round(kept).astype(int).ravel().tolist())
    assert seen == {0, 1} and np.abs(plain - base).max() > 0.1


@pytest.mark.parametrize(
    ("tying", "count", "expected"),
    [(0.0, 3, [0, 1, 2]), (1.0, 3, [0, 0, 0]), (0.5, 5, [0, 0, 1, 1, 1]), (0.4, 5, [0, 1, 2, 2, 2])],
)
def test_tinylora_groups_layers_in_order(tying, count, expected):
    tree = {"layers": {str(number): {"up": {"kernel": jnp.ones((2, 2))}} for number in range(count)}}
    found = uses(jpeft.TinyLoraConfig(target_modules=["up"], weight_tying=tying), tree)
    assert found == {f"layers.{number}.up": [f"tinylora_v.{group}"] for number, group in enumerate(expected)}


def test_tinylora_begins_as_peft_does():
    for init, std in ((True, 0), ("uniform", 0.02 / 3**0.5), (False, 1)):
        config = jpeft.TinyLoraConfig(target_modules=["w"], u=2000, r=1, init_weights=init)
        v = jpeft.wrap({"w": {"kernel": jnp.ones((4, 4))}}, config).adapters["default"].shared["tinylora_v.0"]
        assert abs(v.std() - std) <= 0.1 * std


def test_tinylora_of_stacked_layers_is_that_of_single_ones(x64):
    config, tree = jpeft.TinyLoraConfig(target_modules=["q_proj", "v_proj"], weight_tying=0.5), layer_tree(jnp.float64)
    single, whole = (jpeft.wrap(params, config, dtype=jnp.float64) for params in (tree, stacked(tree)))
    assert_same_arrays(of_layers(whole.adapters["default"].weights), dict(single.adapters["default"].weights))
    shared = random_like(single.adapters["default"].shared, 3, 0.5)
    results = []
    for wrapped in (single, whole):
        assert wrapped.adapters["default"].shared.keys() == shared.keys() == {f"tinylora_v.{n}" for n in range(4)}
        adapter = dataclasses.replace(wrapped.adapters["default"], shared=shared)
        results.append(jax.jit(jpeft.lift(forward))(dataclasses.replace(wrapped, adapters={"default": adapter}), IDS))
    np.testing.assert_allclose(*results, rtol=1e-10, atol=1e-10)
    assert np.abs(results[0] - forward(tree, IDS)).max() > 0.1


def test_tinylora_costs_one_vector_and_thin_products():
    config = jpeft.TinyLoraConfig(target_modules=["w"], r=4, u=50)
    assert jpeft.count_parameters(adapted(config, 64, 96))[0] == 50
    rows = 256
    expected = rows * 2 * 4 * (64 + 96) + 2 * 4**2 * (50 + 96)
    # And the sum, one for each output.
    assert 0 <= added_flops(config, 64, 96, rows) - expected <= 2 * rows * 96


def test_tinylora_refuses():
    assert_refused(
        jpeft.TinyLoraConfig,
        [
            ({"r": 0}, "r is 0; expected an integer of at least 1"),
            ({"u": 0}, "u is 0; expected an integer of at least 1"),
            ({"weight_tying": 1.5}, "weight_tying is 1.5; expected a number from 0 to 1"),
            ({"tinylora_dropout": 1.0}, r"tinylora_dropout is 1.0; expected a rate in \[0, 1\)"),
            ({"init_weights": "normal"}, "init_weights is 'normal'; expected True, False or 'uniform'"),
            ({"projection_seed": 2**63}, "projection_seed is 9223372036854775808; expected an integer of 64 bits"),
            ({"bias": "lora_only"}, "bias is 'lora_only'; expected 'none', 'all' or 'tinylora_only'"),
        ],
    )


# ---- FRoD -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_frod_is_its_formula(x64, rate):
    wrapped = adapted(jpeft.FrodConfig(target_modules=["w"], sparse_rate=rate))
    w, _, own = numbers(wrapped)
    s = np.zeros((IN, IN))
    rows, columns = own["frod_s_indices"]
    assert len(rows) == int(rate * IN**2) and (rows != columns).all()
    s[rows, columns] = own["frod_lambda_s_values"]
    u, v = own["frod_U"], own["frod_V"]
    np.testing.assert_allclose(u @ np.diag(own["frod_lambda_0"]) @ v.T, w.T, atol=1e-12)
    np.testing.assert_allclose(np.linalg.norm(u, axis=0), 1, rtol=1e-12)
    check(wrapped, (u @ (s + np.diag(own["frod_lambda_l"])) @ v.T).T - w)


def test_frod_beside_another_adapter_adds_its_change(x64):
    wrapped = adapted(jpeft.FrodConfig(target_modules=["w"], sparse_rate=0.3))
    other = jpeft.wrap(wrapped, jpeft.LoraConfig(target_modules=["w"], r=2), adapter_name="other", dtype=jnp.float64)
    for names in (["default", "other"], ["other", "default"]):
        both = randomised(jpeft.set_adapter(other, names))
        expected = layer(jpeft.merge(both), X)
        np.testing.assert_allclose(jax.jit(jpeft.lift(layer))(both, X), expected, rtol=1e-10, atol=1e-10)


def test_frod_drops_inputs_of_the_change_alone(x64):
    wrapped = adapted(jpeft.FrodConfig(target_modules=["w"], sparse_rate=0.3, frod_dropout=0.5))
    change = layer(jpeft.merge(wrapped), jnp.eye(IN)) - layer(wrapped.base, jnp.eye(IN))
    y = jpeft.lift(layer)(jpeft.with_context(wrapped, rng=jax.random.key(0)), X) - layer(wrapped.base, X)
    kept = np.linalg.lstsq(change.T, np.asarray(y).reshape(-1, OUT).T)[0].T / (2 * X.reshape(-1, IN))
    np.testing.assert_allclose(kept, np.round(kept), atol=1e-8)
    assert set(np.round(kept).astype(int).ravel()) == {0, 1}


def test_frod_shares_a_basis_in_a_category_and_keeps_stacked_layers_alike(x64):
    config, tree = jpeft.FrodConfig(target_modules=["q_proj", "v_proj"], sparse_rate=0.3), layer_tree(jnp.float64)
    single, whole = (jpeft.wrap(params, config, dtype=jnp.float64) for params in (tree, stacked(tree)))
    adapter, other = single.adapters["default"], whole.adapters["default"]
    assert adapter.shared.keys() == {
        f"frod_{name}.{part}_proj" for name in ("V", "s_indices", "s_size") for part in "qv"
    }
    for name, array in adapter.shared.items():
        np.testing.assert_array_equal(array, other.shared[name])
    assert_same_arrays(of_layers(other.weights), dict(adapter.weights))
    matrices = [np.asarray(tree["model"]["layers"][str(number)]["q_proj"]["kernel"]).T for number in range(4)]
    np.testing.assert_allclose(adapter.shared["frod_V.q_proj"], shared_basis(matrices, 1e-3), atol=1e-12)
    values = random_like({path: own["frod_lambda_s_values"] for path, own in adapter.weights.items()}, 5)
    stack = {path: jnp.stack([values[path.replace("0:4", str(n))] for n in range(4)]) for path in other.weights}
    results = []
    for wrapped, given in ((single, values), (whole, stack)):
        weights = {
            path: {**own, "frod_lambda_s_values": given[path]}
            for path, own in wrapped.adapters["default"].weights.items()
        }
        changed = dataclasses.replace(wrapped.adapters["default"], weights=weights)
        results.append(jax.jit(jpeft.lift(forward))(dataclasses.replace(wrapped, adapters={"default": changed}), IDS))
    np.testing.assert_allclose(*results, rtol=1e-10, atol=1e-10)
    assert np.abs(results[0] - forward(tree, IDS)).max() > 0.1


def test_frod_of_few_rows_and_of_a_weight_without_full_rank(x64):
    wide = np.random.default_rng(0).normal(size=(3, 6))
    basis = shared_basis([wide], 1e-3)
    np.testing.assert_allclose(basis @ basis.T, np.eye(6), atol=1e-12)
    lengths, rows = lengths_and_rows(basis, wide.T)
    np.testing.assert_allclose(basis @ (lengths[:, None] * rows), wide.T, atol=1e-12)
    assert (np.linalg.norm(rows, axis=1) > 0.5).sum() == 3
    v = np.diag([1.0, 2.0, 0.0])
    lengths, rows = lengths_and_rows(v, v @ np.ones((3, 2)))
    np.testing.assert_allclose(v @ (lengths[:, None] * rows), v @ np.ones((3, 2)), atol=1e-12)


def test_frod_goes_by_the_number_of_the_layer_and_the_category():
    paths = ("model.layers.12.mlp.up", "encoder.layer.3.attention.self.query", "layers", "head", "layers.x.0.q")
    assert [layer_number(path, 7) for path in paths] == [12, 3, 7, 7, 0]
    found = [
        category(path) for path in ("head", "a.0.q", "a.1.self.query", "a.1.attention.output.dense", "b.output.dense")
    ]
    assert found == ["head", "q", "self_query", "attention_output", "output_dense"]


def test_frod_in_a_compiled_function_and_without_its_basis_in_files(tmp_path):
    config = jpeft.FrodConfig(target_modules=["w"], save_projection=False, sparse_rate=0.2)
    params = random_like({"w": {"kernel": (4, 6)}}, 1, 1.0)
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
    eager, compiled = jpeft.wrap(params, config), jax.jit(lambda params: jpeft.wrap(params, config))(params)
    for one, other in zip(jax.tree.leaves(eager), jax.tree.leaves(compiled), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)
    wrapped = randomised(eager)
    # A basis that the decomposition does not give, as of another machine: it is kept beside PEFT's file.
    adapter = wrapped.adapters["default"]
    shared = {**adapter.shared, "frod_V.w": -adapter.shared["frod_V.w"]}
    weights = {"w": {**adapter.weights["w"], "frod_U": -adapter.weights["w"]["frod_U"]}}
    adapter = dataclasses.replace(adapter, shared=shared, weights=weights)
    wrapped = dataclasses.replace(wrapped, adapters={"default": adapter})
    save_pretrained(wrapped, tmp_path)
    loaded = load_pretrained(params, tmp_path).adapters["default"]
    for name, array in adapter.shared.items():
        np.testing.assert_array_equal(array, loaded.shared[name])
    np.testing.assert_allclose(adapter.weights["w"]["frod_U"], loaded.weights["w"]["frod_U"], rtol=1e-6)


def test_frod_costs_two_products_of_the_input_more_than_the_weight():
    config = jpeft.FrodConfig(target_modules=["w"], sparse_rate=0.01)
    assert jpeft.count_parameters(adapted(config, 64, 96))[0] == 64 + 40
    rows = 256
    expected = rows * 4 * 64**2
    assert abs(added_flops(config, 64, 96, rows) - expected) <= 0.02 * expected


def test_frod_refuses():
    assert_refused(
        jpeft.FrodConfig,
        [
            ({"sparse_rate": 1.5}, "sparse_rate is 1.5; expected a number from 0 to 1"),
            ({"frod_dropout": 1.0}, r"frod_dropout is 1.0; expected a rate in \[0, 1\)"),
            ({"regularization_alpha": -1.0}, "regularization_alpha is -1.0; expected at least 0"),
            ({"projection_prng_key": 0.5}, "projection_prng_key is 0.5; expected an integer of 64 bits"),
            ({"bias": "lora_only"}, "bias is 'lora_only'; expected 'none', 'all' or 'frod_only'"),
        ],
    )
    tree = {"layers": {str(size): {"up": {"kernel": jnp.ones((size, 2))}} for size in (3, 4)}}
    with pytest.raises(
        ValueError, match=r"FRoD: all layers 'up' share a basis, but have \[3, 4\] inputs; expected one"
    ):
        jpeft.wrap(tree, jpeft.FrodConfig(target_modules=["up"]))
