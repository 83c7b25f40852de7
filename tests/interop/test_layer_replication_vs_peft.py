"""`layer_replication` against PyTorch PEFT: one base, more layers, adapters by the new numbers."""

import copy
import dataclasses

import numpy as np
import pytest
from safetensors.numpy import load_file

import jpeft
from jpeft_interop import load_pretrained, save_pretrained
from jpeft_interop.models import FlaxAutoModelForCausalLM, FlaxAutoModelForMaskedLM, replicate_layers

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from tests.interop.test_round_trip import (  # noqa: E402
    TINY,
    WEIGHTS,
    assert_same_outputs,
    from_jax,
    from_torch,
    language_twins,
    quietly,
)

RANGES = [[0, 2], [0, 1], [1, 2]]


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_both_ways(kind, tmp_path):
    if kind == "llama":
        config = transformers.LlamaConfig(**TINY, num_key_value_heads=1)
        name, auto, target = "LlamaForCausalLM", FlaxAutoModelForCausalLM, "q_proj"
    else:
        config = transformers.BertConfig(**TINY)
        name, auto, target = "BertForMaskedLM", FlaxAutoModelForMaskedLM, "query"
    pair = language_twins(tmp_path / "base", name, config, auto)
    model = auto.from_pretrained(tmp_path / "base")
    deeper = replicate_layers(model, RANGES)

    def apply(params, ids, mask):
        logits = deeper.apply(params, input_ids=ids, attention_mask=mask).logits
        return logits[np.nonzero(np.asarray(pair.inputs[1]))]

    deep = dataclasses.replace(pair, params=deeper.params, apply=apply)
    settings = {"r": 2, "target_modules": [target], "layer_replication": RANGES}
    theirs = from_torch(pair, copy.deepcopy(settings), tmp_path / "theirs")
    with pytest.raises(ValueError, match=r"for a model of 4 layers, .* build it with .*replicate_layers"):
        load_pretrained(model.params, tmp_path / "theirs")
    wrapped = load_pretrained(deeper.params, tmp_path / "theirs")
    assert len(wrapped.adapters["default"].sites) == 4
    assert_same_outputs(deep, wrapped, theirs)
    save_pretrained(wrapped, tmp_path / "again")
    assert (tmp_path / "theirs" / WEIGHTS).read_bytes() == (tmp_path / "again" / WEIGHTS).read_bytes()

    wrapped = from_jax(deep, settings, tmp_path / "ours")
    assert load_file(tmp_path / "ours" / WEIGHTS).keys() == load_file(tmp_path / "theirs" / WEIGHTS).keys()
    loaded = quietly(peft.PeftModel.from_pretrained, copy.deepcopy(pair.torch_model), tmp_path / "ours")
    assert_same_outputs(deep, wrapped, loaded)


def test_what_cannot_be_replicated():
    sizes = {"vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    raw = {"model_type": "llama", **sizes, "intermediate_size": 8}
    model = FlaxAutoModelForCausalLM.from_config(raw, abstract=True)
    with pytest.raises(ValueError, match=r"the range \[1, 3\]; expected .* <= 2, the number of layers"):
        replicate_layers(model, [[1, 3]])
    with pytest.raises(ValueError, match="layer_replication has no ranges"):
        replicate_layers(model, [])
    with pytest.raises(ValueError, match="stacked in one array"):
        replicate_layers(FlaxAutoModelForCausalLM.from_config(raw, abstract=True, scan_layers=True), [[0, 2]])
    broken = dataclasses.replace(model, params={"layers": {"first": {"kernel": np.ones((2, 2))}}})
    with pytest.raises(ValueError, match="in one list, but the model has: none"):
        replicate_layers(broken, [[0, 1]])
    deeper = replicate_layers(model, [[1, 2], [0, 2]])
    assert deeper.config.num_hidden_layers == len(deeper.config.layer_types) == 3
    assert [deeper.params["model"]["layers"][n] is model.params["model"]["layers"][o] for n, o in ("01", "10", "21")]
    assert isinstance(jpeft.unwrap(jpeft.wrap(deeper.params, jpeft.LoraConfig(target_modules=["q_proj"]))), dict)
