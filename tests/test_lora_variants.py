"""LoRA's variants: what the laws of tests/test_laws.py do not say, against numpy in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft
from jpeft import LoraConfig
from jpeft._contract import project
from jpeft.methods import dora, monteclora, velora
from tests.harness import random_like, with_derived

PARAMS = {"query": {"kernel": (12, 6), "bias": (6,)}, "value": {"kernel": (12, 6)}}
X = random_like((4, 5, 12), 50, 1.0)


def product(params, x):
    return x @ params["value"]["kernel"]


def wrapped_with(params=None, adapter=None, layouts=None, **options):
    """Random parameters, all modules or those of target_modules adapted, with random arrays or some of one's own."""
    params = random_like(PARAMS, 7) if params is None else params
    config = LoraConfig(**{"r": 3, "target_modules": ["value"], **options})
    wrapped = jpeft.wrap(params, config, rng=jax.random.key(1), layouts=layouts)
    default = wrapped.adapters["default"]
    weights = random_like(default.weights, 100)
    for path, arrays in weights.items():
        weights[path] = {**arrays, **(adapter or {})}
    default = dataclasses.replace(default, weights=weights)
    return with_derived(dataclasses.replace(wrapped, adapters={"default": default}))


def arrays_of(wrapped, path="value"):
    return {k: np.asarray(v, np.float64) for k, v in wrapped.adapters["default"].weights[path].items()}


# ---- DoRA -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", (jnp.float32, jnp.bfloat16))
@pytest.mark.parametrize("change", (0.0, 1e-3, 1.0, 100.0))
def test_the_norm_is_accurate(dtype, change):
    params = {"value": {"kernel": (random_like((200, 40), 3)).astype(dtype)}}
    wrapped = wrapped_with(params, use_dora=True, r=4)
    p = {**wrapped.adapters["default"].weights["value"], "scaling": jnp.float32(change)}
    site = wrapped.adapters["default"].sites["value"]
    kernel = params["value"]["kernel"]
    found = jax.jit(lambda p, w: dora.norm(p, site, lambda a: project(a, w)))(p, kernel)
    own = {name: np.asarray(array, np.float64) for name, array in p.items()}
    whole = np.asarray(kernel, np.float64) + change * (own["lora_B"] @ own["lora_A"]).T
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, np.linalg.norm(whole, axis=0), rtol=2e-6 if dtype == jnp.float32 else 2e-4)


def test_the_sum_of_weight_and_change_is_not_built():
    wrapped = wrapped_with(use_dora=True)
    shapes = [
        variable.aval.shape
        for equation in jax.make_jaxpr(jpeft.lift(product))(wrapped, X).jaxpr.eqns
        for variable in equation.outvars
    ]
    assert (4, 5, 6) in shapes and (12, 6) not in shapes and (6, 12) not in shapes


def test_outputs_of_no_weight_are_finite():
    kernel = random_like((12, 6), 3).at[:, 2].set(0)
    fresh = jpeft.wrap({"value": {"kernel": kernel}}, LoraConfig(use_dora=True, target_modules=["value"]))
    loss = lambda w: jpeft.lift(product)(w, X).sum()  # noqa: E731
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((loss(fresh), jpeft.grad(loss)(fresh))))
    np.testing.assert_array_equal(jpeft.merge(fresh)["value"]["kernel"], kernel)


def test_dropout_is_on_the_input_of_the_change_and_of_the_base_within_it():
    rate = 0.25
    params = {"value": {"kernel": jnp.eye(12)}}
    options = {"use_dora": True, "lora_dropout": rate}
    wrapped = wrapped_with(
        params, {"lora_B": jnp.zeros((12, 3)), "lora_magnitude_vector": jnp.full(12, 3.0)}, **options
    )
    x = jnp.ones((1000, 12))
    y = jpeft.lift(product)(jpeft.with_context(wrapped, rng=jax.random.key(0)), x)
    np.testing.assert_allclose(np.unique(y), [1, 1 + 2 / (1 - rate)], rtol=1e-6)
    np.testing.assert_array_equal(jpeft.lift(product)(wrapped, x), 3 * x)


