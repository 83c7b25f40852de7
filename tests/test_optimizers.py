"""LoRA's optimizers in an ordinary loop, on layers of every kind; against PEFT they are tested in interop."""

import dataclasses
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jpeft
from tests.stacked_trees import randomised

TREE = {
    "table": {"embedding": jnp.ones((7, 4))},
    "conv": {"kernel": jnp.ones((3, 4, 4))},
    "q": {"kernel": jnp.ones((4, 5)), "bias": jnp.ones(5)},
    "head": {"kernel": jnp.ones((5, 3)), "bias": jnp.ones(3)},
}
LAYOUTS = {"conv.kernel": ".io"}
SETTINGS = {"r": 2, "target_modules": ["table", "conv", "q"], "modules_to_save": ["head"]}
IDS = jnp.array([[0, 3, 5, 1], [2, 2, 6, 4]])
MAKERS = {
    "loraplus": lambda **kw: jpeft.create_loraplus_optimizer(optax.sgd, loraplus_lr_ratio=3.0, **kw),
    "lorafa": lambda **kw: jpeft.create_lorafa_optimizer(**kw),
    "riemannian": lambda **kw: jpeft.create_riemannian_optimizer(optax.sgd, reg=0.5, **kw),
}


def wrapped_with(**settings):
    return randomised(jpeft.wrap(TREE, jpeft.LoraConfig(**{**SETTINGS, **settings}), layouts=LAYOUTS))


def forward(params, ids):
    x = params["table"]["embedding"][ids]
    x = jax.lax.conv_general_dilated(x, params["conv"]["kernel"], (1,), "SAME", dimension_numbers=("NHC", "HIO", "NHC"))
    x = jnp.tanh(0.05 * (x @ params["q"]["kernel"] + params["q"]["bias"]))
    return x @ params["head"]["kernel"] + params["head"]["bias"]


def loss_fn(wrapped, ids):
    return (jpeft.lift(forward)(wrapped, ids) ** 2).mean()


@pytest.mark.parametrize("maker", MAKERS)
def test_the_loop_of_the_readme(maker):
    wrapped, tx = wrapped_with(), MAKERS[maker](lr=optax.linear_schedule(1e-2, 1e-3, 20))
    traced = []

    @jax.jit
    def step(wrapped, state):
        traced.append(1)
        loss, grads = jpeft.value_and_grad(loss_fn)(wrapped, IDS)
        updates, state = tx.update(grads, state, wrapped)
        return optax.apply_updates(wrapped, updates), state, loss

    params, state, losses = wrapped, tx.init(wrapped), []
    for _ in range(20):
        params, state, loss = step(params, state)
        losses.append(float(loss))
    assert len(traced) == 1
    assert losses[-1] < 0.9 * losses[0]
    same = jax.tree.map(lambda a, b: bool((a == b).all()), params, wrapped)
    assert all(jax.tree.leaves(same.base)) and all(same.adapters["default"].scaling.values())
    moved = {(p, n) for p, own in same.adapters["default"].weights.items() for n, kept in own.items() if not kept}
    pairs = {(p, f"lora_{x}") for p in ("conv", "q") for x in "AB"} | {("table", f"lora_embedding_{x}") for x in "AB"}
    assert moved == (pairs - {("conv", "lora_A"), ("q", "lora_A")} if maker == "lorafa" else pairs)
    assert not any(same.adapters["default"].replaced.values())


@pytest.mark.parametrize("maker", MAKERS)
def test_the_state_is_of_what_trains(maker):
    """Nothing of the base's size is kept, and for LoRA-FA nothing of A's."""
    wrapped = wrapped_with()
    wide = dict(lr=0.1, **({} if maker == "lorafa" else {"momentum": 0.9}))
    state = MAKERS[maker](**wide).init(wrapped)
    adapter = wrapped.adapters["default"]
    size = sum(leaf.size for leaf in jax.tree.leaves((adapter.weights, adapter.replaced)))
    if maker == "lorafa":
        size = 2 * (size - adapter.weights["q"]["lora_A"].size - adapter.weights["conv"]["lora_A"].size)
    kept = sum(leaf.size for leaf in jax.tree.leaves(state) if leaf.ndim)
    assert kept == size


def one_update(tx, wrapped, grads):
    return tx.update(grads, tx.init(wrapped), wrapped)[0].adapters["default"]


def test_a_convolution_is_projected_like_a_linear_layer_of_its_window():
    conv = wrapped_with(target_modules=["conv"])
    arrays = conv.adapters["default"].weights["conv"]
    tree = {**TREE, "conv": {"kernel": jnp.ones((12, 4))}}
    linear = jpeft.wrap(tree, dataclasses.replace(conv.adapters["default"].config))
    flat = {"lora_A": arrays["lora_A"].reshape(2, -1), "lora_B": arrays["lora_B"].reshape(4, 2)}
    own = dataclasses.replace(linear.adapters["default"], weights={"conv": flat})
    linear = dataclasses.replace(linear, adapters={"default": own})
    tx = jpeft.create_lorafa_optimizer(lr=0.1, eps=1.0)
    got, want = (one_update(tx, each, jax.tree.map(jnp.ones_like, each)).weights["conv"] for each in (conv, linear))
    np.testing.assert_allclose(got["lora_B"].reshape(4, 2), want["lora_B"], rtol=1e-5)
    assert got["lora_B"].any() and not got["lora_A"].any()


