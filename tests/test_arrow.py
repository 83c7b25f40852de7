"""Arrow: the router against its formula in numpy, where it is used, and what it refuses."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads

import jpeft
from jpeft import ArrowConfig, LoraConfig
from tests.harness import random_like
from tests.stacked_trees import forward as stacked_model, layer_tree, stacked

PARAMS = {"first": {"kernel": (5, 7)}, "second": {"kernel": (7, 4)}}
X = np.random.default_rng(9).normal(size=(3, 6, 5))
NAMES = ["law", "poems", "code", "maths"]
RANKS = {"law": 2, "poems": 2, "code": 2, "maths": 2, "general": 2, "wiki": 2}


def model(params, x):
    return jnp.tanh(x @ params["first"]["kernel"]) @ params["second"]["kernel"]


def library(params=None, ranks=RANKS, dtype=jnp.float32, **options):
    """Parameters with random adapters of different alphas; options: of their configs."""
    wrapped = random_like(PARAMS, 7) if params is None else params
    for index, (name, rank) in enumerate(ranks.items()):
        config = LoraConfig(**{"r": rank, "lora_alpha": index + 1, "target_modules": ".*", **options})
        wrapped = jpeft.wrap(wrapped, config, adapter_name=name, dtype=dtype)
        adapter = wrapped.adapters[name]
        weights = jax.tree.map(lambda w: w.astype(dtype), random_like(adapter.weights, 100 * index, 1.0))
        adapter = dataclasses.replace(adapter, weights=weights)
        wrapped = dataclasses.replace(wrapped, adapters={**wrapped.adapters, name: adapter})
    return wrapped


def routed(wrapped, names=NAMES, general=(), **settings):
    config = ArrowConfig(use_gks=bool(general), **{"top_k": 2, **settings})
    wrapped = jpeft.create_arrow_adapter(wrapped, names, config, general)
    return jpeft.set_adapter(wrapped, "arrow_router")


def changed(wrapped, **fields):
    """The parameters with other fields of the router's LoraConfig."""
    router = wrapped.adapters["arrow_router"]
    router = dataclasses.replace(router, config=dataclasses.replace(router.config, **fields))
    return dataclasses.replace(wrapped, adapters={**wrapped.adapters, "arrow_router": router})


# ---- the formula ----------------------------------------------------------------------------------------------------


def oracle_layer(wrapped, path, x, names, general, top_k, temperature):
    """One module token by token, with whole matrices."""
    arrays = {name: (wrapped.adapters[name].weights[path], wrapped.adapters[name].scaling[path]) for name in RANKS}
    arrays = {
        name: (np.asarray(own["lora_A"], np.float64), np.asarray(own["lora_B"], np.float64), float(scaling))
        for name, (own, scaling) in arrays.items()
    }
    less_a = np.mean([arrays[name][0] for name in general], axis=0) if general else 0.0
    less_b = np.mean([arrays[name][1] for name in general], axis=0) if general else 0.0
    changes = [(arrays[name][1] - less_b) @ (arrays[name][0] - less_a) for name in names]
    directions = [np.linalg.svd(change)[2][0] for change in changes]
    y = x @ np.asarray(wrapped.base[path]["kernel"], np.float64)
    for place in np.ndindex(x.shape[:-1]):
        scores = np.array([abs(x[place] @ direction) for direction in directions])
        chosen = np.argsort(-scores)[:top_k]
        shares = np.exp(scores[chosen] / temperature)
        for index, share in zip(chosen, shares / shares.sum(), strict=True):
            y[place] += share * arrays[names[index]][2] * changes[index] @ x[place]
    return y


def oracle(wrapped, x, names=NAMES, general=(), top_k=2, temperature=1.0):
    hidden = np.tanh(oracle_layer(wrapped, "first", x, names, general, top_k, temperature))
    return oracle_layer(wrapped, "second", hidden, names, general, top_k, temperature)


SETTINGS = {
    "two of four": {},
    "one": {"top_k": 1},
    "all, sharp": {"top_k": 4, "temperature": 0.1},
    "in another order": {"names": NAMES[::-1], "temperature": 3.0},
    "general knowledge": {"general": ["general"], "top_k": 3},
    "two of them": {"general": ["general", "wiki"], "temperature": 0.5},
}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_the_formula(settings):
    wrapped = library(dtype=jnp.float64)
    given = {name: value for name, value in settings.items() if name != "temperature"}
    router = routed(wrapped, router_temperature=settings.get("temperature", 1.0), **given)
    found = jpeft.lift(model)(router, X)
    np.testing.assert_allclose(found, oracle(wrapped, X, **settings), rtol=1e-10)
    assert not np.allclose(found, model(router.base, X), rtol=0.1)


