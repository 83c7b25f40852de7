"""Lifted functions under JAX's own transformations, and what else of a function has to survive being lifted."""

import dataclasses
import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jpeft
from jpeft import LoraConfig
from tests.cases import LORA, METHODS, GainConfig, scanned
from tests.harness import QUICKLY, Problem, adapted, assert_close, on_merged, random_like, results

GAIN = next(row for row in METHODS if row.name == "gain")
DENSE = {"dense": {"kernel": (4, 6), "bias": (6,)}, "out": {"kernel": (6, 4)}}


def mlp(params, x):
    return jnp.tanh(x @ params["dense"]["kernel"] + params["dense"]["bias"]) @ params["out"]["kernel"]


def of_mlp(row=LORA, **options):
    return adapted(Problem(mlp, random_like(DENSE, 7), (), {}), row, **options)


def batch(*shape, seed=50):
    return random_like(shape, seed, 1.0)


lifted, expected = jpeft.lift(mlp), on_merged(mlp)
TRANSFORMED = {
    "jit": lambda f, w, x: jax.jit(f)(w, x),
    "vmap over x": lambda f, w, x: jax.vmap(f, (None, 0))(w, x),
    "vmap with an axis name": lambda f, w, x: jax.vmap(lambda w, x: lax.psum(f(w, x), "b"), (None, 0), axis_name="b")(
        w, x
    ),
    "scan": lambda f, w, x: lax.scan(lambda c, x: (c + f(w, x + c), c.sum()), jnp.ones((5, 4)), x),
    "scan carrying the parameters": lambda f, w, x: lax.scan(lambda c, x: (c, f(c, x)), w, x)[1],
    "checkpoint": lambda f, w, x: jax.jacrev(lambda x: jax.checkpoint(f)(w, x))(x),
    "jvp": lambda f, w, x: jax.jvp(lambda x: f(w, x), (x,), (jnp.cos(x),)),
    "linearize": lambda f, w, x: jax.linearize(lambda x: f(w, x), x)[1](jnp.cos(x)),
    "jacfwd of grad": lambda f, w, x: jax.jacfwd(jax.grad(lambda x: jnp.sin(f(w, x)).sum()))(x[0, 0]),
    "hessian by the weights": lambda f, w, x: jax.jacfwd(lambda s: results(f, scaled(w, s), (x,))[1])(jnp.ones(())),
    "while": lambda f, w, x: lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, f(w, c[1])), (0, x)),
    "cond": lambda f, w, x: lax.cond(x.sum() < 99, lambda: f(w, x), lambda: x),
}


def scaled(wrapped, factor):
    weights = jax.tree.map(lambda leaf: leaf * factor, wrapped.adapters["default"].weights)
    adapter = dataclasses.replace(wrapped.adapters["default"], weights=weights)
    return dataclasses.replace(wrapped, adapters={"default": adapter})


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("row", (LORA, GAIN), ids=lambda row: row.name)
@pytest.mark.parametrize("transform", TRANSFORMED.values(), ids=TRANSFORMED)
def test_transformations_from_outside(transform, row):
    wrapped, x = of_mlp(row), batch(3, 5, 4)
    both = jax.jit(lambda w, x: [transform(f, w, x) for f in (lifted, expected)], compiler_options=QUICKLY)
    assert_close(*both(wrapped, x))


@pytest.mark.usefixtures("x64")
def test_vmap_over_adapters():
    # Three adapters of one base, stacked: one user a row.
    stacked = [random_like(of_mlp().adapters, seed) for seed in (1, 2, 3)]
    wrapped = dataclasses.replace(of_mlp(), adapters=jax.tree.map(lambda *leaves: jnp.stack(leaves), *stacked))
    axes = jpeft.PeftParams(base=None, adapters=0, active=wrapped.active, context=None)
    x = batch(3, 5, 4)
    want = [expected(dataclasses.replace(wrapped, adapters=own), row) for own, row in zip(stacked, x, strict=True)]
    assert_close(jax.jit(jax.vmap(lifted, (axes, 0)))(wrapped, x), jnp.stack(want))


