"""The cache, and padding within it, in the decoders of GPT-2, GPT-NeoX, OPT and BLOOM."""

import dataclasses
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jpeft_interop.models import FlaxAutoModelForCausalLM
from jpeft_interop.models._call import begin
from jpeft_interop.models._causal import check_length
from jpeft_interop.models._config import check_heads, translated

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
oracle = importlib.import_module("tests.interop.models.torch_oracle")

COMMON = {"vocab_size": 40, "hidden_size": 24}
DEPTHS = {"num_hidden_layers": 2, "num_attention_heads": 3}
CONFIGS = {
    "GPT2LMHeadModel": lambda: transformers.GPT2Config(vocab_size=40, n_embd=24, n_layer=2, n_head=3, n_positions=20),
    "GPTNeoXForCausalLM": lambda: transformers.GPTNeoXConfig(**COMMON, **DEPTHS, intermediate_size=44),
    "OPTForCausalLM": lambda: transformers.OPTConfig(**COMMON, **DEPTHS, ffn_dim=44, max_position_embeddings=20),
    "BloomForCausalLM": lambda: transformers.BloomConfig(**COMMON, n_layer=2, n_head=3),
}
IDS = oracle.token_ids((3, 10), 40)
PROMPT = 6
MASK = np.ones((3, 10), np.int64)
MASK[1, :3] = 0
MASK[2, PROMPT - 2 : PROMPT] = 0
"""Prompts of six tokens without padding, padded on the left, and on the right; four tokens follow each."""

each_family = pytest.mark.parametrize("name", CONFIGS)


def compiled(model):
    call = jax.jit(model.apply, static_argnames="cache_length")

    def strictly(**inputs):
        with jax.numpy_dtype_promotion("strict"):
            return call(model.params, **inputs)

    return strictly


@each_family
@pytest.mark.parametrize("scan_layers", [False, True])
def test_tokens_one_by_one_are_as_good_as_all_at_once(name, scan_layers, tmp_path):
    theirs = oracle.random_model(name, CONFIGS[name]())
    folder = oracle.saved(theirs, tmp_path)
    call = compiled(FlaxAutoModelForCausalLM.from_pretrained(folder, scan_layers=scan_layers))
    expected = oracle.torch_output(theirs, "logits", input_ids=IDS, attention_mask=MASK)
    oracle.assert_close(np.asarray(call(input_ids=IDS, attention_mask=MASK).logits), expected, MASK)
    output = call(input_ids=IDS[:, :PROMPT], attention_mask=MASK[:, :PROMPT], cache_length=12)
    pieces = [output.logits]
    for at in range(PROMPT, 10):
        token, seen = IDS[:, at : at + 1], MASK[:, at : at + 1]
        output = call(input_ids=token, attention_mask=seen, past_key_values=output.past_key_values)
        pieces.append(output.logits)
    oracle.assert_close(np.concatenate(pieces, axis=1), expected, MASK)


@each_family
def test_a_cache_of_prompts_without_a_mask(name):
    call = compiled(FlaxAutoModelForCausalLM.from_config(CONFIGS[name]().to_dict()))
    expected = np.asarray(call(input_ids=IDS).logits)
    output = call(input_ids=IDS[:, :PROMPT], cache_length=10)
    last = call(input_ids=IDS[:, PROMPT:], past_key_values=output.past_key_values)
    oracle.assert_close(np.concatenate([output.logits, last.logits], axis=1), expected)


@each_family
def test_half_precision_stays_near(name):
    model = FlaxAutoModelForCausalLM.from_config(CONFIGS[name]().to_dict())
    rough = FlaxAutoModelForCausalLM.from_config(CONFIGS[name]().to_dict(), dtype=jnp.bfloat16, abstract=True)
    inputs = {"input_ids": IDS, "attention_mask": MASK}
    expected = np.asarray(compiled(model)(**inputs).logits)
    actual = compiled(dataclasses.replace(rough, params=model.params))(**inputs).logits
    assert actual.dtype == jnp.bfloat16
    assert np.abs(np.asarray(actual, np.float32) - expected)[MASK != 0].max() < 0.05 * np.abs(expected).max()


@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "OPTForCausalLM"])
def test_a_text_longer_than_the_table_of_positions(name):
    model = FlaxAutoModelForCausalLM.from_config(CONFIGS[name]().to_dict(), abstract=True)
    with pytest.raises(ValueError, match="21 tokens exceed max_position_embeddings=20: truncate the input"):
        jax.eval_shape(model.apply, model.params, np.ones((1, 21), np.int32))


def test_a_text_may_be_longer_than_the_table_if_its_positions_are_given():
    places = jnp.zeros((1, 21), jnp.int32)
    check_length(begin(1, 21, None, places, None, None), places, 20)


def test_two_values_for_one_setting():
    assert translated({"n_embed": 4, "hidden_size": 4}, {"n_embed": "hidden_size"}) == {"hidden_size": 4}
    with pytest.raises(ValueError, match="n_embed=5 and hidden_size=4, two names of one setting: remove one of them"):
        translated({"n_embed": 5, "hidden_size": 4}, {"n_embed": "hidden_size"})


@pytest.mark.parametrize("model_type", ["gpt2", "gpt_neox", "opt", "bloom"])
def test_heads_that_do_not_divide_the_features(model_type):
    with pytest.raises(ValueError, match="hidden_size 30 is not a multiple of num_attention_heads 4"):
        FlaxAutoModelForCausalLM.from_config(
            {"model_type": model_type, "hidden_size": 30, "num_attention_heads": 4}, abstract=True
        )
    check_heads(32, 4)
