"""aLoRA: where it begins, what it computes there and nowhere else, in every way to call a function; what is refused."""

import dataclasses
import functools
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import jpeft
from jpeft._activation import awaits_offsets, with_offsets, without_offsets
from jpeft._config import TunerConfig
from jpeft._contract import Method, RowInput, register
from jpeft._mixed import with_rows
from jpeft._ranks import cut
from jpeft.methods.alora import EVERYWHERE
from tests.cases import CASES
from tests.harness import QUICKLY, MethodRow, adapted, assert_close, random_like, results

TOKENS = (5, 6)
ALORA = {"r": 2, "lora_alpha": 5, "alora_invocation_tokens": TOKENS, "task_type": "CAUSAL_LM"}
IDS = np.array([[5, 6, 1, 5, 6, 2], [1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 7], [0, 0, 5, 6, 0, 0], [5, 6, 5, 6, 5, 6]])
OFFSETS = [3, 2, 0, 4, 2]
SHAPES = {
    "embed": {"embedding": (9, 4)},
    "query": {"kernel": (4, 6), "bias": (6,)},
    "stacked": {"kernel": (3, 6, 6)},
    "head": {"kernel": (6, 3)},
}
LAYOUTS = {"stacked.kernel": "bio"}


def function(params, ids):
    """A lookup, a linear layer with a bias, a scan of layers under remat, a head."""
    x = params["embed"]["embedding"][ids]
    y = x @ params["query"]["kernel"] + params["query"]["bias"]
    y, _ = jax.lax.scan(jax.checkpoint(lambda c, w: (jnp.tanh(c @ w), None)), y, params["stacked"]["kernel"])
    return y @ params["head"]["kernel"]


lifted = jpeft.lift(function)


def wrapped_with(*configs, seed=3):
    """Random parameters with an adapter for each config, called a, b, c; float64 where that is on."""
    wrapped = random_like(SHAPES, seed)
    for name, config in zip("abc", configs, strict=False):
        config = {"target_modules": ["query", "stacked", "head"], **config}
        wrapped = jpeft.wrap(wrapped, jpeft.LoraConfig(**config), adapter_name=name, layouts=LAYOUTS)
    adapters = {
        name: dataclasses.replace(adapter, weights=random_like(adapter.weights, 10 * index))
        for index, (name, adapter) in enumerate(wrapped.adapters.items())
    }
    return dataclasses.replace(wrapped, adapters=adapters)


def plain(wrapped, name="a"):
    """The same arrays as an adapter of plain LoRA."""
    config = dataclasses.replace(wrapped.adapters[name].config, alora_invocation_tokens=None)
    adapter = dataclasses.replace(wrapped.adapters[name], config=config)
    return dataclasses.replace(wrapped, adapters={**wrapped.adapters, name: adapter}, context={})


@functools.partial(jax.jit, compiler_options=QUICKLY)
def call(wrapped, ids):
    return lifted(wrapped, ids)


def sum_of(function):
    return lambda *args: jnp.sin(function(*args)).sum()


# ---- where it begins ------------------------------------------------------------------------------------------------


def searched(ids, tokens):
    """The offsets by a search of lists."""
    found = []
    for row in ids.tolist():
        starts = [s for s in range(len(row)) if row[s : s + len(tokens)] == list(tokens)]
        found.append(len(row) - starts[-1] if starts else 0)
    return found


@pytest.mark.parametrize("tokens", [[1], [2, 1], [1, 1], [0, 1, 0], [1, 0, 1, 1, 0, 0]])
def test_offsets_are_the_distance_of_the_last_invocation_from_the_end(tokens):
    ids = np.random.default_rng(len(tokens)).integers(0, 3, (200, 9))
    for row, start in enumerate(np.random.default_rng(0).integers(0, 10 - len(tokens), 50)):
        ids[row, start : start + len(tokens)] = tokens
    want = searched(ids, tokens)
    assert len(set(want)) > 3 and 0 in want
    got = jpeft.alora_offsets(ids, tokens)
    assert got.dtype == jnp.int32 and got.tolist() == want
    np.testing.assert_array_equal(jax.jit(lambda ids: jpeft.alora_offsets(ids, tokens))(ids), want)
    np.testing.assert_array_equal(jax.vmap(lambda row: jpeft.alora_offsets(row, tokens))(jnp.asarray(ids)), want)


