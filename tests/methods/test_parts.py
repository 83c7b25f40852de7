"""BEFT, LN tuning and trainable tokens by their formulas, in numpy; what they cost; what they refuse."""

import dataclasses
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft
from tests.harness import random_like

WORDS, FEATURES = 9, 6
IDS = np.array([[1, 5, 0], [7, 8, 7]], np.int32)
SHAPES = {
    "model": {
        "embed_tokens": {"embedding": (WORDS, FEATURES)},
        "norm": {"scale": (FEATURES,), "bias": (FEATURES,)},
        "v_proj": {"kernel": (FEATURES, FEATURES), "bias": (FEATURES,)},
        "o_proj": {"kernel": (FEATURES, FEATURES)},
    },
    "lm_head": {"kernel": (FEATURES, WORDS)},
}

pytestmark = pytest.mark.usefixtures("x64")


def apply(params, ids):
    own = params["model"]
    x = own["embed_tokens"]["embedding"][ids]
    x = x / jnp.sqrt((x**2).mean(-1, keepdims=True)) * own["norm"]["scale"] + own["norm"]["bias"]
    x = x @ own["v_proj"]["kernel"] + own["v_proj"]["bias"] + jnp.tanh(x @ own["o_proj"]["kernel"])
    return x @ (params["lm_head"]["kernel"] if "lm_head" in params else own["embed_tokens"]["embedding"].T)


def by_formula(params, ids, beta=0.0, beta_o=0.0):
    own = jax.tree.map(lambda leaf: np.array(leaf, np.float64), params["model"])
    x = own["embed_tokens"]["embedding"][ids]
    x = x / np.sqrt((x**2).mean(-1, keepdims=True)) * own["norm"]["scale"] + own["norm"]["bias"]
    x = x @ own["v_proj"]["kernel"] + own["v_proj"]["bias"] + beta + np.tanh(x @ own["o_proj"]["kernel"] + beta_o)
    return x @ (params["lm_head"]["kernel"] if "lm_head" in params else own["embed_tokens"]["embedding"].T)


def tree(tied=False):
    params = random_like(SHAPES, 7)
    return {"model": params["model"]} if tied else params


def wrap(config, params=None):
    wrapped = jpeft.wrap(tree() if params is None else params, config, dtype=jnp.float64)
    return dataclasses.replace(wrapped, adapters=random_like(wrapped.adapters, 5))


def outputs(wrapped):
    return np.asarray(jax.jit(jpeft.lift(apply))(wrapped, IDS)), np.asarray(apply(jpeft.merge(wrapped), IDS))


def with_leaf(params, *names, change):
    *path, name = names
    copied = jax.tree.map(np.array, params)
    own = copied
    for step in path:
        own = own[step]
    own[name] = change(own[name])
    return copied


def close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-10)


def test_beft():
    wrapped = wrap(jpeft.BeftConfig(target_modules=["v_proj"]))
    beta = np.asarray(wrapped.adapters["default"].weights["model.v_proj"]["beft_bias"])
    assert beta.shape == (1, FEATURES)
    for found in outputs(wrapped):
        close(found, by_formula(wrapped.base, IDS, beta=beta[0]))


def test_beft_of_a_layer_without_bias_acts_beside_it_and_is_not_merged():
    wrapped = wrap(jpeft.BeftConfig(target_modules=["o_proj"]))
    beta = np.asarray(wrapped.adapters["default"].weights["model.o_proj"]["beft_bias"])
    close(jpeft.lift(apply)(wrapped, IDS), by_formula(wrapped.base, IDS, beta_o=beta[0]))
    with pytest.raises(ValueError, match=r"BEFT at 'model.o_proj': the layer has no bias to merge into"):
        jpeft.merge(wrapped)


def test_beft_begins_as_zero_or_normal():
    for init, deviation in ((True, 0.0), (False, 1.0)):
        params = {"v": {"kernel": jnp.ones((2, 4096)), "bias": jnp.ones(4096)}}
        drawn = jpeft.wrap(params, jpeft.BeftConfig(target_modules=["v"], init_weights=init)).adapters["default"]
        assert float(drawn.weights["v"]["beft_bias"].std()) == pytest.approx(deviation, abs=0.05)