def test_lorafa_follows_the_gradient_that_fits_the_full_one_best():
    """g = argmin |s g A - G| over B's gradients, given B's own, s G A^T."""
    rng = np.random.default_rng(0)
    wrapped = wrapped_with(target_modules=["q"], lora_alpha=5)
    a = np.asarray(wrapped.adapters["default"].weights["q"]["lora_A"], np.float64)
    full, s = rng.normal(size=(5, 4)), 2.5
    best = np.linalg.lstsq(s * a.T, full.T, rcond=None)[0].T
    grads = jax.tree.map(jnp.zeros_like, wrapped)
    grads.adapters["default"].weights["q"]["lora_B"] = jnp.asarray(s * full @ a.T, jnp.float32)
    # One step of Adam with a large eps is a step of gradient descent.
    updates = one_update(jpeft.create_lorafa_optimizer(lr=1e4, eps=1e4, correct_bias=False), wrapped, grads)
    np.testing.assert_allclose(updates.weights["q"]["lora_B"], -0.1 * best, rtol=1e-3, atol=1e-4)


def test_only_linear_pairs_are_preconditioned():
    wrapped, grads = wrapped_with(), jax.tree.map(jnp.ones_like, wrapped_with())
    got = one_update(jpeft.create_riemannian_optimizer(optax.sgd, lr=1.0, reg=0.5), wrapped, grads)
    p = {name: np.asarray(array, np.float64) for name, array in wrapped.adapters["default"].weights["q"].items()}
    left = np.linalg.inv(p["lora_B"].T @ p["lora_B"] + 0.5 * np.eye(2))
    right = np.linalg.inv(p["lora_A"] @ p["lora_A"].T + 0.5 * np.eye(2))
    np.testing.assert_allclose(got.weights["q"]["lora_A"], -left @ np.ones((2, 4)), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(got.weights["q"]["lora_B"], -np.ones((5, 2)) @ right, rtol=1e-4, atol=1e-5)
    rest = [leaf for path in ("table", "conv") for leaf in got.weights[path].values()]
    assert all((leaf == -1).all() for leaf in [*rest, *got.replaced.values()])


@pytest.mark.parametrize("maker", MAKERS)
def test_inactive_adapters_stay_and_half_precision_is_kept(maker):
    config = jpeft.LoraConfig(r=2, target_modules=["q"])
    wrapped = jpeft.wrap(TREE, config, dtype=jnp.bfloat16)
    wrapped = randomised(jpeft.wrap(wrapped, config, adapter_name="other"))
    loss = lambda wrapped: jpeft.merge(wrapped)["q"]["kernel"].sum()  # noqa: E731
    tx = MAKERS[maker](lr=0.1)
    updates, _ = tx.update(jpeft.grad(loss)(wrapped), tx.init(wrapped), wrapped)
    after = optax.apply_updates(wrapped, updates)
    assert {str(leaf.dtype) for leaf in after.adapters["default"].weights["q"].values()} == {"bfloat16"}
    for name, changed in (("default", True), ("other", False)):
        before, now = (each.adapters[name].weights["q"]["lora_B"] for each in (wrapped, after))
        assert bool((before != now).any()) == changed


LORAPLUS, FA, RIEMANNIAN = (
    jpeft.create_loraplus_optimizer,
    jpeft.create_lorafa_optimizer,
    jpeft.create_riemannian_optimizer,
)
ERRORS = {
    "ratio": (
        lambda: LORAPLUS(optax.sgd, lr=1.0, loraplus_lr_ratio=0.5),
        "loraplus_lr_ratio is 0.5; expected a number",
    ),
    "decay": (
        lambda: LORAPLUS(optax.sgd, lr=1.0, loraplus_lr_ratio=2.0, loraplus_weight_decay=0.1),
        "loraplus_weight_decay is 0.1, but optimizer_cls=.*sgd.* has no argument weight_decay",
    ),
    "b2": (lambda: FA(lr=1.0, b2=1.0), r"b2 is 1.0; expected a number in \[0, 1\)"),
    "eps": (lambda: FA(lr=1.0, eps=-1.0), "eps is -1.0; expected a number of at least 0"),
    "reg": (lambda: RIEMANNIAN(optax.sgd, lr=1.0, reg=-1.0), "reg is -1.0; expected a number of at least 0"),
    "no pair": (
        lambda: RIEMANNIAN(optax.sgd, lr=1.0).init(wrapped_with(target_modules=["conv"])),
        "no pair of LoRA's factors of a linear layer trains",
    ),
    "no parameters": (
        lambda: FA(lr=1.0).update(wrapped_with(), FA(lr=1.0).init(wrapped_with())),
        r"update got no parameters; expected tx.update\(grads, state, params\)",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case):
    call, message = ERRORS[case]
    with pytest.raises(ValueError, match=message):
        call()


def test_defaults_are_pefts():
    defaults = {
        name: p.default for f in (LORAPLUS, FA, RIEMANNIAN) for name, p in inspect.signature(f).parameters.items()
    }
    assert defaults["loraplus_lr_embedding"] == 1e-6 and defaults["reg"] == 1e-2
    assert (defaults["b1"], defaults["b2"], defaults["eps"], defaults["correct_bias"]) == (0.9, 0.999, 1e-6, True)
