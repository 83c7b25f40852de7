"""The familiar face: each method does what the pure function does, on every kind of model."""

import dataclasses
import json
import types

import flax.linen as nn
import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jpeft
import jpeft_interop
from jpeft_interop import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from jpeft_interop.models import (
    FlaxAutoModelForCausalLM,
    FlaxAutoModelForSeq2SeqLM,
    FlaxAutoModelForSequenceClassification,
)

SIZES = {"vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
LLAMA = {"model_type": "llama", **SIZES}
X = np.ones((2, 4), np.float32)
RANDOM = {"init_lora_weights": False}
CONFIG = jpeft.LoraConfig(r=2, target_modules=["first"], **RANDOM)
OTHER = jpeft.LoraConfig(r=3, target_modules=["second"], **RANDOM)


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x, scale=1.0):
        return scale * nn.Dense(3, name="second")(jnp.tanh(nn.Dense(5, name="first")(x)))


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.first, self.second = nnx.Linear(4, 5, rngs=rngs), nnx.Linear(5, 3, rngs=rngs)
        self.calls = nnx.Variable(jnp.zeros(()))

    def __call__(self, x, scale=1.0):
        return scale * self.second(jnp.tanh(self.first(x)))


def plain(params, x, scale=1.0):
    for name in ("first", "second"):
        x = jnp.tanh(x) if name == "second" else x
        x = x @ params[name]["kernel"] + params[name]["bias"]
    return scale * x


def tree():
    return Linen().init(jax.random.key(0), X)["params"]


def llama():
    return FlaxAutoModelForCausalLM.from_config(LLAMA)


KINDS = {
    "function": lambda: (plain, tree()),
    "linen": lambda: (Linen(), {"params": tree()}),
    "linen, params alone": lambda: (Linen(), tree()),
    "linen, bound": lambda: Linen().bind({"params": tree()}),
    "nnx": lambda: Nnx(nnx.Rngs(0)),
}


def called(model, x):
    if isinstance(model, tuple):
        function, params = model
        return (
            function.apply(params if "params" in params else {"params": params}, x)
            if isinstance(function, nn.Module)
            else function(params, x)
        )
    return model(x)


@pytest.fixture
def model():
    """With two adapters, the first one active."""
    model = get_peft_model((plain, tree()), CONFIG)
    model.add_adapter("other", OTHER)
    return model


def same(first, second):
    assert jax.tree.structure(first) == jax.tree.structure(second)
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True))


# ---- kinds of models ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_model(kind):
    base = KINDS[kind]()
    model = get_peft_model(base, CONFIG, rng=jax.random.key(3))
    assert type(model) is PeftModel
    assert sorted(model.params.adapters["default"].sites) == ["first"]
    before = called(base, X)
    outputs = model(X)
    assert not np.allclose(outputs, before, atol=1e-3)
    np.testing.assert_allclose(model(X, scale=2.0), 2 * outputs, rtol=1e-6)
    with model.disable_adapter():
        np.testing.assert_allclose(model(X), before, rtol=1e-6)
    merged = model.merge_and_unload()
    assert type(merged) is type(base)
    np.testing.assert_allclose(called(merged, X), outputs, rtol=1e-5)
    assert model.unload() is base and model.get_base_model() is base
    np.testing.assert_array_equal(called(base, X), before)
    assert model.get_model_status().base_model_type in ("plain", "Linen", "Nnx")
    gradient = jpeft.grad(lambda params: model.apply(params, X).sum())(model.params)
    assert float(jnp.abs(gradient.adapters["default"].weights["first"]["lora_A"]).max()) > 0


def test_state_that_is_no_parameter_is_kept():
    variables = {"params": tree(), "batch_stats": {"first": {"mean": jnp.ones(3)}}}
    model = get_peft_model((Linen(), variables), CONFIG)
    assert model.params.base is variables["params"]
    assert model.merge_and_unload()[1]["batch_stats"] is variables["batch_stats"]
    assert float(get_peft_model(Nnx(nnx.Rngs(0)), CONFIG).merge_and_unload().calls[...]) == 0.0