def test_offsets_of_texts_that_are_shorter_than_the_invocation_and_of_many_axes(x64):
    assert jpeft.alora_offsets(IDS[:, :1], TOKENS).tolist() == [0] * 5
    assert jpeft.alora_offsets(IDS, TOKENS).tolist() == OFFSETS
    assert jpeft.alora_offsets(IDS[None, :, :], list(TOKENS)).tolist() == [OFFSETS]


# ---- what it computes -----------------------------------------------------------------------------------------------


def test_the_formula_in_numpy(x64):
    wrapped = wrapped_with(ALORA)
    base, adapter = jax.tree.map(np.asarray, wrapped.base), jax.tree.map(np.asarray, wrapped.adapters["a"].weights)

    def product(x, kernel, own):
        y = x @ kernel
        for row, offset in enumerate(OFFSETS):
            first = x.shape[1] - offset
            y[row, first:] += 5 / 2 * (x[row, first:] @ own["lora_A"].T) @ own["lora_B"].T
        return y

    y = product(base["embed"]["embedding"][IDS], base["query"]["kernel"], adapter["query"]) + base["query"]["bias"]
    for layer in range(3):
        own = {name: array[layer] for name, array in adapter["stacked"].items()}
        y = np.tanh(product(y, base["stacked"]["kernel"][layer], own))
    want = product(y, base["head"]["kernel"], adapter["head"])
    got = call(jpeft.with_context(wrapped, alora_offsets=OFFSETS), IDS)
    np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-12)
    # To the last bit, so that a cache of the base model is as good as one of its own.
    before = np.arange(IDS.shape[1]) < (IDS.shape[1] - np.array(OFFSETS))[:, None]
    np.testing.assert_array_equal(np.asarray(got)[before], np.asarray(call(wrapped.base, IDS))[before])
    assert np.abs(np.asarray(got) - call(wrapped.base, IDS))[~before].max(-1).min() > 1e-3


# The number of rows of x, in cases whose x has rows and tokens.
ROWS_OF = {
    "with bias": 2,
    "w.T @ x, batched": 2,
    "x @ w.T, layout io": 2,
    "heads out": 2,
    "heads in": 2,
    "fused parts": 2,
    "scan of remat, nothing": 2,
    "cond": 2,
    "linen attention": 2,
    "nnx scan": 2,
}


@pytest.mark.parametrize("case", [case for case in CASES if case.name in ROWS_OF], ids=lambda case: case.name)
def test_everywhere_it_is_lora_and_nowhere_it_is_the_base(case, x64):
    problem = case.build()
    wrapped = adapted(problem, MethodRow("alora", None, jpeft.LoraConfig, {"target_modules": ".*", **ALORA}))
    rows = ROWS_OF[case.name]

    def compute_on(wrapped, offsets):
        wrapped = jpeft.with_context(wrapped, alora_offsets=offsets)
        outputs, by_weights, by_args = results(jpeft.lift(problem.function), wrapped, problem.args)
        return outputs, by_weights.adapters["default"].weights, by_args

    compute: Any = jax.jit(compute_on, compiler_options=QUICKLY)
    other = dataclasses.replace(plain(wrapped, "default"), active=("default",))
    outputs, by_weights, by_args = results(jpeft.lift(problem.function), other, problem.args)
    assert_close(
        compute(wrapped, jnp.full(rows, EVERYWHERE, jnp.int32)),
        (outputs, by_weights.adapters["default"].weights, by_args),
    )
    outputs, by_weights, _ = compute(wrapped, jnp.zeros(rows, jnp.int32))
    assert_close(outputs, problem.function(problem.params, *problem.args))
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(by_weights))
    # One function, of some tokens: between the two.
    some = compute(wrapped, jnp.ones(rows, jnp.int32))
    assert any(np.any(leaf) for leaf in jax.tree.leaves(some[1]))
    assert compute._cache_size() == 1


