"""Rows of a table that train: what they replace, where, and that nothing else trains."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft
from tests.harness import assert_close, on_merged, random_like, results

ROWS = (5, 0, 7)
IDS = np.array([[1, 5, 0], [7, 6, 6]], np.int32)


def tree(tied=True):
    sizes = {"model": {"embed_tokens": {"embedding": (8, 4)}, "q": {"kernel": (4, 4)}}}
    return random_like({**sizes, **({} if tied else {"lm_head": {"kernel": (4, 8)}})}, 0)


def apply(params, ids):
    table = params["model"]["embed_tokens"]["embedding"]
    x = jnp.tanh(jnp.take(table, ids, axis=0, mode="fill") @ params["model"]["q"]["kernel"])
    return x @ params["lm_head"]["kernel"] if "lm_head" in params else x @ table.T


USES = {
    "take, fill": lambda table, ids: jnp.take(table, ids, axis=0, mode="fill"),
    "index": lambda table, ids: table[ids],
    "clip": lambda table, ids: jnp.take(table, ids - 2, axis=0, mode="clip"),
    "transposed first": lambda table, ids: table.T[:, ids],
    "one row": lambda table, ids: table[ids[0, 1]],
    "tied": lambda table, ids: table[ids] @ table.T,
    "tied, einsum": lambda table, ids: jnp.einsum("vd,btd->vbt", table, table[ids]),
    "whole": lambda table, ids: jnp.tanh(table),
    "one-hot": lambda table, ids: jax.nn.one_hot(ids, 8, dtype=table.dtype) @ table,
    "cast": lambda table, ids: table.astype(jnp.float32)[ids].astype(table.dtype),
}


def wrap(params, indices=ROWS, **settings):
    config = jpeft.LoraConfig(r=2, **{"target_modules": ["q"], "trainable_token_indices": indices, **settings})
    wrapped = jpeft.wrap(params, config, dtype=jnp.result_type(float))
    return dataclasses.replace(wrapped, adapters=random_like(wrapped.adapters, 5))


@pytest.fixture(autouse=True)
def double():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_lifted_equals_merged(use):
    """For every use of the table, with derivatives; values outside the table as without the adapter."""
    ids = jnp.array(IDS if use is not USES["take, fill"] else np.where(IDS == 6, 11, IDS))

    def function(params, ids):
        return jnp.nan_to_num(use(params["model"]["embed_tokens"]["embedding"], ids)), params["model"]["q"][
            "kernel"
        ] * 2

    wrapped = wrap(tree())
    assert_close(results(jpeft.lift(function), wrapped, (ids,)), results(on_merged(function), wrapped, (ids,)))


@pytest.mark.parametrize("tied", [True, False])
def test_the_rows_are_values(tied):
    wrapped = wrap(tree(tied))
    rows = wrapped.adapters["default"].rows["model.embed_tokens.embedding"]
    table = np.array(wrapped.base["model"]["embed_tokens"]["embedding"])
    table[list(ROWS)] = rows.values
    merged = jpeft.merge(wrapped)
    np.testing.assert_array_equal(merged["model"]["embed_tokens"]["embedding"], table)
    np.testing.assert_allclose(jpeft.lift(apply)(wrapped, IDS), apply(merged, IDS), rtol=1e-12)
    explained = jpeft.explain(apply, wrapped, IDS)
    assert explained.of("model.embed_tokens") == ["transformed"] * (2 if tied else 1)


def test_they_start_as_they_are_and_nothing_else_trains():
    params = tree()
    config = jpeft.LoraConfig(r=2, target_modules=["q"], trainable_token_indices=ROWS)
    wrapped = jpeft.wrap(params, config, dtype=jnp.float64)
    np.testing.assert_allclose(jpeft.lift(apply)(wrapped, IDS), apply(params, IDS), rtol=1e-6)
    trainable, _ = jpeft.partition(wrapped)
    assert sorted(leaf.shape for leaf in jax.tree.leaves(trainable)) == [(2, 4), (3, 4), (4, 2)]
    assert jpeft.count_parameters(wrapped) == (12 + 16, 32 + 16 + 12 + 16)
    _, gradient = jpeft.value_and_grad(lambda w: jpeft.lift(apply)(w, IDS).sum())(wrapped)
    assert np.abs(gradient.adapters["default"].rows["model.embed_tokens.embedding"].values).min() > 0
    abstract = jpeft.wrap(jax.eval_shape(lambda: params), config)
    assert jax.tree.map(jnp.shape, abstract.adapters) == jax.tree.map(jnp.shape, wrapped.adapters)


def test_names():
    both = wrap(tree(False), {"embed_tokens": [1, 2], "lm_head": [3]}).adapters["default"].rows
    assert {leaf: rows.values.shape for leaf, rows in both.items()} == {
        "model.embed_tokens.embedding": (2, 4),
        "lm_head.kernel": (1, 4),
    }
    wrapped = wrap(tree(False), {"lm_head": [3, 1]})
    np.testing.assert_allclose(jpeft.lift(apply)(wrapped, IDS), apply(jpeft.merge(wrapped), IDS), rtol=1e-12)
    assert list(wrap(tree(), {"embed_tokens": [1, 2], "lm_head": [1, 2]}).adapters["default"].rows) == [
        "model.embed_tokens.embedding"
    ]


BAD = {
    "no such module": ({"other": [1]}, {}, "names 'other', which no module is called; .*model.embed_tokens"),
    "tied, other rows": ({"embed_tokens": [1], "lm_head": [2]}, {}, "names 'lm_head', which no module is called"),
    "no such row": ([8], {}, r"of 8 rows is \[8\]; expected rows that it has"),
    "twice": ([1, 1], {}, "each of them once"),
    "adapted, too": ([1], {"target_modules": ["q", "embed_tokens"]}, "and target_modules does, too"),
    "saved, too": ([1], {"modules_to_save": ["embed_tokens"]}, "and modules_to_save does, too"),
}


@pytest.mark.parametrize(("indices", "settings", "message"), BAD.values(), ids=BAD)
def test_what_is_refused(indices, settings, message):
    with pytest.raises(ValueError, match=message):
        wrap(tree(), indices, **settings)


def test_other_trees_that_are_refused():
    tables = {
        "one": {"embedding": jnp.ones((3, 2))},
        "two": {"embedding": jnp.ones((3, 2))},
        "q": {"kernel": jnp.ones((2, 2))},
    }
    with pytest.raises(ValueError, match="which table holds the tokens is not known among: one, two"):
        wrap(tables, [1])
    with pytest.raises(ValueError, match="expected the table of a lookup, or a linear layer, by itself"):
        wrap({**tables, "conv": {"kernel": jnp.ones((2, 2, 3, 3))}}, {"conv": [1]})


def test_two_adapters():
    config = jpeft.LoraConfig(target_modules=["q"], trainable_token_indices=[1, 5])
    wrapped = jpeft.wrap(wrap(tree(), [2, 3]), config, adapter_name="other")
    wrapped = jpeft.set_adapter(wrapped, ["default", "other"])
    np.testing.assert_allclose(jpeft.lift(apply)(wrapped, IDS), apply(jpeft.merge(wrapped), IDS), rtol=1e-12)
    wrapped = jpeft.wrap(wrapped, config, adapter_name="third")
    with pytest.raises(ValueError, match="'other' and 'third' both have row 1 of 'model.embed_tokens.embedding'"):
        jpeft.set_adapter(wrapped, ["other", "third"])


def test_ensure_weight_tying():
    """The table's adapter acts on the output product, too, and merging says the same."""
    for settings in ({"target_modules": ["embed_tokens"]}, {"modules_to_save": ["embed_tokens"]}):
        wrapped = wrap(tree(), None, ensure_weight_tying=True, **settings)
        got, want = jpeft.lift(apply)(wrapped, IDS), apply(jpeft.merge(wrapped), IDS)
        np.testing.assert_allclose(got, want, rtol=1e-10)
        apart = wrap(tree(), None, **settings)
        with pytest.warns(UserWarning, match="is the output layer too, and adapter 'default' acts on the lookup alone"):
            found = jpeft.lift(apply)(apart, IDS)
        assert np.abs(found - want).max() > 1e-6
