"""`target_parameters` against PyTorch PEFT: experts and routers, both ways, by file and by output."""

import copy
import dataclasses
import functools
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jpeft
from jpeft_interop import load_pretrained, save_pretrained, verify
from jpeft_interop.models import FlaxAutoModelForCausalLM

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from tests.interop.test_round_trip import (  # noqa: E402
    CONFIG,
    TINY,
    WEIGHTS,
    Twins,
    assert_same_outputs,
    from_jax,
    from_torch,
    language_twins,
    quietly,
)

EXPERTS = {"r": 2, "target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}

CASES = {
    "experts": EXPERTS,
    "other order": {**EXPERTS, "target_parameters": ["mlp.experts.down_proj", "gate_up_proj"]},
    "inner alone": {**EXPERTS, "target_parameters": ["gate_up_proj"]},
    "outer alone": {**EXPERTS, "target_parameters": ["down_proj"], "r": 3, "use_rslora": True},
    "router": {**EXPERTS, "target_parameters": ["gate.weight"]},
    "all and a module": {
        "r": 3,
        "target_modules": ["q_proj"],
        "target_parameters": ["gate.weight", "gate_up_proj", "down_proj"],
        "rank_pattern": {"experts.gate_up_proj": 5, "gate.weight": 2},
        "alpha_pattern": {".*down_proj": 3},
    },
    "the weight of a layer": {**EXPERTS, "target_parameters": ["q_proj.weight", "down_proj"]},
    "one layer by its path": {**EXPERTS, "target_parameters": ["model.layers.1.mlp.experts.down_proj"]},
    "layers and exclusions have no say": {
        "target_modules": ["q_proj", "v_proj"],
        "target_parameters": ["gate_up_proj"],
        "exclude_modules": ["v_proj", "experts"],
        "layers_to_transform": [0],
    },
}


def configs():
    moe = {**TINY, "num_key_value_heads": 1, "num_experts_per_tok": 2}
    qwen = {"head_dim": 8, "num_experts": 4, "moe_intermediate_size": 12}
    return {
        "mixtral": ("MixtralForCausalLM", transformers.MixtralConfig(**moe, num_local_experts=3)),
        "qwen3_moe": ("Qwen3MoeForCausalLM", transformers.Qwen3MoeConfig(**moe, **qwen)),
    }


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("moe")


@functools.cache
def twins(kind: str, root: Path, scan: bool = False) -> Twins:
    name, config = configs()[kind]
    from_pretrained = functools.partial(FlaxAutoModelForCausalLM.from_pretrained, scan_layers=scan)
    pair = language_twins(root / f"{kind}-{scan}", name, config, SimpleNamespace(from_pretrained=from_pretrained))
    return dataclasses.replace(pair, layouts={r".*experts\.(gate_up_proj|down_proj)": "bio"})


def assert_same_files(theirs: Path, ours: Path) -> None:
    first, second = (load_file(folder / WEIGHTS) for folder in (theirs, ours))
    assert first.keys() == second.keys()
    for key, tensor in first.items():
        assert (tensor.dtype, tensor.shape, tensor.tobytes()) == (
            second[key].dtype,
            second[key].shape,
            second[key].tobytes(),
        )
    first, second = (json.loads((folder / CONFIG).read_text()) for folder in (theirs, ours))
    assert first == second


RUNS = [*(("mixtral", False, case) for case in CASES)]
RUNS += [("mixtral", True, "all and a module"), ("qwen3_moe", False, "experts"), ("qwen3_moe", True, "experts")]


@pytest.mark.parametrize(("kind", "scan", "case"), RUNS)
def test_both_ways(kind, scan, case, root, tmp_path):
    """PEFT's file computes the same here and is written back byte for byte; ours loads there, every key of it."""
    pair, settings = twins(kind, root, scan), CASES[case]
    model = from_torch(pair, settings, tmp_path / "theirs")
    wrapped = load_pretrained(pair.params, tmp_path / "theirs", layouts=pair.layouts)
    assert_same_outputs(pair, wrapped, model)
    save_pretrained(wrapped, tmp_path / "again", layouts=pair.layouts)
    assert_same_files(tmp_path / "theirs", tmp_path / "again")

    wrapped = from_jax(pair, settings, tmp_path / "ours")
    assert load_file(tmp_path / "ours" / WEIGHTS).keys() == load_file(tmp_path / "theirs" / WEIGHTS).keys()
    model = quietly(peft.PeftModel.from_pretrained, copy.deepcopy(pair.torch_model), tmp_path / "ours")
    assert_same_outputs(pair, wrapped, model)
    assert verify(tmp_path / "ours", pair.torch_model).torch
    assert verify(tmp_path / "theirs").modules == len(load_file(tmp_path / "theirs" / WEIGHTS)) // 2


CONVERTED = {
    "all-linear": {"r": 2, "target_modules": "all-linear"},
    "names of before": {"r": 2, "target_modules": ["w1", "w2", "w3", "gate", "q_proj"], "lora_alpha": 3},
    "regex": {"r": 2, "target_modules": r".*\.(gate|q_proj)"},
}


@pytest.mark.parametrize("settings", CONVERTED.values(), ids=CONVERTED)
def test_targets_that_peft_turns_into_parameters(settings, root, tmp_path):
    """PEFT rewrites the config for such a model when it makes the adapter; what it then saves is read."""
    pair = twins("mixtral", root)
    model = from_torch(pair, copy.deepcopy(settings), tmp_path / "theirs")
    assert json.loads((tmp_path / "theirs" / CONFIG).read_text())["target_parameters"]
    wrapped = load_pretrained(pair.params, tmp_path / "theirs", layouts=pair.layouts)
    assert_same_outputs(pair, wrapped, model)
    save_pretrained(wrapped, tmp_path / "again", layouts=pair.layouts)
    assert_same_files(tmp_path / "theirs", tmp_path / "again")


def test_names_of_parameters_in_target_modules(root, tmp_path):
    """Here they may be named there as well; the file says it as PEFT wants it."""
    pair = twins("mixtral", root)
    settings = {"r": 2, "target_modules": ["gate_up_proj", "down_proj", "q_proj"]}
    wrapped = from_jax(pair, settings, tmp_path)
    written = json.loads((tmp_path / CONFIG).read_text())
    assert (written["target_modules"], written["target_parameters"]) == (["q_proj"], ["gate_up_proj", "down_proj"])
    model = quietly(peft.PeftModel.from_pretrained, copy.deepcopy(pair.torch_model), tmp_path)
    assert_same_outputs(pair, wrapped, model)
    with pytest.warns(UserWarning, match="lora_dropout=0.1 is written as 0.0"):
        from_jax(pair, {**settings, "lora_dropout": 0.1}, tmp_path / "dropout")


def single_experts(pair: Twins, folder: Path, **settings):
    """The files of an adapter as they were before the experts were stacked."""
    rng, tensors = np.random.default_rng(0), {}
    shapes = {"w1": (24, 16), "w3": (24, 16), "w2": (16, 24)}
    names = [name for name in settings["target_modules"] if name in shapes]
    modules = [(f"experts.{e}.{name}", *shapes[name]) for e in range(3) for name in names]
    for layer in range(2):
        for name, out, wide in [*modules, ("gate", 3, 16)]:
            prefix = f"base_model.model.model.layers.{layer}.block_sparse_moe.{name}"
            tensors[f"{prefix}.lora_A.weight"] = rng.normal(size=(2, wide)).astype(np.float32)
            tensors[f"{prefix}.lora_B.weight"] = 0.3 * rng.normal(size=(out, 2)).astype(np.float32)
    folder.mkdir()
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, **settings}
    (folder / CONFIG).write_text(json.dumps(config))
    return tensors


