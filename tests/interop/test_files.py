"""The two files of an adapter without PyTorch: what is in them, what is refused, and what a crash leaves."""

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jpeft
import jpeft_interop
from jpeft_interop import _pair as pair, load_adapter, load_config, load_pretrained, save_pretrained, verify
from jpeft_interop._fields import _DIFFERENCES
from jpeft_interop._files import read_tensors

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def base(dtype: Any = jnp.float32, layers: int = 2) -> dict[str, Any]:
    """A small tree with Hugging Face names; every leaf has values of its own."""

    def draw(seed: int, *shape: int) -> jax.Array:
        return jax.random.normal(jax.random.key(seed), shape, dtype)

    blocks = {
        str(index): {
            "q_proj": {"kernel": draw(10 * index, 4, 6), "bias": draw(10 * index + 1, 6)},
            "v_proj": {"kernel": draw(10 * index + 2, 4, 3), "bias": draw(10 * index + 3, 3)},
            "norm": {"scale": draw(10 * index + 4, 4), "bias": draw(10 * index + 5, 4)},
        }
        for index in range(layers)
    }
    head = {"kernel": draw(100, 6, 2), "bias": draw(101, 2)}
    return {"layers": blocks, "embed_tokens": {"embedding": draw(102, 7, 4)}, "head": head}


def randomised(wrapped: jpeft.PeftParams, seed: int = 7) -> jpeft.PeftParams:
    """The same adapters with random values in every array, so that nothing is zero by chance or by design."""
    leaves, structure = jax.tree.flatten({n: (a.weights, a.replaced) for n, a in wrapped.adapters.items()})
    drawn = [jax.random.normal(jax.random.key(seed + i), leaf.shape, leaf.dtype) for i, leaf in enumerate(leaves)]
    values = jax.tree.unflatten(structure, drawn)
    adapters = {
        name: dataclasses.replace(adapter, weights=values[name][0], replaced=values[name][1])
        for name, adapter in wrapped.adapters.items()
    }
    return dataclasses.replace(wrapped, adapters=adapters)


def adapted(params: Any = None, seed: int = 7, dtype: Any = jnp.float32, **settings: Any) -> jpeft.PeftParams:
    config = jpeft.LoraConfig(**{"r": 2, "target_modules": ["q_proj"], **settings})
    return randomised(jpeft.wrap(base() if params is None else params, config, dtype=dtype), seed)


def keys(directory: Path) -> list[str]:
    return sorted(key.removeprefix("base_model.model.") for key in load_file(directory / WEIGHTS))


def edit_config(directory: Path, **fields: Any) -> None:
    path = directory / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def edit_tensors(directory: Path, change: Any) -> None:
    tensors = load_file(directory / WEIGHTS)
    change(tensors)
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})


def assert_same_arrays(first: Any, second: Any) -> None:
    assert jax.tree.structure(first) == jax.tree.structure(second)
    for one, other in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        assert one.dtype == other.dtype and np.asarray(one).tobytes() == np.asarray(other).tobytes()


# ---- what is written ------------------------------------------------------------------------------------------------


def test_keys_shapes_and_orientation(tmp_path):
    wrapped = adapted(target_modules=["q_proj", "embed_tokens"], modules_to_save=["head", "norm"], bias="lora_only")
    save_pretrained(wrapped, tmp_path)
    assert keys(tmp_path) == sorted(
        [f"layers.{i}.q_proj.{name}" for i in (0, 1) for name in ("lora_A.weight", "lora_B.weight", "base_layer.bias")]
        + [f"layers.{i}.norm.{name}" for i in (0, 1) for name in ("weight", "bias")]
        + ["embed_tokens.lora_embedding_A", "embed_tokens.lora_embedding_B", "embed_tokens.base_layer.weight"]
        + ["head.weight", "head.bias"]
    )
    tensors, adapter = load_file(tmp_path / WEIGHTS), wrapped.adapters["default"]
    of = lambda key: tensors[f"base_model.model.{key}"]  # noqa: E731
    assert of("layers.0.q_proj.lora_A.weight").shape == (2, 4) and of("layers.0.q_proj.lora_B.weight").shape == (6, 2)
    assert of("embed_tokens.lora_embedding_A").shape == (2, 7) and of("embed_tokens.lora_embedding_B").shape == (4, 2)
    np.testing.assert_array_equal(of("head.weight"), np.asarray(adapter.replaced["head.kernel"]).T)
    np.testing.assert_array_equal(of("layers.1.norm.weight"), adapter.replaced["layers.1.norm.scale"])
    np.testing.assert_array_equal(of("embed_tokens.base_layer.weight"), wrapped.base["embed_tokens"]["embedding"])