def test_every_way_to_call_it_gives_the_same(x64):
    wrapped = wrapped_with(ALORA)
    want = call(jpeft.with_context(wrapped, alora_offsets=OFFSETS), IDS)
    axes = dataclasses.replace(wrapped, base=None, adapters=None, context=0)

    def one(wrapped, ids, offset):
        own = jpeft.with_context(wrapped, alora_offsets=offset[None])
        return lifted(own, ids[None])[0]

    by_rows = jax.jit(jax.vmap(one, in_axes=(None, 0, 0)))(wrapped, jnp.asarray(IDS), jnp.asarray(OFFSETS))
    np.testing.assert_allclose(by_rows, want, rtol=1e-12)
    given = dataclasses.replace(wrapped, context={"alora_offsets": jnp.asarray(OFFSETS)[:, None]})
    mapped = jax.jit(jax.vmap(lambda wrapped, ids: lifted(wrapped, ids[None])[0], in_axes=(axes, 0)))(
        given, jnp.asarray(IDS)
    )
    np.testing.assert_allclose(mapped, want, rtol=1e-12)
    mesh = jax.make_mesh((5,), ("rows",), devices=jax.devices()[:5], axis_types=(AxisType.Auto,))
    spread = jax.device_put(jnp.asarray(IDS), NamedSharding(mesh, P("rows")))
    offsets = jax.device_put(jnp.asarray(OFFSETS), NamedSharding(mesh, P("rows")))
    sharded = jax.jit(lambda w, ids, offsets: lifted(jpeft.with_context(w, alora_offsets=offsets), ids))
    np.testing.assert_allclose(sharded(wrapped, spread, offsets), want, rtol=1e-12)
    shapes = jax.eval_shape(lambda w: w, wrapped)
    abstract = jpeft.with_context(shapes, alora_offsets=jax.ShapeDtypeStruct((5,), jnp.int64))
    assert jax.eval_shape(lifted, abstract, IDS).shape == want.shape
    assert jpeft.explain(function, abstract, IDS).of("stacked") == ["transformed"]


def test_the_derivative_is_that_of_the_formula_written_out(x64):
    wrapped = jpeft.with_context(wrapped_with(ALORA), alora_offsets=OFFSETS)
    mask = (np.arange(6) >= 6 - np.array(OFFSETS)[:, None])[..., None]

    def formula(weights, ids):
        def product(x, kernel, own):
            return x @ kernel + 2.5 * jnp.where(mask, x @ own["lora_A"].T @ own["lora_B"].T, 0)

        base = wrapped.base
        y = product(base["embed"]["embedding"][ids], base["query"]["kernel"], weights["query"])
        y = y + base["query"]["bias"]
        for layer in range(3):
            own = {name: array[layer] for name, array in weights["stacked"].items()}
            y = jnp.tanh(product(y, base["stacked"]["kernel"][layer], own))
        return product(y, base["head"]["kernel"], weights["head"])

    want = jax.jit(jax.grad(sum_of(formula)))(wrapped.adapters["a"].weights, IDS)
    got = jax.jit(jpeft.grad(sum_of(lifted)))(wrapped, IDS)
    assert_close(got.adapters["a"].weights, want)


