"""Quantised trees: codes and scales against numpy, what is quantised, what it takes, and what is refused."""

import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import qwix
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import jpeft
from jpeft._formats import encoded, plan_of
from jpeft._quantized import is_quantized
from tests.harness import random_like

# As the paper prints it (appendix E).
NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip
# The numbers that codes stand for before they are scaled, and what the largest of a block becomes.
VALUES = {
    "nf4": (np.asarray(NF4), 1.0),
    "int4": (np.arange(-8.0, 8), 7.5),
    "int8": (np.arange(-128.0, 128), 127.5),
    "fp8": (np.sort(np.unique([float(np.uint8(code).view(jnp.float8_e4m3fn)) for code in range(256)
                               if np.isfinite(float(np.uint8(code).view(jnp.float8_e4m3fn)))])), 448.0),
}  # fmt: skip
KINDS = {
    "linear": ("io", (12, 10), (0,)),
    "heads": ("ioo", (12, 2, 5), (0,)),
    "heads in": ("ioi", (3, 10, 4), (2, 0)),
    "layers and heads": ("iboo", (12, 3, 2, 5), (0,)),
    "experts": ("bio", (3, 12, 10), (1,)),
    "a table": ("vo", (6, 12), (1,)),
    "a convolution": (".io", (3, 12, 10), (1,)),
}


