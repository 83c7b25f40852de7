"""A model that transformers quantised with bitsandbytes: run, trained, saved and generated from as PyTorch does it."""

import functools
import re
import warnings

import jax
import numpy as np
import pytest

import jpeft
from jpeft_interop import load_pretrained, save_pretrained
from jpeft_interop.models import FlaxAutoModelForCausalLM
from jpeft_interop.models._leaves import flatten
from tests.interop.models.bitsandbytes_oracle import torch, values
from tests.interop.models.torch_oracle import assert_close, random_model, saved, token_ids, transformers

peft = pytest.importorskip("peft")

SIZES = {"vocab_size": 48, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
LLAMA = {**SIZES, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
IDS = token_ids((2, 7), 48)
HOW = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "llm_int8_skip_modules": ["lm_head", "model.layers.1.mlp"]},
    "int8": {"load_in_8bit": True},
}
RATE = 0.1


@functools.cache
def dense_model():
    return random_model("LlamaForCausalLM", transformers.LlamaConfig(**LLAMA))


@pytest.fixture(scope="module", params=HOW)
def folder(request, tmp_path_factory):
    """Where transformers wrote the quantised model."""
    own = tmp_path_factory.mktemp(request.param)
    settings = transformers.BitsAndBytesConfig(**HOW[request.param])
    dense = saved(dense_model(), own / "dense")
    model = theirs(dense, quantization_config=settings)
    return saved(model, own / request.param)


def theirs(folder, **options):
    """In training, for else bitsandbytes rounds activations to 16 bits or 8, depending on the machine."""
    loader = transformers.AutoModelForCausalLM
    return loader.from_pretrained(folder, dtype=torch.float32, **options).train()


def ours(folder, **options):
    return FlaxAutoModelForCausalLM.from_pretrained(folder, **options)


def logits_of(model):
    return model(torch.tensor(IDS)).logits


def adapted(params, **options):
    """LoRA whose both factors are random, so that each has a gradient."""
    config = jpeft.LoraConfig(r=3, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    return jpeft.wrap(params, config, rng=jax.random.key(0), **options)


# Of a model as its layers are, and as one scanned stack, how many weights are quantised leaves.
LEAVES = {"nf4": (14, 7), "fp4": (11, 4), "int8": (14, 7)}


@pytest.mark.parametrize("scan_layers", [False, True], ids=["apart", "scanned"])
def test_logits_and_text_are_those_of_pytorch(folder, scan_layers):
    kind = folder.name
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        model = ours(folder, scan_layers=scan_layers)
    text = r"read as dense weights: model\.layers\.0:2\.mlp\.(\w+)\.kernel \(model\.layers\.1\.mlp\.\1\.weight is not"
    assert [bool(re.search(text, str(one.message))) for one in caught] == [True] * (kind == "fp4" and scan_layers)
    assert sum(isinstance(leaf, jpeft.Quantized) for _, leaf in flatten(model.params)) == LEAVES[kind][scan_layers]
    reference = theirs(folder)
    with torch.no_grad():
        want = logits_of(reference).numpy()
    assert_close(jax.jit(model.apply)(model.params, IDS).logits, want)
    if scan_layers and kind == "nf4":
        text = reference.generate(torch.tensor(IDS), max_new_tokens=4, do_sample=False).numpy()
        np.testing.assert_array_equal(model.generate(model.params, IDS, max_new_tokens=4).sequences, text)


@pytest.mark.parametrize("folder", ["nf4", "int8"], indirect=True)
def test_a_step_of_lora_is_that_of_peft(folder, tmp_path):
    model = ours(folder)
    wrapped, apply = adapted(model.params), jpeft.lift(model.apply)
    weights = np.random.default_rng(0).normal(size=(*IDS.shape, 48)).astype(np.float32)
    save_pretrained(wrapped, tmp_path / "before", base_model_name_or_path=str(folder))

    reference = peft.PeftModel.from_pretrained(theirs(folder), tmp_path / "before", is_trainable=True)
    optimizer = torch.optim.SGD([p for p in reference.parameters() if p.requires_grad], lr=RATE)
    logits = logits_of(reference)
    (logits * torch.tensor(weights)).mean().backward()
    optimizer.step()

    def loss(wrapped):
        logits = apply(wrapped, IDS).logits
        return (logits * weights).mean(), logits

    @jax.jit
    def step(wrapped):
        (_, own), grads = jpeft.value_and_grad(loss, has_aux=True)(wrapped)
        trains, frozen = jpeft.partition(wrapped)
        moved = jax.tree.map(lambda leaf, grad: leaf - RATE * grad, trains, jpeft.partition(grads)[0])
        return jpeft.combine(moved, frozen), own

    stepped, own = step(wrapped)
    assert_close(own, logits.detach().numpy())
    reference.save_pretrained(tmp_path / "after")
    back = load_pretrained(model.params, tmp_path / "after").adapters["default"]
    for (path, got), want, start in zip(
        flatten(stepped.adapters["default"].weights),
        jax.tree.leaves(back.weights),
        jax.tree.leaves(wrapped.adapters["default"].weights),
        strict=True,
    ):
        assert np.abs(got - start).max() > 0, path
        assert_close(got - start, want - start)
    for ours_, theirs_ in zip(jax.tree.leaves(stepped.base), jax.tree.leaves(wrapped.base), strict=True):
        np.testing.assert_array_equal(ours_, theirs_)
    save_pretrained(stepped, tmp_path / "ours", base_model_name_or_path=str(folder))
    again = peft.PeftModel.from_pretrained(theirs(folder), tmp_path / "ours")
    with torch.no_grad():
        assert_close(step(stepped)[1], logits_of(again.train()).numpy())


def test_a_quantised_model_is_saved_as_the_dense_one_that_it_stands_for(folder, tmp_path):
    scanned = folder.name != "fp4"  # Of which a layer is dense.
    model = ours(folder, scan_layers=scanned)
    model.save_pretrained(tmp_path, max_shard_bytes=50_000)
    assert "quantization_config" not in (tmp_path / "config.json").read_text()
    again = ours(tmp_path, scan_layers=scanned)
    for (path, got), (_, want) in zip(flatten(again.params), flatten(model.params), strict=True):
        np.testing.assert_array_equal(got, values(want), err_msg=path)
    back, loading = transformers.LlamaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loading.values())
    reference = theirs(folder)
    with torch.no_grad():
        assert_close(logits_of(back).numpy(), logits_of(reference).numpy())