@pytest.mark.usefixtures("x64")
def test_adapters_of_different_ranks():
    wrapped = library(ranks={**RANKS, "poems": 1, "maths": 4}, dtype=jnp.float64)
    router = routed(wrapped)
    assert router.adapters["arrow_router"].weights["first"]["arrow_A"].shape == (4, 4, 5)
    assert router.adapters["arrow_router"].config.r == 4
    np.testing.assert_allclose(jpeft.lift(model)(router, X), oracle(wrapped, X), rtol=1e-10)


def test_a_router_goes_onto_a_mesh_as_its_modules_do():
    wide = {"up": {"kernel": jax.ShapeDtypeStruct((64, 4096), jnp.float32)}}
    config = LoraConfig(r=4, target_modules=["up"])
    wrapped = jpeft.wrap(jpeft.wrap(wide, config, adapter_name="law"), config, adapter_name="poems")
    router = jpeft.create_arrow_adapter(wrapped, ["law", "poems"], ArrowConfig(top_k=1))
    mesh = jax.sharding.AbstractMesh((2, 2), ("fsdp", "tp"))
    placed = jpeft.shardings(router, mesh, [("kernel$", P("fsdp", "tp"))], tiny=1).adapters["arrow_router"]
    assert {name: sharding.spec for name, sharding in placed.weights["up"].items()} == {
        "arrow_A": P(None, None, "fsdp"),
        "arrow_B": P(None, "tp"),
        "arrow_prototypes": P(None, "fsdp"),
        "arrow_scaling": P(),
        "lora_A": P(None, "fsdp"),
        "lora_B": P("tp"),
    }


@pytest.mark.usefixtures("x64")
def test_ranks_above_the_sizes_of_a_module():
    wrapped = library(ranks={**RANKS, "law": 9}, dtype=jnp.float64)
    np.testing.assert_allclose(jpeft.lift(model)(routed(wrapped), X), oracle(wrapped, X), rtol=1e-10)


def test_an_untrained_adapter_scores_zero():
    """As in PEFT; a decomposition of zero would have some direction all the same."""
    wrapped = jpeft.wrap(library(), LoraConfig(r=2, target_modules=".*"), adapter_name="untrained")
    arrays = routed(wrapped, [*NAMES, "untrained"]).adapters["arrow_router"].weights["first"]
    lengths = np.linalg.norm(arrays["arrow_prototypes"], axis=1)
    np.testing.assert_allclose(lengths, [1, 1, 1, 1, 0], atol=1e-6)


def test_one_adapter_alone_is_that_adapter():
    wrapped = library()
    for name in NAMES:
        alone = jpeft.lift(model)(jpeft.set_adapter(wrapped, name), X.astype(np.float32))
        found = jpeft.lift(model)(routed(wrapped, [name], top_k=1), X.astype(np.float32))
        np.testing.assert_allclose(found, alone, rtol=1e-5, atol=1e-5)


def test_half_precision_routes_as_single_precision_does():
    wrapped = library(target_modules=["first"])
    narrow = dataclasses.replace(wrapped, base=jax.tree.map(lambda w: w.astype(jnp.bfloat16), wrapped.base))
    first = lambda params, x: x @ params["first"]["kernel"]  # noqa: E731
    x = jnp.asarray(X, jnp.bfloat16)
    found = jpeft.lift(first)(routed(narrow), x)
    assert found.dtype == jnp.bfloat16
    wide = dataclasses.replace(routed(narrow), base=jax.tree.map(lambda w: w.astype(jnp.float32), narrow.base))
    expected = jpeft.lift(first)(wide, x.astype(jnp.float32))
    np.testing.assert_allclose(found.astype(jnp.float32), expected, rtol=2e-2, atol=2e-2)


def test_adapters_of_half_precision():
    wrapped = library(dtype=jnp.bfloat16)
    router = routed(wrapped, general=["general"])
    assert {array.dtype for array in router.adapters["arrow_router"].weights["first"].values()} == {
        jnp.dtype(jnp.bfloat16),
        jnp.dtype(jnp.float32),  # arrow_scaling
    }
    assert jpeft.lift(model)(router, jnp.asarray(X, jnp.float32)).dtype == jnp.float32


# ---- where it is used -----------------------------------------------------------------------------------------------


