"""IA3, RoAd, LoHa, LoKr, HiRA, GLoRA and AdaLoRA: the papers' formulas in numpy float64, costs and refusals."""

import dataclasses

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
