"""What holds for every method beyond its mathematics: narrow types, populations, stacks, meshes, quantised bases."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import jpeft
from tests.cases import METHODS
from tests.harness import QUICKLY, random_like, with_derived
from tests.stacked_trees import of_layers
from tests.test_laws import IDS, KINDS, fresh, in_context, in_training, randomised, targets

over_methods = pytest.mark.parametrize("row", METHODS, ids=lambda row: row.name)

SMALL = {
    "query": {"kernel": (4, 6), "bias": (6,)},
    "layers": {"0:3": {"mlp": {"kernel": (3, 6, 6), "bias": (3, 6)}}},
}
X = random_like((2, 5, 4), 50, 1.0)


def small(params, x):
    """A layer, and then three: a scan of those that are stacked, or one by one."""
    layers = params["layers"]
    y = jnp.tanh(x @ params["query"]["kernel"] + params["query"]["bias"])
    for name in layers:
        if name == "0:3":
            y, _ = jax.lax.scan(lambda c, own: (dense(own["mlp"], c), None), y, layers[name])
        else:
            y = dense(layers[name]["mlp"], y)
    return y


def dense(own, x):
    return jnp.tanh(x @ own["kernel"] + own["bias"])


def wrapped_small(row, params):
    return in_context(jpeft.wrap(params, row.config(**{**row.options, "target_modules": ["query", "mlp"]})), row)


def drawn(wrapped, seed):
    """The same adapter with random values, but for what follows from the weights."""
    adapter = wrapped.adapters["default"]
    weights, shared = random_like(adapter.weights, seed), random_like(adapter.shared, seed + 200)
    adapter = dataclasses.replace(adapter, weights=weights, shared=shared)
    return with_derived(dataclasses.replace(wrapped, adapters={"default": adapter}))


def with_gradient(function):
    """(result, derivative by everything that trains) of a function of adapted parameters, which has a tree as result."""

    def of_lifted(wrapped, *args):
        outputs = jpeft.lift(function)(wrapped, *args)
        total = sum(jnp.sin(leaf.astype(jnp.float32)).sum() for leaf in jax.tree.leaves(outputs))
        return total, outputs

    def computed(wrapped, *args):
        (_, outputs), gradient = jpeft.value_and_grad(of_lifted, has_aux=True)(wrapped, *args)
        return outputs, gradient.adapters

    return computed


def compiled(function):
    return jax.jit(function, compiler_options=QUICKLY)


def assert_near(got, want, tolerance):
    """Equal structures, and values that differ by `tolerance` of the largest one of the array."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for (path, ours), theirs in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True):
        ours, theirs = (np.asarray(array, np.float32) for array in (ours, theirs))
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * np.abs(theirs).max(), err_msg=str(path))


# ---- bfloat16 -------------------------------------------------------------------------------------------------------


def apart(params, ids, x, wide, image):
    """Every kind of layer by itself, so that what one of them rounds is not the input of another."""
    numbers = ("NHWC", "HWIO", "NHWC")
    query, value, stacked, heads = (params[name]["kernel"] for name in ("query", "value", "stacked", "heads"))
    return {
        "embed": params["embed"]["embedding"][ids],
        "query": x @ query + params["query"]["bias"],
        "value": x @ value,
        "stacked": jax.lax.scan(jax.checkpoint(lambda c, w: (c, wide @ w)), 0, stacked)[1],
        "heads": jnp.einsum("btd,dnh->btnh", wide, heads),
        "conv": jax.lax.conv_general_dilated(image, params["conv"]["kernel"], (1, 1), "SAME", dimension_numbers=numbers),
    }


INPUTS = tuple(random_like(shape, 70 + index, 1.0) for index, shape in enumerate(((2, 3, 4), (2, 3, 6), (2, 5, 5, 1))))


def cast(tree, dtype):
    return jax.tree.map(lambda leaf: leaf.astype(dtype), tree)


@over_methods
def test_a_bfloat16_model_stays_one(row):
    base = cast(fresh(row).base, jnp.bfloat16)
    wrapped = in_training(randomised(fresh(row, params=base)), row)
    narrow = cast(INPUTS, jnp.bfloat16)
    exact = dataclasses.replace(wrapped, base=cast(base, jnp.float32)), cast(narrow, jnp.float32)
    both = compiled(lambda *given: [with_gradient(apart)(wrapped, IDS, *inputs) for wrapped, inputs in given])
    (got, gradient), (want, expected) = both((wrapped, narrow), exact)
    assert {leaf.dtype for leaf in jax.tree.leaves(got)} == {jnp.dtype(jnp.bfloat16)}
    assert jax.tree.map(lambda leaf: leaf.dtype, gradient) == jax.tree.map(lambda leaf: leaf.dtype, expected)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(gradient))
    # Each of the few numbers on the way from input to output is rounded to half an epsilon.
    assert_near(got, want, 4 * float(jnp.finfo(jnp.bfloat16).eps))


@over_methods
def test_a_bfloat16_adapter_of_a_bfloat16_model(row):
    wrapped = in_training(fresh(row, params=cast(fresh(row).base, jnp.bfloat16)), row)
    wrapped = dataclasses.replace(wrapped, adapters=narrowed(wrapped.adapters))
    outputs, gradient = jax.eval_shape(with_gradient(apart), wrapped, IDS, *cast(INPUTS, jnp.bfloat16))
    assert {leaf.dtype for leaf in jax.tree.leaves(outputs)} == {jnp.dtype(jnp.bfloat16)}
    floating = [leaf.dtype for leaf in jax.tree.leaves(gradient["default"].weights) if leaf.shape]
    assert set(floating) <= {jnp.dtype(jnp.bfloat16)}


def narrowed(adapters):
    def one(leaf):
        return leaf.astype(jnp.bfloat16) if leaf.dtype == jnp.float32 else leaf

    return {
        name: dataclasses.replace(own, weights=jax.tree.map(one, own.weights), shared=jax.tree.map(one, own.shared))
        for name, own in adapters.items()
    }