def test_dropout_falls_on_the_activated_tokens_alone():
    wrapped = wrapped_with({**ALORA, "lora_dropout": 0.5})
    first, again, other = (
        call(jpeft.with_context(wrapped, rng=jax.random.key(seed), alora_offsets=OFFSETS), IDS) for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    changed = np.abs(first - other).max(-1) > 0
    before = np.arange(6) < (6 - np.array(OFFSETS))[:, None]
    assert not changed[before].any() and changed[~before].all()


# ---- several adapters -----------------------------------------------------------------------------------------------


def test_each_active_adapter_begins_at_its_own_invocation(x64):
    wrapped = wrapped_with(ALORA, {"r": 3}, {**ALORA, "alora_invocation_tokens": [5]})
    wrapped = jpeft.set_adapter(wrapped, ["a", "b", "c"])
    given = with_offsets(wrapped, IDS)
    offsets = {name: array.tolist() for name, array in given.context["alora_offsets"].items()}
    assert offsets == {"a": OFFSETS, "c": [3, 2, 2, 4, 2]}
    linear = jpeft.lift(lambda params, x: x @ params["query"]["kernel"])
    x = random_like((5, 6, 4), 8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the other modules have no use
        got = linear(given, x)
        want = linear(wrapped.base, x)
        for name, own in {"a": offsets["a"], "b": [EVERYWHERE] * 5, "c": offsets["c"]}.items():
            mask = np.arange(6) >= (6 - np.minimum(own, 6))[:, None]
            alone = jpeft.set_adapter(plain(wrapped, name), name)
            want = want + np.where(mask[..., None], linear(alone, x) - linear(wrapped.base, x), 0)
    np.testing.assert_allclose(got, want, rtol=1e-12)
    told = jpeft.with_context(wrapped, alora_offsets={"a": OFFSETS, "c": [3, 2, 2, 4, 2]})
    np.testing.assert_array_equal(call(told, IDS), call(given, IDS))


CHOICES = (["a", "b", "__base__", "c", "a"], ["c", "a", "a", "a", "b"], ["e", "b", "a", "e", "c"])


def test_a_mixed_batch_of_alora_lora_and_none(x64):
    wrapped = wrapped_with(ALORA, {"r": 4, "lora_alpha": 3}, {**ALORA, "r": 1, "alora_invocation_tokens": [5]})
    config = jpeft.LoraConfig(r=2, init_lora_weights=False, target_modules=["embed"])
    wrapped = jpeft.wrap(wrapped, config, adapter_name="e", dtype=jnp.float64)
    mixed = jpeft.mixed_batch(wrapped)

    def outputs_and_gradient(wrapped, chosen):
        def loss(wrapped):
            outputs = lifted(wrapped, IDS)
            return (jnp.sin(outputs) * chosen[:, None, None]).sum(), outputs

        (_, outputs), gradient = jpeft.value_and_grad(loss, has_aux=True)(wrapped)
        return outputs, {name: adapter.weights for name, adapter in gradient.adapters.items()}

    compute: Any = jax.jit(outputs_and_gradient, compiler_options=QUICKLY)
    owners = {name: with_offsets(jpeft.set_adapter(wrapped, name), IDS) for name in wrapped.adapters}
    for choice in CHOICES:
        given = with_offsets(jpeft.with_context(mixed, adapter_indices=choice), IDS)
        got, stacked = compute(given, jnp.ones(5))
        chosen = np.array(choice) == "__base__"
        np.testing.assert_allclose(got[chosen], call(wrapped.base, IDS)[chosen], rtol=1e-10, atol=1e-12)
        for index, (name, own) in enumerate(owners.items()):
            chosen = np.array(choice) == name
            want, gradient = compute(own, jnp.asarray(chosen, float))
            np.testing.assert_allclose(got[chosen], want[chosen], rtol=1e-10, atol=1e-12)
            for path, arrays in gradient[name].items():
                for key, array in arrays.items():
                    assert_close(cut(stacked["mixed"][path][key][index], array.shape), array)
    assert compute._cache_size() == 1 + len(owners)
    again = jpeft.unmixed(mixed)
    assert {name: a.config for name, a in again.adapters.items()} == {n: a.config for n, a in wrapped.adapters.items()}


def test_a_mixed_batch_of_one_row_and_repeated_rows():
    wrapped = wrapped_with(ALORA, {"r": 4})
    mixed = jpeft.mixed_batch(wrapped)
    one = with_offsets(jpeft.with_context(mixed, adapter_indices=["a"]), IDS[:1])
    alone = with_offsets(jpeft.set_adapter(wrapped, "a"), IDS[:1])
    np.testing.assert_allclose(call(one, IDS[:1]), call(alone, IDS[:1]), rtol=1e-5, atol=1e-6)
    two = jpeft.with_context(mixed, adapter_indices=["a", "b"], alora_offsets=[2, None])
    repeated = with_rows(two, 4).context
    assert repeated["alora_offsets"].tolist() == [2, 2, 0, 0] and repeated["adapter_indices"].tolist() == [0, 0, 1, 1]
    assert with_offsets(two, IDS[:2]) is two
    # Beam search repeats the rows of the ids, too.
    four = with_offsets(jpeft.with_context(mixed, adapter_indices=["a", "b"]), IDS[[0, 0, 1, 1]])
    assert four.context["alora_offsets"].tolist() == [3, 3, 0, 0]


def test_parameters_that_await_offsets():
    wrapped = wrapped_with(ALORA, {"r": 4})
    assert awaits_offsets(wrapped) and not awaits_offsets(with_offsets(wrapped, IDS))
    assert not awaits_offsets(jpeft.disable_adapters(wrapped)) and not awaits_offsets(jpeft.set_adapter(wrapped, "b"))
    other = jpeft.set_adapter(wrapped, "b")
    assert with_offsets(other, IDS) is other and without_offsets(other, 5) is other
    np.testing.assert_array_equal(call(without_offsets(wrapped, 5), IDS), call(wrapped.base, IDS))


# ---- the same for methods to come -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskConfig(TunerConfig):
    """A toy: W' = W + delta[task of the row], and tokens weighted one by one."""


def by_task(p, x, base, site, context):
    assert set(p) == {"delta", "scaling"}
    change = jnp.einsum("bti,bio->bto", x, p["delta"][context["task_ids"]])
    return base(x) + change * context["token_scalings"][..., None]


register(
    Method(
        config=TaskConfig,
        init=lambda key, site, config, weight: {"delta": jnp.ones((2, site.in_features, site.out_features))},
        merge=lambda p, w, b, site: (w, b),
        forward=by_task,
        row_inputs={"task_ids": RowInput(jnp.asarray), "token_scalings": RowInput(jnp.asarray)},
    )
)


def test_a_method_finds_what_it_asks_for_by_name(x64):
    shapes = {"q": {"kernel": (4, 6)}}
    wrapped = jpeft.wrap(random_like(shapes, 1), TaskConfig(target_modules=["q"]))
    wrapped = dataclasses.replace(wrapped, adapters=random_like(wrapped.adapters, 4))
    x, tasks, scalings = random_like((3, 5, 4), 2), jnp.array([1, 0, 1]), random_like((3, 5), 6)
    delta = wrapped.adapters["default"].weights["q"]["delta"]
    want = np.einsum("bti,bio->bto", x, wrapped.base["q"]["kernel"] + 0 * delta[tasks])
    want = want + np.einsum("bti,bio->bto", x, delta[tasks]) * scalings[..., None]
    linear = jpeft.lift(lambda params, x: x @ params["q"]["kernel"])
    given = jpeft.with_context(wrapped, task_ids=tasks, token_scalings=scalings)
    np.testing.assert_allclose(linear(given, x), want, rtol=1e-12)
    # A mixture of methods without a plain form is refused, as any other.
    with pytest.raises(ValueError, match="no product of two thin factors"):
        jpeft.mixed_batch(wrapped)


# ---- what is refused ------------------------------------------------------------------------------------------------


def no_rows(params, x):
    return x.reshape(-1, 4) @ params["query"]["kernel"]


def refusals():
    wrapped = wrapped_with(ALORA)
    given = jpeft.with_context(wrapped, alora_offsets=OFFSETS)
    x, lift = jnp.ones((5, 6, 4)), jpeft.lift
    by_columns = lambda params, x: x @ params["query"]["kernel"][:, 1:3]  # noqa: E731
    elsewhere = lambda params, x: (x @ params["query"]["kernel"], params["query"]["kernel"].sum())  # noqa: E731
    mixed = jpeft.mixed_batch(jpeft.wrap(wrapped, jpeft.LoraConfig(target_modules=["query"]), adapter_name="b"))
    of_rows = jpeft.with_context(mixed, adapter_indices=[0, 1, -1, 0, 0])
    return {
        r"adapter 'a' needs alora_offsets for each row of the batch.*with_context\(params, alora_offsets=": (
            lambda: lifted(wrapped, IDS)
        ),
        "adapter 'mixed' needs alora_offsets": lambda: lifted(of_rows, IDS),
        "'head' changes what comes after its invocation .*cannot be merged. Expected it beside": (
            lambda: jpeft.merge(wrapped)
        ),
        "aLoRA at 'query' .*uses the whole weight in products": lambda: lift(by_columns)(given, x),
        "aLoRA at 'query' changes": lambda: jpeft.explain(elsewhere, given, x),
        "aLoRA at 'head'": lambda: jpeft.convert_to_lora(wrapped, "a", 2, "new"),
        r"are for 5 rows, but 'query' computes an array of shape \(30, 2\); expected \(rows, tokens": (
            lambda: lift(no_rows)(given, x)
        ),
        r"are for 5 rows, but 'query' computes an array of shape \(3, 6, 2\)": lambda: lifted(given, IDS[:3]),
        r"alora_offsets are float32 of shape \(2,\); expected integers": (
            lambda: jpeft.with_context(wrapped, alora_offsets=[1.0, 2.0])
        ),
        r"alora_offsets are int32 of shape \(1, 5\)": lambda: jpeft.with_context(wrapped, alora_offsets=[OFFSETS]),
        r"alora_offsets hold -2; expected 0 \(no invocation\) or more": (
            lambda: jpeft.with_context(wrapped, alora_offsets=[3, -2])
        ),
        r"alora_offsets are for \['z'\]; expected adapters among: a": (
            lambda: jpeft.with_context(wrapped, alora_offsets={"z": OFFSETS})
        ),
        r"of another number of rows each: \{'adapter_indices': \[2\], 'alora_offsets': \[5\]\}; expected one": (
            lambda: jpeft.with_context(mixed, adapter_indices=[0, 1], alora_offsets=OFFSETS)
        ),
        "alora_offsets are for 5 rows, the batch has 7": lambda: with_rows(given, 7),
        r"input_ids are of shape \(6,\); expected \(rows, length\)": lambda: with_offsets(wrapped, IDS[0]),
        r"input_ids are float32 of shape \(2,\); expected integers": lambda: jpeft.alora_offsets([1.0, 2.0], [1]),
        "invocation_tokens is empty": lambda: jpeft.alora_offsets(IDS, []),
        r"alora_invocation_tokens is \('a',\); expected a list of the ids": lambda: config(["a"]),
        "alora_invocation_tokens is 'abc'; expected": lambda: config("abc"),
        r"variants of LoRA exclude each other, but there are use_dora=True, alora_invocation_tokens=\(5, 6\)": (
            lambda: config(TOKENS, use_dora=True)
        ),
        r"target_parameters is .* with alora_invocation_tokens=\(5, 6\); expected plain LoRA": (
            lambda: config(TOKENS, target_parameters=["q"])
        ),
        r"init_lora_weights='pissa' with alora_invocation_tokens": lambda: config(TOKENS, init_lora_weights="pissa"),
    }


def config(tokens, **options):
    return jpeft.LoraConfig(task_type="CAUSAL_LM", alora_invocation_tokens=tokens, **options)


@pytest.mark.filterwarnings("ignore:the function uses no weight")
def test_what_cannot_be_right_is_refused():
    for text, call in refusals().items():
        with pytest.raises(ValueError, match=text):
            call()


def test_a_name_that_no_adapter_asks_for():
    with pytest.raises(TypeError, match="no adapter asks for task_ids; expected one of: rng, adapter_indices, alora_o"):
        jpeft.with_context(wrapped_with(ALORA), task_ids=[1])


def test_a_lookup_table_is_not_for_alora():
    with pytest.raises(ValueError, match="embed"):
        jpeft.wrap(random_like(SHAPES, 1), config(TOKENS, target_modules=["embed"]))


def test_other_tasks_are_warned_of():
    with pytest.warns(UserWarning, match="given with task_type='SEQ_CLS'; PEFT has aLoRA for 'CAUSAL_LM' alone"):
        jpeft.LoraConfig(task_type="SEQ_CLS", alora_invocation_tokens=[1])
    with pytest.warns(UserWarning, match="task_type=None"):
        made = jpeft.LoraConfig(alora_invocation_tokens=[], target_modules=["query"])
    # As in PEFT, no tokens at all are plain LoRA.
    wrapped = jpeft.wrap(random_like(SHAPES, 1), made)
    assert not awaits_offsets(wrapped) and jpeft.merge(wrapped)
