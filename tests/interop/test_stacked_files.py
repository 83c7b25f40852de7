"""Files of stacked layers: byte for byte those of single layers, and read back into stacks."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jpeft
from jpeft._stacks import layer_paths
from jpeft_interop import load_adapter, load_pretrained, save_pretrained, verify
from tests.stacked_trees import STACKS, assert_same_arrays, layer_tree, randomised, stacked, taken_apart

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
FOUR = [0, 1, 2, 3]

SETTINGS = {
    "names": {"target_modules": ["q_proj", "v_proj"]},
    "all-linear": {"target_modules": "all-linear"},
    "all-linear but one": {"target_modules": "all-linear", "exclude_modules": ["v_proj"]},
    "regex": {"target_modules": r"model\.layers\.\d\.(q|v)_proj"},
    "layers": {"target_modules": ["q_proj"], "layers_to_transform": FOUR, "layers_pattern": "layers"},
    "bias all": {"target_modules": ["q_proj"], "bias": "all"},
    "bias all and saved": {"target_modules": ["v_proj"], "bias": "all", "modules_to_save": ["norm", "q_proj", "score"]},
    "bias lora_only": {"target_modules": ["q_proj", "v_proj"], "bias": "lora_only"},
    "saved": {"target_modules": ["q_proj"], "modules_to_save": ["norm", "score"]},
    "saved kernels": {"target_modules": ["q_proj"], "modules_to_save": ["v_proj"]},
    "head of the task": {"target_modules": ["q_proj"], "task_type": "SEQ_CLS"},
    "embedding": {"target_modules": ["embed_tokens", "v_proj"]},
    "patterns": {
        "target_modules": ["q_proj", "v_proj"],
        "rank_pattern": {r"\d\.q_proj": 3},
        "alpha_pattern": {"v_proj": 5.0},
        "use_rslora": True,
    },
}


def pair(names=STACKS["all"], dtype: Any = jnp.float32, **settings: Any) -> tuple[jpeft.PeftParams, jpeft.PeftParams]:
    """The same random adapter beside stacked layers and beside single ones."""
    config, tree = jpeft.LoraConfig(**{"r": 2, "target_modules": ["q_proj"], **settings}), layer_tree()
    whole = randomised(jpeft.wrap(stacked(tree, names), config, dtype=dtype))
    return whole, taken_apart(whole, tree, jpeft.wrap(tree, config, dtype=dtype))


def files(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def arrays(adapter: jpeft.Adapter) -> tuple[Any, ...]:
    return adapter.weights, adapter.replaced, adapter.scaling, adapter.sites, hash(adapter.sites)


@pytest.mark.parametrize("names", STACKS.values(), ids=STACKS)
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_files_are_those_of_single_layers(tmp_path, settings, names):
    whole, single = pair(names, **settings)
    save_pretrained(whole, tmp_path / "whole", base_model_name_or_path="base")
    save_pretrained(single, tmp_path / "single", base_model_name_or_path="base")
    assert files(tmp_path / "whole") == files(tmp_path / "single")
    verify(tmp_path / "whole")
    loaded = load_pretrained(whole.base, tmp_path / "single", is_trainable=True)
    got, expected = loaded.adapters["default"], whole.adapters["default"]
    if "task_type" in settings:
        expected = dataclasses.replace(expected, replaced={k: v for k, v in got.replaced.items() if "score" in k})
        assert set(got.replaced) == {"score.kernel", "score.bias"}
    assert_same_arrays(arrays(got)[:3], arrays(expected)[:3])
    assert arrays(got)[3:] == arrays(expected)[3:]
    for path, scaling in got.scaling.items():
        assert scaling.shape == ((len(layer_paths(path)),) if layer_paths(path) else ())
    save_pretrained(loaded, tmp_path / "again", base_model_name_or_path="base")
    assert files(tmp_path / "again") == files(tmp_path / "whole")


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_dtypes_survive(tmp_path, dtype):
    whole, single = pair(dtype=dtype, modules_to_save=["norm"])
    save_pretrained(whole, tmp_path / "whole")
    save_pretrained(single, tmp_path / "single")
    assert files(tmp_path / "whole") == files(tmp_path / "single")
    loaded = load_pretrained(whole.base, tmp_path / "whole")
    assert_same_arrays(arrays(loaded.adapters["default"])[:3], arrays(whole.adapters["default"])[:3])


def test_many_targets_are_named_as_for_single_layers(tmp_path):
    """From 20 modules on the config has the shortest names."""
    tree = layer_tree()
    layers = {str(i): tree["model"]["layers"][str(i % 4)] for i in range(24)}
    tree = {**tree, "model": {**tree["model"], "layers": layers}}
    config = jpeft.LoraConfig(r=2, target_modules="all-linear")
    save_pretrained(jpeft.wrap(tree, config), tmp_path / "single")
    save_pretrained(jpeft.wrap(stacked(tree, ("0:24",)), config), tmp_path / "whole")
    assert files(tmp_path / "whole") == files(tmp_path / "single")
    assert "q_proj" in json.loads((tmp_path / "whole" / CONFIG).read_text())["target_modules"]


def test_several_adapters(tmp_path):
    configs = {
        "default": jpeft.LoraConfig(r=2, target_modules=["q_proj"], bias="all"),
        "other": jpeft.LoraConfig(r=3, target_modules=["v_proj", "model.layers.0:4.q_proj"], use_rslora=True),
    }
    tree = layer_tree()
    whole, single = stacked(tree), tree
    for name, config in configs.items():
        whole = jpeft.wrap(whole, config, adapter_name=name)
        single = jpeft.wrap(single, config, adapter_name=name)
    whole = randomised(whole)
    save_pretrained(whole, tmp_path / "whole")
    save_pretrained(taken_apart(whole, tree, single), tmp_path / "single")
    assert files(tmp_path / "whole") == files(tmp_path / "single")
    loaded = load_pretrained(whole.base, tmp_path / "whole")
    loaded = load_adapter(loaded, tmp_path / "whole" / "other", "other")
    for name in configs:
        assert_same_arrays(arrays(loaded.adapters[name])[:3], arrays(whole.adapters[name])[:3])


def test_the_names_of_stacks_are_not_in_files(tmp_path):
    wrapped = jpeft.wrap(stacked(layer_tree()), jpeft.LoraConfig(r=2, target_modules=["layers.0:4.q_proj"]))
    save_pretrained(wrapped, tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    assert config["target_modules"] == [f"layers.{index}.q_proj" for index in FOUR]


def test_layouts_of_stacks(tmp_path):
    """Of kernels of unknown layout that are saved in full: by the stack's path, a layer's, or a regular expression."""
    kernels, q = jax.random.normal(jax.random.key(0), (2, 3, 4, 6)), jnp.ones((2, 4, 4))
    whole_tree = {"h": {"0:2": {"conv": {"kernel": kernels}, "gate": {"wi": kernels[:, 0], "wo": q}, "q": {"w": q}}}}
    tree = {"h": {str(i): jax.tree.map(lambda leaf, i=i: leaf[i], whole_tree["h"]["0:2"]) for i in range(2)}}
    config = jpeft.LoraConfig(r=2, target_modules=["q"], modules_to_save=["conv", "gate"])
    wrapped = jpeft.wrap(whole_tree, config)
    with pytest.raises(ValueError, match=r"the layout of 'h.0.conv.kernel' is unknown: its shape is \(3, 4, 6\)"):
        save_pretrained(wrapped, tmp_path)
    by_layer = {f"h.{i}.{name}": layout for i in range(2) for name, layout in (("conv", ".io"), ("gate.wi", "io"))}
    save_pretrained(jpeft.wrap(tree, config), tmp_path / "single", layouts=by_layer)
    for layouts in (
        by_layer,
        {"h.0:2.conv.kernel": "b.io", "h.0:2.gate.wi": "bio"},
        {"h.0:2.conv": ".io", "h.0:2.gate.wi": "io"},
        {"h.0.conv.kernel": ".io", "h.0.gate.wi": "io"},
        {r"h\.\d\.conv": ".io", "h.0:2.gate.wi": "bio"},
    ):
        save_pretrained(wrapped, tmp_path / "whole", layouts=layouts)
        assert files(tmp_path / "whole") == files(tmp_path / "single")
        loaded = load_pretrained(whole_tree, tmp_path / "single", layouts=layouts).adapters["default"]
        assert_same_arrays(loaded.replaced, wrapped.adapters["default"].replaced)


def test_stacks_within_layers_are_refused(tmp_path):
    params = {"h": {"0:2": {"experts": {"kernel": jnp.ones((2, 3, 4, 6))}}}}
    config = jpeft.LoraConfig(r=2, target_modules=["experts"])
    wrapped = jpeft.wrap(params, config, layouts={".*experts": "bio"})
    with pytest.raises(ValueError, match=r"hold a stack .*: h.0.experts, h.1.experts; expected a family"):
        save_pretrained(wrapped, tmp_path)


def test_abstract_stacks(tmp_path):
    whole, _ = pair(modules_to_save=["norm"])
    abstract = jpeft.wrap(jax.eval_shape(lambda: whole.base), whole.adapters["default"].config)
    with pytest.raises(ValueError, match="adapter 'default' has 16 abstract arrays and no values to save"):
        save_pretrained(abstract, tmp_path)
    save_pretrained(whole, tmp_path)
    loaded = load_pretrained(abstract.base, tmp_path)
    assert_same_arrays(loaded.adapters["default"].weights, whole.adapters["default"].weights)


# ---- files that a stack cannot hold ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (
            {"layers_to_transform": [0, 3]},
            f"{CONFIG} does not fit the parameters: .* select layers 0, 3 of the stack "
            "'model.layers.0:4.q_proj.kernel', but not layers 1, 2; .* load the model with scan_layers=False",
        ),
        (
            {"rank_pattern": {"1.q_proj": 4}},
            "'model.layers.0:4.q_proj': 2 to layers 0, 2, 3; 4 to layer 1. .* scan_layers",
        ),
        (
            {"alpha_pattern": {"1.q_proj": 4}},
            "'model.layers.0:4.q_proj': 8 to layers 0, 2, 3; 4 to layer 1. .* scan_layers",
        ),
        ({"modules_to_save": ["2.norm"]}, "would train layer 2 of the stack 'model.layers.0:4.norm.*scan_layers=False"),
    ],
)
def test_adapters_that_treat_layers_of_a_stack_differently(tmp_path, settings, expected):
    tree, config = layer_tree(), jpeft.LoraConfig(**{"r": 2, "target_modules": ["q_proj"], **settings})
    save_pretrained(jpeft.wrap(tree, config), tmp_path)
    load_pretrained(tree, tmp_path)
    with pytest.raises(ValueError, match=expected):
        load_pretrained(stacked(tree), tmp_path)


def test_layers_of_different_dtypes(tmp_path):
    whole, single = pair()
    save_pretrained(single, tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    key = "base_model.model.model.layers.2.q_proj.lora_A.weight"
    tensors[key] = tensors[key].astype(np.float16)
    save_file(tensors, tmp_path / WEIGHTS, metadata={"format": "pt"})
    expected = (
        f"{WEIGHTS} has other dtypes in other layers of the stack 'model.layers.0:4.q_proj': float32 in layers "
        "0, 1, 3, float16 in layer 2; expected one dtype: load the model with scan_layers=False"
    )
    with pytest.raises(ValueError, match=expected):
        load_pretrained(whole.base, tmp_path)
    assert load_pretrained(single.base, tmp_path).adapters["default"].weights["model.layers.2.q_proj"][
        "lora_A"
    ].dtype == (jnp.float16)


def test_missing_tensors_are_named_by_layer(tmp_path):
    whole, single = pair()
    save_pretrained(single, tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    del tensors["base_model.model.model.layers.2.q_proj.lora_A.weight"]
    save_file(tensors, tmp_path / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"not there: base_model.model.model.layers.2.q_proj.lora_A.weight \(2, 4\)"):
        load_pretrained(whole.base, tmp_path)


def test_embeddings_of_some_layers(tmp_path):
    """PEFT writes tables of targeted embeddings in full; what is in the file of a stack must be so for all layers."""
    table = jax.random.normal(jax.random.key(0), (7, 4))
    tree = {"h": {str(i): {"embed_tokens": {"embedding": table + i}} for i in range(2)}}
    whole = {"h": {"0:2": {"embed_tokens": {"embedding": jnp.stack([table, table + 1])}}}}
    save_pretrained(jpeft.wrap(tree, jpeft.LoraConfig(r=2, target_modules=["embed_tokens"])), tmp_path)
    assert not load_pretrained(whole, tmp_path).adapters["default"].replaced
    other = jax.tree.map(lambda leaf: leaf + 5, whole)
    assert_same_arrays(
        load_pretrained(other, tmp_path).adapters["default"].replaced,
        {"h.0:2.embed_tokens.embedding": whole["h"]["0:2"]["embed_tokens"]["embedding"]},
    )
    assert load_pretrained(jax.eval_shape(lambda: whole), tmp_path).adapters["default"].replaced
    one = {"h": {"0:2": {"embed_tokens": {"embedding": jnp.stack([table, table + 3])}}}}
    with pytest.raises(
        ValueError, match=f"{WEIGHTS} holds layer 1 of the stack 'h.0:2.*but not layer 0; .*scan_layers"
    ):
        load_pretrained(one, tmp_path)
