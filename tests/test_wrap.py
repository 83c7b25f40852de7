"""Adapters put beside a tree, chosen among, merged and taken off; the engine alone, no model."""

import dataclasses
import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import jpeft
from jpeft import LoraConfig, PeftConfig, _contract
from jpeft._contract import Method, method_of, register
from jpeft._paths import fold_in_name
from jpeft._wrap import _initial

KEY = jax.random.key(7)


def kernel(seed, *shape, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


def tree(dtype=jnp.float32):
    return {
        "query": {"kernel": kernel(1, 4, 6, dtype=dtype), "bias": kernel(2, 6, dtype=dtype)},
        "value": {"kernel": kernel(3, 4, 6, dtype=dtype)},
        "norm": {"scale": jnp.ones(6, dtype), "bias": jnp.zeros(6, dtype)},
        "embed": {"embedding": kernel(4, 9, 4, dtype=dtype)},
        "head": {"kernel": kernel(5, 6, 2, dtype=dtype), "bias": kernel(6, 2, dtype=dtype)},
    }


def config(*targets, **fields):
    return LoraConfig(r=2, lora_alpha=6, target_modules=list(targets) or ["query"], **fields)


def randomized(wrapped, name="default"):
    """The same with random weights everywhere in the adapter, so that it changes the model."""
    adapter = wrapped.adapters[name]
    weights = jax.tree.map(lambda x: kernel(x.size, *x.shape, dtype=x.dtype), adapter.weights)
    return dataclasses.replace(
        wrapped, adapters={**wrapped.adapters, name: dataclasses.replace(adapter, weights=weights)}
    )


def delta(wrapped, path="query", name="default"):
    """What LoRA adds to a kernel, in float64: the formula written once more, by hand."""
    adapter = wrapped.adapters[name]
    a, b = (np.asarray(adapter.weights[path][key], np.float64) for key in ("lora_A", "lora_B"))
    return np.asarray(adapter.scaling[path], np.float64)[..., None, None] * np.swapaxes(b @ a, -1, -2)


def equal(first, second):
    return jax.tree.structure(first) == jax.tree.structure(second) and all(
        np.array_equal(x, y) and x.dtype == y.dtype
        for x, y in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True)
    )


def test_the_base_is_kept_by_reference():
    params = tree()
    wrapped = jpeft.wrap(params, config(), rng=KEY)
    assert wrapped.base is params
    assert jpeft.unwrap(wrapped) is params
    assert all(x is y for x, y in zip(jax.tree.leaves(wrapped.base), jax.tree.leaves(params), strict=True))


def test_an_adapter_has_pefts_names_and_shapes():
    adapter = jpeft.wrap(tree(), config("query", "embed"), rng=KEY).adapters["default"]
    assert jax.tree.map(jnp.shape, adapter.weights) == {
        "query": {"lora_A": (2, 4), "lora_B": (6, 2)},
        "embed": {"lora_embedding_A": (2, 9), "lora_embedding_B": (4, 2)},
    }
    assert {path: float(s) for path, s in adapter.scaling.items()} == {"embed": 3.0, "query": 3.0}
    assert adapter.replaced == adapter.shared == {}


