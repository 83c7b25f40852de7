"""What is kept beside PEFT's files: written, bound to the weights, read back, missed, and whole after a crash."""

import dataclasses
import hashlib
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

import jpeft
import jpeft_interop
from jpeft_interop import load_pretrained, save_pretrained
from jpeft_interop._extra_file import STATE_NAME, write_kept
from tests.harness import random_like

WEIGHTS = "adapter_model.safetensors"
KEPT = ("psoft_A", "psoft_B")
SHAPES = {"q": {"kernel": (6, 4)}, "v": {"kernel": (4, 5)}}


def base():
    return random_like(SHAPES, 7)


def adapted(seed=1, params=None, **settings):
    """An adapter that was trained where every singular vector has the other sign."""
    config = jpeft.PsoftConfig(r=2, target_modules=["q", "v"], **settings)
    wrapped = jpeft.wrap(base() if params is None else params, config)
    adapter = wrapped.adapters["default"]
    drawn = random_like(adapter.weights, seed)
    weights = {
        path: {name: -array if name in KEPT else drawn[path][name] for name, array in arrays.items()}
        for path, arrays in adapter.weights.items()
    }
    return dataclasses.replace(wrapped, adapters={"default": dataclasses.replace(adapter, weights=weights)})


def weights_of(wrapped):
    return wrapped.adapters["default"].weights


def assert_same(ours, theirs, sign=1):
    for path, arrays in ours.items():
        for name, array in arrays.items():
            np.testing.assert_array_equal(array, (sign if name in KEPT else 1) * theirs[path][name])


def test_arrays_that_other_machines_make_otherwise_come_back(tmp_path):
    wrapped = adapted()
    save_pretrained(wrapped, tmp_path)
    assert sorted(load_file(tmp_path / STATE_NAME)) == [
        f"base_model.model.{module}.{name}" for module in "qv" for name in KEPT
    ]
    with safe_open(tmp_path / STATE_NAME, framework="np") as file:
        digest = hashlib.sha256((tmp_path / WEIGHTS).read_bytes()).hexdigest()
        assert file.metadata()["adapter_model_sha256"] == digest
    assert not [key for key in load_file(tmp_path / WEIGHTS) if "psoft_A" in key or "psoft_B" in key]
    loaded = load_pretrained(wrapped.base, tmp_path)
    assert_same(weights_of(loaded), weights_of(wrapped))


def test_layers_of_a_stack_are_kept_one_by_one(tmp_path):
    params = random_like({"layers": {"0:3": {"q": {"kernel": (3, 6, 4)}}}}, 7)
    config = jpeft.PsoftConfig(r=2, target_modules=["q"])
    wrapped = jpeft.wrap(params, config)
    own = {name: -array if name in KEPT else array for name, array in weights_of(wrapped)["layers.0:3.q"].items()}
    adapter = dataclasses.replace(wrapped.adapters["default"], weights={"layers.0:3.q": own})
    wrapped = dataclasses.replace(wrapped, adapters={"default": adapter})
    save_pretrained(wrapped, tmp_path)
    assert "base_model.model.layers.2.q.psoft_A" in load_file(tmp_path / STATE_NAME)
    assert_same(weights_of(load_pretrained(params, tmp_path)), weights_of(wrapped))


def test_without_the_file_they_are_made_anew(tmp_path):
    wrapped = adapted()
    save_pretrained(wrapped, tmp_path)
    (tmp_path / STATE_NAME).unlink()
    with pytest.warns(UserWarning, match=rf"there is no {STATE_NAME} beside .*{WEIGHTS}, so that psoft_A, psoft_B are"):
        loaded = load_pretrained(wrapped.base, tmp_path)
    for path, arrays in weights_of(loaded).items():
        for name, array in arrays.items():
            np.testing.assert_allclose(array, (-1 if name in KEPT else 1) * weights_of(wrapped)[path][name], atol=1e-6)


@pytest.mark.parametrize("other", ["weights", "modules"])
def test_a_file_of_another_adapter_does_not_count(tmp_path, other):
    save_pretrained(adapted(), tmp_path)
    if other == "weights":
        save_pretrained(adapted(seed=2), tmp_path / "other")
        os.replace(tmp_path / "other" / WEIGHTS, tmp_path / WEIGHTS)
    else:
        held = load_file(tmp_path / STATE_NAME)
        del held["base_model.model.v.psoft_B"]
        write_kept(tmp_path / STATE_NAME, held, tmp_path / WEIGHTS)
    with pytest.warns(UserWarning, match=f"{STATE_NAME} belongs to other weights, so that psoft_A, psoft_B are made"):
        loaded = load_pretrained(base(), tmp_path)
    fresh = jpeft.wrap(base(), loaded.adapters["default"].config)
    np.testing.assert_allclose(weights_of(loaded)["q"]["psoft_A"], weights_of(fresh)["q"]["psoft_A"], atol=1e-6)


