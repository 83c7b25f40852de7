"""Every option of LoRA trains as in PyTorch PEFT: ten steps of SGD from one start have the same losses and arrays.

What cannot be compared so: dropout and MonteCLoRA's noise, which each side draws for itself; PEFT's MonteCLoRA loss,
which has a wrong sign; LoftQ and EVA, which are plain LoRA from another start (test_lora_init.py compares the starts);
QALoRA, which PEFT has for layers of GPTQ alone, is compared as one layer, without a model around it.
"""

import copy
import dataclasses
import importlib
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

import jpeft  # noqa: E402
from tests.harness import random_like  # noqa: E402
from tests.interop.trajectories import (  # noqa: E402
    RATE,
    REPLICATED,
    TOLERANCE,
    drawn_values,
    jax_loss,
    jax_steps,
    qalora_layer,
    read,
    torch_loss,
    torch_steps,
    trained_arrays,
    twin,
    with_adapter,
)


def drawn(pair, settings, folder):
    """All that trains has random values."""
    model = with_adapter(pair, settings)
    return model, read(pair, model, folder)


def initial(pair, settings, folder):
    """PEFT's own initial values."""
    model = with_adapter(pair, settings, drawn=False)
    return model, read(pair, model, folder)


def without_noise(pair, settings, folder):
    model, wrapped = drawn(pair, settings, folder)
    return model.eval(), wrapped


def beside_another(pair, settings, folder):
    """Two adapters are active, and the first alone trains."""
    model = with_adapter(pair, settings)
    model.add_adapter("other", peft.LoraConfig(r=2, lora_alpha=5, target_modules=["embed", "first", "second"]))
    model.set_adapter("other")
    drawn_values(model, seed=8)
    model.base_model.set_adapter(["default", "other"])
    model.set_requires_grad("other", False)
    return model, read(pair, model, folder)


def from_data(pair, settings, folder):
    """Of the base model's inputs or gradients, found on both sides."""
    how = settings["init_lora_weights"]
    config = peft.LoraConfig(**settings)
    torch_model, ids = copy.deepcopy(pair.torch_model), torch.tensor(pair.ids)
    wrapped = jpeft.wrap(pair.params, jpeft.LoraConfig(**settings), layouts=pair.layouts)
    if how == "corda":
        # PEFT takes `dataclass` from a package that it does not depend on.
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(sys.modules, "attr", dataclasses)
            preprocess = importlib.import_module("peft.tuners.lora.corda").preprocess_corda
        preprocess(torch_model, config, run_model=lambda: [torch_model(row[None]) for row in ids])
        covariances = jpeft.corda_covariances(wrapped, pair.apply, pair.ids[:, None])
        wrapped = jpeft.initialize_lora_corda_weights(wrapped, covariances)
    else:
        preprocess = importlib.import_module("peft.tuners.lora.loraga").preprocess_loraga
        preprocess(torch_model, config, lambda: torch_loss(pair, torch_model)().backward())
        loss = lambda params, ids: ((pair.apply(params, ids) - pair.wanted) ** 2).mean()  # noqa: E731
        wrapped = jpeft.initialize_lora_ga_weights(wrapped, jpeft.lora_ga_gradients(wrapped, loss, [pair.ids]))
    model = peft.get_peft_model(torch_model, config)
    return model, with_signs_of(wrapped, factors_of(pair, model, folder))


def factors_of(pair, model, folder):
    """PEFT's factors as they are: a file would hold them as plain LoRA of the changed base."""
    named = ((name.removeprefix("base_model.model.").split("."), p) for name, p in model.named_parameters())
    return {(name[0], name[1]): p.detach().numpy() for name, p in named if name[1].startswith("lora_")}


def with_signs_of(wrapped, factors):
    """With the signs of other factors, which are singular vectors like these; those are free."""
    adapter, weights = wrapped.adapters["default"], {}
    for path, own in adapter.weights.items():
        weights[path] = {}
        for name, x in own.items():
            axis = 1 if name.endswith("A") else 0
            signs = np.sign((np.asarray(x) * factors[path, f"lora_{name[-1]}"]).sum(axis, keepdims=True))
            weights[path][name] = x * signs.astype(np.float32)
    return dataclasses.replace(wrapped, adapters={"default": dataclasses.replace(adapter, weights=weights)})


def saved(pair, model, folder):
    """The trained arrays as PEFT's files have them."""
    return trained_arrays(read(pair, model, folder))


def nothing(model_or_params):
    return 0.0


