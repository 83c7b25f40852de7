"""Weights that bitsandbytes quantised, in 4 bits (nf4, fp4) or 8 (LLM.int8), as `transformers` writes them.

Beside `weight`, the bytes of the codes, a file holds for 4 bits `weight.absmax`, a scale for each block of the weight
read row by row, and `weight.quant_state.bitsandbytes__nf4`, a JSON text; with double quantisation `weight.absmax` is
codes of 8 bits, which `weight.nested_quant_map` and `weight.nested_absmax` explain. For 8 bits it holds `SCB`, the
largest magnitude of each row, which stands for the code 127.
"""

import json
from collections.abc import Collection, Mapping
from dataclasses import replace
from math import prod
from typing import Any

import numpy as np

from ._config import refuse
from ._leaves import listed
from ._quantised_tensor import TABLES, Nested, QuantisedTensor
from ._tensors import READABLE, Tensor, everything

STATE, SCALES_8BIT, LAYOUT_8BIT = ".quant_state.bitsandbytes__", "SCB", "weight_format"
COMPANIONS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")

TABLE_ERROR = 1e-3
"""How far the table in a file may be from it: older releases wrote theirs in fewer digits, and none reads it."""

STORAGES = ("U8", "I8", "F16", "BF16", "F32", "F64")
"""Types of the tensors that may hold the bytes of codes of 4 bits."""

DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
"""Names of types in bitsandbytes' metadata, and in safetensors."""

CONFIG_KEYS = frozenset(
    """
    quant_method load_in_4bit load_in_8bit _load_in_4bit _load_in_8bit bnb_4bit_compute_dtype bnb_4bit_quant_storage
    bnb_4bit_quant_type bnb_4bit_use_double_quant llm_int8_enable_fp32_cpu_offload llm_int8_has_fp16_weight
    llm_int8_skip_modules llm_int8_threshold
    """.split()
)


def _counts(values: list[Any]) -> bool:
    return all(isinstance(value, int) and value > 0 for value in values)


STATE_KEYS = {
    "quant_type": lambda value: value in TABLES,
    "blocksize": lambda value: _counts([value]),
    "dtype": lambda value: value in DTYPES,
    "shape": lambda value: isinstance(value, list) and len(value) == 2 and _counts(value),
}
"""What the metadata of a weight of 4 bits must say."""

NESTED_KEYS = {
    "nested_blocksize": lambda value: _counts([value]),
    "nested_dtype": lambda value: value in DTYPES,
    "nested_offset": lambda value: isinstance(value, float) and np.isfinite(value),
}
"""And if its scales are quantised."""


def without_quantization(raw: Mapping[str, Any]) -> tuple[dict[str, Any], Mapping[str, Any] | None]:
    """A config, and what its `quantization_config` says; None if it has none.

    Raises ValueError for another method than bitsandbytes, and for settings that are not known.
    """
    rest = {key: value for key, value in raw.items() if key != "quantization_config"}
    given = raw.get("quantization_config")
    if given is None:
        return rest, None
    either = given.get("load_in_4bit") or given.get("load_in_8bit")
    method = given.get("quant_method", "bitsandbytes" if either else None)
    if method != "bitsandbytes":
        raise ValueError(
            f"config.json's quantization_config has quant_method {method!r}, expected 'bitsandbytes', the one that is "
            "read here: give the folder of the model before it was quantised, or of one that PyTorch dequantised"
        )
    unknown = {key: value for key, value in given.items() if key not in CONFIG_KEYS and value is not None}
    if unknown:
        refuse("quantization_config", unknown, "not known of bitsandbytes", "remove it if it has no effect")
    return rest, given


