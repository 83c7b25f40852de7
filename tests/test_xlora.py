"""X-LoRA: both runs against the formula written out, in every setting; what trains, what is kept, what is refused."""

import dataclasses
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft
from jpeft import LoraConfig, XLoraConfig
from jpeft._array_axes import axes_of_weights
from jpeft._mixed import with_rows
from jpeft._xlora import experts_of, first_pass, router_of
from tests.harness import QUICKLY, assert_close, random_like

SHAPES = {
    "embed": {"embedding": (9, 4)},
    "project_in": {"kernel": (4, 6), "bias": (6,)},
    "layers": {"0:2": {"mlp": {"kernel": (2, 6, 6)}}},
    "lm_head": {"kernel": (6, 3)},
}
IDS = np.array([[1, 2, 3, 8], [0, 6, 6, 2]])
EXPERTS = {
    "law": {"r": 2, "lora_alpha": 5, "target_modules": ["project_in", "mlp", "lm_head"]},
    "poems": {"r": 1, "lora_alpha": 3, "target_modules": ["project_in", "mlp"]},
    "code": {"r": 4, "use_rslora": True, "target_modules": ["mlp", "lm_head"]},
}
NAMES = list(EXPERTS)


def hidden_state(params, ids):
    x = params["embed"]["embedding"][ids]
    x = jnp.tanh(x @ params["project_in"]["kernel"] + params["project_in"]["bias"])
    step = jax.checkpoint(lambda c, layer: (c + jnp.tanh(c @ layer["mlp"]["kernel"]), None))
    return jax.lax.scan(step, x, params["layers"]["0:2"])[0]


def function(params, ids):
    return hidden_state(params, ids) @ params["lm_head"]["kernel"]


def library(**options):
    """Random parameters with three adapters of random values, float64 where that is on."""
    return made(jnp.result_type(float), tuple(options.items()))


@cache
def made(dtype, options):
    wrapped = random_like(SHAPES, 3)
    for name, settings in EXPERTS.items():
        wrapped = jpeft.wrap(wrapped, LoraConfig(**{**settings, **dict(options)}), adapter_name=name)
    adapters = {
        name: dataclasses.replace(adapter, weights=random_like(adapter.weights, 10 * number, 0.7))
        for number, (name, adapter) in enumerate(wrapped.adapters.items())
    }
    return dataclasses.replace(wrapped, adapters=adapters)


def routed(wrapped=None, names=NAMES, **settings):
    """The active router of a library, whose classifier has random values."""
    config = XLoraConfig(**{"hidden_size": 6, "xlora_size": 8, **settings})
    wrapped = jpeft.create_xlora_adapter(wrapped or library(), names, config, rng=jax.random.key(1))
    router = wrapped.adapters["xlora"]
    router = dataclasses.replace(router, shared=random_like(router.shared, 70, 1.0))
    wrapped = dataclasses.replace(wrapped, adapters={**wrapped.adapters, "xlora": router})
    return jpeft.set_adapter(wrapped, "xlora")


def both_runs(wrapped, ids):
    wrapped = jpeft.with_xlora_scalings(wrapped, lambda params: jpeft.lift(hidden_state)(params, ids))
    return jpeft.lift(function)(wrapped, ids), wrapped.context["xlora_scalings"]


call = jax.jit(both_runs, compiler_options=QUICKLY)


def loss(wrapped, ids):
    outputs, scalings = both_runs(wrapped, ids)
    return jnp.sin(outputs).sum(), (outputs, scalings)


# ---- the formula written out ----------------------------------------------------------------------------------------

ORDER = ["project_in", "layers.0.mlp", "layers.1.mlp", "lm_head"]


