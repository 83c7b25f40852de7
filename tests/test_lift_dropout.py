"""Dropout on the input of the low-rank path. Factors that are identities make the masks visible."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, PartitionSpec as P

import jpeft
from jpeft import LoraConfig
from tests.cases import halved, scanned
from tests.harness import random_like

SIZE, RATE = 16, 0.25


def transparent(shapes, **fields):
    """Zero kernels whose adapters hand on their input: a lifted product is its input after dropout."""
    params = {name: {"kernel": jnp.zeros(shape)} for name, shape in shapes.items()}
    config = LoraConfig(r=SIZE, lora_alpha=SIZE, lora_dropout=RATE, target_modules=".*")
    wrapped = jpeft.wrap(params, config, **fields)
    adapter = wrapped.adapters["default"]
    weights = jax.tree.map(lambda leaf: jnp.broadcast_to(jnp.eye(SIZE), leaf.shape), adapter.weights)
    return dataclasses.replace(wrapped, adapters={"default": dataclasses.replace(adapter, weights=weights)})


def seeded(wrapped, seed=0):
    return jpeft.with_context(wrapped, rng=jax.random.key(seed))


ONE, TWO = {"a": (SIZE, SIZE)}, {"a": (SIZE, SIZE), "b": (SIZE, SIZE)}
STACK = {"a": (3, SIZE, SIZE)}
LAYERS = {"a.kernel": "bio"}
X = jnp.ones((5, SIZE))
product = jpeft.lift(lambda p, x: x @ p["a"]["kernel"])


def test_without_a_key_there_is_no_dropout():
    np.testing.assert_array_equal(product(transparent(ONE), X), X)
    np.testing.assert_array_equal(product(jpeft.with_context(seeded(transparent(ONE)), rng=None), X), X)


def test_entries_are_dropped_and_the_rest_scaled():
    y = product(seeded(transparent(ONE)), jnp.ones((1000, SIZE)))
    assert set(np.unique(y)) == {np.float32(0), np.float32(1 / (1 - RATE))}
    # Five standard deviations of the mean of 16000 draws.
    assert abs(y.mean() - 1) < 5 * np.sqrt(RATE / (1 - RATE) / y.size)


def test_the_key_decides():
    wrapped = transparent(ONE)
    np.testing.assert_array_equal(product(seeded(wrapped, 1), X), product(seeded(wrapped, 1), X))
    assert (product(seeded(wrapped, 1), X) != product(seeded(wrapped, 2), X)).any()


@pytest.mark.parametrize("key", (jax.random.PRNGKey(3), jax.random.key(3, impl="rbg")), ids=("legacy", "rbg"))
def test_other_kinds_of_keys(key):
    y = jax.jit(product)(jpeft.with_context(transparent(ONE), rng=key), X)
    assert set(np.unique(y)) == {np.float32(0), np.float32(1 / (1 - RATE))}


def scan_of_shared(p, x):
    return lax.scan(lambda c, _: (c, x @ p["a"]["kernel"]), 0.0, length=3)[1]


def while_of_shared(p, x):
    def body(state):
        index, masks = state
        return index + 1, lax.dynamic_update_index_in_dim(masks, x @ p["a"]["kernel"], index, 0)

    return lax.while_loop(lambda state: state[0] < 3, body, (0, jnp.zeros((3, *x.shape))))[1]


def one_branch(x, w):
    return lax.cond(x.sum() > 0, jnp.matmul, lambda x, w: x, x, w)


MASKS = {
    "modules": (TWO, {}, lambda p, x: [x @ p["a"]["kernel"], x @ p["b"]["kernel"]]),
    "modules stacked": (
        TWO, {}, lambda p, x: lax.scan(lambda c, w: (c, x @ w), 0.0, jnp.stack([p[name]["kernel"] for name in "ab"]))[1]
    ),
    "uses": (ONE, {}, lambda p, x: [x @ p["a"]["kernel"], x @ p["a"]["kernel"]]),
    "layers by index": (STACK, LAYERS, lambda p, x: [x @ p["a"]["kernel"][i] for i in range(3)]),
    "layers in scan": (STACK, LAYERS, lambda p, x: lax.scan(lambda c, w: (c, x @ w), 0.0, p["a"]["kernel"])[1]),
    "layers in scan of remat": (
        STACK, LAYERS, lambda p, x: lax.scan(jax.checkpoint(lambda c, w: (c, x @ w)), 0.0, p["a"]["kernel"])[1]
    ),
    "steps of a scan over one layer": (ONE, {}, scan_of_shared),
    "steps of a while_loop over one layer": (ONE, {}, while_of_shared),
    "calls of one function": (ONE, {}, lambda p, x: [jax.jit(jnp.matmul)(x, p["a"]["kernel"]) for _ in range(2)]),
    "branches": (ONE, {}, lambda p, x: [one_branch(x, p["a"]["kernel"]) for _ in range(2)]),
    "rows": (ONE, {}, lambda p, x: x @ p["a"]["kernel"]),
    "examples of a vmap": (ONE, {}, lambda p, x: jax.vmap(lambda row: row @ p["a"]["kernel"])(x)),
}  # fmt: skip


@pytest.mark.parametrize(("shapes", "layouts", "function"), MASKS.values(), ids=MASKS)
def test_masks_differ_between(shapes, layouts, function):
    wrapped = seeded(transparent(shapes, layouts=layouts))
    masks = np.asarray(jax.jit(jpeft.lift(function))(wrapped, X))
    assert all((masks[i] != masks[j]).any() for i in range(len(masks)) for j in range(i))
    np.testing.assert_allclose(masks[masks != 0], 1 / (1 - RATE), rtol=1e-6)


@pytest.mark.parametrize("check", (True, False))
def test_masks_differ_between_devices(check):
    def function(p, x):
        mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
        specs = {"in_specs": (P("d"), P()), "out_specs": P("d")}
        return jax.shard_map(jnp.matmul, mesh=mesh, check_vma=check, **specs)(x, p["a"]["kernel"])

    masks = np.asarray(jax.jit(jpeft.lift(function))(seeded(transparent(ONE)), jnp.ones((8, SIZE))))
    assert len(np.unique(masks, axis=0)) == 8


def test_the_mean_over_keys_is_the_output_without_dropout():
    wrapped = transparent(ONE)
    x = random_like((3, SIZE), 5, 1.0)
    outputs = jax.jit(jax.vmap(lambda key: product(jpeft.with_context(wrapped, rng=key), x)))(
        jax.random.split(jax.random.key(0), 2000)
    )
    deviations = np.abs(outputs.mean(0) - product(wrapped, x)) / (np.abs(x) * np.sqrt(RATE / (1 - RATE) / 2000))
    assert deviations.max() < 5


def test_the_gradient_passes_through_the_mask():
    wrapped = seeded(transparent(ONE))
    gradient = jax.grad(lambda x: product(wrapped, x).sum())(X)
    np.testing.assert_array_equal(gradient, product(wrapped, X))


def test_a_rule_of_the_user_gives_the_derivative_without_dropout():
    function = jpeft.lift(lambda p, x: halved(x, p["a"]["kernel"]).sum())
    wrapped = transparent(ONE)
    got, want = (jax.grad(function, argnums=1)(w, X) for w in (seeded(wrapped), wrapped))
    np.testing.assert_allclose(got, want)
    assert function(seeded(wrapped), X) != function(wrapped, X)


def test_remat_drops_the_same_entries_twice():
    wrapped = seeded(transparent(STACK, layouts=LAYERS))
    x = random_like((5, SIZE), 5, 1.0)

    def gradients(body):
        function = jpeft.lift(lambda p, x: scanned(p["a"]["kernel"], x, body))
        return jax.jit(jpeft.grad(lambda w: jnp.sin(function(w, x)).sum()))(wrapped).adapters["default"].weights

    def layer(c, w):
        return jnp.tanh(c @ w), None

    for ours, theirs in zip(*(jax.tree.leaves(gradients(f)) for f in (jax.checkpoint(layer), layer)), strict=True):
        assert np.isfinite(ours).all() and np.abs(theirs).max() > 0
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_lookups_are_not_dropped():
    params = {"e": {"embedding": random_like((7, 4), 5)}}
    wrapped = jpeft.wrap(params, LoraConfig(r=2, lora_dropout=RATE, target_modules=".*"))
    wrapped = dataclasses.replace(wrapped, adapters=random_like(wrapped.adapters, 6))
    ids = np.arange(7)
    for function in (lambda table: table[ids], lambda table: jax.nn.one_hot(ids, 7) @ table):
        lookup = jpeft.lift(lambda p, function=function: function(p["e"]["embedding"]))
        np.testing.assert_array_equal(lookup(seeded(wrapped)), lookup(wrapped))


def test_another_key_does_not_recompile():
    step = jax.jit(jpeft.lift(lambda p, x: x @ p["a"]["kernel"]))
    for seed in range(3):
        step(seeded(transparent(ONE), seed), X)
    assert step._cache_size() == 1


def test_a_key_that_is_no_key_is_refused():
    with pytest.raises(TypeError, match=r"rng is int 3; expected a key from jax.random.key\(seed\)"):
        jpeft.with_context(transparent(ONE), rng=3)
