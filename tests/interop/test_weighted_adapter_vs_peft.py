"""Adapters combined and converted as PyTorch PEFT does it: the same changes of the weights, files read both ways."""

import json
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import jpeft
from jpeft._paths import leaves_by_path
from jpeft_interop import load_adapter, load_pretrained, save_pretrained

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from peft.utils import merge_utils  # noqa: E402

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
TOLERANCE = 1e-5


class Net(torch.nn.Module):
    """One layer of each kind; it is never run."""

    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(11, 6)
        self.conv = torch.nn.Conv2d(6, 5, (3, 2))
        self.point = torch.nn.Conv2d(5, 7, 1)
        self.layers = torch.nn.ModuleList([torch.nn.ModuleDict({"q": torch.nn.Linear(6, 8)}) for _ in range(2)])

    def forward(self, x):
        return x


PATHS = ("table", "conv", "point", "layers.0.q", "layers.1.q")


def quietly(function: Any, *args: Any, **kwargs: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*args, **kwargs)


def flax_params(net: Any) -> dict[str, Any]:
    def turned(array: np.ndarray) -> Any:
        return jnp.asarray(array.transpose(*range(2, array.ndim), 1, 0))

    def module(torch_module: Any) -> dict[str, Any]:
        return {
            "kernel": turned(torch_module.weight.detach().numpy()),
            "bias": jnp.asarray(torch_module.bias.detach().numpy()),
        }

    return {
        "table": {"embedding": jnp.asarray(net.table.weight.detach().numpy())},
        "conv": module(net.conv),
        "point": module(net.point),
        "layers": {str(i): {"q": module(layer["q"])} for i, layer in enumerate(net.layers)},
    }


def torch_model(settings: dict[str, dict[str, Any]]) -> Any:
    """PEFT's model with an adapter of random values for each entry."""
    names = list(settings)
    model = peft.get_peft_model(fresh(), peft.LoraConfig(**settings[names[0]]), names[0])
    for name in names[1:]:
        model.add_adapter(name, peft.LoraConfig(**settings[name]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.4 * torch.randn(parameter.shape))
    return model


def torch_changes(model: Any, name: str) -> dict[str, np.ndarray]:
    """{module: change of its weight}, in this project's orientation."""
    found = {}
    for path, module in model.base_model.model.named_modules():
        if path in PATHS and hasattr(module, "get_delta_weight"):
            if name in module.lora_A or name in module.lora_embedding_A:
                change = module.get_delta_weight(name).detach().numpy()
                found[path] = change if path == "table" else change.transpose(*range(2, change.ndim), 1, 0)
    return found


def our_changes(wrapped: jpeft.PeftParams, name: str) -> dict[str, np.ndarray]:
    sites = wrapped.adapters[name].sites
    merged = jpeft.merge(wrapped, adapter_names=name)
    after, before = leaves_by_path(merged), leaves_by_path(wrapped.base)
    return {path: np.asarray(after[site.leaf] - before[site.leaf]) for path, site in sites.items()}


def both(settings: dict[str, dict[str, Any]], folder: Any) -> tuple[Any, jpeft.PeftParams]:
    """PEFT's model with random adapters, and the same adapters here, by way of the files."""
    model = torch_model(settings)
    quietly(model.save_pretrained, folder)
    first, *others = settings
    wrapped = load_pretrained(flax_params(fresh()), folder / first, adapter_name=first)
    for name in others:
        wrapped = load_adapter(wrapped, folder / name, name)
    return model, wrapped


def fresh() -> Any:
    torch.manual_seed(0)
    return Net()


def assert_same_changes(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray], tolerance=TOLERANCE) -> None:
    assert ours.keys() == theirs.keys()
    for path, change in theirs.items():
        scale = np.abs(change).max()
        assert scale > 1e-3, path
        # The change is what is left of a weight of about one in float32.
        assert np.abs(ours[path] - change).max() <= tolerance * max(scale, 1), path