def test_convolutions_and_bias_of_everything(tmp_path):
    params = {
        "conv1": {"kernel": jax.random.normal(jax.random.key(0), (3, 4, 6)), "bias": jnp.ones(6)},
        "conv2": {"kernel": jax.random.normal(jax.random.key(1), (3, 2, 4, 6)), "bias": jnp.ones(6)},
        "head": {"kernel": jax.random.normal(jax.random.key(2), (3, 2, 6, 5)), "bias": jnp.ones(5)},
    }
    config = jpeft.LoraConfig(r=2, target_modules=["conv1", "conv2"], modules_to_save=["head"], bias="all")
    wrapped = randomised(jpeft.wrap(params, config, layouts={"conv1": ".io"}))
    save_pretrained(wrapped, tmp_path)
    tensors = {
        key.removeprefix("base_model.model."): value.shape for key, value in load_file(tmp_path / WEIGHTS).items()
    }
    assert tensors == {
        "conv1.lora_A.weight": (2, 4, 3),
        "conv1.lora_B.weight": (6, 2, 1),
        "conv1.base_layer.bias": (6,),
        "conv2.lora_A.weight": (2, 4, 3, 2),
        "conv2.lora_B.weight": (6, 2, 1, 1),
        "conv2.base_layer.bias": (6,),
        "head.weight": (5, 6, 3, 2),
        "head.bias": (5,),
        "head.original_module.bias": (5,),
    }
    loaded = load_pretrained(params, tmp_path, layouts={"conv1": ".io"})
    assert_same_arrays(loaded.adapters["default"].replaced, wrapped.adapters["default"].replaced)


