"""LLaMA-Adapter in our models: stacked layers, meshes, quantised bases, every task; and what takes no prompts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft
import jpeft_interop
from jpeft import AdaptionPromptConfig, LoraConfig
from jpeft_interop import prepare_inputs
from jpeft_interop.models import FlaxAutoModel, FlaxAutoModelForCausalLM, FlaxAutoModelForQuestionAnswering
from jpeft_interop.models._adaption import TAKERS
from jpeft_interop.models.auto import FAMILIES
from tests.harness import random_like

SIZES = {
    "vocab_size": 29,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}
CONFIGS = {
    "llama": {"model_type": "llama", **SIZES},
    "mistral": {"model_type": "mistral", **SIZES, "sliding_window": 4},
    "gpt2": {"model_type": "gpt2", "vocab_size": 29, "n_embd": 16, "n_head": 4, "n_layer": 3, "n_positions": 32},
}
CONFIG = AdaptionPromptConfig(adapter_len=4, adapter_layers=2)
IDS = np.random.default_rng(0).integers(1, 29, (2, 7))


def with_prompts(model):
    """The model's parameters with random prompts and open gates."""
    wrapped = jpeft.wrap(model.params, CONFIG)
    adapter = wrapped.adapters["default"]
    adapter = dataclasses.replace(adapter, weights=random_like(adapter.weights, 4, 1.0))
    return dataclasses.replace(wrapped, adapters={"default": adapter})


def outputs(model, wrapped):
    def call(wrapped, ids):
        wrapped, batch = prepare_inputs(model, wrapped, {"input_ids": ids})
        return jpeft.lift(model.apply)(wrapped, **batch)

    return jax.jit(call)(wrapped, IDS)


def saved(kind, folder):
    """A model with random weights that are large enough for prompts to tell."""
    model = FlaxAutoModelForCausalLM.from_config(CONFIGS[kind], abstract=True)
    model.save_pretrained(folder, random_like(model.params, 8, 0.2))
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return saved("llama", tmp_path_factory.mktemp("llama"))


def loss_and_gradients(model):
    def loss(wrapped):
        wrapped, batch = prepare_inputs(model, wrapped, {"input_ids": IDS, "labels": IDS})
        return jpeft.lift(model.apply)(wrapped, **batch).loss

    value, grads = jax.jit(jpeft.value_and_grad(loss))(with_prompts(model))
    return value, grads.adapters["default"].weights


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_stacked_layers_compute_and_learn_as_single_ones(kind, tmp_path):
    """The adapted layers are the last ones of a stack; the others get no gradient, as nothing of theirs is there."""
    folder = saved(kind, tmp_path)
    single = loss_and_gradients(FlaxAutoModelForCausalLM.from_pretrained(folder))
    model = FlaxAutoModelForCausalLM.from_pretrained(folder, scan_layers=True, remat="nothing_saveable")
    stacked = loss_and_gradients(model)
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6), single, stacked)
    assert sorted(path.split(".")[2] for path in stacked[1]) == ["1", "2"]
    assert all(jnp.any(leaf != 0) for leaf in jax.tree.leaves(stacked[1]))


@pytest.mark.parametrize("axes", [{"fsdp": 2}, {"data": 2, "tp": 2}], ids=str)
def test_on_a_mesh(llama, axes):
    single = FlaxAutoModelForCausalLM.from_pretrained(llama)
    expected = outputs(single, with_prompts(single))
    kinds = (jax.sharding.AxisType.Auto,) * len(axes)
    mesh = jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=kinds)
    model = FlaxAutoModelForCausalLM.from_pretrained(llama, mesh=mesh, scan_layers=True)
    wrapped = with_prompts(model)
    wrapped = jax.device_put(wrapped, jpeft.shardings(wrapped, mesh))
    np.testing.assert_allclose(outputs(model, wrapped).logits, expected.logits, rtol=1e-4, atol=1e-5)


def test_a_quantised_base(llama):
    model = FlaxAutoModelForCausalLM.from_pretrained(llama, scan_layers=True, quantize="int8")
    wrapped = with_prompts(model)
    dense = dataclasses.replace(wrapped, base=jpeft.dequantize(model.params))
    np.testing.assert_allclose(outputs(model, wrapped).logits, outputs(model, dense).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("auto", "config", "path"),
    [
        (FlaxAutoModel, "gpt2", "h.2.attn"),
        (FlaxAutoModelForQuestionAnswering, "llama", "transformer.layers.2.self_attn"),
        (FlaxAutoModelForQuestionAnswering, "mistral", "model.layers.2.self_attn"),
    ],
)
def test_of_every_task_the_attention_is_found(auto, config, path):
    model = auto.from_config(CONFIGS[config], abstract=True, scan_layers=True)
    wrapped = jpeft.wrap(model.params, CONFIG)
    assert path in wrapped.adapters["default"].weights

    def call(wrapped):
        wrapped, batch = prepare_inputs(model, wrapped, {"input_ids": IDS})
        return jpeft.lift(model.apply)(wrapped, **batch)

    found = jax.eval_shape(call, wrapped), jax.eval_shape(call, jpeft.disable_adapters(wrapped))
    assert found[0] == found[1]


