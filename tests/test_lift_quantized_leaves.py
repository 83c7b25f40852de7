"""Lifted functions on quantised leaves: what they give on the dequantised tree, from codes alone."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import jpeft
from tests.cases import METHODS, GainConfig
from tests.harness import QUICKLY, assert_close, random_like

pytestmark = [
    pytest.mark.usefixtures("x64"),
    pytest.mark.filterwarnings("ignore:the function uses no weight of"),
]

# Scales are float32, in which a program may round products as it likes; everything else is in float64.
ROUNDING = 2e-6
STACK = "0:3"


@jax.custom_vjp
def ruled(x, w):
    return jnp.tanh(x @ w)


def ruled_backwards(saved, cotangent):
    x, w = saved
    slope = cotangent * (1 - jnp.tanh(x @ w) ** 2)
    return slope @ w.T, x.T @ slope


ruled.defvjp(lambda x, w: (ruled(x, w), (x, w)), ruled_backwards)


def kernel(p):
    return p["dense"]["kernel"]


def stack(p):
    return p["layers"][STACK]["query"]["kernel"]


def scanned(x, stacked, layer=lambda x, w: jnp.tanh(x @ w), **options):
    return lax.scan(lambda x, w: (layer(x, w), None), x, stacked, **options)[0]


def looped(p, x):
    return lax.while_loop(
        lambda state: state[0] < 2, lambda state: (state[0] + 1, jnp.tanh(state[1] @ kernel(p)), state[2]), (0, x, x)
    )[1]


def picked(p, x):
    return jnp.einsum("bi,bio->bo", x, stack(p)[jnp.argmax(x, -1) % 3])


def first(x):
    return jnp.argmax(x[0]) % 3


USES = {
    "a product": lambda p, x: x @ kernel(p),
    "the transposed weight": lambda p, x: x @ kernel(p).T,
    "casts": lambda p, x: (x.astype(jnp.bfloat16) @ kernel(p).astype(jnp.bfloat16)).astype(x.dtype),
    "less precision": lambda p, x: x @ lax.reduce_precision(kernel(p), 8, 7),
    "a scan": lambda p, x: scanned(x, stack(p)),
    "a scan backwards, unrolled": lambda p, x: scanned(x, stack(p), reverse=True, unroll=2),
    "a scan with remat": lambda p, x: scanned(x, stack(p), jax.checkpoint(lambda x, w: jnp.tanh(x @ w))),
    "a stack that is cast": lambda p, x: scanned(x.astype(jnp.float32), stack(p).astype(jnp.float32)),
    "a stack along another axis": lambda p, x: scanned(x, jnp.moveaxis(jnp.moveaxis(stack(p), 0, 1), 1, 0)),
    "a stack in two parts": lambda p, x: jax.vmap(scanned, (None, 0))(x, stack(p).reshape(3, 1, 8, 8)).sum(0),
    "one layer": lambda p, x: x @ stack(p)[1] + x @ stack(p)[-1],
    "a layer at a traced index": lambda p, x: x @ lax.dynamic_index_in_dim(stack(p), first(x), keepdims=False),
    "layers chosen by rows": picked,
    "unstacked": lambda p, x: sum(x @ own for own in stack(p)),
    "stacked anew": lambda p, x: scanned(x, jnp.stack([stack(p)[0], stack(p)[2]])),
    "joined anew": lambda p, x: scanned(x, jnp.concatenate([stack(p)[:1], stack(p)[2:]])),
    "heads": lambda p, x: jnp.einsum("bi,iho->bho", x, kernel(p).reshape(8, 2, 4)),
    "groups of inputs": lambda p, x: jnp.einsum("bgi,gio->bo", x.reshape(-1, 2, 4), kernel(p).reshape(2, 4, 8)),
    "groups less than a block": lambda p, x: jnp.einsum("bgi,gio->bo", x.reshape(-1, 4, 2), kernel(p).reshape(4, 2, 8)),
    "groups across axes": lambda p, x: jnp.einsum("bi,gio->bgo", x[:, :4], kernel(p).reshape(2, 4, 8)),
    "some outputs": lambda p, x: x @ kernel(p)[:, 1:6:2],
    "whole blocks": lambda p, x: x[:, 4:] @ kernel(p)[4:],
    "parts of blocks": lambda p, x: x[:, 1:5] @ kernel(p)[1:5],
    "split": lambda p, x: sum(x @ own for own in jnp.split(kernel(p), 2, axis=1)),
    "repeated": lambda p, x: jnp.einsum("bi,bio->bo", x, jnp.broadcast_to(kernel(p), (4, 8, 8))),
    "a choice": lambda p, x: lax.cond(x.sum() > 0, lambda w: x @ w, lambda w: -(x @ w), kernel(p)),
    "a carried weight": lambda p, x: lax.fori_loop(0, 2, lambda i, c: (jnp.tanh(c[0] @ c[1]), c[1]), (x, kernel(p)))[0],
    "a rule of its own": lambda p, x: ruled(x, kernel(p)),
    "rules in a scan": lambda p, x: scanned(x, stack(p), ruled),
    "a barrier": lambda p, x: x @ lax.optimization_barrier(kernel(p)),
    "a name": lambda p, x: x @ checkpoint_name(kernel(p), "weight"),
    "a jitted function": lambda p, x: jax.jit(jnp.matmul)(x, kernel(p)),
    "rows mapped": lambda p, x: jax.vmap(lambda row: row @ kernel(p))(x),
    "layers mapped": lambda p, x: jax.vmap(lambda w: x @ w)(stack(p)),
    "used whole": lambda p, x: x @ (kernel(p) / jnp.linalg.norm(kernel(p))),
    "returned": lambda p, x: (kernel(p), x @ stack(p)[0]),
    "not adapted": lambda p, x: x @ p["plain"]["kernel"] + p["plain"]["bias"],
}

OTHERS = {
    "a lookup": ("vo", (6, 8), lambda w, x: w[jnp.argmax(x, -1) % 6] + x),
    "a convolution": (".io", (3, 8, 6), lambda w, x: lax.conv_general_dilated(
        x[None], w, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
    )),
    "experts": ("bio", (2, 8, 6), lambda w, x: lax.ragged_dot(x, w, jnp.array([1, 3]))),
    "several axes": ("ioo", (8, 2, 3), lambda w, x: jnp.einsum("bi,iho->bho", x, w)),
    "several inputs": ("iio", (2, 4, 6), lambda w, x: jnp.einsum("bhi,hio->bo", x.reshape(-1, 2, 4), w)),
    "a stack within": ("ibo", (8, 3, 6), lambda w, x: scanned(
        x[:, :6] @ jnp.eye(6, 8), jnp.moveaxis(w, 1, 0), lambda x, w: jnp.tanh(x @ w) @ jnp.eye(6, 8)
    )),
}  # fmt: skip

X = np.random.default_rng(3).normal(size=(4, 8))


def tree():
    shapes = {
        "dense": {"kernel": (8, 8)},
        "plain": {"kernel": (8, 8), "bias": (8,)},
        "layers": {STACK: {"query": {"kernel": (3, 8, 8)}}},
    }
    return random_like(shapes, 0)


def adapted(params, config, **layouts):
    # Made of shapes, as initial values are not what is tested.
    wrapped = jpeft.wrap(jax.eval_shape(lambda p: p, params), config, layouts=layouts, dtype=jnp.float64)
    return dataclasses.replace(wrapped, base=params, adapters=random_like(wrapped.adapters, 50))


def lora(**options):
    return jpeft.LoraConfig(r=2, target_modules=["dense", "query"], **options)


def compared(function, quantised, args=(X,)):
    """(outputs and gradients on codes, the same on the dense weights)."""
    plain = dataclasses.replace(quantised, base=jpeft.dequantize(quantised.base))

    def results(wrapped, own, call):
        def loss(wrapped, own):
            outputs = call(wrapped, own)
            return sum(jnp.sin(leaf).sum().astype(float) for leaf in jax.tree.leaves(outputs)), outputs

        def of_both(wrapped):
            (_, outputs), by_input = jax.value_and_grad(lambda x: loss(wrapped, x), has_aux=True)(own)
            return loss(wrapped, own)[0], (outputs, by_input)

        (_, outputs), gradient = jpeft.value_and_grad(of_both, has_aux=True)(wrapped)
        return outputs, gradient.adapters

    def both(quantised, plain, own):
        merged = lambda wrapped, x: function(jpeft.merge(wrapped), x)  # noqa: E731
        return results(quantised, own, jpeft.lift(function)), results(plain, own, merged)

    return jax.jit(both, compiler_options=QUICKLY)(quantised, plain, *args)


# In few programs: compiling them is what takes time.
GROUPS = [list(USES)[start::8] for start in range(8)]
NARROW = {"casts", "less precision"}
"""The base alone goes through what makes it narrower, the adapter does not."""


@pytest.mark.parametrize("names", GROUPS, ids=[", ".join(group) for group in GROUPS])
def test_a_use_of_codes_is_that_of_the_dense_weight(names):
    own = adapted(jpeft.quantize(tree(), "nf4", block=4), lora())
    (got, *by_adapter), (want, *of_dense) = compared(lambda p, x: {name: USES[name](p, x) for name in names}, own)
    narrow = NARROW & set(names)
    for name in names:
        assert_close(got[0][name], want[0][name], 4e-2 if name in NARROW else ROUNDING)
    assert_close((got[1], by_adapter), (want[1], of_dense), 0.2 if narrow else ROUNDING)


@pytest.mark.parametrize("format", ["int8", "int4", "fp8"])
def test_every_format_is_walked(format):
    def function(p, x):
        return scanned(x @ kernel(p), stack(p)) + USES["some outputs"](p, x).sum()

    quantised = jpeft.quantize(tree(), format, block=4, double=format == "int8")
    assert_close(*compared(function, adapted(quantised, lora())), ROUNDING)


@pytest.mark.parametrize(("layout", "shape", "use"), OTHERS.values(), ids=OTHERS)
@pytest.mark.parametrize("config", [jpeft.LoraConfig, GainConfig])
def test_every_kind_of_module(config, layout, shape, use):
    if config is GainConfig and layout == "bio":
        use = functools.partial(jnp.einsum, "bio,ti->bto")
    params = jpeft.quantize(
        {"m": {"kernel": random_like(shape, 7)}}, "nf4", block=4 if layout[-2:] != "vo" else 2, include=["m"],
        layouts={"m": layout},
    )  # fmt: skip
    own = adapted(params, config(target_modules=["m"]), m=layout)
    assert_close(*compared(lambda p, x: use(p["m"]["kernel"], x), own), ROUNDING)


ROWS = [row for row in METHODS if row.mergeable and (row.thorough or row.name in
        ("dora", "hira", "oft", "vera", "kasa", "delora", "road", "miss"))]  # fmt: skip


@pytest.mark.parametrize("row", ROWS, ids=[row.name for row in ROWS])
def test_a_method_on_codes_is_that_on_the_dense_weight(row):
    """What it begins from, what it gives and how it trains."""
    base = {"query": {"kernel": random_like((8, 8), 1), "bias": random_like((8,), 2)}}
    codes = jpeft.quantize(base, "nf4", block=4)
    config = row.config(**{"target_modules": ["query"], **row.options})
    begun = [jpeft.wrap(own, config, dtype=jnp.float64).adapters for own in (codes, jpeft.dequantize(codes))]
    assert_close(*begun, 1e-5)
    moved = jax.tree.map(lambda a: a + 0.1 * jnp.ones_like(a) if jnp.issubdtype(a.dtype, jnp.floating) else a, begun[0])
    own = dataclasses.replace(jpeft.wrap(codes, config, dtype=jnp.float64), adapters=moved)

    def function(p, x):
        return x @ p["query"]["kernel"] + p["query"]["bias"]

    assert_close(*compared(function, own), 1e-5)


def test_without_an_adapter():
    quantised = jpeft.quantize(tree(), "nf4", block=4)
    off = jpeft.disable_adapters(jpeft.wrap(quantised, lora()))
    function = jax.jit(jpeft.lift(USES["a scan"]))
    want = USES["a scan"](jpeft.dequantize(quantised), X)
    for params in (quantised, off):
        np.testing.assert_allclose(jpeft.lift(looped)(params, X), looped(jpeft.dequantize(quantised), X), rtol=1e-6)
        np.testing.assert_allclose(function(params, X), want, rtol=1e-6, atol=1e-6)
    assert jpeft.infer_layouts(USES["a product"], quantised, X)["dense.kernel"] == "io"


def test_rows_of_a_batch_with_adapters_of_their_own():
    quantised = jpeft.quantize(tree(), "nf4", block=4)
    wrapped = jpeft.wrap(adapted(quantised, lora()), lora(), adapter_name="other")
    mixed = jpeft.with_context(jpeft.mixed_batch(wrapped), adapter_indices=[0, -1, 1, 0])
    got = jpeft.lift(USES["a product"])(mixed, X)
    one = jpeft.lift(USES["a product"])
    np.testing.assert_allclose(got[0], one(wrapped, X)[0], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(got[1], (X @ kernel(jpeft.dequantize(quantised)))[1], rtol=1e-6, atol=1e-6)


def test_derivatives_forwards():
    """Of the product with a quantised weight against differences of it."""
    own = adapted(jpeft.quantize(tree(), "nf4", block=4), lora())
    value = jax.jit(jpeft.lift(USES["a scan"]))
    direction, step = np.random.default_rng(5).normal(size=X.shape), 1e-5
    _, got = jax.jvp(lambda x: value(own, x), (jnp.asarray(X),), (jnp.asarray(direction),))
    want = (value(own, X + step * direction) - value(own, X - step * direction)) / (2 * step)
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-8)


def shapes_in(jaxpr):
    """The shape and dtype of every array that a program makes, bodies of loops included."""
    found = set()
    for equation in jaxpr.eqns:
        found |= {(tuple(v.aval.shape), str(v.aval.dtype)) for v in equation.outvars}
        for value in jax.tree.leaves(tuple(equation.params.values()), is_leaf=lambda v: hasattr(v, "eqns")):
            inner = getattr(value, "jaxpr", value)
            found |= shapes_in(inner) if hasattr(inner, "eqns") else set()
    return found


@pytest.mark.parametrize("config", [lora(), GainConfig(target_modules=["dense", "query"])], ids=["factors", "general"])
def test_a_stack_is_never_dense(config):
    """Neither forwards nor as what a training step keeps for its backward pass: only one layer is, for the moment."""
    own = adapted(jpeft.quantize(tree(), "nf4", block=4), config)
    for use in ("a scan", "a scan with remat", "a stack that is cast", "a stack along another axis", "one layer"):

        def loss(wrapped, x, use=use):
            return jnp.sin(jpeft.lift(USES[use])(wrapped, x)).sum()

        step = jax.make_jaxpr(jpeft.value_and_grad(loss))(own, X)
        floating = {shape for shape, dtype in shapes_in(step.jaxpr) if dtype.startswith(("float", "bfloat"))}
        # Rows, factors and scales of all layers are smaller than a stack of weights, however its axes stand.
        dense = {shape for shape in floating if math.prod(shape) >= 3 * 64}
        assert not dense, (use, dense)


def test_the_backward_pass_keeps_codes():
    own = adapted(jpeft.quantize(tree(), "nf4", block=4), lora())

    def value(x):
        return jnp.sin(jpeft.lift(USES["a product"])(own, x) @ jnp.ones((8, 2)))

    kept = jax.tree.leaves(jax.vjp(value, jnp.asarray(X))[1])
    shapes = {(array.shape, str(array.dtype)) for array in kept}
    assert ((8, 8), "uint4") in shapes
    assert not {shape for shape, dtype in shapes if shape == (8, 8) and dtype.startswith("float")}


def test_memory_of_a_step_is_that_of_the_dense_weights():
    """In the compiled program: beside its arguments a step on codes takes one layer more at most, not the stack."""
    params = {"layers": {"0:8": {"query": {"kernel": jax.ShapeDtypeStruct((8, 64, 64), jnp.float32)}}}}

    def temporaries(base):
        own = jpeft.wrap(base, jpeft.LoraConfig(r=2, target_modules=["query"]))
        loss = jpeft.lift(lambda p, x: scanned(x, p["layers"]["0:8"]["query"]["kernel"]).sum())
        step = jax.jit(jpeft.value_and_grad(loss))
        compiled = step.lower(own, jax.ShapeDtypeStruct((4, 64), jnp.float32)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    dense, codes = temporaries(params), temporaries(jpeft.quantize(params, "int8"))
    layer = 64 * 64 * 4
    assert codes <= dense + 2 * layer < dense + 8 * layer


SPECS = {"dense": P("data", "model"), "query": P(None, "data", "model")}


@pytest.mark.parametrize(
    ("kind", "gather"),
    [(AxisType.Auto, ()), (AxisType.Auto, ("data",)), (AxisType.Explicit, ("data",))],
    ids=["auto", "auto, gathered as codes", "explicit"],
)
@pytest.mark.parametrize("config", [jpeft.LoraConfig, GainConfig])
def test_on_a_mesh(kind, gather, config):
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(kind, kind), devices=jax.devices()[:4])
    params = random_like({"dense": {"kernel": (8, 8)}, "layers": {STACK: {"query": {"kernel": (3, 8, 8)}}}}, 1)
    placed = {
        "dense": {"kernel": jax.device_put(kernel(params), NamedSharding(mesh, SPECS["dense"]))},
        "layers": {STACK: {"query": {"kernel": jax.device_put(stack(params), NamedSharding(mesh, SPECS["query"]))}}},
    }
    one_device = jpeft.quantize(params, "nf4", block=4)
    quantised = jpeft.quantize(placed, "nf4", block=4, gather=gather)
    assert kernel(quantised).array.qvalue.sharding.spec == SPECS["dense"]
    assert stack(quantised).array.scale.qvalue.sharding.spec == SPECS["query"]
    assert_close(*(jax.tree.leaves(jax.device_get(tree)) for tree in (quantised, one_device)), 1e-6)
    named = config(target_modules=["dense", "query"])

    def function(p, x, out=None):
        options = {} if out is None else {"out_sharding": out}
        x = jnp.einsum("bi,io->bo", x, kernel(p), **options)
        return scanned(x, stack(p), lambda x, w: jnp.tanh(jnp.einsum("bi,io->bo", x, w, **options)))

    want = jax.jit(jpeft.lift(function), compiler_options=QUICKLY)(adapted(one_device, named), X)
    with jax.set_mesh(mesh):
        own = dataclasses.replace(adapted(one_device, named), base=quantised)
        out = P("data", None) if kind == AxisType.Explicit else None
        x = jax.device_put(jnp.asarray(X), NamedSharding(mesh, P("data", None)))

        def loss(own, x):
            y = jpeft.lift(function)(own, x, out)
            return jnp.sin(y).sum(), y

        (_, got), gradient = jax.jit(jpeft.value_and_grad(loss, has_aux=True), compiler_options=QUICKLY)(own, x)
        merged = jpeft.merge(own)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(gradient.adapters))
    assert kernel(merged).sharding.spec == SPECS["dense"]
    np.testing.assert_allclose(kernel(merged), kernel(jpeft.merge(adapted(one_device, named))), rtol=1e-5, atol=1e-6)


VIEWED = {
    "as it is": lambda w, x: x @ w,
    "transposed": lambda w, x: x @ w.T,
    "with axes more": lambda w, x: x @ jnp.broadcast_to(w, (1, 2, 8, 8))[0, 1],
    "in parts": lambda w, x: jnp.einsum("bi,ijo->bo", x, w.reshape(8, 2, 4)),
}


@pytest.mark.parametrize("use", VIEWED.values(), ids=VIEWED)
@pytest.mark.parametrize("place", ["its mesh", "another mesh", "one device", "its mesh, mapped"])
def test_codes_are_gathered_on_their_own_mesh_alone(place, use):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    weight = random_like((8, 8), 1)
    placed = jax.device_put(weight, NamedSharding(mesh, P("data")))
    leaf = jpeft.quantize({"dense": {"kernel": placed}}, "int8", gather=("data",))["dense"]["kernel"]
    assert leaf.gather == P(None, None)
    other = jax.make_mesh((4,), ("other",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    moved = {"another mesh": NamedSharding(other, P()), "one device": jax.devices()[0]}
    leaf = jax.device_put(leaf, moved[place]) if place in moved else leaf
    x = jnp.stack([jnp.asarray(X)] * 2)
    call = jpeft.lift(lambda p, x: use(p["w"], x))
    mapped = jax.vmap(call, in_axes=(None, 0)) if place.endswith("mapped") else lambda p, x: call(p, x[0])
    got, want = jax.jit(mapped)({"w": leaf}, x), use(jax.device_get(jpeft.dequantize(leaf)), jnp.asarray(X))
    np.testing.assert_allclose(got, jnp.broadcast_to(want, got.shape), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("devices", [2, 4], ids=["whole blocks", "blocks cut up"])
@pytest.mark.parametrize("spec", [P(None, "data"), P("data", None)], ids=["outputs", "inputs"])
def test_in_a_shard_map(spec, devices):
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])
    own = adapted(jpeft.quantize(tree(), "nf4", block=4), lora())
    inputs = spec == P("data", None)

    def local(x, w):
        return lax.psum(x @ w, "data") if inputs else x @ w

    def function(p, x):
        rows, out = (P(None, "data"), P()) if inputs else (P(), P(None, "data"))
        return jax.shard_map(local, mesh=mesh, in_specs=(rows, spec), out_specs=out)(x, kernel(p))

    got = jax.jit(jpeft.lift(function), compiler_options=QUICKLY)(own, X)
    np.testing.assert_allclose(got, X @ kernel(jpeft.merge(own)), rtol=1e-5, atol=1e-6)
