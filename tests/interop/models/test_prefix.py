"""Models with keys and values before the first token: the same ones as of tokens, stacked, checkpointed, by chunks."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft
from jpeft_interop import get_peft_model, key_value_cache, keys_and_values, prepare_inputs
from jpeft_interop.models import (
    FlaxAutoModel,
    FlaxAutoModelForCausalLM,
    FlaxAutoModelForSeq2SeqLM,
    FlaxAutoModelForSpeechSeq2Seq,
    FlaxAutoModelForTokenClassification,
)
from jpeft_interop.models._cache import Cache
from jpeft_interop.models._prefix import KeyValuePrefix

SIZES: dict[str, Any] = {
    "vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 8, "max_position_embeddings": 16, "initializer_range": 0.5,
}  # fmt: skip
LLAMA = {"model_type": "llama", **SIZES}
GEMMA2 = {"model_type": "gemma2", **SIZES, "head_dim": 4, "sliding_window": 5, "layer_types": [
    "sliding_attention", "full_attention", "sliding_attention", "full_attention"
]}  # fmt: skip
SHALLOW = {**LLAMA, "num_hidden_layers": 2}
GPT2 = {"model_type": "gpt2", "vocab_size": 20, "n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 8}
IDS = jnp.asarray([[3, 4, 5, 6, 7, 8], [9, 8, 7, 6, 5, 4]])


def causal(config, **options):
    return FlaxAutoModelForCausalLM.from_config(config, rng=jax.random.key(1), **options)


def before(model, ids):
    """The keys and values of these tokens, as a prefix."""
    return KeyValuePrefix(*(array[:, None] for array in key_value_cache(model, ids)))


@pytest.mark.parametrize("config", [SHALLOW, GEMMA2, GPT2], ids=["llama", "gemma2", "gpt2"])
def test_keys_and_values_of_tokens_do_what_the_tokens_do(config):
    model = causal(config, scan_layers=config is GEMMA2)  # of which two stacks alternate
    run = jax.jit(model.apply, static_argnames="cache_length")
    mask = jnp.asarray([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    first, rest = jnp.asarray([2, 11]), IDS[:, :5]
    whole = jnp.concatenate([jnp.broadcast_to(first, (2, 2)), rest], axis=1)
    hidden = jnp.concatenate([jnp.ones_like(mask[:, :2]), mask], axis=1)
    want = run(model.params, whole, attention_mask=hidden, labels=whole.at[:, :3].set(-100))
    prefix = before(model, first)
    got = run(model.params, rest, attention_mask=mask, past_key_values=prefix, labels=rest.at[:, :1].set(-100))
    np.testing.assert_allclose(got.logits[mask == 1], want.logits[:, 2:][mask == 1], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(got.loss, want.loss, rtol=1e-5)
    half = run(model.params, rest[:, :2], attention_mask=mask[:, :2], past_key_values=prefix, cache_length=7)
    after = run(model.params, rest[:, 2:], past_key_values=half.past_key_values).logits
    np.testing.assert_allclose(after, want.logits[:, 4:], rtol=1e-4, atol=1e-5)


def loss_of(model):
    def loss(wrapped, **options):
        wrapped, batch = prepare_inputs(model, wrapped, {"input_ids": IDS, "labels": IDS})
        return jpeft.lift(model.apply)(wrapped, **batch, **options).loss

    return loss


def test_training_goes_through_stacks_checkpoints_and_chunks():
    """Gradients of all ways to run a model are those of the plain one; PEFT refuses checkpoints."""
    config = jpeft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, prefix_projection=True)
    plain = causal(SHALLOW)
    wrapped = get_peft_model(plain, config, rng=jax.random.key(2)).params
    value, gradient = jax.jit(jpeft.value_and_grad(loss_of(plain)))(wrapped)
    assert all(np.asarray(array).any() for array in gradient.adapters["default"].shared.values())
    stacked = causal(SHALLOW, scan_layers=True, remat="nothing_saveable")
    unrolled = causal(SHALLOW, remat="save_adapted_products")
    for model, options in ((stacked, {"loss_chunk_size": 4}), (unrolled, {})):
        own = get_peft_model(model, config, rng=jax.random.key(2)).params
        run = jax.jit(jpeft.value_and_grad(lambda w, model=model, options=options: loss_of(model)(w, **options)))
        again, other = run(own)
        np.testing.assert_allclose(again, value, rtol=1e-5)
        for name, array in gradient.adapters["default"].shared.items():
            np.testing.assert_allclose(other.adapters["default"].shared[name], array, rtol=1e-3, atol=1e-6)


def test_a_step_of_half_precision_and_quantised_weights():
    config = jpeft.CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = causal(SHALLOW, dtype=jnp.bfloat16)
    params = jpeft.quantize(model.params, "int8")
    sizes = get_peft_model(model, config).active_peft_config
    wrapped = jpeft.wrap(params, sizes)
    with jax.numpy_dtype_promotion("standard"):  # of which JAX's own gradient of attention has need
        value, gradient = jax.jit(jpeft.value_and_grad(loss_of(model)))(wrapped)
    assert np.isfinite(value) and gradient.adapters["default"].shared["trainable_embedding"].dtype == jnp.float32
    assert np.asarray(gradient.adapters["default"].shared["trainable_embedding"]).any()


def test_what_a_cache_holds():
    model, stacked = causal(SHALLOW), causal(SHALLOW, scan_layers=True)
    for one, other in zip(key_value_cache(model, IDS[0]), key_value_cache(stacked, IDS[:1]), strict=True):
        assert one.shape == (2, 6, 2, 2)
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
    cache = Cache({}, jnp.ones((2, 8), bool).at[0, 1].set(False), jnp.asarray(6))
    with pytest.raises(ValueError, match="1 of 6 tokens of the cache are padding; expected a text without"):
        keys_and_values(cache)
    with pytest.raises(ValueError, match=r"input_ids are of shape \(2, 6\); expected one text"):
        key_value_cache(model, IDS)
    bert = FlaxAutoModel.from_config(BERT, abstract=True)
    with pytest.raises(TypeError, match="bert keeps no cache of its input; expected a decoder"):
        key_value_cache(bert, IDS[0])
    with pytest.raises(TypeError, match="tuple keeps no cache of its input"):
        key_value_cache((lambda params, x: x, {"a": jnp.ones(2)}), IDS[0])


def prefix_of(layers, rows, count, heads, size):
    return KeyValuePrefix(*(jnp.zeros((layers, rows, count, heads, size)) for _ in "kv"))


def test_prefixes_that_do_not_fit_the_model():
    model = causal(LLAMA, abstract=True)
    cases = [
        (prefix_of(3, 1, 2, 2, 2), {}, "for 3 layers, the model has 4; expected .*num_layers=4"),
        (prefix_of(4, 1, 2, 4, 2), {}, "keys of 4 heads of 2, the model's are of 2 heads of 2; .*token_dim=4"),
        (prefix_of(4, 3, 2, 2, 2), {}, "the prefix has 3 rows, the input 2; expected as many, or one for all"),
        (
            prefix_of(4, 1, 2, 2, 2),
            {"cache_length": 7},
            "cache_length is 7, but 8 tokens, 2 of them virtual, are",
        ),
    ]
    for prefix, options, message in cases:
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(lambda p, own=prefix, o=options: model.apply(p, IDS, past_key_values=own, **o), model.params)


FEW = {**{key: value for key, value in SIZES.items() if key != "num_key_value_heads"}, "max_position_embeddings": 8}
OPT = {"model_type": "opt", **FEW, "ffn_dim": 8, "word_embed_proj_dim": 8}
BERT = {"model_type": "bert", **FEW}
BART = {
    "model_type": "bart", "vocab_size": 20, "d_model": 8, "encoder_layers": 1, "decoder_layers": 1,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8,
    "max_position_embeddings": 8,
}  # fmt: skip
WHISPER = {
    **BART, "model_type": "whisper", "num_mel_bins": 4, "max_source_positions": 3, "max_target_positions": 8,
    "max_position_embeddings": None, "pad_token_id": 0,
}  # fmt: skip
LONG = {
    "gpt2": (FlaxAutoModelForCausalLM, GPT2, {"input_ids": IDS}),
    "opt": (FlaxAutoModelForCausalLM, OPT, {"input_ids": IDS}),
    "bert": (FlaxAutoModel, BERT, {"input_ids": IDS}),
    "bart": (FlaxAutoModelForSeq2SeqLM, BART, {"input_ids": IDS, "decoder_input_ids": IDS}),
    "whisper": (
        FlaxAutoModelForSpeechSeq2Seq,
        WHISPER,
        {"input_features": jnp.zeros((2, 4, 6)), "decoder_input_ids": IDS},
    ),
}


@pytest.mark.parametrize(("kind", "config", "inputs"), LONG.values(), ids=LONG)
def test_a_prefix_and_a_text_too_long_for_the_positions(kind, config, inputs):
    config = {key: value for key, value in config.items() if value is not None}
    model = kind.from_config(config, abstract=True)
    task = {"opt": "CAUSAL_LM", "gpt2": "CAUSAL_LM", "bert": "FEATURE_EXTRACTION"}.get(config["model_type"])
    task = task or "SEQ_2_SEQ_LM"

    def run(params, length, count):
        settings = jpeft.PrefixTuningConfig(task_type=task, num_virtual_tokens=count)
        from jpeft_interop._base_model import base_model
        from jpeft_interop._inject import injected

        base = base_model(model)
        wrapped = injected(base.bare, base, settings, "default", abstract=True)

        def call(wrapped, inputs):
            given = {name: value[:, :length] if "ids" in name else value for name, value in inputs.items()}
            wrapped, batch = prepare_inputs(model, wrapped, given)
            return jpeft.lift(model.apply)(wrapped, **batch)

        return jax.eval_shape(call, wrapped, inputs)

    run(model.params, 5, 3)
    with pytest.raises(ValueError, match="9 tokens, 3 of them virtual, exceed .*8.*: truncate the input, or learn a"):
        run(model.params, 6, 3)
    with pytest.raises(ValueError, match="num_virtual_tokens is 8, which leaves no position for a text: .* has 8;"):
        run(model.params, 1, 8)


def test_a_decoder_deeper_than_its_encoder():
    """PEFT makes a prefix of the encoder's depth, for which such a decoder has no use."""
    model = FlaxAutoModelForSeq2SeqLM.from_config({**BART, "decoder_layers": 3})
    config = jpeft.PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=2)
    own = get_peft_model(model, config)
    assert own.active_peft_config.num_layers == 3
    keys, _ = jpeft.key_value_prefix(own.params)
    assert keys.shape == (3, 2, 2, 4) and own(IDS, decoder_input_ids=IDS).logits.shape == (2, 6, 20)