def test_single_experts(root, tmp_path):
    """An adapter of before, as PEFT converts it."""
    pair = twins("mixtral", root)
    single_experts(pair, tmp_path / "old", target_modules=["w1", "w2", "w3", "block_sparse_moe.gate"])
    model = quietly(peft.PeftModel.from_pretrained, copy.deepcopy(pair.torch_model), tmp_path / "old")
    wrapped = load_pretrained(pair.params, tmp_path / "old", layouts=pair.layouts)
    assert_same_outputs(pair, wrapped, model)
    save_pretrained(wrapped, tmp_path / "new", layouts=pair.layouts)
    model = quietly(peft.PeftModel.from_pretrained, copy.deepcopy(pair.torch_model), tmp_path / "new")
    assert_same_outputs(pair, wrapped, model)


def test_single_experts_that_peft_reads_otherwise_or_not_at_all(root, tmp_path):
    """With rslora the scaling stays what it was; a gate without up projection is no matter; dropout has no effect."""
    pair = twins("mixtral", root)
    tensors = single_experts(pair, tmp_path / "old", target_modules=["w1", "gate"], use_rslora=True, lora_dropout=0.1)
    with pytest.warns(UserWarning, match="lora_dropout=0.1 is read as 0.0"):
        wrapped = load_pretrained(pair.params, tmp_path / "old", layouts=pair.layouts)
    change = jpeft.merge(wrapped)["model"]["layers"]["1"]["mlp"]["experts"]["gate_up_proj"][2]
    change -= pair.params["model"]["layers"]["1"]["mlp"]["experts"]["gate_up_proj"][2]
    key = "base_model.model.model.layers.1.block_sparse_moe.experts.2.w1.lora_{}.weight"
    want = (tensors[key.format("B")] @ tensors[key.format("A")]).T * 3 / np.sqrt(2)
    np.testing.assert_allclose(change, np.concatenate([want, np.zeros_like(want)], axis=1), atol=1e-5)
    del tensors[key.format("A")]
    save_file(tensors, tmp_path / "old" / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="are missing or of other shapes"):
        load_pretrained(pair.params, tmp_path / "old", layouts=pair.layouts)


def test_what_has_no_place_in_a_file():
    root = {"latents": np.ones((2, 3), np.float32), "w": {"kernel": np.ones((3, 3), np.float32)}}
    wrapped = jpeft.wrap(root, jpeft.LoraConfig(r=1, target_parameters=["latents"]))
    with pytest.raises(ValueError, match="a parameter of the model itself, which PEFT cannot adapt"):
        save_pretrained(wrapped, "unused")
    several = {"m": {"first": np.ones((2, 3), np.float32), "second": np.ones((2, 3), np.float32)}}
    wrapped = jpeft.wrap(several, jpeft.LoraConfig(r=1, target_parameters=["first", "second"]))
    with pytest.raises(ValueError, match="in which order PEFT does it is known for gate_up_proj"):
        save_pretrained(wrapped, "unused")
