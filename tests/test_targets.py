"""Which modules a config selects, and what the leaves of a tree are taken for."""

import dataclasses
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft
from jpeft import LoraConfig
from jpeft._contract import CONVOLUTION, EMBEDDING, LINEAR, method_of
from jpeft._patterns import key_matches, matches, value_for
from jpeft._sites import bias_layout, candidates, canonical, restored
from jpeft._targets import bias_leaves, module_paths, saved_leaves, select_sites


def leaf(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


LAYER = {
    "attention.query.kernel": leaf(8, 8),
    "attention.query.bias": leaf(8),
    "attention.value.kernel": leaf(8, 8),
    "attention.value.bias": leaf(8),
    "mlp.wi.kernel": leaf(8, 16),
    "norm.scale": leaf(8),
    "norm.bias": leaf(8),
}
MODEL = {
    "embed.embedding": leaf(32, 8),
    "patches.kernel": leaf(4, 4, 3, 8),
    **{f"encoder.layers.{i}.{name}": value for i in range(3) for name, value in LAYER.items()},
    "score.kernel": leaf(8, 2),
    "lm_head.kernel": leaf(8, 32),
}


def select(leaves=MODEL, layouts=None, method=None, **fields):
    config = LoraConfig(**fields)
    return list(select_sites(leaves, candidates(leaves, layouts), config, method or method_of(config)))


def of_layers(name, layers=range(3)):
    return [f"encoder.layers.{i}.{name}" for i in layers]


ATTENTION = [
    path for i in range(3) for path in (*of_layers("attention.query", [i]), *of_layers("attention.value", [i]))
]
ALL_KERNELS = [
    path for i in range(3) for name in ("attention.query", "attention.value", "mlp.wi") for path in of_layers(name, [i])
]


@pytest.mark.parametrize(
    ("path", "names", "expected"),
    [
        ("a.query", ["query"], True),
        ("query", ["query"], True),
        ("a.subquery", ["query"], False),
        ("a.query", ["a.query"], True),
        ("a.query", ["a"], False),
        ("a.query", [], False),
        ("a.query", "query", False),
        ("a.query", r".*\.query", True),
        ("a.query.b", r".*\.query", False),
    ],
)
def test_matches_follows_pefts_rule(path, names, expected):
    assert matches(path, names) is expected


@pytest.mark.parametrize(
    ("path", "pattern", "expected"),
    [
        ("layers.1.query", {}, 8),
        ("layers.1.query", {"query": 2}, 2),
        ("layers.1.subquery", {"query": 2}, 8),
        ("layers.1.query", {"quer": 2}, 8),
        ("layers.1.query", {r"layers\.\d+\.query": 2, "query": 3}, 2),
        ("layers.1.query", {"value": 2, "query": 3, "1.query": 4}, 3),
        ("layers.1.query", {"query|value": 5}, 5),
    ],
)
def test_value_for_takes_the_first_key_that_matches_the_end(path, pattern, expected):
    assert value_for(path, pattern, 8) == expected


@pytest.mark.parametrize(
    "call",
    [
        lambda: matches("a", "["),
        lambda: key_matches("a", "["),
        lambda: candidates({"a.kernel": leaf(2, 2)}, {"[": "io"}),
        lambda: select(target_modules=["query"], layers_to_transform=[0], layers_pattern="["),
    ],
)
def test_a_broken_pattern_is_named(call):
    with pytest.raises(ValueError, match=r"'\[' is not a regular expression"):
        call()


@pytest.mark.parametrize(
    ("leaves", "expected"),
    [
        ({"a.kernel": leaf(2, 3), "a.bias": leaf(3)}, ("a", "a.kernel", "a.bias", "io", LINEAR)),
        ({"a.w": leaf(2, 3), "a.b": leaf(3)}, ("a", "a.w", "a.b", "io", LINEAR)),
        ({"a.kernel": leaf(2, 3)}, ("a", "a.kernel", None, "io", LINEAR)),
        ({"a.gating": leaf(2, 3)}, ("a", "a.gating", None, "io", LINEAR)),
        ({"a.gating": leaf(2, 3), "a.bias": leaf(3)}, ("a", "a.gating", "a.bias", "io", LINEAR)),
        ({"a.gating": leaf(2, 3), "a.scale": leaf(5, 3)}, ("a", "a.gating", None, "io", LINEAR)),
        ({"a.embedding": leaf(9, 3)}, ("a", "a.embedding", None, "vo", EMBEDDING)),
        ({"a.kernel": leaf(3, 3, 2, 4)}, ("a", "a.kernel", None, "..io", CONVOLUTION)),
        ({"a.kernel": leaf(2, 3, 3, 2, 4)}, ("a", "a.kernel", None, "...io", CONVOLUTION)),
        ({"w1": leaf(2, 3)}, ("w1", "w1", None, "io", LINEAR)),
        ({"kernel": leaf(2, 3), "bias": leaf(3)}, ("kernel", "kernel", "bias", "io", LINEAR)),
        ({"a.token": leaf(2, 3), "a.c.scale": leaf(3)}, ("a.token", "a.token", None, "io", LINEAR)),
        ({"a.kernel": leaf(2, 3, 4)}, ("a", "a.kernel", None, None, None)),
        ({"a.kernel": leaf(24, 2048, 3, 4)}, ("a", "a.kernel", None, None, None)),
        ({"a.kv_einsum.w": leaf(2, 3, 4, 5)}, ("a.kv_einsum", "a.kv_einsum.w", None, None, None)),
    ],
)
def test_a_leaf_is_taken_for(leaves, expected):
    (found,) = candidates(leaves).values()
    assert (found.path, found.leaf, found.bias, found.layout, found.kind) == expected


def test_leaves_without_a_weights_name_are_modules_of_their_own():
    leaves = {"mlp.gating_einsum": leaf(2, 8, 4), "mlp.linear": leaf(4, 8), "mlp.bias": leaf(8)}
    assert {path: found.bias for path, found in candidates(leaves).items()} == {
        "mlp.gating_einsum": None,
        "mlp.linear": None,
    }


@pytest.mark.parametrize(
    "array", [np.ones((2, 3), np.int8), jnp.ones((2, 3)), leaf(2, 3)], ids=["numpy", "jax", "abstract"]
)
def test_any_array_with_a_shape_and_a_dtype_is_a_leaf(array):
    found = candidates({"a.kernel": array, "a.count": 3, "a.name": "dense"})["a"].site()
    assert (found.shape, found.dtype) == ((2, 3), str(array.dtype))


@pytest.mark.parametrize(
    ("layouts", "expected"),
    [
        ({"a.kernel": "oi"}, "oi"),
        ({"a": "oi"}, "oi"),
        ({r".*\.kernel": "oi"}, "oi"),
        ({r".": "oi"}, "oi"),
        ({r"kernel": "oi"}, "io"),
        ({r".*": "io", "a.kernel": "oi"}, "oi"),
        ({r".*": "io", "a": "oi"}, "oi"),
        ({r".*kernel": "oi", r".*": "io"}, "oi"),
    ],
)
def test_layouts_match_the_leaf_or_the_module_exact_names_first(layouts, expected):
    assert candidates({"a.kernel": leaf(2, 2)}, layouts)["a"].layout == expected


@pytest.mark.parametrize(
    ("shape", "layout", "message"),
    [
        ((2, 3), "xo", r"layout 'xo' of 'a.kernel', whose shape is \(2, 3\), has letters other than"),
        ((2, 3), 5, r"layout 5 of 'a.kernel', whose shape is \(2, 3\), has letters other than"),
        ((2, 3), "bio", r"has 3 letters; expected one for each of the 2 axes"),
        ((2, 3), "ii", r"lacks an axis; expected at least one 'o' and one 'i'"),
        ((2, 3), "bo", r"lacks an axis; expected at least one 'o' and one 'i'"),
        ((2, 3, 4), "vio", r"mixes 'v' with other inputs"),
        ((2, 3, 4), "vvo", r"mixes 'v' with other inputs"),
        ((2, 3, 4), ".vo", r"mixes 'v' with other inputs"),
    ],
)
def test_a_layout_that_does_not_fit_is_refused(shape, layout, message):
    with pytest.raises(ValueError, match=message):
        candidates({"a.kernel": leaf(*shape)}, {"a": layout})


def test_a_bias_tells_that_a_layout_is_wrong():
    leaves = {"a.kernel": leaf(3, 2), "a.bias": leaf(3)}
    with pytest.raises(ValueError, match=r"its bias should have 2 entries, but 'a.bias' has shape \(3,\)"):
        candidates(leaves)["a"].site()
    assert candidates(leaves, {"a": "oi"})["a"].site().out_features == 3


@pytest.mark.parametrize("target", [["query"], "all-linear"])
def test_a_targeted_leaf_of_unknown_layout_shows_the_three_ways(target):
    leaves = {"query.kernel": leaf(8, 2, 4), "other.kernel": leaf(8, 8)}
    with pytest.raises(ValueError, match=r"layout of 'query.kernel' is unknown: its shape is \(8, 2, 4\)") as error:
        select(leaves, target_modules=target)
    for way in ("layouts={'query.kernel': 'ioo'}", "family=", "jpeft.infer_layouts(apply_fn, params, *inputs)"):
        assert way in str(error.value)
    assert select(leaves, target_modules=["other"]) == ["other"]
    assert select(leaves, {"query.kernel": "ioo"}, target_modules=["query"]) == ["query"]


@pytest.mark.parametrize(
    ("layout", "shape", "expected"),
    [
        ("io", (2, 3), (2, 3)),
        ("oi", (3, 2), (2, 3)),
        ("oio", (3, 2, 5), (2, 15)),
        ("iio", (3, 2, 5), (6, 5)),
        ("iboo", (2, 3, 4, 5), (3, 2, 20)),
        ("boio", (2, 3, 4, 5), (2, 4, 15)),
        ("..io", (3, 3, 2, 5), (2, 3, 3, 5)),
        ("oi..", (5, 2, 3, 4), (2, 3, 4, 5)),
        ("bvo", (2, 9, 4), (2, 9, 4)),
        ("bbio", (2, 3, 4, 5), (2, 3, 4, 5)),
        ("bo", (2, 3), (2, 3)),
        ("obo", (2, 3, 4), (3, 8)),
    ],
)
def test_canonical_sorts_the_axes_and_restored_undoes_it(layout, shape, expected):
    array = jnp.arange(np.prod(shape)).reshape(shape)
    sorted_by_role = canonical(array, layout)
    assert sorted_by_role.shape == expected
    np.testing.assert_array_equal(restored(sorted_by_role, layout, shape), array)


def test_canonical_is_what_einsum_computes_with():
    w = jax.random.normal(jax.random.key(0), (2, 3, 4, 5))
    x = jax.random.normal(jax.random.key(1), (7, 2))
    direct = jnp.einsum("xi,iboc->bxoc", x, w)
    np.testing.assert_allclose(x @ canonical(w, "iboo"), direct.reshape(3, 7, 20), atol=1e-5)


def test_the_layout_of_a_bias_keeps_the_order_of_the_weights_axes():
    site = candidates({"q.kernel": leaf(2, 3, 4, 5), "q.bias": leaf(3, 4, 5)}, {"q": "iboo"})["q"].site()
    assert bias_layout(site) == "boo"


def test_module_paths_lists_containers_and_bare_leaves():
    leaves = {"mlp.a": leaf(2, 2), "mlp.c": leaf(2, 2), "norm.scale": leaf(2)}
    assert module_paths(leaves, candidates(leaves)) == ["mlp", "mlp.a", "mlp.c", "norm"]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"target_modules": ["query", "value"]}, ATTENTION),
        ({"target_modules": ["attention.query"]}, of_layers("attention.query")),
        ({"target_modules": ["encoder.layers.1.mlp.wi"]}, of_layers("mlp.wi", [1])),
        ({"target_modules": r".*\.layers\.[02]\.mlp\.wi"}, of_layers("mlp.wi", [0, 2])),
        ({"target_modules": r".*attention.*"}, ATTENTION),
        ({"target_modules": ["embed"]}, ["embed"]),
        ({"target_modules": ["patches"]}, ["patches"]),
        ({"target_modules": "all-linear"}, [*ALL_KERNELS, "score"]),
        ({"target_modules": "ALL-Linear"}, [*ALL_KERNELS, "score"]),
        ({"target_modules": "all-linear", "task_type": "SEQ_CLS"}, ALL_KERNELS),
        ({"target_modules": "all-linear", "modules_to_save": ["mlp"]}, [*ATTENTION, "score"]),
        ({"target_modules": "all-linear", "exclude_modules": r".*\.mlp\..*"}, [*ATTENTION, "score"]),
        ({"target_modules": ["query", "value"], "exclude_modules": ["query"]}, of_layers("attention.value")),
        ({"target_modules": ["query", "score"], "modules_to_save": ["score"]}, of_layers("attention.query")),
        ({"target_modules": ["query"], "layers_to_transform": 1}, of_layers("attention.query", [1])),
        ({"target_modules": ["query"], "layers_to_transform": [0, 2]}, of_layers("attention.query", [0, 2])),
        ({"target_modules": ["query"], "layers_to_transform": []}, of_layers("attention.query")),
        (
            {"target_modules": ["query"], "layers_to_transform": [1], "layers_pattern": "layers"},
            of_layers("attention.query", [1]),
        ),
        (
            {"target_modules": ["query"], "layers_to_transform": [1], "layers_pattern": ["h", "layers"]},
            of_layers("attention.query", [1]),
        ),
        (
            {"target_modules": ["query", "encoder.layers.2.mlp.wi"], "layers_to_transform": [0]},
            [*of_layers("attention.query", [0]), *of_layers("mlp.wi", [2])],
        ),
    ],
)
def test_selected_modules(fields, expected):
    assert select(**fields) == expected


