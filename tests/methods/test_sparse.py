"""DeLoRA, SHiRA, Super-Tuning, FourierFT and WaveFT by their formulas, in numpy; what they cost; what they refuse."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft
from jpeft._arrays import with_derivation
from jpeft._paths import leaves_by_path
from jpeft._torch_random import randperm
from jpeft.methods import _wavelets
from jpeft.methods._sparse import product, scattered
from tests.harness import random_like, with_derived

IN, OUT = 9, 12

DELORA, SHIRA, SUPERTUNING, FOURIERFT, WAVEFT = (
    jpeft.DeloraConfig, jpeft.ShiraConfig, jpeft.SupertuningConfig, jpeft.FourierFTConfig, jpeft.WaveFTConfig
)  # fmt: skip

# ---- formulas, of weights (in, out) ---------------------------------------------------------------------------------


def delora(w, p, config):
    for k in range(config.r):
        a, b = p["delora_A"][k], p["delora_B"][:, k]
        strength = p["delora_lambda"] / config.r / (np.linalg.norm(a) * np.linalg.norm(b))
        w = w + strength * np.outer(p["delora_w_norm"] * a, b)
    return w


def shira(w, p, config):
    w, (outputs, inputs) = w.copy(), p["shira_indices"]
    assert len({*zip(outputs, inputs, strict=True)}) == config.r * sum(w.shape)
    w[inputs, outputs] += p["shira_weight"]
    return w


def supertuning(w, p, config):
    changed, sizes = w.copy(), np.abs(w).T.reshape(-1)
    order = np.argsort(-sizes if config.select_top else sizes)[: int(w.size * (1 - config.sparsity))]
    np.testing.assert_array_equal(p["supertuning_indices"], order)
    changed[order % len(w), order // len(w)] += p["supertuning_values"]
    if config.r is None:
        return changed
    return changed + config.lora_alpha / config.r * (p["supertuning_lora_B"] @ p["supertuning_lora_A"]).T


def placed(w, p, name, seed):
    matrix, flat = np.zeros(w.shape), randperm(w.size, seed, p[name].size)
    matrix[flat % len(w), flat // len(w)] = p[name]
    return matrix


def fourierft(w, p, config):
    spectrum = placed(w, p, "fourierft_spectrum", config.random_loc_seed)
    f_in, f_out = (np.exp(2j * np.pi * np.outer(np.arange(n), np.arange(n)) / n) / n for n in w.shape)
    return w + config.scaling * (f_in @ spectrum @ f_out).real


def synthesis_matrix(low, size, count):
    """(size, count): sums of shifted filters, without the ends that not all filters reach."""
    matrix, high = np.zeros((count + len(low), count)), [(-1) ** n * tap for n, tap in enumerate(low[::-1])]
    for k in range(count // 2):
        matrix[2 * k : 2 * k + len(low), k] = low
        matrix[2 * k : 2 * k + len(low), count // 2 + k] = high
    return matrix[len(low) - 2 :][:size]


def waveft(w, p, config):
    own = placed(w, p, "waveft_spectrum", config.random_loc_seed)
    if not config.use_idwt:
        return w + config.scaling * own
    low = _wavelets.scaling_filter(config.wavelet_family)
    counts = [size + len(low) - 2 + (size + len(low)) % 2 for size in w.shape]
    whole = np.pad(
        own, [((n - size) // 2, n - size - (n - size) // 2) for n, size in zip(counts, w.shape, strict=True)]
    )
    (left, right), (up, down) = (np.split(half, 2, axis=1) for half in np.split(whole, 2))
    whole = np.block([[left, up], [right, down]])
    t_in, t_out = (synthesis_matrix(low, size, n) for size, n in zip(w.shape, counts, strict=True))
    return w + config.scaling * t_in @ whole @ t_out.T


FORMULAS = {
    "delora": (delora, DELORA, {"r": 3}),
    "shira": (shira, SHIRA, {"r": 2}),
    "shira, of a seed": (shira, SHIRA, {"r": 1, "random_seed": 5}),
    "supertuning": (supertuning, SUPERTUNING, {"sparsity": 0.6}),
    "supertuning, smallest": (supertuning, SUPERTUNING, {"sparsity": 0.98, "select_top": False}),
    "supertuning, lora": (supertuning, SUPERTUNING, {"sparsity": 0.6, "r": 2, "lora_alpha": 3}),
    "supertuning, found again": (supertuning, SUPERTUNING, {"sparsity": 0.9, "save_precomputed_indices": False}),
    "fourierft": (fourierft, FOURIERFT, {"n_frequency": 2}),
    "fourierft, all": (fourierft, FOURIERFT, {"n_frequency": IN * OUT, "random_loc_seed": 3}),
    "fourierft, a pattern": (fourierft, FOURIERFT, {"n_frequency_pattern": {"dense": 40}}),
    "waveft": (waveft, WAVEFT, {"n_frequency": 2}),
    "waveft, all": (waveft, WAVEFT, {"n_frequency": IN * OUT, "wavelet_family": "db3"}),
    "waveft, coif2": (waveft, WAVEFT, {"n_frequency_pattern": {"dense": 30}, "wavelet_family": "coif2"}),
    "waveft, bare": (waveft, WAVEFT, {"n_frequency": 30, "use_idwt": False, "random_loc_seed": 3}),
    "waveft, in proportion": (waveft, WAVEFT, {"n_frequency": 20, "proportional_parameters": True}),
}


def wrapped_with(config, sizes=(IN, OUT), **settings):
    params = random_like({"dense": {"kernel": sizes, "bias": sizes[1:]}}, 7, 1.0)
    wrapped = jpeft.wrap(params, config(target_modules=["dense"], **settings), dtype=jnp.result_type(float))
    adapter = wrapped.adapters["default"]
    adapter = dataclasses.replace(adapter, weights=random_like(adapter.weights, 100, 1.0))
    return with_derived(dataclasses.replace(wrapped, adapters={"default": adapter}))


def model(params, x):
    return x @ params["dense"]["kernel"] + params["dense"]["bias"]


def arrays_of(wrapped):
    return {name: np.asarray(array) for name, array in wrapped.adapters["default"].weights["dense"].items()}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", FORMULAS)
def test_a_method_is_what_its_paper_says(name):
    formula, config, settings = FORMULAS[name]
    wrapped = wrapped_with(config, **settings)
    w = np.asarray(wrapped.base["dense"]["kernel"])
    changed = formula(w, arrays_of(wrapped), wrapped.adapters["default"].config)
    assert np.abs(changed - w).max() > 1e-2
    np.testing.assert_allclose(jpeft.merge(wrapped)["dense"]["kernel"], changed, rtol=1e-10, atol=1e-10)
    # A row, and more of them than it pays to gather and scatter for.
    for rows in (1, 40):
        x = random_like((rows, IN), 3, 1.0)
        want = x @ changed + np.asarray(wrapped.base["dense"]["bias"])
        np.testing.assert_allclose(jax.jit(jpeft.lift(model))(wrapped, x), want, rtol=1e-10, atol=1e-10)


def test_entries_of_a_rule_of_ones_own():
    params = random_like({"dense": {"kernel": (8, 4)}}, 7)
    columns = lambda w, r: jnp.arange(w.size).reshape(w.shape) % w.shape[1] < r + 1  # noqa: E731
    config = SHIRA(r=2, mask_type="columns", mask_fn=columns, target_modules=["dense"])
    outputs, inputs = jpeft.wrap(params, config).adapters["default"].weights["dense"]["shira_indices"]
    np.testing.assert_array_equal(outputs, np.repeat([0, 1, 2], 8))
    np.testing.assert_array_equal(inputs, np.tile(np.arange(8), 3))


@pytest.mark.parametrize("rows", [1, 2, 30])
def test_both_ways_of_a_sparse_product_are_one(rows):
    x, values = random_like((rows, 3, 8), 1, 1.0), random_like((9,), 2, 1.0)
    inputs, outputs = np.arange(9) % 8, np.array([0, 3, 3, 3, 5, 1, 0, 0, 0])
    dense = x @ scattered(values, inputs, outputs, (8, 6))
    np.testing.assert_allclose(product(x, values, inputs, outputs, 6), dense, rtol=1e-5, atol=1e-6)


def test_norms_of_nothing_have_no_derivative_but_no_nan_either():
    params = random_like({"dense": {"kernel": (IN, OUT), "bias": (OUT,)}}, 7)
    wrapped = jpeft.wrap(params, DELORA(r=2, target_modules=["dense"]))
    loss = lambda params, x: (jpeft.lift(model)(params, x) ** 2).sum()  # noqa: E731
    gradient = jax.jit(jpeft.grad(loss))(wrapped, jnp.ones((2, IN)))
    own = gradient.adapters["default"].weights["dense"]
    assert np.abs(own["delora_B"]).max() > 0 and all(np.isfinite(array).all() for array in jax.tree.leaves(own))


# ---- wavelets -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", _wavelets.FAMILIES)
def test_filters_are_those_of_wavelets(family):
    low = _wavelets.scaling_filter(family)
    number = int(family.lstrip("abcdefghijklmnopqrstuvwxyz"))
    vanishing, size = (2 * number, 6 * number) if family.startswith("coif") else (number, 2 * number)
    assert len(low) == size
    at = np.arange(size)
    np.testing.assert_allclose([low[: size - k] @ low[k:] for k in range(0, size, 2)], np.eye(size // 2)[0], atol=1e-9)
    moments = [(at / size) ** k * (-1.0) ** at @ low for k in range(vanishing)]
    np.testing.assert_allclose(moments, 0, atol=1e-9)
    if family.startswith("coif"):
        around = [((at - 2 * number) / size) ** k @ low for k in range(vanishing)]
        np.testing.assert_allclose(around, np.sqrt(2) * np.eye(vanishing)[0], atol=1e-9)


@pytest.mark.parametrize(("family", "size"), [("db1", 6), ("db2", 7), ("sym5", 8)])
def test_the_analysis_of_a_signal_is_undone_where_all_filters_reach(family, size):
    low = _wavelets.scaling_filter(family)
    values = jnp.zeros(size + 4 * len(low)).at[2 * len(low) : -2 * len(low)].set(random_like((size,), 1, 1.0))
    again = _wavelets.synthesis(family, values.size, _wavelets.analysis(family, values))
    np.testing.assert_allclose(again, values, atol=1e-6)


# ---- noise, beginnings ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("config", "settings", "name"), [
    (DELORA, {"r": 3, "module_dropout": 0.5}, "delora_A"),
    (SUPERTUNING, {"r": 3, "sparsity": 0.9, "lora_dropout": 0.5}, "supertuning_lora_A"),
])  # fmt: skip
def test_dropout_acts_on_the_input_of_the_low_rank_path(config, settings, name):
    wrapped = wrapped_with(config, **settings)
    lifted = jax.jit(jpeft.lift(model))
    x, noisy = jnp.ones((400, IN)), jpeft.with_context(wrapped, rng=jax.random.key(1))
    without = jax.tree_util.tree_map_with_path(lambda path, a: 0 * a if name in str(path) else a, wrapped.adapters)
    rest = lifted(dataclasses.replace(noisy, adapters=without), x)
    quiet, found = lifted(wrapped, x), lifted(noisy, x)
    np.testing.assert_allclose(rest, lifted(dataclasses.replace(wrapped, adapters=without), x), rtol=1e-6)
    assert np.abs(found - quiet).max() > 0.1
    np.testing.assert_allclose((found - rest).mean(0), (quiet - rest)[0], atol=0.25 * np.abs(quiet - rest).max())


@pytest.mark.parametrize(("config", "settings", "name", "deviation"), [
    (DELORA, {"r": 16}, "delora_A", 1 / np.sqrt(3 * 64)),
    (DELORA, {"r": 16, "init_weights": False}, "delora_B", 1 / np.sqrt(3 * 16)),
    (SHIRA, {"r": 4, "init_weights": False}, "shira_weight", 1),
    (SUPERTUNING, {"sparsity": 0.5, "init_weights": False}, "supertuning_values", 1),
    (SUPERTUNING, {"r": 16, "init_weights": False}, "supertuning_lora_B", 1 / np.sqrt(3 * 16)),
    (FOURIERFT, {}, "fourierft_spectrum", 1),
    (WAVEFT, {"init_weights": False}, "waveft_spectrum", 0.01),
])  # fmt: skip
def test_initial_values_are_spread_as_in_peft(config, settings, name, deviation):
    params = random_like({"dense": {"kernel": (64, 96)}}, 7)
    own = jpeft.wrap(params, config(target_modules=["dense"], **settings)).adapters["default"].weights["dense"]
    np.testing.assert_allclose(np.std(own[name]), deviation, rtol=0.15)


def test_strength_and_norms_of_a_new_delora():
    params = random_like({"dense": {"kernel": (5, 6)}}, 7)
    config = DELORA(r=2, lambda_pattern={"dense": 7}, target_modules=["dense"])
    own = jpeft.wrap(params, config).adapters["default"].weights["dense"]
    np.testing.assert_array_equal(own["delora_lambda"], [7])
    np.testing.assert_allclose(own["delora_w_norm"], np.linalg.norm(params["dense"]["kernel"], axis=1), rtol=1e-6)


def test_the_budget_of_wavelets_is_shared_by_size():
    params = random_like({"large": {"kernel": (8, 16)}, "small": {"kernel": (2, 2)}, "stack": {"kernel": (3, 4, 8)}}, 7)
    config = WAVEFT(n_frequency=10, proportional_parameters=True, target_modules=["large", "small", "stack"])
    own = jpeft.wrap(params, config, layouts={"stack.kernel": "bio"}).adapters["default"].weights
    shapes = {path: arrays["waveft_spectrum"].shape for path, arrays in own.items()}
    assert shapes == {"large": (28,), "small": (1,), "stack": (3, 7)}


OWN = {"r": 2, "mask_type": "own"}

# ---- warnings and refusals ------------------------------------------------------------------------------------------


def test_entries_that_are_equally_large_warn():
    params = {"dense": {"kernel": jnp.ones((4, 6))}}
    config = SUPERTUNING(sparsity=0.5, save_precomputed_indices=False, target_modules=["dense"])
    with pytest.warns(UserWarning, match="entries of 'dense' are equally large: PyTorch PEFT may put them in another"):
        wrapped = jpeft.wrap(params, config)
    with pytest.warns(UserWarning, match="entries of 'dense' are equally large"):
        with_derivation(wrapped.adapters["default"], {"dense": leaves_by_path(params)["dense.kernel"]})


@pytest.mark.parametrize(("config", "settings", "message"), [
    (DELORA, {"r": 0}, "r is 0; expected an integer of at least 1"),
    (DELORA, {"rank_pattern": {"q": 0.5}}, "rank_pattern['q'] is 0.5; expected an integer of at least 1"),
    (DELORA, {"module_dropout": 1.0}, "module_dropout is 1.0; expected a rate in [0, 1)"),
    (DELORA, {"bias": "some"}, "bias is 'some'; expected 'none', 'all' or 'delora_only'"),
    (SHIRA, {"r": -1}, "r is -1; expected an integer of at least 1"),
    (SHIRA, {"mask_type": len}, "expected 'random', or a name beside a mask_fn"),
    (SHIRA, {"mask_fn": max}, "and mask_type is 'random'; expected another name for it"),
    (SHIRA, {"random_seed": 0.5}, "random_seed is 0.5; expected an integer of 64 bits, the seed of the places"),
    (SUPERTUNING, {"sparsity": 1.0}, "sparsity is 1.0; expected a share in [0, 1)"),
    (SUPERTUNING, {"r": 0}, "r is 0; expected an integer of at least 1, or None"),
    (SUPERTUNING, {"lora_alpha": 4}, "lora_alpha is 4 and r is None; expected a rank, too"),
    (SUPERTUNING, {"lora_dropout": -0.5}, "lora_dropout is -0.5; expected a rate in [0, 1)"),
    (FOURIERFT, {"n_frequency": 0}, "n_frequency is 0; expected an integer of at least 1"),
    (FOURIERFT, {"n_frequency_pattern": {"q": 0.5}}, "n_frequency_pattern['q'] is 0.5; expected an integer"),
    (FOURIERFT, {"random_loc_seed": None}, "random_loc_seed is None; expected an integer of 64 bits"),
    (FOURIERFT, {"bias": "fourierft_only"}, "bias is 'fourierft_only'; expected 'none', 'all' or 'fourier_only'"),
    (WAVEFT, {"wavelet_family": "coif4"}, "wavelet_family is 'coif4'; expected one of db1, db2,"),
    (WAVEFT, {"wavelet_family": "db11"}, "PEFT has no filter of the others that it names"),
])  # fmt: skip
def test_settings_out_of_range_are_refused(config, settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        config(**settings)


@pytest.mark.parametrize(("config", "settings", "message"), [
    (SHIRA, {"r": 6}, "r (in + out) of r=6 at 'dense' is 126; expected at most 108, the entries of a weight"),
    (SHIRA, OWN, "mask_type is 'own' at 'dense' without a mask_fn; expected mask_fn"),
    (SHIRA, {**OWN, "mask_fn": lambda w, r: w > 9}, "gives 0 entries at 'dense'; expected a mask of shape (9, 12)"),
    (SHIRA, {**OWN, "mask_fn": lambda w, r: w[0]}, "mask_fn gives (12,) at 'dense'; expected a mask of shape (9, 12)"),
    (SUPERTUNING, {"sparsity": 0.999}, "sparsity is 0.999 at 'dense', a weight of 108 entries, and leaves 0; expected"),
    (FOURIERFT, {"n_frequency": 109}, "n_frequency at 'dense' is 109; expected at most 108, the entries of a weight"),
    (WAVEFT, {"n_frequency_pattern": {"dense": 200}}, "n_frequency at 'dense' is 200; expected at most 108"),
])  # fmt: skip
def test_layers_that_do_not_fit_are_refused(config, settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        jpeft.wrap(random_like({"dense": {"kernel": (IN, OUT)}}, 7), config(target_modules=["dense"], **settings))


def test_places_that_32_bits_do_not_hold_are_refused():
    params = {"dense": {"kernel": jax.ShapeDtypeStruct((2**16, 2**16), jnp.float32)}}
    with pytest.raises(
        ValueError, match=r"of 4294967296 entries, and leaves \d+; expected one entry at least, of a we"
    ):
        jpeft.wrap(params, SUPERTUNING(target_modules=["dense"]))


# ---- cost -----------------------------------------------------------------------------------------------------------

WIDE = 64


def flops(function, *args):
    return jax.jit(function).lower(*args).compile().cost_analysis()["flops"]


@pytest.mark.parametrize(("config", "settings", "parameters", "rows", "each"), [
    (DELORA, {"r": 8}, 8 * 128 + 1, (64, 128), 2 * 8 * 128),
    (SHIRA, {"r": 1}, 128, (4, 12), 2 * 128),
    (SHIRA, {"r": 4}, 4 * 128, (64, 128), 0),
    (SUPERTUNING, {}, 40, (8, 40), 2 * 40),
    (SUPERTUNING, {"sparsity": 0.9, "r": 4}, 409 + 4 * 128, (64, 128), 2 * 4 * 128),
    (WAVEFT, {"n_frequency": 500, "use_idwt": False}, 500, (64, 128), 0),
    (WAVEFT, {"n_frequency": 500, "wavelet_family": "db4"}, 500, (64, 128), 0),
    (FOURIERFT, {"n_frequency": 500}, 500, (64, 128), 64 * 64 + 2 * 5 * 64 * 6),
])  # fmt: skip
def test_costs_are_as_said(config, settings, parameters, rows, each):
    params = {"dense": {"kernel": random_like((WIDE, WIDE), 7)}}
    wrapped = jpeft.wrap(params, config(target_modules=["dense"], **settings))
    apply = lambda params, x: x @ params["dense"]["kernel"]  # noqa: E731
    assert jpeft.count_parameters(wrapped)[0] == parameters
    few, many = (
        flops(jpeft.lift(apply), wrapped, jnp.ones((n, WIDE))) - flops(apply, params, jnp.ones((n, WIDE))) for n in rows
    )
    np.testing.assert_allclose((many - few) / (rows[1] - rows[0]), each, rtol=0.2, atol=130)