@pytest.mark.parametrize("base", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("dtype", [None, jnp.float32, jnp.bfloat16, "float16"])
def test_adapters_have_the_dtype_asked_for(base, dtype):
    wrapped = jpeft.wrap(tree(base), config(), **({} if dtype is None else {"dtype": dtype}))
    dtypes = {array.dtype for array in jax.tree.leaves(wrapped.adapters["default"].weights)}
    assert dtypes == {jnp.dtype(jnp.float32 if dtype is None else dtype)}
    assert wrapped.adapters["default"].scaling["query"].dtype == jnp.float32


def test_initial_values_depend_on_the_key_and_the_path_alone():
    both = jpeft.wrap(tree(), config("query", "value"), rng=KEY).adapters["default"].weights
    alone = jpeft.wrap({"value": tree()["value"]}, config("value"), rng=KEY).adapters["default"].weights
    assert equal(both["value"], alone["value"])
    assert not equal(both["value"], both["query"])
    assert not equal(
        both, jpeft.wrap(tree(), config("query", "value"), rng=jax.random.key(8)).adapters["default"].weights
    )


@pytest.mark.parametrize(("rng", "same"), [(None, 0), (jax.random.PRNGKey(7), 7)])
def test_a_key_may_be_left_out_or_be_of_the_old_kind(rng, same):
    weights = jpeft.wrap(tree(), config(), rng=rng).adapters["default"].weights
    assert equal(weights, jpeft.wrap(tree(), config(), rng=jax.random.key(same)).adapters["default"].weights)


@pytest.mark.parametrize(("layout", "shape", "stack"), [("bio", (3, 4, 6), (3,)), ("bobi", (3, 6, 2, 4), (3, 2))])
def test_stacked_modules_have_values_of_their_own_per_layer(layout, shape, stack):
    wrapped = jpeft.wrap({"q": {"kernel": kernel(1, *shape)}}, config("q"), rng=KEY, layouts={"q": layout})
    adapter = wrapped.adapters["default"]
    assert jax.tree.map(jnp.shape, adapter.weights["q"]) == {"lora_A": (*stack, 2, 4), "lora_B": (*stack, 6, 2)}
    assert adapter.scaling["q"].shape == stack
    layers = adapter.weights["q"]["lora_A"].reshape(-1, 8)
    assert len(np.unique(np.asarray(layers), axis=0)) == len(layers)


@pytest.mark.parametrize(
    ("layout", "shape"), [("oi", (6, 4)), ("bio", (3, 4, 6)), ("ibo", (4, 3, 6)), ("bobi", (3, 6, 2, 4))]
)
def test_init_sees_the_canonical_weight_of_one_site(layout, shape):
    leaf = kernel(1, *shape)
    wrapped = jpeft.wrap({"q": {"kernel": leaf}}, config("q"), rng=KEY, layouts={"q": layout})
    site = wrapped.adapters["default"].sites["q"]
    method = dataclasses.replace(method_of(config()), init=lambda key, site, config, weight: {"w": weight()})
    got = _initial(KEY, leaf, site, method, config(), jnp.float32)["w"]
    letters = {"oi": "oi->io", "bio": "bio->bio", "ibo": "ibo->bio", "bobi": "boci->bcio"}[layout]
    np.testing.assert_array_equal(got, jnp.einsum(letters, leaf))


def test_integer_arrays_of_a_method_keep_their_dtype():
    def init(key, site, config, weight):
        return {"indices": jnp.arange(3), "values": jnp.ones(3)}

    wrapped = jpeft.wrap(tree(), config(), rng=KEY)
    method = dataclasses.replace(method_of(config()), init=init)
    arrays = _initial(KEY, None, wrapped.adapters["default"].sites["query"], method, config(), jnp.bfloat16)
    assert (arrays["indices"].dtype, arrays["values"].dtype) == (jnp.int32, jnp.bfloat16)


def test_the_key_of_a_site_is_the_hash_of_its_path():
    wrapped = jpeft.wrap(tree(), config(), rng=KEY)
    site, method = wrapped.adapters["default"].sites["query"], method_of(config())
    direct = method.init(fold_in_name(KEY, "query"), site, config(), lambda: None)
    assert equal(wrapped.adapters["default"].weights["query"], direct)


@pytest.mark.parametrize("key", [KEY, jax.random.PRNGKey(7), jax.random.key(7, impl="rbg")], ids=["key", "raw", "rbg"])
def test_a_key_of_a_name_is_the_key_folded_with_the_start_of_its_hash(key):
    number = int.from_bytes(hashlib.sha256(b"layers.31.query").digest()[:4], "little")
    assert number >= 2**31  # beyond what fits in a signed number
    folded = fold_in_name(key, "layers.31.query")
    assert folded.dtype == key.dtype
    assert equal(jax.random.bits(folded, (4,)), jax.random.bits(jax.random.fold_in(key, number), (4,)))


def abstract(params):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)