def spread(scale, shape):
    """Scales, one a block, to an array of the weight's shape."""
    for axis, size in enumerate(shape):
        scale = np.repeat(scale, size // scale.shape[axis], axis)
    return scale


def numbers(array):
    return np.asarray(array).astype(np.float64)


def scale_of(leaf):
    """The scales of a leaf in float64, by the definition."""
    scale = leaf.array.scale
    if not hasattr(scale, "qvalue"):
        return numbers(scale)
    inner = numbers(scale.qvalue) * spread(numbers(scale.scale), scale.qvalue.shape)
    return inner + spread(numbers(leaf.offset), inner.shape)


def by_definition(leaf, format):
    codes = numbers(leaf.array.qvalue)
    values = np.asarray(NF4)[codes.astype(int)] if format == "nf4" else codes
    return values * spread(scale_of(leaf), leaf.shape)


def quantised(format, kind, **options):
    layout, shape, _ = KINDS[kind]
    params = {"m": {"kernel": random_like(shape, 1, 1.0)}}
    options = {"block": 4, "include": ["m"], "layouts": {"m": layout}, **options}
    return params["m"]["kernel"], jpeft.quantize(params, format, **options)["m"]["kernel"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("format", VALUES)
def test_codes_are_the_nearest_and_the_weight_is_what_they_say(format, kind):
    weight, leaf = quantised(format, kind, double=False)
    _, shape, axes = KINDS[kind]
    assert leaf.shape == shape and leaf.dtype == weight.dtype
    left = 4
    counts = [*shape]
    for axis in axes:  # the last input axis first, until a block has four numbers
        size = min(left, shape[axis])
        counts[axis], left = shape[axis] // size, left // size
    if kind == "a convolution":
        assert counts == [3, 3, 10]
    assert list(leaf.array.scale.shape) == counts
    table, top = VALUES[format]
    scale = spread(scale_of(leaf), shape)
    blocks = np.abs(numbers(weight)).reshape([n for s, c in zip(shape, counts, strict=True) for n in (c, s // c)])
    largest = blocks.max(tuple(range(1, 2 * len(shape), 2)))
    np.testing.assert_allclose(scale_of(leaf), largest / top, rtol=1e-6)
    got, wanted = by_definition(leaf, format), numbers(weight)
    nearest = np.abs(wanted[..., None] / scale[..., None] - table).min(-1)
    np.testing.assert_allclose(np.abs(wanted - got) / scale, nearest, atol=1e-5 * top)
    np.testing.assert_allclose(jpeft.dequantize({"m": leaf})["m"], got, rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(jpeft.dequantize({"m": leaf})["m"], qwix.dequantize(leaf.array))


@pytest.mark.parametrize("format", VALUES)
@pytest.mark.parametrize("kind", ["linear", "experts", "layers and heads"])
def test_scales_in_eight_bits(format, kind):
    layout, _, _ = KINDS[kind]
    _, single = quantised(format, kind, double=False)
    _, double = quantised(format, kind, double=True)
    np.testing.assert_array_equal(numbers(single.array.qvalue), numbers(double.array.qvalue))
    outer = double.array.scale
    stack = [size if letter == "b" else 1 for letter, size in zip(layout, double.shape, strict=True)]
    assert outer.qvalue.dtype == jnp.int8 and list(outer.scale.shape) == stack == list(double.offset.shape)
    means = numbers(single.array.scale).mean(tuple(a for a, n in enumerate(stack) if n == 1), keepdims=True)
    np.testing.assert_allclose(numbers(double.offset), means, rtol=1e-6)
    step = spread(numbers(outer.scale), outer.qvalue.shape)
    assert (np.abs(scale_of(double) - numbers(single.array.scale)) <= 0.51 * step).all()
    np.testing.assert_allclose(
        jpeft.dequantize({"m": double})["m"], by_definition(double, format), rtol=1e-5, atol=1e-6
    )


def bits(leaf):
    """Of a weight in memory, each number: arrays of four bits take half a byte in compiled programs."""
    own = [array.size * (4 if array.dtype.name in ("int4", "uint4") else 8 * array.dtype.itemsize)
           for array in jax.tree.leaves(leaf)]  # fmt: skip
    return sum(own) / leaf.size


def test_bits_a_number_by_default():
    """The paper counts 4 + 8/64 + 32/(64 256) = 4.127 of nf4."""
    params = {"m": {"kernel": jax.ShapeDtypeStruct((4096, 4096), jnp.bfloat16)}}
    found = {format: bits(jpeft.quantize(params, format)["m"]["kernel"]) for format in VALUES}
    assert found == pytest.approx({"nf4": 4.127, "int4": 4.5, "int8": 8 + 32 / 4096, "fp8": 8 + 32 / 4096}, abs=1e-3)
    compiled = jax.jit(jpeft.dequantize).lower(jpeft.quantize(params, "nf4")).compile()
    assert compiled.memory_analysis().argument_size_in_bytes == pytest.approx(4096**2 * 4.127 / 8, rel=1e-3)


MODEL = {
    "embed_tokens": {"embedding": (32, 16)},
    "layers": {
        "0:2": {
            "attn": {"q_proj": {"kernel": (2, 16, 16), "bias": (2, 16)}},
            "norm": {"scale": (2, 16)},
            "mlp": {"gate": {"kernel": (2, 16, 3)}, "experts": {"up": (2, 3, 16, 8)}},
        }
    },
    "conv": {"kernel": (3, 3, 4, 8)},
    "proj": {"kernel": (16, 100)},
    "lm_head": {"kernel": (16, 32)},
    "classifier": {"dense": {"kernel": (16, 16)}},
}
LAYOUTS = {r".*experts\.up": "bio"}
ALWAYS = {"layers.0:2.attn.q_proj.kernel", "layers.0:2.mlp.experts.up", "proj.kernel"}


def shapes(tree, dtype=jnp.float32):
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s, dtype), tree, is_leaf=lambda s: isinstance(s, tuple))


def quantised_paths(tree):
    named = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_quantized)
    return {".".join(key.key for key in path) for path, leaf in named if is_quantized(leaf)}


CHOICES = {
    "by default": ({}, ALWAYS),
    "less": ({"exclude": ["q_proj"]}, ALWAYS - {"layers.0:2.attn.q_proj.kernel"}),
    "named": ({"include": ["lm_head", "embed_tokens"]}, {"lm_head.kernel", "embed_tokens.embedding"}),
    "by a regular expression": ({"include": r"layers\..*", "exclude": r".*gate"}, ALWAYS - {"proj.kernel"}),
}


@pytest.mark.parametrize(("options", "expected"), CHOICES.values(), ids=CHOICES)
def test_what_is_quantised(options, expected):
    layouts = {**LAYOUTS, "embed_tokens": "vo"}
    assert quantised_paths(jpeft.quantize(shapes(MODEL), "nf4", layouts=layouts, **options)) == expected


def test_blocks_are_chosen_by_the_size_of_the_input():
    params = shapes({f"m{size}": {"kernel": (size, 8)} for size in (64, 100, 97, 32, 4096)})
    found = jpeft.quantize(params, "int4")
    assert {size: size // found[f"m{size}"]["kernel"].array.scale.shape[0] for size in (64, 100, 97, 32, 4096)} == {
        64: 64, 100: 50, 97: 97, 32: 32, 4096: 64
    }  # fmt: skip
    channel = jpeft.quantize(params, "int4", block="channel")
    assert channel["m4096"]["kernel"].array.scale.shape == (1, 8)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_shapes_alone_and_shards(kind):
    """Abstract trees become what concrete ones become, shardings included; no shard leaves its device."""
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(kind, kind))
    params = {"a": {"kernel": random_like((16, 24), 0)}, "b": {"kernel": random_like((8, 8), 1)}}
    specs = {"a": {"kernel": P("data", "model")}, "b": {"kernel": P(("data", "model"), None)}}
    placed = jax.tree.map(lambda array, spec: jax.device_put(array, NamedSharding(mesh, spec)), params, specs)
    of_shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), placed)
    with jax.set_mesh(mesh):
        concrete = jpeft.quantize(placed, "nf4", block=8)
        inside = jax.jit(lambda params: jpeft.quantize(params, "nf4", block=8))(placed)
    abstract = jpeft.quantize(of_shapes, "nf4", block=8)
    assert jax.tree.structure(concrete) == jax.tree.structure(abstract) == jax.tree.structure(inside)
    for own, shape in zip(jax.tree.leaves(concrete), jax.tree.leaves(abstract), strict=True):
        assert (own.shape, own.dtype) == (shape.shape, shape.dtype)
        assert own.sharding.is_equivalent_to(shape.sharding, own.ndim)
    leaf = concrete["a"]["kernel"]
    assert leaf.array.qvalue.sharding.spec == leaf.array.scale.qvalue.sharding.spec == P("data", "model")
    assert concrete["b"]["kernel"].array.scale.qvalue.sharding.spec == P(None, None)  # one block along the input
    for back in (jpeft.dequantize(concrete), jpeft.dequantize(abstract)):
        assert back["a"]["kernel"].sharding.is_equivalent_to(placed["a"]["kernel"].sharding, 2)
    one_device = jpeft.quantize(params, "nf4", block=8)
    for own, other in zip(jax.tree.leaves(inside), jax.tree.leaves(one_device), strict=True):
        np.testing.assert_allclose(numbers(own), numbers(other), rtol=1e-5, atol=1e-7)