def factors(adapters, name, module):
    """(A, B, scaling) of an expert at a single module, or None; adapters: {name: weights}."""
    path, layer = ("layers.0:2.mlp", int(module.split(".")[1])) if "layers" in module else (module, None)
    own = adapters[name].get(path)
    if own is None:
        return None
    a, b = own["lora_A"], own["lora_B"]
    settings = EXPERTS[name]
    alpha = settings.get("lora_alpha", 8)
    scaling = alpha / np.sqrt(settings["r"]) if settings.get("use_rslora") else alpha / settings["r"]
    return (a, b, scaling) if layer is None else (a[layer], b[layer], scaling)


def of_top(weights, config):
    if config.top_k_lora is not None:
        order = jnp.argsort(-weights, axis=-1)[..., : config.top_k_lora]
        among = jnp.zeros(weights.shape, bool)
        among = jnp.put_along_axis(among, order, True, axis=-1, inplace=False)
        weights = jnp.where(among, weights, 0.0)
        if config.enable_softmax_topk:
            exponents = jnp.where(among, jnp.exp(weights), 0.0)
            weights = exponents / exponents.sum(-1, keepdims=True)
    return weights


def run(base, adapters, ids, weights, config):
    """The model with a loop over modules and experts; weights (rows, tokens, modules or 1, experts), or a number."""

    def product(x, kernel, module):
        y = x @ kernel
        given = weights
        if not isinstance(weights, float):
            given = weights[:, :, ORDER.index(module) if weights.shape[2] > 1 else 0]
            given = of_top(given, config)
        for number, name in enumerate(NAMES):
            found = factors(adapters, name, module)
            if found is not None:
                share = given if isinstance(given, float) else given[..., number, None]
                a, b, scaling = found
                y = y + config.global_scaling_weight * scaling * share * (x @ a.T @ b.T)
        return y

    x = jnp.tanh(
        product(base["embed"]["embedding"][ids], base["project_in"]["kernel"], "project_in")
        + base["project_in"]["bias"]
    )
    for layer in range(2):
        x = x + jnp.tanh(product(x, base["layers"]["0:2"]["mlp"]["kernel"][layer], f"layers.{layer}.mlp"))
    return x, product(x, base["lm_head"]["kernel"], "lm_head")


def expected(base, adapters, classifier, ids, config):
    state = jax.lax.stop_gradient(run(base, adapters, ids, float(config.scaling_pass_value), config)[0])
    *inner, last = [(classifier[f"{name}.weight"], classifier[f"{name}.bias"]) for name in config.layers]
    for weight, bias in inner:
        state = jnp.maximum(state @ weight.T + bias, 0)
    logits = (state @ last[0].T + last[1]).reshape(*ids.shape, -1, len(NAMES))
    if config.enable_softmax:
        exponents = jnp.exp(logits / config.softmax_temperature)
        logits = exponents / exponents.sum(-1, keepdims=True)
    return run(base, adapters, ids, logits, config)[1], logits


