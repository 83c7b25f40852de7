"""`explain`: the table that says how each use of each adapted module is computed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft
from jpeft import LoraConfig

PARAMS = {
    "embed": {"embedding": jnp.ones((7, 4))},
    "query": {"kernel": jnp.ones((4, 6))},
    "norm": {"kernel": jnp.ones((6, 6))},
    "spare": {"kernel": jnp.ones((4, 4))},
}
IDS = np.array([1, 2], np.int32)


def function(params, ids):
    x = params["embed"]["embedding"][ids] @ params["query"]["kernel"]
    return x @ jnp.sort(params["norm"]["kernel"])


def wrapped(*targets, **fields):
    return jpeft.wrap(PARAMS, LoraConfig(r=2, target_modules=list(targets) or ".*", **fields))


def test_the_table():
    assert str(jpeft.explain(function, wrapped(), IDS)).splitlines() == [
        "module  adapter  computed as             by",
        "----------------------------------------------------",
        "embed   default  lookup                  gather",
        "query   default  low-rank                dot_general",
        "norm    default  merged: sort (no rule)  sort",
        "spare   default  unused",
    ]


def test_rows_of_one_module():
    explanation = jpeft.explain(function, wrapped(), IDS)
    assert explanation.of("norm") == ["merged: sort (no rule)"]
    assert explanation.of("nothing") == []


def test_each_way_of_use_is_one_row():
    def twice(params, x):
        return x @ params["spare"]["kernel"] @ params["spare"]["kernel"] + jnp.sin(params["spare"]["kernel"]).sum()

    explanation = jpeft.explain(twice, wrapped("spare"), jnp.ones((3, 4)))
    assert explanation.of("spare") == ["low-rank", "merged: sin (no rule)"]


def test_each_adapter_has_rows_of_its_own():
    both = jpeft.wrap(wrapped("query"), LoraConfig(r=3, target_modules=["query", "norm"]), adapter_name="second")
    uses = jpeft.explain(function, jpeft.set_adapter(both, ["default", "second"]), IDS).uses
    assert [(use.module, use.adapter, use.how) for use in uses] == [
        ("query", "default", "low-rank"),
        ("query", "second", "low-rank"),
        ("norm", "second", "merged: sort (no rule)"),
    ]


def test_nothing_is_computed():
    shapes = jax.eval_shape(lambda: PARAMS)
    abstract = jpeft.wrap(shapes, LoraConfig(r=2, target_modules=".*"))
    ids = jax.ShapeDtypeStruct((2,), jnp.int32)
    assert jpeft.explain(function, abstract, ids) == jpeft.explain(function, wrapped(), IDS)


def test_keywords_and_arguments_that_are_no_arrays():
    def scaled(params, x, kind, *, times):
        assert kind == "dense"
        return times * x @ params["query"]["kernel"]

    assert jpeft.explain(scaled, wrapped("query"), jnp.ones((2, 4)), "dense", times=2).of("query") == ["low-rank"]


def test_without_active_adapters_the_table_is_empty():
    assert jpeft.explain(function, jpeft.disable_adapters(wrapped()), IDS).uses == ()


def test_a_plain_tree_is_refused():
    with pytest.raises(TypeError, match="explain expects PeftParams from jpeft.wrap as its second argument, not dict"):
        jpeft.explain(function, PARAMS, IDS)