def test_jit_vmap_and_the_size_of_the_program():
    wrapped, x = library(), jnp.asarray(X, jnp.float32)
    router, lifted = routed(wrapped), jpeft.lift(model)
    expected = lifted(router, x)
    np.testing.assert_allclose(jax.jit(lifted)(router, x), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(jax.vmap(lifted, (None, 0))(router, x), expected, rtol=1e-5, atol=1e-5)
    sizes = {len(str(jax.make_jaxpr(lifted)(routed(wrapped, names), x)).splitlines()) for names in (NAMES[:2], NAMES)}
    assert len(sizes) == 1


@pytest.mark.usefixtures("x64")
def test_gradients_pass_through_and_nothing_of_it_trains():
    router = routed(library(dtype=jnp.float64))
    total = lambda wrapped, x: jnp.sin(jpeft.lift(model)(wrapped, x)).sum()  # noqa: E731
    check_grads(lambda x: total(router, x), (jnp.asarray(X),), order=1, eps=1e-6)
    assert not any(jax.tree.leaves(jpeft.trainable_mask(router)))
    with pytest.raises(ValueError, match="nothing trains"):
        jpeft.partition(router)


def test_an_adapter_beside_the_router_trains():
    wrapped = jpeft.wrap(routed(library()), LoraConfig(r=2, target_modules=["first"]), adapter_name="new")
    wrapped = jpeft.set_adapter(wrapped, ["arrow_router", "new"])
    x = jnp.asarray(X, jnp.float32)
    loss = lambda wrapped: (jpeft.lift(model)(wrapped, x) ** 2).sum()  # noqa: E731
    mask, gradient = jpeft.trainable_mask(wrapped), jpeft.grad(loss)(wrapped)
    assert sum(jax.tree.leaves(mask)) == 2
    assert float(jnp.abs(gradient.adapters["new"].weights["first"]["lora_B"]).max()) > 0.1


def test_layers_in_a_stack_are_routed_one_by_one():
    ids, ranks = np.array([[1, 2, 3], [4, 5, 6]]), {"law": 2, "poems": 3}
    single = library(layer_tree(), ranks, target_modules=["q_proj"])
    whole = library(stacked(layer_tree()), ranks, target_modules=["q_proj"])
    whole = dataclasses.replace(whole, adapters={n: restacked(single.adapters[n], whole, n) for n in ranks})
    routers = [routed(wrapped, list(ranks), router_temperature=0.2) for wrapped in (single, whole)]
    (path,) = routers[1].adapters["arrow_router"].sites
    assert routers[1].adapters["arrow_router"].weights[path]["arrow_A"].shape == (4, 2, 3, 4)
    assert jpeft.explain(stacked_model, routers[1], ids).of(path) == ["transformed"]
    apart, together = (jax.jit(jpeft.lift(stacked_model))(router, ids) for router in routers)
    np.testing.assert_allclose(together, apart, rtol=1e-5, atol=1e-5)
    assert not np.allclose(apart, stacked_model(single.base, ids), rtol=0.1)


def restacked(single, wrapped, name):
    """The adapter of single layers in the stacks of the wrapped parameters."""
    adapter = wrapped.adapters[name]
    weights = {
        path: {
            key: jnp.stack([single.weights[path.replace("0:4", str(layer))][key] for layer in range(4)])
            for key in arrays
        }
        for path, arrays in adapter.weights.items()
    }
    return dataclasses.replace(adapter, weights=weights)


def test_the_gradient_through_a_scan():
    wrapped = routed(library(stacked(layer_tree()), {"law": 2, "poems": 2}, target_modules=["q_proj"]), NAMES[:2])
    wrapped = jpeft.wrap(wrapped, LoraConfig(r=2, target_modules=["v_proj"]), adapter_name="new")
    wrapped = jpeft.set_adapter(wrapped, ["arrow_router", "new"])
    loss = lambda wrapped: (jpeft.lift(stacked_model)(wrapped, np.array([[1, 2, 3]])) ** 2).sum()  # noqa: E731
    gradient = jax.jit(jpeft.grad(loss))(wrapped).adapters["new"].weights["model.layers.0:4.v_proj"]["lora_B"]
    assert np.all(np.abs(gradient).max((1, 2)) > 0)


def test_dropout_is_on_the_output():
    router = changed(routed(library(target_modules=["first"])), lora_dropout=0.5)
    first = lambda params, x: x @ params["first"]["kernel"]  # noqa: E731
    x = jnp.asarray(X, jnp.float32)
    whole = jpeft.lift(first)(router, x) - first(router.base, x)
    some = jpeft.lift(first)(jpeft.with_context(router, rng=jax.random.key(0)), x) - first(router.base, x)
    kept = np.abs(some) > 1e-6
    assert 0.2 < kept.mean() < 0.8
    np.testing.assert_allclose(some, np.where(kept, 2 * whole, 0), rtol=1e-4, atol=1e-5)


def test_the_scaling_of_the_router_and_of_its_adapters():
    wrapped, x = library(target_modules=["first"]), jnp.asarray(X, jnp.float32)
    first = lambda params, x: x @ params["first"]["kernel"]  # noqa: E731
    change = lambda wrapped: jpeft.lift(first)(wrapped, x) - first(wrapped.base, x)  # noqa: E731
    expected = 3 * change(routed(wrapped))
    np.testing.assert_allclose(change(jpeft.rescale_adapter_scale(routed(wrapped), 3)), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(change(routed(jpeft.rescale_adapter_scale(wrapped, 3))), expected, rtol=1e-4, atol=1e-5)


def test_the_adapters_stay_as_they_are_and_may_go():
    wrapped, x = library(), jnp.asarray(X, jnp.float32)
    router = routed(wrapped, general=["general"])
    for name in RANKS:
        assert router.adapters[name] is wrapped.adapters[name]
    expected = jpeft.lift(model)(router, x)
    for name in RANKS:
        router = jpeft.delete_adapter(router, name)
    assert list(router.adapters) == ["arrow_router"]
    np.testing.assert_array_equal(jpeft.lift(model)(router, x), expected)


def test_abstract_parameters():
    wrapped = library()
    shapes = jax.eval_shape(lambda wrapped: wrapped, wrapped)
    router = jpeft.create_arrow_adapter(shapes, NAMES, ArrowConfig(use_gks=True), ["general"])
    real = jpeft.create_arrow_adapter(wrapped, NAMES, ArrowConfig(use_gks=True), ["general"])
    own, expected = (each.adapters["arrow_router"] for each in (router, real))
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), own) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), expected
    )
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(own))