def test_arrays_are_freed_one_by_one():
    params = random_like({"a": {"kernel": (8, 8), "bias": (8,)}, "b": {"kernel": (8, 8)}}, 0)
    kept = jpeft.quantize(params, "int8")
    jpeft.quantize(params, "int8", donate=True)
    assert params["a"]["kernel"].is_deleted() and params["b"]["kernel"].is_deleted()
    assert not params["a"]["bias"].is_deleted() and not kept["a"]["kernel"].array.qvalue.is_deleted()


def wrapped_model():
    params = random_like({"q": {"kernel": (16, 8), "bias": (8,)}, "other": {"kernel": (16, 8)}}, 0)
    wrapped = jpeft.wrap(params, jpeft.LoraConfig(r=2, target_modules=["q"], init_lora_weights=False))
    return params, wrapped


def test_a_tree_with_adapters():
    """The base is quantised before or after; adapters are the same objects, and counts those of the dense weights."""
    params, wrapped = wrapped_model()
    after = jpeft.quantize(wrapped, "nf4", block=8)
    assert after.adapters is wrapped.adapters
    before = jpeft.wrap(jpeft.quantize(params, "nf4", block=8), wrapped.adapters["default"].config)
    assert jax.tree.structure(before) == jax.tree.structure(after)
    np.testing.assert_array_equal(
        before.adapters["default"].weights["q"]["lora_B"], wrapped.adapters["default"].weights["q"]["lora_B"]
    )
    assert jpeft.count_parameters(after) == jpeft.count_parameters(wrapped)
    assert jpeft.unwrap(after) is after.base
    back = jpeft.dequantize(after)
    assert back.adapters is wrapped.adapters and back.base["q"]["kernel"].shape == (16, 8)