def test_nested_indices_count_by_the_first():
    leaves = {f"layers.{i}.experts.{j}.wi.kernel": leaf(2, 2) for i in range(2) for j in range(2)}
    # Without a name before it the first number of the path is no layer index: PEFT wants `.name.number.`.
    assert select({f"model.{k}": v for k, v in leaves.items()}, target_modules=["wi"], layers_to_transform=[1]) == [
        "model.layers.1.experts.0.wi",
        "model.layers.1.experts.1.wi",
    ]
    assert select(leaves, target_modules=["wi"], layers_to_transform=[1], layers_pattern="experts") == [
        "layers.0.experts.1.wi",
        "layers.1.experts.1.wi",
    ]


@pytest.mark.parametrize("head", ["lm_head", "embed_out", "logits_dense", "output_projection"])
def test_all_linear_leaves_out_the_output_embedding(head):
    assert select({"a.kernel": leaf(2, 2), f"decoder.{head}.kernel": leaf(2, 2)}, target_modules="all-linear") == ["a"]


@pytest.mark.parametrize(
    ("fields", "messages"),
    [
        ({}, ["target_modules is None", "'embed', 'patches', 'query', 'value'", "all-linear"]),
        ({"target_modules": []}, [r"target_modules is \(\)", "all-linear"]),
        (
            {"target_modules": ["qurey", "norme"]},
            [
                r"target_modules=\('qurey', 'norme'\) selects no module",
                "'qurey' .nearest: encoder.layers.0.attention.qu",
            ],
        ),
        ({"target_modules": r".*\.qurey"}, ["selects no module; the tree's modules are, for example: embed, patches"]),
        (
            {"target_modules": ["query"], "exclude_modules": ["query"]},
            [r"taken away by exclude_modules=\('query',\) or modules_to_save=None"],
        ),
        (
            {"target_modules": ["query"], "modules_to_save": ["attention"]},
            [r"taken away by exclude_modules=None or modules_to_save=\('attention',\)"],
        ),
        (
            {"target_modules": ["query"], "layers_to_transform": [9]},
            [r"layers_to_transform=\(9,\) and layers_pattern=None", "layers stacked in one leaf"],
        ),
        (
            {"target_modules": ["query"], "layers_to_transform": [1], "layers_pattern": "h"},
            [r"layers_to_transform=\(1,\) and layers_pattern='h'"],
        ),
        (
            {"target_modules": ["query", "norm"]},
            [r"entry 'norm' means 'encoder.layers.0.norm', a module of kind other with the leaves scale \(8,\), bias"],
        ),
        ({"target_modules": r".*layers\.1.*"}, ["'encoder.layers.1.norm', a module of kind other"]),
        ({"target_modules": ["query", "mlp"]}, ["entry 'mlp' means 'encoder.layers.0.mlp', a container of wi"]),
    ],
)
def test_what_selects_nothing_is_refused(fields, messages):
    for message in messages:
        with pytest.raises(ValueError, match=message):
            select(**fields)