# ---- what is refused ------------------------------------------------------------------------------------------------

GATE, ROWS = np.zeros(1, np.float32), np.zeros((1, 4, 16), np.float32)
FIRST, LAST = "model.layers.0.self_attn", "model.layers.2.self_attn"
FITTING = {"adaption_prompt": ROWS, "adaption_gate": GATE}


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ({"model.layers.7.self_attn": FITTING}, "for model.layers.7.self_attn; expected the attention of layers: mode"),
        ({FIRST: {"adaption_prompt": ROWS}}, r"of model.layers.0.self_attn have the shapes .*; expected \{'adaption_p"),
        ({FIRST: {**FITTING, "adaption_prompt": ROWS[0]}}, r"have the shapes .*\(4, 16\)"),
        ({FIRST: {**FITTING, "adaption_prompt": ROWS[..., 1:]}}, r"\(1, 4, 15\).* of the model's width, as many in"),
        ({FIRST: FITTING, LAST: {**FITTING, "adaption_prompt": ROWS[:, 1:]}}, r"layers.2.self_attn .*\(1, 3, 16\)"),
        ({FIRST: {**FITTING, "adaption_gate": GATE[0]}}, r"'adaption_gate': \(\)"),
    ],
)
def test_prompts_that_do_not_fit_are_refused(prompts, message):
    model = FlaxAutoModelForCausalLM.from_config(CONFIGS["llama"], abstract=True, scan_layers=True)
    with pytest.raises(ValueError, match=message):
        model.apply(model.params, IDS, adaption_prompts=prompts)


@pytest.mark.parametrize("kind", ["qwen2", "t5"])
def test_models_whose_attention_takes_none_are_refused(kind):
    sizes = SIZES if kind == "qwen2" else {"vocab_size": 29, "d_model": 16, "d_kv": 4, "num_heads": 4, "num_layers": 1}
    auto = FlaxAutoModelForCausalLM if kind == "qwen2" else jpeft_interop.models.FlaxAutoModelForSeq2SeqLM
    model = auto.from_config({"model_type": kind, **sizes}, abstract=True)
    message = f"attention of a {kind} model takes no adaption prompts; expected a model of: {TAKERS}"
    with pytest.raises(TypeError, match=message):
        jpeft_interop.get_peft_model(model, CONFIG)
    with pytest.raises(TypeError, match=message):
        model.apply(model.params, IDS, adaption_prompts={FIRST: FITTING})


def test_a_call_with_prompts_of_a_model_that_takes_none_is_refused():
    model = FlaxAutoModelForCausalLM.from_config({"model_type": "qwen2", **SIZES})
    message = "attention of a qwen2 model takes no adaption prompts"
    wrapped = jpeft.wrap(model.params, CONFIG)
    with pytest.raises(TypeError, match=message):
        prepare_inputs(model, wrapped, {"input_ids": IDS})
    with pytest.raises(TypeError, match=message):
        model.generate(wrapped, IDS)


def test_other_modules_than_the_attention_are_refused():
    model = FlaxAutoModelForCausalLM.from_config(CONFIGS["llama"], abstract=True)
    with pytest.raises(ValueError, match="target_modules is 'mlp', but what takes adaption prompts .* 'self_attn', or"):
        jpeft_interop.get_peft_model(model, dataclasses.replace(CONFIG, target_modules="mlp"))


def test_functions_that_take_none_are_refused():
    params = {"0": {"attn": {name: {"kernel": jnp.ones((4, 4))} for name in "qkvo"}}}
    config = AdaptionPromptConfig(adapter_len=2, adapter_layers=1)
    with pytest.raises(TypeError, match="the model's function takes no adaption_prompts; expected an argument"):
        jpeft_interop.get_peft_model((lambda params, x: x, params), config)
    taken = jpeft_interop.get_peft_model((lambda params, x, adaption_prompts=None: adaption_prompts, params), config)
    assert jax.tree.map(jnp.shape, taken(jnp.ones((1, 4)))) == {
        "0.attn": {"adaption_gate": (1,), "adaption_prompt": (1, 2, 4)}
    }
    jpeft_interop.get_peft_model((lambda params, x: x, params), LoraConfig(target_modules=["q"]))


def test_the_families_that_take_them_are_those_that_the_message_names():
    taking = sorted(name for name, family in FAMILIES.items() if family.adapted_attention is not None)
    assert taking == TAKERS.split(", ")
