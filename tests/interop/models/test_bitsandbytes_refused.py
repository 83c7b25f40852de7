"""Checkpoints of bitsandbytes that are damaged, or of another method: refused by the name of the tensor or the key."""

import json

import numpy as np
import pytest

from jpeft_interop.models import FlaxAutoModelForCausalLM
from jpeft_interop.models._bitsandbytes import without_quantization
from jpeft_interop.models._layers import Linear
from tests.interop.models.bitsandbytes_oracle import INT8, quantised, random_weight, read, store, torch, toy


def state(**changes):
    """Metadata with other entries; those that are None go."""

    def change(parts):
        (key,) = (name for name in parts if "quant_state" in name)
        said = {**json.loads(bytes(parts[key].tolist())), **changes}
        text = json.dumps({name: value for name, value in said.items() if value is not None})
        parts[key] = torch.tensor(list(text.encode()), dtype=torch.uint8)

    return change


def without(name):
    return lambda parts: parts.pop(name)


def put(name, value):
    return lambda parts: parts.__setitem__(name, value)


def longer(name):
    return lambda parts: parts.__setitem__(name, torch.cat([parts[name], parts[name][:1]]))


def renamed(old, new):
    return lambda parts: parts.__setitem__(new, parts.pop(old))


STATE = "weight.quant_state.bitsandbytes__nf4"
DESCRIBES = rf"a\.{STATE} does not describe a weight, as it says "
BROKEN = {
    "no codes": (without("weight"), rf"holds a\.{STATE}, but not the codes, a\.weight: copy it again"),
    "no scales": (
        without("weight.absmax"),
        r"a\.weight is quantised in nf4, but the checkpoint lacks a\.weight\.absm",
    ),
    "no table": (without("weight.quant_map"), r"the checkpoint lacks a\.weight\.quant_map"),
    "no scales of scales": (without("weight.nested_absmax"), r"the checkpoint lacks a\.weight\.nested_absmax: copy"),
    "no table of scales": (without("weight.nested_quant_map"), r"the checkpoint lacks a\.weight\.nested_quant_map"),
    "no text": (put(STATE, torch.tensor([255, 1], dtype=torch.uint8)), rf"a\.{STATE} is no JSON text: "),
    "half a text": (put(STATE, torch.tensor(list(b'{"quant'), dtype=torch.uint8)), rf"{STATE} is no JSON text: Unterm"),
    "a list": (put(STATE, torch.tensor(list(b"[1]"), dtype=torch.uint8)), DESCRIBES + r"\{'quant_type': None, 'blocks"),
    "no shape": (
        state(shape=None),
        DESCRIBES + r"\{'shape': None\}; expected quant_type \(nf4 or fp4\), blocks",
    ),
    "three axes": (state(shape=[2, 3, 64]), DESCRIBES + r"\{'shape': \[2, 3, 64\]\}.*shape \[out, in\]"),
    "no blocks": (state(blocksize=0), DESCRIBES + r"\{'blocksize': 0\}"),
    "a type that is none": (
        state(dtype="float8"),
        DESCRIBES + r"\{'dtype': 'float8'\}.*\(float32 or float16 or bf",
    ),
    "no offset of scales": (
        state(nested_offset=None),
        DESCRIBES + r"\{'nested_offset': None\}.*nested_blocksize",
    ),
    "another kind": (state(quant_type="fp4"), rf"a\.{STATE} says quant_type 'fp4', its name 'nf4'"),
    "an unknown kind": (
        renamed(STATE, "weight.quant_state.bitsandbytes__af4"),
        r"bitsandbytes__af4: codes of the kind 'af4' are not read; expected one of nf4, fp4",
    ),
    "another shape": (
        state(shape=[6, 128]),
        r"a\.weight holds 192 values; expected 384 bytes, two codes in each, for \(6, 128\): copy it again",
    ),
    "other blocks": (
        state(blocksize=32),
        r"a\.weight\.absmax holds 6 values; expected 12 scales, one for each 32 of \(6, 64\)",
    ),
    "other blocks of scales": (
        state(nested_blocksize=2),
        r"a\.weight\.nested_absmax holds 1 values; expected 3 scales, one for each 2: copy",
    ),
    "one scale too many": (longer("weight.absmax"), r"a\.weight\.absmax holds 7 values; expected 6 scales"),
    "a long table": (longer("weight.quant_map"), r"a\.weight\.quant_map holds 17 values; expected 16 values of nf4"),
    "a long table of scales": (longer("weight.nested_quant_map"), r"nested_quant_map holds 257 values; expected 256 v"),
    "another table": (
        put("weight.quant_map", torch.linspace(-1, 1, 16)),
        r"a\.weight\.quant_map is 0\.208 away from the table of nf4; expected less than 0\.001, as bitsandbytes",
    ),
    "scales that are not quantised": (
        put("weight.absmax", torch.ones(6)),
        r"a\.weight\.absmax is stored as F32, expected U8 for a quantised weight",
    ),
    "codes of another type": (
        put("weight", torch.zeros(48, dtype=torch.int32)),
        r"a\.weight is stored as I32, expected U8 or I8 or F16 or BF16 or F32 or F64 for a quantised weight",
    ),
}


