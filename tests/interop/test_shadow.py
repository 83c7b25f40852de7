"""Shadows (ShadowPEFT) of the models here: in calls and training, in functions of one's own, and what is refused."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft
from jpeft_interop import get_peft_model, load_pretrained, prepare_inputs, save_pretrained
from jpeft_interop.models import FlaxAutoModel, FlaxAutoModelForCausalLM, FlaxAutoModelForSeq2SeqLM

SIZES = {"vocab_size": 13, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12}
KINDS = {
    "llama": {"model_type": "llama", **SIZES, "num_key_value_heads": 2},
    "qwen2": {"model_type": "qwen2", **SIZES, "num_key_value_heads": 2},
    "phi3": {"model_type": "phi3", **SIZES, "num_key_value_heads": 2, "partial_rotary_factor": 0.5, "pad_token_id": 0},
    "gpt2": {"model_type": "gpt2", "vocab_size": 13, "n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 16},
    "bloom": {"model_type": "bloom", "vocab_size": 13, "hidden_size": 8, "n_layer": 2, "n_head": 2},
}
IDS = jnp.asarray([[1, 2, 3, 4], [5, 6, 7, 8]])


def model_of(kind="llama", **options):
    return FlaxAutoModelForCausalLM.from_config(KINDS[kind], **options)


def wrapped_of(model, **fields):
    fields = {"r": 2, "task_type": "CAUSAL_LM", "init_weights": False, **fields}
    return jpeft.wrap(model.params, jpeft.ShadowConfig(**fields), rng=jax.random.key(1))


def called(model, wrapped, **inputs):
    whole = {name: value for name, value in inputs.items() if isinstance(value, int)}

    def call(wrapped, inputs):
        wrapped, batch = prepare_inputs(model, wrapped, inputs)
        return jpeft.lift(model.apply)(wrapped, **batch, **whole)

    return jax.jit(call)(wrapped, {name: value for name, value in inputs.items() if name not in whole})


@pytest.fixture(scope="module")
def model():
    return model_of()


@pytest.fixture(scope="module")
def wrapped(model):
    return wrapped_of(model)


def test_the_loss(model, wrapped):
    """With the shadow's own in it; with a key dropout changes it; every array of the shadow has a gradient."""

    def loss(wrapped):
        wrapped, batch = prepare_inputs(model, wrapped, {"input_ids": IDS, "labels": IDS})
        output = jpeft.lift(model.apply)(wrapped, **batch)
        return output.loss, output

    step = jax.jit(jpeft.value_and_grad(loss, has_aux=True))
    (value, output), gradient = step(wrapped)
    plain = -jnp.take_along_axis(jax.nn.log_softmax(output.logits)[:, :-1], IDS[:, 1:, None], axis=-1).mean()
    assert value == pytest.approx(float(plain + 0.05 * output.shadow_loss), rel=1e-5)
    assert all(map(jnp.any, gradient.adapters["default"].shared.values()))
    assert value != step(jpeft.with_context(wrapped, rng=jax.random.key(0)))[0][0]


def test_embedded_text_is_as_good_as_its_ids(model, wrapped):
    rows = model.params["model"]["embed_tokens"]["embedding"][IDS]
    found = called(model, wrapped, inputs_embeds=rows).logits
    np.testing.assert_allclose(found, called(model, wrapped, input_ids=IDS).logits, rtol=1e-5, atol=1e-6)


def test_without_its_adapter_a_model_is_as_it_was(model, wrapped):
    base = jax.jit(model.apply)(model.params, IDS).logits
    assert jnp.abs(called(model, wrapped, input_ids=IDS).logits - base).max() > 1e-3
    found = called(model, jpeft.disable_adapters(wrapped), input_ids=IDS).logits
    np.testing.assert_allclose(found, base, rtol=1e-5, atol=1e-6)
    begins = wrapped_of(model, init_weights=True)
    np.testing.assert_allclose(called(model, begins, input_ids=IDS).logits, base, rtol=1e-5, atol=1e-6)


def test_layers_of_a_base_in_sixteen_bits():
    model = model_of(dtype=jnp.bfloat16)
    wrapped = wrapped_of(model, shadow_hidden_size=None, share_embeddings=False)
    output = called(model, wrapped, input_ids=IDS, labels=IDS)
    assert (output.logits.dtype, output.shadow_loss.dtype) == (jnp.bfloat16, jnp.float32)


def decoder(params, input_ids, shadow=None):
    """A function of one's own, which gives the shadow's arrays to the two functions around its blocks."""
    x = params["embed_tokens"]["embedding"][input_ids]
    state = jnp.zeros_like(x)
    for number, layer in params["layers"].items():
        p = None if shadow is None else shadow.weights[f"layers.{number}"]
        x = x if p is None else jpeft.shadow_injection(p, x, state, alpha=shadow.config.shadow_alpha)
        x = x + jnp.tanh(x @ layer["q"]["kernel"])
        state = state if p is None else jpeft.shadow_update(p, x, state)
    return x