def test_models_of_ours():
    base = llama()
    model = get_peft_model(base, jpeft.LoraConfig(r=2, task_type="CAUSAL_LM", **RANDOM))
    assert isinstance(model, jpeft_interop.PeftModelForCausalLM) and isinstance(model, PeftModel)
    ids = [[1, 2, 3], [4, 5, 6]]
    wanted = jax.jit(jpeft.lift(base.apply))(model.params, input_ids=np.asarray(ids))
    np.testing.assert_allclose(model(input_ids=ids).logits, wanted.logits, rtol=1e-5)
    assert model(input_ids=ids, logits_to_keep=1).logits.shape == (2, 1, 9)
    same(model.generate(ids, max_new_tokens=2), base.generate(model.params, ids, max_new_tokens=2))
    merged = model.merge_and_unload()
    assert type(merged) is type(base) and merged.config_dict is base.config_dict
    assert model.config["model_type"] == "llama"


def test_a_batch_of_several_adapters(model):
    rows = model(X[[0, 0, 0]], adapter_names=["other", "__base__", "default"])
    model.set_adapter("other")
    np.testing.assert_allclose(rows[0], model(X)[0], rtol=1e-4)
    model.set_adapter("default")
    np.testing.assert_allclose(rows[2], model(X)[0], rtol=1e-4)
    model.disable_adapters()
    np.testing.assert_allclose(rows[1], model(X)[0], rtol=1e-4)
    model.enable_adapters()
    with pytest.raises(ValueError, match="adapter_indices name"):
        model(X, adapter_names=["x", "other"])
    model.merge_adapter()
    with pytest.raises(ValueError, match="adapter_names needs unmerged weights, but default are merged"):
        model(X, adapter_names=["other", "other"])


def test_one_program_for_a_shape():
    traces = []

    def function(params, x, mode="a", flags=()):
        traces.append((x.shape, mode))
        return x @ params["first"]["kernel"]

    model = get_peft_model((function, tree()), CONFIG)
    for _ in range(2):
        model.params = dataclasses.replace(model.params)
        model(X)
        model(X[:1])
        model(X, mode="b", flags=["on", "off"])
    assert len(traces) == 3


class Strange:
    pass


@pytest.mark.parametrize("value", [Strange(), [Strange()]])
def test_arguments_that_cannot_be_given(model, value):
    with pytest.raises(TypeError, match="argument 'scale' holds a Strange; expected arrays"):
        model(X, scale=value)


# ---- each method and its pure function ------------------------------------------------------------------------------

STEPS = {
    "set_adapter": (lambda m: m.set_adapter("other"), lambda p: jpeft.set_adapter(p, "other")),
    "set_adapter of two": (
        lambda m: m.set_adapter(["other", "default"]),
        lambda p: jpeft.set_adapter(p, ["other", "default"]),
    ),
    "disable_adapters": (lambda m: m.disable_adapters(), jpeft.disable_adapters),
    "delete_adapter": (
        lambda m: m.delete_adapter("other"),
        lambda p: dataclasses.replace(p, adapters={"default": p.adapters["default"]}),
    ),
    "merge_adapter": (
        lambda m: m.merge_adapter(),
        lambda p: dataclasses.replace(p, base=jpeft.merge(p), active=()),
    ),
    "merge_adapter by name": (
        lambda m: m.merge_adapter(["other"], safe_merge=True),
        lambda p: dataclasses.replace(p, base=jpeft.merge(p, adapter_names="other"), active=()),
    ),
    "add_adapter": (
        lambda m: m.add_adapter("third", CONFIG, rng=jax.random.key(5)),
        lambda p: jpeft.wrap(p, CONFIG, rng=jax.random.key(5), adapter_name="third"),
    ),
    "merge and unmerge": (lambda m: (m.merge_adapter(), m.unmerge_adapter()), lambda p: p),
    "disable and enable": (lambda m: (m.disable_adapters(), m.enable_adapters()), lambda p: p),
}


@pytest.mark.parametrize("step", STEPS)
def test_methods_are_pure_functions_kept(model, step):
    method, function = STEPS[step]
    before = model.params
    wanted = function(before)
    method(model)
    same(model.params, wanted)