def gathered(
    tensors: Mapping[str, Tensor], raw: Mapping[str, Any], settings: Mapping[str, Any]
) -> dict[str, Tensor | QuantisedTensor]:
    """The tensors of a checkpoint, of which those that bitsandbytes split each weight into are one again.

    `raw` and `settings`: the config, and its quantization_config. Raises ValueError, which names the weight, where
    they lack something or do not fit one another, and where nothing is quantised.
    """
    found: dict[str, Tensor | QuantisedTensor] = dict(tensors)
    for key in [key for key in tensors if STATE in key]:
        name, _, kind = key.partition(STATE)
        found[name] = _four_bits(name, kind, tensors)
        for part in (key, *(f"{name}.{companion}" for companion in COMPANIONS)):
            found.pop(part, None)
    dtype = _dense_dtype(tensors, raw)
    for key in [key for key in tensors if key.rpartition(".")[2] == SCALES_8BIT]:
        module = key.removesuffix(SCALES_8BIT)
        found[f"{module}weight"] = _eight_bits(module, tensors, dtype)
        for part in (key, f"{module}{LAYOUT_8BIT}"):
            found.pop(part, None)
    if not (settings.get("llm_int8_has_fp16_weight") or any(isinstance(t, QuantisedTensor) for t in found.values())):
        raise ValueError(
            "config.json has a quantization_config of bitsandbytes, but no weight of the checkpoint is quantised: "
            f"expected tensors that end in '{STATE}nf4', '{STATE}fp4' or '.{SCALES_8BIT}'; remove quantization_config "
            'to read it as it is, and give quantize="nf4" or "int8" to have it quantised'
        )
    return found


