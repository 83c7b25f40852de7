"""Adapters of several methods active together: each changes what those before it left, lifted or merged."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft
from jpeft._contract import method_of
from tests.cases import METHODS
from tests.harness import QUICKLY, assert_close, on_merged, random_like, results, smallest_gradient, with_derived

SHAPES = {
    "embed_tokens": {"embedding": (7, 4)},
    "norm": {"scale": (4,)},
    "query": {"kernel": (4, 6), "bias": (6,)},
    "0:2": {"value": {"kernel": (2, 6, 6)}},
}
LAYOUTS = {"0:2.value.kernel": "bio"}
IDS = np.array([[1, 2, 3], [0, 6, 6]], np.int32)
BY_NAME = {row.name: row for row in METHODS}

# Additive, of the weight's scale, shared arrays, changed biases, turned inputs, what depends on the weight itself.
PAIRS = [
    ("lora", "ia3"),
    ("ia3", "lora"),
    ("oft", "lora"),
    ("lora", "oft"),
    ("hra", "vera"),
    ("vblora", "boft"),
    ("beft", "road"),
    ("road", "beft"),
    ("loha", "lokr"),
    ("miss, bat", "hra"),
    ("lora", "miss, bat"),
    ("oft", "dora"),
    ("psoft", "ia3"),
    ("lora_bias", "ia3"),
]


def function(params, ids):
    x = params["embed_tokens"]["embedding"][ids] * params["norm"]["scale"]
    y = jnp.tanh(x @ params["query"]["kernel"] + params["query"]["bias"])
    return jax.lax.scan(lambda y, w: (jnp.tanh(y @ w), None), y, params["0:2"]["value"]["kernel"])[0]


def wrap(*configs):
    params = random_like(SHAPES, 7, 1.0)
    wrapped = jax.eval_shape(lambda params: params, params)
    for name, config in zip("abc", configs, strict=False):
        wrapped = jpeft.wrap(wrapped, config, adapter_name=name, layouts=LAYOUTS, dtype=jnp.float64)
    wrapped = dataclasses.replace(wrapped, base=params, adapters=random_like(wrapped.adapters, 100))
    return jpeft.set_adapter(with_derived(wrapped), list("abc"[: len(configs)]))


def config_of(name):
    row = BY_NAME[name]
    options = {**row.options, **({"feedforward_modules": ["value"]} if name == "ia3" else {})}
    return row.config(**options, target_modules=["query"] if row.biased else ["query", "value"])


def both(wrapped):
    return jax.jit(
        lambda wrapped: tuple(results(of, wrapped, (IDS,)) for of in (jpeft.lift(function), on_merged(function))),
        compiler_options=QUICKLY,
    )(wrapped)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("names", PAIRS, ids=" then ".join)
def test_lifted_equals_merged_in_order(names):
    wrapped = wrap(*map(config_of, names))
    got, want = both(wrapped)
    assert_close(got, want, 1e-9)
    assert smallest_gradient(want[1]) > 1e-6
    # One that looks at the base itself means another thing beside another base.
    if not method_of(wrapped.adapters["b"].config).needs_base:
        once = dataclasses.replace(wrapped, base=jpeft.merge(wrapped, adapter_names="a"))
        assert_close(jpeft.merge(once, adapter_names="b"), jpeft.merge(wrapped), 1e-9)


@pytest.mark.usefixtures("x64")
def test_order_matters():
    wrapped = wrap(config_of("lora"), config_of("oft"))
    turned = jpeft.set_adapter(wrapped, ["b", "a"])
    first, second = (np.asarray(jpeft.lift(function)(each, IDS)) for each in (wrapped, turned))
    assert np.abs(first - second).max() > 1e-3


@pytest.mark.usefixtures("x64")
def test_parts_of_the_base_train_beside_adapters():
    tokens = jpeft.TrainableTokensConfig(token_indices=[6, 1])
    wrapped = wrap(config_of("hra"), jpeft.LNTuningConfig(target_modules=["norm"]), tokens)
    got, want = both(wrapped)
    assert_close(got, want, 1e-9)
    assert smallest_gradient(want[1]) > 1e-6
