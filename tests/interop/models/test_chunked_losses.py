"""The loss of a causal language model by chunks, without its logits: that of transformers, and its gradients."""

import jax
import numpy as np
import pytest

import jpeft
from jpeft_interop import models
from tests.interop.models.test_losses import CONFIGS, IDS, SIZES, WORDS
from tests.interop.models.torch_oracle import random_model, saved, torch, transformers

GEMMA = {**SIZES, "head_dim": 8, "num_key_value_heads": 1, "final_logit_softcapping": 2.0, "pad_token_id": 0}
CASES = {
    "llama": ("LlamaForCausalLM", CONFIGS["llama"], "lm_head"),
    # Of Gemma 2 the output layer is the embedding, and its scores are bounded.
    "gemma2": ("Gemma2ForCausalLM", lambda: transformers.Gemma2Config(**GEMMA), "model.embed_tokens"),
    "gpt2": ("GPT2LMHeadModel", CONFIGS["gpt2"], "transformer.wte"),
}


@pytest.mark.parametrize("case", CASES)
def test_chunks_give_the_loss_and_the_gradient_of_transformers(case, tmp_path):
    name, config, head = CASES[case]
    theirs = random_model(name, config())
    ours = models.FlaxAutoModelForCausalLM.from_pretrained(saved(theirs, tmp_path))
    loss = theirs(input_ids=torch.tensor(IDS), labels=torch.tensor(WORDS)).loss
    loss.backward()
    expected = theirs.get_submodule(head).weight.grad.numpy()

    @jax.jit
    @jax.value_and_grad
    def by_chunks(params):
        output = ours.apply(params, IDS, labels=WORDS, loss_chunk_size=4)
        assert output.logits is None
        return output.loss

    value, gradient = by_chunks(ours.params)
    np.testing.assert_allclose(value, loss.item(), rtol=2e-5)
    for part in head.split("."):
        gradient = gradient[part]
    (actual,) = gradient.values()
    actual = actual.T if "kernel" in gradient else actual
    np.testing.assert_allclose(actual, expected, atol=2e-5 * np.abs(expected).max(), rtol=1e-4)


def test_an_adapted_model_with_an_adapted_head_learns_the_same_from_chunks():
    sizes = {"model_type": "llama", **SIZES, "num_hidden_layers": 2}
    model = models.FlaxAutoModelForCausalLM.from_config(sizes, scan_layers=True, remat="save_adapted_products")
    config = jpeft.LoraConfig(r=2, target_modules=["q_proj", "down_proj", "lm_head"], init_lora_weights=False)
    wrapped, apply = jpeft.wrap(model.params, config, rng=jax.random.key(0)), jpeft.lift(model.apply)

    def loss(wrapped, size):
        return apply(wrapped, input_ids=IDS, labels=WORDS, loss_chunk_size=size).loss

    whole, chunked = (
        jax.jit(jpeft.value_and_grad(lambda wrapped, size=size: loss(wrapped, size)))(wrapped) for size in (None, 4)
    )
    for x, y in zip(jax.tree.leaves(whole), jax.tree.leaves(chunked), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6)


def test_chunks_without_a_loss_are_refused():
    model = models.FlaxAutoModelForCausalLM.from_config({"model_type": "llama", **SIZES})
    with pytest.raises(ValueError, match="loss_chunk_size came without labels; it is for a loss"):
        model.apply(model.params, IDS, loss_chunk_size=4)
    with pytest.raises(ValueError, match="loss_chunk_size came with logits_to_keep=1; it is for a loss"):
        model.apply(model.params, IDS, labels=IDS, logits_to_keep=1, loss_chunk_size=4)
    with pytest.raises(ValueError, match=r"labels have the shape \(3, 6\); expected \(3, 7\)"):
        model.apply(model.params, IDS, labels=IDS[:, :6], loss_chunk_size=4)
    bert = models.FlaxAutoModelForMaskedLM.from_config({"model_type": "bert", **SIZES})
    with pytest.raises(TypeError, match="BertForMaskedLM takes .*; got loss_chunk_size"):
        bert.apply(bert.params, IDS, labels=IDS, loss_chunk_size=4)
