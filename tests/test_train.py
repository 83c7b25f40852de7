"""What trains: masks, partitions, gradients, and the training loops of the design."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jpeft
from jpeft import LoraConfig, _contract
from jpeft._contract import method_of, register

KEY = jax.random.key(3)
FROZEN_DTYPES = ["int8", "uint8", "uint32", "int4", "bool", "bfloat16", "float16", "float8_e4m3fn", "complex64"]


def params(**extra):
    return {
        "query": {"kernel": jax.random.normal(KEY, (8, 8)), "bias": jnp.ones(8)},
        "value": {"kernel": jax.random.normal(KEY, (8, 4))},
        "head": {"kernel": jnp.ones((8, 2)), "bias": jnp.ones(2)},
        **extra,
    }


def wrap(tree=None, *, target="query", name="default", **fields):
    tree = params() if tree is None else tree
    return jpeft.wrap(tree, LoraConfig(r=2, target_modules=[target], **fields), rng=KEY, adapter_name=name)


def loss(wrapped, x):
    """A plain function of wrapped parameters: the low-rank product and the saved head, written out."""
    adapter = wrapped.adapters["default"]
    p, w = adapter.weights["query"], wrapped.base["query"]["kernel"]
    h = x @ w + adapter.scaling["query"] * (x @ p["lora_A"].T) @ p["lora_B"].T
    return jnp.mean((h @ adapter.replaced.get("head.kernel", wrapped.base["head"]["kernel"]) - 1) ** 2)


X = jax.random.normal(jax.random.key(1), (5, 8))


def trained_paths(mask):
    leaves = jax.tree_util.tree_leaves_with_path(mask)
    return {jax.tree_util.keystr(path, simple=True, separator="/") for path, trains in leaves if trains}


def equal(first, second):
    return jax.tree.structure(first) == jax.tree.structure(second) and all(
        x is y or (x.dtype == y.dtype and np.array_equal(x, y))
        for x, y in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True)
    )


LORA_LEAVES = {"adapters/default/weights/query/lora_A", "adapters/default/weights/query/lora_B"}
HEAD_LEAVES = {"adapters/default/replaced/head.kernel", "adapters/default/replaced/head.bias"}


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (wrap, LORA_LEAVES),
        (lambda: wrap(modules_to_save=["head"]), LORA_LEAVES | HEAD_LEAVES),
        (lambda: wrap(bias="lora_only"), LORA_LEAVES | {"adapters/default/replaced/query.bias"}),
        (lambda: wrap(inference_mode=True, modules_to_save=["head"]), set()),
        (lambda: jpeft.disable_adapters(wrap(modules_to_save=["head"])), set()),
        (lambda: wrap(wrap(), target="value", name="other"), LORA_LEAVES),
        (
            lambda: jpeft.set_adapter(wrap(wrap(), target="value", name="other"), "other"),
            {"adapters/other/weights/value/lora_A", "adapters/other/weights/value/lora_B"},
        ),
        (lambda: jpeft.with_context(wrap(), rng=KEY), LORA_LEAVES),
    ],
)
def test_the_mask_is_true_where_an_active_adapter_trains(make, expected):
    wrapped = make()
    mask = jpeft.trainable_mask(wrapped)
    assert jax.tree.structure(mask) == jax.tree.structure(wrapped)
    assert trained_paths(mask) == expected


@pytest.fixture
def frozen_method():
    """LoRA whose A does not train, with an array that modules share and one that they share and train."""

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class FrozenConfig(LoraConfig):
        pass

    frozen = frozenset({"lora_A", "bank"})
    register(dataclasses.replace(method_of(LoraConfig()), config=FrozenConfig, frozen=frozen))
    yield FrozenConfig
    del _contract._METHODS[FrozenConfig]


def with_shared(config):
    wrapped = jpeft.wrap(params(), config(r=2, target_modules=["query"]), rng=KEY)
    adapter = dataclasses.replace(wrapped.adapters["default"], shared={"bank": jnp.ones(7), "logits": jnp.ones(5)})
    return dataclasses.replace(wrapped, adapters={"default": adapter})


def test_what_a_method_keeps_frozen_does_not_train_and_does_not_count(frozen_method):
    wrapped = with_shared(frozen_method)
    assert trained_paths(jpeft.trainable_mask(wrapped)) == {
        "adapters/default/shared/logits",
        "adapters/default/weights/query/lora_B",
    }
    base = sum(leaf.size for leaf in jax.tree.leaves(params()))
    assert jpeft.count_parameters(wrapped) == (16 + 5, base + 16 + 5)


def test_partition_and_combine_are_inverses():
    wrapped = jpeft.with_context(wrap(modules_to_save=["head"]), rng=KEY)
    trainable, frozen = jpeft.partition(wrapped)
    assert len(jax.tree.leaves(trainable)) == len(LORA_LEAVES | HEAD_LEAVES)
    assert len(jax.tree.leaves(trainable)) + len(jax.tree.leaves(frozen)) == len(jax.tree.leaves(wrapped))
    back = jpeft.combine(trainable, frozen)
    assert equal(back, wrapped)
    assert back.base is wrapped.base


def other_config():
    return jpeft.partition(wrap(lora_alpha=99))


@pytest.mark.parametrize(
    ("halves", "message"),
    [
        (lambda t, f: (f, t), r"expected combine\(trainable, frozen\), in this order"),
        (lambda t, f: (t, t), "expected combine"),
        (lambda t, f: (t, other_config()[1]), "the halves come from different parameters: .* with the same configs"),
        (lambda t, f: (t, jpeft.disable_adapters(f)), r"active \('default',\), and \['default'\], active \(\)"),
        (lambda t, f: (dataclasses.replace(wrap(), base=None), f), "leaf 'default.scaling.query' is in both halves"),
        (lambda t, f: (jax.tree.map(lambda _: None, t), f), "'default.weights.query.lora_A' is in neither half"),
    ],
)
def test_halves_that_do_not_fit_are_refused(halves, message):
    with pytest.raises(ValueError, match=message):
        jpeft.combine(*halves(*jpeft.partition(wrap())))


@pytest.mark.parametrize(
    "call",
    [
        jpeft.trainable_mask,
        jpeft.partition,
        jpeft.count_parameters,
        jpeft.print_trainable_parameters,
        lambda tree: jpeft.combine(tree, tree),
        jpeft.value_and_grad(lambda tree: 0.0),
        jpeft.grad(lambda tree: 0.0),
    ],
)
def test_a_bare_tree_is_refused(call):
    with pytest.raises(TypeError, match="expected the PeftParams that jpeft.wrap returns, not a dict"):
        call(params())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: jpeft.disable_adapters(wrap()), r"active adapters are \[\], of: 'default' with inference_mode=False"),
        (
            lambda: wrap(inference_mode=True),
            r"active adapters are \['default'\], of: 'default' with inference_mode=True",
        ),
    ],
)
@pytest.mark.parametrize("call", [jpeft.partition, jpeft.grad(loss), jpeft.value_and_grad(loss)])
def test_nothing_to_train_is_refused(make, message, call):
    with pytest.raises(ValueError, match=f"nothing trains: the {message}"):
        call(make())


def test_gradients_are_those_of_the_trainable_leaves_and_scalar_zeros():
    wrapped = jpeft.with_context(wrap(modules_to_save=["head"]), rng=KEY)
    value, gradient = jpeft.value_and_grad(loss)(wrapped, X)
    assert jax.tree.structure(gradient) == jax.tree.structure(wrapped)
    trainable, frozen = jpeft.partition(wrapped)
    expected = jax.grad(lambda t: loss(jpeft.combine(t, frozen), X))(trainable)
    assert equal(jpeft.partition(gradient)[0], expected)
    assert float(value) == float(loss(wrapped, X))
    zeros = jax.tree.leaves(jpeft.partition(gradient)[1])
    assert all(zero.shape == () and not zero for zero in zeros)
    assert [z.dtype for z in zeros] == [leaf.dtype for leaf in jax.tree.leaves(frozen)]
    assert float(jnp.abs(gradient.adapters["default"].weights["query"]["lora_B"]).max()) > 0


def test_other_arguments_and_aux_pass_through():
    def fn(wrapped, x, *, scale):
        return scale * loss(wrapped, x), {"rows": x.shape[0]}

    (value, aux), gradient = jpeft.value_and_grad(fn, has_aux=True)(wrap(), X, scale=2.0)
    alone, same_aux = jpeft.grad(fn, has_aux=True)(wrap(), X, scale=2.0)
    assert aux == same_aux == {"rows": 5}
    assert float(value) == 2 * float(loss(wrap(), X))
    assert equal(alone, gradient)
    assert equal(jpeft.grad(loss)(wrap(), X), jpeft.value_and_grad(loss)(wrap(), X)[1])
    assert jpeft.value_and_grad(fn).__name__ == jpeft.grad(fn).__name__ == "fn"


def test_gradient_through_merge_is_the_same():
    def through_merge(wrapped):
        merged = jpeft.merge(wrapped)
        return jnp.mean((X @ merged["query"]["kernel"] @ merged["head"]["kernel"] - 1) ** 2)

    wrapped = wrap(modules_to_save=["head"], init_lora_weights=False)
    direct, merged = jpeft.grad(loss)(wrapped, X), jpeft.grad(through_merge)(wrapped)
    for x, y in zip(jax.tree.leaves(direct), jax.tree.leaves(merged), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)


def masked_step(tx):
    def step(wrapped, opt_state, x):
        value, grads = jpeft.value_and_grad(loss)(wrapped, x)
        updates, opt_state = tx.update(grads, opt_state, wrapped)
        return optax.apply_updates(wrapped, updates), opt_state, value

    return step


def partitioned_step(tx):
    def step(trainable, frozen, opt_state, x):
        value, grads = jax.value_and_grad(lambda t: loss(jpeft.combine(t, frozen), x))(trainable)
        updates, opt_state = tx.update(grads, opt_state, trainable)
        return optax.apply_updates(trainable, updates), frozen, opt_state, value

    return step


def lenient(tx):
    """optax's own Adam mixes dtypes; all that is ours runs under strict promotion."""

    def update(updates, state, params=None):
        with jax.numpy_dtype_promotion("standard"):
            return tx.update(updates, state, params)

    return optax.GradientTransformation(tx.init, update)


