"""What a user of PEFT also does: attributes of the base, PyTorch's arguments, misshapen tensors, weighted adapters."""

import copy
import dataclasses
import json
import pickle
import warnings
from pathlib import Path

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jpeft
import jpeft_interop
from jpeft_interop import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from jpeft_interop._forwarding import INSTEAD
from jpeft_interop._hub import fetched_file
from jpeft_interop._tokenizer import tokenizer_size
from jpeft_interop.models import (
    FlaxAutoModelForCausalLM,
    FlaxAutoModelForImageClassification,
    FlaxAutoModelForSequenceClassification,
    resize_token_embeddings,
)

SIZES = {"vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
LLAMA, BERT = {"model_type": "llama", **SIZES}, {"model_type": "bert", **SIZES}
X = np.ones((2, 4), np.float32)
CONFIG = jpeft.LoraConfig(r=2, target_modules=["first"], init_lora_weights=False)


def plain(params, x):
    return jnp.tanh(x @ params["first"]["kernel"]) @ params["second"]["kernel"]


def tree(width: int = 5):
    draw = np.random.default_rng(0).normal
    kernel = lambda *shape: {"kernel": jnp.asarray(draw(size=shape), jnp.float32)}  # noqa: E731
    return {"first": kernel(4, width), "second": kernel(width, 3)}


@pytest.fixture
def model():
    model = get_peft_model((plain, tree()), CONFIG)
    model.add_adapter("other", CONFIG, rng=jax.random.key(1))
    return model


def same(first, second):
    assert jax.tree.structure(first) == jax.tree.structure(second)
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True))


# ---- attributes -----------------------------------------------------------------------------------------------------


def test_attributes_of_the_base():
    base = FlaxAutoModelForCausalLM.from_config(LLAMA)
    model = get_peft_model(base, jpeft.LoraConfig())
    assert model.base_model.model is base and model.blueprint is base.blueprint and model.task == "causal-lm"
    assert model.base_model.peft_config == model.peft_config and model.base_model.active_adapter == "default"
    assert model.base_model(input_ids=[[1, 2]]).logits.shape == (1, 2, 9)
    assert model.peft_type == model.active_peft_config.peft_type == "LORA"
    module = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    model = get_peft_model(module, jpeft.LoraConfig(target_modules="all-linear"), layouts={"kernel": "io"})
    assert model.in_features == 4 and model.dtype is module.dtype


def test_attributes_that_are_nowhere(model):
    for name, said in (
        ("strange", "neither PeftModel nor its base model plain has 'strange'$"),
        ("to", r"has 'to': JAX arrays say where they are; move them with model.params = jax.device_put"),
        ("eval", "has 'eval': there is no mode; dropout acts where the context has a key"),
    ):
        with pytest.raises(AttributeError, match=said):
            getattr(model, name)
        with pytest.raises(AttributeError, match=said):
            getattr(model.base_model, name)
    assert not any(hasattr(model, name) for name in INSTEAD) and not hasattr(model, "_hidden")
    trained = get_peft_model(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), jpeft.LoraConfig(target_modules="all-linear"))
    with pytest.raises(AttributeError, match="PeftModel nor its base model Linear has 'train': there is no mode"):
        trained.train()
    with pytest.raises(AttributeError, match="face"):
        object.__new__(PeftModel).anything  # noqa: B018
    with pytest.raises(AttributeError, match="_owner"):
        object.__new__(type(model.base_model)).anything  # noqa: B018


def test_copies(model):
    assert copy.copy(model).face is model.face
    with pytest.raises((pickle.PicklingError, AttributeError, TypeError)):
        pickle.dumps(model)  # functions made on the spot; what is worth keeping is model.params


def test_enabled_and_active(model):
    assert model.has_active_enabled_adapter
    model.disable_adapter_layers()
    assert not model.has_active_enabled_adapter
    model.base_model.enable_adapter_layers()
    model.delete_adapter("other")
    model.delete_adapter("default")
    assert not model.has_active_enabled_adapter