def test_eval_shape_of_abstract_parameters():
    params = jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16), DENSE, is_leaf=lambda s: type(s) is tuple
    )
    wrapped = jpeft.wrap(params, LoraConfig(r=2, target_modules=".*"))
    out = jax.eval_shape(lifted, wrapped, jax.ShapeDtypeStruct((5, 4), jnp.bfloat16))
    assert (out.shape, out.dtype) == ((5, 4), jnp.bfloat16)
    assert jpeft.explain(mlp, wrapped, jax.ShapeDtypeStruct((5, 4), jnp.bfloat16)).of("out") == ["low-rank"]


@pytest.mark.usefixtures("x64")
def test_several_adapters_sum():
    wrapped = of_mlp()
    both = jpeft.set_adapter(second_adapter(wrapped), ["default", "second"])
    assert_close(lifted(both, batch(5, 4)), expected(both, batch(5, 4)))
    only = jpeft.set_adapter(both, "second")
    assert_close(lifted(only, batch(5, 4)), expected(only, batch(5, 4)))
    assert np.abs(lifted(both, batch(5, 4)) - lifted(only, batch(5, 4))).max() > 1e-3
    assert [use.adapter for use in jpeft.explain(mlp, both, batch(5, 4)).uses] == ["default", "second"] * 2


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("order", (["default", "second"], ["second", "default"]))
def test_adapters_of_different_methods_act_in_their_order(order):
    wrapped = jpeft.wrap(of_mlp(), GainConfig(target_modules=".*"), adapter_name="second")
    wrapped = jpeft.set_adapter(dataclasses.replace(wrapped, adapters=random_like(wrapped.adapters, 5)), order)
    assert_close(lifted(wrapped, batch(5, 4)), expected(wrapped, batch(5, 4)))


def second_adapter(wrapped):
    both = jpeft.wrap(
        wrapped, LoraConfig(r=2, target_modules=".*"), adapter_name="second", dtype=jnp.result_type(float)
    )
    return dataclasses.replace(both, adapters=random_like(both.adapters, 300))


@pytest.mark.usefixtures("x64")
def test_disabled_adapters_leave_the_base():
    wrapped = jpeft.disable_adapters(of_mlp())
    assert_close(lifted(wrapped, batch(5, 4)), mlp(wrapped.base, batch(5, 4)), tolerance=0)


@pytest.mark.usefixtures("x64")
def test_what_is_saved_and_trained_in_full():
    wrapped = of_mlp(target_modules=["dense"], modules_to_save=["out"], bias="all")
    adapter = dataclasses.replace(
        wrapped.adapters["default"], replaced=random_like(wrapped.adapters["default"].replaced, 4)
    )
    wrapped = dataclasses.replace(wrapped, adapters={"default": adapter})
    assert sorted(adapter.replaced) == ["dense.bias", "out.kernel"]
    assert_close(results(lifted, wrapped, (batch(5, 4),)), results(expected, wrapped, (batch(5, 4),)))


def test_a_plain_tree_is_passed_through():
    params = random_like(DENSE, 7)
    assert jpeft.lift(lambda p: p)(params) is params


def test_lifting_twice_changes_nothing():
    wrapped, x = of_mlp(), batch(5, 4)
    np.testing.assert_array_equal(jpeft.lift(lifted)(wrapped, x), lifted(wrapped, x))


def test_two_peft_params_are_refused():
    wrapped = of_mlp()
    with pytest.raises(ValueError, match="a lifted function takes one PeftParams; 2 were given"):
        jpeft.lift(lambda a, b: a)(wrapped, wrapped)


def test_an_unused_adapter_warns():
    wrapped = of_mlp()
    with pytest.warns(
        UserWarning, match=r"the function uses no weight of: out \(adapter 'default'\); its adapter has no"
    ):
        jpeft.lift(lambda p, x: x @ p["dense"]["kernel"])(wrapped, batch(5, 4))


def test_the_warning_of_many_unused_adapters_is_short():
    wrapped = jpeft.wrap(
        {f"d{i}": {"kernel": jnp.ones((4, 4))} for i in range(9)}, LoraConfig(r=2, target_modules=".*")
    )
    with pytest.warns(UserWarning, match=r"d4 \(adapter 'default'\) and 4 more; its adapter"):
        jpeft.lift(lambda p, x: x)(wrapped, batch(5, 4))