def test_the_config_says_what_was_chosen():
    config = routed(library(), general=["wiki"]).adapters["arrow_router"].config
    assert config.arrow_config.task_adapter_names == tuple(NAMES)
    assert config.arrow_config.gks_adapter_names == ("wiki",)
    assert (config.r, config.target_modules, config.arrow_config.top_k) == (2, ".*", 2)
    assert LoraConfig(arrow_config={"top_k": 2, "task_adapter_names": ["law"]}).arrow_config == ArrowConfig(
        top_k=2, task_adapter_names=("law",)
    )


# ---- what is refused ------------------------------------------------------------------------------------------------

NO_WEIGHT = "the Arrow router at 'first' chooses among adapters for each token, so that no merged weight stands for it"


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda params, x: x @ jnp.sort(params["first"]["kernel"]), r"merged: sort \(no rule\)"),
        (lambda params, x: params["first"]["kernel"], "merged"),
        (
            lambda params, x: jnp.ones((2, 7)) @ params["first"]["kernel"].T,
            r"merged: dot_general \(the transposed weight of a method that is not linear\)",
        ),
    ],
)
def test_a_use_of_the_weight_itself(function, reason):
    router, x = routed(library(target_modules=["first"])), jnp.asarray(X, jnp.float32)
    for use in (jpeft.lift(function), lambda router, x: jpeft.explain(function, router, x)):
        with pytest.raises(ValueError, match=f"{NO_WEIGHT}.*{reason}"):
            use(router, x)


def test_it_cannot_be_merged_or_mixed():
    router = routed(library(target_modules=["first"]))
    with pytest.raises(ValueError, match=f"{NO_WEIGHT}; expected uses x @ W"):
        jpeft.merge(router)
    with pytest.raises(ValueError, match=NO_WEIGHT):
        jpeft.convert_to_lora(router, "arrow_router", 2, "plain")
    with pytest.raises(ValueError, match="is no product of two thin factors of its own"):
        jpeft.mixed_batch(router)
    with pytest.raises(TypeError, match="adapter 'arrow_router' has .*expected plain LoRA of modules"):
        jpeft.create_arrow_adapter(router, ["arrow_router"], ArrowConfig(top_k=1), adapter_name="again")


