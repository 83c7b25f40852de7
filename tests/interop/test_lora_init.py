"""LoRA's initial values: the same shapes and distributions as PEFT's, module kind by module kind."""

import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

import jpeft  # noqa: E402
from jpeft_interop import load_pretrained, save_pretrained  # noqa: E402

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


# ---- initialisations of the weight and of data, against PEFT's -------------------------------------------------------

SIZES = {"first": (12, 10), "second": (10, 12), "third": (12, 9)}


class Chain(torch.nn.Module):
    """Linear layers with a tanh between; the tokens of `input_ids` are looked up in a fixed table."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        for name, (inputs, outputs) in SIZES.items():
            setattr(self, name, torch.nn.Linear(inputs, outputs))
        self.register_buffer("table", torch.randn(30, 12) * torch.linspace(0.3, 2, 12))

    def forward(self, input_ids, **others):
        x = self.table[input_ids]
        for name in SIZES:
            x = torch.tanh(getattr(self, name)(x))
        return x


def chain():
    """(the PyTorch model, its parameters here, the function of them)."""
    model = Chain().eval()
    table = jnp.asarray(model.table.numpy())
    params = {
        name: {
            "kernel": jnp.asarray(getattr(model, name).weight.detach().numpy().T),
            "bias": jnp.asarray(getattr(model, name).bias.detach().numpy()),
        }
        for name in SIZES
    }

    def apply(params, ids):
        x = table[ids]
        for name in SIZES:
            x = jnp.tanh(x @ params[name]["kernel"] + params[name]["bias"])
        return x

    return model, params, apply


IDS = np.random.default_rng(1).integers(0, 30, (4, 7))
TARGETS = sorted(SIZES)


def moved(model, seed=3):
    """Train, as it were: the adapter's weights go elsewhere."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


def output(model, ids=IDS):
    with torch.no_grad():
        return model(input_ids=torch.tensor(ids)).numpy()


def assert_close(got, want, tolerance=1e-4):
    assert np.abs(np.asarray(got) - want).max() <= tolerance * np.abs(want).max()


SETTINGS = {
    "pissa": {"init_lora_weights": "pissa"},
    "pissa, scaled": {"init_lora_weights": "pissa", "r": 3, "lora_alpha": 7},
    "pissa, patterns": {"init_lora_weights": "pissa", "rank_pattern": {"first": 5}, "alpha_pattern": {"third": 3}},
    "pissa, rslora": {"init_lora_weights": "pissa", "use_rslora": True, "lora_alpha": 2},
    "olora": {"init_lora_weights": "olora"},
    "olora, scaled": {"init_lora_weights": "olora", "r": 3, "lora_alpha": 7},
}
of_the_weight = pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)


def both(settings, folder):
    """PEFT's model with an adapter, and the folders of its initial and of its trained values."""
    torch_model, params, apply = chain()
    model = peft.get_peft_model(torch_model, peft.LoraConfig(**{"r": 4, "target_modules": TARGETS, **settings})).eval()
    config = dataclasses.replace(model.peft_config["default"])
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(str(folder / "initial"))
    model.peft_config["default"] = config
    moved(model).save_pretrained(str(folder / "trained"))
    return model, params, apply


@of_the_weight
def test_what_pefts_adapters_took_out_of_the_weight_is_taken_out_here(settings, tmp_path):
    model, params, apply = both(settings, tmp_path)
    wrapped = load_pretrained(params, tmp_path / "trained", is_trainable=True)
    assert_close(jpeft.lift(apply)(wrapped, IDS), output(model), 1e-5)
    assert_close(apply(jpeft.merge(wrapped), IDS), output(model), 1e-5)
    save_pretrained(wrapped, tmp_path / "ours")
    theirs, ours = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("trained", "ours"))
    assert theirs.keys() == ours.keys()
    assert all(theirs[key].tobytes() == ours[key].tobytes() for key in theirs)
    again = peft.PeftModel.from_pretrained(chain()[0], str(tmp_path / "ours"))
    assert_close(output(again), output(model), 1e-5)