def test_merging_back_gives_the_very_arrays(model):
    base = model.params.base
    model.merge_adapter()
    model.merge_and_unload()
    model.unmerge_adapter()
    assert model.params.base is base


def test_what_trains(model):
    trains = lambda: {name: status for name, status in model.get_model_status().requires_grad.items()}  # noqa: E731
    assert trains() == {"default": True, "other": False}
    model.set_adapter("other", inference_mode=True)
    assert trains() == {"default": False, "other": False}
    model.set_requires_grad("other")
    assert trains() == {"default": False, "other": True}
    model.set_requires_grad(["other"], False)
    assert model.get_nb_trainable_parameters()[0] == 0
    model.merge_adapter()
    with pytest.warns(UserWarning, match="adapters are merged \\(other\\); unmerging them first"):
        model.set_adapter("default")
    assert trains() == {"default": True, "other": False} and model.active_adapter == "default"


def test_a_training_loop(model):
    def loss_fn(params):
        return (model.apply(params, X) ** 2).mean()

    losses = []
    for _ in range(3):
        loss, gradient = jpeft.value_and_grad(loss_fn)(model.params)
        model.params = jax.tree.map(lambda leaf, slope: leaf - (0.1 * slope).astype(leaf.dtype), model.params, gradient)
        losses.append(float(loss))
    assert losses[2] < losses[1] < losses[0]
    with model.disable_adapter():
        model.params = model.params
    assert model.active_adapters == ["default"]
    with model.disable_adapter():
        model.params = jpeft.set_adapter(model.params, "other")
        assert model.get_model_status().enabled
    assert model.active_adapter == "other"


def test_names_and_configs(model):
    model.set_adapter(["default", "other"])
    assert model.active_adapter == model.active_adapters == ["default", "other"]
    assert model.peft_config == {"default": CONFIG, "other": OTHER} and model.active_peft_config == CONFIG
    assert model.modules_to_save is None and model.layouts == {} and model.config == {}
    assert repr(model) == "PeftModel(plain, {default: LoraConfig, other: LoraConfig}, active=['default', 'other'])"
    saved = get_peft_model((plain, tree()), dataclasses.replace(CONFIG, modules_to_save=["second"]))
    assert saved.modules_to_save == {"second"}


def test_the_numbers_of_mt0_large(capsys):
    sizes = {"vocab_size": 250112, "d_model": 1024, "d_kv": 64, "d_ff": 2816, "num_layers": 24, "num_heads": 16}
    gated = {"num_decoder_layers": 24, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
    base = FlaxAutoModelForSeq2SeqLM.from_config({"model_type": "mt5", **sizes, **gated}, abstract=True)
    model = get_peft_model(base, jpeft.LoraConfig(task_type="SEQ_2_SEQ_LM", r=8))
    model.print_trainable_parameters()
    assert isinstance(model, jpeft_interop.PeftModelForSeq2SeqLM)
    assert capsys.readouterr().out == (
        "trainable params: 2,359,296 || all params: 1,231,940,608 || trainable%: 0.1915\n"
    )
    assert model.get_model_status().devices == {"default": ["abstract"]}


def test_stacked_layers_are_told_one_by_one():
    base = FlaxAutoModelForCausalLM.from_config({**LLAMA, "num_hidden_layers": 2}, abstract=True, scan_layers=True)
    names = [
        status.name for status in get_peft_model(base, jpeft.LoraConfig(target_modules=["q_proj"])).get_layer_status()
    ]
    assert names == [f"model.model.layers.{index}.self_attn.q_proj" for index in range(2)]


# ---- configs --------------------------------------------------------------------------------------------------------


def test_the_config_given_stays_as_it_is(tmp_path):
    llama().save_pretrained(tmp_path)
    base, config = FlaxAutoModelForCausalLM.from_pretrained(tmp_path), jpeft.LoraConfig(base_model_name_or_path="old")
    with pytest.warns(UserWarning, match="base_model_name_or_path of the config is 'old', and the model's name is"):
        model = get_peft_model(base, config, revision="v2")
    assert (config.base_model_name_or_path, config.target_modules, config.revision) == ("old", None, None)
    own = model.active_peft_config
    assert (own.base_model_name_or_path, own.target_modules, own.revision) == (
        str(tmp_path),
        ("q_proj", "v_proj"),
        "v2",
    )
    with pytest.warns(UserWarning, match="revision of the config is 'v1'; 'v2', which was given, is written"):
        get_peft_model((plain, tree()), dataclasses.replace(CONFIG, revision="v1"), revision="v2")


def test_heads_train_and_the_class_gives_the_task():
    base = FlaxAutoModelForSequenceClassification.from_config({"model_type": "bert", **SIZES}, num_labels=3)
    for model in (
        get_peft_model(base, jpeft.LoraConfig(task_type="SEQ_CLS")),
        jpeft_interop.PeftModelForSequenceClassification(base, jpeft.LoraConfig()),
    ):
        assert type(model) is jpeft_interop.PeftModelForSequenceClassification
        assert sorted(model.params.adapters["default"].replaced) == ["classifier.bias", "classifier.kernel"]
        model.add_adapter("other", jpeft.LoraConfig())
        assert len(model.params.adapters["other"].replaced) == 2
    with pytest.raises(ValueError, match="the class is for 'CAUSAL_LM'; expected PeftModelForSequenceClassification"):
        jpeft_interop.PeftModelForCausalLM(base, jpeft.LoraConfig(task_type="SEQ_CLS"))


def test_dtypes_of_adapters():
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), tree())
    dtype = lambda model: model.params.adapters["default"].weights["first"]["lora_A"].dtype  # noqa: E731
    assert dtype(get_peft_model((plain, half), CONFIG)) == jnp.float32
    assert dtype(get_peft_model((plain, half), CONFIG, autocast_adapter_dtype=False)) == jnp.bfloat16
    half["second"] = tree()["second"]
    both = dataclasses.replace(CONFIG, target_modules=["first", "second"])
    with pytest.raises(ValueError, match="which are bfloat16, float32; expected weights of one dtype"):
        get_peft_model((plain, half), both, autocast_adapter_dtype=False)


