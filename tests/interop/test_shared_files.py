"""Files of VB-LoRA's largest logits, and the matrices that PEFT draws of a seed."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jpeft
from jpeft_interop import get_peft_model_state_dict, load_pretrained, save_pretrained, set_peft_model_state_dict
from tests.stacked_trees import randomised

WEIGHTS = "adapter_model.safetensors"
KEY = "base_model.model.q.vblora_logits_A"


def short(vectors=9, topk=3, **settings):
    params = {"q": {"kernel": jax.random.normal(jax.random.key(0), (4, 6))}}
    config = jpeft.VBLoRAConfig(
        r=2,
        num_vectors=vectors,
        vector_length=2,
        topk=topk,
        save_only_topk_weights=True,
        target_modules=["q"],
        **settings,
    )
    return randomised(jpeft.wrap(params, config))


def compute(wrapped):
    return jpeft.lift(lambda params, x: x @ params["q"]["kernel"])(wrapped, jnp.eye(4))


@pytest.mark.parametrize(
    ("vectors", "dtype"), [(255, "uint8"), (256, "int16"), (2**15 - 1, "int16"), (2**15, "int32")], ids=str
)
def test_a_short_file_computes_the_same(vectors, dtype, tmp_path):
    wrapped = short(vectors)
    save_pretrained(wrapped, tmp_path)
    held = load_file(tmp_path / WEIGHTS)
    assert {key: (str(array.dtype), array.shape) for key, array in held.items()} == {
        f"{KEY}_topk_indices": (dtype, (2, 2, 3)),
        f"{KEY}_topk_weights": ("float32", (2, 2, 2)),
        f"{KEY[:-1]}B_topk_indices": (dtype, (3, 2, 3)),
        f"{KEY[:-1]}B_topk_weights": ("float32", (3, 2, 2)),
        "base_model.vblora_vector_bank": ("float32", (vectors, 2)),
    }
    loaded = load_pretrained(wrapped.base, tmp_path)
    np.testing.assert_allclose(compute(loaded), compute(wrapped), rtol=1e-5, atol=1e-6)
    assert not any(jax.tree.leaves(jpeft.trainable_mask(loaded).adapters))


def test_a_short_file_is_not_opened_for_training(tmp_path):
    wrapped = short()
    save_pretrained(wrapped, tmp_path)
    message = (
        r"adapter_model.safetensors holds the 3 largest logits of each piece alone \(save_only_topk_weights=True\), "
        r"and the others are lost; expected is_trainable=False"
    )
    with pytest.raises(ValueError, match=message):
        load_pretrained(wrapped.base, tmp_path, is_trainable=True)
    with pytest.raises(ValueError, match="state_dict holds the 3 largest logits of each piece alone"):
        set_peft_model_state_dict(wrapped, get_peft_model_state_dict(wrapped))


def test_weights_that_rounding_makes_more_than_one(tmp_path):
    """PEFT takes the logarithm of the negative rest, and computes NaN."""
    wrapped = short()
    save_pretrained(wrapped, tmp_path)
    held = load_file(tmp_path / WEIGHTS)
    held[f"{KEY}_topk_weights"][:] = np.float32([0.6, 0.4 + 1e-7])
    save_file(held, tmp_path / WEIGHTS, {"format": "pt"})
    assert (1 - held[f"{KEY}_topk_weights"].sum(-1) < 0).all()
    assert bool(jnp.isfinite(compute(load_pretrained(wrapped.base, tmp_path))).all())


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda held: held.pop(f"{KEY}_topk_weights"), "has places (2, 2, 3) and weights none; expected (..., 3) and"),
        (
            lambda held: held.update({f"{KEY}_topk_weights": np.zeros((2, 2, 1), np.float32)}),
            "has places (2, 2, 3) and weights (2, 2, 1); expected (..., 3) and (..., 2), as topk=3",
        ),
        (
            lambda held: held.update({f"{KEY}_topk_indices": np.full((2, 2, 3), 9, np.uint8)}),
            "vblora_logits_A_topk_indices has places from 9 to 9; expected those of a bank of num_vectors=9",
        ),
    ],
    ids=("lost", "misshapen", "beyond the bank"),
)
def test_damaged_short_files(spoil, message, tmp_path):
    wrapped = short()
    save_pretrained(wrapped, tmp_path)
    held = load_file(tmp_path / WEIGHTS)
    spoil(held)
    save_file(held, tmp_path / WEIGHTS, {"format": "pt"})
    with pytest.raises(ValueError, match=re.escape(message)):
        load_pretrained(wrapped.base, tmp_path)


@pytest.mark.parametrize(
    "settings",
    [
        ("VeraConfig", {"r": 5}),
        ("PveraConfig", {"r": 5}),
        ("RandLoraConfig", {"r": 7}),
        ("RandLoraConfig", {"r": 7, "sparse": True}),
        ("RandLoraConfig", {"r": 7, "very_sparse": True}),
    ],
    ids=str,
)
@pytest.mark.parametrize("seed", (0, 12345))
def test_fresh_adapters_are_those_of_peft(settings, seed, tmp_path):
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    sizes = {"up": (30, 65), "down": (65, 20)}
    layers = torch.nn.ModuleDict({name: torch.nn.Linear(*size) for name, size in sizes.items()})
    name, fields = settings
    fields = {**fields, "target_modules": list(sizes), "projection_prng_key": seed}
    peft.get_peft_model(layers, getattr(peft, name)(**fields)).save_pretrained(tmp_path)
    theirs = load_file_as_float32(torch, tmp_path / WEIGHTS)
    params = {name: {"kernel": jnp.zeros(size)} for name, size in sizes.items()}
    ours = get_peft_model_state_dict(jpeft.wrap(params, getattr(jpeft, name)(**fields)))
    assert ours.keys() == theirs.keys()
    for key, array in ours.items():
        np.testing.assert_array_equal(array, theirs[key], err_msg=key)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["projection_prng_key"] == seed


def load_file_as_float32(torch, path):
    from safetensors.torch import load_file as load_tensors

    return {key: tensor.to(torch.float32).numpy() for key, tensor in load_tensors(path).items()}
