"""Mixed batches: every row equals the same row alone with its own adapter, whatever the function; one compilation."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jpeft
from jpeft._config import TunerConfig
from jpeft._contract import low_rank, register
from jpeft._mixed import with_rows
from tests.harness import QUICKLY, random_like

ROWS = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class OuterConfig(TunerConfig):
    """A toy that is a product of thin factors as well: W' = W + u v."""


register(
    low_rank(
        config=OuterConfig,
        init=lambda key, site, config, weight: {
            "u": jnp.ones((1, site.in_features)),
            "v": jnp.zeros((1, site.out_features)),
        },
        factors=lambda p, site: (p["u"], p["v"]),
    )
)

NAMES = ("a", "b", "c")
IDS = np.array([[1, 2, 3, 0], [6, 6, 5, 4], [1, 2, 3, 0], [3, 3, 0, 1], [2, 5, 1, 6]], np.int32)
CHOICES = ([0, -1, 1, 2, 0], [2, 2, 2, 2, 2])


@dataclasses.dataclass(frozen=True)
class Use:
    """A function of parameters and ids (rows, length), with the shapes of its parameters."""

    function: Callable[..., Any]
    shapes: dict[str, Any]
    layouts: dict[str, str] = dataclasses.field(default_factory=dict)


def dense(params, ids):
    x = params["embed"]["embedding"][ids]
    y = jnp.tanh(x @ params["query"]["kernel"] + params["query"]["bias"])
    return y @ params["head"]["kernel"], y.mean(axis=1)


def attention(params, ids):
    x = params["embed"]["embedding"][ids]
    q = jnp.einsum("btd,dnh->btnh", x, params["heads"]["kernel"])
    scores = jnp.einsum("btnh,bsnh->bnts", q, q)
    return {"scores": scores, "flat": (x.reshape(-1, x.shape[-1]) @ params["query"]["kernel"]).reshape(*ids.shape, -1)}


def scanned(params, ids):
    x = params["embed"]["embedding"][ids]
    layers = params["layers"]["0:3"]
    step = jax.checkpoint(lambda c, w: (jnp.tanh(c @ w), c.sum(-1)))
    y, sums = jax.lax.scan(step, x, layers["mlp"]["kernel"])
    # The batch is the second axis of `sums`, and the positions have none.
    return y, sums, jnp.arange(ids.shape[1])


def convolved(params, ids):
    x = params["embed"]["embedding"][ids]
    image = (x[:, None] + x[:, :, None])[..., :1]
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(image, params["conv"]["kernel"], (1, 1), "SAME", dimension_numbers=numbers)


def time_major(params, ids):
    x = jnp.swapaxes(params["embed"]["embedding"][ids], 0, 1)
    return jax.lax.map(lambda one: jnp.sin(one @ params["query"]["kernel"]), x)


def jitted_in_a_loop(params, ids):
    x = params["embed"]["embedding"][ids]
    body = jax.jit(lambda i, x: jnp.tanh(x @ params["square"]["kernel"]))
    return jax.lax.fori_loop(0, 2, body, x)


TABLE = {"embed": {"embedding": (7, 4)}, "query": {"kernel": (4, 6)}}
USES = {
    "dense": Use(dense, {**TABLE, "query": {"kernel": (4, 6), "bias": (6,)}, "head": {"kernel": (6, 3)}}),
    "attention": Use(attention, {**TABLE, "heads": {"kernel": (4, 2, 3)}}, {"heads.kernel": "ioo"}),
    "scan": Use(scanned, {"embed": TABLE["embed"], "layers": {"0:3": {"mlp": {"kernel": (3, 4, 4)}}}}),
    "convolution": Use(convolved, {"embed": TABLE["embed"], "conv": {"kernel": (3, 3, 1, 2)}}),
    "time major": Use(time_major, TABLE),
    "loop": Use(jitted_in_a_loop, {**TABLE, "square": {"kernel": (4, 4)}}),
}
over_uses = pytest.mark.parametrize("use", USES.values(), ids=USES)


def adapters(use, **options):
    """Three adapters of other ranks, scalings and modules, with random values: all, the table alone, all but it."""
    wrapped = random_like(use.shapes, 7)
    targets = {"a": r".*", "b": "embed", "c": r"(?!embed).*"}
    for seed, (name, target) in enumerate(targets.items()):
        config = jpeft.LoraConfig(r=seed + 1, lora_alpha=3 + seed, target_modules=target, **options)
        wrapped = jpeft.wrap(wrapped, config, adapter_name=name, layouts=use.layouts, dtype=jnp.result_type(float))
    random = {
        name: dataclasses.replace(adapter, weights=random_like(adapter.weights, 10 * seed))
        for seed, (name, adapter) in enumerate(wrapped.adapters.items())
    }
    return dataclasses.replace(wrapped, adapters=random)