def test_parameters_anywhere_among_the_arguments():
    wrapped, x = of_mlp(), batch(5, 4)

    def function(x, *, scale, model):
        return scale * mlp(model["params"], x)

    got = jpeft.lift(function)(x, scale=2.0, model={"params": wrapped, "name": "mlp"})
    np.testing.assert_allclose(got, 2 * lifted(wrapped, x), rtol=1e-6)


def test_arguments_and_outputs_that_are_not_arrays():
    wrapped, x = of_mlp(), batch(5, 4)

    def function(params, x, flag, activation, names=None, *, mode="sum"):
        y = activation(mlp(params, x)) if flag else x
        return {"y": y, "mode": mode, "names": names, "none": None, "activation": activation, "count": 3}

    got = jpeft.lift(function)(wrapped, x, True, jnp.tanh, mode="mean")
    np.testing.assert_allclose(got.pop("y"), jnp.tanh(lifted(wrapped, x)), rtol=1e-6)
    assert got == {"mode": "mean", "names": None, "none": None, "activation": jnp.tanh, "count": 3}


@pytest.mark.parametrize("value", (2.0, 3))
def test_numbers_stay_numbers(value):
    # A Python number does not promote an array's type, and may be branched on.
    def function(params, x, number):
        assert type(number) is type(value)
        return mlp(params, x) * number

    assert jpeft.lift(function)(of_mlp(), batch(5, 4), value).dtype == jnp.float32


def test_the_name_of_the_function_stays():
    assert jpeft.lift(mlp).__name__ == "mlp" and jpeft.lift(mlp).__wrapped__ is mlp


def scoped(params, x):
    with jax.named_scope("outer"):
        y = jnp.sin(x)
        with jax.named_scope("inner"):
            y = y @ params["dense"]["kernel"]
            norm = jnp.sort(params["out"]["kernel"]).sum()
        return jnp.cos(y) * norm


def test_named_scopes_survive():
    jaxpr = jax.make_jaxpr(jpeft.lift(scoped))(of_mlp(), batch(5, 4))
    scopes = {(str(eqn.source_info.name_stack), eqn.primitive.name) for eqn in jaxpr.eqns}
    # The adapter's products stand under the name that the function gave to its own.
    assert {("outer", "sin"), ("outer/inner", "dot_general"), ("outer/inner", "sort"), ("outer", "cos")} <= scopes
    assert {name for name, _ in scopes} == {"", "outer", "outer/inner"}


def test_named_scopes_survive_in_loops_and_calls():
    def function(params, x):
        def body(c, _):
            with jax.named_scope("body"):
                return jnp.tanh(c @ params["dense"]["kernel"]) @ params["out"]["kernel"], None

        with jax.named_scope("loop"):
            return lax.scan(jax.checkpoint(body), x, length=2)[0]

    jaxpr = jax.make_jaxpr(jpeft.lift(function))(of_mlp(), batch(5, 4))
    named = [(eqn.primitive.name, scope) for eqn, scope in scoped_equations(jaxpr)]
    products = [scope for name, scope in named if name == "dot_general"]
    assert len(products) == 6 and all("loop" in scope and "body" in scope for scope in products)
    assert [scope for name, scope in named if name == "scan"] == ["/loop"]


def test_prints_survive_in_order(capfd):
    def function(params, x):
        jax.debug.print("first {}", x.sum(), ordered=True)
        y = x @ params["dense"]["kernel"]
        jax.debug.print("second {}", y.shape[0], ordered=True)
        z, _ = lax.scan(
            lambda c, i: (
                jnp.tanh(c @ params["out"]["kernel"]) @ params["dense"]["kernel"],
                jax.debug.print("in {}", i, ordered=True),
            ),
            y,
            jnp.arange(2),
        )
        jax.debug.print("last {}", (z * 0).sum(), ordered=True)
        return z

    jax.jit(jpeft.lift(function))(of_mlp(), jnp.ones((2, 4))).block_until_ready()
    jax.effects_barrier()
    assert capfd.readouterr().out.split("\n")[:-1] == ["first 8.0", "second 2", "in 0", "in 1", "last 0.0"]