def test_abstract_parameters_give_an_abstract_adapter_of_the_same_shapes():
    chosen = config("query", "embed", modules_to_save=["head"], bias="all")
    concrete = jpeft.wrap(tree(), chosen, rng=KEY)
    for wrapped in (
        jpeft.wrap(abstract(tree()), chosen, rng=KEY),
        jax.eval_shape(lambda params, rng: jpeft.wrap(params, chosen, rng=rng), tree(), KEY),
    ):
        assert abstract(concrete) == wrapped
        assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(wrapped))


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"rank_pattern": {r"1\.q": 3}},
        {"alpha_pattern": {"0.q": 7}},
        {"use_dora": True},
        {"init_lora_weights": "pissa"},
    ],
    ids=str,
)
def test_an_abstract_adapter_of_layers_has_the_shapes_of_each(fields):
    sizes = {"0": (4, 6), "1": (4, 6), "2": (6, 4), "3:5": (2, 4, 6), "05": (4, 4)}
    layers = {
        number: {"q": {"kernel": kernel(1, *size)}, "k": {"kernel": kernel(2, *size)}} for number, size in sizes.items()
    }
    layers["1"]["q"]["bias"] = jnp.ones(6)
    params, chosen = {"layers": layers, "q": {"kernel": kernel(3, 8, 2)}}, config("q", "k", **fields)
    concrete = jpeft.wrap(params, chosen)
    assert abstract(concrete) == jpeft.wrap(abstract(params), chosen)


def test_layers_of_the_same_shapes_are_traced_once():
    traced = []

    def init(key, site, config, weight):
        traced.append(site.path)
        return method_of(LoraConfig()).init(key, site, config, weight)

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class CountingConfig(LoraConfig):
        pass

    register(dataclasses.replace(method_of(config()), config=CountingConfig, init=init))
    params = {"layers": {str(number): {"q": {"kernel": kernel(1, 4, 6)}} for number in range(5)}}
    jpeft.wrap(abstract(params), CountingConfig(target_modules=["q"]))
    assert traced == ["layers.0.q"]
    jpeft.wrap(abstract(params), CountingConfig(target_modules=["q"], rank_pattern={"3.q": 1}))
    assert len(traced) == 6


def test_wrap_gives_the_same_under_jit():
    chosen = config("query", "embed", modules_to_save=["head"])
    jitted = jax.jit(lambda params, rng: jpeft.wrap(params, chosen, rng=rng))(tree(), KEY)
    eager = jpeft.wrap(tree(), chosen, rng=KEY)
    assert jax.tree.structure(jitted) == jax.tree.structure(eager)
    for x, y in zip(jax.tree.leaves(jitted), jax.tree.leaves(eager), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-6)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, set()),
        ({"modules_to_save": ["head"]}, {"head.kernel", "head.bias"}),
        ({"bias": "lora_only"}, {"query.bias"}),
        ({"bias": "all"}, {"query.bias", "norm.bias", "head.bias"}),
        ({"bias": "lora_only", "modules_to_save": ["head"]}, {"query.bias", "head.kernel", "head.bias"}),
    ],
)
def test_replaced_leaves_are_real_copies(fields, expected):
    params = tree()
    replaced = jpeft.wrap(params, config(**fields), rng=KEY).adapters["default"].replaced
    assert set(replaced) == expected
    for path, copy in replaced.items():
        module, name = path.split(".")
        assert equal(copy, params[module][name])
        assert copy.unsafe_buffer_pointer() != params[module][name].unsafe_buffer_pointer()


def test_numpy_leaves_become_adapters_and_copies():
    params = jax.tree.map(np.asarray, tree())
    wrapped = jpeft.wrap(params, config(modules_to_save=["head"]), rng=KEY)
    assert isinstance(wrapped.adapters["default"].replaced["head.kernel"], jax.Array)
    assert equal(wrapped.adapters["default"].weights, jpeft.wrap(tree(), config(), rng=KEY).adapters["default"].weights)


def test_a_key_inside_a_saved_module_stays_with_the_base():
    params = {**tree(), "head": {"kernel": kernel(5, 6, 2), "rng": jax.random.key(0)}}
    assert set(jpeft.wrap(params, config(modules_to_save=["head"])).adapters["default"].replaced) == {"head.kernel"}


def test_the_first_adapter_is_active_and_later_ones_wait():
    first = jpeft.wrap(tree(), config("query"), rng=KEY)
    both = jpeft.wrap(first, config("value"), adapter_name="other", rng=KEY)
    assert (first.active, both.active, list(both.adapters)) == (("default",), ("default",), ["default", "other"])
    assert both.base is first.base
    assert both.adapters["default"] is first.adapters["default"]
    assert jpeft.wrap(jpeft.disable_adapters(first), config(), adapter_name="other").active == ()
    assert jpeft.set_adapter(both, "other").active == ("other",)
    assert jpeft.set_adapter(both, ["other", "default"]).active == ("other", "default")
    assert jpeft.disable_adapters(both).active == ()


