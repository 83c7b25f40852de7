"""Cross-entropy in chunks: against the plain loss in float64, by value, gradient, memory and FLOPs."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import jpeft
from jpeft import chunked_cross_entropy

KEY = jax.random.key(5)


def data(shape=(3, 7), features=6, vocab=11, dtype=jnp.float64):
    keys = jax.random.split(KEY, 4)
    labels = jax.random.randint(keys[2], shape, 0, vocab)
    ignored = jax.random.bernoulli(keys[3], 0.3, shape)
    return {
        "hidden": jax.random.normal(keys[0], (*shape, features), dtype),
        "kernel": jax.random.normal(keys[1], (features, vocab), dtype),
        "bias": jax.random.normal(keys[3], (vocab,), dtype),
        "labels": jnp.where(ignored, -100, labels),
    }


def reference(logits, labels, weights=None, reduction="mean"):
    """The sum written out: -log softmax of each label that counts."""
    kept = labels != -100
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.where(kept, labels, 0))
    shares = kept.astype(losses.dtype) * (1 if weights is None else weights)
    total = jnp.sum(losses * shares)
    return total / shares.sum() if reduction == "mean" else total


HEADS = {
    "kernel": (lambda p: p["kernel"], lambda p, h: h @ p["kernel"]),
    "tied": (lambda p: p["kernel"].T.T, lambda p, h: h @ p["kernel"]),
    "bias, soft-capped": (
        lambda p: lambda h: 3 * jnp.tanh((h @ p["kernel"] + p["bias"]) / 3),
        lambda p, h: 3 * jnp.tanh((h @ p["kernel"] + p["bias"]) / 3),
    ),
}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("head", "shape", "size", "settings"),
    [
        ("kernel", (3, 7), 2, {}),
        ("tied", (20,), 7, {"reduction": "sum"}),
        ("bias, soft-capped", (2, 2, 5), 99, {"weights": True}),
        ("bias, soft-capped", (3, 7), 4, {"weights": True, "reduction": "sum"}),
    ],
)
def test_loss_and_gradients_are_those_of_the_whole(head, shape, size, settings):
    given, (make, scores) = data(shape), HEADS[head]
    labels = given.pop("labels")
    if "weights" in settings:
        settings = {**settings, "weights": jax.random.uniform(KEY, shape, jnp.float64)}

    def chunked(p):
        return 3 * chunked_cross_entropy(p["hidden"], make(p), labels, chunk_size=size, **settings)

    def whole(p):
        return 3 * reference(scores(p, p["hidden"]), labels, **settings)

    found, expected = (jax.jit(jax.value_and_grad(loss))(given) for loss in (chunked, whole))
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-10, atol=1e-12)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("fields", [{}, {"lora_dropout": 0.5}, {"use_dora": True}])
def test_an_adapted_head_is_trained_as_by_the_whole_loss(fields):
    """LoRA stays low-rank, in the loss and in its gradient; all else is as right, if slower."""
    given = data()
    params = {"lm_head": {"kernel": given["kernel"]}, "mix": {"kernel": jnp.eye(6, dtype=jnp.float64)}}
    config = jpeft.LoraConfig(r=2, target_modules=["lm_head", "mix"], init_lora_weights=False, **fields)
    wrapped = jpeft.wrap(params, config, rng=KEY, dtype=jnp.float64)

    def chunked(p, hidden):
        return chunked_cross_entropy(hidden @ p["mix"]["kernel"], p["lm_head"]["kernel"], given["labels"], chunk_size=3)

    def whole(p, hidden):
        return reference(hidden @ p["mix"]["kernel"] @ p["lm_head"]["kernel"], given["labels"])

    how = "transformed" if "use_dora" in fields else "low-rank"
    assert jpeft.explain(chunked, wrapped, given["hidden"]).of("lm_head") == [how]
    found, expected = (
        jax.jit(jpeft.value_and_grad(jpeft.lift(function)))(wrapped, given["hidden"]) for function in (chunked, whole)
    )
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-10, atol=1e-12)
    with_key = jpeft.with_context(wrapped, rng=KEY)
    if fields.get("lora_dropout"):
        assert np.isfinite(float(jpeft.lift(chunked)(with_key, given["hidden"])))
        assert float(jpeft.lift(chunked)(with_key, given["hidden"])) != float(found[0])


BIG = {"shape": (2, 256), "features": 16, "vocab": 4096, "dtype": jnp.float32}


def program(loss, *args):
    compiled = jax.jit(loss).lower(*args).compile()
    return compiled.memory_analysis().temp_size_in_bytes, compiled.as_text()


@pytest.mark.parametrize("trained", ["hidden", "hidden and head", "adapted head"])
def test_scores_of_all_tokens_are_never_there(trained):
    given = data(**BIG)
    labels, logits = given["labels"], 4 * 512 * 4096

    def chunked(hidden, kernel):
        return chunked_cross_entropy(hidden, kernel, labels, chunk_size=16)

    def whole(hidden, kernel):
        return reference(hidden @ kernel, labels)

    def differentiated(loss):
        if trained == "hidden":
            return jax.grad(loss), (given["hidden"], given["kernel"])
        if trained == "hidden and head":
            return jax.grad(loss, (0, 1)), (given["hidden"], given["kernel"])
        config = jpeft.LoraConfig(r=2, target_modules=["head"])
        wrapped = jpeft.wrap({"head": {"kernel": given["kernel"]}}, config)
        lifted = jpeft.lift(lambda p, hidden: loss(hidden, p["head"]["kernel"]))
        return jpeft.grad(lifted), (wrapped, given["hidden"])

    temporaries, _ = program(differentiated(chunked)[0], *differentiated(chunked)[1])
    before, _ = program(differentiated(whole)[0], *differentiated(whole)[1])
    assert before > logits
    assert temporaries < logits / 4


def test_a_head_that_does_not_train_gets_no_gradient_made():
    given = data(**BIG)

    def chunked(hidden, kernel):
        return chunked_cross_entropy(hidden, kernel, given["labels"], chunk_size=256)

    def products(function):
        jaxpr = jax.make_jaxpr(function)(given["hidden"], given["kernel"])
        return str(jaxpr).count("dot_general")

    assert products(jax.grad(chunked)) == 2
    assert products(jax.grad(chunked, (0, 1))) == 3


@pytest.mark.parametrize("axes", [AxisType.Auto, AxisType.Explicit])
def test_batches_stay_where_they_lie(axes):
    given = data((8, 8), dtype=jnp.float32)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(axes,))
    at = NamedSharding(mesh, P("data"))

    def chunked(hidden, kernel, labels):
        return chunked_cross_entropy(hidden, kernel, labels, chunk_size=3)

    expected = jax.jit(jax.value_and_grad(chunked))(given["hidden"], given["kernel"], given["labels"])
    with jax.set_mesh(mesh):
        kernel = jax.device_put(given["kernel"], NamedSharding(mesh, P()))
        args = (jax.device_put(given["hidden"], at), kernel, jax.device_put(given["labels"], at))
        compiled = jax.jit(jax.value_and_grad(chunked)).lower(*args).compile()
        found = compiled(*args)
    assert not any(kind in compiled.as_text() for kind in ("all-gather", "all-to-all", "collective-permute"))
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


def test_what_is_no_label_gives_nan_and_what_counts_nothing_too():
    given = data(dtype=jnp.float32)
    hidden, kernel = given["hidden"], given["kernel"]
    loss = jax.jit(chunked_cross_entropy, static_argnames=("ignore_index", "reduction"))
    assert np.isnan(loss(hidden, kernel, jnp.full((3, 7), 11)))
    assert np.isnan(loss(hidden, kernel, jnp.full((3, 7), -100)))
    assert float(loss(hidden, kernel, jnp.full((3, 7), 4), ignore_index=4, reduction="sum")) == 0
    low = loss(hidden.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16), given["labels"])
    assert low.dtype == jnp.float32


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden": jnp.ones(3)}, r"hidden is float32 \(3,\); expected floating-point \(..., length, features\)"),
        ({"labels": jnp.ones((3, 6), int)}, r"labels are int32 \(3, 6\); expected whole numbers \(3, 7\) for hidden"),
        (
            {"head": jnp.ones((11, 6))},
            r"head is an array \(11, 6\); expected a kernel \(6, vocab\), of a tied embedding",
        ),
        ({"weights": jnp.ones(3)}, r"weights have the shape \(3,\); expected \(3, 7\), one for each label"),
        ({"chunk_size": 0}, "chunk_size is 0; expected a whole number of positions, at least 1"),
        ({"reduction": "none"}, "reduction is 'none'; expected 'mean' or 'sum'"),
    ],
)
def test_bad_input_is_refused(changes, message):
    given = data(dtype=jnp.float32)
    settings = {"hidden": given["hidden"], "head": given["kernel"], "labels": given["labels"], **changes}
    with pytest.raises(ValueError, match=message):
        chunked_cross_entropy(settings.pop("hidden"), settings.pop("head"), settings.pop("labels"), **settings)