@dataclasses.dataclass(frozen=True)
class Row:
    """model: of `twin`. start: gives PEFT's model and our parameters; end: PEFT's trained arrays.

    still: names of arrays that train on either side and that no gradient reaches. penalty: what the loss has besides,
    of PEFT's model and of our parameters. rate: of SGD, small enough for the loss to fall.
    """

    model: str
    settings: dict[str, Any]
    start: Callable[..., Any] = drawn
    end: Callable[..., Any] = saved
    still: frozenset[str] = frozenset()
    penalty: tuple[Callable[[Any], Any], Callable[[Any], Any]] = (nothing, nothing)
    rate: float = RATE


LINEAR = ["first", "second"]
ALL = ["embed", "conv", *LINEAR]
PRIORS = frozenset(f"lora_monteclora_sampler.{name}_prior" for name in ("std", "expert_weights"))
KASA = (lambda model: model.base_model._get_kasa_loss(), jpeft.kasa_loss)

ROWS = {
    "linear": Row("net", {"r": 3, "target_modules": LINEAR}),
    "embedding": Row("net", {"r": 3, "target_modules": ["embed"]}),
    "convolution": Row("net", {"r": 3, "target_modules": ["conv"]}),
    "gaussian": Row("net", {"r": 3, "target_modules": ALL, "init_lora_weights": "gaussian"}, initial),
    "orthogonal": Row("net", {"r": 4, "target_modules": LINEAR, "init_lora_weights": "orthogonal"}, initial),
    "rslora, patterns": Row(
        "net",
        {
            "r": 3,
            "lora_alpha": 2,
            "use_rslora": True,
            "target_modules": ALL,
            "rank_pattern": {"first": 2, "embed": 4},
            "alpha_pattern": {"second": 5, "conv": 1},
        },
    ),
    "patterns": Row(
        "net", {"target_modules": ALL, "rank_pattern": {"first": 2}, "alpha_pattern": {"f.*t": 5, "second": 3}}
    ),
    "bias all": Row("net", {"r": 3, "target_modules": ["second"], "bias": "all"}),
    "bias lora_only": Row("net", {"r": 3, "target_modules": ["first"], "bias": "lora_only"}),
    "modules_to_save": Row(
        "net", {"r": 3, "target_modules": ["second"], "modules_to_save": ["embed", "conv", "first"]}
    ),
    "tokens": Row("net", {"r": 3, "target_modules": ["first"], "trainable_token_indices": {"embed": [7, 2, 10]}}),
    "tokens, tied": Row("tied", {"r": 3, "target_modules": ["up"], "trainable_token_indices": [7, 2, 10]}),
    "tokens, tied, both": Row(
        "tied",
        {"r": 3, "target_modules": ["up"], "trainable_token_indices": {"embed_tokens": [7, 2], "lm_head": [7, 2]}},
    ),
    "tied table": Row("tied", {"r": 3, "target_modules": ["embed_tokens", "up"], "ensure_weight_tying": True}),
    "tied table, saved": Row(
        "tied", {"r": 3, "target_modules": ["up"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
    ),
    "lookup alone": Row("tied", {"r": 3, "target_modules": ["embed_tokens", "up"]}),
    "parameter of two axes": Row(
        "experts", {"r": 2, "target_modules": [], "target_parameters": ["gate.weight"]}, rate=2.0
    ),
    "parameters of three axes": Row(
        "experts", {"r": 2, "target_modules": [], "target_parameters": ["gate_up_proj", "down_proj"]}
    ),
    "parameters, patterns": Row(
        "experts",
        {
            "target_modules": ["embed"],
            "target_parameters": ["gate.weight", "gate_up_proj", "down_proj"],
            "rank_pattern": {"experts.gate_up_proj": 3, "gate.weight": 2},
            "alpha_pattern": {".*down_proj": 3},
        },
    ),
    "layer_replication": Row(
        "layers",
        {"r": 2, "target_modules": ["up"], "layer_replication": REPLICATED},
        rate=0.1,
    ),
    "two adapters": Row("net", {"r": 3, "target_modules": ALL}, beside_another, rate=0.1),
    "two adapters, dora": Row("net", {"r": 3, "target_modules": LINEAR, "use_dora": True}, beside_another),
    "pissa": Row("net", {"r": 3, "target_modules": LINEAR, "init_lora_weights": "pissa"}, initial),
    "olora": Row("net", {"r": 3, "target_modules": LINEAR, "init_lora_weights": "olora"}, initial),
    "corda": Row(
        "net",
        {"r": 3, "target_modules": LINEAR, "init_lora_weights": "corda", "corda_config": {"corda_method": "kpm"}},
        from_data,
        factors_of,
    ),
    "lora_ga": Row(
        "net",
        {"r": 2, "target_modules": LINEAR, "init_lora_weights": "lora_ga", "lora_ga_config": {"scale": "gd_scale"}},
        from_data,
        factors_of,
    ),
    "dora": Row("net", {"r": 3, "use_dora": True, "target_modules": ALL}),
    "lora_bias": Row("net", {"r": 3, "lora_bias": True, "target_modules": ["conv", "first"]}),
    "mica": Row("net", {"r": 3, "init_lora_weights": "mica", "target_modules": ["embed", *LINEAR]}, rate=0.1),
    "kasa": Row("net", {"r": 3, "kasa_config": {}, "target_modules": LINEAR}),
    "kasa, penalty": Row(
        "net", {"r": 3, "kasa_config": {"beta": 0.05, "gamma": 0.02}, "target_modules": LINEAR}, penalty=KASA
    ),
    # PEFT keeps the first batch's direction, or the last one's; here each step makes its own.
    "velora": Row("net", {"r": 3, "velora_config": {"num_groups": 3}, "target_modules": LINEAR}),
    "velora, random": Row(
        "net",
        {"r": 3, "velora_config": {"num_groups": 2, "init_type": "random", "scale": 0.5}, "target_modules": LINEAR},
    ),
    "bdlora": Row(
        "net",
        {
            "r": 4,
            "use_bdlora": {"target_modules_bd_a": ["second"], "target_modules_bd_b": ["first"], "nblocks": 2},
            "target_modules": LINEAR,
        },
    ),
    "monteclora": Row(
        "net",
        {"r": 3, "monteclora_config": {"num_samples": 4}, "target_modules": LINEAR},
        without_noise,
        still=PRIORS,
    ),
}


@pytest.mark.filterwarnings("ignore:.* acts on the lookup alone, as in PEFT")
@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_ten_steps_go_the_same_way(row, tmp_path):
    pair = twin(row.model)
    model, wrapped = row.start(pair, row.settings, tmp_path / "start")
    their_loss, our_loss = torch_loss(pair, model), jax_loss(pair)
    their_penalty, our_penalty = row.penalty
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    expected = torch_steps(lambda: their_loss() + their_penalty(model), parameters, row.rate)
    losses, after = jax_steps(lambda w: our_loss(w) + our_penalty(w), wrapped, row.rate)
    assert expected[-1] < 0.995 * expected[0]
    np.testing.assert_allclose(losses, expected, rtol=TOLERANCE)
    before, got, want = trained_arrays(wrapped), trained_arrays(after), row.end(pair, model, tmp_path / "end")
    # An output layer tied to its table has parameters of its own in the same memory.
    assert got.keys() == want.keys() and len(got) == len({parameter.data_ptr() for parameter in parameters})
    for path, array in want.items():
        error = TOLERANCE * np.abs(array).max()
        np.testing.assert_allclose(got[path], array, rtol=TOLERANCE, atol=error, err_msg=str(path))
        moved = np.abs(array - before[path]).max()
        assert moved == 0 if row.still & set(path) else moved > 10 * error, path


def test_qalora(tmp_path):
    params = {"layer": {"kernel": random_like((12, 5), 1)}}
    config = jpeft.LoraConfig(r=3, use_qalora=True, qalora_group_size=4, target_modules=["layer"])
    wrapped = jpeft.wrap(params, config)
    adapter = wrapped.adapters["default"]
    adapter = dataclasses.replace(adapter, weights=random_like(adapter.weights, 3))
    wrapped = dataclasses.replace(wrapped, adapters={"default": adapter})
    x, wanted = random_like(((6, 12), (6, 5)), 4)
    forward, parameters = qalora_layer(adapter.weights["layer"], 12, 4, 8 / 3)
    inputs, base, target = (torch.tensor(np.array(array)) for array in (x, x @ params["layer"]["kernel"], wanted))
    expected = torch_steps(lambda: ((forward(inputs, base) - target) ** 2).mean(), list(parameters.values()), 0.01)
    lifted = jpeft.lift(lambda params, x: x @ params["layer"]["kernel"])
    losses, after = jax_steps(lambda w: ((lifted(w, x) - wanted) ** 2).mean(), wrapped, 0.01)
    assert expected[-1] < 0.995 * expected[0]
    np.testing.assert_allclose(losses, expected, rtol=TOLERANCE)
    for name, parameter in parameters.items():
        got = after.adapters["default"].weights["layer"][name]
        np.testing.assert_allclose(got, parameter.detach(), rtol=TOLERANCE, atol=TOLERANCE)
