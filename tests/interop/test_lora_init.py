"""LoRA's initial values: the same shapes and distributions as PEFT's, module kind by module kind."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

import jpeft  # noqa: E402

R = 16
MODULES = {
    "linear": (lambda: torch.nn.Linear(320, 256), {"kernel": (320, 256)}),
    "embedding": (lambda: torch.nn.Embedding(320, 256), {"embedding": (320, 256)}),
    "conv": (lambda: torch.nn.Conv2d(64, 256, (3, 2)), {"kernel": (3, 2, 64, 256)}),
}


def theirs(kind, how):
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({"layer": MODULES[kind][0]()})
    peft.inject_adapter_in_model(peft.LoraConfig(r=R, target_modules=["layer"], init_lora_weights=how), model)
    named = {name: value.detach().numpy() for name, value in model.named_parameters() if "lora_" in name}
    return {name.split(".")[1]: value for name, value in named.items()}


def ours(kind, how, seed=0):
    tree = {"layer": {name: jnp.zeros(shape) for name, shape in MODULES[kind][1].items()}}
    config = jpeft.LoraConfig(r=R, target_modules=["layer"], init_lora_weights=how)
    return jpeft.wrap(tree, config, rng=jax.random.key(seed)).adapters["default"].weights["layer"]


def moments(x):
    """Mean, standard deviation, kurtosis (1.8 for a uniform, 3 for a normal distribution) and largest value."""
    x = np.asarray(x, np.float64).ravel()
    spread = x.std()
    return x.mean(), spread, np.mean((x - x.mean()) ** 4) / max(spread, 1e-30) ** 4, np.abs(x).max()


@pytest.mark.parametrize("how", [True, False, "gaussian"])
@pytest.mark.parametrize("kind", MODULES)
def test_initial_values_have_pefts_distribution(kind, how):
    expected, got = theirs(kind, how), ours(kind, how)
    assert {name: x.shape for name, x in got.items()} == {name: x.shape for name, x in expected.items()}
    for name, reference in expected.items():
        mean, spread, kurtosis, largest = moments(reference)
        our_mean, our_spread, our_kurtosis, our_largest = moments(got[name])
        if spread == 0:
            assert our_largest == 0, name
            continue
        error = spread / np.sqrt(reference.size)
        assert abs(our_mean) < 5 * error and abs(mean) < 5 * error, name
        assert our_spread == pytest.approx(spread, rel=0.05), name
        assert our_kurtosis == pytest.approx(kurtosis, rel=0.15), name
        # Uniform values stop at their bound; normal ones have no bound to compare.
        if kurtosis < 2:
            assert our_largest == pytest.approx(largest, rel=0.01), name


@pytest.mark.parametrize(("kind", "how"), [("linear", True), ("conv", True), ("linear", False), ("conv", False)])
def test_uniform_values_stay_within_kaimings_bound(kind, how):
    for name, x in ours(kind, how).items():
        bound = 1 / np.sqrt(np.prod(x.shape[1:]))
        largest = float(jnp.abs(x).max())
        zero = how is True and name == "lora_B"
        assert largest == 0 if zero else 0.99 * bound < largest <= bound


def test_orthogonal_halves_have_pefts_distribution_and_cancel():
    expected, got = theirs("linear", "orthogonal"), ours("linear", "orthogonal")
    for name, reference in expected.items():
        assert got[name].shape == reference.shape
        spread = moments(reference)[1]
        assert moments(got[name])[1] == pytest.approx(spread, rel=0.05)
        assert np.linalg.matrix_rank(reference) == np.linalg.matrix_rank(np.asarray(got[name])) == R // 2
    for a, b in [(expected["lora_A"], expected["lora_B"]), (got["lora_A"], got["lora_B"])]:
        np.testing.assert_allclose(np.asarray(b) @ np.asarray(a), 0, atol=1e-6)


def test_orthogonal_initialisation_of_a_lookup_table_is_pefts_default():
    for name, x in ours("embedding", "orthogonal").items():
        np.testing.assert_array_equal(x, ours("embedding", True)[name])


@pytest.mark.parametrize("kind", MODULES)
def test_another_seed_gives_other_values_of_the_same_spread(kind):
    first, second = ours(kind, False), ours(kind, False, seed=1)
    for name, x in first.items():
        assert float(jnp.abs(x - second[name]).max()) > 0
        assert moments(x)[1] == pytest.approx(moments(second[name])[1], rel=0.05)