def alone(wrapped, index):
    return jpeft.disable_adapters(wrapped) if index < 0 else jpeft.set_adapter(wrapped, NAMES[index])


def one_by_one(use, wrapped, choice):
    """What a mixed batch has to equal: each row by itself, on merged weights, joined along the axis of the batch."""
    plain = jax.jit(use.function, compiler_options=QUICKLY)

    def joined(whole, *parts):
        axes = [axis for axis, size in enumerate(whole.shape) if size != parts[0].shape[axis]]
        return jnp.concatenate(parts, axis=axes[0]) if axes else parts[0]

    whole = jax.eval_shape(use.function, wrapped.base, IDS)
    return jax.tree.map(
        joined, whole, *(plain(jpeft.merge(alone(wrapped, i)), IDS[r : r + 1]) for r, i in enumerate(choice))
    )


def assert_all_close(got, want, tolerance=1e-12):
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert ours.shape == theirs.shape
        np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=tolerance)


@over_uses
@pytest.mark.filterwarnings("ignore:the function uses no weight")
def test_each_row_has_its_own_adapter(use, x64):
    wrapped = adapters(use)
    mixed, lifted = jpeft.mixed_batch(wrapped), jax.jit(jpeft.lift(use.function), compiler_options=QUICKLY)
    for choice in CHOICES:
        got = lifted(jpeft.with_context(mixed, adapter_indices=jnp.array(choice)), IDS)
        assert_all_close(got, one_by_one(use, wrapped, choice))
    assert lifted._cache_size() == 1


@over_uses
@pytest.mark.filterwarnings("ignore:the function uses no weight")
def test_gradients_reach_the_adapters_of_the_rows(use, x64):
    wrapped, choice = adapters(use), CHOICES[0]
    mixed = jpeft.mixed_batch(wrapped)
    mixed = jpeft.with_context(mixed, adapter_indices=jnp.array(choice))
    lifted = jpeft.lift(use.function)

    def loss(outputs):
        floating = [leaf for leaf in jax.tree.leaves(outputs) if jnp.issubdtype(leaf.dtype, jnp.floating)]
        return sum(jnp.sin(leaf).sum() for leaf in floating)

    def compiled(function):
        return jax.jit(jpeft.grad(function), compiler_options=QUICKLY)

    gradient = compiled(lambda wrapped: loss(lifted(wrapped, IDS)))(mixed)
    for index, name in enumerate(NAMES):
        rows = np.flatnonzero(np.array(choice) == index)
        want = compiled(lambda own, rows=rows: loss(lifted(own, IDS[rows])))(jpeft.set_adapter(wrapped, name))
        for path, arrays in want.adapters[name].weights.items():
            for key, array in arrays.items():
                got = gradient.adapters["mixed"].weights[path][key][index]
                own = got[tuple(slice(0, size) for size in array.shape)]
                np.testing.assert_allclose(own, array, rtol=1e-12, atol=1e-12)
                # Nothing flows into what fills up a lower rank.
                np.testing.assert_allclose(jnp.abs(got).sum(), jnp.abs(array).sum(), rtol=1e-12)


def test_a_training_loop_moves_the_adapters_of_the_rows_alone():
    use = USES["dense"]
    wrapped = adapters(use)
    mixed, tx = jpeft.mixed_batch(wrapped), optax.masked(optax.sgd(1e-2), jpeft.trainable_mask)
    apply = jpeft.lift(use.function)

    @jax.jit
    def step(mixed, state):
        gradient = jpeft.grad(lambda wrapped: (apply(wrapped, IDS)[0] ** 2).sum())(mixed)
        updates, state = tx.update(gradient, state, mixed)
        return optax.apply_updates(mixed, updates), state

    mixed = jpeft.with_context(mixed, adapter_indices=[0, 0, 1, 0, -1])
    state = tx.init(mixed)
    mixed, state = step(mixed, state)
    mixed, state = step(jpeft.with_context(mixed, adapter_indices=jnp.array([1, 1, 0, 0, 0])), state)
    assert step._cache_size() == 1
    after = jpeft.unmixed(mixed)
    assert after.active == ("a",) and after.base is mixed.base
    for name in NAMES:
        assert jax.tree.structure(after.adapters[name]) == jax.tree.structure(wrapped.adapters[name])
    moved = {name: _moved(after.adapters[name], wrapped.adapters[name]) for name in NAMES}
    assert moved["a"] > 1e-3 and moved["b"] > 1e-3 and moved["c"] == 0.0