def test_a_kernel_of_unknown_layout_is_named(tmp_path):
    params = {**base(), "conv": {"kernel": jnp.ones((3, 4, 6))}}
    wrapped = adapted(params, modules_to_save=["conv"])
    with pytest.raises(ValueError, match=r"the layout of 'conv.kernel' is unknown: its shape is \(3, 4, 6\)"):
        save_pretrained(wrapped, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    save_pretrained(wrapped, tmp_path / "new", layouts={"conv": ".io"})
    loaded = load_pretrained(params, tmp_path / "new", layouts={"conv": ".io"})
    assert_same_arrays(loaded.adapters["default"].replaced, wrapped.adapters["default"].replaced)


def test_stacks_are_refused_by_name(tmp_path):
    params = {"layers": {"q_proj": {"kernel": jnp.ones((2, 4, 6))}, "norm": {"bias": jnp.ones((2, 4))}}}
    wrapped = jpeft.wrap(params, jpeft.LoraConfig(r=2, target_modules=["q_proj"]), layouts={".*q_proj": "bio"})
    with pytest.raises(ValueError, match=r"hold a stack .*: layers.q_proj; expected a family"):
        save_pretrained(wrapped, tmp_path / "new")
    params = {**params, "head": {"kernel": jnp.ones((4, 2))}}
    config = jpeft.LoraConfig(r=2, target_modules=["head"], bias="all")
    with pytest.raises(ValueError, match=r"hold a stack .*: layers.norm.bias; expected a family"):
        save_pretrained(jpeft.wrap(params, config), tmp_path / "new")


def test_transposed_views_are_not_scrambled(tmp_path):
    wrapped = adapted()
    adapter = wrapped.adapters["default"]
    views = jax.tree.map(lambda leaf: np.asarray(leaf).T.copy().T, adapter.weights)
    assert not views["layers.0.q_proj"]["lora_A"].flags.c_contiguous
    changed = dataclasses.replace(wrapped, adapters={"default": dataclasses.replace(adapter, weights=views)})
    save_pretrained(changed, tmp_path)
    assert_same_arrays(load_pretrained(base(), tmp_path).adapters["default"].weights, adapter.weights)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_dtypes_and_bytes_survive(tmp_path, dtype):
    params = base(dtype)
    wrapped = adapted(params, dtype=dtype, modules_to_save=["head"], bias="all")
    save_pretrained(wrapped, tmp_path / "first")
    loaded = load_pretrained(params, tmp_path / "first", is_trainable=True)
    assert loaded.base is params
    assert_same_arrays(loaded.adapters["default"].weights, wrapped.adapters["default"].weights)
    assert_same_arrays(loaded.adapters["default"].replaced, wrapped.adapters["default"].replaced)
    assert_same_arrays(loaded.adapters["default"].scaling, wrapped.adapters["default"].scaling)
    save_pretrained(loaded, tmp_path / "second")
    for name in (CONFIG, WEIGHTS):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def test_other_adapters_go_into_subfolders(tmp_path):
    wrapped = jpeft.wrap(adapted(), jpeft.LoraConfig(r=3, target_modules=["v_proj"]), adapter_name="other")
    save_pretrained(wrapped, tmp_path / "all")
    assert (tmp_path / "all" / CONFIG).exists() and (tmp_path / "all" / "other" / CONFIG).exists()
    save_pretrained(wrapped, tmp_path / "one", selected_adapters=["other"])
    assert sorted(os.listdir(tmp_path / "one")) == ["README.md", "other"]
    with pytest.raises(FileNotFoundError, match=r"no adapter_config.json.*adapters are in its subfolders: other"):
        load_pretrained(base(), tmp_path / "one")
    assert list(load_adapter(adapted(), tmp_path / "one" / "other", "second").adapters) == ["default", "second"]
    with pytest.raises(ValueError, match=r"selected_adapters is \['nosuch'\]; .* among: 'default', 'other'"):
        save_pretrained(wrapped, tmp_path, selected_adapters=["nosuch"])


@pytest.mark.parametrize("name", ["..", ".", "", "a/b", "a\\b", "c:", " x", "README.md", "Adapter_Config.json", "a\nb"])
def test_names_that_are_no_folders_are_refused(tmp_path, name):
    adapter = adapted().adapters["default"]
    wrapped = jpeft.PeftParams(base=base(), adapters={"default": adapter, name: adapter}, active=("default",))
    with pytest.raises(ValueError, match="cannot be the name of a folder of its own"):
        save_pretrained(wrapped, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_the_card_is_short_and_not_overwritten(tmp_path):
    save_pretrained(adapted(), tmp_path, base_model_name_or_path='some/"base"')
    card = (tmp_path / "README.md").read_text()
    assert 'library_name: peft\nbase_model: "some/\\"base\\""\n' in card and '- "lora"' in card
    (tmp_path / "README.md").write_text("mine")
    (tmp_path / "notes").mkdir()
    save_pretrained(adapted(seed=9), tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine" and (tmp_path / "notes").is_dir()


def test_what_cannot_be_saved_is_refused(tmp_path):
    with pytest.raises(TypeError, match="expected the PeftParams that jpeft.wrap returns, not a dict"):
        save_pretrained(base(), tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="which is a file; expected a folder"):
        save_pretrained(adapted(), tmp_path / "file")
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), base())
    abstract = jpeft.wrap(shapes, jpeft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="adapter 'default' has 4 abstract arrays and no values to save"):
        save_pretrained(abstract, tmp_path / "new")
    with pytest.raises(ValueError, match="family is 'nosuch'; expected one of: hf$"):
        save_pretrained(adapted(), tmp_path / "new", family="nosuch")
    clash = {"a.kernel": jnp.ones((4, 6)), "a": {"weight": jnp.ones((4, 6))}}
    with pytest.raises(ValueError, match=r"several arrays would have the same key .*: base_model.model.a.weight"):
        save_pretrained(
            jpeft.wrap({**base(), **clash}, jpeft.LoraConfig(target_modules=["q_proj"], modules_to_save=["a"])),
            tmp_path / "new",
        )
    assert not (tmp_path / "new").exists()


def test_all_linear_is_written_as_names(tmp_path):
    save_pretrained(adapted(target_modules="all-linear"), tmp_path / "few")
    names = ["head", *(f"layers.{i}.{m}" for i in (0, 1) for m in ("q_proj", "v_proj"))]
    assert json.loads((tmp_path / "few" / CONFIG).read_text())["target_modules"] == names
    params = base(layers=12)
    wrapped = adapted(params, target_modules="all-linear", exclude_modules=["layers.3.q_proj"])
    save_pretrained(wrapped, tmp_path / "many")
    written = load_config(tmp_path / "many").target_modules
    assert len(written) < 20 and {"head", "v_proj"} <= set(written) and "q_proj" not in written
    loaded = load_pretrained(params, tmp_path / "many")
    assert set(loaded.adapters["default"].sites) == set(wrapped.adapters["default"].sites)


def test_the_head_of_a_task_goes_along(tmp_path):
    params = {**base(), "classifier": {"kernel": jnp.ones((6, 2)), "bias": jnp.arange(2.0)}}
    save_pretrained(adapted(params, task_type="SEQ_CLS"), tmp_path)
    assert load_config(tmp_path).modules_to_save == ("classifier", "score")
    assert {"classifier.weight", "classifier.bias"} <= set(keys(tmp_path))
    loaded = load_pretrained(params, tmp_path)
    np.testing.assert_array_equal(loaded.adapters["default"].replaced["classifier.bias"], [0.0, 1.0])
    edit_config(tmp_path, modules_to_save=None)  # as old versions of PEFT wrote it
    assert_same_arrays(
        load_pretrained(params, tmp_path).adapters["default"].replaced, loaded.adapters["default"].replaced
    )
    assert verify(tmp_path).tensors == 6
    with pytest.raises(
        ValueError, match=r"for task_type='SEQ_CLS' PEFT trains the head in full, .* acts on classifier"
    ):
        save_pretrained(adapted(params, task_type="SEQ_CLS", target_modules=["classifier"]), tmp_path)


# ---- configs --------------------------------------------------------------------------------------------------------

FRESH = {
    "alora_invocation_tokens": None, "alpha_pattern": {}, "arrow_config": None, "auto_mapping": None,
    "base_model_name_or_path": "some/base", "bias": "none", "corda_config": None, "ensure_weight_tying": False,
    "eva_config": None, "exclude_modules": None, "fan_in_fan_out": False, "inference_mode": True,
    "init_lora_weights": True, "kasa_config": None, "layer_replication": None, "layers_pattern": None,
    "layers_to_transform": None, "loftq_config": {}, "lora_alpha": 8, "lora_bias": False, "lora_dropout": 0.0,
    "lora_ga_config": None, "megatron_config": None, "megatron_core": "megatron.core", "modules_to_save": None,
    "monteclora_config": None, "peft_type": "LORA", "peft_version": "0.21.2", "qalora_group_size": 16, "r": 2,
    "rank_pattern": {"layers.0.q_proj": 3}, "revision": None, "target_modules": ["q_proj"], "target_parameters": None,
    "task_type": "CAUSAL_LM", "trainable_token_indices": None, "use_bdlora": None, "use_dora": False,
    "use_qalora": False, "use_rslora": False, "velora_config": None,
}  # fmt: skip


def test_a_fresh_config_is_complete(tmp_path):
    wrapped = adapted(task_type="CAUSAL_LM", rank_pattern={"layers.0.q_proj": 3})
    save_pretrained(wrapped, tmp_path, base_model_name_or_path="some/base")
    text = (tmp_path / CONFIG).read_text()
    assert json.loads(text) == FRESH and text == json.dumps(FRESH, indent=2, sort_keys=True)


def saved_with(tmp_path: Path, **fields: Any) -> dict[str, Any]:
    """Save an adapter, change its config file, load it, save it again: what the second config holds."""
    save_pretrained(adapted(), tmp_path / "first")
    edit_config(tmp_path / "first", **fields)
    save_pretrained(load_pretrained(base(), tmp_path / "first"), tmp_path / "second")
    return json.loads((tmp_path / "second" / CONFIG).read_text())


def test_fields_of_no_consequence_survive(tmp_path):
    fields = {
        "init_lora_weights": "eva",
        "eva_config": {
            **{"rho": 3.0, "tau": 0.99, "use_label_mask": True, "label_mask_value": -100, "whiten": True},
            "adjust_scaling_factors": True,
        },
        "lora_alpha": 3.5,
        "rank_pattern": None,
        "target_parameters": [],
        "megatron_core": "mine",
        "peft_version": "0.18.0",
        "auto_mapping": {"base_model_class": "C", "parent_library": "lib"},
        "revision": "abc",
        "lora_dropout": 0.1,
    }
    written = saved_with(tmp_path, **fields)
    assert {name: written[name] for name in fields} == fields


def test_fields_of_a_newer_version_survive_with_a_warning(tmp_path):
    save_pretrained(adapted(), tmp_path / "first")
    edit_config(tmp_path / "first", newer_field={"a": [1, 2]}, another=None)
    with pytest.warns(
        UserWarning, match=r"has fields that PEFT 0.21.2 does not have.*: another, newer_field; they are"
    ):
        loaded = load_pretrained(base(), tmp_path / "first")
    save_pretrained(loaded, tmp_path / "second")
    second = json.loads((tmp_path / "second" / CONFIG).read_text())
    assert second == json.loads((tmp_path / "first" / CONFIG).read_text())


def test_what_changes_the_mathematics_is_refused_by_name(tmp_path, monkeypatch):
    save_pretrained(adapted(), tmp_path)
    edit_config(tmp_path, new_switch=True)
    neutral = {"new_switch": (None, False)}
    monkeypatch.setitem(_DIFFERENCES, "LORA", {**_DIFFERENCES["LORA"], "neutral": neutral})
    with pytest.raises(ValueError, match=r"is not implemented here: new_switch=True \(expected None"):
        load_pretrained(base(), tmp_path)


@pytest.mark.parametrize("how", ["pissa_niter_4", "corda", "lora_ga", "loftq", "CorDA", "new"])
def test_initialisations_that_the_base_does_not_tell_are_refused(tmp_path, how):
    save_pretrained(adapted(), tmp_path)
    edit_config(tmp_path, init_lora_weights=how)
    with pytest.raises(ValueError, match=f"init_lora_weights is '{how}'.*plain LoRA"):
        load_pretrained(base(), tmp_path)


def test_is_trainable(tmp_path):
    save_pretrained(adapted(), tmp_path)
    frozen, trained = (load_pretrained(base(), tmp_path, is_trainable=train) for train in (False, True))
    assert not any(jax.tree.leaves(jpeft.trainable_mask(frozen)))
    assert sum(jax.tree.leaves(jpeft.trainable_mask(trained))) == 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"adapter_config.json is no JSON file: .*; copy or download it again"),
        ("[]", "holds a JSON list; expected an object"),
        ("{}", "peft_type is None; the methods implemented here are: .*LORA"),
        ('{"peft_type": "NOSUCH"}', "peft_type is 'NOSUCH'; the methods implemented here are: .*LORA"),
        ('{"peft_type": ["LORA"]}', r"peft_type is \['LORA'\]; the methods"),
        ('{"peft_type": "LORA", "r": 0}', "adapter_config.json: r is 0; expected an integer of at least 1"),
        ('{"peft_type": "LORA", "task_type": "DANCE"}', "adapter_config.json: task_type is 'DANCE'"),
    ],
)
def test_configs_that_cannot_be_read(tmp_path, text, message):
    (tmp_path / CONFIG).write_text(text)
    with pytest.raises(ValueError, match=message):
        load_config(tmp_path)