BODIES = {
    "cond": lambda f, x: lax.cond(x.sum() > 0, f, lambda x: x, x),
    "while": lambda f, x: lax.while_loop(lambda c: c[0] < 1, lambda c: (c[0] + 1, f(c[1])), (0, x))[1],
    "fori": lambda f, x: lax.fori_loop(0, 1, lambda i, c: f(c), x),
    "jit": lambda f, x: jax.jit(f)(x),
    "vmap": lambda f, x: jax.vmap(f)(x[None])[0],
}


@pytest.mark.parametrize("run", BODIES.values(), ids=BODIES)
def test_prints_survive_in_bodies(run, capfd):
    def function(params, x):
        def body(x):
            y = x @ params["dense"]["kernel"]
            jax.debug.print("inside {}", (y * 0).sum())
            return jnp.tanh(y) @ params["out"]["kernel"]

        return run(body, x)

    jax.jit(jpeft.lift(function))(of_mlp(), jnp.ones((2, 4))).block_until_ready()
    jax.effects_barrier()
    assert capfd.readouterr().out == "inside 0.0\n"


def test_a_choice_by_platform_stays_one():
    def function(params, x):
        w = params["dense"]["kernel"]
        return lax.platform_dependent(x, w, cpu=lambda x, w: x @ w, default=lambda x, w: -x @ w)

    wrapped, x = of_mlp(target_modules=["dense"]), batch(5, 4)
    np.testing.assert_allclose(jax.jit(jpeft.lift(function))(wrapped, x), on_merged(function)(wrapped, x), rtol=1e-5)


def test_callbacks_survive_where_nothing_uses_their_weights():
    seen = []

    def function(params, x):
        jax.debug.callback(lambda y: seen.append(np.asarray(y)), x @ params["dense"]["kernel"])
        return x @ params["out"]["kernel"].T

    wrapped, x = of_mlp(), batch(5, 4)
    jax.jit(jpeft.lift(function))(wrapped, x).block_until_ready()
    jax.effects_barrier()
    np.testing.assert_allclose(seen, [x @ jpeft.merge(wrapped)["dense"]["kernel"]], rtol=1e-5)


@pytest.mark.parametrize("prevent_cse", (True, False))
@pytest.mark.parametrize("policy", (None, jax.checkpoint_policies.dots_saveable))
def test_remat_keeps_its_policy(policy, prevent_cse):
    body = jax.checkpoint(lambda c, w: (jnp.tanh(c @ w), None), policy=policy, prevent_cse=prevent_cse)
    params = {"dense": {"kernel": random_like((3, 4, 4), 7)}}
    wrapped = adapted(Problem(scanned, params, (), {"dense.kernel": "bio"}), LORA)
    jaxpr = jax.make_jaxpr(jpeft.lift(lambda p, x: scanned(p["dense"]["kernel"], x, body)))(wrapped, batch(5, 4))
    (inner,) = [eqn for eqn in equations(jaxpr) if "policy" in eqn.params]
    assert inner.params["policy"] is policy and inner.params["prevent_cse"] is prevent_cse


def equations(jaxpr):
    return (equation for equation, _ in scoped_equations(jaxpr))


def scoped_equations(jaxpr, outer=""):
    """Every equation, those of bodies included, with its scopes from the outermost in."""
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        scope = f"{outer}/{equation.source_info.name_stack}"
        yield equation, scope
        for value in jax.tree.leaves(
            equation.params, is_leaf=lambda leaf: hasattr(leaf, "eqns") or hasattr(leaf, "jaxpr")
        ):
            if hasattr(value, "eqns") or hasattr(value, "jaxpr"):
                yield from scoped_equations(value, scope)


def test_the_change_of_a_weight_is_not_built():
    # Sizes such that any array as large as a weight would show.
    params = {"dense": {"kernel": jnp.ones((64, 96))}}
    wrapped = jpeft.wrap(params, LoraConfig(r=2, target_modules=".*"))
    loss = jpeft.value_and_grad(lambda w, x: jpeft.lift(lambda p, x: x @ p["dense"]["kernel"])(w, x).sum())
    made = [
        var.aval.shape for eqn in equations(jax.make_jaxpr(loss)(wrapped, jnp.ones((3, 64)))) for var in eqn.outvars
    ]
    assert made and not {(64, 96), (96, 64)} & set(made)