def _moved(ours, theirs):
    pairs = zip(jax.tree.leaves(ours.weights), jax.tree.leaves(theirs.weights), strict=True)
    return max(float(jnp.abs(a - b).max()) for a, b in pairs)


def test_full_copies_are_chosen_by_row_as_well(x64):
    wrapped = random_like(USES["dense"].shapes, 3)
    saved = {"a": ["head"], "b": ["embed"], "c": None}
    for name, modules in saved.items():
        config = jpeft.LoraConfig(r=2, target_modules=["query"], modules_to_save=modules)
        wrapped = jpeft.wrap(wrapped, config, adapter_name=name, dtype=jnp.float64)
    random = {
        name: dataclasses.replace(a, weights=random_like(a.weights, 4), replaced=random_like(a.replaced, 5))
        for name, a in wrapped.adapters.items()
    }
    wrapped = dataclasses.replace(wrapped, adapters=random)
    mixed = jpeft.with_context(jpeft.mixed_batch(wrapped), adapter_indices=["a", "b", "c", "__base__", "a"])
    got = jax.jit(jpeft.lift(dense))(mixed, IDS)
    assert_all_close(got, one_by_one(USES["dense"], wrapped, [0, 1, 2, -1, 0]))


def test_dropout_has_masks_of_its_own_in_each_row():
    use = USES["dense"]
    mixed = jpeft.mixed_batch(adapters(use, lora_dropout=0.5))
    same = np.repeat(IDS[:1], ROWS, axis=0)
    draw = jax.jit(jpeft.lift(use.function))
    context = {"adapter_indices": jnp.array([0, 0, -1, 2, 2])}
    first, again, other = (
        draw(jpeft.with_context(mixed, rng=jax.random.key(seed), **context), same)[0] for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first[0], first[1]) and not np.allclose(first[0], other[0])
    without = draw(jpeft.with_context(mixed, **context), same)[0]
    np.testing.assert_array_equal(without[0], without[1])
    np.testing.assert_allclose(first[2], without[2], rtol=1e-6)


def test_a_key_among_the_arguments_gives_each_row_draws_of_its_own():
    mixed = jpeft.with_context(jpeft.mixed_batch(adapters(USES["dense"])), adapter_indices=[0] * 3)

    def noisy(params, ids, key):
        return jax.random.normal(key, (*ids.shape, 6)) + params["embed"]["embedding"][ids] @ params["query"]["kernel"]

    with pytest.warns(UserWarning, match="uses no weight"):
        rows = jpeft.lift(noisy)(mixed, np.repeat(IDS[:1], 3, axis=0), jax.random.key(0))
    assert not np.allclose(rows[0], rows[1])


def test_a_batch_of_one_row_and_abstract_parameters(x64):
    use = USES["scan"]
    wrapped = adapters(use)
    for index in (-1, 2):
        mixed = jpeft.with_context(jpeft.mixed_batch(wrapped), adapter_indices=[index])
        want = jpeft.lift(use.function)(alone(wrapped, index), IDS[:1])
        assert_all_close(jax.jit(jpeft.lift(use.function))(mixed, IDS[:1]), want)
    shapes = jax.eval_shape(lambda wrapped: wrapped, wrapped)
    abstract = jpeft.mixed_batch(shapes)
    concrete = jpeft.mixed_batch(wrapped)
    assert jax.tree.map(jnp.shape, abstract) == jax.tree.map(jnp.shape, concrete)
    assert jax.tree.map(jnp.shape, jpeft.unmixed(abstract)) == jax.tree.map(jnp.shape, jpeft.unmixed(concrete))


def test_explain_tells_how_a_mixed_batch_is_computed():
    use = USES["dense"]
    mixed = jpeft.with_context(jpeft.mixed_batch(adapters(use)), adapter_indices=list(NAMES) + ["__base__"] * 2)
    table = jpeft.explain(use.function, mixed, IDS)
    assert table.of("query") == ["low-rank"] and table.of("embed") == ["lookup"]


def test_an_index_that_no_adapter_has_gives_nan_under_jit():
    mixed = jpeft.mixed_batch(adapters(USES["dense"]))
    lifted = jpeft.lift(dense)
    got = jax.jit(lambda rows: lifted(jpeft.with_context(mixed, adapter_indices=rows), IDS)[0])(
        jnp.array([0, 1, 3, 2, 0])
    )
    assert np.isnan(got[2]).all() and np.isfinite(np.delete(got, 2, axis=0)).all()


