"""Names around adapted products, and the policy that keeps them through `jax.checkpoint`."""

import contextlib
import io
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import print_saved_residuals
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import jpeft

pytestmark = pytest.mark.usefixtures("x64")

KEY = jax.random.key(2)
POLICIES = jax.checkpoint_policies
PRODUCTS, ROWS, RANK = ("up", "gate", "down"), 5, 2


def wrapped(layers=(), **fields):
    keys, shapes = jax.random.split(KEY, 3), {"up": (4, 16), "gate": (4, 16), "down": (16, 4)}
    params = {
        name: {"kernel": jax.random.normal(key, (*layers, *shapes[name]))}
        for key, name in zip(keys, PRODUCTS, strict=True)
    }
    if layers:
        params = {f"0:{layers[0]}": params}
    config = jpeft.LoraConfig(r=RANK, target_modules=list(PRODUCTS), init_lora_weights=False, **fields)
    return jpeft.wrap(params, config, rng=KEY, dtype=jnp.float64)


def layer(params, x):
    h = jax.nn.silu(x @ params["gate"]["kernel"]) * (x @ params["up"]["kernel"])
    return x + jnp.tanh(h @ params["down"]["kernel"])


def loss(policy):
    block = layer if policy is None else jax.checkpoint(layer, policy=policy)
    lifted = jpeft.lift(block)
    return lambda params, x: jnp.mean(jnp.square(lifted(params, x)))


def inputs():
    return jax.random.normal(jax.random.key(1), (ROWS, 4))


def kept(policy, params):
    """The shapes of what the forward pass of a layer leaves for its backward pass, besides arguments."""
    trainable, frozen = jpeft.partition(params)
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        print_saved_residuals(lambda half: loss(policy)(jpeft.combine(half, frozen), inputs()), trainable)
    lines = [line for line in out.getvalue().splitlines() if "from the argument" not in line]
    found = [re.match(r"\w+\[([\d,]*)\]", line) for line in lines]
    shapes = [tuple(map(int, match[1].split(","))) for match in found if match and match[1]]
    return sorted(shape for shape in shapes if shape[0] == ROWS)


def test_the_policy_keeps_each_result_once_and_what_is_of_the_ranks_size():
    outputs, hidden = [(ROWS, 4), (ROWS, 16), (ROWS, 16)], [(ROWS, RANK)] * 3
    own = kept(jpeft.save_adapted_products, wrapped())
    of_dots = kept(POLICIES.dots_with_no_batch_dims_saveable, wrapped())
    assert [shape for shape in own if shape[1] == RANK] == hidden
    assert [shape for shape in own if shape[1] == 16] == outputs[1:]
    assert [shape for shape in of_dots if shape[1] == 16] == 2 * outputs[1:]
    assert not any(shape[1] in (RANK, 16) for shape in kept(POLICIES.nothing_saveable, wrapped()))


@pytest.mark.parametrize("fields", [{}, {"use_dora": True}, {"lora_dropout": 0.3}])
def test_gradients_are_those_without_it_and_nothing_large_is_computed_again(fields):
    params = jpeft.with_context(wrapped(**fields), rng=KEY)

    def products(policy):
        return str(jax.make_jaxpr(jpeft.grad(loss(policy)))(params, inputs())).count("dot_general")

    own, plain = (jax.jit(jpeft.value_and_grad(loss(p)))(params, inputs()) for p in (jpeft.save_adapted_products, None))
    for x, y in zip(jax.tree.leaves(own), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-12)
    if not fields:
        assert products(jpeft.save_adapted_products) == products(None) < products(POLICIES.nothing_saveable)


def test_without_a_policy_the_names_leave_nothing_in_the_program():
    compiled = jax.jit(jpeft.value_and_grad(loss(None))).lower(wrapped(), inputs())
    assert "jpeft_hidden" in str(jax.make_jaxpr(loss(None))(wrapped(), inputs()))
    assert "jpeft_" not in compiled.as_text() and "optimization_barrier" not in compiled.as_text()


def linear(params, x):
    return (x @ params["up"]["kernel"] + x @ params["gate"]["kernel"]) @ params["down"]["kernel"]


def test_lifted_functions_are_transposed_by_vjp():
    params = wrapped()
    lifted = jpeft.lift(linear)
    up, gate, down = (jpeft.merge(params)[name]["kernel"] for name in PRODUCTS)
    pulled = jax.vjp(lambda x: lifted(params, x), inputs())[1](jnp.ones((ROWS, 4)))[0]
    np.testing.assert_allclose(pulled, jnp.ones((ROWS, 4)) @ down.T @ (up + gate).T, rtol=1e-9)
    with pytest.raises(NotImplementedError, match="'name' not implemented"):
        jax.linear_transpose(lambda x: lifted(params, x), inputs())(jnp.ones((ROWS, 4)))


@pytest.mark.parametrize("axes", [AxisType.Auto, AxisType.Explicit])
def test_it_goes_through_scans_on_meshes_and_populations(axes):
    params = wrapped(layers=(3,))

    def stack(params, x):
        (own,) = params.values()
        block = jax.checkpoint(layer, policy=jpeft.save_adapted_products, prevent_cse=False)
        return jax.lax.scan(lambda x, one: (block(one, x), None), x, own)[0]

    def of(params, x):
        return jnp.mean(jnp.square(jpeft.lift(stack)(params, x)))

    rows = jax.random.normal(KEY, (8, 4))
    expected = jax.jit(jpeft.value_and_grad(of))(params, rows)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(axes,))
    with jax.set_mesh(mesh):
        found = jax.jit(jpeft.value_and_grad(of))(
            jax.device_put(params, NamedSharding(mesh, P())), jax.device_put(rows, NamedSharding(mesh, P("data")))
        )
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-12)
    if axes == AxisType.Auto:
        population = jpeft.stack_adapters([params] * 2)
        mapped = jax.vmap(of, in_axes=(jpeft.population_axes(population), None))(population, rows)
        np.testing.assert_allclose(mapped, [expected[0]] * 2, rtol=1e-9)