def test_wrap_alone_makes_no_router():
    with pytest.raises(
        ValueError, match="arrow_config at 'first': a router has no values of its own.*create_arrow_ada"
    ):
        jpeft.wrap(random_like(PARAMS, 7), LoraConfig(target_modules=["first"], arrow_config=ArrowConfig()))


def embedding(wrapped):
    params = {"embed": {"embedding": jnp.ones((9, 5))}}
    return jpeft.wrap(params, LoraConfig(target_modules=["embed"]), adapter_name="law")


def other(**options):
    """The library with one adapter more, of other options."""
    config = LoraConfig(**{"r": 2, "target_modules": ".*", **options})
    return lambda wrapped: jpeft.wrap(wrapped, config, adapter_name="other")


def same(wrapped):
    return wrapped


WITH_OTHER = ["law", "other"]
REFUSED = {
    "adapter names are .'law', 'novels'.; expected at least one": (same, {"names": ["law", "novels"]}),
    "adapter names are .'law', 'law'.; expected each of them once": (same, {"names": ["law", "law"]}),
    "adapter names are ..; expected at least one": (same, {"names": []}),
    "top_k is 3, but there are 2 adapters: .'law', 'poems'.; expected no more": (
        same,
        {"names": NAMES[:2], "top_k": 3},
    ),
    "chooses among the adapters .*'novels'.*, but the parameters have .*'wiki'.; expected all": (
        same,
        {"general": ["novels"]},
    ),
    "the ranks are .'law': 2, 'poems': 2, 'wide': 3.; expected adapters of one rank": (
        lambda wrapped: jpeft.wrap(wrapped, LoraConfig(r=3, target_modules=".*"), adapter_name="wide"),
        {"names": NAMES[:2], "general": ["wide"]},
    ),
    "adapter 'other' has LoraConfig.*expected plain LoRA of modules": (other(use_dora=True), {"names": WITH_OTHER}),
    "adapter 'law': 'embed' is a embedding; expected adapters of linear": (embedding, {"names": ["law"], "top_k": 1}),
    "adapter 'other' trains second.kernel besides": (
        other(target_modules=["first"], modules_to_save=["second"]),
        {"names": ["other"], "top_k": 1},
    ),
    "adapter 'other' does not act on the router's modules, 'second' for one": (
        other(target_modules=["first"]),
        {"names": WITH_OTHER},
    ),
}


@pytest.mark.parametrize("text", REFUSED)
def test_adapters_that_are_refused(text):
    add, settings = REFUSED[text]
    wrapped = add(library())
    with pytest.raises((ValueError, TypeError), match=text):
        routed(wrapped, **settings)


def test_general_knowledge_is_asked_for_and_given():
    for config, general in ((ArrowConfig(), ["wiki"]), (ArrowConfig(use_gks=True), [])):
        with pytest.raises(ValueError, match=rf"use_gks is {config.use_gks} and general_adapter_names is .*; expected"):
            jpeft.create_arrow_adapter(library(), NAMES, config, general)


def test_a_config_that_is_none():
    with pytest.raises(TypeError, match="config is None; expected a jpeft.ArrowConfig"):
        jpeft.create_arrow_adapter(library(), NAMES, None)
    with pytest.raises(TypeError, match="arrow_config is 3; expected a jpeft.ArrowConfig"):
        jpeft.create_arrow_adapter(library(), NAMES, 3)


def test_a_name_that_is_taken():
    with pytest.raises(ValueError, match="there already is an adapter 'wiki'"):
        jpeft.create_arrow_adapter(library(), NAMES, ArrowConfig(), adapter_name="wiki")


def test_parameters_without_adapters():
    with pytest.raises(TypeError, match="expected the PeftParams that jpeft.wrap returns, not a dict"):
        jpeft.create_arrow_adapter(PARAMS, NAMES, ArrowConfig())


SETTINGS_REFUSED = {
    "top_k of ArrowConfig is 0; expected an integer of at least 1": {"top_k": 0},
    "top_k of ArrowConfig is 1.5; expected an integer": {"top_k": 1.5},
    "router_temperature of ArrowConfig is 0; expected a positive number": {"router_temperature": 0},
    "task_adapter_names is 'law'; expected a list of names": {"task_adapter_names": "law"},
    "gks_adapter_names is 'law'; expected a list of names": {"gks_adapter_names": "law"},
}


@pytest.mark.parametrize("text", SETTINGS_REFUSED)
def test_settings_that_are_refused(text):
    with pytest.raises((ValueError, TypeError), match=text):
        ArrowConfig(**SETTINGS_REFUSED[text])
