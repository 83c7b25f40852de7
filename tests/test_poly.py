"""Poly: the mixture of each row, in every way to call a function; its noise in training; what is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import jpeft
from jpeft import PolyConfig
from jpeft._mixed import with_rows
from jpeft.methods.poly import mixing
from tests.harness import QUICKLY, assert_close, random_like

SHAPES = {
    "embed": {"embedding": (9, 4)},
    "query": {"kernel": (4, 6), "bias": (6,)},
    "stacked": {"kernel": (3, 6, 6)},
    "head": {"kernel": (6, 2)},
}
LAYOUTS = {"stacked.kernel": "bio"}
IDS = np.array([[1, 2, 3, 8], [0, 6, 6, 2], [5, 5, 1, 7]])
TASKS = [1, 0, 1]
POLY = {"r": 2, "n_tasks": 2, "n_skills": 3}


def function(params, ids):
    """A lookup, a linear layer with a bias, a scan of layers under remat, a head."""
    x = params["embed"]["embedding"][ids]
    y = x @ params["query"]["kernel"] + params["query"]["bias"]
    y, _ = jax.lax.scan(jax.checkpoint(lambda c, w: (jnp.tanh(c @ w), None)), y, params["stacked"]["kernel"])
    return y @ params["head"]["kernel"]


lifted = jpeft.lift(function)
call = jax.jit(lifted, compiler_options=QUICKLY)


def wrapped_with(**options):
    """Random parameters and an adapter of random values, float64 where that is on."""
    config = PolyConfig(**{**POLY, "target_modules": ["query", "stacked", "head"], **options})
    wrapped = jpeft.wrap(random_like(SHAPES, 3), config, layouts=LAYOUTS)
    adapter = wrapped.adapters["default"]
    adapter = dataclasses.replace(adapter, weights=random_like(adapter.weights, 20, 1.0))
    return dataclasses.replace(wrapped, adapters={"default": adapter})


def of_task(wrapped, weights, task):
    """The base parameters with what a task adds to them: a block of A for each part of the inputs, of B of outputs."""
    config, base = wrapped.adapters["default"].config, jax.tree.map(lambda leaf: leaf, wrapped.base)

    def changed(kernel, own):
        logits = own["poly_router.module_logits"][task].reshape(config.n_splits, config.n_skills)
        gates = 1 / (1 + jnp.exp(-logits))
        a, b = [], []
        for split in range(config.n_splits):
            shares = gates[split] / gates[split].sum()
            a.append(jnp.tensordot(shares, own["poly_lora_A"][split], 1))
            b.append(jnp.tensordot(shares, own["poly_lora_B"][split], 1))
        return kernel + jnp.concatenate(a, 0) @ jnp.concatenate(b, 1) / config.r

    for path in ("query", "head"):
        base[path]["kernel"] = changed(base[path]["kernel"], weights[path])
    layers = [changed(base["stacked"]["kernel"][n], {k: v[n] for k, v in weights["stacked"].items()}) for n in range(3)]
    base["stacked"]["kernel"] = jnp.stack(layers)
    return base


def expected(wrapped, weights):
    outputs = [function(of_task(wrapped, weights, task), IDS) for task in (0, 1)]
    return jnp.where(np.array(TASKS)[:, None, None] == 1, outputs[1], outputs[0])


@pytest.mark.parametrize("splits", [1, 2])
def test_each_row_has_the_weights_of_its_task(x64, splits):
    wrapped = jpeft.with_context(wrapped_with(n_splits=splits), task_ids=TASKS)

    def ours(wrapped):
        return jnp.sin(lifted(wrapped, IDS)).sum(), lifted(wrapped, IDS)

    def theirs(weights):
        outputs = expected(wrapped, weights)
        return jnp.sin(outputs).sum(), outputs

    (_, got), gradient = jax.jit(jpeft.value_and_grad(ours, has_aux=True), compiler_options=QUICKLY)(wrapped)
    weights = wrapped.adapters["default"].weights
    (_, want), derivative = jax.jit(jax.value_and_grad(theirs, has_aux=True), compiler_options=QUICKLY)(weights)
    assert np.abs(want - function(wrapped.base, IDS)).max() > 0.1
    assert_close(got, want)
    assert_close(gradient.adapters["default"].weights, derivative)


def test_every_way_to_call_it_gives_the_same(x64):
    wrapped = wrapped_with()
    want = call(jpeft.with_context(wrapped, task_ids=TASKS), IDS)

    def one(wrapped, ids, task):
        return lifted(jpeft.with_context(wrapped, task_ids=task[None]), ids[None])[0]

    by_rows = jax.jit(jax.vmap(one, in_axes=(None, 0, 0)))(wrapped, jnp.asarray(IDS), jnp.asarray(TASKS))
    np.testing.assert_allclose(by_rows, want, rtol=1e-12)
    mesh = jax.make_mesh((3,), ("rows",), devices=jax.devices()[:3], axis_types=(AxisType.Auto,))
    ids, tasks = (jax.device_put(jnp.asarray(own), NamedSharding(mesh, P("rows"))) for own in (IDS, TASKS))
    sharded = jax.jit(lambda w, ids, tasks: lifted(jpeft.with_context(w, task_ids=tasks), ids))
    np.testing.assert_allclose(sharded(wrapped, ids, tasks), want, rtol=1e-12)
    shapes = jax.eval_shape(lambda w: w, wrapped)
    abstract = jpeft.with_context(shapes, task_ids=jax.ShapeDtypeStruct((3,), jnp.int64))
    assert jax.eval_shape(lifted, abstract, IDS).shape == want.shape
    assert jpeft.explain(function, abstract, IDS).of("stacked") == ["transformed"]
    repeated = with_rows(jpeft.with_context(wrapped, task_ids=TASKS), 6)
    np.testing.assert_allclose(call(repeated, np.repeat(IDS, 2, axis=0)), np.repeat(want, 2, axis=0), rtol=1e-12)


def test_two_adapters_each_with_its_own_tasks():
    wrapped = wrapped_with(target_modules=["query"])
    other = wrapped_with(n_tasks=5, target_modules=["head"]).adapters["default"]
    wrapped = dataclasses.replace(wrapped, adapters={**wrapped.adapters, "other": other}, active=("default", "other"))
    got = call(jpeft.with_context(wrapped, task_ids={"default": TASKS, "other": [4, 0, 2]}), IDS)
    same = call(jpeft.with_context(wrapped, task_ids=[1, 0, 1]), IDS)
    assert not np.allclose(got[0], same[0], atol=1e-3) and np.allclose(got[1], same[1], atol=1e-6)
    with pytest.raises(ValueError, match=r"task_ids hold \[4\]; expected 0 to 1, as the adapter knows 2 tasks"):
        jpeft.with_context(wrapped, task_ids=[4, 0, 1])
    # An adapter that is not in use is not asked.
    assert jpeft.with_context(jpeft.set_adapter(wrapped, "other"), task_ids=[4, 0, 1]).context


def test_the_beginning():
    """As in PEFT: A uniform by the number of its inputs, B zero, or uniform by the rank; logits close to zero."""
    base = {"up": {"kernel": jnp.zeros((64, 32))}}
    for init_weights, bound in ((True, 0.0), (False, 0.5)):
        config = PolyConfig(r=4, n_tasks=40, n_splits=4, target_modules=["up"], init_weights=init_weights)
        arrays = jpeft.wrap(base, config).adapters["default"].weights["up"]
        assert {name: array.shape for name, array in arrays.items()} == {
            "poly_lora_A": (4, 4, 16, 4),
            "poly_lora_B": (4, 4, 4, 8),
            "poly_router.module_logits": (40, 16),
        }
        for array, most in zip(arrays.values(), (0.25, bound, 1e-3), strict=True):
            assert 0.97 * most <= np.abs(array).max() <= most and abs(float(array.mean())) <= 0.1 * most


def test_a_task_that_there_is_not_is_no_number():
    """What is traced cannot be refused, and must not be another task."""
    wrapped = wrapped_with()
    apply = jax.jit(lambda tasks: lifted(jpeft.with_context(wrapped, task_ids=tasks), IDS))
    got = apply(jnp.array([2, 1, -1]))
    assert np.isnan(got).all(axis=(1, 2)).tolist() == [True, False, True]
    np.testing.assert_allclose(got[1], call(jpeft.with_context(wrapped, task_ids=[0, 1, 0]), IDS)[1], rtol=1e-5)


# ---- noise ----------------------------------------------------------------------------------------------------------


def test_in_training_each_row_draws_its_own_mixture():
    wrapped = wrapped_with()
    ids = np.repeat(IDS[:1], 3, axis=0)
    plain = call(jpeft.with_context(wrapped, task_ids=[1, 1, 0]), ids)
    np.testing.assert_allclose(plain[0], plain[1], rtol=1e-6)
    noisy = [call(jpeft.with_context(wrapped, rng=jax.random.key(seed), task_ids=[1, 1, 0]), ids) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(noisy[0], noisy[1])
    assert np.abs(noisy[0] - noisy[2]).max() > 1e-2 and np.abs(noisy[0][0] - noisy[0][1]).max() > 1e-2


def test_layers_of_a_stack_draw_for_themselves():
    """The second layer of two is given what undoes the first one's change if both drew alike."""
    wrapped = wrapped_with(target_modules=["stacked"])
    keys = jax.random.split(jax.random.key(3), 3)
    logits = jnp.zeros((5, 1, 3))
    drawn = [mixing(logits, {"rng": key}) for key in keys]
    assert np.abs(drawn[0] - drawn[1]).max() > 0.1

    def layers(params, x):
        return jax.lax.scan(lambda c, w: (c, c @ w - c @ params["base"]), x, params["stacked"]["kernel"])[1]

    kernel = jnp.broadcast_to(wrapped.base["stacked"]["kernel"][:1], (3, 6, 6))
    weights = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf[:1], leaf.shape), wrapped.adapters["default"].weights)
    adapter = dataclasses.replace(wrapped.adapters["default"], weights=weights)
    base = {**wrapped.base, "stacked": {"kernel": kernel}, "base": kernel[0]}
    alike = dataclasses.replace(wrapped, base=base, adapters={"default": adapter})
    apply, x = jpeft.lift(layers), jnp.ones((1, 2, 6))
    without = apply(jpeft.with_context(alike, task_ids=[0]), x)
    np.testing.assert_allclose(without[0], without[2], rtol=1e-5)
    noisy = apply(jpeft.with_context(alike, rng=jax.random.key(0), task_ids=[0]), x)
    assert np.abs(noisy[0] - noisy[1]).max() > 1e-3