ADAMW = lenient(optax.adamw(1e-2, weight_decay=0.1))


def masked():
    return optax.masked(ADAMW, jpeft.trainable_mask)


def test_both_loops_train_the_adapter_alike_and_leave_the_base_alone():
    wrapped = wrap(modules_to_save=["head"])
    tx = masked()
    one, state = wrapped, tx.init(wrapped)
    (trainable, frozen), half_state = jpeft.partition(wrapped), ADAMW.init(jpeft.partition(wrapped)[0])
    step, half_step, losses = jax.jit(masked_step(tx)), jax.jit(partitioned_step(ADAMW)), []
    for _ in range(20):
        one, state, value = step(one, state, X)
        trainable, frozen, half_state, same = half_step(trainable, frozen, half_state, X)
        losses.append(float(value))
        np.testing.assert_allclose(float(value), float(same), rtol=1e-5)
    assert losses[-1] < 0.5 * losses[0]
    assert equal(one.base, wrapped.base)
    assert equal(one.adapters["default"].scaling, wrapped.adapters["default"].scaling)
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(jpeft.combine(trainable, frozen)), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6)
    assert not equal(one.adapters["default"].replaced, wrapped.adapters["default"].replaced)
    # Moments for the trainable leaves alone: two each, and Adam's count.
    assert len(jax.tree.leaves(state)) == 2 * len(LORA_LEAVES | HEAD_LEAVES) + 1


