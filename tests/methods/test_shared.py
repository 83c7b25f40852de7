"""VeRA, PVeRA, RandLoRA and VB-LoRA, whose layers share arrays: formulas in numpy, stacks, costs, refusals."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft
from jpeft._torch_random import Generator
from jpeft_interop import load_pretrained, save_pretrained
from tests.harness import random_like
from tests.stacked_trees import (
    STACKS,
    assert_same_adapter,
    forward as stacked_model,
    layer_tree,
    of_layers,
    randomised,
    stacked,
    taken_apart,
)

SIZES = {"up": (4, 6), "square": (6, 6), "down": (6, 2)}
KEY = jax.random.key(3)
IDS = np.array([[0, 3, 6], [2, 2, 1]])

# ---- formulas -------------------------------------------------------------------------------------------------------


def vera(p, shared, inputs, outputs, config):
    """dW (out, in)."""
    a, b = shared["vera_A"][:, :inputs], shared["vera_B"][:outputs]
    return np.diag(p["vera_lambda_b"]) @ b @ np.diag(p["vera_lambda_d"]) @ a


def pvera(p, shared, inputs, outputs, config):
    r = config.r
    a, b = shared["pvera_A"][:r, :inputs], shared["pvera_B"][:outputs]
    return np.diag(p["pvera_lambda_b"]) @ b @ np.diag(p["pvera_lambda_d"][:r]) @ a


def randlora(p, shared, inputs, outputs, config):
    lengths, gamma = p["randlora_lambda"], p["randlora_gamma"]
    rank, count, narrow = *lengths.shape, min(inputs, outputs)
    assert count == -(-narrow // rank)
    change = np.zeros((max(inputs, outputs), narrow))
    pairs_b = [(base, row) for base in range(count) for row in range(rank)]
    pairs_a = [(base, row) for row in range(rank) for base in range(count)]
    for (base_b, row_b), (base_a, row_a) in zip(pairs_b, pairs_a, strict=True):
        column = shared["randlora_B"][: max(inputs, outputs), base_b, row_b]
        row = lengths[row_a, base_a] * shared["randlora_A"][row_a, 0, :narrow] * gamma[base_a]
        change += np.outer(column, row)
    change = config.randlora_alpha / config.r * change
    return change if inputs <= outputs else change.T


def vblora(p, shared, inputs, outputs, config):
    def piece(logits):
        best = np.argsort(-logits)[: config.topk]
        weights = np.exp(logits[best]) / np.exp(logits[best]).sum()
        return sum(w * shared["vblora_vector_bank"][k] for w, k in zip(weights, best, strict=True))

    a = np.stack([np.concatenate([piece(logits) for logits in row]) for row in p["vblora_logits_A"]])
    rows = zip(*p["vblora_logits_B"], strict=True)
    b = np.stack([np.concatenate([piece(logits) for logits in row]) for row in rows])
    return b.T @ a


CONFIGS = {
    "vera": jpeft.VeraConfig(r=3, target_modules=".*"),
    "pvera": jpeft.PveraConfig(r=3, target_modules=".*"),
    "randlora": jpeft.RandLoraConfig(r=4, randlora_alpha=3, target_modules=".*"),
    "randlora, one basis": jpeft.RandLoraConfig(r=8, randlora_alpha=3, target_modules=".*"),
    "vblora": jpeft.VBLoRAConfig(
        r=3, num_vectors=7, vector_length=2, topk=3, init_vector_bank_bound=1.0, target_modules=".*"
    ),
}
over_configs = pytest.mark.parametrize("name", CONFIGS)


def formula(name):
    return {"vera": vera, "pvera": pvera, "randlora": randlora, "vblora": vblora}[name.partition(",")[0]]


def model(params, x):
    for name in SIZES:
        x = jnp.tanh(x @ params[name]["kernel"])
    return x


def adapted(config, seed=20):
    """Layers of several sizes with an adapter of random values, of float64 where that is on."""
    params = random_like({name: {"kernel": size} for name, size in SIZES.items()}, 1, 0.7)
    wrapped = jpeft.wrap(params, config, dtype=jnp.result_type(float))
    adapter = wrapped.adapters["default"]
    weights, shared = random_like((adapter.weights, adapter.shared), seed, 0.7)
    return dataclasses.replace(
        wrapped, adapters={"default": dataclasses.replace(adapter, weights=weights, shared=shared)}
    )


@over_configs
@pytest.mark.usefixtures("x64")
def test_the_formula_in_numpy(name):
    wrapped = adapted(CONFIGS[name])
    adapter, x = wrapped.adapters["default"], np.random.default_rng(0).normal(size=(5, 4))
    shared = jax.tree.map(np.asarray, adapter.shared)
    expected = x
    for layer, (inputs, outputs) in SIZES.items():
        own = jax.tree.map(np.asarray, adapter.weights[layer])
        change = formula(name)(own, shared, inputs, outputs, CONFIGS[name])
        assert np.abs(change).max() > 1e-2
        expected = np.tanh(expected @ (np.asarray(wrapped.base[layer]["kernel"]) + change.T))
    for found in (jax.jit(jpeft.lift(model))(wrapped, x), model(jpeft.merge(wrapped), x)):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-10)


@over_configs
def test_what_is_shared_is_there_once(name):
    config = dataclasses.replace(CONFIGS[name], target_modules=["up", "down"])
    wrapped = jpeft.wrap({n: {"kernel": jnp.ones(size)} for n, size in SIZES.items()}, config)
    shapes = {name: array.shape for name, array in wrapped.adapters["default"].shared.items()}
    assert (
        shapes
        == {
            "vera": {"vera_A": (3, 6), "vera_B": (6, 3)},
            "pvera": {"pvera_A": (6, 6), "pvera_B": (6, 3)},
            "randlora": {"randlora_A": (4, 1, 6), "randlora_B": (6, 2, 4)},
            "randlora, one basis": {"randlora_A": (8, 1, 6), "randlora_B": (6, 1, 8)},
            "vblora": {"vblora_vector_bank": (7, 2)},
        }[name]
    )
    trains = jpeft.trainable_mask(wrapped).adapters["default"].shared
    assert trains == dict.fromkeys(shapes, name == "vblora")


@pytest.mark.parametrize("settings", [{}, {"sparse": True}, {"very_sparse": True}], ids=str)
def test_the_bases_of_randlora(settings):
    params = {"q": {"kernel": jnp.ones((36, 40))}}
    wrapped = jpeft.wrap(params, jpeft.RandLoraConfig(r=8, target_modules=["q"], **settings))
    for basis in map(np.asarray, wrapped.adapters["default"].shared.values()):
        assert abs(basis.std(ddof=1) - 1) < 4e-3
        zeros = {"sparse": 2 / 3, "very_sparse": 1 - 1 / 6}.get(*settings) if settings else 0.0
        assert abs((basis == 0).mean() - zeros) < 0.06
        assert len(np.unique(basis)) == (3 if settings else len(np.unique(np.abs(basis))) * 2) or not settings


def test_initial_values_without_init_weights():
    params = {"q": {"kernel": jnp.ones((4, 6))}}
    of = {
        name: jpeft.wrap(params, dataclasses.replace(CONFIGS[name], init_weights=False))
        .adapters["default"]
        .weights["q"]
        for name in ("vera", "pvera", "randlora")
    }
    for prefix in ("vera", "pvera"):
        np.testing.assert_array_equal(of[prefix][f"{prefix}_lambda_b"], np.ones(6))
        assert len(np.unique(of[prefix][f"{prefix}_lambda_d"])) == (3 if prefix == "vera" else 6)
    np.testing.assert_allclose(of["randlora"]["randlora_gamma"], np.full((1, 4), 1 / 6))
    assert len(np.unique(of["randlora"]["randlora_lambda"])) == 4


def test_adapters_with_other_seeds_each_have_their_own_matrices():
    params = {"q": {"kernel": jnp.zeros((4, 6))}}
    wrapped = jpeft.wrap(params, dataclasses.replace(CONFIGS["vera"], init_weights=False), adapter_name="a")
    other = dataclasses.replace(CONFIGS["vera"], init_weights=False, projection_prng_key=1, save_projection=False)
    wrapped = jpeft.wrap(wrapped, other, adapter_name="b")
    changes = [jpeft.merge(wrapped, adapter_names=name)["q"]["kernel"] for name in (("a",), ("b",), ("a", "b"))]
    assert jnp.abs(changes[0] - changes[1]).max() > 0.1
    np.testing.assert_allclose(changes[0] + changes[1], changes[2], rtol=1e-6, atol=1e-6)


# ---- sampling -------------------------------------------------------------------------------------------------------


def sampled(config, count=20_000):
    """One layer, one input many times; its mean and standard deviation of each entry of z, and B diag(b)."""
    rng = np.random.default_rng(4)
    wrapped = jpeft.wrap({"q": {"kernel": jnp.zeros((4, 3))}}, dataclasses.replace(config, target_modules=["q"]))
    own = {"pvera_lambda_d": rng.normal(size=6), "pvera_lambda_b": rng.normal(size=3)}
    own = {name: jnp.asarray(array, jnp.float32) for name, array in own.items()}
    adapter = dataclasses.replace(wrapped.adapters["default"], weights={"q": own})
    wrapped = dataclasses.replace(wrapped, adapters={"default": adapter})
    x = np.tile(rng.normal(size=4).astype(np.float32), (count, 1))
    h = np.asarray(adapter.shared["pvera_A"]) @ x[0] * np.asarray(own["pvera_lambda_d"])
    out = np.asarray(own["pvera_lambda_b"])[:, None] * np.asarray(adapter.shared["pvera_B"])
    return wrapped, x, h[:3], np.exp(h[3:] / 2), out


def layer(params, x):
    return x @ params["q"]["kernel"]


def test_pvera_samples_with_a_key():
    wrapped, x, mean, deviation, out = sampled(CONFIGS["pvera"])
    still = np.asarray(jpeft.lift(layer)(wrapped, x))
    np.testing.assert_allclose(still, np.tile(out @ mean, (len(x), 1)), rtol=1e-5)
    moved = np.asarray(jax.jit(jpeft.lift(layer))(jpeft.with_context(wrapped, rng=KEY), x))
    covariance = (out * deviation**2) @ out.T
    spread = np.sqrt(np.diag(covariance))
    np.testing.assert_allclose(moved.mean(0), out @ mean, atol=5 * spread.max() / len(x) ** 0.5)
    np.testing.assert_allclose(np.cov(moved.T), covariance, atol=0.05 * spread.max() ** 2)
    again = jax.jit(jpeft.lift(layer))(jpeft.with_context(wrapped, rng=jax.random.key(4)), x)
    assert not np.allclose(moved, again)


def test_pvera_that_samples_at_inference_needs_a_key_and_drops_nothing():
    config = dataclasses.replace(CONFIGS["pvera"], sample_at_inference=True, inference_mode=True, pvera_dropout=0.5)
    wrapped, x, mean, deviation, out = sampled(config, 4000)
    with pytest.raises(ValueError, match=r"PVeRA at 'q': sample_at_inference is True, and the call brings no key"):
        jpeft.lift(layer)(wrapped, x)
    moved = np.asarray(jpeft.lift(layer)(jpeft.with_context(wrapped, rng=KEY), x))
    covariance = (out * deviation**2) @ out.T
    np.testing.assert_allclose(np.cov(moved.T), covariance, atol=0.1 * np.abs(covariance).max())
    training = dataclasses.replace(config, inference_mode=False)
    dropping, x, *_ = sampled(training, 4000)
    dropped = np.asarray(jpeft.lift(layer)(jpeft.with_context(dropping, rng=KEY), x))
    assert np.abs(np.cov(dropped.T) - covariance).max() > 0.3 * np.abs(covariance).max()


# ---- stacks of layers -----------------------------------------------------------------------------------------------

NAMES = ("vera", "pvera", "randlora", "vblora")


def of_model(name):
    return dataclasses.replace(CONFIGS[name], target_modules=["q_proj", "v_proj", "score"])


def both(config, names):
    tree = layer_tree()
    return jpeft.wrap(stacked(tree, names), config, rng=KEY), jpeft.wrap(tree, config, rng=KEY)


@pytest.mark.parametrize(
    ("name", "stacks"), [*(("vera", stacks) for stacks in STACKS), *((name, "all but one") for name in NAMES[1:])]
)
def test_stacked_layers_begin_and_compute_and_train_as_single_ones(name, stacks):
    whole, single = both(of_model(name), STACKS[stacks])
    one, other = whole.adapters["default"], single.adapters["default"]
    assert_same_adapter(one, other)
    for array, same in zip(jax.tree.leaves(one.shared), jax.tree.leaves(other.shared), strict=True):
        np.testing.assert_array_equal(array, same)
    whole = randomised(whole)
    single = taken_apart(whole, layer_tree(), single)
    loss = jpeft.lift(lambda params, ids: jnp.sin(stacked_model(params, ids)).sum())
    (y, by_stack), (want, by_layer) = (jax.jit(jpeft.value_and_grad(loss))(each, IDS) for each in (whole, single))
    np.testing.assert_allclose(y, want, rtol=1e-5)
    assert abs(float(want - loss(jpeft.disable_adapters(single), IDS))) > 1e-3
    gradients = by_stack.adapters["default"], by_layer.adapters["default"]
    found, expected = ((each.shared, of_layers(each.weights)) for each in gradients)
    mask = jpeft.trainable_mask(single).adapters["default"]
    for leaf, same, trains in zip(*map(jax.tree.leaves, (found, expected, (mask.shared, mask.weights))), strict=True):
        if trains:
            np.testing.assert_allclose(leaf, same, rtol=1e-4, atol=1e-4)
    for leaf, same in zip(jax.tree.leaves(jpeft.merge(whole)), jax.tree.leaves(merged(single, stacks)), strict=True):
        np.testing.assert_allclose(leaf, same, rtol=1e-5, atol=1e-5)


def merged(single, stacks):
    return stacked(jpeft.merge(single), STACKS[stacks])


@pytest.mark.parametrize("saved", (True, False), ids=("saved", "drawn again"))
@pytest.mark.parametrize("name", NAMES)
def test_files_of_stacked_layers_are_those_of_single_ones(name, saved, tmp_path):
    config = of_model(name) if name == "vblora" else dataclasses.replace(of_model(name), save_projection=saved)
    whole, single = both(config, STACKS["all"])
    whole = randomised(whole)
    single = taken_apart(whole, layer_tree(), single)
    save_pretrained(whole, tmp_path / "whole")
    save_pretrained(single, tmp_path / "single")
    held = [(tmp_path / each / "adapter_model.safetensors").read_bytes() for each in ("whole", "single")]
    assert held[0] == held[1]
    assert (f"base_model.{next(iter(single.adapters['default'].shared))}".encode() in held[0]) == (
        saved or name == "vblora"
    )
    loaded = load_pretrained(whole.base, tmp_path / "single", is_trainable=True)
    pairs = zip(jax.tree.leaves(loaded.adapters), jax.tree.leaves(whole.adapters), strict=True)
    for array, same in pairs:
        np.testing.assert_array_equal(array, same)


@pytest.mark.parametrize("name", ("vera", "pvera", "randlora"))
def test_stacked_layers_do_not_copy_what_they_share(name):
    config = dataclasses.replace(of_model(name), target_modules=["q_proj"])
    whole, _ = both(config, STACKS["all"])
    ids = jnp.arange(7)[None] % 3  # seven tokens: no shape of a matrix
    text = str(jax.make_jaxpr(jpeft.grad(lambda w: jpeft.lift(stacked_model)(w, ids).sum()))(whole))
    for array in whole.adapters["default"].shared.values():
        shape = ",".join(map(str, array.shape))
        assert f"f32[{shape}]" in text and f"f32[4,{shape}]" not in text


@pytest.mark.parametrize("name", NAMES)
def test_stacks_without_numbers(name):
    """Experts, which have no paths of their own: numbered, each with its own values."""
    params = {"w": {"kernel": jax.random.normal(KEY, (3, 4, 6))}}
    wrapped = jpeft.wrap(params, CONFIGS[name], layouts={"w.kernel": "bio"}, rng=KEY)
    wrapped = randomised(wrapped)
    x = jax.random.normal(jax.random.key(8), (3, 5, 4))
    found = jax.jit(jpeft.lift(lambda p, x: jnp.einsum("ebi,eio->ebo", x, p["w"]["kernel"])))(wrapped, x)
    adapter = wrapped.adapters["default"]
    for expert in range(3):
        own = {key: np.asarray(array[expert]) for key, array in adapter.weights["w"].items()}
        change = formula(name)(own, {k: np.asarray(v) for k, v in adapter.shared.items()}, 4, 6, CONFIGS[name])
        want = np.asarray(x[expert]) @ (np.asarray(params["w"]["kernel"][expert]) + change.T)
        np.testing.assert_allclose(found[expert], want, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_stays_half_precision(name):
    params = {"q": {"kernel": jnp.ones((4, 6), jnp.bfloat16)}}
    wrapped = randomised(jpeft.wrap(params, dataclasses.replace(CONFIGS[name], target_modules=["q"])))
    x = jnp.ones((5, 4), jnp.bfloat16)
    found, want = jax.jit(jpeft.lift(layer))(wrapped, x), layer(jpeft.merge(wrapped), x)
    assert found.dtype == want.dtype == jnp.bfloat16
    np.testing.assert_allclose(found.astype(jnp.float32), want.astype(jnp.float32), rtol=0.05, atol=0.2)


# ---- costs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "key", "parameters", "flops"),
    [
        ("vera", None, lambda i, o, r: r + o, lambda i, o, r: 2 * r * (i + o)),
        ("pvera", None, lambda i, o, r: 2 * r + o, lambda i, o, r: 2 * r * (i + o)),
        ("pvera", KEY, lambda i, o, r: 2 * r + o, lambda i, o, r: 2 * r * (2 * i + o)),
        (
            "randlora",
            None,
            lambda i, o, r: -(-min(i, o) // r) * (r + min(i, o)),
            lambda i, o, r: 2 * r * -(-min(i, o) // r) * (i + o),
        ),
        ("vblora", None, lambda i, o, r: r * (i + o) * 7 // 2 + 7 * 2, lambda i, o, r: 2 * r * (i + o)),
    ],
)
def test_cost(name, key, parameters, flops):
    rank, rows = 16, 128
    for inputs, outputs in ((384, 256), (256, 384)) if name == "randlora" else ((384, 256),):
        _check_cost(name, key, parameters, flops, rank, rows, inputs, outputs)


def _check_cost(name, key, parameters, flops, rank, rows, inputs, outputs):
    config = dataclasses.replace(CONFIGS[name], r=rank, target_modules=["q"])
    wrapped = jpeft.wrap({"q": {"kernel": jnp.zeros((inputs, outputs))}}, config)
    wrapped = wrapped if key is None else jpeft.with_context(wrapped, rng=key)
    assert jpeft.count_parameters(wrapped)[0] == parameters(inputs, outputs, rank)
    x = jnp.zeros((rows, inputs))
    plain, ours = (_flops(jpeft.lift(layer), each, x) for each in (jpeft.disable_adapters(wrapped), wrapped))
    np.testing.assert_allclose(ours - plain, rows * flops(inputs, outputs, rank), rtol=0.1)


def _flops(function, *args):
    return jax.jit(function).lower(*args).compile().cost_analysis()["flops"]


# ---- refusals -------------------------------------------------------------------------------------------------------

PROJECTED = {"vera": jpeft.VeraConfig, "pvera": jpeft.PveraConfig, "randlora": jpeft.RandLoraConfig}


@pytest.mark.parametrize("name", PROJECTED)
def test_refused_settings_of_projections(name):
    config = PROJECTED[name]
    for settings, message in (
        ({"r": 0}, "r is 0; expected an integer of at least 1"),
        ({f"{name}_dropout": 1.0}, f"{name}_dropout is 1.0; expected a rate in [0, 1)"),
        ({"bias": "lora_only"}, f"bias is 'lora_only'; expected 'none', 'all' or '{name}_only'"),
        ({"projection_prng_key": 2**64}, "projection_prng_key is 18446744073709551616; expected an integer of 64"),
        ({"projection_prng_key": None}, "projection_prng_key is None; expected an integer of 64 bits"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            config(**settings)


def test_refused_settings_of_vblora():
    for settings, message in (
        ({"r": 0}, "r is 0; expected an integer of at least 1"),
        ({"num_vectors": 2.5}, "num_vectors is 2.5; expected an integer of at least 1"),
        ({"num_vectors": 3, "topk": 4}, "topk is 4; expected at most num_vectors=3"),
        ({"vblora_dropout": -0.1}, "vblora_dropout is -0.1; expected a rate in [0, 1)"),
        ({"bias": "some"}, "bias is 'some'; expected 'none', 'all' or 'vblora_only'"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            jpeft.VBLoRAConfig(**settings)
    with pytest.raises(ValueError, match=r"VB-LoRA at 'q': vector_length is 4; expected a number that divides its 4"):
        jpeft.wrap({"q": {"kernel": jnp.ones((4, 6))}}, jpeft.VBLoRAConfig(vector_length=4, target_modules=["q"]))


def test_bases_of_equal_numbers_are_refused():
    seed = next(seed for seed in range(99) if (abs(Generator(seed).uniform((1,), 0, 1) - 0.5) < 0.3).all())
    config = jpeft.RandLoraConfig(r=1, sparse=True, projection_prng_key=seed, target_modules=["q"])
    with pytest.raises(ValueError, match=rf"all 1 numbers of a random basis are equal, .* projection_prng_key={seed}"):
        jpeft.wrap({"q": {"kernel": jnp.ones((1, 6))}}, config)