def test_the_noise_is_that_of_a_relaxed_bernoulli_variable():
    """P(sigmoid(l + noise) < t) = t' / (t' + exp(l)), t' = t / (1 - t); with one skill the mixture is one."""
    logits = jnp.full((40_000, 1, 2), 0.7).at[..., 1].set(-jnp.inf)
    assert np.allclose(mixing(logits, {})[..., 0], 1.0)
    pairs = mixing(jnp.zeros((40_000, 1, 2)).at[..., 0].set(0.7), {"rng": jax.random.key(0)})
    np.testing.assert_allclose(pairs.sum(-1), 1.0, rtol=1e-5)
    uniform = np.random.default_rng(0).uniform(size=(400_000, 2))
    gates = 1 / (1 + np.exp(-(np.array([0.7, 0.0]) + np.log(uniform) - np.log1p(-uniform))))
    wanted = gates[:, 0] / gates.sum(-1)
    levels = np.linspace(0.05, 0.95, 10)
    np.testing.assert_allclose(np.quantile(pairs[:, 0, 0], levels), np.quantile(wanted, levels), atol=0.012)


# ---- what is refused ------------------------------------------------------------------------------------------------


def refusals():
    wrapped = wrapped_with()
    given = jpeft.with_context(wrapped, task_ids=TASKS)
    by_columns = lambda params, x: x @ params["query"]["kernel"][:, 1:3]  # noqa: E731
    in_a_row = lambda params, x: x.reshape(-1, 4) @ params["query"]["kernel"]  # noqa: E731
    x = jnp.ones((3, 6, 4))
    return {
        r"adapter 'default' needs task_ids for each row of the batch.*with_context\(params, task_ids=": (
            lambda: lifted(wrapped, IDS)
        ),
        r"task_ids hold \[-1, 2\]; expected 0 to 1, as the adapter knows 2 tasks": (
            lambda: jpeft.with_context(wrapped, task_ids=[2, 1, -1])
        ),
        r"task_ids hold \[7\]; expected 0 to 1": lambda: jpeft.with_context(wrapped, task_ids={"default": [7]}),
        r"task_ids are float32 of shape \(2,\); expected integers of shape \(rows,\)": (
            lambda: jpeft.with_context(wrapped, task_ids=[1.0, 0.0])
        ),
        r"task_ids are int32 of shape \(1, 3\)": lambda: jpeft.with_context(wrapped, task_ids=[TASKS]),
        r"task_ids are for 3 rows, but 'query' gets an array of shape \(2, 4, 4\); expected \(rows, tokens": (
            lambda: lifted(given, IDS[:2])
        ),
        r"task_ids are for 3 rows, but 'query' gets an array of shape \(18, 4\)": lambda: jpeft.lift(in_a_row)(
            given, x
        ),
        "Poly at '.*' mixes its skills by the task of each row, which no weight does: it cannot be merged": (
            lambda: jpeft.merge(given)
        ),
        "Poly at 'query' .* uses the whole weight in products": lambda: jpeft.lift(by_columns)(given, x),
        "adapter 'default' .PolyConfig. is no product of two thin factors": lambda: jpeft.mixed_batch(wrapped),
        "n_splits is 4; expected a number that divides its 6 inputs and 2 outputs": lambda: wrapped_with(n_splits=4),
        "r is 0; expected an integer of at least 1": lambda: PolyConfig(r=0),
        "n_tasks is 1.5; expected": lambda: PolyConfig(n_tasks=1.5),  # pyright: ignore[reportArgumentType]
        "n_skills is 0; expected": lambda: PolyConfig(n_skills=0),
        "n_splits is -1; expected": lambda: PolyConfig(n_splits=-1),
        "poly_type is 'mhr'; expected 'poly'": lambda: PolyConfig(poly_type="mhr"),
        "bias is 'all'; expected 'none', as Poly trains no biases": lambda: PolyConfig(bias="all"),
    }


@pytest.mark.filterwarnings("ignore:the function uses no weight")
def test_what_cannot_be_right_is_refused():
    for text, refused in refusals().items():
        with pytest.raises(ValueError, match=text):
            refused()