# ---- what does not load ---------------------------------------------------------------------------------------------


def test_absent_files(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(FileNotFoundError, match="holds no adapter_config.json, so it is not the folder of an adapter"):
        load_pretrained(base(), tmp_path)
    with pytest.raises(FileNotFoundError, match=r"there is no folder '.*nosuch', and it cannot be a Hub id"):
        load_pretrained(base(), tmp_path / "nosuch")
    save_pretrained(adapted(), tmp_path)
    (tmp_path / WEIGHTS).unlink()
    with pytest.raises(FileNotFoundError, match="holds adapter_config.json but no adapter_model.safetensors"):
        load_pretrained(base(), tmp_path)
    (tmp_path / "adapter_model.bin").write_bytes(b"\x80\x02")
    with pytest.raises(ValueError, match="weights in adapter_model.bin, a pickle, which can run any code"):
        load_pretrained(base(), tmp_path)


def test_hub_ids(tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    save_pretrained(adapted(), tmp_path)
    monkeypatch.setattr(hub, "hf_hub_download", lambda name, file: str(tmp_path / file))
    assert list(load_pretrained(base(), "owner/name").adapters) == ["default"]
    assert load_config("owner/name").r == 2

    def offline(name, file):
        raise LocalEntryNotFoundError("not in the cache")

    monkeypatch.setattr(hub, "hf_hub_download", offline)
    with pytest.raises(FileNotFoundError, match="'owner/name' is no folder here, and the Hub gave no adapter_config"):
        load_pretrained(base(), "owner/name")

    def config_alone(name, file):
        if file == CONFIG:
            return str(tmp_path / file)
        raise EntryNotFoundError("no such file")

    monkeypatch.setattr(hub, "hf_hub_download", config_alone)
    monkeypatch.setattr(hub, "file_exists", lambda name, file: True)
    with pytest.raises(ValueError, match="on the Hub holds its weights in adapter_model.bin, a pickle"):
        load_pretrained(base(), "owner/name")
    monkeypatch.setattr(hub, "file_exists", lambda name, file: False)
    with pytest.raises(FileNotFoundError, match="the Hub gave no adapter_model.safetensors for it"):
        load_pretrained(base(), "owner/name")


@pytest.mark.parametrize("length", [0, 7, 40, -1])
def test_truncated_weights(tmp_path, length):
    save_pretrained(adapted(), tmp_path)
    whole = (tmp_path / WEIGHTS).read_bytes()
    (tmp_path / WEIGHTS).write_bytes(whole[:length])
    with pytest.raises(ValueError, match=r"adapter_model.safetensors \(\d+ bytes\) is truncated, damaged, or no safe"):
        load_pretrained(base(), tmp_path)


def test_tensors_that_do_not_fit_are_named_together(tmp_path):
    def damage(tensors):
        prefix = "base_model.model.layers."
        tensors[f"{prefix}0.q_proj.lora_A.weight"] = np.ones((2, 5), np.float32)
        del tensors[f"{prefix}1.q_proj.lora_B.weight"]
        for index in range(2, 9):
            tensors[f"{prefix}{index}.q_proj.lora_B.weight"] = np.ones((6, 2), np.float32)

    save_pretrained(adapted(), tmp_path)
    edit_tensors(tmp_path, damage)
    with pytest.raises(ValueError) as caught:
        load_pretrained(base(), tmp_path)
    message = str(caught.value)
    assert "asks for tensors that are not there: base_model.model.layers.1.q_proj.lora_B.weight (6, 2);" in message
    assert (
        "a place for: base_model.model.layers.2.q_proj.lora_B.weight (6, 2), " in message and "and 2 more;" in message
    )
    assert "layers.0.q_proj.lora_A.weight is (2, 5), expected (2, 4)." in message


def test_a_model_of_another_kind(tmp_path):
    save_pretrained(adapted(), tmp_path)
    with pytest.raises(ValueError, match=r"adapter_config.json does not fit the parameters: .*q_proj"):
        load_pretrained({"dense": {"kernel": jnp.ones((3, 3))}}, tmp_path)
    with pytest.raises(ValueError, match="tensors that are not there: base_model.model.layers.2.q_proj.lora_A.weight"):
        load_pretrained(base(layers=3), tmp_path)


def test_embeddings_of_the_file(tmp_path):
    params, other = base(), base()
    save_pretrained(adapted(params, target_modules=["embed_tokens"]), tmp_path)
    assert load_pretrained(params, tmp_path).adapters["default"].replaced == {}
    other["embed_tokens"] = {"embedding": params["embed_tokens"]["embedding"] + 1}
    loaded = load_pretrained(other, tmp_path)
    replaced = loaded.adapters["default"].replaced
    np.testing.assert_array_equal(replaced["embed_tokens.embedding"], params["embed_tokens"]["embedding"])
    save_pretrained(loaded, tmp_path / "second")
    assert (tmp_path / WEIGHTS).read_bytes() == (tmp_path / "second" / WEIGHTS).read_bytes()
    other["embed_tokens"] = {"embedding": jnp.ones((8, 4))}
    with pytest.raises(ValueError, match=r"embed_tokens.base_layer.weight is \(7, 4\), expected \(8, 4\)"):
        load_pretrained(other, tmp_path)


def test_tied_and_repeated_tensors(tmp_path):
    params = {**base(), "cls": {"predictions": {"bias": jnp.arange(3.0)}}}
    save_pretrained(adapted(params, bias="all", modules_to_save=["head"]), tmp_path)
    assert {"cls.predictions.bias", "cls.predictions.decoder.bias"} <= set(keys(tmp_path))
    prefix = "base_model.model.head"
    edit_tensors(
        tmp_path, lambda tensors: tensors.update({f"{prefix}.modules_to_save.bias": tensors[f"{prefix}.bias"]})
    )
    save_pretrained(load_pretrained(params, tmp_path), tmp_path / "second")
    assert (tmp_path / WEIGHTS).read_bytes() == (tmp_path / "second" / WEIGHTS).read_bytes()
    assert (tmp_path / CONFIG).read_bytes() == (tmp_path / "second" / CONFIG).read_bytes()
    edit_tensors(tmp_path, lambda tensors: tensors[f"{prefix}.modules_to_save.bias"].__iadd__(1))
    with pytest.raises(ValueError, match="should be the same differ: .*head.modules_to_save.bias and .*head.bias"):
        load_pretrained(params, tmp_path)


def test_float64_is_not_narrowed(tmp_path):
    save_pretrained(adapted(), tmp_path)
    edit_tensors(tmp_path, lambda tensors: tensors.update({k: v.astype(np.float64) for k, v in tensors.items()}))
    with pytest.raises(ValueError, match="JAX would narrow .*lora_A.weight float64.*expected float32 or narrower"):
        load_pretrained(base(), tmp_path)


def test_names_that_are_taken_and_trees_that_are_wrapped(tmp_path):
    save_pretrained(adapted(), tmp_path)
    wrapped = load_pretrained(base(), tmp_path, adapter_name="mine")
    assert wrapped.active == ("mine",)
    with pytest.raises(ValueError, match="there already is an adapter 'mine'; expected a name other than: mine"):
        load_adapter(wrapped, tmp_path, "mine")
    with pytest.raises(TypeError, match="params has adapters already; expected the base tree, or load_adapter"):
        load_pretrained(wrapped, tmp_path)
    with pytest.raises(TypeError, match="expected the PeftParams that jpeft.wrap returns, not a dict"):
        load_adapter(base(), tmp_path, "mine")
    both = load_adapter(wrapped, tmp_path, "other")
    assert both.active == ("mine",) and list(both.adapters) == ["mine", "other"] and list(wrapped.adapters) == ["mine"]
    assert both.base is wrapped.base


# ---- crashes --------------------------------------------------------------------------------------------------------

STEPS = ("replace", "fsync", "unlink", "save_file", "write_text")


class Killed(BaseException):
    """What a killed process does: nothing that it left undone is done by anyone."""


def break_at(monkeypatch, step: str, count: int, error: BaseException, *, after: bool = False) -> list[str]:
    """Let the count-th file operation of one kind fail, before or after it is done; return what was called."""
    owners = {"replace": (os, "replace"), "fsync": (os, "fsync"), "unlink": (Path, "unlink")}
    owners |= {"save_file": (jpeft_interop._files, "save_file"), "write_text": (Path, "write_text")}
    calls: list[str] = []
    owner, name = owners[step]
    original = getattr(owner, name)

    def failing(*args, **kwargs):
        calls.append(name)
        if len(calls) != count:
            return original(*args, **kwargs)
        if after:
            original(*args, **kwargs)
        raise error

    monkeypatch.setattr(owner, name, failing)
    return calls


def state(directory: Path) -> tuple[str, bytes]:
    """Which adapter the folder holds: its config's settings, and the bytes of its tensors."""
    loaded = load_pretrained(base(), directory)
    adapter = loaded.adapters["default"]
    return repr(adapter.config), b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(adapter.weights))


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("settings", [{}, {"lora_alpha": 32}], ids=["same config", "other config"])
def test_an_interrupted_save_leaves_the_old_or_the_new(tmp_path, monkeypatch, step, settings, after):
    old, new = adapted(seed=1), adapted(seed=2, **settings)
    for name, wrapped in (("old", old), ("new", new)):
        save_pretrained(wrapped, tmp_path / name)
    states = {name: state(tmp_path / name) for name in ("old", "new")}
    count = 0
    while True:
        count += 1
        directory = tmp_path / f"{count}"
        shutil.copytree(tmp_path / "old", directory)
        with monkeypatch.context() as patch:
            calls = break_at(patch, step, count, OSError("disk full"), after=after)
            try:
                save_pretrained(new, directory)
            except OSError as error:
                assert "disk full" in str(error)
        # With the files as a user of PyTorch PEFT sees them, too: no hidden state is needed.
        plain = tmp_path / f"{count}-plain"
        plain.mkdir()
        for name in (CONFIG, WEIGHTS):
            shutil.copy(directory / name, plain / name)
        assert state(directory) in states.values() and state(plain) in states.values()
        save_pretrained(new, directory)
        assert state(directory) == states["new"] and not list(directory.glob(".*"))
        if len(calls) < count:
            break
    assert count > 1 or step == "unlink"


@pytest.mark.parametrize("point", range(1, 40))
@pytest.mark.parametrize("settings", [{}, {"lora_alpha": 32}], ids=["same config", "other config"])
def test_a_killed_save_leaves_the_old_or_the_new(tmp_path, monkeypatch, settings, point):
    """Every file operation after the point fails, those of the clean-up included, as if the process were gone."""
    save_pretrained(adapted(seed=1), tmp_path / "run")
    save_pretrained(adapted(seed=2, **settings), tmp_path / "new")
    states = [state(tmp_path / "run"), state(tmp_path / "new")]
    calls = 0

    def mortal(original):
        def operation(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls >= point:
                raise Killed
            return original(*args, **kwargs)

        return operation

    with monkeypatch.context() as patch:
        for owner, name in ((os, "replace"), (os, "fsync"), (Path, "unlink"), (Path, "write_text")):
            patch.setattr(owner, name, mortal(getattr(owner, name)))
        patch.setattr(jpeft_interop._files, "save_file", mortal(jpeft_interop._files.save_file))
        try:
            save_pretrained(adapted(seed=2, **settings), tmp_path / "run")
        except Killed:
            pass
    assert state(tmp_path / "run") in states
    # PyTorch PEFT looks at the plain names alone: it finds a whole adapter, or no config.
    if (tmp_path / "run" / CONFIG).exists():
        for hidden in (tmp_path / "run").glob(".*"):
            hidden.unlink()
        assert state(tmp_path / "run") in states
    else:
        assert settings and pair.is_unfinished(tmp_path / "run")
        with pytest.raises(ValueError, match="a save was interrupted, so that PyTorch PEFT may not see the new"):
            verify(tmp_path / "run")


def test_a_truncated_write_is_noticed(tmp_path, monkeypatch):
    save_pretrained(adapted(seed=1), tmp_path)
    before = state(tmp_path)

    def lossy(tensors, path, metadata):
        save_file(tensors, path, metadata=metadata)
        os.truncate(path, os.path.getsize(path) - 1)

    monkeypatch.setattr(jpeft_interop._files, "save_file", lossy)
    with pytest.raises(ValueError, match="truncated, damaged"):
        save_pretrained(adapted(seed=2), tmp_path)
    monkeypatch.setattr(
        jpeft_interop._files, "save_file", lambda t, path, metadata: save_file({k: v + 1 for k, v in t.items()}, path)
    )
    with pytest.raises(OSError, match="does not hold what was written to it"):
        save_pretrained(adapted(seed=2), tmp_path)
    monkeypatch.undo()
    assert state(tmp_path) == before and not list(tmp_path.glob(".*"))


def test_a_disk_that_cannot_be_written(tmp_path):
    with pytest.raises(OSError, match="cannot be written"):
        jpeft_interop._files.write_tensors(tmp_path / "nosuch" / "file", {"a": np.ones(2)})
    assert set(read_tensors_of(tmp_path)) == {"a"}


def read_tensors_of(folder: Path) -> dict[str, np.ndarray]:
    jpeft_interop._files.write_tensors(folder / "file", {"a": np.ones((2, 3)).T})
    return read_tensors(folder / "file")


# ---- verify ---------------------------------------------------------------------------------------------------------


def test_verify_reports(tmp_path):
    save_pretrained(adapted(bias="lora_only"), tmp_path)
    report = verify(tmp_path)
    assert (report.peft_type, report.modules, report.tensors, report.torch) == ("LORA", 2, 6, False)
    assert report.parameters == 2 * (2 * 4 + 6 * 2 + 6) and report.dtypes == ("float32",)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: [t.pop(k) for k in list(t) if "0.q_proj.lora_B" in k], "lora_A and lora_B alone: layers.0.q_proj"),
        (lambda t: t.update({k: v[:1] for k, v in t.items() if "lora_A" in k}), r"lora_A \(1, 4\) \(rank 2\), layers"),
        (lambda t: t.update({k: 0 * v for k, v in t.items() if "lora_B" in k}), "lora_B is zero in every module"),
        (lambda t: t.update({k: 0 * v for k, v in t.items() if "lora_A" in k}), "lora_A is zero in every module"),
        (
            lambda t: t.update({k.replace("q_proj", "k_proj"): v for k, v in t.items()}),
            "does not mean: layers.0.k_proj",
        ),
        (lambda t: t.update({"model.x.lora_A.weight": np.ones(2)}), "does not account for: model.x.lora_A.weight"),
        (lambda t: t.update({"base_model.model.norm.weight": np.ones(2)}), "account for: base_model.model.norm.weight"),
        (lambda t: [t.pop(key) for key in list(t)], "it has no tensor base_model.model.<module>.lora_A.weight"),
    ],
)
def test_verify_finds(tmp_path, change, message):
    save_pretrained(adapted(), tmp_path)
    edit_tensors(tmp_path, change)
    with pytest.raises(ValueError, match=message):
        verify(tmp_path)