def test_a_kind_that_the_method_lacks_is_refused():
    linear_only = dataclasses.replace(method_of(LoraConfig()), kinds=frozenset({LINEAR}))
    with pytest.raises(ValueError, match=r"'embed', a module of kind embedding and weight shape \(32, 8\)") as error:
        select(method=linear_only, target_modules=["query", "embed"])
    assert "LoraConfig cannot adapt; expected a module of one of the kinds: linear" in str(error.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target_modules": ["query", "qurey"]}, "target_modules entries that match no module: 'qurey' .nearest: enc"),
        ({"target_modules": ["query"], "exclude_modules": ["key"]}, r"exclude_modules=\('key',\) excluded no module"),
        ({"target_modules": ["query"], "rank_pattern": {"value": 4}}, r"rank_pattern keys .* ignored: \['value'\]"),
        ({"target_modules": ["query"], "alpha_pattern": {"qu": 4}}, r"alpha_pattern keys .* ignored: \['qu'\]"),
    ],
)
def test_names_without_effect_warn(fields, message):
    with pytest.warns(UserWarning, match=message):
        select(**fields)


def test_all_linear_warns_of_bare_leaves_that_it_cannot_read():
    leaves = {"a.kernel": leaf(2, 2), "mlp.gating_einsum": leaf(2, 8, 4), "mlp.linear": leaf(4, 8)}
    with pytest.warns(UserWarning, match=r"leaves out what may be linear.* 'mlp.gating_einsum' \(2, 8, 4\)"):
        assert select(leaves, target_modules="all-linear") == ["a", "mlp.linear"]
    assert select(leaves, target_modules="all-linear", exclude_modules=["gating_einsum"]) == ["a", "mlp.linear"]
    assert select({"a.kernel": leaf(2, 2), "pos_embedding": leaf(1, 5, 8)}, target_modules="all-linear") == ["a"]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["score"], ["score.kernel"]),
        (["classifier", "score"], ["score.kernel"]),
        (["1.norm"], ["encoder.layers.1.norm.scale", "encoder.layers.1.norm.bias"]),
        (["head"], ["lm_head.kernel"]),
        ([], []),
        (None, []),
    ],
)
def test_modules_to_save_are_found_by_the_end_of_their_path(names, expected):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert saved_leaves(MODEL, candidates(MODEL), LoraConfig(modules_to_save=names)) == expected


