"""Populations: adapters trained together equal adapters trained one by one."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jpeft
from tests.cases import DenseDeltaConfig
from tests.harness import QUICKLY, random_like

SHAPES = {
    "embed": {"embedding": (7, 4)},
    "query": {"kernel": (4, 6), "bias": (6,)},
    "layers": {"0:3": {"mlp": {"kernel": (3, 6, 6)}}},
    "head": {"kernel": (6, 3)},
}
IDS = np.array([[1, 2, 3], [0, 6, 6]], np.int32)


@functools.cache
def params(dtype):
    return random_like(SHAPES, 7)


def base():
    """One and the same tree for all members, in float64 where that is on."""
    return params(jnp.result_type(float))


def function(params, ids):
    y = params["embed"]["embedding"][ids] @ params["query"]["kernel"] + params["query"]["bias"]
    y, _ = jax.lax.scan(lambda c, w: (jnp.tanh(c @ w), None), y, params["layers"]["0:3"]["mlp"]["kernel"])
    return y @ params["head"]["kernel"]


lifted = jpeft.lift(function)


def loss(wrapped, ids):
    return (lifted(wrapped, ids) ** 2).sum()


MEMBERS = {
    "seeds": [{}, {}, {}],
    "ranks": [{"r": 1}, {"r": 4}, {"r": 2, "rank_pattern": {"mlp": 5}}],
    "scalings": [{"lora_alpha": 1}, {"lora_alpha": 3, "use_rslora": True}, {"alpha_pattern": {"mlp": 5}}],
    "full copies": [{"modules_to_save": ["head"], "bias": "lora_only"}] * 3,
    "dropout": [{"lora_dropout": 0.5}] * 3,
}
RATES = (0.1, 0.02, 0.3)


def member(seed, config=jpeft.LoraConfig, **options):
    config = config(target_modules=["query", "mlp", "embed"], **options)
    return jpeft.wrap(base(), config, rng=jax.random.key(seed), dtype=jnp.result_type(float))


def transformation(rate):
    return optax.inject_hyperparams(optax.sgd)(learning_rate=rate, momentum=0.9)


def masked():
    return optax.masked(transformation(0.0), jpeft.trainable_mask)


def step(wrapped, state, ids):
    value, gradient = jpeft.value_and_grad(loss)(wrapped, ids)
    updates, state = masked().update(gradient, state, wrapped)
    return optax.apply_updates(wrapped, updates), state, value


def start(wrapped, rate):
    state = masked().init(wrapped)
    inner = state.inner_state
    own = {**inner.hyperparams, "learning_rate": jnp.asarray(rate, inner.hyperparams["learning_rate"].dtype)}
    return state._replace(inner_state=inner._replace(hyperparams=own))


@pytest.mark.parametrize("options", MEMBERS.values(), ids=MEMBERS)
def test_a_population_trains_as_its_members_do_one_by_one(options, x64):
    members = [member(seed, **own) for seed, own in enumerate(options)]
    if "lora_dropout" in options[0]:
        members = [jpeft.with_context(one, rng=jax.random.key(seed)) for seed, one in enumerate(members)]
    population = jpeft.stack_adapters(members)
    assert jax.tree.leaves(population.base)[0] is jax.tree.leaves(base())[0]
    axes = jpeft.population_axes(population)
    state = jax.vmap(start, in_axes=(axes, 0))(population, jnp.array(RATES))
    together = jax.jit(jax.vmap(step, in_axes=(axes, 0, None), out_axes=(axes, 0, 0)), compiler_options=QUICKLY)
    values = []
    for _ in range(3):
        population, state, value = together(population, state, IDS)
        values.append(value)
    assert together._cache_size() == 1
    trained = jpeft.unstack_adapters(population, like=members)
    alone = jax.jit(step, compiler_options=QUICKLY)
    for index, one in enumerate(members):
        own_state = start(one, RATES[index])
        for number in range(3):
            one, own_state, value = alone(one, own_state, IDS)
            np.testing.assert_allclose(values[number][index], value, rtol=1e-10)
        assert jax.tree.structure(trained[index].adapters) == jax.tree.structure(one.adapters)
        for got, want in zip(jax.tree.leaves(trained[index].adapters), jax.tree.leaves(one.adapters), strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-12)
    assert population.base.keys() == base().keys()
    for path, arrays in population.adapters["default"].weights.items():
        for index in range(len(members)):
            for name, array in arrays.items():
                own = trained[index].adapters["default"].weights[path][name]
                # What fills up a lower rank is zero after training, too.
                np.testing.assert_allclose(jnp.abs(array[index]).sum(), jnp.abs(own).sum(), rtol=1e-12)


def test_the_shared_base_has_no_axis_of_members():
    population = jpeft.stack_adapters([member(0), member(1)])
    sizes = [leaf.shape for leaf in jax.tree.leaves(population.base)]
    gradient = jax.eval_shape(
        jax.vmap(
            jpeft.grad(loss),
            in_axes=(jpeft.population_axes(population), None),
            out_axes=jpeft.population_axes(population),
        ),
        population,
        IDS,
    )
    assert sizes == [leaf.shape for leaf in jax.tree.leaves(base())]
    assert {leaf.shape for leaf in jax.tree.leaves(gradient.base)} == {()}


def test_methods_without_factors_and_abstract_members():
    members = [member(seed, DenseDeltaConfig) for seed in range(2)]
    population = jpeft.stack_adapters(members)
    assert population.adapters["default"].weights["query"]["delta"].shape == (2, 4, 6)
    shapes = jpeft.stack_adapters([jax.eval_shape(lambda one=one: one, one) for one in members[:1]] * 2)
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, population)
    assert jax.tree.map(jnp.shape, jpeft.unstack_adapters(shapes)[1]) == jax.tree.map(jnp.shape, members[1])


def refusals():
    first = member(0)
    own = first.adapters["default"]
    other_base = jpeft.wrap(random_like(SHAPES, 8), own.config)
    dense = member(0, DenseDeltaConfig)
    delta = dense.adapters["default"]
    smaller = {**delta.weights, "query": {"delta": jnp.ones((2, 6))}}
    cut = dataclasses.replace(dense, adapters={"default": dataclasses.replace(delta, weights=smaller)})
    half = dataclasses.replace(own, weights=jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), own.weights))
    copied = dataclasses.replace(own, replaced={"head.kernel": jnp.ones((6, 3))})
    narrow = jpeft.wrap(base(), jpeft.LoraConfig(target_modules=["query"]))
    keyed = jpeft.with_context(first, rng=jax.random.key(0))

    def stack(*members):
        return lambda: jpeft.stack_adapters(members)

    def replaced(adapter):
        return dataclasses.replace(first, adapters={"default": adapter})

    return {
        "there are no members": stack(),
        "member 1 has the adapters \\['default'\\], active \\(\\)": stack(first, jpeft.disable_adapters(first)),
        "member 1 has a base of its own": stack(first, other_base),
        "member 1 has the context \\['rng'\\]": stack(first, keyed),
        "expected the same modules": stack(first, narrow),
        "expected one method": stack(first, dense),
        "lora_dropout=0.5, not 0.0": stack(first, member(1, lora_dropout=0.5)),
        "hold other arrays": stack(first, replaced(copied)),
        "expected one dtype": stack(first, replaced(half)),
        "no product of two thin factors": stack(dense, cut),
        "expected one axis of members": lambda: jpeft.unstack_adapters(first),
        "like has 1 members, the population 2": lambda: jpeft.unstack_adapters(stack(first, first)(), like=[first]),
    }


def test_what_cannot_be_stacked_is_refused():
    for text, call in refusals().items():
        with pytest.raises(ValueError, match=text):
            call()