@pytest.mark.parametrize("change, text", BROKEN.values(), ids=BROKEN)
def test_four_bits_that_do_not_fit(tmp_path, change, text):
    parts, _ = quantised(random_weight(6, 64, 0), "nf4", nested=True)
    change(parts)
    store(tmp_path, {"a": parts})
    with pytest.raises(ValueError, match=text):
        read(tmp_path, toy(a=Linear(64, 6, bias=False)))


BROKEN_8BIT = {
    "no codes": (without("weight"), r"holds a\.SCB, but not the codes, a\.weight: copy it again"),
    "other codes": (
        put("weight", torch.zeros(6, 40)),
        r"a\.weight is stored as F32, expected I8 for a quantised",
    ),
    "one axis": (
        put("weight", torch.zeros(6, dtype=torch.int8)),
        r"8 bits and has the shape \(6,\), expected \(o",
    ),
    "one scale too many": (longer("SCB"), r"a\.SCB holds 7 values; expected 6 scales, one for each row of \(6, 40\)"),
    "integer scales": (
        put("SCB", torch.ones(6, dtype=torch.uint8)),
        r"a\.SCB is stored as U8, expected F64 or F32",
    ),
    "the order of a GPU": (
        put("weight_format", torch.tensor(2, dtype=torch.uint8)),
        r"a\.weight_format is 2: the codes lie in the order of some GPU; expected 0, row by row\. Loading",
    ),
    "nothing": (
        without("SCB"),
        r"quantization_config of bitsandbytes, but no weight .* is quantised: .*'\.SCB'",
    ),
}


@pytest.mark.parametrize("change, text", BROKEN_8BIT.values(), ids=BROKEN_8BIT)
def test_eight_bits_that_do_not_fit(tmp_path, change, text):
    parts, _ = quantised(random_weight(6, 40, 0), "int8")
    change(parts)
    store(tmp_path, {"a": parts})
    with pytest.raises(ValueError, match=text):
        read(tmp_path, toy(a=Linear(40, 6, bias=False)), settings=INT8)


def test_a_weight_of_another_shape_than_the_parameter(tmp_path):
    store(tmp_path, {"a": quantised(random_weight(6, 64, 0), "nf4")[0]})
    with pytest.raises(ValueError, match=r"misshapen \(1\): a\.weight \(6, 64\), expected \(6, 32\)"):
        read(tmp_path, toy(a=Linear(32, 6, bias=False)))


def test_weights_that_are_kept_in_16_bits_are_read_as_they_are(tmp_path):
    store(tmp_path, {"a": {"weight": random_weight(6, 40, 0)}})
    settings = INT8 | {"llm_int8_has_fp16_weight": True}
    leaf = read(tmp_path, toy(a=Linear(40, 6, bias=False)), settings=settings)["a.kernel"]
    np.testing.assert_array_equal(leaf, random_weight(6, 40, 0).T)


CONFIGS = {
    "gptq": ({"quant_method": "gptq", "bits": 4}, r"has quant_method 'gptq', expected 'bitsandbytes', the one that is"),
    "awq": ({"quant_method": "awq"}, r"quant_method 'awq'.*give the folder of the model before it was quantised"),
    "nothing": ({}, "has quant_method None, expected 'bitsandbytes'"),
    "an unknown setting": (
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_rotation": "hadamard"},
        r"quantization_config holds what may change .* bnb_4bit_rotation='hadamard' \(not known of bitsandbytes\)",
    ),
}


@pytest.mark.parametrize("settings, text", CONFIGS.values(), ids=CONFIGS)
def test_other_ways_of_quantising_are_refused(tmp_path, settings, text):
    config = {"model_type": "llama", "quantization_config": settings}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=text):
        FlaxAutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_config_without_the_name_of_the_method():
    settings = {"load_in_8bit": True, "llm_int8_threshold": 6.0, "llm_int8_skip_modules": None, "new": None}
    assert without_quantization({"a": 1, "quantization_config": settings}) == ({"a": 1}, settings)
    assert without_quantization({"a": 1}) == ({"a": 1}, None)


def test_what_is_quantised_already_is_not_quantised_again(tmp_path):
    config = {"model_type": "llama", "quantization_config": {"quant_method": "bitsandbytes", **INT8}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="is quantised already, as its quantization_config says; expected"):
        FlaxAutoModelForCausalLM.from_pretrained(tmp_path, quantize="nf4")