def test_what_can_become_lora(model):
    assert model.supports_lora_conversion()
    assert model.supports_lora_conversion("other")
    biased = get_peft_model(
        (plain, {**tree(), "first": {**tree()["first"], "bias": jnp.zeros(5)}}), dataclasses.replace(CONFIG, bias="all")
    )
    assert not biased.supports_lora_conversion()
    for method in (jpeft.PolyConfig, jpeft.LilyConfig, jpeft.PromptTuningConfig):
        targets = {"num_virtual_tokens": 2} if method is jpeft.PromptTuningConfig else {"target_modules": ["first"]}
        params = {**tree(), "embed_tokens": {"embedding": jnp.ones((5, 4))}}
        assert not get_peft_model((plain, params), method(**targets)).supports_lora_conversion()
    with pytest.raises(ValueError, match=r"adapter names are \['x'\]"):
        model.supports_lora_conversion("x")


# ---- arguments ------------------------------------------------------------------------------------------------------


def test_a_weighted_adapter_is_that_of_the_pure_function(model):
    before = model.params
    model.add_weighted_adapter(["default", "other"], [0.7, -0.2], "both", "ties", density=0.5)
    wanted = jpeft.add_weighted_adapter(before, ["default", "other"], [0.7, -0.2], "both", "ties", density=0.5)
    same(model.face.wrapped, wanted)
    assert model.active_adapter == "default" and model.get_model_status().requires_grad["both"] is False
    with pytest.warns(UserWarning, match="svd_driver='gesvd' does nothing here: JAX's backend chooses"):
        model.base_model.add_weighted_adapter(["default"], [2.0], "twice", svd_driver="gesvd")
    with pytest.warns(UserWarning, match="svd_full_matrices=False does nothing here: the factors that are kept"):
        model.add_weighted_adapter(["default"], [2.0], "thrice", svd_full_matrices=False)
    with pytest.raises(ValueError, match="both"):
        model.add_weighted_adapter(["default"], [1.0], "both")


def test_arguments_for_pytorch(model, tmp_path):
    model.save_pretrained(tmp_path, safe_serialization=True)
    with pytest.warns(UserWarning, match="torch_device='cuda' does nothing here: what is read from a file is on JAX's"):
        loaded = PeftModel.from_pretrained((plain, tree()), tmp_path, torch_device="cuda", low_cpu_mem_usage=True)
    with pytest.warns(UserWarning, match="ephemeral_gpu_offload=True does nothing here: nothing is kept away"):
        loaded.load_adapter(tmp_path, "again", ephemeral_gpu_offload=True)
    same(loaded.params.adapters["default"].weights, model.params.adapters["default"].weights)
    same(loaded.params.adapters["again"].weights, model.params.adapters["default"].weights)
    model.save_pretrained(tmp_path / "none", is_main_process=False)
    assert not (tmp_path / "none").exists()
    with pytest.raises(ValueError, match="safe_serialization is False; expected True: a pickle can run any code"):
        model.save_pretrained(tmp_path / "none", safe_serialization=False)


def test_adapters_of_shapes_alone_are_filled(model):
    state = get_peft_model_state_dict(model)
    empty = get_peft_model((plain, tree()), CONFIG, low_cpu_mem_usage=True)
    empty.add_adapter("other", CONFIG, low_cpu_mem_usage=True)
    assert empty.params.base["first"]["kernel"].shape == (4, 5) and isinstance(
        empty.params.base["first"]["kernel"], jax.Array
    )
    for name, adapter in empty.params.adapters.items():
        assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(adapter.weights))
        set_peft_model_state_dict(empty, state, name, low_cpu_mem_usage=True)
    np.testing.assert_array_equal(empty(X), model(X))
    injected = jpeft_interop.inject_adapter_in_model(CONFIG, (plain, tree()), low_cpu_mem_usage=True)
    same(set_peft_model_state_dict(injected, state), jpeft_interop.inject_adapter_in_model(CONFIG, (plain, tree())))


def test_arguments_of_the_hub(model, monkeypatch):
    asked = []

    def download(name, filename, **options):
        asked.append((name, filename, options))
        raise huggingface_hub.errors.EntryNotFoundError("nothing there")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises(FileNotFoundError, match="'me/mine' is no folder here"):
        model.load_adapter("me/mine", "x", token="t", cache_dir="/c", revision="v", local_files_only=True)
    options = {"token": "t", "cache_dir": "/c", "revision": "v", "local_files_only": True}
    assert asked == [("me/mine", "adapter_config.json", options)]
    with pytest.raises(TypeError, match="strange"):
        model.load_adapter("me/mine", "x", strange=1)


# ---- misshapen tensors ----------------------------------------------------------------------------------------------