SETTINGS = {
    "plain": {},
    "deep, by layers": {
        "xlora_depth": 3,
        "layerwise_scalings": True,
        "softmax_temperature": 0.5,
        "global_scaling_weight": 1.7,
        "use_trainable_adapters": True,
    },
    "two of three": {"top_k_lora": 2, "xlora_depth": 2, "xlora_dropout_p": 0.0},
    "a softmax of two": {"top_k_lora": 2, "enable_softmax": False, "enable_softmax_topk": True},
    "weighed in the first run": {"scaling_pass_value": 0.3, "layerwise_scalings": True, "enable_softmax": False},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_both_runs_are_the_formula(x64, settings):
    wrapped = routed(**settings)
    router: Any = wrapped.adapters["xlora"]
    config = router.config
    adapters = {name: wrapped.adapters[name].weights for name in NAMES}
    assert config.layers[-1].endswith({1: ".0", 2: ".2", 3: ".6"}[config.xlora_depth])

    def formula(adapters, classifier):
        outputs, scalings = expected(wrapped.base, adapters, classifier, IDS, config)
        return jnp.sin(outputs).sum(), (outputs, scalings)

    got = call(wrapped, IDS)
    _, want = formula(adapters, router.shared)
    assert_close(got, want)
    base = function(wrapped.base, IDS)
    assert np.abs(got[0] - base).max() > 0.05 and np.ptp(got[1], axis=(0, 1)).max() > 0.01
    if not config.use_trainable_adapters:
        return
    ours = jax.jit(jpeft.grad(lambda wrapped: loss(wrapped, IDS)[0]), compiler_options=QUICKLY)
    theirs = jax.jit(jax.grad(formula, argnums=(0, 1), has_aux=True), compiler_options=QUICKLY)
    own, (of_adapters, of_classifier) = ours(wrapped).adapters["xlora"], theirs(adapters, router.shared)[0]
    assert_close(own.shared, of_classifier)
    assert all(np.abs(array).max() > 1e-6 for array in own.shared.values())
    of_experts = {
        path: {**router.weights[path], **{name: arrays[name] for name in ("xlora_A", "xlora_B")}}
        for path, arrays in own.weights.items()
    }
    stacked = experts_of(dataclasses.replace(router, weights=of_experts))
    assert_close({name: expert.weights for name, expert in stacked.items()}, of_adapters)


def test_the_experts_are_told_apart_again():
    wrapped = library()
    router: Any = routed(wrapped).adapters["xlora"]
    assert router.weights["layers.0:2.mlp"]["xlora_A"].shape == (2, 3, 4, 6)
    assert router.weights["layers.0:2.mlp"]["xlora_layer"].tolist() == [1, 2]
    assert router.weights["lm_head"]["xlora_A"].shape == (3, 4, 6) and not router.weights["lm_head"]["xlora_B"][1].any()
    found = experts_of(router)
    assert list(found) == NAMES and router.config.adapters == {name: name for name in NAMES}
    for name, expert in found.items():
        own = wrapped.adapters[name]
        assert (expert.config, expert.sites) == (own.config, own.sites)
        for got, want in zip(
            jax.tree.leaves((expert.weights, expert.scaling)), jax.tree.leaves((own.weights, own.scaling)), strict=True
        ):
            np.testing.assert_array_equal(got, want)


def test_the_beginning_of_the_classifier_is_that_of_linear_layers():
    wrapped = jpeft.create_xlora_adapter(
        library(), NAMES, XLoraConfig(hidden_size=6, xlora_depth=2, xlora_size=40, layerwise_scalings=True)
    )
    shared = wrapped.adapters["xlora"].shared
    assert jax.tree.map(jnp.shape, shared) == {
        "internal_xlora_classifier.layers.0.weight": (40, 6),
        "internal_xlora_classifier.layers.0.bias": (40,),
        "internal_xlora_classifier.layers.3.weight": (12, 40),
        "internal_xlora_classifier.layers.3.bias": (12,),
    }
    for name, array in shared.items():
        bound = 1 / np.sqrt(6 if ".0." in name else 40)
        assert 0.8 * bound < np.abs(array).max() <= bound
    assert wrapped.active == ("law",) and list(wrapped.adapters) == [*NAMES, "xlora"]


# ---- in every way to call it ----------------------------------------------------------------------------------------


def test_other_ways_to_call_it_give_the_same(x64):
    wrapped = routed(layerwise_scalings=True)
    want, scalings = jax.jit(both_runs)(wrapped, IDS)
    alone = dataclasses.replace(wrapped, adapters={"xlora": wrapped.adapters["xlora"]})
    by_rows = jax.jit(jax.vmap(lambda w, ids: both_runs(w, ids[None])[0][0], in_axes=(None, 0)))(
        alone, jnp.asarray(IDS)
    )
    np.testing.assert_allclose(by_rows, want, rtol=1e-12)
    # What is kept of a call is enough for the same batch, and rows may be repeated.
    given = jpeft.with_context(wrapped, xlora_scalings=scalings)
    np.testing.assert_allclose(jpeft.lift(function)(given, IDS), want, rtol=1e-12)
    twice = jpeft.lift(function)(with_rows(given, 4), np.repeat(IDS, 2, axis=0))
    np.testing.assert_allclose(twice, np.repeat(want, 2, axis=0), rtol=1e-12)
    assert jpeft.explain(function, given, IDS).of("lm_head") == ["transformed"]
    shapes = jax.eval_shape(lambda w: w, library())
    abstract = jpeft.set_adapter(
        jpeft.create_xlora_adapter(shapes, NAMES, XLoraConfig(hidden_size=6, layerwise_scalings=True)), "xlora"
    )
    own, real = (
        jax.tree.map(jnp.shape, (a.weights, a.shared)) for a in (w.adapters["xlora"] for w in (abstract, wrapped))
    )
    assert own == real
    assert jax.eval_shape(both_runs, abstract, IDS)[0].shape == want.shape
    assert {name: adapter.config for name, adapter in experts_of(abstract.adapters["xlora"]).items()} == {
        name: wrapped.adapters[name].config for name in NAMES
    }


def test_training_moves_the_classifier_alone_and_compiles_once():
    wrapped, compiled = routed(), []
    wrapped = dataclasses.replace(wrapped, adapters={"xlora": wrapped.adapters["xlora"]})
    mask = jpeft.trainable_mask(wrapped)

    @jax.jit
    def step(wrapped):
        compiled.append(None)
        gradient = jpeft.grad(lambda w: loss(w, IDS)[0])(wrapped)
        return jax.tree.map(lambda t, p, g: p - 0.1 * g if t else p, mask, wrapped, gradient)

    stepped = step(step(wrapped))
    assert len(compiled) == 1 and stepped.context == {}
    moved = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), stepped, wrapped)
    assert moved == mask and all(mask.adapters["xlora"].shared.values())
    trained = routed(use_trainable_adapters=True)
    assert [
        name for name, trains in jpeft.trainable_mask(trained).adapters["xlora"].weights["project_in"].items() if trains
    ] == [
        "xlora_A",
        "xlora_B",
    ]