def test_a_context_stays_when_an_adapter_is_added():
    first = jpeft.with_context(jpeft.wrap(tree(), config()), rng=KEY)
    assert jpeft.wrap(first, config("value"), adapter_name="other").context is first.context


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_merge_adds_the_adapters_change_in_float32(dtype):
    params = tree(dtype)
    wrapped = randomized(jpeft.wrap(params, config("query"), rng=KEY, dtype=dtype))
    merged = jpeft.merge(wrapped)
    expected = (np.asarray(params["query"]["kernel"], np.float64) + delta(wrapped)).astype(dtype)
    rtol = {"float32": 1e-5, "bfloat16": 2**-8, "float16": 2**-10}[jnp.dtype(dtype).name]
    np.testing.assert_allclose(
        np.asarray(merged["query"]["kernel"], np.float32), expected.astype(np.float32), rtol=rtol, atol=1e-6
    )
    assert abstract(merged) == abstract(params)
    assert equal({k: v for k, v in merged.items() if k != "query"}, {k: v for k, v in params.items() if k != "query"})
    assert merged["value"]["kernel"] is params["value"]["kernel"]


@pytest.mark.parametrize(
    ("layout", "shape", "to_canonical"),
    [
        ("io", (4, 6), "io->io"),
        ("oi", (6, 4), "oi->io"),
        ("bio", (3, 4, 6), "bio->bio"),
        ("ibo", (4, 3, 6), "ibo->bio"),
    ],
)
def test_merge_puts_a_leaf_back_in_its_own_layout(layout, shape, to_canonical):
    leaf = kernel(1, *shape)
    wrapped = randomized(jpeft.wrap({"query": {"kernel": leaf}}, config(), rng=KEY, layouts={"query": layout}))
    merged = jpeft.merge(wrapped)["query"]["kernel"]
    expected = np.einsum(to_canonical, np.asarray(leaf, np.float64)) + delta(wrapped)
    np.testing.assert_allclose(np.einsum(to_canonical, merged), expected, rtol=1e-5, atol=1e-5)
    assert merged.shape == leaf.shape


def test_merge_of_several_outputs_per_axis():
    leaf = kernel(1, 4, 3, 2, 5)
    wrapped = randomized(jpeft.wrap({"query": {"kernel": leaf}}, config(), rng=KEY, layouts={"query": "iboo"}))
    added = np.asarray(jpeft.merge(wrapped)["query"]["kernel"] - leaf)
    np.testing.assert_allclose(added, np.einsum("bio->ibo", delta(wrapped)).reshape(4, 3, 2, 5), rtol=1e-4, atol=1e-5)