# ---- files ----------------------------------------------------------------------------------------------------------


def test_files_come_back(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained((plain, tree()), tmp_path, is_trainable=True)
    loaded.load_adapter(tmp_path, "other", subfolder="other")
    np.testing.assert_array_equal(loaded(X), model(X))
    model.set_adapter("other")
    loaded.set_adapter("other")
    np.testing.assert_array_equal(loaded(X), model(X))
    model.save_pretrained(tmp_path / "one", selected_adapters=["other"])
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == ["README.md", "other"]
    config = dataclasses.replace(OTHER, lora_alpha=0)
    zeroed = PeftModel.from_pretrained((plain, tree()), tmp_path, subfolder="other", config=config)
    np.testing.assert_allclose(zeroed(X), plain(tree(), X), rtol=1e-6)


def test_key_mapping(model, tmp_path):
    model.save_pretrained(tmp_path, selected_adapters=["default"])
    renamed = {{"first": "one"}.get(name, name): leaf for name, leaf in tree().items()}
    function = lambda params, x: plain({"first": params["one"], "second": params["second"]}, x)  # noqa: E731
    config = dataclasses.replace(CONFIG, target_modules=["one"])
    loaded = PeftModel.from_pretrained((function, renamed), tmp_path, config=config, key_mapping={"^first": "one"})
    np.testing.assert_array_equal(loaded(X), model(X))
    with pytest.raises(ValueError, match="key_mapping makes 'x' of several keys"):
        set_peft_model_state_dict(model, {"a": X, "b": X}, key_mapping={"^.*": "x"})


def test_sixteen_bits_are_widened_unless_asked(model, tmp_path):
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), tree())
    get_peft_model((plain, half), CONFIG, autocast_adapter_dtype=False).save_pretrained(tmp_path)
    for autocast, dtype in ((True, jnp.float32), (False, jnp.bfloat16)):
        loaded = PeftModel.from_pretrained((plain, half), tmp_path, autocast_adapter_dtype=autocast)
        assert loaded.params.adapters["default"].weights["first"]["lora_B"].dtype == dtype