def test_models_that_take_no_prefix():
    config = jpeft.PrefixTuningConfig(num_virtual_tokens=2)
    distilbert = {"model_type": "distilbert", "vocab_size": 20, "dim": 8, "n_layers": 1, "n_heads": 2, "hidden_dim": 8}
    t5 = {"model_type": "t5", "vocab_size": 20, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    encoders = ((FlaxAutoModel, distilbert), (FlaxAutoModelForTokenClassification, t5))
    for model in (kind.from_config(own, abstract=True) for kind, own in encoders):
        with pytest.raises(TypeError, match="takes no keys and values that come before its tokens; expected a decoder"):
            get_peft_model(model, config)
    with pytest.raises(TypeError, match="the model's function takes no past_key_values; expected an argument"):
        get_peft_model((lambda params, x: x, {"query": {"kernel": jnp.ones((4, 4))}}), config)
    sizes: dict[str, Any] = {"token_dim": 8, "num_attention_heads": 4, "num_layers": 4}
    message = "num_attention_heads=4, token_dim=8, but the model has 4 layers with keys and values of 2 heads of 2"
    with pytest.raises(ValueError, match=message):
        get_peft_model(causal(LLAMA, abstract=True), jpeft.PrefixTuningConfig(num_virtual_tokens=2, **sizes))


def test_a_function_of_ones_own_gets_the_pair():
    def attention(params, x, past_key_values=None):
        q, k, v = (x @ params[name]["kernel"] for name in ("query", "key", "value"))
        if past_key_values is not None:
            k, v = (jnp.concatenate([own[0, :, 0], new]) for own, new in zip(past_key_values, (k, v), strict=True))
        return jax.nn.softmax(q @ k.T) @ v

    params = {name: {"kernel": jnp.eye(4)} for name in ("query", "key", "value")}
    config = jpeft.CartridgeConfig(num_virtual_tokens=3, token_dim=4, num_attention_heads=1, num_layers=1)
    model, x = get_peft_model((attention, params), config), jnp.ones((5, 4))
    want = attention(params, x, jpeft.key_value_prefix(model.params))
    np.testing.assert_allclose(model(x), want, rtol=1e-5)
    assert not np.allclose(want, attention(params, x), atol=0.1)


def test_rows_that_name_what_is_not_there():
    model = get_peft_model(causal(LLAMA), jpeft.CartridgeConfig(num_virtual_tokens=2), "law")
    model.add_adapter("price", jpeft.CartridgeConfig(num_virtual_tokens=3))
    model.set_adapter(["law", "price"])
    with pytest.raises(ValueError, match="2 of the active adapters have a prefix: law, price"):
        prepare_inputs(model, model.params, {"input_ids": IDS})
    for names in (["law", "news"], ["law"]):
        with pytest.raises(
            ValueError, match="adapter_names are .* for 2 rows; expected one a row, .*: law, price, __b"
        ):
            prepare_inputs(model, model.params, {"input_ids": IDS}, adapter_names=names)
    wide = jpeft.CartridgeConfig(num_virtual_tokens=3, token_dim=8, num_attention_heads=2, num_layers=4)
    mixed = jpeft.set_adapter(jpeft.wrap(model.params, wide, adapter_name="wide"), ["law", "wide"])
    with pytest.raises(ValueError, match=r"differ in \(layers, kv_heads, head_dim\): \{'law': \(4, 2, 2\)"):
        prepare_inputs(model, mixed, {"input_ids": IDS}, adapter_names=["law", "wide"])
