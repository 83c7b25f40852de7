"""`trainable_token_indices` and `ensure_weight_tying` against PyTorch PEFT: files both ways, and outputs."""

import copy
import dataclasses
import functools
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

import jpeft
from jpeft_interop import load_pretrained, save_pretrained, verify
from jpeft_interop.models import FlaxAutoModelForCausalLM

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from tests.interop.test_round_trip import (  # noqa: E402
    CONFIG,
    TINY,
    TOLERANCE,
    WEIGHTS,
    Twins,
    from_torch,
    language_twins,
    quietly,
)

ROWS = [7, 3, 39, 12, 5]
DELTA = "model.embed_tokens.token_adapter.trainable_tokens_delta"

CASES = {
    "list": ({"trainable_token_indices": ROWS}, {DELTA}),
    "by name": ({"trainable_token_indices": {"embed_tokens": ROWS}}, {DELTA}),
    "table and head alike": ({"trainable_token_indices": {"embed_tokens": ROWS, "lm_head": ROWS}}, {DELTA}),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("tables")


@functools.cache
def twins(tied: bool, root: Path) -> Twins:
    config = transformers.LlamaConfig(**TINY, num_key_value_heads=1, tie_word_embeddings=tied)
    return language_twins(root / f"tied-{tied}", "LlamaForCausalLM", config, FlaxAutoModelForCausalLM)


def from_jax(pair: Twins, settings, folder: Path) -> jpeft.PeftParams:
    """Write an adapter of random values here, rows of tables included; return the parameters."""
    wrapped = jpeft.wrap(pair.params, jpeft.LoraConfig(**settings))
    adapter = wrapped.adapters["default"]
    leaves, structure = jax.tree.flatten((adapter.weights, adapter.replaced, adapter.rows))
    drawn = [0.3 * jax.random.normal(jax.random.key(index), leaf.shape) for index, leaf in enumerate(leaves)]
    weights, replaced, rows = jax.tree.unflatten(structure, drawn)
    adapter = dataclasses.replace(adapter, weights=weights, replaced=replaced, rows=rows)
    wrapped = dataclasses.replace(wrapped, adapters={"default": adapter})
    save_pretrained(wrapped, folder)
    return wrapped


def assert_same_outputs(pair: Twins, wrapped: jpeft.PeftParams, model, *, merged: bool = True) -> None:
    expected, before = pair.torch_output(model.eval()), pair.torch_output(pair.torch_model)
    scale = np.abs(expected).max()
    assert np.abs(expected - before).max() > 1e-2 * scale
    assert (
        np.abs(np.asarray(jax.jit(jpeft.lift(pair.apply))(wrapped, *pair.inputs)) - expected).max() <= TOLERANCE * scale
    )
    if merged:
        assert np.abs(np.asarray(pair.apply(jpeft.merge(wrapped), *pair.inputs)) - expected).max() <= TOLERANCE * scale


def assert_same_files(theirs: Path, ours: Path) -> None:
    first, second = (load_file(folder / WEIGHTS) for folder in (theirs, ours))
    assert first.keys() == second.keys()
    for key, tensor in first.items():
        np.testing.assert_array_equal(tensor, second[key], err_msg=key)
    first, second = (json.loads((folder / CONFIG).read_text()) for folder in (theirs, ours))
    assert first == second


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(("settings", "keys"), CASES.values(), ids=CASES)
def test_tokens_both_ways(settings, keys, tied, root, tmp_path):
    """The rows replace those of the table, in a tied output product too; beside LoRA; one tensor in the file."""
    pair, settings = twins(tied, root), {"r": 2, "target_modules": ["q_proj"], **settings}
    model = from_torch(pair, settings, tmp_path / "theirs")
    own = {key for key in load_file(tmp_path / "theirs" / WEIGHTS) if "q_proj" not in key}
    if not tied and "lm_head" in settings["trainable_token_indices"]:
        keys = keys | {"lm_head.token_adapter.trainable_tokens_delta"}
    assert own == {f"base_model.model.{key}" for key in keys}
    wrapped = load_pretrained(pair.params, tmp_path / "theirs")
    assert_same_outputs(pair, wrapped, model)
    save_pretrained(wrapped, tmp_path / "again")
    assert_same_files(tmp_path / "theirs", tmp_path / "again")

    wrapped = from_jax(pair, settings, tmp_path / "ours")
    assert load_file(tmp_path / "ours" / WEIGHTS).keys() == load_file(tmp_path / "theirs" / WEIGHTS).keys()
    model = quietly(peft.PeftModel.from_pretrained, copy.deepcopy(pair.torch_model), tmp_path / "ours")
    assert_same_outputs(pair, wrapped, model)
    assert verify(tmp_path / "ours", pair.torch_model).torch


TIED = {
    "table": {"target_modules": ["q_proj", "embed_tokens"]},
    "table by path": {"target_modules": ["model.embed_tokens", "v_proj"], "use_rslora": True},
    "regex": {"target_modules": ".*(embed_tokens|q_proj)"},
    "saved in full": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
}


@pytest.mark.parametrize("settings", TIED.values(), ids=TIED)
def test_ensure_weight_tying(settings, root, tmp_path):
    """What changes the table changes the output product; merged, too. The file has the output layer's tensors."""
    pair, settings = twins(True, root), {"r": 2, "ensure_weight_tying": True, **copy.deepcopy(settings)}
    model = from_torch(pair, copy.deepcopy(settings), tmp_path / "theirs")
    assert any(".lm_head." in key for key in load_file(tmp_path / "theirs" / WEIGHTS))
    wrapped = load_pretrained(pair.params, tmp_path / "theirs")
    assert_same_outputs(pair, wrapped, model)
    save_pretrained(wrapped, tmp_path / "again")
    assert_same_files(tmp_path / "theirs", tmp_path / "again")

    wrapped = from_jax(pair, settings, tmp_path / "ours")
    assert load_file(tmp_path / "ours" / WEIGHTS).keys() == load_file(tmp_path / "theirs" / WEIGHTS).keys()
    model = quietly(peft.PeftModel.from_pretrained, copy.deepcopy(pair.torch_model), tmp_path / "ours")
    assert_same_outputs(pair, wrapped, model)
    assert verify(tmp_path / "ours", pair.torch_model).torch