def refusals():
    wrapped = adapters(USES["dense"])
    mixed = jpeft.mixed_batch(wrapped)
    given = jpeft.with_context(mixed, adapter_indices=[0] * ROWS)
    params = wrapped.base
    lifted = jpeft.lift(dense)

    def plus(name, **options):
        config = jpeft.LoraConfig(**{"r": 2, "target_modules": ["query"], **options})
        return jpeft.wrap(wrapped, config, adapter_name=name)

    resized = dataclasses.replace(wrapped.adapters["a"], replaced={"head.kernel": jnp.ones((6, 5))})
    moved = jpeft.wrap(
        dict(params, query={"kernel": jnp.ones((4, 2, 3))}),
        jpeft.LoraConfig(target_modules=["query"]),
        layouts={"query": "ioo"},
    ).adapters["default"]
    rates = jpeft.mixed_batch(plus("d", lora_dropout=0.1))
    drawn = jpeft.with_context(rates, rng=jax.random.key(0), adapter_indices=[0] * ROWS)
    mean = jpeft.lift(lambda params, ids: dense(params, ids)[0].mean())
    merged = jpeft.lift(lambda params, ids: dense(params, ids)[0].reshape(-1, 3))
    return {
        "no product of two thin factors": lambda: jpeft.mixed_batch(plus("d", use_dora=True)),
        "trains single rows of embed.embedding": lambda: jpeft.mixed_batch(plus("d", trainable_token_indices=[1])),
        "ensure_weight_tying is": lambda: jpeft.mixed_batch(plus("d", ensure_weight_tying=True)),
        "expected one method in a mixture": lambda: jpeft.mixed_batch(
            jpeft.wrap(wrapped, OuterConfig(target_modules=["query"]), adapter_name="d")
        ),
        "some adapters train and others do not": lambda: jpeft.mixed_batch(plus("d", inference_mode=True)),
        "of shape \\(6, 3\\) by one of \\(6, 5\\)": lambda: jpeft.mixed_batch(
            dataclasses.replace(wrapped, adapters={"a": resized})
        ),
        "acts on 'query' as": lambda: jpeft.mixed_batch(
            dataclasses.replace(wrapped, adapters={"a": wrapped.adapters["a"], "d": moved})
        ),
        "each of them once": lambda: jpeft.mixed_batch(wrapped, ["a", "a"]),
        "adapters alone, as every mixture": lambda: jpeft.mixed_batch(wrapped, ["a", "__base__"]),
        "hold a mixture already": lambda: jpeft.mixed_batch(mixed),
        "and no mixture": lambda: jpeft.unmixed(wrapped),
        "call jpeft.mixed_batch first": lambda: jpeft.with_context(wrapped, adapter_indices=[0]),
        "adapter_indices name \\['d'\\]": lambda: jpeft.with_context(mixed, adapter_indices=["a", "d"]),
        "expected integers of shape": lambda: jpeft.with_context(mixed, adapter_indices=jnp.ones(3)),
        "adapter_indices hold \\[-2, 3\\]": lambda: jpeft.with_context(mixed, adapter_indices=[0, 3, -2]),
        "no row has one": lambda: lifted(mixed, IDS),
        "no array among the arguments has a first axis of 5": lambda: lifted(given, IDS[:3]),
        "or a multiple": lambda: with_rows(given, 7),
        "the dropout rates": lambda: jpeft.lift(dense)(drawn, IDS),
        "such as a mean loss": lambda: mean(given, IDS),
        "reshape outside the lifted function": lambda: merged(given, IDS),
        "expected jpeft.unmixed": lambda: jpeft.merge(given),
    }


@pytest.mark.filterwarnings("ignore:the function uses no weight")
def test_what_cannot_be_right_is_refused():
    for text, call in refusals().items():
        with pytest.raises(ValueError, match=text):
            call()


def test_other_layouts_and_no_mixture():
    config = jpeft.LoraConfig(r=2, target_modules=["q"])
    wrapped = jpeft.wrap({"q": {"kernel": jnp.ones((4, 2, 3))}}, config, adapter_name="a", layouts={"q.kernel": "ioo"})
    with pytest.raises(ValueError, match=r"hold the adapters \['a'\] and no mixture; expected those of jpeft.mixed"):
        jpeft.unmixed(wrapped)
    other = jpeft.wrap(wrapped, config, adapter_name="b", layouts={"q.kernel": "iio"})
    with pytest.raises(ValueError, match="adapter 'b' acts on 'q' as .*; expected adapters that were wrapped with the"):
        jpeft.mixed_batch(other)