@pytest.mark.parametrize(("names", "idle"), [(["scoer"], "'scoer' .nearest: score"), (["score", "hat"], "'hat'")])
def test_modules_to_save_that_are_not_there_warn(names, idle):
    with pytest.warns(UserWarning, match=f"modules_to_save names no module of the tree: {idle}"):
        saved_leaves(MODEL, candidates(MODEL), LoraConfig(modules_to_save=names))


@pytest.mark.parametrize(
    ("bias", "expected"),
    [("none", []), ("lora_only", ["a.bias"]), ("all", ["a.bias", "c.b", "norm.bias"])],
)
def test_biases_that_train(bias, expected):
    leaves = {"a.kernel": leaf(2, 2), "a.bias": leaf(2), "c.b": leaf(2), "norm.scale": leaf(2), "norm.bias": leaf(2)}
    config = LoraConfig(target_modules=["a"], bias=bias)
    sites = select_sites(leaves, candidates(leaves), config, method_of(config))
    assert bias_leaves(leaves, sites, config) == expected


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        (
            {"target_modules": "all-linear", "layers_to_transform": [1]},
            ValueError,
            r"layers_to_transform is \(1,\) while target_modules is the string 'all-linear'",
        ),
        (
            {"target_modules": ".*q", "layers_pattern": "h"},
            ValueError,
            "layers_pattern is 'h' while target_modules is the string",
        ),
        (
            {"target_modules": ["q"], "layers_pattern": ["h"]},
            ValueError,
            r"layers_pattern is \('h',\) while layers_to_transform is None",
        ),
        ({"modules_to_save": "head"}, TypeError, "modules_to_save is 'head'; expected a list of names"),
    ],
)
def test_fields_that_exclude_each_other(fields, error, message):
    with pytest.raises(error, match=message):
        LoraConfig(**fields)


def test_wrap_selects_from_a_real_tree():
    params = {"params": {"layers": [{"query": {"kernel": jnp.ones((2, 2))}} for _ in range(2)]}}
    wrapped = jpeft.wrap(params, LoraConfig(r=1, target_modules=["layers.1.query"]))
    assert list(wrapped.adapters["default"].sites) == ["layers.1.query"]