def convolved(params, x):
    return jax.lax.conv_general_dilated(
        x, params["conv"]["kernel"], (1,), "SAME", dimension_numbers=("NHC", "HIO", "NHC")
    )


def test_dropout_in_convolutions_and_none_in_lookups():
    params = random_like({"conv": {"kernel": (3, 12, 6)}, "embed": {"embedding": (7, 4)}}, 3)
    options = {"use_dora": True, "lora_dropout": 0.5, "target_modules": ["conv", "embed"]}
    wrapped = wrapped_with(params, layouts={"conv.kernel": ".io"}, **options)
    seeded = jpeft.with_context(wrapped, rng=jax.random.key(0))
    both = lambda p, x: (convolved(p, x), p["embed"]["embedding"][np.arange(7)])  # noqa: E731
    (seen, rows), (seen_whole, rows_whole) = (jpeft.lift(both)(given, X) for given in (seeded, wrapped))
    assert (seen != seen_whole).any()
    np.testing.assert_array_equal(rows, rows_whole)
    assert [use.how for use in jpeft.explain(both, wrapped, X).uses] == ["transformed", "transformed"]


def test_a_stack_of_layers_is_its_layers_one_by_one():
    stack = random_like((3, 6, 6), 5)
    options = {"use_dora": True, "r": 2, "target_modules": ["value"]}
    whole = jpeft.wrap({"layers": {"0:3": {"value": {"kernel": stack}}}}, LoraConfig(**options))
    single = jpeft.wrap({"layers": {str(i): {"value": {"kernel": stack[i]}} for i in range(3)}}, LoraConfig(**options))
    arrays = whole.adapters["default"].weights["layers.0:3.value"]
    for index in range(3):
        for name, array in single.adapters["default"].weights[f"layers.{index}.value"].items():
            np.testing.assert_allclose(arrays[name][index], array, rtol=1e-6)


def test_a_bfloat16_adapter_of_a_bfloat16_base_is_neutral_at_first():
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), random_like(PARAMS, 7))
    fresh = jpeft.wrap(params, LoraConfig(use_dora=True, target_modules=["value"]), dtype=jnp.bfloat16)
    x = X.astype(jnp.bfloat16)
    np.testing.assert_array_equal(jpeft.lift(product)(fresh, x), product(params, x))


# ---- the others -----------------------------------------------------------------------------------------------------


def test_a_bias_is_added_where_there_is_none_but_not_merged():
    wrapped = wrapped_with(lora_bias=True, lora_alpha=6)
    own = arrays_of(wrapped)
    kernel = np.asarray(wrapped.base["value"]["kernel"], np.float64) + 2 * (own["lora_B"] @ own["lora_A"]).T
    expected = np.asarray(X, np.float64) @ kernel + 2 * own["lora_B.bias"]
    np.testing.assert_allclose(jpeft.lift(product)(wrapped, X), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="lora_bias=True at 'value': the layer has no bias to merge into"):
        jpeft.merge(wrapped)


def test_micas_second_factor_is_the_minor_part_of_the_weight():
    params = random_like(PARAMS, 7)
    wrapped = jpeft.wrap(params, LoraConfig(r=2, init_lora_weights="mica", target_modules=["value"]))
    b = arrays_of(wrapped)["lora_B"]
    np.testing.assert_allclose(b.T @ b, np.eye(2), atol=1e-6)
    kernel = np.asarray(params["value"]["kernel"], np.float64)
    smallest = np.linalg.svd(kernel, compute_uv=False)[-2:]
    np.testing.assert_allclose(np.linalg.norm(kernel @ b, axis=0), smallest, rtol=1e-5)
    assert jpeft.trainable_mask(wrapped).adapters["default"].weights == {"value": {"lora_A": True, "lora_B": False}}