def test_state_dicts(model):
    state = get_peft_model_state_dict(model, "other")
    assert {key: tensor.shape for key, tensor in state.items()} == {
        "base_model.model.second.lora_A.weight": (3, 5),
        "base_model.model.second.lora_B.weight": (3, 3),
    }
    params = model.params
    assert set_peft_model_state_dict(model, {key: tensor + 1 for key, tensor in state.items()}, "other") is model
    same(model.params.adapters["other"].weights["second"]["lora_A"], state["base_model.model.second.lora_A.weight"] + 1)
    same(set_peft_model_state_dict(params, state, "other"), params)
    broken = {"base_model.model.second.lora_A.weight": np.ones((2, 2)), "extra": np.ones(1)}
    with pytest.raises(
        ValueError, match=r"not there: .*lora_B.*; .*place for: extra.*; .*is \(2, 2\), expected \(3, 5\)"
    ):
        set_peft_model_state_dict(model, broken, "other")
    for function in (get_peft_model_state_dict, lambda m, name: set_peft_model_state_dict(m, {}, name)):
        with pytest.raises(ValueError, match="there is no adapter 'x'; expected one of: default, other"):
            function(model, "x")
        with pytest.raises(TypeError, match="expected a PeftModel, or the PeftParams that jpeft.wrap returns"):
            function({}, "x")


def test_embeddings_are_written_if_asked(tmp_path):
    model = get_peft_model(llama(), jpeft.LoraConfig(r=2, target_modules=["embed_tokens"]))
    keys = {
        choice: set(get_peft_model_state_dict(model, save_embedding_layers=choice)) for choice in (True, False, "auto")
    }
    assert keys["auto"] - keys[False] == {"base_model.model.model.embed_tokens.base_layer.weight"}
    assert keys[True] - keys["auto"] == {"base_model.model.lm_head.weight"}
    with pytest.raises(ValueError, match="save_embedding_layers is 'yes'; expected True, False or 'auto'"):
        model.save_pretrained(tmp_path, save_embedding_layers="yes")
    with pytest.warns(UserWarning, match="the base weights of model.embed_tokens.embedding are saved too"):
        model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    loaded = PeftModel.from_pretrained(llama(), tmp_path)
    same(loaded(input_ids=[[1, 2]]), model(input_ids=[[1, 2]]))


def test_weights_converted_on_saving(tmp_path):
    config = dataclasses.replace(CONFIG, init_lora_weights="pissa")
    model = get_peft_model((plain, tree()), config)
    model.params = jax.tree.map(
        lambda leaf, trains: leaf + 0.1 if trains else leaf, model.params, jpeft.trainable_mask(model.params)
    )
    model.save_pretrained(tmp_path, path_initial_model_for_weight_conversion=True)
    loaded = PeftModel.from_pretrained((plain, tree()), tmp_path)
    assert loaded.active_peft_config.r == 4
    np.testing.assert_allclose(loaded(X), model(X), rtol=1e-5)


def test_model_card(tmp_path):
    llama().save_pretrained(tmp_path / "base")
    base = FlaxAutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, jpeft.LoraConfig(task_type="CAUSAL_LM"))
    (tmp_path / "README.md").write_text("---\nlicense: mit\ntags:\n- mine\n---\n# My words\n")
    model.create_or_update_model_card(tmp_path)
    card = huggingface_hub.ModelCard.load(tmp_path / "README.md")
    name = str(tmp_path / "base")
    assert card.data.to_dict() == {
        "license": "mit",
        "base_model": name,
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": sorted([f"base_model:adapter:{name}", "lora", "mine", "transformers"]),
    }
    assert card.text.strip() == "# My words"


def test_push_to_hub(model, monkeypatch):
    done = []

    class Api:
        def __init__(self, token):
            done.append(("token", token))

        def create_repo(self, repo_id, private, exist_ok):
            done.append((repo_id, private, exist_ok))
            return types.SimpleNamespace(repo_id=f"me/{repo_id}")

        def upload_folder(self, folder_path, **options):
            done.append(options)
            with open(f"{folder_path}/other/adapter_config.json") as file:
                return json.load(file)["r"]

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    found = model.push_to_hub("mine", token="t", private=True, commit_message="hello", revision="dev")
    wanted = {"repo_id": "me/mine", "commit_message": "hello", "revision": "dev", "create_pr": False}
    assert found == 3 and done == [("token", "t"), ("mine", True, True), wanted]
    done.clear()
    with pytest.raises(ValueError, match="selected_adapters is"):
        model.push_to_hub("mine", selected_adapters=["x"])
    assert done == [("token", None)]