@pytest.mark.filterwarnings("ignore:(PiSSA|OLoRA) changes the base weights")
@of_the_weight
def test_the_conversion_is_pefts(settings, tmp_path):
    model, params, _ = both(settings, tmp_path)
    wrapped = load_pretrained(params, tmp_path / "trained")
    patterned = "rank_pattern" in settings
    save_pretrained(wrapped, tmp_path / "ours", path_initial_model_for_weight_conversion=True)
    save_pretrained(wrapped, tmp_path / "by folder", path_initial_model_for_weight_conversion=tmp_path / "initial")
    model.save_pretrained(str(tmp_path / "theirs"), path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    of = lambda name: load_file(tmp_path / name / "adapter_model.safetensors")  # noqa: E731
    assert of("theirs").keys() == of("ours").keys() == of("by folder").keys()
    for key, tensor in of("theirs").items():
        assert of("by folder")[key].tobytes() == tensor.tobytes()
        assert of("ours")[key].shape == tensor.shape
    configs = [json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("theirs", "ours")]
    if patterned:
        # PEFT doubles the patterns' values in a config that still has the others; so is it here.
        assert configs[1]["rank_pattern"] == {"first": 10} and configs[1]["alpha_pattern"] == {"third": 6}
    for name in ("r", "lora_alpha", "init_lora_weights", "rank_pattern", "alpha_pattern", "use_rslora"):
        assert configs[0][name] == configs[1][name]
    for name in ("ours", "by folder"):
        plain = peft.PeftModel.from_pretrained(chain()[0], str(tmp_path / name))
        assert_close(output(plain), output(model), 1e-5)


@pytest.mark.filterwarnings("ignore:Using Rank-Stabilized LoRA with rank_pattern")
def test_conversion_with_rslora_and_patterns_which_peft_refuses(tmp_path):
    settings = {**SETTINGS["pissa, patterns"], "use_rslora": True}
    model, params, _ = both(settings, tmp_path)
    wrapped = load_pretrained(params, tmp_path / "trained")
    save_pretrained(wrapped, tmp_path / "ours", path_initial_model_for_weight_conversion=True)
    plain = peft.PeftModel.from_pretrained(chain()[0], str(tmp_path / "ours"))
    assert_close(output(plain), output(model), 1e-5)


# ---- of data --------------------------------------------------------------------------------------------------------


def batches(count=3):
    random = np.random.default_rng(8)
    found = []
    for _ in range(count):
        mask, labels = np.ones((6, 8), np.int64), random.integers(0, 30, (6, 8))
        mask[1, 6:], labels[:, :1] = 0, -100
        found.append({"input_ids": random.integers(0, 30, (6, 8)), "attention_mask": mask, "labels": labels})
    return found


def of_batch(apply):
    return lambda params, batch: apply(params, batch["input_ids"])


EVA = {
    "no redistribution": {"rho": 1.0},
    "redistribution": {"rho": 2.0},
    "scaling kept": {"rho": 1.5, "adjust_scaling_factors": False},
    "whitened, all labels": {"rho": 2.0, "whiten": True, "use_label_mask": False},
    "strict": {"rho": 2.0, "tau": 0.9999},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("eva", EVA.values(), ids=EVA)
def test_eva_is_pefts(eva, tmp_path):
    torch_model, params, apply = chain()
    settings = {"r": 4, "lora_alpha": 6, "target_modules": TARGETS, "init_lora_weights": "eva"}
    model = peft.get_peft_model(torch_model, peft.LoraConfig(**settings, eva_config=peft.EvaConfig(**eva)))
    data = [{name: torch.tensor(array) for name, array in batch.items()} for batch in batches()]
    peft.initialize_lora_eva_weights(model, data, show_progress_bar=False)
    model.save_pretrained(str(tmp_path / "theirs"))
    wrapped = jpeft.wrap(params, jpeft.LoraConfig(**settings, eva_config=eva))
    wrapped = jpeft.initialize_lora_eva_weights(wrapped, of_batch(apply), batches())
    save_pretrained(wrapped, tmp_path / "ours")
    theirs, ours = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("theirs", "ours"))
    assert theirs.keys() == ours.keys()
    for key, tensor in theirs.items():
        assert ours[key].shape == tensor.shape, key
        np.testing.assert_allclose(np.abs(ours[key]), np.abs(tensor), atol=2e-3 * max(np.abs(tensor).max(), 1))
    theirs, ours = (json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("theirs", "ours"))
    assert ours["eva_config"] == theirs["eva_config"] and ours["init_lora_weights"] == "eva"
    assert ours["rank_pattern"] == theirs["rank_pattern"]
    assert ours["alpha_pattern"] == pytest.approx(theirs["alpha_pattern"])
    assert sorted(ours["target_modules"]) == sorted(theirs["target_modules"])
    if eva["rho"] > 1:
        assert ours["rank_pattern"], "the ranks stay where they are: the test proves nothing"
    loaded = load_pretrained(params, tmp_path / "theirs")
    assert loaded.adapters["default"].config.eva_config == jpeft.EvaConfig(**eva)


@pytest.mark.parametrize("method", ["ipm", "kpm"])
def test_corda_is_pefts(method, tmp_path, monkeypatch):
    # PEFT takes `dataclass` from a package that it does not depend on.
    monkeypatch.setitem(sys.modules, "attr", dataclasses)
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import preprocess_corda

    torch_model, params, apply = chain()
    settings = {"r": 3, "lora_alpha": 5, "target_modules": TARGETS, "init_lora_weights": "corda"}
    config = peft.LoraConfig(**settings, corda_config=CordaConfig(corda_method=method))
    rows = np.random.default_rng(8).integers(0, 30, (6, 1, 40))

    def run_model():
        for ids in rows:
            torch_model(input_ids=torch.tensor(ids))

    preprocess_corda(torch_model, config, run_model=run_model)
    model = peft.get_peft_model(torch_model, config)
    wrapped = jpeft.wrap(params, jpeft.LoraConfig(**settings, corda_config={"corda_method": method}))
    covariances = jpeft.corda_covariances(wrapped, apply, rows)
    wrapped = jpeft.initialize_lora_corda_weights(wrapped, covariances)
    assert_close(jpeft.lift(apply)(wrapped, IDS), output(Chain()), 1e-6)
    arrays = wrapped.adapters["default"].weights
    for name in TARGETS:
        layer = getattr(model.base_model.model, name)
        a, b = (getattr(layer, side)["default"].weight.detach().numpy() for side in ("lora_A", "lora_B"))
        assert_close(np.asarray(arrays[name]["lora_B"]) @ np.asarray(arrays[name]["lora_A"]), b @ a, 2e-3)
        assert_close(np.abs(arrays[name]["lora_A"]), np.abs(a), 2e-3)
    save_pretrained(change(wrapped), tmp_path)
    plain = peft.PeftModel.from_pretrained(Chain().eval(), str(tmp_path))
    assert_close(output(plain), np.asarray(jpeft.lift(apply)(change(wrapped), IDS)), 1e-5)


def change(wrapped):
    """Another adapter: as if it had trained."""
    mask = jpeft.trainable_mask(wrapped)
    return jax.tree.map(lambda leaf, trains: leaf + 0.2 * jnp.cos(leaf) if trains else leaf, wrapped, mask)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("scale", ["stable", "weight_svd", "gd_scale", "unit"])
@pytest.mark.parametrize("direction", ["ArBr", "A2rBr", "ArB2r"])
def test_lora_ga_is_pefts(direction, scale, tmp_path):
    from peft.tuners.lora.config import LoraGAConfig
    from peft.tuners.lora.loraga import preprocess_loraga

    torch_model, params, apply = chain()
    settings = {"r": 3, "lora_alpha": 5, "target_modules": TARGETS, "init_lora_weights": "lora_ga"}
    ga = {"direction": direction, "scale": scale}
    config = peft.LoraConfig(**settings, lora_ga_config=LoraGAConfig(**ga))

    def train_step():
        for batch in batches():
            (torch_model(input_ids=torch.tensor(batch["input_ids"])) ** 2).mean().backward()

    torch.manual_seed(0)
    preprocess_loraga(torch_model, config, train_step)
    model = peft.get_peft_model(torch_model, config)
    wrapped = jpeft.wrap(params, jpeft.LoraConfig(**settings, lora_ga_config=ga))
    gradients = jpeft.lora_ga_gradients(wrapped, lambda p, b: (apply(p, b["input_ids"]) ** 2).mean(), batches())
    wrapped = jpeft.initialize_lora_ga_weights(wrapped, gradients)
    assert_close(jpeft.lift(apply)(wrapped, IDS), output(Chain()), 1e-6)
    arrays = wrapped.adapters["default"].weights
    for name in TARGETS:
        layer = getattr(model.base_model.model, name)
        for side in ("lora_A", "lora_B"):
            theirs = np.abs(getattr(layer, side)["default"].weight.detach().numpy())
            assert_close(np.abs(arrays[name][side]), theirs, 2e-3)
    save_pretrained(change(wrapped), tmp_path)
    plain = peft.PeftModel.from_pretrained(Chain().eval(), str(tmp_path))
    assert_close(output(plain), np.asarray(jpeft.lift(apply)(change(wrapped), IDS)), 1e-5)