@pytest.mark.parametrize("targets", [["norm"], r"model\.norm"])
def test_ln_tuning(targets):
    config = jpeft.LNTuningConfig(target_modules=targets)
    fresh = jpeft.wrap(tree(), config)
    close(jpeft.lift(apply)(fresh, IDS), by_formula(fresh.base, IDS))
    wrapped = wrap(config)
    copies = wrapped.adapters["default"].replaced
    assert sorted(copies) == ["model.norm.bias", "model.norm.scale"]
    expected = wrapped.base
    for name in ("scale", "bias"):
        expected = with_leaf(expected, "model", "norm", name, change=lambda _, n=name: copies[f"model.norm.{n}"])
    for found in outputs(wrapped):
        close(found, by_formula(expected, IDS))
    trained = jpeft.partition(wrapped)[0]
    assert [leaf.shape for leaf in jax.tree.leaves(trained)] == [(FEATURES,), (FEATURES,)]
    total = sum(leaf.size for leaf in jax.tree.leaves(wrapped.base))
    assert jpeft.count_parameters(wrapped) == (2 * FEATURES, total + 2 * FEATURES)


def test_ln_tuning_of_other_modules():
    config = jpeft.LNTuningConfig(target_modules="all-linear", exclude_modules=["o_proj"])
    wrapped = wrap(config)
    adapter = wrapped.adapters["default"]
    assert adapter.config.target_modules == ("model.v_proj",)
    assert sorted(adapter.replaced) == ["model.v_proj.bias", "model.v_proj.kernel"]
    whole = wrap(jpeft.LNTuningConfig(target_modules=["model"])).adapters["default"]
    assert sum(leaf.size for leaf in whole.replaced.values()) == sum(map(jnp.size, jax.tree.leaves(tree()["model"])))


def test_ln_tuning_of_a_table_that_is_the_output_layer_acts_on_the_lookup_alone():
    wrapped = wrap(jpeft.LNTuningConfig(target_modules=["embed_tokens"]), tree(tied=True))
    with pytest.warns(UserWarning, match="is the output layer too"):
        found = jpeft.lift(apply)(wrapped, IDS)
    table = wrapped.adapters["default"].replaced["model.embed_tokens.embedding"]
    apart = {**wrapped.base, "lm_head": {"kernel": np.asarray(wrapped.base["model"]["embed_tokens"]["embedding"]).T}}
    close(found, by_formula(with_leaf(apart, "model", "embed_tokens", "embedding", change=lambda _: table), IDS))


def test_ln_tuning_of_stacked_layers():
    params = random_like({"layers": {"0:3": {"norm": {"scale": (3, 4)}, "q": {"kernel": (3, 4, 4)}}}}, 1)
    wrapped = wrap(jpeft.LNTuningConfig(target_modules=["norm"]), params)
    assert {path: leaf.shape for path, leaf in wrapped.adapters["default"].replaced.items()} == {
        "layers.0:3.norm.scale": (3, 4)
    }
    with pytest.raises(ValueError, match=r"target_modules=\('layers.1.norm',\) would train"):
        wrap(jpeft.LNTuningConfig(target_modules=["layers.1.norm"]), params)


TABLES = {"embed_tokens": ["embed_tokens"], "head": ["lm_head"], "both": ["embed_tokens", "lm_head"], "default": None}


@pytest.mark.parametrize("targets", TABLES.values(), ids=TABLES)
def test_trainable_tokens(targets):
    rows = (7, 0, 5)
    wrapped = wrap(jpeft.TrainableTokensConfig(token_indices=rows, target_modules=targets))
    own = wrapped.adapters["default"].rows
    expected = wrapped.base
    for leaf, names in (
        ("model.embed_tokens.embedding", ("model", "embed_tokens", "embedding")),
        ("lm_head.kernel", ("lm_head", "kernel")),
    ):
        asked = targets is None and names[0] == "model" or targets is not None and names[-2] in targets
        assert (leaf in own) == asked
        if asked:

            def put(table, values=own[leaf].values, turned=names[0] == "lm_head"):
                table = table.T.copy() if turned else table.copy()
                table[list(rows)] = values
                return table.T if turned else table

            expected = with_leaf(expected, *names, change=put)
    for found in outputs(wrapped):
        close(found, by_formula(expected, IDS))


def test_trainable_tokens_of_a_table_that_is_the_output_layer():
    for targets in (None, ["embed_tokens", "lm_head"]):
        config = jpeft.TrainableTokensConfig(token_indices=[7, 0], target_modules=targets)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            wrapped = wrap(config, tree(tied=True))
        values = wrapped.adapters["default"].rows["model.embed_tokens.embedding"].values

        def put(table, values=values):
            table = table.copy()
            table[[7, 0]] = values
            return table

        expected = with_leaf(wrapped.base, "model", "embed_tokens", "embedding", change=put)
        for found in outputs(wrapped):
            close(found, by_formula(expected, IDS))


