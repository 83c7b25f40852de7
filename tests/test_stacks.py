"""Layers stacked in one leaf: a stack is decided about, begins and computes as its layers would one by one."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft
from jpeft import LoraConfig
from jpeft._config import TunerConfig
from jpeft._contract import additive, register
from jpeft._patterns import value_for
from jpeft._sites import candidates
from jpeft._stacks import Layer, layer_paths, layer_sites, restacked, spelled_out, stacked_numbers, unstacked
from jpeft._targets import saved_modules
from jpeft.methods.lora import INITIALIZATIONS
from tests.stacked_trees import STACKS, assert_same_adapter, forward, layer_tree, randomised, stacked, taken_apart

KEY = jax.random.key(3)
IDS = np.array([[0, 3, 6], [2, 2, 1]])


@dataclasses.dataclass(frozen=True, kw_only=True)
class OfTheWeightConfig(TunerConfig):
    """A toy whose initial values depend on the weight, as those of PiSSA or OLoRA do."""


register(
    additive(
        config=OfTheWeightConfig,
        init=lambda key, site, config, weight: {"delta": weight() * 2 + jax.random.normal(key, weight().shape)},
        delta=lambda p, site: p["delta"],
    )
)


def leaf(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def both(config, names=STACKS["all"], **settings):
    tree = layer_tree()
    settings = {"rng": KEY, **settings}
    return jpeft.wrap(stacked(tree, names), config, **settings), jpeft.wrap(tree, config, **settings)


# ---- names ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "numbers"),
    [("0:3", [0, 1, 2]), ("1:6:2", [1, 3, 5]), ("10:11", [10])]
    + [(name, None) for name in ("3", "a", "3:3", "5:3", "0:3:0", ":3", "0:", "0:3:", "a0:3", "0:3.q", "")],
)
def test_names_of_stacks(name, numbers):
    found = stacked_numbers(name)
    assert (None if found is None else list(found)) == numbers


def test_paths_of_layers():
    assert layer_paths("h.2:4.attn.kernel") == ["h.2.attn.kernel", "h.3.attn.kernel"]
    assert layer_paths("0:2") == ["0", "1"]
    assert layer_paths("h.2.attn.kernel") is layer_paths("") is layer_paths("h.a:b.kernel") is None
    with pytest.raises(ValueError, match=r"'a.0:2.b.0:3.kernel' has 2 names .*; expected one stack at most"):
        layer_paths("a.0:2.b.0:3.kernel")


def test_leaves_are_sliced_only_when_asked_for():
    array = np.arange(6.0).reshape(3, 2)
    layers = unstacked({"h.1:4.norm.scale": array, "b": array, "h.0:2.count": 5})
    layer = layers["h.2.norm.scale"]
    assert (layer.shape, layer.dtype, layers["b"]) == ((2,), array.dtype, array)
    np.testing.assert_array_equal(layer, [2, 3])
    assert not hasattr(layers["h.0.count"], "shape")
    abstract = unstacked({"h.0:3.q": leaf(3, 4, 6)})["h.1.q"]
    assert isinstance(abstract, Layer) and abstract.shape == (4, 6)


@pytest.mark.parametrize("shape", [(2, 4), (4, 3), ()])
def test_a_stack_has_the_layers_of_its_name(shape):
    expected = f"the name of 'h.0:3.q' says .* stacks 3 layers, but its shape is {re.escape(str(shape))}"
    with pytest.raises(ValueError, match=expected):
        jpeft.wrap({"h": {"0:3": {"q": jnp.ones(shape)}}}, LoraConfig(target_modules=["q"]))


def test_a_layer_is_in_one_stack():
    with pytest.raises(ValueError, match="'h.1:3.q' holds 'h.1.q', which the tree holds already"):
        unstacked({"h.0:2.q": leaf(2, 3), "h.1:3.q": leaf(2, 3)})
    with pytest.raises(ValueError, match="'h.0:2.q' holds 'h.1.q', which the tree holds already"):
        unstacked({"h.1.q": leaf(3), "h.0:2.q": leaf(2, 3)})


# ---- layouts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "shape", "layouts", "expected"),
    [
        ("h.0:3.q.kernel", (3, 4, 6), {}, "bio"),
        ("h.0:3.embed.embedding", (3, 7, 4), {}, "bvo"),
        ("h.0:3.conv.kernel", (3, 3, 3, 4, 6), {}, "b..io"),
        ("h.0:3.q.kernel", (3, 4, 6), {"h.0:3.q.kernel": "boi"}, "boi"),
        ("h.0:3.q.kernel", (3, 4, 6), {"h.0:3.q": "boi"}, "boi"),
        ("h.0:3.q.kernel", (3, 4, 6), {"h.0:3.q": "oi"}, "boi"),
        ("h.0:3.q.kernel", (3, 4, 6), {"h.0.q.kernel": "oi"}, "boi"),
        ("h.0:3.q.kernel", (3, 4, 6), {"h.0.q": "oi"}, "boi"),
        ("h.1:6:2.q.kernel", (3, 4, 6), {r"h\.1\.q": "oi"}, "boi"),
        ("h.0:3.q.kernel", (3, 4, 6), {r".*\.q": "oi"}, "boi"),
        ("h.0:3.q.kernel", (3, 4, 6), {r".*\.q": "boi"}, "boi"),
        ("h.0:3.q.kernel", (3, 4, 6), {r"h\.0:3\.q": "boi"}, "boi"),
        ("h.0:3.q.kernel", (3, 4, 2, 3), {r"h\.\d+\.q": "ioo"}, "bioo"),
        ("h.0:3.experts.kernel", (3, 5, 4, 6), {r".*experts": "bio"}, "bbio"),
    ],
)
def test_layouts_of_stacks(path, shape, layouts, expected):
    config = LoraConfig(r=2, target_modules=[path.split(".")[2]])
    (site,) = jpeft.wrap({path: leaf(*shape)}, config, layouts=layouts).adapters["default"].sites.values()
    assert (site.path, site.leaf, site.layout, site.shape) == (path.rpartition(".")[0], path, expected, shape)
    assert [one.layout for one in layer_sites(site)] == [expected[1:]] * 3


def test_vectors_of_layers_are_no_weights():
    shapes = {"norm.weight": (3, 4), "norm.kernel": (3, 4), "q.bias": (3, 6), "norm.scale": (3, 4), "gate": (3, 9)}
    assert candidates(unstacked({f"h.0:3.{name}": leaf(*shape) for name, shape in shapes.items()})) == {}


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        ("iob", r"layout 'iob' of 'h.0:3.q.kernel', whose shape is \(3, 4, 6\), does not begin with 'b'"),
        ("bbio", r"layout 'bbio' of 'h.0.q.kernel', whose shape is \(4, 6\), has 4 letters"),
        ("bxo", r"layout 'xo' of 'h.0.q.kernel', .* other than i, o, v, b"),
        (7, "layout 7 of 'h.0.q.kernel', .* other than i, o, v, b"),
    ],
)
def test_wrong_layouts_of_stacks(layout, expected):
    with pytest.raises(ValueError, match=expected):
        candidates(unstacked({"h.0:3.q.kernel": leaf(3, 4, 6)}), {"h.0:3.q": layout})


def test_an_unknown_layout_is_asked_for_by_the_name_of_a_layer():
    params, config = {"h.0:2.q.kernel": jnp.ones((2, 4, 2, 3))}, LoraConfig(target_modules=["q"])
    with pytest.raises(ValueError, match=r"layouts=\{'h.0.q.kernel': 'ioo'\}"):
        jpeft.wrap(params, config)
    assert jpeft.wrap(params, config, layouts={"h.0.q.kernel": "ioo"}).adapters["default"].sites["h.0:2.q"].stack == (
        2,
    )


def test_inferred_layouts_fit():
    tree = stacked(layer_tree())
    layouts = jpeft.infer_layouts(forward, tree, IDS)
    assert layouts["model.layers.0:4.q_proj.kernel"] == "bio"
    jpeft.wrap(tree, LoraConfig(target_modules="all-linear"), layouts=layouts)


# ---- a stack is its layers ------------------------------------------------------------------------------------------

SELECTIONS = {
    "names": {"target_modules": ["q_proj", "v_proj"]},
    "all-linear": {"target_modules": "all-linear"},
    "regex": {"target_modules": r"model\.layers\.[0-3]\.(q|v)_proj"},
    "paths of all layers": {"target_modules": [f"layers.{index}.q_proj" for index in range(4)]},
    "layers_to_transform": {"target_modules": ["q_proj"], "layers_to_transform": [0, 1, 2, 3]},
    "layers_pattern": {"target_modules": ["q_proj"], "layers_to_transform": [0, 1, 2, 3], "layers_pattern": "layers"},
    "exclude_modules": {"target_modules": "all-linear", "exclude_modules": r".*\.\d+\.v_proj"},
    "modules_to_save": {"target_modules": ["q_proj"], "modules_to_save": ["norm", "score"]},
    "saved by layer": {"target_modules": ["q_proj"], "modules_to_save": [f"layers.{i}.norm" for i in range(4)]},
    "saved and all-linear": {"target_modules": "all-linear", "modules_to_save": ["v_proj"]},
    "bias all": {"target_modules": ["v_proj", "embed_tokens"], "bias": "all"},
    "bias lora_only": {"target_modules": ["q_proj", "score"], "bias": "lora_only", "modules_to_save": ["norm"]},
    "patterns": {
        "target_modules": ["q_proj", "v_proj"],
        "rank_pattern": {r"\d\.q_proj": 3},
        "alpha_pattern": {"v_proj": 5},
    },
    "rslora": {"target_modules": ["q_proj"], "use_rslora": True, "rank_pattern": {"q_proj": 5}},
}


@pytest.mark.parametrize("names", STACKS.values(), ids=STACKS)
@pytest.mark.parametrize("settings", SELECTIONS.values(), ids=SELECTIONS)
def test_the_adapter_of_a_stack_is_the_stack_of_the_adapters(settings, names):
    whole, single = both(LoraConfig(**{"r": 2, "lora_alpha": 6, **settings}), names)
    assert_same_adapter(whole.adapters["default"], single.adapters["default"])
    for path, scaling in whole.adapters["default"].scaling.items():
        assert scaling.shape == ((len(layer_paths(path)),) if layer_paths(path) else ())


@pytest.mark.parametrize("key", [KEY, jax.random.PRNGKey(3), jax.random.key(3, impl="rbg")], ids=["key", "raw", "rbg"])
@pytest.mark.parametrize("how", INITIALIZATIONS)
def test_the_initial_values_of_a_stack(how, key):
    targets = ["q_proj", "v_proj"] if how == "orthogonal" else ["q_proj", "v_proj", "embed_tokens"]
    whole, single = both(LoraConfig(r=2, target_modules=targets, init_lora_weights=how), STACKS["period 2"], rng=key)
    assert_same_adapter(whole.adapters["default"], single.adapters["default"])


def test_the_initial_values_that_depend_on_the_weight():
    whole, single = both(OfTheWeightConfig(target_modules=["q_proj"]), STACKS["period 2"])
    assert_same_adapter(whole.adapters["default"], single.adapters["default"])


def test_experts_in_a_stack_of_layers():
    kernels = jax.random.normal(KEY, (3, 5, 4, 6))
    config, layouts = OfTheWeightConfig(target_modules=["experts"]), {r".*experts": "bio"}
    whole = jpeft.wrap({"h": {"0:3": {"experts": {"kernel": kernels}}}}, config, rng=KEY, layouts=layouts)
    tree = {"h": {str(index): {"experts": {"kernel": kernels[index]}} for index in range(3)}}
    single = jpeft.wrap(tree, config, rng=KEY, layouts=layouts)
    assert_same_adapter(whole.adapters["default"], single.adapters["default"])


def test_abstract_stacks():
    tree, config = stacked(layer_tree()), LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["norm"])
    abstract = jpeft.wrap(jax.eval_shape(lambda: tree), config).adapters["default"]
    concrete = jpeft.wrap(tree, config).adapters["default"]
    assert jax.tree.structure(abstract) == jax.tree.structure(concrete)
    assert jax.tree.map(jnp.shape, abstract) == jax.tree.map(jnp.shape, concrete)


# ---- all layers or none ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (
            {"target_modules": ["q_proj"], "layers_to_transform": [0, 2]},
            r"target_modules=\('q_proj',\), layers_to_transform=\(0, 2\) select layers 0, 2 of the stack "
            r"'model.layers.0:4.q_proj.kernel', but not layers 1, 3; layers stacked in one leaf are adapted alike: "
            "load the model with scan_layers=False, or choose all layers of the stack",
        ),
        ({"target_modules": r".*\.[01]\.q_proj"}, r"select layers 0, 1 of the stack .*, but not layers 2, 3;"),
        ({"target_modules": ["layers.3.v_proj"]}, r"select layer 3 of the stack .*v_proj.kernel', but not layers 0, 1"),
        ({"target_modules": ["q_proj"], "exclude_modules": ["1.q_proj"]}, r"select layers 0, 2, 3 .* but not layer 1;"),
        ({"target_modules": ["layers.0:2.q_proj"]}, "select layers 0, 1 of the stack .* but not layers 2, 3;"),
        (
            {"target_modules": ["q_proj"], "modules_to_save": ["1.norm"]},
            r"modules_to_save=\('1.norm',\) would train layer 1 of the stack 'model.layers.0:4.norm.\w+', but not",
        ),
        (
            {"target_modules": ["q_proj"], "bias": "lora_only", "modules_to_save": ["layers.2"]},
            r"modules_to_save=\('layers.2',\) select layers 0, 1, 3 of the stack .* but not layer 2;",
        ),
        (
            {"target_modules": ["q_proj"], "rank_pattern": {"1.q_proj": 4, r"2\.q_proj": 4}},
            r"the pattern .* gives different values to the layers of the stack 'model.layers.0:4.q_proj': "
            r"2 to layers 0, 3; 4 to layers 1, 2\. .* load the model with scan_layers=False, or give all layers",
        ),
        (
            {"target_modules": ["q_proj"], "alpha_pattern": {"0.q_proj": 4}},
            "different values to the layers of the stack .*: 4 to layer 0; 8 to layers 1, 2, 3",
        ),
    ],
)
def test_some_layers_of_a_stack_are_refused(settings, expected):
    with pytest.raises(ValueError, match=expected):
        jpeft.wrap(stacked(layer_tree()), LoraConfig(**{"r": 2, **settings}))


def test_every_other_layer_where_these_are_a_stack():
    config = LoraConfig(r=2, target_modules=["q_proj"], layers_to_transform=[1, 3], rank_pattern={r"[13]\.q_proj": 3})
    whole, single = both(config, STACKS["period 2"])
    assert list(whole.adapters["default"].sites) == ["model.layers.1:4:2.q_proj"]
    assert_same_adapter(whole.adapters["default"], single.adapters["default"])


def test_different_ranks_in_different_stacks():
    config = LoraConfig(
        r=2, target_modules=["q_proj"], rank_pattern={r"[13]\.q_proj": 3}, alpha_pattern={"0.q_proj": 1}
    )
    with pytest.raises(ValueError, match="1 to layer 0; 8 to layer 2"):
        both(config, STACKS["period 2"])
    whole, single = both(dataclasses.replace(config, alpha_pattern={}), STACKS["period 2"])
    assert_same_adapter(whole.adapters["default"], single.adapters["default"])


def test_values_of_stacks():
    assert value_for("h.0:2.q", {r"[01]\.q": 4}, 8) == value_for("h.0:2.q", {r"h\..*": 4}, 8) == 4
    assert value_for("h.0:2.q", {"1:2.q": 4, "v": 3}, 8) == 8
    with pytest.raises(ValueError, match="4 to layer 1"):
        value_for("h.0:2.q", {"1.q": 4}, 8)


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["model.layers.0:4.q_proj"]},
        {"target_modules": ["0:4.q_proj"]},
        {"target_modules": r"model\.layers\.0:4\.q_proj"},
        {"target_modules": "model.layers.0:4.q_proj"},
        {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["layers.0:4.v_proj"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["model.layers.0:4.norm"]},
        {"target_modules": ["q_proj"], "rank_pattern": {r"0:4\.q_proj": 5}, "alpha_pattern": {"layers.0:4.q_proj": 2}},
    ],
)
def test_a_stack_by_its_own_name(settings):
    whole, single = both(LoraConfig(r=2, **settings))
    adapter = whole.adapters["default"]
    assert list(adapter.sites) == ["model.layers.0:4.q_proj"]
    assert_same_adapter(adapter, single.adapters["default"])
    assert "0:4" not in repr(adapter.config) and adapter.config == single.adapters["default"].config


def test_names_are_spelled_out_where_they_are_names():
    assert spelled_out(None) is None
    assert spelled_out("all-linear") == "all-linear"
    assert spelled_out(r"h\.[0:9]\.q|h\.3:3\.q") == r"h\.[0:9]\.q|h\.(?:3:3)\.q"
    assert spelled_out("0:2") == "(?:0|1)"
    assert spelled_out(("a", "0:2.q")) == ("a", "0.q", "1.q")


def test_restacked_keeps_what_is_in_no_stack():
    assert restacked({"a": 1, "b": 2}, {"a": leaf(3)}, "") == {"a": [1], "b": [2]}


def test_modules_saved_by_the_names_of_layers():
    config = LoraConfig(modules_to_save=["layers.2.norm"])
    assert saved_modules(["layers.0:4", "layers.0:4.norm", "layers.0:2.norm"], config) == ["layers.0:4.norm"]


# ---- what it computes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", STACKS.values(), ids=STACKS)
@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": "all-linear", "alpha_pattern": {"v_proj": 3}},
        {"target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["norm", "score"], "bias": "lora_only"},
        {"target_modules": ["v_proj"], "use_rslora": True, "bias": "all", "modules_to_save": ["q_proj"]},
    ],
)
def test_a_scan_over_stacks_computes_what_the_layers_do(settings, names):
    config = LoraConfig(r=2, lora_alpha=3, **settings)
    whole, single = both(config, names)
    whole = randomised(whole)
    single = taken_apart(whole, layer_tree(), single)
    apply = jax.jit(jpeft.lift(forward))
    expected = apply(single, IDS)
    assert np.abs(expected - forward(layer_tree(), IDS)).max() > 0.1
    np.testing.assert_allclose(apply(whole, IDS), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(forward(jpeft.merge(whole), IDS), expected, rtol=1e-4, atol=1e-4)
    assert jpeft.count_parameters(whole) == jpeft.count_parameters(single)
    uses = jpeft.explain(forward, whole, IDS)
    assert "merged" not in str(uses)


@pytest.mark.filterwarnings("ignore:.*is the output layer too")
def test_tables_in_a_stack_that_train_in_full():
    """As for a table outside of stacks, the copy is for the lookup and the tied product keeps the base."""
    tables, ids = jax.random.normal(KEY, (3, 7, 4)), IDS
    config = LoraConfig(r=2, target_modules=["q"], modules_to_save=["embed"])

    def one(x, p):
        return x + (p["embed"]["embedding"][ids] @ p["q"]["kernel"]) @ p["embed"]["embedding"].T

    def looped(tree):
        x = jnp.zeros((2, 3, 7))
        for index in range(3):
            x = one(x, tree["h"][str(index)])
        return x

    def scanned(tree):
        return jax.lax.scan(lambda x, p: (one(x, p), None), jnp.zeros((2, 3, 7)), tree["h"]["0:3"])[0]

    kernels = jax.random.normal(KEY, (3, 4, 4))
    stack = {"h": {"0:3": {"embed": {"embedding": tables}, "q": {"kernel": kernels}}}}
    tree = {"h": {str(i): jax.tree.map(lambda leaf, i=i: leaf[i], stack["h"]["0:3"]) for i in range(3)}}
    whole = randomised(jpeft.wrap(stack, config))
    single = taken_apart(whole, tree, jpeft.wrap(tree, config))
    np.testing.assert_allclose(jpeft.lift(scanned)(whole), jpeft.lift(looped)(single), rtol=1e-5, atol=1e-5)


def test_vectors_of_layers_with_a_table_s_name_that_train_in_full():
    stack = {"h": {"0:3": {"norm": {"embed_scale": jnp.ones((3, 4))}, "q": {"kernel": jnp.stack([jnp.eye(4)] * 3)}}}}

    def scanned(tree, x):
        return jax.lax.scan(lambda x, p: (x @ p["q"]["kernel"] * p["norm"]["embed_scale"], None), x, tree["h"]["0:3"])[
            0
        ]

    wrapped = jpeft.wrap(stack, LoraConfig(r=2, target_modules=["q"], modules_to_save=["norm"]))
    adapter = wrapped.adapters["default"]
    adapter = dataclasses.replace(adapter, replaced={"h.0:3.norm.embed_scale": jnp.full((3, 4), 2.0)})
    wrapped = dataclasses.replace(wrapped, adapters={"default": adapter})
    np.testing.assert_array_equal(jpeft.lift(scanned)(wrapped, jnp.ones(4)), np.full(4, 8.0))
