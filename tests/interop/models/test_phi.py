"""Phi-3 alone: its rotary settings under their older names, and what is refused."""

import importlib
import json

import jax.numpy as jnp
import numpy as np
import pytest

from jpeft_interop.models import FlaxAutoModelForCausalLM
from jpeft_interop.models._rotary import read_rope, rotary_tables

pytest.importorskip("torch")
pytest.importorskip("transformers")
oracle = importlib.import_module("tests.interop.models.torch_oracle")
cases = importlib.import_module("tests.interop.models.cases_phi_olmo")

FACTORS = {"short_factor": [1.0, 2.0], "long_factor": [3.0, 5.0]}
LONGROPE = {"rope_type": "longrope", "rope_theta": 100.0, "original_max_position_embeddings": 8, **FACTORS}


def rope(settings, **rest):
    return read_rope({"rope_parameters": settings, **rest}, head_dim=4, max_positions=64)


@pytest.mark.parametrize("name", ["su", "yarn", "longrope"])
def test_rope_of_transformers_4(name, tmp_path):
    theirs = oracle.random_model("Phi3ForCausalLM", cases.longrope())
    ids = np.random.default_rng(0).integers(3, 40, (2, 20))
    folder = oracle.saved(theirs, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    stated = config.pop("rope_parameters")
    for key in ("rope_theta", "partial_rotary_factor"):
        config[key] = stated.pop(key)
    factors = {key: stated[key] for key in ("short_factor", "long_factor")}
    (folder / "config.json").write_text(json.dumps({**config, "rope_scaling": {"type": name, **factors}}))
    ours = FlaxAutoModelForCausalLM.from_pretrained(folder)
    oracle.assert_close(
        oracle.jax_output(ours, "logits", input_ids=ids), oracle.torch_output(theirs, "logits", input_ids=ids)
    )


@pytest.mark.parametrize("length, factor", [(8, "short_factor"), (9, "long_factor")])
def test_the_length_of_the_call_chooses_the_factors(length, factor):
    scaling = np.sqrt(1 + np.log(64 / 8) / np.log(8))
    positions = jnp.arange(length)[None]
    cos, sin = rotary_tables(rope(LONGROPE), positions, jnp.float32)
    angles = np.arange(length)[:, None] * (np.array([1.0, 0.1]) / FACTORS[factor])
    np.testing.assert_allclose(cos[0, :, 0, :2], scaling * np.cos(angles), atol=1e-5)
    np.testing.assert_allclose(sin[0, :, 0, 2:], scaling * np.sin(angles), atol=1e-5)


@pytest.mark.parametrize(
    "settings, scaling",
    [({"factor": 0.5}, 1.0), ({"factor": 64.0}, np.sqrt(3.0)), ({"factor": 64.0, "attention_factor": 1.5}, 1.5)],
)
def test_scaling(settings, scaling):
    cos, _ = rotary_tables(rope({**LONGROPE, **settings}), jnp.zeros((1, 1), jnp.int32), jnp.float32)
    np.testing.assert_allclose(cos, scaling, rtol=1e-6)


def test_the_trained_length_beside_the_rotary_settings_counts_for_more():
    assert rope(LONGROPE, original_max_position_embeddings=16).original_max_position_embeddings == 16


@pytest.mark.parametrize("name", ["short_factor", "long_factor"])
def test_factors_of_a_wrong_number_are_refused(name):
    with pytest.raises(ValueError, match=rf"3 numbers as {name}; expected 2, one a pair"):
        rope({**LONGROPE, name: [1.0, 2.0, 3.0]})


def test_absent_factors_are_refused():
    with pytest.raises(ValueError, match=r"'longrope' must give short_factor"):
        rope({key: value for key, value in LONGROPE.items() if key != "short_factor"})


@pytest.mark.parametrize(
    "key, value, shown",
    [
        ("attention_bias", True, "attention_bias=True"),
        ("mlp_bias", True, "mlp_bias=True"),
        ("rope_scaling", {"type": "new", "factor": 2.0}, "rope_type='new'"),
        ("rope_scaling", {"type": "longrope", "a_new_factor": 2.0, **FACTORS}, "a_new_factor=2.0"),
    ],
)
def test_what_is_not_implemented_is_refused(key, value, shown):
    with pytest.raises(ValueError, match=shown):
        FlaxAutoModelForCausalLM.from_config({"model_type": "phi3", key: value}, abstract=True)