def own_params():
    kernels = {str(number): {"q": {"kernel": jnp.full((4, 4), 0.1 * (number + 1))}} for number in range(2)}
    return {"embed_tokens": {"embedding": jnp.ones((9, 4))}, "layers": kernels}


def test_a_function_of_ones_own():
    face = get_peft_model((decoder, own_params()), jpeft.ShadowConfig(r=2, init_weights=False), rng=jax.random.key(0))
    adapter = face.params.adapters["default"]
    np.testing.assert_allclose(face(IDS), decoder(own_params(), IDS, adapter), rtol=1e-5, atol=1e-6)
    assert jnp.abs(face(IDS) - decoder(own_params(), IDS)).max() > 1e-3


def test_a_function_that_takes_no_shadow():
    face = get_peft_model((lambda params, input_ids: input_ids, own_params()), jpeft.ShadowConfig(r=2))
    with pytest.raises(TypeError, match="the model's function takes no shadow; expected an argument of this name"):
        face(IDS)


OTHERS = {
    "bert": lambda: FlaxAutoModel.from_config({"model_type": "bert", **SIZES}),
    "bloom": lambda: model_of("bloom"),
    "t5": lambda: FlaxAutoModelForSeq2SeqLM.from_config(
        {"model_type": "t5", "vocab_size": 9, "d_model": 8, "num_layers": 1, "num_heads": 2, "d_ff": 8, "d_kv": 4}
    ),
}


@pytest.mark.parametrize("make", OTHERS.values(), ids=OTHERS)
def test_models_without_a_shadow(make):
    with pytest.raises(ValueError, match="along the blocks of a decoder, which .* expected a model of: gemma, .*llama"):
        get_peft_model(make(), jpeft.ShadowConfig())


UNFIT = {
    "groups": (
        "llama",
        {"shadow_num_attention_heads": 3},
        "shadow_num_attention_heads is 3, which is no multiple of the model's num_key_value_heads 2",
    ),
    "heads": (
        "qwen2",
        {"shadow_hidden_size": 6, "shadow_num_attention_heads": 4},
        "hidden_size 6 is not a multiple of num_attention_heads 4",
    ),
    "gpt2": ("gpt2", {"shadow_hidden_size": 7}, "hidden_size 7 is not a multiple of num_attention_heads 2"),
    "rotation": (
        "phi3",
        {"shadow_hidden_size": 16},
        "2 heads would divide 16 features, and the rotary settings are for heads of 4; expected shadow_hidden_size=8",
    ),
}


@pytest.mark.parametrize(("kind", "fields", "match"), UNFIT.values(), ids=UNFIT)
def test_sizes_that_do_not_fit(kind, fields, match):
    with pytest.raises(ValueError, match=match):
        get_peft_model(model_of(kind), jpeft.ShadowConfig(**fields))


def test_an_adapter_of_another_model(model, wrapped, tmp_path):
    told = {"norm.weight": ((9,), 1.0, 0.0), "more.bias": ((2,), 0.0, 0.0)}
    with pytest.raises(
        ValueError, match=r"self_attn.q_proj.weight is missing.*more.bias is unexpected.*\(9,\), expected"
    ):
        called(model, wrapped_of(model, shadow_tensors=told), input_ids=IDS)
    save_pretrained(wrapped, tmp_path)
    smaller = FlaxAutoModelForCausalLM.from_config({**KINDS["llama"], "intermediate_size": 4})
    with pytest.raises(ValueError, match=r"mlp.up_proj.weight is \(12, 8\), expected \(4, 8\)"):
        load_pretrained(smaller.params, tmp_path)


def test_one_shadow_at_a_time(model, wrapped):
    both = jpeft.wrap(wrapped, jpeft.LoraConfig(r=2, target_modules=["q_proj"]), adapter_name="lora")
    both = jpeft.set_adapter(both, ["lora", "default"])
    with pytest.raises(ValueError, match="are lora, default, and 'default' is a shadow, which acts alone"):
        called(model, both, input_ids=IDS)
    with pytest.raises(ValueError, match="is a shadow, which acts alone"):
        model.generate(both, IDS, max_new_tokens=1)


def test_a_cache_without_the_shadow(model, wrapped):
    cache = jax.jit(partial(model.apply, cache_length=6))(model.params, IDS).past_key_values
    with pytest.raises(ValueError, match="past_key_values hold nothing of the shadow"):
        called(model, wrapped, input_ids=IDS[:, :1], past_key_values=cache)


def test_embedded_text_for_a_narrower_shadow(model):
    face = get_peft_model(model, jpeft.ShadowConfig(shadow_hidden_size=4, task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match="the shadow is 4 wide and inputs_embeds are 8; expected input_ids"):
        face(inputs_embeds=jnp.ones((1, 2, 8)))


def test_prompts_beside_a_shadow(model, wrapped):
    prompts = {"model.layers.1.self_attn": {"adaption_prompt": jnp.ones((1, 2, 8)), "adaption_gate": jnp.ones(1)}}
    with pytest.raises(ValueError, match="adaption prompts and a shadow, which do not go together"):
        called(model, wrapped, input_ids=IDS, adaption_prompts=prompts)