@pytest.mark.filterwarnings("ignore:the function uses no weight")
def test_dropout_of_the_classifier_and_of_the_experts():
    wrapped = routed(xlora_depth=2, xlora_dropout_p=0.5)

    @partial(jax.jit, compiler_options=QUICKLY)
    def drawn(wrapped, seed):
        return both_runs(jpeft.with_context(wrapped, rng=jax.random.key(seed)), IDS)

    scalings = call(wrapped, IDS)[1]
    noisy = [drawn(wrapped, seed) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(noisy[0][1], noisy[1][1])
    assert np.abs(noisy[0][1] - scalings).max() > 0.01 and np.abs(noisy[0][1] - noisy[2][1]).max() > 0.01
    dropping = routed(library(lora_dropout=0.5))
    noisy = [drawn(dropping, seed)[0] for seed in range(2)]
    assert np.abs(noisy[0] - noisy[1]).max() > 0.01
    # Each expert drops entries of its own: alike experts do not add up to one of twice the size.
    two = library(lora_dropout=0.5)
    two = dataclasses.replace(two, adapters={"law": two.adapters["law"], "again": two.adapters["law"]})
    same = routed(two, ["law", "again"])
    x = jnp.ones((1, 1, 4))
    up = jpeft.lift(lambda params, x: x @ params["project_in"]["kernel"])

    @partial(jax.jit, compiler_options=QUICKLY)
    def change(shares):
        given = jpeft.with_context(same, rng=jax.random.key(0), xlora_scalings=shares[None, None, None])
        return up(given, x) - x @ same.base["project_in"]["kernel"]

    first, second = change(jnp.array([1.0, 0.0])), change(jnp.array([0.0, 1.0]))
    assert np.abs(first - second).max() > 1e-3
    np.testing.assert_allclose(change(jnp.array([1.0, 1.0])), first + second, atol=1e-5)


def test_a_bfloat16_model_stays_one():
    wrapped = routed()
    narrow = dataclasses.replace(wrapped, base=jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), wrapped.base))
    outputs, scalings = call(narrow, IDS)
    assert (outputs.dtype, scalings.dtype) == (jnp.bfloat16, jnp.float32)
    want = call(wrapped, IDS)[0]
    assert np.abs(outputs.astype(jnp.float32) - want).max() < 0.1 * np.abs(want).max()


