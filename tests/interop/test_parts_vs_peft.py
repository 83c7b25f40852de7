"""What the parity laws of tests/interop/methods do not show of LN tuning and trainable tokens, against PyTorch PEFT."""

import copy
import dataclasses
import json

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from safetensors.numpy import load_file  # noqa: E402

import jpeft  # noqa: E402
from jpeft_interop import get_layer_status, get_peft_model, load_pretrained, save_pretrained  # noqa: E402
from jpeft_interop.models import FlaxAutoModelForCausalLM  # noqa: E402
from tests.harness import random_like  # noqa: E402
from tests.interop.methods import parity, rows_parts  # noqa: E402
from tests.interop.methods.parity import Row  # noqa: E402
from tests.interop.trajectories import quietly  # noqa: E402

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

TOKENS_LEFT_OUT = Row("", "TrainableTokensConfig", {"token_indices": [3, 1]}, "tied")
MODULES = Row("", "LNTuningConfig", {"target_modules": ["block"]}, "normed")
ALL_LINEAR = Row("", "LNTuningConfig", {"target_modules": "all-linear"}, "normed")


@pytest.mark.parametrize("row", [TOKENS_LEFT_OUT, MODULES, ALL_LINEAR], ids=["no target", "container", "all-linear"])
def test_files_both_ways(row, tmp_path):
    """Targets that PEFT finds itself are written as it writes them; so is the copy of a module of modules."""
    model = parity.torch_adapter(row)
    quietly(model.save_pretrained, tmp_path / "theirs")
    wrapped = parity.read(row, tmp_path / "theirs")
    parity.assert_close(parity.jax_outputs(row, wrapped), parity.torch_outputs(row, model), "forward")
    save_pretrained(wrapped, tmp_path / "again")
    ours = parity.jax_adapter(row)
    save_pretrained(ours, tmp_path / "ours")
    theirs, again, own = (load_file(tmp_path / name / WEIGHTS) for name in ("theirs", "again", "ours"))
    assert theirs.keys() == again.keys() == own.keys()
    assert all(np.array_equal(tensor, again[key]) for key, tensor in theirs.items())
    configs = [json.loads((tmp_path / name / CONFIG).read_text()) for name in ("theirs", "again", "ours")]
    assert configs[0] == configs[1] == {**configs[2], "auto_mapping": configs[0]["auto_mapping"]}
    loaded = quietly(
        peft.PeftModel.from_pretrained, copy.deepcopy(parity.twin(row.twin).torch_model), tmp_path / "ours"
    )
    parity.assert_close(parity.jax_outputs(row, ours), parity.torch_outputs(row, loaded.eval()), "to torch")


@pytest.mark.parametrize("row", [rows_parts.ROWS[2], rows_parts.ROWS[4]], ids=lambda row: row.name)
def test_status(row):
    pair = parity.twin(row.twin)
    model = parity.torch_adapter(row)
    ours = get_peft_model((pair.apply, pair.params), parity.config_of(jpeft, row))
    expected = [(s.name, s.module_type, s.requires_grad) for s in peft.get_layer_status(model)]
    assert sorted((s.name, s.module_type, s.requires_grad) for s in get_layer_status(ours)) == sorted(expected)
    assert ours.get_nb_trainable_parameters() == model.get_nb_trainable_parameters()


def test_a_task_does_not_add_a_head_to_a_method_that_saves_none(tmp_path):
    params = {"wte": {"embedding": np.ones((5, 4), np.float32)}, "score": {"kernel": np.ones((4, 2), np.float32)}}
    config = jpeft.TrainableTokensConfig(token_indices=[2], target_modules=["wte"], task_type="SEQ_CLS")
    save_pretrained(jpeft.wrap(params, config), tmp_path)
    assert list(load_file(tmp_path / WEIGHTS)) == ["base_model.model.wte.trainable_tokens_delta"]
    assert load_pretrained(params, tmp_path).adapters["default"].replaced == {}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A tied Llama of PyTorch, and the same here with its layers stacked."""
    sizes = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.LlamaConfig(**sizes, intermediate_size=24, num_key_value_heads=1, tie_word_embeddings=True)
    model, folder = transformers.LlamaForCausalLM(config).eval(), tmp_path_factory.mktemp("llama")
    model.save_pretrained(folder)
    return model, FlaxAutoModelForCausalLM.from_pretrained(folder, scan_layers=True)


@pytest.mark.parametrize(
    ("kind", "settings"), [("LNTuningConfig", {}), ("TrainableTokensConfig", {"token_indices": [4, 9]})]
)
def test_default_targets_of_stacked_layers_and_tied_heads(kind, settings, llama, tmp_path):
    model, ours = llama
    wrapped = get_peft_model(ours, getattr(jpeft, kind)(**settings, task_type="CAUSAL_LM")).params
    wrapped = dataclasses.replace(wrapped, adapters=random_like(wrapped.adapters, 3))
    save_pretrained(wrapped, tmp_path)
    loaded = quietly(peft.PeftModel.from_pretrained, copy.deepcopy(model), tmp_path).eval()
    ids = np.random.default_rng(0).integers(3, 40, (2, 7))
    with torch.no_grad():
        expected, before = (each(torch.tensor(ids)).logits.numpy() for each in (loaded, model))
    assert np.abs(expected - before).max() > 1e-2
    lifted = jax.jit(jpeft.lift(ours.apply))
    for params in (wrapped, load_pretrained(ours.params, tmp_path)):
        parity.assert_close(np.asarray(lifted(params, input_ids=ids).logits), expected, "logits")
