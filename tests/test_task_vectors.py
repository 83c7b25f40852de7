"""Task vectors: laws on arrays and trees, against plain numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft

RNG = np.random.default_rng(0)
TREES = [{"a": RNG.normal(size=(3, 4)), "b": [RNG.normal(size=5)]} for _ in range(3)]
WEIGHTS = np.array([0.5, -1.5, 2.0])
KEY = jax.random.key(0)


@pytest.fixture(autouse=True)
def _float64(x64):
    pass


def arrays():
    return jax.tree.map(jnp.asarray, TREES)


def kept_by_magnitude(x, density):
    order = np.argsort(-np.abs(x).ravel())[: int(density * x.size)]
    mask = np.zeros(x.size, bool)
    mask[order] = True
    return np.where(mask.reshape(x.shape), x, 0.0)


def elected(tensors, weights, sign):
    tensors, found = np.stack(tensors), np.zeros(tensors[0].shape)
    for index in np.ndindex(*found.shape):
        own = tensors[(slice(None), *index)]
        vote = own.sum() if sign == "total" else np.sign(own).sum()
        agreeing = [w * x for w, x in zip(weights, own, strict=True) if np.sign(x) == (1 if vote >= 0 else -1)]
        found[index] = np.mean(agreeing) if agreeing else 0.0
    return found


def weighted_sum(tensors, weights):
    return np.tensordot(weights, np.stack(tensors), axes=1)


RULES = {
    "task_arithmetic": (lambda ts, w: jpeft.task_arithmetic(ts, w), lambda ts: weighted_sum(ts, WEIGHTS)),
    "magnitude_prune": (
        lambda ts, w: jpeft.magnitude_prune(ts, w, 0.5),
        lambda ts: weighted_sum([kept_by_magnitude(t, 0.5) for t in ts], WEIGHTS),
    ),
    "ties, total": (
        lambda ts, w: jpeft.ties(ts, w, 0.7),
        lambda ts: elected([kept_by_magnitude(t, 0.7) for t in ts], WEIGHTS, "total"),
    ),
    "ties, frequency": (
        lambda ts, w: jpeft.ties(ts, w, 0.7, "frequency"),
        lambda ts: elected([kept_by_magnitude(t, 0.7) for t in ts], WEIGHTS, "frequency"),
    ),
    "dare_linear, all kept": (
        lambda ts, w: jpeft.dare_linear(ts, w, 1.0, rng=KEY),
        lambda ts: weighted_sum(ts, WEIGHTS),
    ),
    "dare_ties, all kept": (
        lambda ts, w: jpeft.dare_ties(ts, w, 1.0, rng=KEY),
        lambda ts: elected(ts, WEIGHTS, "total"),
    ),
}


@pytest.mark.parametrize("rule", RULES)
def test_rules_are_the_formulas_leaf_by_leaf(rule):
    ours, formula = RULES[rule]
    got = jax.jit(ours)(arrays(), jnp.asarray(WEIGHTS))
    want = jax.tree.map(lambda *leaves: formula(list(leaves)), *TREES)
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-12, atol=1e-12), got, want)


@pytest.mark.parametrize("rule", ["task_arithmetic", "magnitude_prune", "ties, total"])
def test_rules_are_differentiable(rule):
    """By weights and by arrays, against finite differences."""
    ours, _ = RULES[rule]

    def total(trees, weights):
        return sum(jnp.sin(leaf).sum() for leaf in jax.tree.leaves(ours(trees, weights)))

    given = (arrays(), jnp.asarray(WEIGHTS))
    direction = jax.tree.map(lambda leaf: jnp.cos(jnp.arange(leaf.size, dtype=float)).reshape(leaf.shape), given)
    _, got = jax.jvp(total, given, direction)
    moved = [total(*jax.tree.map(lambda x, d, s=s: x + s * 1e-6 * d, given, direction)) for s in (1, -1)]
    assert float(got) == pytest.approx(float(moved[0] - moved[1]) / 2e-6, rel=1e-6)
    gradient = jax.grad(total, argnums=(0, 1))(*given)
    parts = jax.tree.map(lambda g, d: float((g * d).sum()), gradient, direction)
    assert sum(jax.tree.leaves(parts)) == pytest.approx(float(got), rel=1e-9)


@pytest.mark.parametrize("density", [0.0, 0.01, 0.34, 0.5, 1.0])
def test_magnitude_pruning_keeps_exactly_its_part(density):
    for x in (RNG.normal(size=(4, 5)), np.ones((4, 5))):
        kept = np.asarray(jpeft.prune(jnp.asarray(x), density))
        assert (kept != 0).sum() == int(density * x.size)
        assert set(kept.ravel()) <= {0.0, *x.ravel()}
        if kept.any() and density < 1:
            assert np.abs(kept[kept != 0]).min() >= np.abs(x[kept == 0]).max()


def test_random_pruning_keeps_its_part_on_average_and_the_mean_if_rescaled():
    x, density = jnp.full((200, 200), 2.0), 0.3
    dropped = jpeft.prune(x, density, "random", rng=KEY)
    assert set(np.unique(dropped)) == {0.0, 2.0}
    assert float((dropped != 0).mean()) == pytest.approx(density, abs=0.01)
    rescaled = jpeft.prune(x, density, "random", rescale=True, rng=KEY)
    np.testing.assert_allclose(rescaled, dropped / density)
    assert float(rescaled.mean()) == pytest.approx(2.0, rel=0.03)
    assert not jpeft.prune(x, 0.0, "random", rescale=True, rng=KEY).any()


def test_random_pruning_draws_for_each_leaf_and_each_task():
    pruned = jpeft.prune({"a": jnp.ones(100), "b": jnp.ones(100)}, 0.5, "random", rng=KEY)
    assert (pruned["a"] != pruned["b"]).any()
    merged = jpeft.dare_linear([jnp.ones(100), -jnp.ones(100)], [1.0, 1.0], 0.5, rng=KEY)
    assert set(np.unique(merged)) == {-2.0, 0.0, 2.0}


def test_the_majority_and_its_mean():
    x = jnp.array([[3.0, 1.0, 0.0, -1.0], [-1.0, -1.0, 0.0, -2.0], [-1.0, 0.0, 0.0, 5.0]])
    total, frequency = (jpeft.calculate_majority_sign_mask(x, method) for method in ("total", "frequency"))
    assert total.T.tolist() == [[1, 0, 0], [1, 0, 0], [0, 0, 0], [0, 0, 1]]
    assert frequency.T.tolist() == [[0, 1, 1], [1, 0, 0], [0, 0, 0], [1, 1, 0]]
    assert jpeft.disjoint_merge(x, frequency).tolist() == [-1.0, 1.0, 0.0, -1.5]


X = jnp.ones(3)
ERRORS = {
    "density above": (lambda: jpeft.prune(X, 1.5), r"density is 1.5; expected the part of the entries"),
    "density below": (lambda: jpeft.ties([X], [1.0], -0.1), r"density is -0.1"),
    "method": (lambda: jpeft.prune(X, 0.5, "smallest"), r"method is 'smallest'; expected one of 'magnitude', 'random'"),
    "key": (lambda: jpeft.prune(X, 0.5, "random"), r"method is 'random' and rng is None"),
    "sign": (lambda: jpeft.ties([X], [1.0], 0.5, "mode"), r"majority_sign_method is 'mode'; expected one of 'total'"),
    "none": (lambda: jpeft.task_arithmetic([], []), r"task_tensors is empty; expected at least one"),
    "weights": (lambda: jpeft.task_arithmetic([X, X], [1.0]), r"weights have shape \(1,\); expected \(2,\), a number"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case):
    call, message = ERRORS[case]
    with pytest.raises(ValueError, match=message):
        call()