def test_misshapen_tensors_are_left_out(model, tmp_path):
    config = dataclasses.replace(CONFIG, modules_to_save=["second"])
    saved = get_peft_model((plain, tree()), config)
    saved.save_pretrained(tmp_path)
    wide = (plain, tree(width=6))
    with pytest.raises(ValueError, match=r"lora_B.weight is \(5, 2\), expected \(6, 2\)"):
        PeftModel.from_pretrained(wide, tmp_path)
    with pytest.warns(
        UserWarning, match=r"left out, as ignore_mismatched_sizes is True: .*lora_B.weight is \(5, 2\), the"
    ):
        loaded = PeftModel.from_pretrained(wide, tmp_path, ignore_mismatched_sizes=True)
    weights = loaded.params.adapters["default"].weights["first"]
    initial = jpeft.wrap(wide[1], config).adapters["default"].weights["first"]
    np.testing.assert_array_equal(weights["lora_A"], saved.params.adapters["default"].weights["first"]["lora_A"])
    np.testing.assert_array_equal(weights["lora_B"], initial["lora_B"])
    np.testing.assert_array_equal(
        loaded.params.adapters["default"].replaced["second.kernel"], wide[1]["second"]["kernel"]
    )
    with pytest.warns(UserWarning, match="left out"):
        loaded.load_adapter(tmp_path, "again", ignore_mismatched_sizes=True)


def test_misshapen_entries_leave_an_adapter_as_it_is(model):
    state = get_peft_model_state_dict(model)
    keys = {key.split(".")[-2]: key for key in state}
    changed = {keys["lora_A"]: state[keys["lora_A"]] + 1, keys["lora_B"]: np.ones((7, 2), np.float32)}
    with pytest.warns(UserWarning, match=r"state_dict has tensors of another shape, .*lora_B.weight is \(7, 2\), the"):
        set_peft_model_state_dict(model, changed, ignore_mismatched_sizes=True)
    after = get_peft_model_state_dict(model)
    np.testing.assert_array_equal(after[keys["lora_A"]], changed[keys["lora_A"]])
    np.testing.assert_array_equal(after[keys["lora_B"]], state[keys["lora_B"]])
    set_peft_model_state_dict(model, state, ignore_mismatched_sizes=True)
    empty = get_peft_model((plain, tree()), CONFIG, low_cpu_mem_usage=True)
    with (
        pytest.warns(UserWarning, match="left out"),
        pytest.raises(
            ValueError, match="puts initial values in the place of misshapen tensors, but the parameters are"
        ),
    ):
        set_peft_model_state_dict(empty, changed, ignore_mismatched_sizes=True)


def test_a_head_of_another_size_begins_anew(tmp_path):
    base = lambda count: FlaxAutoModelForSequenceClassification.from_config(BERT, num_labels=count)  # noqa: E731
    get_peft_model(base(3), jpeft.LoraConfig(task_type="SEQ_CLS", bias="all", r=2)).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"classifier.weight is \(3, 8\), the model has \(4, 8\)"):
        loaded = PeftModel.from_pretrained(base(4), tmp_path, ignore_mismatched_sizes=True)
    assert loaded(input_ids=[[1, 2]]).logits.shape == (1, 4)
    assert loaded(input_ids=[[1, 2]], labels=[3]).loss.shape == ()


# ---- vocabularies ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("mean", [False, True])
def test_new_rows(tied, mean):
    base = FlaxAutoModelForCausalLM.from_config({**LLAMA, "tie_word_embeddings": tied})
    bigger = resize_token_embeddings(base, 4000, mean_resizing=mean, rng=jax.random.key(3))
    old, new = base.params["model"]["embed_tokens"]["embedding"], bigger.params["model"]["embed_tokens"]["embedding"]
    np.testing.assert_array_equal(new[:9], old)
    drawn, rows = np.asarray(new[9:], np.float64), np.asarray(old, np.float64)
    wanted = 1e-9 * np.cov(rows.T, bias=True) if mean else 0.02**2 * np.eye(8)
    found = (drawn - (rows.mean(0) if mean else 0)).T @ (drawn - (rows.mean(0) if mean else 0)) / len(drawn)
    # float32 has steps of some 1e-9 at 0.02, the size of the rows.
    assert np.abs(found - wanted).max() < 0.12 * np.abs(wanted).max()
    assert ("lm_head" in bigger.params) is not tied
    assert bigger.apply(bigger.params, np.array([[1, 3999]])).logits.shape == (1, 2, 4000)
    assert (
        bigger.params["model"]["layers"]["0"]["mlp"]["up_proj"]["kernel"]
        is (base.params["model"]["layers"]["0"]["mlp"]["up_proj"]["kernel"])
    )
    assert (bigger.config.vocab_size, bigger.config_dict["vocab_size"], base.config.vocab_size) == (4000, 4000, 9)
    smaller = resize_token_embeddings(bigger, 9)
    same(smaller.params, base.params)
    assert resize_token_embeddings(base, 9) is base


