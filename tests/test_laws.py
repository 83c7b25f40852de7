"""What holds for every method, over the table METHODS and the kinds of layers: a new method is one row there."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jpeft
import jpeft_interop
from jpeft._contract import CONVOLUTION, EMBEDDING, LINEAR, method_of
from tests.cases import METHODS
from tests.harness import random_like, with_derived

SHAPES = {
    "query": {"kernel": (4, 6), "bias": (6,)},
    "value": {"kernel": (4, 6)},
    "stacked": {"kernel": (3, 6, 6)},
    "heads": {"kernel": (6, 2, 3)},
    "embed": {"embedding": (7, 4)},
    "conv": {"kernel": (3, 3, 1, 2)},
}
LAYOUTS = {"stacked.kernel": "bio", "heads.kernel": "ioo"}
KINDS = {"embed": EMBEDDING, "conv": CONVOLUTION}
IDS = np.array([[1, 2, 3], [0, 6, 6]], np.int32)


def function(params, ids):
    """Every layer kind once; the stacked layers by a scan under remat."""
    x = params["embed"]["embedding"][ids]
    image = (x[:, None] + x[:, :, None])[..., :1]
    numbers = ("NHWC", "HWIO", "NHWC")
    seen = jax.lax.conv_general_dilated(image, params["conv"]["kernel"], (1, 1), "SAME", dimension_numbers=numbers)
    y = x @ params["query"]["kernel"] + params["query"]["bias"] + jnp.tanh(x @ params["value"]["kernel"])
    y, _ = jax.lax.scan(jax.checkpoint(lambda c, w: (jnp.tanh(c @ w), None)), y, params["stacked"]["kernel"])
    return jnp.einsum("btd,dnh->btnh", y, params["heads"]["kernel"]).sum() + jnp.sin(seen).sum()


def targets(row):
    kinds = method_of(row.config(**row.options)).kinds
    able = [name for name in SHAPES if KINDS.get(name, LINEAR) in kinds]
    return [name for name in able if "bias" in SHAPES[name] or not row.biased]


def fresh(row, *without, params=None):
    config = row.config(**{**row.options, "target_modules": [name for name in targets(row) if name not in without]})
    params = random_like(SHAPES, 7) if params is None else params
    return in_context(jpeft.wrap(params, config, layouts=LAYOUTS, rng=jax.random.key(3)), row)


def in_context(wrapped, row, **more):
    return jpeft.with_context(wrapped, **row.context, **more)


def randomised(wrapped):
    adapter = wrapped.adapters["default"]
    weights, shared = random_like(adapter.weights, 100), random_like(adapter.shared, 300)
    adapter = dataclasses.replace(adapter, weights=weights, shared=shared)
    return with_derived(dataclasses.replace(wrapped, adapters={"default": adapter}))


def in_training(wrapped, row):
    return in_context(wrapped, row, rng=jax.random.key(5)) if row.dormant else wrapped


over_methods = pytest.mark.parametrize("row", METHODS, ids=lambda row: row.name)
lifted = jpeft.lift(function)


@pytest.mark.parametrize("row", [row for row in METHODS if row.neutral], ids=lambda row: row.name)
def test_a_fresh_adapter_changes_nothing(row):
    wrapped = fresh(row)
    # A sum of terms of order one.
    atol = 0 if row.exact else 1e-6
    np.testing.assert_allclose(jax.jit(lifted)(wrapped, IDS), function(wrapped.base, IDS), rtol=1e-6, atol=atol)


@pytest.mark.parametrize("row", [row for row in METHODS if row.neutral and row.mergeable], ids=lambda row: row.name)
def test_a_fresh_adapter_merged_changes_nothing(row):
    wrapped = fresh(row)
    for merged, base in zip(jax.tree.leaves(jpeft.merge(wrapped)), jax.tree.leaves(wrapped.base), strict=True):
        np.testing.assert_allclose(merged, base, rtol=0, atol=0 if row.exact else 1e-6)


@over_methods
def test_the_gradient_reaches_every_trainable_leaf_and_no_other(row):
    wrapped = in_training(randomised(fresh(row)), row)
    gradient = jax.jit(jpeft.grad(lifted))(wrapped, IDS)
    mask = jpeft.trainable_mask(wrapped)
    reached = jax.tree.map(lambda leaf: leaf.ndim > 0 and bool(jnp.any(leaf != 0)), gradient)
    assert jax.tree.leaves(reached.base) == [False] * len(jax.tree.leaves(wrapped.base))
    assert reached.adapters == mask.adapters and any(jax.tree.leaves(mask.adapters))


@pytest.mark.parametrize("row", [row for row in METHODS if not row.collective], ids=lambda row: row.name)
def test_a_module_that_is_left_out_changes_no_other(row):
    if row.biased:
        row = dataclasses.replace(row, biased=False)
    whole, part = fresh(row).adapters["default"].weights, fresh(row, "query").adapters["default"].weights
    assert "query" in whole and "query" not in part and part
    for path, arrays in part.items():
        for name, array in arrays.items():
            np.testing.assert_array_equal(array, whole[path][name])


@over_methods
def test_abstract_parameters_give_an_abstract_adapter(row):
    concrete, abstract = fresh(row), fresh(row, params=jax.eval_shape(lambda: random_like(SHAPES, 7)))
    shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), concrete.adapters)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), abstract.adapters) == shapes
    assert jax.eval_shape(lifted, abstract, IDS).shape == ()


@over_methods
def test_training_moves_the_adapter_alone_and_compiles_once(row):
    wrapped, compiled = in_training(randomised(fresh(row)), row), []
    tx = optax.masked(optax.sgd(1e-2), jpeft.trainable_mask)

    @jax.jit
    def step(wrapped, state):
        compiled.append(None)
        updates, state = tx.update(jpeft.grad(lifted)(wrapped, IDS), state, wrapped)
        return optax.apply_updates(wrapped, updates), state

    stepped, state = step(wrapped, tx.init(wrapped))
    stepped, state = step(stepped, state)
    assert len(compiled) == 1
    for after, before in zip(jax.tree.leaves(stepped.base), jax.tree.leaves(wrapped.base), strict=True):
        np.testing.assert_array_equal(after, before)
    moved = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), stepped.adapters, wrapped.adapters)
    assert moved == jpeft.trainable_mask(wrapped).adapters


@pytest.mark.parametrize("row", [row for row in METHODS if row.file], ids=lambda row: row.name)
def test_what_is_saved_comes_back_bit_for_bit(row, tmp_path):
    # Stacks have no name of their own in PEFT's files; the family tables give them one.
    wrapped = randomised(fresh(row, "stacked"))
    jpeft_interop.save_pretrained(wrapped, tmp_path, layouts=LAYOUTS)
    loaded = jpeft_interop.load_pretrained(wrapped.base, tmp_path, layouts=LAYOUTS, is_trainable=True)
    loaded = in_context(loaded, row)
    before, after = (jax.tree.leaves_with_path(one.adapters["default"].weights) for one in (wrapped, loaded))
    assert [path for path, _ in before] == [path for path, _ in after]
    for (_, ours), (_, theirs) in zip(before, after, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(jax.jit(lifted)(wrapped, IDS), jax.jit(lifted)(loaded, IDS))