def test_a_file_that_does_not_fit_the_base_is_refused(tmp_path):
    save_pretrained(adapted(), tmp_path)
    held = load_file(tmp_path / STATE_NAME)
    held["base_model.model.q.psoft_A"] = np.zeros((2, 7), np.float32)
    write_kept(tmp_path / STATE_NAME, held, tmp_path / WEIGHTS)
    with pytest.raises(
        ValueError, match=r"does not fit the parameters: base_model.model.q.psoft_A \(2, 7\), not \(2, 6"
    ):
        load_pretrained(base(), tmp_path)


def test_a_damaged_file_is_refused_when_it_is_read_and_replaced_when_another_is_written(tmp_path):
    save_pretrained(adapted(), tmp_path)
    (tmp_path / STATE_NAME).write_bytes(b"\0" * 20)
    with pytest.raises(ValueError, match=f"{STATE_NAME} .20 bytes. is truncated, damaged"):
        load_pretrained(base(), tmp_path)
    save_pretrained(adapted(), tmp_path)
    assert_same(weights_of(load_pretrained(base(), tmp_path)), weights_of(adapted()))


@pytest.mark.parametrize("damaged", [False, True])
def test_an_adapter_that_keeps_nothing_leaves_nothing_behind(tmp_path, damaged):
    save_pretrained(adapted(), tmp_path)
    if damaged:
        (tmp_path / STATE_NAME).write_bytes(b"\0" * 20)
    save_pretrained(jpeft.wrap(base(), jpeft.LoraConfig(r=2, target_modules=["q"])), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "adapter_config.json", WEIGHTS]


class Killed(BaseException):
    """What a killed process does: nothing that it left undone is done by anyone."""


@pytest.mark.parametrize("settings", [{}, {"psoft_alpha": 7}], ids=["same config", "other config"])
def test_a_killed_save_leaves_the_old_or_the_new_with_what_is_theirs(tmp_path, monkeypatch, settings):
    """Without a warning, which would be an error here: what is found always belongs to the weights."""
    new, states = adapted(seed=2, **settings), []
    for wrapped in (adapted(seed=1), new):
        states.append([np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(weights_of(wrapped))])
    calls, point, ended = 0, 0, False
    owners = (
        (os, "replace"),
        (os, "fsync"),
        (Path, "unlink"),
        (Path, "write_text"),
        (jpeft_interop._files, "save_file"),
    )

    def mortal(original):
        def operation(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls >= point:
                raise Killed
            return original(*args, **kwargs)

        return operation

    found = []
    while not ended:
        point, calls, folder = point + 1, 0, tmp_path / f"{point}"
        save_pretrained(adapted(seed=1), folder)
        with monkeypatch.context() as patch:
            for owner, name in owners:
                patch.setattr(owner, name, mortal(getattr(owner, name)))
            try:
                save_pretrained(new, folder)
                ended = True
            except Killed:
                pass
        read = load_pretrained(jax.tree.map(jnp.asarray, new.base), folder)
        found.append(states.index([np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(weights_of(read))]))
        save_pretrained(adapted(seed=1), folder)
        assert not list(folder.glob(".*"))
    assert found == sorted(found) and {0, 1} == set(found) and point > 10


@pytest.mark.parametrize("kept", [True, False])
def test_of_the_hub_it_is_fetched_for_methods_that_keep_something_alone(tmp_path, monkeypatch, kept):
    errors = pytest.importorskip("huggingface_hub.errors")
    asked = []

    class Hub:
        @staticmethod
        def hf_hub_download(name, filename, **options):
            asked.append(filename)
            if not (tmp_path / filename).is_file():
                raise errors.LocalEntryNotFoundError(f"no {filename}")
            return str(tmp_path / filename)

    monkeypatch.setattr(jpeft_interop._hub, "hub_library", lambda name: Hub)
    wrapped = adapted()
    save_pretrained(wrapped, tmp_path)
    if kept:
        assert_same(weights_of(load_pretrained(base(), "someone/psoft")), weights_of(wrapped))
    else:
        (tmp_path / STATE_NAME).unlink()
        with pytest.warns(UserWarning, match=f"there is no {STATE_NAME}"):
            load_pretrained(base(), "someone/psoft")
    assert asked == ["adapter_config.json", STATE_NAME, WEIGHTS]
    asked.clear()
    save_pretrained(jpeft.wrap(base(), jpeft.LoraConfig(r=2, target_modules=["q"])), tmp_path)
    load_pretrained(base(), "someone/lora")
    assert asked == ["adapter_config.json", WEIGHTS]