@pytest.mark.parametrize("side", ("a", "b"))
def test_the_blocks_are_on_the_diagonal(side):
    settings = {f"target_modules_bd_{side}": ["value"], "nblocks": 3}
    wrapped = wrapped_with(use_bdlora=settings)
    own = arrays_of(wrapped)
    name = f"lora_{side.upper()}"
    assert own[name].shape == ((3, 4) if side == "a" else (6, 1))
    blocks = np.split(own[name], 3)
    whole = np.zeros((3, 12) if side == "a" else (6, 3))
    for index, block in enumerate(blocks):
        rows, columns = block.shape
        whole[index * rows : (index + 1) * rows, index * columns : (index + 1) * columns] = block
    own[name] = whole
    expected = np.asarray(wrapped.base["value"]["kernel"]) + 8 / 3 * (own["lora_B"] @ own["lora_A"]).T
    np.testing.assert_allclose(jpeft.merge(wrapped)["value"]["kernel"], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rate", (0.0, 0.5))
def test_kasa_takes_the_minor_part_out_of_the_weight(rate):
    params = random_like(PARAMS, 7)
    wrapped = jpeft.wrap(params, LoraConfig(r=2, kasa_config={}, lora_dropout=rate, target_modules=["value"]))
    u, s, vh = np.linalg.svd(np.asarray(params["value"]["kernel"], np.float64), full_matrices=False)
    expected = (u[:, :-2] * s[:-2]) @ vh[:-2]
    np.testing.assert_allclose(jpeft.merge(wrapped)["value"]["kernel"], expected, atol=1e-5)
    # Dropout leaves it alone.
    seeded = jpeft.with_context(wrapped, rng=jax.random.key(0))
    np.testing.assert_allclose(jpeft.lift(product)(seeded, X), np.asarray(X) @ expected, atol=1e-4)


def test_kasa_loss_has_a_gradient_where_the_factors_are_orthogonal():
    adapter = {"lora_A": jnp.eye(3, 12), "lora_B": jnp.eye(6, 3), "lora_diag": jnp.ones(3)}
    wrapped = wrapped_with(adapter=adapter, kasa_config={"beta": 0.5})
    assert float(jpeft.kasa_loss(wrapped)) == 1.5
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jpeft.grad(jpeft.kasa_loss)(wrapped)))
    assert float(jpeft.kasa_loss(wrapped_with())) == 0


def test_velora_keeps_the_projections_alone():
    x, a, direction = random_like(((7, 10), (3, 10), (4,)), 5)
    settings = jpeft.VeloraConfig(scale=0.5, init_type="random")
    _, pull = jax.vjp(lambda x, a: velora.compressed_product(settings, x, a, direction), x, a)
    kept = [leaf.shape for leaf in jax.tree.leaves(pull)]
    assert (7, 3) in kept and not {(7, 10), (70,), (7, 3, 4), (7, 12)} & set(kept)
    g = random_like((7, 3), 8)
    by_x, by_a = pull(g)
    groups = np.pad(np.asarray(x), ((0, 0), (0, 2))).reshape(7, 3, 4)
    made = ((groups @ direction)[:, :, None] * np.asarray(direction)).reshape(7, 12)[:, :10]
    np.testing.assert_allclose(by_x, g @ a, rtol=1e-5)
    np.testing.assert_allclose(by_a, 0.5 * g.T @ made, rtol=1e-4, atol=1e-5)


def test_a_direction_of_zeros_is_made_of_equal_entries():
    np.testing.assert_allclose(velora.unit(jnp.zeros(4)), np.full(4, 0.5))


def test_monteclora_is_noisy_in_training_alone():
    settings = {"num_samples": 4, "sample_scaler": 0.1}
    wrapped = wrapped_with(monteclora_config=settings)
    y, lifted = product(jpeft.merge(wrapped), X), jpeft.lift(product)
    np.testing.assert_allclose(lifted(wrapped, X), y, rtol=1e-5, atol=1e-5)
    noisy = jax.jit(jax.vmap(lambda key: lifted(jpeft.with_context(wrapped, rng=key), X)))(
        jax.random.split(jax.random.key(0), 500)
    )
    spread = noisy.std(0)
    assert spread.min() > 0 and np.abs((noisy.mean(0) - y) / spread).max() < 6 / np.sqrt(500)
    loss = lambda w, rng: jpeft.monteclora_loss(w, rng=rng)  # noqa: E731
    assert float(loss(wrapped, jax.random.key(1))) != float(loss(wrapped, jax.random.key(2)))


