"""`target_parameters`: which parameters it means, and how they are adapted."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft
from tests.harness import random_like

LAYOUTS = {r".*experts\.(gate_up_proj|down_proj)": "bio"}
EXPERTS, WIDTH, HIDDEN = 3, 4, 5


def tree():
    layer = {
        "mlp": {
            "gate": {"kernel": (WIDTH, EXPERTS)},
            "experts": {"gate_up_proj": (EXPERTS, WIDTH, 2 * HIDDEN), "down_proj": (EXPERTS, HIDDEN, WIDTH)},
        },
        "norm": {"scale": (WIDTH,)},
    }
    return random_like({"layers": {"0": layer, "1": layer}, "probe": {"latents": (2, WIDTH)}}, 0)


def wrap(**settings):
    return jpeft.wrap(tree(), jpeft.LoraConfig(**{"r": 2, **settings}), layouts=LAYOUTS)


def paths(**settings):
    return list(wrap(**settings).adapters["default"].sites)


MATCHES = {
    "by ending": (["gate.weight"], ["layers.0.mlp.gate.weight", "layers.1.mlp.gate.weight"]),
    "by its own name here": (["layers.1.mlp.gate.kernel"], ["layers.1.mlp.gate.weight"]),
    "experts": (["experts.down_proj"], ["layers.0.mlp.experts.down_proj", "layers.1.mlp.experts.down_proj"]),
    "one layer": (["layers.1.mlp.experts.gate_up_proj"], ["layers.1.mlp.experts.gate_up_proj"]),
    "bare": (["latents"], ["probe.latents"]),
}


@pytest.mark.parametrize(("names", "expected"), MATCHES.values(), ids=MATCHES)
@pytest.mark.parametrize("modules", [None, []], ids=["None", "[]"])
def test_what_names_mean(names, expected, modules):
    assert paths(target_modules=modules, target_parameters=names) == expected


def test_layers_and_exclusions_have_no_say():
    with pytest.warns(UserWarning, match="excluded no module"):
        found = paths(target_parameters=["down_proj"], exclude_modules=["experts"], layers_to_transform=[1])
    assert found == ["layers.0.mlp.experts.down_proj", "layers.1.mlp.experts.down_proj"]


def test_shapes_and_patterns():
    wrapped = wrap(
        target_modules=["probe"],
        target_parameters=["gate_up_proj", "gate.weight"],
        rank_pattern={"experts.gate_up_proj": 4, "gate.weight": 1},
        alpha_pattern={"gate.weight": 3},
    )
    adapter = wrapped.adapters["default"]
    shapes = jax.tree.map(jnp.shape, adapter.weights)
    assert shapes["layers.0.mlp.experts.gate_up_proj"] == {"lora_A": (3, 4, 4), "lora_B": (3, 10, 4)}
    assert shapes["layers.1.mlp.gate.weight"] == {"lora_A": (1, 4), "lora_B": (3, 1)}
    assert adapter.scaling["layers.0.mlp.gate.weight"] == 3
    # PyTorch keeps such a parameter as it is here, and PEFT reads any matrix as (out, in).
    alone = wrap(target_parameters=["latents"]).adapters["default"]
    assert jax.tree.map(jnp.shape, alone.weights) == {"probe.latents": {"lora_A": (2, 4), "lora_B": (2, 2)}}


def test_merged_is_the_einsum_of_peft():
    wrapped = wrap(target_parameters=["down_proj", "latents", "gate.weight"], lora_alpha=6)
    adapters = random_like(wrapped.adapters, 3)
    adapters = {"default": dataclasses.replace(adapters["default"], scaling=wrapped.adapters["default"].scaling)}
    wrapped = dataclasses.replace(wrapped, adapters=adapters)
    merged, weights = jpeft.merge(wrapped), wrapped.adapters["default"].weights
    own = {path: {k: np.asarray(v, np.float64) for k, v in arrays.items()} for path, arrays in weights.items()}
    down, latents, gate = (
        own[p] for p in ("layers.0.mlp.experts.down_proj", "probe.latents", "layers.0.mlp.gate.weight")
    )
    changes = {
        "down": np.einsum("eor,eri->eio", down["lora_B"], down["lora_A"]),
        "latents": latents["lora_B"] @ latents["lora_A"],
        "gate": (gate["lora_B"] @ gate["lora_A"]).T,
    }
    layer, old = merged["layers"]["0"]["mlp"], wrapped.base["layers"]["0"]["mlp"]
    got = {
        "down": layer["experts"]["down_proj"] - old["experts"]["down_proj"],
        "latents": merged["probe"]["latents"] - wrapped.base["probe"]["latents"],
        "gate": layer["gate"]["kernel"] - old["gate"]["kernel"],
    }
    for name, change in changes.items():
        np.testing.assert_allclose(got[name], 3 * change, rtol=1e-5, atol=1e-6)


BAD = {
    "a string": ({"target_parameters": "down_proj"}, TypeError, "expected a list of names"),
    "nothing": ({"target_parameters": []}, ValueError, "name the modules to adapt"),
    "a vector": ({"target_parameters": ["norm.weight", "scale"]}, ValueError, r"'layers.0.norm.scale' of shape \(4,\)"),
    "dropout": ({"target_parameters": ["down_proj"], "lora_dropout": 0.1}, ValueError, "expected lora_dropout=0.0"),
    "fan_in_fan_out": (
        {"target_parameters": ["down_proj"], "fan_in_fan_out": True},
        ValueError,
        "expected fan_in_fan_out=False",
    ),
    "DoRA": ({"target_parameters": ["down_proj"], "use_dora": True}, ValueError, "use_dora=True.*plain"),
    "twice": (
        {"target_parameters": ["latents"], "target_modules": ["probe"]},
        ValueError,
        "which target_modules means as well",
    ),
}


@pytest.mark.parametrize(("settings", "error", "message"), BAD.values(), ids=BAD)
@pytest.mark.filterwarnings("ignore:target_parameters entries that match no parameter")
def test_what_is_refused(settings, error, message):
    with pytest.raises(error, match=message):
        wrap(**settings)


def test_layouts_and_tables():
    with pytest.raises(ValueError, match="the layout of 'layers.0.mlp.experts.down_proj' is unknown"):
        jpeft.wrap(tree(), jpeft.LoraConfig(target_parameters=["down_proj"]))
    table = {"embed": {"embedding": jnp.ones((9, 4))}, "conv": {"kernel": jnp.ones((2, 2, 4, 4))}}
    with pytest.raises(ValueError, match="the table of a lookup; name its module in target_modules"):
        jpeft.wrap(table, jpeft.LoraConfig(target_parameters=["embed.weight"]))
    with pytest.raises(ValueError, match="of two axes, or three of which one is a stack of experts"):
        jpeft.wrap(table, jpeft.LoraConfig(target_parameters=["conv.weight"]))


def test_names_that_mean_nothing():
    with pytest.warns(UserWarning, match="entries that match no parameter: 'nothing'"):
        assert len(paths(target_parameters=["latents", "nothing"])) == 1