def test_auto_models_and_configs(tmp_path):
    llama().save_pretrained(tmp_path / "base")
    base = FlaxAutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, jpeft.LoraConfig(task_type="CAUSAL_LM", **RANDOM))
    model.save_pretrained(tmp_path / "a")
    assert jpeft_interop.PeftConfig.from_pretrained(tmp_path / "a").base_model_name_or_path == str(tmp_path / "base")
    auto = jpeft_interop.AutoPeftModelForCausalLM
    loaded = auto.from_pretrained(tmp_path / "a", is_trainable=True, param_dtype=jnp.bfloat16, remat="nothing_saveable")
    assert type(loaded) is jpeft_interop.PeftModelForCausalLM and loaded.get_nb_trainable_parameters()[0] == 64 * 4
    assert {leaf.dtype.name for leaf in jax.tree.leaves(loaded.params.base)} == {"bfloat16"}
    with pytest.raises(TypeError, match="unexpected keyword argument 'nonsense'"):
        auto.from_pretrained(tmp_path / "a", nonsense=1)
    for name in ("AutoPeftModel", "AutoPeftModelForSeq2SeqLM"):
        with pytest.raises(
            ValueError, match="task_type is 'CAUSAL_LM'; expected AutoPeftModelForCausalLM.from_pretrained"
        ):
            getattr(jpeft_interop, name).from_pretrained(tmp_path / "a")


def test_auto_models_without_a_task(tmp_path):
    llama().save_pretrained(tmp_path / "base")
    base = FlaxAutoModelForCausalLM.from_pretrained(tmp_path / "base")
    get_peft_model(base, jpeft.LoraConfig()).save_pretrained(tmp_path / "a")
    auto = jpeft_interop.AutoPeftModel
    assert auto.from_pretrained(tmp_path / "a").get_base_model().blueprint.architecture.name == "LlamaForCausalLM"
    assert jpeft_interop.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "a").active_adapter == "default"
    with pytest.raises(
        ValueError, match="the adapter is of a LlamaForCausalLM; expected AutoPeftModel.from_pretrained"
    ):
        jpeft_interop.AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "a")
    for config, said in (
        (jpeft.LoraConfig(base_model_name_or_path="x"), "has neither a task_type nor a base_model_class that is known"),
        (jpeft.LoraConfig(), "base_model_name_or_path in the adapter_config.json of .* is null; load the base"),
    ):
        with pytest.raises(ValueError, match=said):
            auto.from_pretrained(tmp_path / "a", config=config)


def test_inject_adapter_in_model(model):
    base = (plain, tree())
    injected = jpeft_interop.inject_adapter_in_model(CONFIG, base, rng=jax.random.key(1))
    same(injected, jpeft.wrap(base[1], CONFIG, rng=jax.random.key(1)))
    keys = get_peft_model_state_dict(model, "other")
    by_keys = jpeft_interop.inject_adapter_in_model(jpeft.LoraConfig(r=3), base, state_dict=keys)
    assert list(by_keys.adapters["default"].sites) == ["second"]
    with pytest.raises(ValueError, match="state_dict has keys that belong to no module of the model: third.lora_A"):
        jpeft_interop.inject_adapter_in_model(CONFIG, base, state_dict={"third.lora_A": X})
    with pytest.raises(TypeError, match="state_dict names modules, which a PeftConfig has none of"):
        jpeft_interop.inject_adapter_in_model(jpeft.PeftConfig(), base, state_dict=keys)
    with pytest.raises(ValueError, match="state_dict cannot stand for target_parameters"):
        config = jpeft.LoraConfig(target_parameters=["first.kernel"])
        jpeft_interop.inject_adapter_in_model(config, base, state_dict=keys)


# ---- refusals and warnings ------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class ForeignConfig(jpeft.TunerConfig):
    peft_type: str = "OTHER"