def test_the_divergences_are_zero_at_the_priors_and_positive_elsewhere():
    zeros, alpha = jnp.zeros(3), jnp.log(jnp.full(4, 0.3))
    np.testing.assert_allclose(monteclora.divergences(zeros, alpha, jnp.ones(3), 0.3), 0, atol=1e-5)
    std, prior, variances = random_like(((3,), (4,), (3,)), 9)
    assert min(map(float, monteclora.divergences(std, prior, jnp.exp(variances), 0.3))) > 0


# ---- what is refused ------------------------------------------------------------------------------------------------

REFUSED = {
    r"variants of LoRA exclude each other, but there are use_dora=True, lora_bias=True;": {
        "use_dora": True,
        "lora_bias": True,
    },
    "use_dora=True, init_lora_weights='mica'; expected one": {"use_dora": True, "init_lora_weights": "mica"},
    "init_lora_weights='pissa' with use_dora=True is not implemented": {"use_dora": True, "init_lora_weights": "pissa"},
    "lora_bias=True with init_lora_weights='gaussian'": {"lora_bias": True, "init_lora_weights": "gaussian"},
    "target_parameters is .* with use_dora=True": {"use_dora": True, "target_parameters": ["w"]},
    "qalora_group_size is 0; expected": {"qalora_group_size": 0},
    r"kasa_config has the fields \['alpha'\]": {"kasa_config": {"alpha": 1}},
    "kasa_config is 3; expected a jpeft.KasaConfig": {"kasa_config": 3},
    "beta of KasaConfig is -1; expected at least 0": {"kasa_config": {"beta": -1}},
    "gamma of KasaConfig is -1; expected at least 0": {"kasa_config": {"gamma": -1}},
    "nblocks of BdLoraConfig is 0": {"use_bdlora": {"nblocks": 0}},
    "target_modules_bd_a is 'q'; expected a list": {"use_bdlora": {"target_modules_bd_a": "q"}},
    r"both have \['q'\]": {"use_bdlora": {"target_modules_bd_a": ["q"], "target_modules_bd_b": ["q"]}},
    "num_groups of VeloraConfig is 0": {"velora_config": {"num_groups": 0}},
    "scale of VeloraConfig is 0": {"velora_config": {"scale": 0}},
    "init_type of VeloraConfig is 'mean'; expected one of 'batch_average'": {"velora_config": {"init_type": "mean"}},
    "num_samples of MontecloraConfig is 0": {"monteclora_config": {"num_samples": 0}},
    "dirichlet_prior of MontecloraConfig is 0": {"monteclora_config": {"dirichlet_prior": 0}},
    "buffer_size of MontecloraConfig is 0": {"monteclora_config": {"buffer_size": 0}},
}


@pytest.mark.parametrize("text", REFUSED)
def test_settings_that_are_refused(text):
    with pytest.raises((ValueError, TypeError), match=text):
        LoraConfig(**REFUSED[text])


UNFIT = {
    "use_qalora at 'value': in_features is 12; expected a multiple of qalora_group_size=5": {
        "use_qalora": True,
        "qalora_group_size": 5,
    },
    "mica' at 'value': r is 7; expected at most 6": {"r": 7, "init_lora_weights": "mica"},
    "kasa_config at 'value': r is 6; expected at most 5": {"r": 6, "kasa_config": {}},
    "use_bdlora at 'value': .* cannot be cut into nblocks=5": {
        "use_bdlora": {"target_modules_bd_a": ["val"], "nblocks": 5}
    },
    "'value' is meant by neither": {"use_bdlora": {}},
    "'value' is meant by both": {"use_bdlora": {"target_modules_bd_a": ["val"], "target_modules_bd_b": ["lue"]}},
}


@pytest.mark.parametrize("text", UNFIT)
def test_modules_that_do_not_fit(text):
    with pytest.raises(ValueError, match=text):
        wrapped_with(**UNFIT[text])


def test_a_name_for_both_factors_of_blocks():
    with pytest.raises(ValueError, match=r"target_modules_bd_a and target_modules_bd_b both have \[.q.\]; expected"):
        jpeft.BdLoraConfig(target_modules_bd_a=["q"], target_modules_bd_b=["q", "k"])
