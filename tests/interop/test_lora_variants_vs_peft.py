"""LoRA's variants against PyTorch PEFT: files both ways, losses, and several adapters at once."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

import jpeft  # noqa: E402
from jpeft_interop import load_adapter, load_pretrained  # noqa: E402
from tests.harness import random_like  # noqa: E402
from tests.interop import test_round_trip as round_trip  # noqa: E402
from tests.interop.trajectories import qalora_layer  # noqa: E402

TWO_LAYERS = ["q_proj", "down_proj"]
CASES = {
    "dora": ("llama", {"r": 3, "use_dora": True, "target_modules": TWO_LAYERS}),
    "dora, random": ("llama", {"use_dora": True, "init_lora_weights": False, "target_modules": ["q_proj"]}),
    "dora, bias": ("bert", {"use_dora": True, "use_rslora": True, "target_modules": ["query"], "bias": "all"}),
    "dora, embedding": ("llama", {"r": 3, "use_dora": True, "target_modules": ["embed_tokens"]}),
    "dora, convolution": ("conv", {"r": 3, "use_dora": True, "target_modules": ["conv1", "conv2", "head"]}),
    "lora_bias": ("bert", {"r": 3, "lora_bias": True, "target_modules": ["query", "value"]}),
    "lora_bias, bias": ("bert", {"lora_bias": True, "target_modules": ["query"], "bias": "lora_only"}),
    "lora_bias, convolution": ("conv", {"lora_bias": True, "target_modules": ["conv1", "conv2"]}),
    "bdlora": (
        "llama",
        {
            "r": 4,
            "use_bdlora": {"target_modules_bd_a": ["down"], "target_modules_bd_b": ["q_proj"], "nblocks": 2},
            "target_modules": TWO_LAYERS,
        },
    ),
    "bdlora, not strict": ("llama", {"use_bdlora": {"match_strict": False}, "target_modules": ["q_proj"]}),
    "velora": ("llama", {"velora_config": {"num_groups": 5, "init_type": "random"}, "target_modules": TWO_LAYERS}),
    "monteclora": ("llama", {"r": 3, "monteclora_config": {"num_samples": 4}, "target_modules": TWO_LAYERS}),
    "kasa": ("llama", {"r": 3, "kasa_config": {"beta": 0.01}, "target_modules": TWO_LAYERS}),
    "mica": ("llama", {"r": 3, "init_lora_weights": "mica", "target_modules": TWO_LAYERS}),
    "mica, embedding": ("llama", {"r": 3, "init_lora_weights": "mica", "target_modules": ["embed_tokens"]}),
}


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("variants")


@pytest.fixture(params=CASES)
def case(request, root):
    kind, settings = CASES[request.param]
    return round_trip.twins(kind, root), settings


def test_what_pytorch_wrote_computes_the_same_and_is_written_back(case, tmp_path):
    round_trip.test_from_torch(case, tmp_path)


def test_pytorch_loads_what_is_written_here(case, tmp_path):
    round_trip.test_to_torch(case, tmp_path)


def test_two_active_dora_adapters_act_one_on_the_other(root, tmp_path):
    """PEFT lets the second act on the result of the first, each with the norm of its own change of the base weight."""
    pair = round_trip.twins("llama", root)
    settings = {"use_dora": True, "target_modules": TWO_LAYERS}
    model = round_trip.from_torch(pair, settings, tmp_path)
    model.add_adapter("other", peft.LoraConfig(r=3, **settings))
    model.set_adapter("other")
    round_trip.randomise(model, 2, only_trainable=True)
    round_trip.quietly(model.save_pretrained, tmp_path)
    model.base_model.set_adapter(["default", "other"])
    wrapped = load_adapter(load_pretrained(pair.params, tmp_path), tmp_path / "other", "other")
    round_trip.assert_same_outputs(pair, jpeft.set_adapter(wrapped, ["default", "other"]), model)


def test_the_losses_of_kasa_and_monteclora(root, tmp_path):
    pair = round_trip.twins("llama", root)
    settings = {"r": 3, "target_modules": TWO_LAYERS}
    model = round_trip.from_torch(pair, {**settings, "kasa_config": {"beta": 0.1, "gamma": 0.2}}, tmp_path / "kasa")
    wrapped = load_pretrained(pair.params, tmp_path / "kasa")
    np.testing.assert_allclose(jpeft.kasa_loss(wrapped), model.base_model._get_kasa_loss().item(), rtol=1e-5)

    settings["monteclora_config"] = {"num_samples": 4, "kl_loss_weight": 0.1, "use_entropy": True}
    model = round_trip.from_torch(pair, settings, tmp_path / "monteclora").train()
    wrapped = load_pretrained(pair.params, tmp_path / "monteclora")
    # PEFT has the logarithms of the beta functions of the Dirichlet divergence with the wrong sign.
    total, count = 0.0, 0
    for module in model.modules():
        if isinstance(module, peft.tuners.lora.monteclora.MontecloraSampler):
            alpha = module.expert_weights_prior.detach().exp()
            wanted = torch.full_like(alpha, 0.1)
            right = torch.distributions.kl_divergence(*map(torch.distributions.Dirichlet, (alpha, wanted)))
            others = module.wishart_kl(torch.diag(torch.exp(module.std_prior)))
            others = others + module.multivariate_kl(module.gaussian_var_prior)
            total, count = total + 0.1 * (right + others).item() + (module.expert_weights**2).sum().item(), count + 1
    np.testing.assert_allclose(jpeft.monteclora_loss(wrapped), total / count, rtol=1e-5)


def test_qalora_is_what_peft_computes_for_gptq_layers():
    """PEFT has it for layers of GPTQ alone; its forward pass is taken by itself."""
    config = jpeft.LoraConfig(r=3, use_qalora=True, qalora_group_size=4, target_modules=["layer"])
    params = {"layer": {"kernel": jnp.zeros((12, 5))}}
    wrapped = jpeft.wrap(params, config)
    adapter = wrapped.adapters["default"]
    weights = random_like(adapter.weights, 3)
    assert {name: array.shape for name, array in weights["layer"].items()} == {"lora_A": (3, 3), "lora_B": (5, 3)}
    wrapped = dataclasses.replace(wrapped, adapters={"default": dataclasses.replace(adapter, weights=weights)})
    x = random_like((2, 7, 12), 4)
    forward, _ = qalora_layer(weights["layer"], 12, 4, 8 / 3)
    expected = forward(torch.tensor(np.array(x)), torch.zeros(()))
    function = lambda p, x: x @ p["layer"]["kernel"]  # noqa: E731
    for found in (jpeft.lift(function)(wrapped, x), function(jpeft.merge(wrapped), x)):
        np.testing.assert_allclose(found, expected.detach(), rtol=1e-5, atol=1e-6)
