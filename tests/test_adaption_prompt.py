"""LLaMA-Adapter: attention to a prompt against its formula in numpy, what wrap begins with, and what is refused."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.test_util import check_grads

import jpeft
from jpeft import AdaptionPromptConfig, LoraConfig, adaption_attention, adaption_prompts, lift
from tests.harness import random_like

HIDDEN, LAYERS, HEADS, KV_HEADS = 8, 4, 4, 2
SHAPES = {"q": (HIDDEN, HIDDEN), "k": (HIDDEN, 4), "v": (HIDDEN, 4), "o": (HIDDEN, HIDDEN)}
PARAMS = random_like(
    {
        "layers": {
            str(n): {"self_attn": {name: {"kernel": shape} for name, shape in SHAPES.items()}} for n in range(LAYERS)
        }
    },
    3,
)
CONFIG = AdaptionPromptConfig(adapter_len=3, adapter_layers=2)
ADAPTED = ["layers.2.self_attn", "layers.3.self_attn"]
X = np.random.default_rng(5).normal(size=(2, 5, HIDDEN)).astype(np.float32)


def model(params, x, adaption_prompts):
    for number in range(LAYERS):
        own = params["layers"][str(number)]["self_attn"]

        def heads(name, x, own=own):
            return (x @ own[name]["kernel"]).reshape(*x.shape[:-1], HEADS if name == "q" else KV_HEADS, -1)

        query = heads("q", x)
        y = jax.nn.dot_product_attention(query, heads("k", x), heads("v", x), is_causal=True)
        prompt = adaption_prompts.get(f"layers.{number}.self_attn")
        if prompt is not None:
            key, value = heads("k", prompt["adaption_prompt"]), heads("v", prompt["adaption_prompt"])
            y = y + adaption_attention(query, key, value, prompt["adaption_gate"])
        x = x + y.reshape(x.shape) @ own["o"]["kernel"]
    return x


def eagerly(wrapped, x=X):
    return lift(model)(wrapped, x, adaption_prompts(wrapped))


outputs = jax.jit(eagerly)
bare = jax.jit(lambda params: model(params, X, {}))


def drawn(wrapped, name="default", scale=1.0):
    """With random values in the place of the initial ones: gates that are open."""
    adapter = wrapped.adapters[name]
    adapter = dataclasses.replace(adapter, weights=random_like(adapter.weights, 11, scale))
    return dataclasses.replace(wrapped, adapters={**wrapped.adapters, name: adapter})


WRAPPED = drawn(jpeft.wrap(PARAMS, CONFIG))


# ---- the formula ----------------------------------------------------------------------------------------------------


def attended(query, key, value, gate):
    """One row and one head at a time."""
    query, key, value = (np.asarray(array, np.float64) for array in (query, key, value))
    key, value = (np.broadcast_to(array, (len(query), *array.shape[1:])) for array in (key, value))
    group = query.shape[2] // key.shape[2]
    found = np.zeros(query.shape)
    for row, token, head in np.ndindex(query.shape[:3]):
        scores = key[row, :, head // group] @ query[row, token, head] / np.sqrt(query.shape[3])
        shares = np.exp(scores - scores.max())
        found[row, token, head] = float(gate) * shares / shares.sum() @ value[row, :, head // group]
    return found


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)], ids=str)
@pytest.mark.parametrize("rows", [1, 3])
def test_attention_is_its_formula(heads, rows):
    query, key, value = random_like([(3, 5, heads[0], 8), (rows, 4, heads[1], 8), (rows, 4, heads[1], 8)], 2, 1.0)
    expected = attended(query, key, value, 0.7)
    attend = jax.jit(adaption_attention)
    np.testing.assert_allclose(attend(query, key, value, jnp.array([0.7])), expected, rtol=2e-6, atol=2e-6)
    half = attend(query.astype(jnp.bfloat16), key, value, jnp.float32(0.7))
    assert (half.shape, half.dtype) == (query.shape, jnp.bfloat16)
    np.testing.assert_allclose(half.astype(jnp.float32), expected, atol=0.03 * np.abs(expected).max())


def test_its_gradients_are_those_of_differences(x64):
    arrays = random_like([(2, 3, 4, 5), (1, 3, 2, 5), (1, 3, 2, 5), (1,)], 2, 1.0)
    check_grads(jax.jit(adaption_attention), arrays, order=1, modes=["rev"], rtol=1e-6, atol=1e-6)


# ---- what wrap begins with ------------------------------------------------------------------------------------------


def test_it_begins_as_the_base():
    fresh = jpeft.wrap(PARAMS, CONFIG, rng=jax.random.key(1))
    assert list(fresh.adapters["default"].weights) == ADAPTED
    np.testing.assert_allclose(outputs(fresh), bare(PARAMS), rtol=1e-6, atol=1e-6)
    assert not np.allclose(outputs(WRAPPED), bare(PARAMS), atol=0.1)
    np.testing.assert_allclose(outputs(jpeft.disable_adapters(WRAPPED)), bare(PARAMS), rtol=1e-6, atol=1e-6)


def test_prompts_begin_as_standard_normal_numbers_that_depend_on_the_path_alone():
    long = AdaptionPromptConfig(adapter_len=2000, adapter_layers=2)
    weights = jpeft.wrap(PARAMS, long, rng=jax.random.key(1)).adapters["default"].weights
    for arrays in weights.values():
        prompt = np.asarray(arrays["adaption_prompt"])
        assert abs(prompt.mean()) < 0.03 and abs(prompt.std() - 1) < 0.03
        assert arrays["adaption_gate"].tolist() == [0.0]
    first, second = (arrays["adaption_prompt"] for arrays in weights.values())
    assert not np.allclose(first, second)
    fewer = jpeft.wrap(PARAMS, dataclasses.replace(long, adapter_layers=1), rng=jax.random.key(1))
    np.testing.assert_array_equal(fewer.adapters["default"].weights[ADAPTED[1]]["adaption_prompt"], second)


def test_in_stacked_layers_it_begins_as_in_single_ones():
    layers = PARAMS["layers"]
    tree = {"layers": {"0:4": jax.tree.map(lambda *leaves: jnp.stack(leaves), *(layers[str(n)] for n in range(4)))}}
    single, stacked = (
        jpeft.wrap(params, CONFIG, rng=jax.random.key(1)).adapters["default"] for params in (PARAMS, tree)
    )
    assert jax.tree.structure(single) == jax.tree.structure(stacked)
    jax.tree.map(np.testing.assert_array_equal, single, stacked)


def test_layers_are_counted_by_their_numbers():
    tree = {"layers": {str(n): PARAMS["layers"]["0"] for n in range(11)}}
    adapter = jpeft.wrap(tree, CONFIG).adapters["default"]
    assert adapter.weights.keys() == {"layers.9.self_attn", "layers.10.self_attn"}


@pytest.mark.parametrize(
    ("names", "given", "found"),
    [
        (("self_attn", "attn"), None, "self_attn"),
        (("attn", "mlp"), None, "attn"),
        (("self_attn", "mixer"), "mixer", "mixer"),
    ],
)
def test_the_attentions_name(names, given, found):
    tree = {str(n): {name: PARAMS["layers"]["0"]["self_attn"] for name in names} for n in range(2)}
    config = dataclasses.replace(CONFIG, target_modules=given)
    adapter = jpeft.wrap(tree, config).adapters["default"]
    assert list(adapter.weights) == [f"0.{found}", f"1.{found}"] and adapter.config.target_modules == found


def test_of_an_abstract_base_there_are_shapes():
    shapes = jax.eval_shape(lambda: PARAMS)
    adapter = jpeft.wrap(shapes, CONFIG, dtype=jnp.bfloat16).adapters["default"]
    expected = {"adaption_prompt": (1, 3, HIDDEN), "adaption_gate": (1,)}
    assert adapter.weights == {
        path: {name: jax.ShapeDtypeStruct(shape, jnp.bfloat16) for name, shape in expected.items()} for path in ADAPTED
    }


# ---- what it computes and trains ------------------------------------------------------------------------------------


@jax.jit
def remat(wrapped):
    return lift(jax.checkpoint(model))(wrapped, X, adaption_prompts(wrapped))


@jax.jit
def by_rows(wrapped):
    return jax.vmap(lambda x: eagerly(wrapped, x[None])[0])(X)


@pytest.mark.parametrize("way", [eagerly, remat, by_rows], ids=["eager", "remat", "vmap"])
def test_every_way_computes_the_same(way):
    np.testing.assert_allclose(way(WRAPPED), outputs(WRAPPED), rtol=1e-5, atol=1e-5)


def test_many_adapters_at_once():
    both = [drawn(jpeft.wrap(PARAMS, CONFIG)), WRAPPED, jpeft.wrap(PARAMS, CONFIG, rng=jax.random.key(2))]
    stacked = jpeft.stack_adapters(both)
    found = jax.vmap(outputs, in_axes=(jpeft.population_axes(stacked),))(stacked)
    np.testing.assert_allclose(found, [outputs(one) for one in both], rtol=1e-5, atol=1e-5)


def loss(wrapped):
    return jnp.sum(eagerly(wrapped) ** 2)


gradients = jax.jit(jpeft.value_and_grad(loss))


def test_gradients_reach_the_prompts_and_no_base_leaf():
    value, grads = gradients(WRAPPED)
    np.testing.assert_allclose(value, np.sum(np.square(outputs(WRAPPED))), rtol=1e-5)
    weights = grads.adapters["default"].weights
    assert list(weights) == ADAPTED and all(jnp.any(leaf != 0) for leaf in jax.tree.leaves(weights))
    assert all(jnp.shape(leaf) == () for leaf in jax.tree.leaves(grads.base))
    assert jpeft.count_parameters(WRAPPED)[0] == 2 * (3 * HIDDEN + 1)
    # While a gate is shut it alone is told anything.
    shut = gradients(jpeft.wrap(PARAMS, CONFIG))[1].adapters["default"].weights
    for arrays in shut.values():
        assert not jnp.any(arrays["adaption_prompt"]) and jnp.all(arrays["adaption_gate"] != 0)


def test_a_step_of_an_optimizer_changes_prompts_alone():
    tx = optax.masked(optax.sgd(0.1), jpeft.trainable_mask)
    grads = gradients(WRAPPED)[1]
    updates, _ = tx.update(grads, tx.init(WRAPPED), WRAPPED)
    after = optax.apply_updates(WRAPPED, updates)
    jax.tree.map(np.testing.assert_array_equal, after.base, WRAPPED.base)
    changed = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), after.adapters, WRAPPED.adapters)
    assert all(jax.tree.leaves(changed))


def test_prompts_go_through_the_adapted_projections():
    lora = drawn(jpeft.wrap(PARAMS, LoraConfig(r=2, target_modules=["k", "v", "o"]), adapter_name="lora"), "lora", 0.1)
    both = jpeft.set_adapter(drawn(jpeft.wrap(lora, CONFIG)), ["lora", "default"])
    expected = jax.jit(model)(jpeft.merge(lora), X, adaption_prompts(both))
    np.testing.assert_allclose(outputs(both), expected, rtol=1e-4, atol=1e-4)
    assert not np.allclose(expected, outputs(jpeft.set_adapter(both, "default")), atol=0.1)
    grads = gradients(both)[1].adapters
    assert all(jnp.any(leaf != 0) for name in both.active for leaf in jax.tree.leaves(grads[name].weights))


def test_prompts_go_through_quantised_projections():
    quantised = jpeft.quantize(PARAMS, "int8")
    wrapped = dataclasses.replace(WRAPPED, base=quantised)
    expected = outputs(dataclasses.replace(WRAPPED, base=jpeft.dequantize(quantised)))
    np.testing.assert_allclose(outputs(wrapped), expected, rtol=1e-4, atol=1e-4)


# ---- what is refused ------------------------------------------------------------------------------------------------

HALF = {"attn": {"qkv": {"kernel": jnp.ones((8, 24))}, "out": {"kernel": jnp.ones((12, 8))}}}


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: wrapped_with(adapter_len=None), ValueError, "adapter_len is None and adapter_layers is 2; expected"),
        (lambda: wrapped_with(adapter_layers=None), ValueError, "adapter_len is 3 and adapter_layers is None"),
        (lambda: wrapped_with(adapter_layers=5), ValueError, "adapter_layers is 5, but the model has 4 modules called"),
        (lambda: wrapped_with(adapter_len=0), ValueError, "adapter_len is 0; expected a whole number of at least 1"),
        (lambda: wrapped_with(adapter_layers=True), ValueError, "adapter_layers is True; expected a whole number"),
        (lambda: wrapped_with(target_modules=["q"]), TypeError, r"target_modules is \('q',\); expected the one name"),
        (lambda: wrapped_with(target_modules="mixer"), ValueError, "target_modules is 'mixer', .* called 'mixer'"),
        (lambda: jpeft.wrap({"q": {"kernel": X[0]}}, CONFIG), ValueError, "no module called 'self_attn' or 'attn'"),
        (
            lambda: jpeft.wrap(HALF, with_one_layer()),
            ValueError,
            r"'attn' have inputs of the sizes \[8, 12\]; expected",
        ),
        (lambda: jpeft.merge(WRAPPED), ValueError, "AdaptionPromptConfig is no change of a weight"),
        (lambda: adaption_prompts(several()), ValueError, "active adapters 'default', 'other' have adaption prompts"),
        (lambda: adaption_prompts(PARAMS), TypeError, "expected the PeftParams that jpeft.wrap returns"),
        (lambda: attention_of(key=(1, 3, 2, 5)), ValueError, r"key \(1, 3, 2, 5\) and value .* do not fit"),
        (
            lambda: attention_of(key=(1, 3, 3, 4), value=(1, 3, 3, 4)),
            ValueError,
            "query has 4 heads, the prompt's key 3",
        ),
        (lambda: attention_of(gate=(3,)), ValueError, r"gate has the shape \(3,\); expected one number"),
    ],
)
def test_what_is_refused(make, error, message):
    with pytest.raises(error) as caught:
        make()
    assert re.search(message, str(caught.value)), str(caught.value)


def wrapped_with(**fields):
    return jpeft.wrap(PARAMS, AdaptionPromptConfig(**{"adapter_len": 3, "adapter_layers": 2, **fields}))


def with_one_layer():
    return dataclasses.replace(CONFIG, adapter_layers=1)


def several():
    return jpeft.set_adapter(jpeft.wrap(WRAPPED, CONFIG, adapter_name="other"), ["default", "other"])


def attention_of(query=(2, 5, 4, 4), key=(1, 3, 2, 4), value=(1, 3, 2, 4), gate=(1,)):
    return adaption_attention(*(jnp.ones(shape) for shape in (query, key, value, gate)))