def test_merge_of_a_convolution_and_a_lookup_table():
    params = {"conv": {"kernel": kernel(1, 3, 2, 4, 6)}, "embed": {"embedding": kernel(2, 9, 4)}}
    wrapped = randomized(jpeft.wrap(params, config("conv", "embed"), rng=KEY))
    merged, weights = jpeft.merge(wrapped), wrapped.adapters["default"].weights
    conv = 3 * np.einsum("rihw,or->hwio", weights["conv"]["lora_A"], weights["conv"]["lora_B"][:, :, 0, 0])
    table = 3 * np.einsum("rv,or->vo", weights["embed"]["lora_embedding_A"], weights["embed"]["lora_embedding_B"])
    np.testing.assert_allclose(merged["conv"]["kernel"] - params["conv"]["kernel"], conv, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(merged["embed"]["embedding"] - params["embed"]["embedding"], table, rtol=1e-4, atol=1e-4)


def test_merge_takes_the_adapters_in_use_or_those_named():
    wrapped = randomized(jpeft.wrap(tree(), config("query"), rng=KEY))
    wrapped = randomized(jpeft.wrap(wrapped, config("query", "value"), adapter_name="other"), "other")
    base, first, other = (
        np.asarray(tree()["query"]["kernel"]),
        delta(wrapped),
        delta(wrapped, name="other"),
    )
    for names, active, expected in [
        (None, "default", base + first),
        (None, ["default", "other"], base + first + other),
        ("other", "default", base + other),
        (["other", "default"], "default", base + first + other),
    ]:
        merged = jpeft.merge(jpeft.set_adapter(wrapped, active), adapter_names=names)
        np.testing.assert_allclose(merged["query"]["kernel"], expected, rtol=1e-5, atol=1e-5)
    assert equal(jpeft.merge(jpeft.disable_adapters(wrapped)), tree())


def test_merge_puts_replaced_leaves_in_their_place():
    wrapped = jpeft.wrap(tree(), config(modules_to_save=["head"], bias="lora_only"), rng=KEY)
    adapter = wrapped.adapters["default"]
    trained = jax.tree.map(lambda x: x + 1, adapter.replaced)
    wrapped = dataclasses.replace(wrapped, adapters={"default": dataclasses.replace(adapter, replaced=trained)})
    merged, before = jpeft.merge(wrapped), tree()
    for module, name in [("head", "kernel"), ("head", "bias"), ("query", "bias")]:
        np.testing.assert_allclose(merged[module][name], before[module][name] + 1, rtol=1e-6)
    assert merged["norm"]["bias"] is wrapped.base["norm"]["bias"]


class ScaledConfig(LoraConfig):
    pass


def scaled(p, w, b, site):
    return w * p["g"], None if b is None else b * p["g"]


@pytest.fixture
def scaling_method():
    """A method that scales a weight and its bias, as (IA)3 does."""
    method = Method(
        config=ScaledConfig,
        init=lambda key, site, config, weight: {"g": jnp.full(site.out_features, 2.0)},
        merge=scaled,
        forward=lambda p, x, base, site, context: base(x) * p["g"],
    )
    register(method)
    yield ScaledConfig
    del _contract._METHODS[ScaledConfig]


@pytest.mark.parametrize(
    ("layout", "shape", "bias_shape"),
    [("io", (4, 6), (6,)), ("bio", (3, 4, 6), (3, 6)), ("iboo", (4, 3, 2, 5), (3, 2, 5)), ("ioo", (4, 2, 5), (2, 5))],
)
def test_merge_changes_the_bias_where_the_method_does(scaling_method, layout, shape, bias_shape):
    params = {"q": {"kernel": kernel(1, *shape), "bias": kernel(2, *bias_shape)}}
    wrapped = jpeft.wrap(params, scaling_method(target_modules=["q"]), layouts={"q": layout})
    merged = jpeft.merge(wrapped)
    assert equal(merged, jax.tree.map(lambda x: 2 * x, params))


def test_merge_under_jit_and_of_abstract_trees():
    wrapped = randomized(jpeft.wrap(tree(jnp.bfloat16), config("query", modules_to_save=["head"]), rng=KEY))
    eager, jitted = jpeft.merge(wrapped), jax.jit(jpeft.merge)(wrapped)
    for x, y in zip(jax.tree.leaves(eager), jax.tree.leaves(jitted), strict=True):
        np.testing.assert_allclose(np.asarray(x, np.float32), np.asarray(y, np.float32), rtol=2**-7)
    assert jpeft.merge(abstract(wrapped)) == abstract(tree(jnp.bfloat16))
    mixed = dataclasses.replace(abstract(wrapped), base=wrapped.base)
    assert isinstance(jpeft.merge(mixed)["query"]["kernel"], jax.ShapeDtypeStruct)


def test_merge_gives_numpy_for_numpy():
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), tree())
    merged = jpeft.merge(jpeft.wrap(params, config("query", modules_to_save=["head"]), rng=KEY))
    assert {type(leaf) for leaf in jax.tree.leaves(merged)} == {np.ndarray}
    assert {leaf.dtype for leaf in jax.tree.leaves(merged)} == {np.dtype(np.float64)}


def test_a_float64_base_is_merged_in_float64():
    with jax.enable_x64(True):
        params = {"query": {"kernel": kernel(1, 4, 6).astype(jnp.float64)}}
        wrapped = randomized(jpeft.wrap(params, config(), rng=KEY))
        expected = np.asarray(params["query"]["kernel"]) + delta(wrapped)
        np.testing.assert_allclose(jpeft.merge(wrapped)["query"]["kernel"], expected, rtol=1e-14, atol=1e-14)


def mesh_of(axis_type):
    if jax.device_count() < 8:
        pytest.skip("needs 8 devices: XLA_FLAGS=--xla_force_host_platform_device_count=8")
    return jax.make_mesh((4, 2), ("a", "b"), axis_types=(axis_type,) * 2)