def test_trainable_tokens_begin_as_they_are_or_normal():
    params = {"wte": {"embedding": jnp.full((9, 4096), 0.5)}}
    rows = [
        jpeft.wrap(params, jpeft.TrainableTokensConfig(token_indices=[2], init_weights=init)).adapters["default"].rows
        for init in (True, False)
    ]
    assert bool((rows[0]["wte.embedding"].values == 0.5).all())
    drawn = np.asarray(rows[1]["wte.embedding"].values)
    assert (abs(drawn.mean()), drawn.std()) == (pytest.approx(0, abs=0.06), pytest.approx(1, abs=0.06))
    abstract = jpeft.wrap(
        jax.eval_shape(lambda: params), jpeft.TrainableTokensConfig(token_indices=[2], init_weights=False)
    )
    assert abstract.adapters["default"].rows["wte.embedding"].values.shape == (1, 4096)


LN, TOKENS = jpeft.LNTuningConfig, jpeft.TrainableTokensConfig
REFUSED = {
    "no target": (LN(), r"target_modules is None; name the modules to train, for example .*'embed_tokens'"),
    "no module": (LN(target_modules=["nrm"]), r"target_modules=\('nrm',\) selects no module; nearest: 'nrm' .*norm"),
    "nested": (LN(target_modules=["model", "norm"]), "means 'model.norm' and 'model', which holds it; expected one of"),
    "no weight": (
        TOKENS(token_indices=[1], target_modules=["model"]),
        "means 'model', which has no weight; the tables",
    ),
    "no row": (TOKENS(token_indices=[WORDS]), r"token_indices for 'model.embed_tokens.embedding' of 9 rows is \[9\]"),
    "no rows": (TOKENS(), r"of 9 rows is \[\]; expected rows that it has, at least one"),
    "saved": (
        TOKENS(token_indices=[1], target_modules=["lm_head"], modules_to_save=["head"]),
        "selects no module: all that it means is taken away",
    ),
}


@pytest.mark.parametrize(("config", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        wrap(config)


def test_a_table_that_is_not_known_is_refused():
    tables = {"one": {"embedding": jnp.ones((3, 2))}, "two": {"embedding": jnp.ones((3, 2))}}
    with pytest.raises(ValueError, match=r"known among: one, two; say it as target_modules=\[name\]"):
        wrap(TOKENS(token_indices=[1]), tables)


def test_two_adapters_of_one_module_are_refused():
    wrapped = jpeft.wrap(wrap(LN(target_modules=["norm"])), LN(target_modules=["norm"]), adapter_name="other")
    with pytest.raises(ValueError, match=r"'default' and 'other' both replace 'model.norm.\w+' in full"):
        jpeft.set_adapter(wrapped, ["default", "other"])
    tokens = jpeft.wrap(wrap(TOKENS(token_indices=[1])), TOKENS(token_indices=[1]), adapter_name="other")
    with pytest.raises(ValueError, match="'default' and 'other' both have row 1"):
        jpeft.set_adapter(tokens, ["default", "other"])


COSTS = {
    "beft": (jpeft.BeftConfig(target_modules=["v_proj"]), FEATURES, 0),
    "beft without bias": (jpeft.BeftConfig(target_modules=["o_proj"]), FEATURES, FEATURES),
    "ln tuning": (LN(target_modules=["norm"]), 2 * FEATURES, 0),
    "trainable tokens": (TOKENS(token_indices=[7, 0], target_modules=["lm_head"]), 2 * FEATURES, 2 * 2 * FEATURES),
}


@pytest.mark.parametrize(("config", "parameters", "flops"), COSTS.values(), ids=COSTS)
def test_costs(config, parameters, flops):
    wrapped, tokens = wrap(config), 4096
    ids = jnp.zeros(tokens, jnp.int32)
    assert jpeft.count_parameters(wrapped)[0] == parameters

    def measured(active):
        own = wrapped if active else jpeft.disable_adapters(wrapped)
        return jax.jit(jpeft.lift(apply)).lower(own, ids).compile().cost_analysis()["flops"] / tokens

    # Adding the changed bias up, and finding the place of a row, cost a little more once for all tokens.
    assert measured(True) - measured(False) == pytest.approx(flops, abs=0.5)