def test_the_axes_of_a_router():
    assert axes_of_weights(routed().adapters["xlora"])["layers.0:2.mlp"] == {
        "xlora_A": "..i",
        "xlora_B": ".o.",
        "xlora_layer": "",
        "xlora_scaling": ".",
    }


def test_without_an_active_router_nothing_happens():
    wrapped = library()
    assert (
        jpeft.with_xlora_scalings(wrapped, lambda params: jnp.zeros(1 // 0)) is wrapped
        and first_pass(wrapped) is wrapped
    )
    assert router_of(wrapped) is None
    beside = jpeft.set_adapter(routed(), ["law", "xlora"])
    assert first_pass(beside).active == ("law",)


# ---- what is refused ------------------------------------------------------------------------------------------------


def refusals():
    wrapped = routed()
    given = jpeft.with_context(wrapped, xlora_scalings=jnp.ones((2, 4, 1, 3)))
    create = jpeft.create_xlora_adapter
    other = jpeft.wrap(
        {"project_in": {"kernel": jnp.ones((2, 2, 6))}},
        LoraConfig(target_modules=["project_in"]),
        layouts={"project_in.kernel": "iio"},
    )
    mixed = dataclasses.replace(library(), adapters={**library().adapters, "odd": other.adapters["default"]})
    saved = jpeft.wrap(
        library(), LoraConfig(target_modules=["project_in"], modules_to_save=["lm_head"]), adapter_name="saved"
    )
    twice = create(wrapped, ["law"], XLoraConfig(hidden_size=6), "second")
    in_a_row = lambda params, x: x.reshape(-1, 4) @ params["project_in"]["kernel"]  # noqa: E731
    norm = lambda params, x: x @ params["project_in"]["kernel"][:, 1:3]  # noqa: E731
    x = jnp.ones((2, 4, 4))
    return {
        r"adapter 'xlora' needs xlora_scalings for each row of the batch": lambda: jpeft.lift(function)(wrapped, IDS),
        r"hidden state is of shape \(2, 4, 5\); expected \(rows, tokens, 6\), as hidden_size of adapter 'xlora' is 6": (
            lambda: jpeft.xlora_scalings(wrapped, jnp.ones((2, 4, 5)))
        ),
        r"hidden state is of shape \(4, 6\); expected": lambda: jpeft.xlora_scalings(wrapped, jnp.ones((4, 6))),
        "no X-LoRA adapter is active: law; expected one": lambda: jpeft.xlora_scalings(library(), jnp.ones((2, 4, 6))),
        r"X-LoRA adapters \['xlora', 'second'\] are all active": (
            lambda: first_pass(jpeft.set_adapter(twice, ["xlora", "second"]))
        ),
        r"xlora_scalings are float32 of shape \(2, 4, 3\); expected numbers \(rows, tokens": (
            lambda: jpeft.with_context(wrapped, xlora_scalings=jnp.ones((2, 4, 3)))
        ),
        r"xlora_scalings are int32 of shape": (
            lambda: jpeft.with_context(wrapped, xlora_scalings=jnp.ones((2, 4, 1, 3), jnp.int32))
        ),
        r"are of shape \(2, 4, 1, 2\), for 2 experts; expected 3: law, poems, code": (
            lambda: jpeft.with_context(wrapped, xlora_scalings=jnp.ones((2, 4, 1, 2)))
        ),
        r"for \(rows, tokens\) = \(2, 4\), but 'project_in' gets an array of shape \(2, 3, 4\)": (
            lambda: jpeft.lift(function)(given, IDS[:, :3])
        ),
        r"but 'project_in' gets an array of shape \(8, 4\); expected \(rows": lambda: jpeft.lift(in_a_row)(given, x),
        "adapter 'xlora' of XLoraConfig is no change of a weight, so that no merged": lambda: jpeft.merge(given),
        r"X-LoRA at 'project_in' .*uses the whole weight in products": lambda: jpeft.lift(norm)(given, x),
        r"adapter 'xlora' .XLoraConfig. is no product of two thin factors": (
            lambda: jpeft.mixed_batch(wrapped, ["xlora"])
        ),
        "hidden_size is None; expected the size of the model": lambda: create(library(), NAMES, XLoraConfig()),
        "top_k_lora is 4, but there are 3 experts: law, poems, code; expected no more": (
            lambda: create(library(), NAMES, XLoraConfig(hidden_size=6, top_k_lora=4))
        ),
        r"adapter names are \['law', 'art'\]": lambda: create(library(), ["law", "art"], XLoraConfig(hidden_size=6)),
        "there already is an adapter 'law'": lambda: create(library(), NAMES, XLoraConfig(hidden_size=6), "law"),
        r"adapter 'odd' acts on 'project_in' as .* expected experts that were wrapped with the same layouts": (
            lambda: create(mixed, ["law", "odd"], XLoraConfig(hidden_size=6))
        ),
        r"adapter 'saved' trains lm_head.kernel besides its factors": (
            lambda: create(saved, ["law", "saved"], XLoraConfig(hidden_size=6))
        ),
        "X-LoRA has no experts of its own to begin with; expected jpeft.create_xlora_adapter": (
            lambda: jpeft.wrap(random_like(SHAPES, 1), XLoraConfig(hidden_size=6))
        ),
        "hidden_size is 0; expected an integer of at least 1": lambda: XLoraConfig(hidden_size=0),
        "xlora_depth is 0; expected": lambda: XLoraConfig(xlora_depth=0),
        "xlora_size is 1.5; expected": lambda: XLoraConfig(xlora_size=1.5),  # pyright: ignore[reportArgumentType]
        "top_k_lora is True; expected": lambda: XLoraConfig(top_k_lora=True),
        "xlora_dropout_p is 1.0; expected a rate": lambda: XLoraConfig(xlora_dropout_p=1.0),
        "softmax_temperature is 0.0; expected a number above 0": lambda: XLoraConfig(softmax_temperature=0.0),
    }


@pytest.mark.filterwarnings("ignore:the function uses no weight")
def test_what_cannot_be_right_is_refused():
    for text, refused in refusals().items():
        with pytest.raises(ValueError, match=text):
            refused()


def test_what_is_no_expert_and_no_config():
    wrapped = library()
    dora = jpeft.wrap(wrapped, LoraConfig(target_modules=["project_in"], use_dora=True), adapter_name="dora")
    table = jpeft.wrap(wrapped, LoraConfig(target_modules=["embed"]), adapter_name="table")
    refused = {
        "adapter 'dora' has .* expected plain LoRA of modules": lambda: routed(dora, ["law", "dora"]),
        "adapter 'table': 'embed' is a embedding; expected": lambda: routed(table, ["law", "table"]),
        "config is LoraConfig.* expected a jpeft.XLoraConfig": (
            lambda: jpeft.create_xlora_adapter(wrapped, NAMES, LoraConfig())
        ),
        r"adapters is \('law',\); expected a dict: the path of each expert": lambda: XLoraConfig(adapters=["law"]),  # pyright: ignore
        "expected the PeftParams": lambda: jpeft.create_xlora_adapter({}, NAMES, XLoraConfig(hidden_size=6)),  # pyright: ignore
    }
    for text, call in refused.items():
        with pytest.raises(TypeError, match=text):
            call()


def test_settings_that_do_not_go_together_are_warned_of():
    unfit: list[dict[str, Any]] = [{"enable_softmax": False}, {"top_k_lora": 2}]
    for settings in unfit:
        with pytest.warns(UserWarning, match="enable_softmax_topk is True with top_k_lora="):
            XLoraConfig(enable_softmax_topk=True, **settings)