def test_a_second_step_does_not_compile_again():
    tx, traces = masked(), []
    wrapped = wrap()

    @jax.jit
    def step(wrapped, opt_state, x):
        traces.append(0)
        return masked_step(tx)(wrapped, opt_state, x)

    state = tx.init(wrapped)
    for _ in range(3):
        wrapped, state, _ = step(wrapped, state, X)
    assert len(traces) == 1


@pytest.mark.parametrize("dtype", FROZEN_DTYPES)
@pytest.mark.parametrize("jit", [jax.jit, lambda fn: fn], ids=["jit", "eager"])
def test_frozen_leaves_of_any_dtype_pass_through_a_step(dtype, jit):
    extra = {"table": jnp.array([[0, 1], [1, 0]]).astype(dtype)}
    wrapped, tx = wrap(params(extra=extra)), masked()
    after, _, _ = jit(masked_step(tx))(wrapped, tx.init(wrapped), X)
    assert equal(after.base, wrapped.base)


def test_frozen_numpy_leaves_and_numbers_pass_through_a_step():
    extra = {"mask": np.array([True, False]), "count": np.int32(3), "rate": 0.5, "wide": np.ones(2)}
    wrapped, tx = wrap(params(extra=extra)), masked()
    after, _, _ = masked_step(tx)(wrapped, tx.init(wrapped), X)
    for x, y in zip(jax.tree.leaves(after.base), jax.tree.leaves(wrapped.base), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize(
    ("leaf", "message"),
    [
        (lambda: jax.random.key(0), "leaf 'base.rng.key' is a PRNG key, to which no update can be added; keep it out"),
        (lambda: "gelu", "leaf 'base.rng.key' is 'gelu', to which no update can be added; keep it out"),
    ],
)
def test_leaves_that_cannot_be_added_to_are_refused(leaf, message):
    wrapped = wrap(params(rng={"key": leaf()}))
    with pytest.raises(TypeError, match=message):
        jpeft.value_and_grad(loss)(wrapped, X)
    assert equal(jpeft.combine(*jpeft.partition(wrapped)), wrapped)


def big():
    return params(
        table=jnp.ones((1024, 512), jnp.int8), scales=jnp.ones((1024, 256), jnp.bfloat16), more=jnp.ones((512, 512))
    )


def compiled(step, donated, *args):
    return jax.jit(step, donate_argnums=donated).lower(*args).compile().memory_analysis()


def test_a_step_allocates_nothing_of_a_base_leafs_size():
    """Donated base leaves are handed through, and the temporaries are those of the partitioned loop."""
    wrapped, tx = wrap(big()), masked()
    trainable, frozen = jpeft.partition(wrapped)
    whole = compiled(masked_step(tx), (0, 1), wrapped, tx.init(wrapped), X)
    halves = compiled(partitioned_step(ADAMW), (0, 1, 2), trainable, frozen, ADAMW.init(trainable), X)
    base = sum(leaf.nbytes for leaf in jax.tree.leaves(wrapped.base))
    assert base > 2_000_000
    assert whole.temp_size_in_bytes <= halves.temp_size_in_bytes + 1024
    assert whole.temp_size_in_bytes < 20_000
    assert whole.alias_size_in_bytes >= base
    assert whole.output_size_in_bytes - whole.alias_size_in_bytes < 1024


def test_donating_wrapped_parameters_with_copies_of_the_base_works():
    wrapped, tx = wrap(params(), modules_to_save=["head"], bias="all"), masked()
    step = jax.jit(masked_step(tx), donate_argnums=(0, 1))
    after, _, _ = step(wrapped, tx.init(wrapped), X)
    assert wrapped.base["head"]["kernel"].is_deleted()
    assert np.isfinite(np.asarray(after.adapters["default"].replaced["head.kernel"])).all()


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (wrap, (32, 122 + 32)),
        (lambda: wrap(modules_to_save=["head"]), (32 + 18, 122 + 32 + 18)),
        (lambda: wrap(bias="lora_only"), (32 + 8, 122 + 32)),
        (lambda: wrap(bias="all"), (32 + 10, 122 + 32)),
        (lambda: wrap(bias="all", modules_to_save=["head"]), (32 + 18 + 8, 122 + 32 + 18)),
        (lambda: wrap(inference_mode=True), (0, 122 + 32)),
        (lambda: wrap(wrap(), target="value", name="other"), (32, 122 + 32 + 24)),
        (lambda: jpeft.disable_adapters(wrap()), (0, 122 + 32)),
    ],
)
def test_counted_parameters(make, expected):
    assert jpeft.count_parameters(make()) == expected


def test_abstract_trees_are_counted_and_masked(capsys):
    abstract = jax.eval_shape(functools.partial(wrap, modules_to_save=["head"]), params())
    assert jpeft.count_parameters(abstract) == (50, 172)
    assert trained_paths(jpeft.trainable_mask(abstract)) == LORA_LEAVES | HEAD_LEAVES
    jpeft.print_trainable_parameters(abstract)
    assert capsys.readouterr().out == "trainable params: 50 || all params: 172 || trainable%: 29.0698\n"


def test_large_numbers_are_printed_with_commas(capsys):
    leaf = jax.ShapeDtypeStruct((4096, 4096), jnp.bfloat16)
    jpeft.print_trainable_parameters(jpeft.wrap({"q": {"kernel": leaf}}, LoraConfig(target_modules=["q"])))
    assert capsys.readouterr().out == "trainable params: 65,536 || all params: 16,842,752 || trainable%: 0.3891\n"
