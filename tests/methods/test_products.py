"""IA3, RoAd, LoHa, LoKr, HiRA, GLoRA and AdaLoRA: the papers' formulas in numpy float64, costs and refusals."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft
from jpeft._patterns import same_for_layers
from tests.harness import random_like

IN, OUT, ROWS = 6, 8, 5
LAYER = {"w": {"kernel": (IN, OUT), "bias": (OUT,)}}
IMAGE = {"w": {"kernel": (3, 2, 4, 6), "bias": (6,)}}


def dense(params, x):
    return x @ params["w"]["kernel"] + params["w"]["bias"]


def convolution(params, x):
    numbers = ("NHWC", "HWIO", "NHWC")
    y = jax.lax.conv_general_dilated(x, params["w"]["kernel"], (1, 1), "VALID", dimension_numbers=numbers)
    return y + params["w"]["bias"]


def adapted(config, shapes=LAYER):
    """Random parameters with an adapter of random values, and its arrays."""
    wrapped = jpeft.wrap(random_like(shapes, 1, 1.0), config, dtype=jnp.result_type(float))
    adapter = wrapped.adapters["default"]
    adapter = dataclasses.replace(adapter, weights=random_like(adapter.weights, 2, 0.5))
    return dataclasses.replace(wrapped, adapters={"default": adapter})


def check(wrapped, function, x, weight, bias):
    """The lifted and the merged function against the same function of a weight and a bias from numpy."""
    expected = np.asarray(function({"w": {"kernel": jnp.asarray(weight), "bias": jnp.asarray(bias)}}, x))
    merged = function(jpeft.merge(wrapped), x)
    for found in (jax.jit(jpeft.lift(function))(wrapped, x), merged):
        np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-10)


def numbers(wrapped):
    own = {name: np.asarray(array) for name, array in wrapped.adapters["default"].weights["w"].items()}
    return np.asarray(wrapped.base["w"]["kernel"]), np.asarray(wrapped.base["w"]["bias"]), own


def flops(function, *args):
    analysis = jax.jit(function).lower(*args).compile().cost_analysis()
    return analysis["flops"]


def cost(config, inputs, outputs, rows):
    """(trainable parameters, FLOPs that the adapter adds to a forward pass)."""
    shapes = {"w": {"kernel": (inputs, outputs), "bias": (outputs,)}}
    wrapped, x = adapted(config, shapes), jnp.ones((rows, inputs))
    added = flops(jpeft.lift(dense), wrapped, x) - flops(dense, wrapped.base, x)
    return jpeft.count_parameters(wrapped)[0], added


X = np.random.default_rng(5).normal(size=(ROWS, IN))
PIXELS = np.random.default_rng(6).normal(size=(2, 5, 4, 4))

# ---- IA3 ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("before", [False, True], ids=["output", "input"])
def test_ia3_is_its_formula(x64, before):
    names = ["w"] if before else []
    wrapped = adapted(jpeft.IA3Config(target_modules=["w"], feedforward_modules=names))
    w, b, own = numbers(wrapped)
    gain = own["ia3_l"].reshape(-1)
    weight = gain[:, None] * w if before else w * gain
    check(wrapped, dense, X, weight, b if before else gain * b)


def test_ia3_of_a_convolution_with_as_many_inputs_as_outputs(x64):
    shapes = {"w": {"kernel": (3, 2, 4, 4), "bias": (4,)}}
    for names, axes in ((["w"], (-1, 1)), ([], (-1,))):
        wrapped = adapted(jpeft.IA3Config(target_modules=["w"], feedforward_modules=names), shapes)
        w, b, own = numbers(wrapped)
        gain = own["ia3_l"].reshape(-1)
        check(wrapped, convolution, PIXELS, w * gain.reshape(axes), b if names else gain * b)


def test_ia3_costs_a_multiplication_for_each_output():
    config = jpeft.IA3Config(target_modules=["w"], feedforward_modules=[])
    assert cost(config, 16, 32, 64) == (32, pytest.approx(64 * 32, rel=0.05))


def test_ia3_refuses():
    with pytest.raises(ValueError, match=r"feedforward_modules is \('b',\); expected names of target_modules: \('w',"):
        jpeft.IA3Config(target_modules=["w"], feedforward_modules=["b"])
    params = random_like(LAYER, 1)
    with pytest.raises(ValueError, match="feedforward_modules is None at 'w'; expected the targets"):
        jpeft.wrap(params, jpeft.IA3Config(target_modules=["w"]))
    line = {"w": {"kernel": jnp.ones((3, 4, 6))}}
    with pytest.raises(ValueError, match=r"IA3 at 'w': the window is \(3,\); expected one of two or three axes"):
        config = jpeft.IA3Config(target_modules=["w"], feedforward_modules=[])
        jpeft.wrap(line, config, layouts={"w.kernel": ".io"})
    stack = {"layers": {"0:2": {"up": {"kernel": jnp.ones((2, 4, 4))}}}}
    with pytest.raises(ValueError, match=r"the layers of the stack 'layers.0:2.up' get different arrays: .*\(1, 4\)"):
        jpeft.wrap(stack, jpeft.IA3Config(target_modules=["up"], feedforward_modules=r"layers\.0\.up"))
    with pytest.raises(ValueError, match="feedforward_modules=.* gives different values to the layers of the stack"):
        same_for_layers("layers.0:2.up", lambda path: "0" in path, "feedforward_modules='a'")


# ---- RoAd -----------------------------------------------------------------------------------------------------------


def rotation(own, variant, size, outputs):
    """R, entry by entry."""
    theta, alpha, matrix = own["road_theta"], own["road_alpha"], np.zeros((outputs, outputs))
    for output in range(outputs):
        group, place = divmod(output, size)
        half, pair = divmod(place, size // 2)
        partner = group * size + (1 - half) * (size // 2) + pair
        of_c = {"road_1": group * (size // 2) + pair, "road_2": output, "road_4": group * 2 * size + place}[variant]
        of_s = of_c + size if variant == "road_4" else of_c
        matrix[output, output] = alpha[of_c] * np.cos(theta[of_c])
        matrix[output, partner] = (1 if half else -1) * alpha[of_s] * np.sin(theta[of_s])
    return matrix


@pytest.mark.parametrize("variant", ["road_1", "road_2", "road_4"])
def test_road_is_its_formula(x64, variant):
    wrapped = adapted(jpeft.RoadConfig(target_modules=["w"], variant=variant, group_size=4))
    w, b, own = numbers(wrapped)
    matrix = rotation(own, variant, 4, OUT)
    check(wrapped, dense, X, w @ matrix.T, matrix @ b)


def test_road_begins_at_random_on_request():
    config = jpeft.RoadConfig(target_modules=["w"], variant="road_4", group_size=64, init_weights=False)
    wrapped = jpeft.wrap({"w": {"kernel": jnp.ones((4, 1024))}}, config)
    own = wrapped.adapters["default"].weights["w"]
    for name, mean in (("road_theta", 0), ("road_alpha", 1)):
        assert abs(own[name].mean() - mean) < 0.05 and abs(own[name].std() - 0.5) < 0.03


def test_road_costs_three_multiplications_and_additions_for_each_output():
    for variant, parameters in (("road_1", 32), ("road_4", 128)):
        config = jpeft.RoadConfig(target_modules=["w"], variant=variant, group_size=8)
        found, added = cost(config, 16, 32, 256)
        assert found == parameters
        # Negating half of the outputs counts, too, unless the compiler subtracts.
        assert 3 * 256 * 32 * 0.95 <= added <= 3.6 * 256 * 32 + 1000


def test_road_refuses():
    with pytest.raises(ValueError, match="variant is 'road_3'; expected one of 'road_1', 'road_2', 'road_4'"):
        jpeft.RoadConfig(variant="road_3")
    with pytest.raises(ValueError, match="group_size is 3; expected an even integer of at least 2"):
        jpeft.RoadConfig(group_size=3)
    with pytest.raises(ValueError, match="group_size is 6 at 'w'; expected a divisor of its 8 outputs"):
        jpeft.wrap(random_like(LAYER, 1), jpeft.RoadConfig(target_modules=["w"], group_size=6))


# ---- LoHa and LoKr --------------------------------------------------------------------------------------------------


def hadamard(own, scale, window=()):
    """LoHa's change in PyTorch's orientation, (out, in, *window)."""
    halves = []
    for number in "12":
        a, b = own[f"hada_w{number}_a"], own[f"hada_w{number}_b"]
        middle = own.get(f"hada_t{number}")
        halves.append(a @ b if middle is None else np.einsum("ijkl,ip,jr->prkl", middle, a, b))
    product = scale * halves[0] * halves[1]
    return product.reshape(product.shape[0], -1, *window)


@pytest.mark.parametrize("r", [1, 3], ids=["factors", "matrix"])
def test_loha_is_its_formula(x64, r):
    wrapped = adapted(jpeft.LoHaConfig(target_modules=["w"], r=r, alpha=6))
    w, b, own = numbers(wrapped)
    check(wrapped, dense, X, w + hadamard(own, 6 / r).T, b)


@pytest.mark.parametrize("effective", [False, True], ids=["flat", "effective"])
@pytest.mark.parametrize("r", [1, 3], ids=["factors", "matrix"])
def test_loha_of_a_convolution_is_its_formula(x64, r, effective):
    wrapped = adapted(jpeft.LoHaConfig(target_modules=["w"], r=r, alpha=6, use_effective_conv2d=effective), IMAGE)
    w, b, own = numbers(wrapped)
    assert ("hada_t1" in own) == effective
    check(wrapped, convolution, PIXELS, w + hadamard(own, 6 / r, (3, 2)).transpose(2, 3, 1, 0), b)


def test_loha_multiplies_with_factors_where_that_is_cheaper():
    rows, inputs, outputs = 128, 64, 96
    found, added = cost(jpeft.LoHaConfig(target_modules=["w"], r=3), inputs, outputs, rows)
    assert found == 2 * 3 * (inputs + outputs)
    assert added == pytest.approx(2 * rows * 9 * (inputs + outputs), rel=0.1)
    found, added = cost(jpeft.LoHaConfig(target_modules=["w"], r=8), inputs, outputs, rows)
    assert added == pytest.approx((2 * rows + 4 * 8) * inputs * outputs, rel=0.1)


def kronecker(own, scale, window):
    """LoKr's change in PyTorch's orientation: each entry of D in each block, entry by entry."""
    c = own["lokr_w1"] if "lokr_w1" in own else own["lokr_w1_a"] @ own["lokr_w1_b"]
    if "lokr_w2" in own:
        d = own["lokr_w2"]
    elif "lokr_t2" in own:
        d = np.einsum("ijkl,ip,jr->prkl", own["lokr_t2"], own["lokr_w2_a"], own["lokr_w2_b"])
    else:
        d = own["lokr_w2_a"] @ own["lokr_w2_b"]
    d = d.reshape(d.shape[0], -1, *window)
    (g, m), (k, n) = c.shape, d.shape[:2]
    change = np.zeros((g * k, m * n, *window))
    for row, column in np.ndindex(g, m):
        change[row * k : (row + 1) * k, column * n : (column + 1) * n] = scale * c[row, column] * d
    return change


FORMS = {
    "whole": {"r": 4},
    "factors": {"r": 1, "decompose_both": True},
    "right first": {"r": 4, "decompose_factor": 2},
}


@pytest.mark.parametrize("options", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("sizes", [(6, 8), (12, 5), (5, 12)], ids=str)
def test_lokr_is_its_formula(x64, options, sizes):
    shapes = {"w": {"kernel": sizes, "bias": (sizes[1],)}}
    wrapped = adapted(jpeft.LoKrConfig(target_modules=["w"], **options), shapes)
    w, b, own = numbers(wrapped)
    x = np.random.default_rng(5).normal(size=(3, 2, sizes[0]))
    check(wrapped, dense, x, w + kronecker(own, 8 / options["r"], ()).T, b)


@pytest.mark.parametrize("options", [{"r": 4}, {"r": 1}, {"r": 1, "use_effective_conv2d": True}], ids=str)
def test_lokr_of_a_convolution_is_its_formula(x64, options):
    wrapped = adapted(jpeft.LoKrConfig(target_modules=["w"], **options), IMAGE)
    w, b, own = numbers(wrapped)
    assert [name for name in ("lokr_w2", "lokr_t2", "lokr_w2_a") if name in own][0] == (
        "lokr_w2" if options["r"] == 4 else "lokr_t2" if "use_effective_conv2d" in options else "lokr_w2_a"
    )
    check(wrapped, convolution, PIXELS, w + kronecker(own, 8 / options["r"], (3, 2)).transpose(2, 3, 1, 0), b)


def test_lokr_costs_two_products_of_parts():
    rows, config = 64, jpeft.LoKrConfig(target_modules=["w"], r=99)
    found, added = cost(config, 64, 96, rows)
    g, k, m, n = 8, 12, 8, 8
    assert found == g * m + k * n
    assert added == pytest.approx(2 * rows * min(m * k * (n + g), n * g * (m + k)), rel=0.1)


def test_lokr_begins_at_zero_on_either_side():
    for how, name in ((True, "lokr_w1"), ("lycoris", "lokr_w2"), (False, None)):
        wrapped = jpeft.wrap(random_like(LAYER, 1), jpeft.LoKrConfig(target_modules=["w"], r=4, init_weights=how))
        own = wrapped.adapters["default"].weights["w"]
        assert [key for key, array in own.items() if not np.any(array)] == ([name] if name else [])


NOISY = {"loha": jpeft.LoHaConfig, "lokr": jpeft.LoKrConfig}


@pytest.mark.parametrize("kind", NOISY)
def test_rank_dropout_drops_outputs_and_module_dropout_all_of_them(kind):
    def change(key, **rates):
        wrapped = adapted(NOISY[kind](target_modules=["w"], r=2, **rates), {"w": {"kernel": (IN, 64), "bias": (64,)}})
        x = jnp.asarray(X, jnp.float32)
        base = dense(wrapped.base, x)
        found = jpeft.lift(dense)(jpeft.with_context(wrapped, rng=jax.random.key(key)), x) - base
        return np.asarray(found), np.asarray(jpeft.lift(dense)(wrapped, x) - base)

    scaled = {"rank_dropout_scale": True} if kind == "lokr" else {}
    found, whole = change(0, rank_dropout=0.5, **scaled)
    left = np.any(found != 0, axis=0)
    assert 16 < left.sum() < 48
    np.testing.assert_allclose(found[:, left], whole[:, left] / left.mean(), rtol=1e-4, atol=1e-5)
    seen = [bool(np.any(change(key, module_dropout=0.5)[0])) for key in range(12)]
    assert 2 <= sum(seen) <= 10
    if kind == "lokr":
        found, whole = change(0, rank_dropout=0.5)
        np.testing.assert_allclose(found[:, left], whole[:, left], rtol=1e-4, atol=1e-5)


def test_rank_dropout_of_all_outputs_gives_zero():
    config = jpeft.LoHaConfig(target_modules=["w"], r=1, rank_dropout=0.999)
    wrapped = jpeft.with_context(adapted(config), rng=jax.random.key(0))
    x = jnp.asarray(X, jnp.float32)
    np.testing.assert_array_equal(jpeft.lift(dense)(wrapped, x), dense(wrapped.base, x))


@pytest.mark.parametrize("kind", NOISY)
def test_loha_and_lokr_refuse(kind):
    config = NOISY[kind]
    with pytest.raises(ValueError, match="r is 0; expected an integer of at least 1"):
        config(r=0)
    with pytest.raises(ValueError, match=r"rank_pattern\['w'\] is 0; expected an integer of at least 1"):
        config(rank_pattern={"w": 0})
    for name in ("rank_dropout", "module_dropout"):
        with pytest.raises(ValueError, match=f"{name} is 1.0; expected a rate in"):
            config(**{name: 1.0})


def test_lokr_refuses():
    with pytest.raises(ValueError, match="decompose_factor is 0; expected -1 or an integer of at least 1"):
        jpeft.LoKrConfig(decompose_factor=0)
    with pytest.raises(ValueError, match="init_weights is 'x'; expected True, False or 'lycoris'"):
        jpeft.LoKrConfig(init_weights="x")


# ---- HiRA -----------------------------------------------------------------------------------------------------------


def test_hira_is_its_formula(x64):
    wrapped = adapted(jpeft.HiraConfig(target_modules=["w"], r=3))
    w, b, own = numbers(wrapped)
    check(wrapped, dense, X, w * (1 + (own["hira_B"] @ own["hira_A"]).T), b)
    wrapped = adapted(jpeft.HiraConfig(target_modules=["w"], rank_pattern={"w": 2}), IMAGE)
    w, b, own = numbers(wrapped)
    assert own["hira_A"].shape == (2, 4, 3, 2)
    product = np.einsum("or,rikl->klio", own["hira_B"][:, :, 0, 0], own["hira_A"])
    check(wrapped, convolution, PIXELS, w * (1 + product), b)


def test_hira_of_a_lookup_is_its_formula(x64):
    wrapped = adapted(jpeft.HiraConfig(target_modules=["e"], r=2), {"e": {"embedding": (7, 5)}})
    own = wrapped.adapters["default"].weights["e"]
    table = wrapped.base["e"]["embedding"] * (1 + (own["hira_embedding_B"] @ own["hira_embedding_A"]).T)
    ids = np.array([[0, 3], [6, 3]])
    for found in (jpeft.lift(lambda p: p["e"]["embedding"][ids])(wrapped), jpeft.merge(wrapped)["e"]["embedding"][ids]):
        np.testing.assert_allclose(found, table[ids], rtol=1e-10)


def test_hira_beside_another_adapter_changes_the_base_weight_alone(x64):
    wrapped = adapted(jpeft.LoraConfig(target_modules=["w"], r=2))
    config = jpeft.HiraConfig(target_modules=["w"], r=2, init_weights=False)
    wrapped = jpeft.wrap(wrapped, config, adapter_name="hira", dtype=jnp.float64)
    wrapped = jpeft.set_adapter(wrapped, ["default", "hira"])
    w, b, own = numbers(wrapped)
    other = {name: np.asarray(array) for name, array in wrapped.adapters["hira"].weights["w"].items()}
    change = 4 * (own["lora_B"] @ own["lora_A"]).T + w * (other["hira_B"] @ other["hira_A"]).T
    np.testing.assert_allclose(jpeft.lift(dense)(wrapped, X), dense({"w": {"kernel": w + change, "bias": b}}, X))
    np.testing.assert_allclose(jpeft.merge(wrapped)["w"]["kernel"], w + change)


def test_hira_costs_its_matrix():
    rows, inputs, outputs, r = 64, 32, 48, 4
    found, added = cost(jpeft.HiraConfig(target_modules=["w"], r=r), inputs, outputs, rows)
    assert found == r * (inputs + outputs)
    assert added == pytest.approx((2 * r + 2) * inputs * outputs, rel=0.05)


@pytest.mark.parametrize(("dtype", "dropout", "others", "products"), [
    ("float32", 0.0, 0, 1), ("float32", 0.1, 0, 2), ("bfloat16", 0.0, 0, 2), ("float32", 0.0, 1, 2)
])  # fmt: skip
def test_hira_takes_a_second_product_where_its_change_cannot_be_added_to_the_weight(dtype, dropout, others, products):
    params = {"w": {"kernel": jnp.ones((32, 48), dtype), "bias": jnp.ones(48, dtype)}}
    wrapped = jpeft.wrap(params, jpeft.HiraConfig(target_modules=["w"], hira_dropout=dropout))
    for number in range(others):
        wrapped = jpeft.wrap(wrapped, jpeft.HiraConfig(target_modules=["w"]), adapter_name=str(number))
    wrapped = jpeft.with_context(jpeft.set_adapter(wrapped, list(wrapped.adapters)), rng=jax.random.key(0))
    jaxpr = jax.make_jaxpr(jpeft.lift(dense))(wrapped, jnp.ones((64, 32), dtype))
    # Products of x, and not of the factors; what nothing uses is called "_".
    assert len(re.findall(r"[^_ ]:\w+\[64,48\] = dot_general", str(jaxpr))) == products


def test_hira_begins_as_asked():
    def begun(params, **options):
        wrapped = jpeft.wrap(params, jpeft.HiraConfig(target_modules=["w"], r=16, **options))
        return wrapped.adapters["default"].weights["w"]

    params = {"w": {"kernel": jnp.ones((512, 8))}}
    assert abs(begun(params, init_weights="gaussian")["hira_A"].std() * 16 - 1) < 0.05
    assert abs(begun(params, init_weights=False)["hira_A"].std() - 1) < 0.05
    assert abs(begun(params, init_weights=None)["hira_B"].std() - 1) < 0.3


def test_hira_refuses():
    with pytest.raises(ValueError, match="r is 0; expected an integer of at least 1"):
        jpeft.HiraConfig(r=0)
    with pytest.raises(ValueError, match="hira_dropout is 1; expected a rate in"):
        jpeft.HiraConfig(hira_dropout=1)
    with pytest.raises(ValueError, match="init_weights is 'x'; expected True, False, None or 'gaussian'"):
        jpeft.HiraConfig(init_weights="x")


# ---- GLoRA ----------------------------------------------------------------------------------------------------------


def glora_part(own, letter):
    if f"glora_{letter}.Xd" in own:
        return own[f"glora_{letter}.Xd"] @ own[f"glora_{letter}.Xu"]
    return own.get(f"glora_{letter}.X", 0)


@pytest.mark.parametrize("of_c", ["lora", "vector", "none"])
@pytest.mark.parametrize(("of_ab", "of_de"), [("lora", "vector"), ("vector", "constant"), ("constant", "none")])
def test_glora_is_its_formula(x64, of_ab, of_c, of_de):
    config = jpeft.GloraConfig(target_modules=["w"], r=2, config_A_B=of_ab, config_C=of_c, config_D_E=of_de)
    wrapped = adapted(config)
    w, b, own = numbers(wrapped)
    part = {letter: glora_part(own, letter) for letter in "ABCDE"}
    of_weight = 0 if of_c == "none" else (w.T @ part["C"])[:, 0]
    check(wrapped, dense, X, (w.T + w.T * part["A"] + part["B"]).T, b + b * part["D"] + part["E"] + of_weight)


def test_glora_costs_its_matrix():
    rows, inputs, outputs, r = 64, 32, 48, 4
    found, added = cost(jpeft.GloraConfig(target_modules=["w"], r=r), inputs, outputs, rows)
    assert found == 2 * r * (inputs + outputs) + r * (inputs + 1) + 2
    # The new bias takes one more row.
    assert added == pytest.approx((4 * r + 3 + 2) * inputs * outputs, rel=0.05)
    config = jpeft.GloraConfig(target_modules=["w"], config_A_B="vector", config_C="none", config_D_E="none")
    found, added = cost(config, inputs, outputs, rows)
    assert found == 2 * outputs
    assert added == pytest.approx((4 * outputs + inputs) * rows, rel=0.15)


def test_glora_refuses():
    with pytest.raises(ValueError, match="r is 0; expected an integer of at least 1"):
        jpeft.GloraConfig(r=0)
    with pytest.raises(ValueError, match="config_C is 'constant'; expected one of 'lora', 'vector', 'none'"):
        jpeft.GloraConfig(config_C="constant")


# ---- AdaLoRA --------------------------------------------------------------------------------------------------------


def ada(**options):
    return jpeft.AdaLoraConfig(**{"target_modules": ["w"], "total_step": 10, "init_r": 3, "target_r": 2, **options})


def test_adalora_is_its_formula(x64):
    for shapes, function, x in ((LAYER, dense, X), (IMAGE, convolution, PIXELS)):
        wrapped = adapted(ada(lora_alpha=5), shapes)
        w, b, own = numbers(wrapped)
        change = 5 / (3 + 1e-5) * own["lora_B"] @ (own["lora_A"] * own["lora_E"])
        change = change.T if w.ndim == 2 else change.reshape(6, 4, 3, 2).transpose(2, 3, 1, 0)
        # Its scale is kept in float32.
        merged, lifted = function(jpeft.merge(wrapped), x), jax.jit(jpeft.lift(function))(wrapped, x)
        expected = function({"w": {"kernel": w + change, "bias": b}}, x)
        np.testing.assert_allclose(lifted, expected, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(merged, lifted, rtol=1e-10, atol=1e-10)


def test_adalora_costs_two_thin_products():
    found, added = cost(ada(init_r=4), 32, 48, 64)
    assert found == 4 * (32 + 48 + 1)
    assert added == pytest.approx(2 * 64 * 4 * (32 + 48) + 64 * 48, rel=0.05)


def test_adalora_masks_nothing_where_there_is_nothing_to_take_away():
    config = ada(target_r=3)
    wrapped, allocator = adapted(config), jpeft.adalora_rank_allocator(config)
    state, start = allocator.init(wrapped), wrapped
    for _ in range(10):
        wrapped, state = allocator.update(start, state, wrapped)
    assert bool(state.kept["w"].all()) and jpeft.adalora_sliced(wrapped, state) is wrapped
    jax.tree.map(np.testing.assert_array_equal, wrapped, start)


def test_adalora_allocates_in_stacked_layers_as_in_single_ones():
    config = ada(target_modules=["up"], target_r=1)
    kernels = random_like({"0": (4, 5), "1": (4, 5)}, 3)
    single = {"layers": {number: {"up": {"kernel": kernel}} for number, kernel in kernels.items()}}
    stack = {"layers": {"0:2": {"up": {"kernel": jnp.stack([kernels["0"], kernels["1"]])}}}}
    allocator = jpeft.adalora_rank_allocator(config)
    one = jpeft.wrap(single, dataclasses.replace(config, init_lora_weights=False))
    many = jpeft.wrap(stack, dataclasses.replace(config, init_lora_weights=False))
    one, of_one = allocator.update(one, allocator.init(one)._replace(step=jnp.asarray(8)), one)
    many, of_many = allocator.update(many, allocator.init(many)._replace(step=jnp.asarray(8)), many)
    kept = np.stack([of_one.kept[f"layers.{number}.up"] for number in "01"])
    np.testing.assert_array_equal(of_many.kept["layers.0:2.up"], kept)
    assert 2 <= kept.sum() < 6
    with pytest.raises(ValueError, match="the layers of 'layers.0:2.up' are stacked in one leaf and cannot have diff"):
        jpeft.adalora_sliced(many, of_many)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"total_step": None}, "total_step is None; expected the number of steps of training"),
        ({"init_r": 0}, "init_r is 0; expected an integer of at least 1"),
        ({"target_r": 4}, "target_r is 4; expected a number of 0 to init_r=3"),
        ({"deltaT": 0}, "deltaT is 0; expected an integer of at least 1"),
        ({"beta1": 1}, "beta1 is 1; expected a number between 0 and 1"),
        ({"orth_reg_weight": -1}, "orth_reg_weight is -1; expected a number of at least 0"),
        ({"lora_alpha": 0}, "lora_alpha is 0; expected a positive number"),
        ({"lora_dropout": 1}, "lora_dropout is 1; expected a rate in"),
        ({"bias": "x"}, "bias is 'x'; expected 'none', 'all' or 'lora_only'"),
        ({"tinit": 6, "tfinal": 4}, "tinit=6 and tfinal=4 leave no step of total_step=10 for allocation"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_adalora_refuses_settings(options, said):
    with pytest.raises(ValueError, match=said):
        ada(**options)


def test_adalora_refuses():
    line = {"w": {"kernel": jnp.ones((3, 4, 6))}}
    with pytest.raises(ValueError, match=r"AdaLoRA at 'w': the window is \(3,\); expected one of two axes"):
        jpeft.wrap(line, ada(), layouts={"w.kernel": ".io"})
    with pytest.raises(TypeError, match="expected a jpeft.AdaLoraConfig"):
        jpeft.adalora_rank_allocator(jpeft.LoraConfig())
    allocator = jpeft.adalora_rank_allocator(ada())
    with pytest.raises(ValueError, match=r"the active adapters of AdaLoRA that train are \[\]; expected exactly one"):
        allocator.init(jpeft.disable_adapters(adapted(ada())))