@pytest.mark.filterwarnings("ignore:.*is the output layer too")
def test_tied_embedding_changes_the_lookup_alone():
    params = {"embed": {"embedding": random_like((7, 4), 7)}}

    def tied(params, ids):
        table = params["embed"]["embedding"]
        return jnp.tanh(table[ids]) @ table.T

    wrapped = adapted(Problem(tied, params, (), {}), LORA)
    ids = np.array([1, 5, 1])
    want = jnp.tanh(jpeft.merge(wrapped)["embed"]["embedding"][ids]) @ params["embed"]["embedding"].T
    np.testing.assert_allclose(jpeft.lift(tied)(wrapped, ids), want, rtol=1e-5, atol=1e-6)
    assert jpeft.explain(tied, wrapped, ids).of("embed") == ["lookup"]


def test_bfloat16_compute_over_float32_parameters():
    def function(params, x):
        return x.astype(jnp.bfloat16) @ params["dense"]["kernel"].astype(jnp.bfloat16)

    wrapped = adapted(Problem(function, random_like(DENSE, 7), (), {}), LORA, target_modules=["dense"])
    x = batch(5, 4)
    y, gradient, _ = jax.jit(functools.partial(results, jpeft.lift(function)))(wrapped, (x,))
    want, want_gradient, _ = jax.jit(functools.partial(results, on_merged(function)))(wrapped, (x,))
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(y.astype(jnp.float32), want.astype(jnp.float32), rtol=2**-6, atol=2**-6)
    for ours, theirs in zip(jax.tree.leaves(gradient), jax.tree.leaves(want_gradient), strict=True):
        assert ours.dtype == jnp.float32
        np.testing.assert_allclose(ours, theirs, rtol=2**-4, atol=2**-4)
    assert jpeft.explain(function, wrapped, x).of("dense") == ["low-rank"]


def test_float32_adapters_over_a_bfloat16_base():
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), random_like(DENSE, 7))
    wrapped = adapted(Problem(mlp, params, (), {}), LORA)
    x = batch(5, 4).astype(jnp.bfloat16)
    y, gradient, _ = jax.jit(functools.partial(results, lifted))(wrapped, (x,))
    want, _, _ = jax.jit(functools.partial(results, expected))(wrapped, (x,))
    assert y.dtype == jnp.bfloat16 and {leaf.dtype for leaf in jax.tree.leaves(gradient)} == {jnp.dtype(jnp.float32)}
    np.testing.assert_allclose(y.astype(jnp.float32), want.astype(jnp.float32), rtol=2**-5, atol=2**-5)


def test_leaves_that_are_no_numbers_pass_through():
    def function(params, x):
        noise = jax.random.normal(params["rngs"]["key"], x.shape)
        return (x + params["rngs"]["count"].astype(x.dtype) * noise) @ params["dense"]["kernel"]

    rngs = {"key": jax.random.key(3), "count": jnp.uint32(2), "legacy": jax.random.PRNGKey(0)}
    params = {**random_like({"dense": {"kernel": (4, 6)}}, 7), "rngs": rngs}
    wrapped = jpeft.wrap(params, LoraConfig(r=2, target_modules=["dense"]), rng=jax.random.key(1))
    x = batch(5, 4)
    np.testing.assert_allclose(jax.jit(jpeft.lift(function))(wrapped, x), function(params, x), rtol=1e-5)


def test_one_compilation_for_many_steps():
    traces = []

    def function(params, x):
        traces.append(None)
        return mlp(params, x)

    @jax.jit
    def step(wrapped, x):
        loss, gradient = jpeft.value_and_grad(lambda w, x: jnp.sin(jpeft.lift(function)(w, x)).sum())(wrapped, x)
        return jax.tree.map(lambda leaf, change: leaf - 0.1 * change, wrapped, gradient), loss

    wrapped = of_mlp()
    for alpha in (1.0, 2.0, 3.0):
        adapter = wrapped.adapters["default"]
        scaling = jax.tree.map(lambda leaf, alpha=alpha: jnp.full_like(leaf, alpha), adapter.scaling)
        wrapped = dataclasses.replace(wrapped, adapters={"default": dataclasses.replace(adapter, scaling=scaling)})
        wrapped, _ = step(wrapped, batch(5, 4))
    assert len(traces) == 1 and step._cache_size() == 1


def test_no_warnings_of_jax():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        jax.jit(lifted)(of_mlp(), batch(5, 4))