def test_numbers_of_tokens_that_are_refused():
    with pytest.raises(ValueError, match="new_num_tokens is 0; expected at least 1"):
        resize_token_embeddings(FlaxAutoModelForCausalLM.from_config(LLAMA, abstract=True), 0)
    sizes = {name: size for name, size in SIZES.items() if name != "vocab_size"}
    images = {"model_type": "vit", **sizes, "image_size": 4, "patch_size": 2}
    with pytest.raises(ValueError, match="ViTForImageClassification has no vocab_size in its config; expected a model"):
        resize_token_embeddings(FlaxAutoModelForImageClassification.from_config(images, abstract=True), 12)


def test_stacks_and_abstract_models_are_resized():
    base = FlaxAutoModelForCausalLM.from_config(LLAMA, abstract=True, scan_layers=True, param_dtype=jnp.bfloat16)
    bigger = resize_token_embeddings(base, 12)
    assert bigger.params["lm_head"]["kernel"] == jax.ShapeDtypeStruct((8, 12), jnp.bfloat16)
    assert jax.eval_shape(bigger.apply, bigger.params, np.ones((1, 2), np.int32)).logits.shape == (1, 2, 12)


def written_tokenizer(folder: Path, model: dict, added=(), **config) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps({"model": model, "added_tokens": list(added)}))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_sizes_of_tokenizers(tmp_path):
    added = [{"id": 1, "content": "b"}, {"id": 2, "content": "c"}]
    assert tokenizer_size(written_tokenizer(tmp_path / "a", {"vocab": {"a": 0, "b": 1}}, added)) == 3
    later = {"2": {"content": "z"}}
    assert tokenizer_size(written_tokenizer(tmp_path / "u", {"vocab": [["a", 0.1]]}, added_tokens_decoder=later)) == 2
    assert tokenizer_size(tmp_path) is None and tokenizer_size(tmp_path, subfolder="a") == 3
    (tmp_path / "a" / "tokenizer.json").unlink()
    with pytest.warns(UserWarning, match="has a tokenizer_config.json but no tokenizer.json, so the size of its voca"):
        assert tokenizer_size(tmp_path / "a") is None


def test_the_hub_may_be_out_of_reach(monkeypatch):
    for error, offline, warned in (
        (OSError("no net"), False, True),
        (OSError("no net"), True, False),
        (huggingface_hub.errors.EntryNotFoundError("none"), False, False),
    ):
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
        monkeypatch.setattr(
            huggingface_hub, "hf_hub_download", lambda *a, error=error, **k: (_ for _ in ()).throw(error)
        )
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            assert fetched_file("me/mine", "tokenizer.json", None, None) is None
            assert tokenizer_size("me/mine") is None
        assert [("could not be asked" in str(one.message)) for one in told] == [True] * 3 * warned


def test_a_base_whose_vocabulary_cannot_be_looked_up(tmp_path, monkeypatch):
    model = get_peft_model(
        FlaxAutoModelForCausalLM.from_config(LLAMA), jpeft.LoraConfig(base_model_name_or_path="me/b")
    )
    with pytest.warns(UserWarning, match="there is no config.json of the base model 'me/b' here; its vocabulary is"):
        model.save_pretrained(tmp_path / "a")
    model.save_pretrained(tmp_path / "b", save_embedding_layers=False)
    (tmp_path / "config.json").write_text('{"vocab_size": 8}')
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda name, file: str(tmp_path / file))
    with pytest.warns(UserWarning, match="the embeddings are saved too, as the model has 9 tokens and 'me/b' another"):
        assert "base_model.model.lm_head.weight" in get_peft_model_state_dict(model)
    assert "base_model.model.lm_head.weight" not in get_peft_model_state_dict(model, save_embedding_layers=False)