def _four_bits(name: str, kind: str, tensors: Mapping[str, Tensor]) -> QuantisedTensor:
    state = _state(name, kind, tensors)
    required = ("absmax", "quant_map", *(("nested_absmax", "nested_quant_map") if "nested_offset" in state else ()))
    if absent := [f"{name}.{part}" for part in required if f"{name}.{part}" not in tensors]:
        raise ValueError(f"{name} is quantised in {kind}, but the checkpoint lacks {listed(absent)}: copy it again")
    shape, blocksize = tuple(state["shape"]), state["blocksize"]
    blocks = -(-prod(shape) // blocksize)
    codes, absmax = tensors[name], tensors[f"{name}.absmax"]
    _check_types(name, codes, STORAGES)
    codes = replace(_flat(codes), shape=(prod(codes.shape) * codes.itemsize,), dtype="U8")
    _check_size(name, f"bytes, two codes in each, for {shape}", codes, -(-prod(shape) // 2))
    _check_size(f"{name}.absmax", f"scales, one for each {blocksize} of {shape}", absmax, blocks)
    _check_table(name, kind, tensors[f"{name}.quant_map"])
    nested = None
    if "nested_offset" in state:
        outer, table = tensors[f"{name}.nested_absmax"], tensors[f"{name}.nested_quant_map"]
        size = state["nested_blocksize"]
        _check_size(f"{name}.nested_absmax", f"scales, one for each {size}", outer, -(-blocks // size))
        _check_size(f"{name}.nested_quant_map", "values, one for each code", table, 256)
        _check_types(f"{name}.nested_quant_map", table, READABLE)
        _check_types(f"{name}.nested_absmax", outer, READABLE)
        nested = Nested(_flat(table), _flat(outer), size, state["nested_offset"])
    _check_types(f"{name}.absmax", absmax, READABLE if nested is None else ("U8",))
    return QuantisedTensor(shape, DTYPES[state["dtype"]], kind, codes, _flat(absmax), blocksize, nested)


def _state(name: str, kind: str, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The metadata of a weight of 4 bits."""
    key = f"{name}{STATE}{kind}"
    if kind not in TABLES:
        raise ValueError(f"{key}: codes of the kind {kind!r} are not read; expected one of {', '.join(TABLES)}")
    if name not in tensors:
        raise ValueError(f"the checkpoint holds {key}, but not the codes, {name}: copy it again")
    text = tensors[key].read(everything(tensors[key])).tobytes()
    try:
        state = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{key} is no JSON text: {error}; copy the checkpoint again") from error
    state = state if isinstance(state, dict) else {}
    checks = STATE_KEYS | (NESTED_KEYS if state.keys() & NESTED_KEYS.keys() else {})
    if wrong := {part: state.get(part) for part, fits in checks.items() if part not in state or not fits(state[part])}:
        raise ValueError(
            f"{key} does not describe a weight, as it says {wrong}; expected quant_type ({' or '.join(TABLES)}), "
            f"blocksize, dtype ({' or '.join(DTYPES)}), shape [out, in] and, of quantised scales, "
            f"{', '.join(NESTED_KEYS)}: copy the checkpoint again"
        )
    if state["quant_type"] != kind:
        raise ValueError(f"{key} says quant_type {state['quant_type']!r}, its name {kind!r}: copy the checkpoint again")
    return state


def _eight_bits(module: str, tensors: Mapping[str, Tensor], dtype: str) -> QuantisedTensor:
    name, absmax, layout = f"{module}weight", tensors[module + SCALES_8BIT], tensors.get(module + LAYOUT_8BIT)
    if name not in tensors:
        raise ValueError(f"the checkpoint holds {module}{SCALES_8BIT}, but not the codes, {name}: copy it again")
    codes = tensors[name]
    _check_types(name, codes, ("I8",))
    _check_types(module + SCALES_8BIT, absmax, READABLE)
    if len(codes.shape) != 2:
        raise ValueError(f"{name} is quantised in 8 bits and has the shape {codes.shape}, expected (out, in)")
    _check_size(module + SCALES_8BIT, f"scales, one for each row of {codes.shape}", absmax, codes.shape[0])
    if layout is not None and (number := int(layout.read(everything(layout)).reshape(-1)[0])):
        raise ValueError(
            f"{module}{LAYOUT_8BIT} is {number}: the codes lie in the order of some GPU; expected 0, row by row. "
            "Loading and saving it with a bitsandbytes of today rewrites it"
        )
    return QuantisedTensor(codes.shape, dtype, "int8", codes, _flat(absmax), codes.shape[1])


def _dense_dtype(tensors: Mapping[str, Tensor], raw: Mapping[str, Any]) -> str:
    """The type of the weights before 8 bits, which bitsandbytes does not tell: the model's, else the others'."""
    named = DTYPES.get(str(raw.get("dtype") or raw.get("torch_dtype")))
    if named is not None:
        return named
    given = {
        tensor.dtype for name, tensor in tensors.items() if tensor.dtype in DTYPES.values() and name.endswith("weight")
    }
    return given.pop() if len(given) == 1 else "F32"


def _flat(tensor: Tensor) -> Tensor:
    return replace(tensor, shape=(prod(tensor.shape),))


def _check_types(name: str, tensor: Tensor, types: Collection[str]) -> None:
    if tensor.dtype not in types:
        raise ValueError(f"{name} is stored as {tensor.dtype}, expected {' or '.join(types)} for a quantised weight")


def _check_size(name: str, what: str, tensor: Tensor, expected: int) -> None:
    if prod(tensor.shape) != expected:
        raise ValueError(f"{name} holds {prod(tensor.shape)} values; expected {expected} {what}: copy it again")


def _check_table(name: str, kind: str, tensor: Tensor) -> None:
    _check_types(f"{name}.quant_map", tensor, READABLE)
    _check_size(f"{name}.quant_map", f"values of {kind}", tensor, len(TABLES[kind]))
    table = tensor.read(everything(tensor)).astype(np.float32).reshape(-1)
    furthest = np.abs(table - TABLES[kind]).max()
    if not furthest < TABLE_ERROR:
        raise ValueError(
            f"{name}.quant_map is {furthest:.3g} away from the table of {kind}; expected less than {TABLE_ERROR}, as "
            "bitsandbytes goes by its own table and not by the file's"
        )