ALL = {"target_modules": ["table", "conv", "point", "q"]}
SETTINGS: dict[str, dict[str, dict[str, Any]]] = {
    "alike": {
        "one": {**ALL, "r": 2, "lora_alpha": 6},
        "two": {**ALL, "r": 2, "lora_alpha": 3},
        "three": {**ALL, "r": 2, "use_rslora": True},
    },
    "other targets": {
        "one": {"target_modules": ["table", "conv", "q"], "r": 3, "lora_alpha": 5},
        "two": {"target_modules": ["conv", "point"], "r": 3},
    },
    "other ranks": {
        "one": {**ALL, "r": 2, "lora_alpha": 5, "rank_pattern": {"layers.1.q": 4}, "alpha_pattern": {"conv": 9}},
        "two": {"target_modules": ["q", "table"], "r": 3, "use_rslora": False},
    },
    "regex": {
        "one": {"target_modules": r"layers\.\d\.q", "r": 2},
        "two": {"target_modules": r"conv|point", "r": 2},
    },
}
WEIGHTS_OF = {"one": 0.7, "two": -0.4, "three": 1.3}
ANY_RANK = [{"combination_type": "svd"}, {"combination_type": "svd", "svd_rank": 1}, {"combination_type": "cat"}]
ANY_RANK += [
    {"combination_type": "ties_svd", "density": 0.6},
    {"combination_type": "ties_svd", "density": 0.6, "majority_sign_method": "frequency"},
    {"combination_type": "magnitude_prune_svd", "density": 0.3, "svd_rank": 5},
    {"combination_type": "dare_linear_svd", "density": 1.0},
    {"combination_type": "dare_ties_svd", "density": 1.0},
]
EQUAL_RANKS = [
    {"combination_type": "linear"},
    {"combination_type": "ties", "density": 0.5},
    {"combination_type": "ties", "density": 0.5, "majority_sign_method": "frequency"},
    {"combination_type": "magnitude_prune", "density": 0.4},
    {"combination_type": "dare_linear", "density": 1.0},
    {"combination_type": "dare_ties", "density": 1.0},
]
FEW = [ANY_RANK[1], ANY_RANK[2], ANY_RANK[3]]
OPTIONS = {
    "alike": ANY_RANK + EQUAL_RANKS,
    "other targets": [*FEW, EQUAL_RANKS[0], EQUAL_RANKS[1]],
    "other ranks": FEW,
    "regex": [ANY_RANK[0], EQUAL_RANKS[0]],
}
CASES = [(settings, options) for settings in SETTINGS for options in OPTIONS[settings]]


@pytest.mark.parametrize(
    ("settings", "options"), CASES, ids=lambda v: v if isinstance(v, str) else "-".join(map(str, v.values()))
)
def test_combined_as_peft_does(settings, options, tmp_path):
    model, wrapped = both(SETTINGS[settings], tmp_path)
    names = list(SETTINGS[settings])
    weights = [WEIGHTS_OF[name] for name in names]
    quietly(model.base_model.add_weighted_adapter, names, weights, "mixed", **options)
    combined = jpeft.add_weighted_adapter(wrapped, names, weights, "mixed", **options)
    theirs = torch_changes(model, "mixed")
    assert_same_changes(our_changes(combined, "mixed"), theirs)
    config, expected = combined.adapters["mixed"].config, model.peft_config["mixed"]
    assert (config.r, config.lora_alpha) == (expected.r, expected.lora_alpha)
    targets = expected.target_modules
    assert config.target_modules == targets if isinstance(targets, str) else set(config.target_modules) == targets
    # Read there, and what is read there is the same again.
    save_pretrained(combined, tmp_path / "ours", selected_adapters=["mixed"])
    again = quietly(peft.PeftModel.from_pretrained, fresh(), tmp_path / "ours" / "mixed")
    state = quietly(peft.get_peft_model_state_dict, again)
    assert state.keys() == load_file(tmp_path / "ours" / "mixed" / WEIGHTS).keys()
    assert_same_changes(torch_changes(again, "default"), theirs)


@pytest.mark.parametrize("options", [ANY_RANK[0], ANY_RANK[2], EQUAL_RANKS[0]], ids=str)
def test_what_peft_combined_is_read_here(options, tmp_path):
    model, wrapped = both({k: v for k, v in SETTINGS["alike"].items() if k != "three"}, tmp_path)
    quietly(model.base_model.add_weighted_adapter, ["one", "two"], [0.7, 0.4], "mixed", **options)
    quietly(model.save_pretrained, tmp_path / "theirs", selected_adapters=["mixed"])
    loaded = load_adapter(wrapped, tmp_path / "theirs" / "mixed", "mixed")
    assert_same_changes(our_changes(loaded, "mixed"), torch_changes(model, "mixed"))
    ours = jpeft.add_weighted_adapter(wrapped, ["one", "two"], [0.7, 0.4], "mixed", **options)
    save_pretrained(ours, tmp_path / "ours", selected_adapters=["mixed"])
    first, second = (json.loads((tmp_path / name / "mixed" / CONFIG).read_text()) for name in ("theirs", "ours"))
    for config in (first, second):
        config["target_modules"] = sorted(config["target_modules"])
    assert first == second