def test_modules_to_save_train_as_dense_copies():
    params, _ = wrapped_model()
    small = jpeft.quantize(params, "nf4", block=8)
    own = jpeft.wrap(small, jpeft.LoraConfig(r=2, target_modules=["q"], modules_to_save=["other"]))
    copy = own.adapters["default"].replaced["other.kernel"]
    np.testing.assert_array_equal(copy, jpeft.dequantize(small)["other"]["kernel"])
    np.testing.assert_array_equal(jpeft.merge(own)["other"]["kernel"], copy)
    x = random_like((3, 16), 5)
    got = jpeft.lift(lambda p, x: x @ p["other"]["kernel"] + x @ p["q"]["kernel"])(own, x)
    np.testing.assert_allclose(got, x @ copy + x @ jpeft.dequantize(small)["q"]["kernel"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("format", VALUES)
def test_merging(format):
    params, wrapped = wrapped_model()
    small = jpeft.quantize(wrapped, format, block=8)
    dense = dataclasses.replace(wrapped, base=jpeft.dequantize(small.base))
    merged, want = jpeft.merge(small), jpeft.merge(dense)
    np.testing.assert_allclose(merged["q"]["kernel"], want["q"]["kernel"], rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(merged["other"]["kernel"], want["other"]["kernel"])
    again = jpeft.merge(small, requantize=True)
    assert jax.tree.structure(again) == jax.tree.structure(small.base)
    assert again["other"]["kernel"] is small.base["other"]["kernel"]
    rounded = jpeft.quantize(want, format, block=8, include=["q"])["q"]["kernel"]
    np.testing.assert_allclose(
        jpeft.dequantize(again)["q"]["kernel"], jpeft.dequantize({"q": rounded})["q"], rtol=1e-5, atol=1e-6
    )
    abstract = jax.eval_shape(lambda wrapped: jpeft.merge(wrapped, requantize=True), small)
    assert jax.tree.structure(abstract) == jax.tree.structure(again)
    shape_only = jax.eval_shape(lambda wrapped: wrapped, small)
    assert jpeft.merge(shape_only)["q"]["kernel"].shape == (16, 8)
    assert is_quantized(jpeft.merge(shape_only, requantize=True)["q"]["kernel"])


def test_other_tables_are_kept_when_merged():
    """Codes of another table, in another order, and scales of a table of their own."""
    _, wrapped = wrapped_model()
    leaf = jpeft.quantize(wrapped.base, "nf4", block=8)["q"]["kernel"]
    table = tuple(np.roll(np.asarray(NF4), 5).tolist())
    scales = tuple(np.linspace(-1, 1, 256).tolist())
    shape = dataclasses.replace(leaf, table=table, scale_table=scales)
    own = encoded(wrapped.base["q"]["kernel"], plan_of(shape))
    assert own.array.scale.qvalue.dtype == jnp.uint8
    dense = [jpeft.dequantize({"q": each})["q"] for each in (own, leaf)]
    error, plain = (float(jnp.abs(array - wrapped.base["q"]["kernel"]).mean()) for array in dense)
    assert error < 1.05 * plain
    base = {**wrapped.base, "q": {**wrapped.base["q"], "kernel": own}}
    again = jpeft.merge(dataclasses.replace(wrapped, base=base), requantize=True)["q"]["kernel"]
    assert (again.table, again.scale_table) == (table, scales)


def test_the_training_loop():
    """As README has it, the old state donated; the codes come through it as they were."""
    _, wrapped = wrapped_model()
    own = jpeft.quantize(wrapped, "nf4", block=8)
    before = jax.device_get(own.base)
    apply = jpeft.lift(lambda p, x: x @ p["q"]["kernel"] + p["q"]["bias"] + x @ p["other"]["kernel"])
    tx = optax.masked(optax.adamw(1e-2), jpeft.trainable_mask)
    x, y = random_like((8, 16), 1, 1.0), random_like((8, 8), 2, 1.0)

    def step(wrapped, opt_state):
        loss, grads = jpeft.value_and_grad(lambda wrapped: ((apply(wrapped, x) - y) ** 2).mean())(wrapped)
        updates, opt_state = tx.update(grads, opt_state, wrapped)
        return optax.apply_updates(wrapped, updates), opt_state, loss

    step = jax.jit(step, donate_argnums=(0, 1))
    own = jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), own)
    opt_state, losses = tx.init(own), []
    with jax.numpy_dtype_promotion("standard"):  # optax asks for it
        for _ in range(20):
            own, opt_state, loss = step(own, opt_state)
            losses.append(float(loss))
    assert losses[-1] < 0.8 * losses[0]
    for left, right in zip(jax.tree.leaves(before), jax.tree.leaves(own.base), strict=True):
        np.testing.assert_array_equal(left.view(np.uint8), np.asarray(right).view(np.uint8))
    trainable, frozen = jpeft.partition(own)
    assert jax.tree.structure(jpeft.combine(trainable, frozen)) == jax.tree.structure(own)


KERNEL = {"m": {"kernel": (16, 8)}}
REFUSED = {
    "a format": (KERNEL, ("int3",), {}, "format is 'int3'; expected one of: int8, int4, nf4, fp8"),
    "a block": (KERNEL, ("nf4",), {"block": 0}, "block is 0; expected a number of 1 or more, 'channel', or None"),
    "a word": (KERNEL, ("nf4",), {"block": "row"}, "block is 'row'; expected a number"),
    "a block that does not fit": (
        {"m": {"kernel": (100, 8)}},
        ("nf4",),
        {"block": 64},
        r"block=64 does not divide the input of 'm.kernel': axis 0 of its shape \(100, 8\) has 100; expected a divisor",
    ),
    "nothing": (KERNEL, ("nf4",), {"include": ["x"]}, r"no module is selected to be quantised: include=\['x'\], .*: m"),
    "all left out": (KERNEL, ("nf4",), {"exclude": ["m"]}, r"no module is selected to be quantised: exclude=\['m'\]"),
    "a layout": ({"m": {"kernel": (4, 4, 4)}}, ("nf4",), {}, "the layout of 'm.kernel' is unknown"),
}


@pytest.mark.parametrize(("tree", "args", "options", "text"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused(tree, args, options, text):
    with pytest.raises(ValueError, match=text):
        jpeft.quantize(shapes(tree), *args, **options)


def test_leaves_that_are_no_weights_are_refused():
    integers = shapes(KERNEL, jnp.int8)
    with pytest.raises(ValueError, match="'m.kernel' has dtype int8; expected floating-point numbers of 16"):
        jpeft.quantize(integers, "nf4", include=["m"])
    small = jpeft.quantize(shapes(KERNEL), "nf4")
    with pytest.raises(ValueError, match="'m.kernel' is quantised already; expected"):
        jpeft.quantize(small, "int8", include=["m"])
    with pytest.raises(ValueError, match="no module is selected"):
        jpeft.quantize(small, "int8")


def test_mesh_axes_that_are_not_there_are_refused():
    sharding = NamedSharding(jax.make_mesh((2,), ("data",), devices=jax.devices()[:2]), P("data"))
    leaf = jax.ShapeDtypeStruct((16, 8), jnp.float32, sharding=sharding)
    with pytest.raises(
        ValueError, match=r"gather is \('fsdp',\), but 'm.kernel' is on a mesh of the axes \('data',\); ex"
    ):
        jpeft.quantize({"m": {"kernel": leaf}}, "int8", gather=("fsdp",))


def test_zero_points_are_not_chosen_again():
    params, wrapped = wrapped_model()
    leaf = jpeft.quantize(params, "int8")["q"]["kernel"]
    points = jnp.full((1, 8), 3, jnp.int8)
    moved = dataclasses.replace(leaf, array=dataclasses.replace(leaf.array, zero_point=points))
    own = dataclasses.replace(wrapped, base={**params, "q": {**params["q"], "kernel": moved}})
    got = jpeft.merge(jpeft.disable_adapters(own))["q"]["kernel"]
    np.testing.assert_allclose(got, (numbers(leaf.array.qvalue) - 3) * numbers(leaf.array.scale), rtol=1e-6)
    np.testing.assert_array_equal(got, qwix.dequantize(moved.array))
    with pytest.raises(ValueError, match="'q.kernel' is quantised with zero points, .*; expected requantize=False"):
        jpeft.merge(own, requantize=True)


def test_without_qwix(monkeypatch):
    monkeypatch.setitem(sys.modules, "qwix", None)
    with pytest.raises(ImportError, match=r"qwix is not installed; expected `pip install 'jpeft\[quantize\]'`"):
        jpeft.quantize(shapes(KERNEL), "nf4")


LOFTQ = {"long rows": (128, 6), "short rows": (16, 8), "a stack": (2, 64, 6)}


def started_by_loftq(shape, bits, **options):
    name = "0:2" if len(shape) == 3 else "q"
    params = {"layers": {name: {"q": {"kernel": random_like(shape, 1)}}}}
    config = jpeft.LoraConfig(
        r=2, target_modules=["q"], init_lora_weights="loftq", loftq_config={"loftq_bits": bits, "loftq_iter": 2}
    )
    return jpeft.initialize_lora_loftq_weights(jpeft.wrap(params, config), **options)


@pytest.mark.parametrize(("shape", "bits"), [*((shape, 4) for shape in LOFTQ.values()), ((128, 6), 2), ((24, 6), 8)])
def test_loftq_as_codes(shape, bits):
    """The numbers and the adapter of the dense form, in as many bits as they have."""
    dense, codes = (started_by_loftq(shape, bits, base=base) for base in ("dense", "quantized"))
    (leaf,) = jax.tree.leaves(codes.base, is_leaf=is_quantized)
    assert is_quantized(leaf) and leaf.array.qvalue.dtype == (jnp.int8 if bits == 8 else jnp.uint4)
    assert int(np.unique(numbers(leaf.array.qvalue)).size) <= 2**bits
    (got,), (want,) = (jax.tree.leaves(own.base) for own in (jpeft.dequantize(codes), dense))
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-7)
    for own, other in zip(jax.tree.leaves(codes.adapters), jax.tree.leaves(dense.adapters), strict=True):
        np.testing.assert_array_equal(own, other)
    x = random_like((3, shape[-2]), 4)
    function = jpeft.lift(lambda p, x: x @ jax.tree.leaves(p)[0])
    np.testing.assert_allclose(function(codes, x), function(dense, x), rtol=1e-5, atol=1e-5)


def test_loftq_as_codes_is_refused():
    with pytest.raises(ValueError, match="base is 'codes'; expected one of: dense, quantized"):
        started_by_loftq((16, 8), 4, base="codes")
    text = r"base='quantized' at 'layers.q.q': blocks of 64 of its matrix \(out, in\) = \(6, 100\), row after row"
    with pytest.raises(ValueError, match=text):
        started_by_loftq((100, 6), 4, base="quantized")