# Under jit with automatic axes the sharding of the result is the compiler's choice, or the caller's.
@pytest.mark.parametrize(
    ("axis_type", "merge"),
    [
        (AxisType.Auto, jpeft.merge),
        (AxisType.Explicit, jpeft.merge),
        (AxisType.Explicit, jax.jit(jpeft.merge)),
    ],
    ids=["auto", "explicit", "explicit jit"],
)
@pytest.mark.parametrize(
    ("layout", "shape", "spec"),
    [
        ("io", (8, 6), P("a", "b")),
        ("bio", (4, 8, 6), P("a", None, "b")),
        ("iboo", (8, 4, 2, 2), P(None, "a", None, "b")),
        ("iio", (2, 8, 6), P(None, "a", "b")),
    ],
)
def test_sharded_leaves_keep_their_sharding(axis_type, merge, layout, shape, spec):
    mesh = mesh_of(axis_type)
    with jax.set_mesh(mesh):
        sharding = NamedSharding(mesh, spec)
        params = {"q": {"kernel": jax.device_put(kernel(1, *shape), sharding)}}
        head = {"kernel": jax.device_put(kernel(2, 8, 2), NamedSharding(mesh, P("a", "b")))}
        chosen = config("q", modules_to_save=["head"], init_lora_weights=False)
        wrapped = jpeft.wrap({**params, "head": head}, chosen, rng=KEY, layouts={"q": layout})
        merged = merge(wrapped)["q"]["kernel"]
        assert merged.sharding.is_equivalent_to(sharding, merged.ndim)
        copy = wrapped.adapters["default"].replaced["head.kernel"]
        assert copy.sharding.is_equivalent_to(head["kernel"].sharding, 2)
    plain = jpeft.wrap(
        jax.tree.map(np.asarray, params), config("q", init_lora_weights=False), rng=KEY, layouts={"q": layout}
    )
    np.testing.assert_allclose(merged, jpeft.merge(plain)["q"]["kernel"], rtol=1e-5, atol=1e-5)


def test_abstract_leaves_keep_their_sharding():
    sharding = NamedSharding(mesh_of(AxisType.Auto), P("a", "b"))
    leaf = jax.ShapeDtypeStruct((8, 6), jnp.bfloat16, sharding=sharding)
    params = {"query": {"kernel": leaf}, "head": {"kernel": leaf}}
    wrapped = jpeft.wrap(params, config(modules_to_save=["head"]))
    assert wrapped.adapters["default"].replaced["head.kernel"].sharding == sharding
    assert jpeft.merge(wrapped) == params


def test_trees_of_flax_nnx_go_through():
    nnx = pytest.importorskip("flax.nnx")
    layer = nnx.MultiHeadAttention(2, 4, decode=False, rngs=nnx.Rngs(0))
    state = nnx.state(layer, nnx.Param)
    layouts = {"(query|key|value)": "ioo", "out": "iio"}
    wrapped = randomized(jpeft.wrap(state, config("query", "out"), layouts=layouts))
    assert wrapped.adapters["default"].sites["query"].leaf == "query.kernel"
    merged = jpeft.merge(wrapped)
    assert jax.tree.structure(merged) == jax.tree.structure(state)
    added = (merged["query"]["kernel"][...] - state["query"]["kernel"][...]).reshape(4, 4)
    np.testing.assert_allclose(added, delta(wrapped), rtol=1e-4, atol=1e-5)


def test_a_method_may_leave_the_bias_to_itself(scaling_method):
    leave = dataclasses.replace(method_of(scaling_method()), merge=lambda p, w, b, site: (2 * w, None))
    register(leave)
    params = {"q": {"kernel": kernel(1, 4, 6), "bias": kernel(2, 6)}}
    merged = jpeft.merge(jpeft.wrap(params, scaling_method(target_modules=["q"])))
    assert equal(merged["q"]["bias"], params["q"]["bias"])


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_a_safe_merge_refuses_what_is_not_finite(bad):
    params = tree()
    params["query"]["kernel"] = params["query"]["kernel"].at[1, 2].set(bad)
    wrapped = jpeft.wrap(params, config(), rng=KEY)
    with pytest.raises(ValueError, match=r"merging gives 'query.kernel' 1 entries of 24 that are not finite"):
        jpeft.merge(wrapped, safe=True)
    assert not jnp.isfinite(jpeft.merge(wrapped)["query"]["kernel"]).all()
    assert equal(jpeft.merge(jpeft.wrap(tree(), config(), rng=KEY), safe=True), tree())


