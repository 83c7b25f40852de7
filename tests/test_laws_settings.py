"""What holds for every method beyond its mathematics: narrow types, populations, stacks, meshes, quantised bases."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import jpeft
from jpeft._contract import method_of
from tests.cases import METHODS
from tests.harness import QUICKLY, assert_close, random_like, with_derived
from tests.stacked_trees import assert_same_arrays, of_layers
from tests.test_laws import IDS, SHAPES, fresh, in_context, in_training, randomised

over_methods = pytest.mark.parametrize("row", METHODS, ids=lambda row: row.name)


def with_gradient(function):
    """(result, derivative by the adapter) of a function of adapted parameters whose result is a tree of arrays."""

    def total(wrapped, *args):
        outputs = jpeft.lift(function)(wrapped, *args)
        return sum(jnp.sin(leaf.astype(jnp.float32)).sum() for leaf in jax.tree.leaves(outputs)), outputs

    def computed(wrapped, *args):
        (_, outputs), gradient = jpeft.value_and_grad(total, has_aux=True)(wrapped, *args)
        return outputs, arrays_of(gradient)

    return computed


def arrays_of(wrapped):
    adapter = wrapped.adapters["default"]
    return {"weights": adapter.weights, "shared": adapter.shared}


def compiled(function):
    return jax.jit(function, compiler_options=QUICKLY)


def cast(tree, dtype):
    return jax.tree.map(lambda leaf: leaf.astype(dtype), tree)


# ---- bfloat16 -------------------------------------------------------------------------------------------------------

LAYERS = {name: SHAPES[name] for name in ("query", "stacked", "embed", "conv")}
LEFT_OUT = tuple(SHAPES.keys() - LAYERS)
INPUTS = tuple(random_like(shape, 70 + index, 1.0) for index, shape in enumerate(((2, 3, 4), (2, 3, 6), (2, 4, 4, 1))))
# Its entries have so few digits that some are equally large, of which one method warns where it has to order them.
many_equal = pytest.mark.filterwarnings("ignore:entries of .* are equally large")


def with_feedforward(row, *names):
    """The row with other modules of the kind that one method treats in its own way."""
    own = {"feedforward_modules": names} if "feedforward_modules" in row.options else {}
    return dataclasses.replace(row, options={**row.options, **own})


def fresh_narrow(row):
    row = with_feedforward(row, "conv")
    return in_training(fresh(row, *LEFT_OUT, params=narrow_base()), row)


def apart(params, ids, x, wide, image):
    """A layer of each kind by itself, so that what one of them rounds is not the input of another."""
    numbers = ("NHWC", "HWIO", "NHWC")
    kernels = params["stacked"]["kernel"]
    return {
        "embed": params["embed"]["embedding"][ids],
        "query": x @ params["query"]["kernel"] + params["query"]["bias"],
        "stacked": jnp.einsum("bti,sio->bsto", wide, kernels),
        "conv": jax.lax.conv_general_dilated(
            image, params["conv"]["kernel"], (1, 1), "SAME", dimension_numbers=numbers
        ),
    }


@functools.cache
def narrow_base():
    return cast(random_like(LAYERS, 7), jnp.bfloat16)


@many_equal
@over_methods
def test_a_bfloat16_model_stays_one(row):
    wrapped = randomised(fresh_narrow(row))
    narrow = cast(INPUTS, jnp.bfloat16)
    exact = dataclasses.replace(wrapped, base=cast(wrapped.base, jnp.float32))

    def both(wrapped, exact):
        return with_gradient(apart)(wrapped, IDS, *narrow), jpeft.lift(apart)(exact, IDS, *cast(narrow, jnp.float32))

    (got, gradient), want = compiled(both)(wrapped, exact)
    assert {leaf.dtype for leaf in jax.tree.leaves(gradient) if leaf.shape} == {jnp.dtype(jnp.float32)}
    for path in want:
        # What is rounded on the way, a few times and to half an epsilon each, is no larger than this.
        scale = 4 * float(jnp.finfo(jnp.bfloat16).eps) * jnp.abs(want[path]).max()
        assert got[path].dtype == jnp.bfloat16
        np.testing.assert_allclose(got[path].astype(jnp.float32), want[path], rtol=0, atol=scale, err_msg=path)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(gradient))


@many_equal
@over_methods
def test_a_bfloat16_adapter_of_a_bfloat16_model(row):
    wrapped = fresh_narrow(row)
    adapter = wrapped.adapters["default"]
    weights, shared = jax.tree.map(
        lambda leaf: leaf.astype(jnp.bfloat16) if leaf.dtype == jnp.float32 else leaf, (adapter.weights, adapter.shared)
    )
    wrapped = dataclasses.replace(
        wrapped, adapters={"default": dataclasses.replace(adapter, weights=weights, shared=shared)}
    )
    outputs, gradient = jax.eval_shape(with_gradient(apart), wrapped, IDS, *cast(INPUTS, jnp.bfloat16))
    assert {leaf.dtype for leaf in jax.tree.leaves(outputs)} == {jnp.dtype(jnp.bfloat16)}
    assert {leaf.dtype for leaf in jax.tree.leaves(gradient) if leaf.shape} == {jnp.dtype(jnp.bfloat16)}


# ---- populations, stacks, meshes, quantised bases -------------------------------------------------------------------

X = random_like((2, 5, 4), 50, 1.0)


def codes(shape, seed):
    """int8, in each column of other sizes, and both signs."""
    draw = np.random.default_rng(seed)
    *stack, rows, columns = shape
    found = [draw.permutation(np.arange(1, 128))[:rows] for _ in range(int(np.prod(stack)) * columns)]
    found = np.reshape(found, (*stack, columns, rows)).swapaxes(-1, -2)
    return jnp.asarray(found * draw.choice([-1, 1], shape), jnp.int8)


@functools.cache
def quantised_base():
    def layer(seed, *shape):
        scale = jnp.asarray(np.random.default_rng(seed + 1).uniform(0.004, 0.01, shape[:-2] + shape[-1:]), jnp.float32)
        return {"kernel": codes(shape, seed), "scale": scale, "bias": random_like(scale.shape, seed + 2)}

    return {"query": layer(1, 4, 6), "layers": {"0:3": {"mlp": layer(4, 3, 6, 6)}}}


@functools.cache
def base():
    """What the quantised one stands for."""

    def layer(own):
        return {"kernel": dequantised(own), "bias": own["bias"]}

    quantised = quantised_base()
    return {"query": layer(quantised["query"]), "layers": {"0:3": {"mlp": layer(quantised["layers"]["0:3"]["mlp"])}}}


def dequantised(own):
    return own["kernel"].astype(jnp.float32) * own["scale"][..., None, :]


def taken_apart(tree):
    layers = tree["layers"]["0:3"]
    return {**tree, "layers": {str(n): jax.tree.map(lambda leaf, n=n: leaf[n], layers) for n in range(3)}}


def plain(own, x):
    return x @ own["kernel"] + own["bias"]


def of_quantised(own, x):
    return x @ dequantised(own) + own["bias"]


def scaled_late(own, x):
    return (x @ own["kernel"].astype(jnp.float32)) * own["scale"] + own["bias"]


def model(params, x, dense=plain):
    """A layer, and then three: a scan of those that are stacked, or one by one."""
    x = jnp.tanh(dense(params["query"], x))
    for name, layer in params["layers"].items():
        if name == "0:3":
            x, _ = jax.lax.scan(lambda c, own: (jnp.tanh(dense(own["mlp"], c)), None), x, layer)
        else:
            x = jnp.tanh(dense(layer["mlp"], x))
    return x


def wrapped_in(params, row):
    options = with_feedforward(row, "mlp").options
    config = row.config(**{**options, "target_modules": ["query", "mlp"]})
    return in_context(jpeft.wrap(params, config, rng=jax.random.key(3)), row)


def member(row, seed):
    """Random values, but for what follows from the weights."""
    wrapped = wrapped_in(base(), row)
    adapter = wrapped.adapters["default"]
    weights, shared = random_like(adapter.weights, seed), random_like(adapter.shared, seed + 200)
    adapter = dataclasses.replace(adapter, weights=weights, shared=shared)
    return with_derived(dataclasses.replace(wrapped, adapters={"default": adapter}))


ROWS = {row.name: row for row in METHODS}


@functools.cache
def alone(name):
    """Two members, and for each of them its result and gradient: what all that follows is compared with."""
    members = [member(ROWS[name], seed) for seed in (100, 500)]
    one = compiled(with_gradient(model))
    return members, [one(own, X) for own in members]


@over_methods
def test_a_population_is_its_members(row):
    members, want = alone(row.name)
    population = jpeft.stack_adapters(members)
    together = compiled(jax.vmap(with_gradient(model), in_axes=(jpeft.population_axes(population), None)))
    got = together(population, X)
    assert_close(got, jax.tree.map(lambda *own: jnp.stack(own), *want), 1e-4)


@over_methods
def test_a_stack_is_its_layers(row):
    (stacked, _), ((want, _), _) = alone(row.name)
    single = wrapped_in(taken_apart(base()), row)
    own, template = stacked.adapters["default"], single.adapters["default"]
    weights = of_layers(own.weights)
    shapes = jax.tree.map(jnp.shape, (weights, own.shared))
    assert shapes == jax.tree.map(jnp.shape, (template.weights, template.shared))
    adapter = dataclasses.replace(template, weights=weights, shared=own.shared)
    got = compiled(jpeft.lift(model))(dataclasses.replace(single, adapters={"default": adapter}), X)
    assert_close(got, want, 1e-4)


@over_methods
def test_a_sharded_base_gives_the_same(row):
    (wrapped, _), ((want, _), _) = alone(row.name)
    mesh = jax.make_mesh((2,), ("model",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    specs = {
        "query": {"kernel": P(None, "model"), "bias": P("model")},
        "layers": {"0:3": {"mlp": {"kernel": P(None, "model", None), "bias": P()}}},
    }
    everywhere = jax.tree.map(lambda leaf: jax.device_put(leaf, NamedSharding(mesh, P())), wrapped)
    parts = jax.tree.map(lambda leaf, spec: jax.device_put(leaf, NamedSharding(mesh, spec)), wrapped.base, specs)
    got = compiled(jpeft.lift(model))(dataclasses.replace(everywhere, base=parts), X)
    assert_close(np.asarray(got), np.asarray(want), 1e-4)


@over_methods
def test_the_adapter_of_a_quantised_base_acts_on_what_its_codes_stand_for(row):
    (wrapped, _), ((want, _), _) = alone(row.name)
    quantised = dataclasses.replace(wrapped, base=quantised_base())
    in_time, too_late = (jpeft.lift(functools.partial(model, dense=dense)) for dense in (of_quantised, scaled_late))
    method = method_of(wrapped.adapters["default"].config)
    if method.changes_bias and method.needs_base:
        with pytest.raises(ValueError, match=r"bias of '.*' depends on the weight, .* is quantised: its dtype is int8"):
            jax.eval_shape(in_time, quantised, X)
        return
    assert_close(compiled(in_time)(quantised, X), want, 1e-4)
    with pytest.raises(ValueError, match=r"'query.kernel' is quantised and used by dot_general before its scale"):
        jax.eval_shape(too_late, quantised, X)


@over_methods
def test_what_begins_with_the_weight_does_not_begin_with_codes(row):
    if row.reads:
        with pytest.raises(
            ValueError, match=r"reads the weight, but '.*kernel' is quantised: its dtype is int8; expected"
        ):
            wrapped_in(quantised_base(), row)
        return
    ours, theirs = (wrapped_in(params, row).adapters["default"] for params in (quantised_base(), base()))
    for first, second in ((ours.weights, theirs.weights), (ours.shared, theirs.shared)):
        assert_same_arrays(first, second)