REFUSED = {
    "a name that is taken": (lambda m: m.add_adapter("other", CONFIG), "there already is an adapter 'other'"),
    "another method": (
        lambda m: m.add_adapter("x", ForeignConfig()),
        "adapter 'x' is of the method OTHER, the others are of LORA; expected one method, or .* mixed=True",
    ),
    "an unknown name": (lambda m: m.set_adapter("x"), "adapter names are \\['x'\\]"),
    "an unknown name to freeze": (lambda m: m.set_requires_grad("x"), "there is no adapter 'x'; expected one of"),
    "an unknown name to delete": (lambda m: m.delete_adapter("x"), "adapter names are \\['x'\\]"),
    "a merged one to delete": (
        lambda m: (m.merge_adapter(), m.delete_adapter("default")),
        "adapter 'default' is merged; unmerge_adapter\\(\\) first",
    ),
    "parameters while merged": (
        lambda m: (m.merge_adapter(), setattr(m, "params", m.params)),
        "adapters are merged \\(default\\), so that none trains; unmerge_adapter\\(\\) first",
    ),
    "no parameters": (
        lambda m: setattr(m, "params", {}),
        "expected the PeftParams that jpeft.wrap returns, not a dict",
    ),
    "no generate": (lambda m: m.generate([[1]]), "plain has no generate; expected a model of jpeft_interop.models"),
    "an unknown model type": (
        lambda m: get_peft_model((plain, tree()), jpeft.LoraConfig()),
        "target_modules is None and the model has no config with a model_type, for which LORA has no default",
    ),
    "a type without defaults": (
        lambda m: get_peft_model(
            FlaxAutoModelForCausalLM.from_config({"model_type": "olmo2", **SIZES}, abstract=True), jpeft.LoraConfig()
        ),
        "model_type is 'olmo2', for which LORA has no default; name the modules .* defaults for: t5, mt5, .* qwen3",
    ),
    "a model of ours": (lambda m: get_peft_model(m, CONFIG), "the model is a PeftModel already; expected a base model"),
    "wrapped parameters": (lambda m: get_peft_model((plain, m.params), CONFIG), "the parameters have adapters already"),
    "no model": (lambda m: get_peft_model("x", CONFIG), "model is a str; expected a model of jpeft_interop.models"),
    "unknown arguments": (lambda m: get_peft_model((plain, tree()), CONFIG, strange=1), "unexpected keyword .*strange"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(model, case):
    act, said = REFUSED[case]
    before = model.params
    with pytest.raises((ValueError, TypeError), match=said):
        act(model)
    if model.face.merged:
        model.unmerge_adapter()
    same(model.params, before)


def test_warnings(model):
    with pytest.warns(UserWarning, match="no adapter is merged; nothing to do"):
        model.unmerge_adapter()
    model.merge_adapter()
    with pytest.warns(UserWarning, match=r"the adapters \['default'\] are merged already; nothing to do"):
        model.merge_adapter("default")
    with pytest.warns(UserWarning, match=r"the adapters \['default'\] are merged already; merging \['other'\] too"):
        model.merge_adapter(["other"])
    assert model.get_model_status().merged_adapters == ["default", "other"]
    model.unmerge_adapter()
    with pytest.warns(UserWarning, match="adapter 'default' was active and is deleted; 'other' is active now"):
        model.delete_adapter("default")
    model.delete_adapter("other")
    assert model.active_adapters == [] and model.get_layer_status() == []


def test_merging_into_a_tied_embedding_warns():
    base = FlaxAutoModelForCausalLM.from_config({**LLAMA, "tie_word_embeddings": True})
    model = get_peft_model(base, jpeft.LoraConfig(target_modules=["embed_tokens"]))
    with pytest.warns(UserWarning, match=r"adapters of \['model.embed_tokens'\] are merged: the merged weight changes"):
        model.merge_adapter()


def test_methods_mix_if_asked(model):
    mixed = get_peft_model((plain, tree()), CONFIG, mixed=True)
    with pytest.raises(TypeError, match="ForeignConfig"):  # of no known method, but not refused for being another one
        mixed.add_adapter("x", ForeignConfig(target_modules=["first"]))