@pytest.mark.parametrize(
    "call", [lambda w: jax.jit(lambda w: jpeft.merge(w, safe=True))(w), lambda w: jpeft.merge(abstract(w), safe=True)]
)
def test_a_safe_merge_needs_values(call):
    with pytest.raises(ValueError, match=r"merge\(safe=True\) looks at values, but 'query.kernel' is abstract"):
        call(jpeft.wrap(tree(), config(), rng=KEY))


def test_an_integer_weight_cannot_be_merged_into():
    wrapped = jpeft.wrap({"query": {"kernel": jnp.ones((4, 6), jnp.int8)}}, config(), rng=KEY)
    with pytest.raises(ValueError, match="cannot merge into 'query.kernel': its dtype is int8"):
        jpeft.merge(wrapped)


WRAPPED = jpeft.wrap(tree(), config(modules_to_save=["head"]), rng=KEY)
TWO_HEADS = jpeft.wrap(WRAPPED, config("value", modules_to_save=["head"]), adapter_name="other")
INT8_HEAD = {**tree(), "head": {"kernel": jnp.ones((6, 2), jnp.int8)}}


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: jpeft.wrap(tree(), {"r": 8}), TypeError, r"config is {'r': 8}; expected the config of a method"),
        (
            lambda: jpeft.wrap(tree(), PeftConfig()),
            TypeError,
            "expected the config of a method, such as jpeft.LoraConfig",
        ),
        (lambda: jpeft.wrap({}, config()), ValueError, "the parameter tree has no leaves; expected a tree of arrays"),
        (lambda: jpeft.wrap(None, config()), ValueError, "the parameter tree has no leaves"),
        (lambda: jpeft.wrap(tree(), config(), rng=3), TypeError, r"rng is int 3; expected a key from jax.random.key"),
        (lambda: jpeft.wrap(tree(), config(), rng=jnp.ones(2)), TypeError, "expected a key from jax.random.key"),
        (lambda: jpeft.wrap(tree(), config(), dtype=jnp.int8), ValueError, "dtype is int8; expected a floating-point"),
        (lambda: jpeft.wrap(tree(), config(), adapter_name=""), ValueError, "adapter_name is ''; expected a name"),
        (
            lambda: jpeft.wrap(tree(), config(), adapter_name="a.b"),
            ValueError,
            "adapter_name is 'a.b'; expected a name",
        ),
        (lambda: jpeft.wrap(WRAPPED, config()), ValueError, "already is an adapter 'default'; .* other than: default"),
        (
            lambda: jpeft.wrap(jpeft.wrap(tree(), config(bias="all")), config(bias="lora_only"), adapter_name="b"),
            ValueError,
            "bias is 'lora_only', but 'default' has 'all'; expected at most one adapter with biases",
        ),
        (
            lambda: jpeft.wrap(INT8_HEAD, config(modules_to_save=["head"])),
            ValueError,
            "would train 'head.kernel', whose dtype is int8; expected a floating-point",
        ),
        (lambda: jpeft.unwrap(tree()), TypeError, "expected the PeftParams that jpeft.wrap returns, not a dict"),
        (lambda: jpeft.merge(tree()), TypeError, "not a dict"),
        (lambda: jpeft.set_adapter(tree(), "default"), TypeError, "not a dict"),
        (lambda: jpeft.disable_adapters(tree()), TypeError, "not a dict"),
        (lambda: jpeft.set_adapter(WRAPPED, "x"), ValueError, r"names are \['x'\]; .* all of them among: 'default'"),
        (lambda: jpeft.set_adapter(WRAPPED, []), ValueError, r"adapter names are \[\]; expected at least one"),
        (lambda: jpeft.merge(WRAPPED, adapter_names=["x"]), ValueError, r"adapter names are \['x'\]"),
        (lambda: jpeft.set_adapter(WRAPPED, ["default"] * 2), ValueError, "expected each of them once"),
        (
            lambda: jpeft.set_adapter(TWO_HEADS, ["default", "other"]),
            ValueError,
            "'default' and 'other' both replace 'head.bias' in full",
        ),
    ],
)
def test_bad_input_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_second_adapter_without_biases_is_fine():
    wrapped = jpeft.wrap(jpeft.wrap(tree(), config(bias="all")), config(), adapter_name="other")
    assert wrapped.adapters["other"].replaced == {}