def test_what_peft_gets_wrong_when_the_first_adapter_is_rank_stabilised(tmp_path):
    """PEFT keeps use_rslora, so that what it combined counts sqrt(r) times; here it counts once."""
    settings = {"one": {**ALL, "r": 4, "use_rslora": True}, "two": {**ALL, "r": 4}}
    model, wrapped = both(settings, tmp_path)
    quietly(model.base_model.add_weighted_adapter, ["one", "two"], [0.5, 0.5], "mixed", combination_type="cat")
    combined = jpeft.add_weighted_adapter(wrapped, ["one", "two"], [0.5, 0.5], "mixed", combination_type="cat")
    parts = [torch_changes(model, name) for name in ("one", "two")]
    expected = {path: 0.5 * parts[0][path] + 0.5 * parts[1][path] for path in parts[0]}
    assert_same_changes(our_changes(combined, "mixed"), expected)
    wrong = torch_changes(model, "mixed")
    np.testing.assert_allclose(wrong["conv"], np.sqrt(8) * expected["conv"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("rank", [1, 3, 0.5, 0.9])
def test_converted_as_peft_does(rank, tmp_path):
    """Of plain LoRA, which PEFT converts too."""
    settings = {"one": {"target_modules": ["q"], "r": 4, "lora_alpha": 7}}
    model, wrapped = both(settings, tmp_path)
    wrapped = jpeft.convert_to_lora(wrapped, "one", rank, "less")
    config, state = quietly(peft.convert_to_lora, model, rank, "one")
    ranks = {k.split(".lora_A")[0]: v.shape[0] for k, v in state.items() if "lora_A" in k}
    own = wrapped.adapters["less"].weights
    assert {f"base_model.model.{path}": p["lora_A"].shape[0] for path, p in own.items()} == ranks
    theirs = {
        path: (state[f"base_model.model.{path}.lora_B.weight"] @ state[f"base_model.model.{path}.lora_A.weight"])
        .numpy()
        .T
        for path in own
    }
    assert_same_changes(our_changes(wrapped, "less"), theirs)
    save_pretrained(wrapped, tmp_path / "ours", selected_adapters=["less"])
    again = quietly(peft.PeftModel.from_pretrained, fresh(), tmp_path / "ours" / "less")
    assert quietly(peft.get_peft_model_state_dict, again).keys() == state.keys()
    assert_same_changes(torch_changes(again, "default"), theirs)


def test_intruders_reduced_as_peft_does(tmp_path):
    settings = {"default": {"target_modules": ["q"], "r": 3, "lora_alpha": 12}}
    model = torch_model(settings)
    quietly(model.save_pretrained, tmp_path)
    before = torch_changes(model, "default")
    wrapped = load_pretrained(flax_params(fresh()), tmp_path)
    options = {"top_k": 3, "threshold_epsilon": 0.8, "mitigation_lambda": 0.6}
    from peft.tuners.lora.intruders import reduce_intruder_dimension

    quietly(reduce_intruder_dimension, model, logging_sink=None, **options)
    theirs = torch_changes(model, "intruder_reduced")
    reduced = jpeft.reduce_intruder_dimension(wrapped, **options)
    changed = [path for path in theirs if np.abs(theirs[path] - before[path]).max() > 1e-2]
    assert changed, "nothing is an intruder: the test proves nothing"
    assert_same_changes(our_changes(reduced, "intruder_reduced"), theirs)


TENSORS = np.random.default_rng(0).normal(size=(3, 5, 7)).astype(np.float32)


@pytest.mark.parametrize("sign", ["total", "frequency"])
@pytest.mark.parametrize("density", [0.0, 0.3, 0.75, 1.0])
def test_rules_are_pefts(density, sign, monkeypatch):
    """Every rule on single arrays; the random ones with the same masks."""
    weights = np.array([0.5, -1.5, 2.0], np.float32)
    masks = np.random.default_rng(1).random(TENSORS.shape) < density
    ours, theirs = [iter(masks), iter(masks)], [iter(masks), iter(masks)]
    drawn: dict[str, Any] = {}
    monkeypatch.setattr(jax.random, "bernoulli", lambda key, p, shape: jnp.asarray(next(drawn["ours"])))
    monkeypatch.setattr(torch, "bernoulli", lambda full: torch.tensor(next(drawn["theirs"])).to(full.dtype))
    tensors, torch_tensors = list(jnp.asarray(TENSORS)), list(torch.tensor(TENSORS))
    key, w = jax.random.key(0), torch.tensor(weights)
    pairs = [
        (jpeft.task_arithmetic(tensors, weights), merge_utils.task_arithmetic(torch_tensors, w)),
        (
            jpeft.magnitude_prune(tensors, weights, density),
            quietly(merge_utils.magnitude_prune, torch_tensors, w, density),
        ),
        (jpeft.ties(tensors, weights, density, sign), quietly(merge_utils.ties, torch_tensors, w, density, sign)),
    ]
    # At density zero PEFT divides zero by zero.
    if density > 0:
        for index, (rule, options) in enumerate([("dare_linear", ()), ("dare_ties", (sign,))]):
            drawn.update(ours=ours[index], theirs=theirs[index])
            got = getattr(jpeft, rule)(tensors, weights, density, *options, rng=key)
            pairs.append((got, quietly(getattr(merge_utils, rule), torch_tensors, w, density, *options)))
    for got, want in pairs:
        np.testing.assert_allclose(got, want.numpy(), rtol=1e-6, atol=1e-6)
