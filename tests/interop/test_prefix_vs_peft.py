"""Prefix tuning against PyTorch PEFT, for every kind of model: outputs, generation, files both ways, training."""

import copy
import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jpeft
import jpeft_interop
from jpeft_interop import models

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from tests.interop.prompt_models import (  # noqa: E402
    BART,
    BERT,
    DECODER,
    KINDS,
    LENGTH,
    PAD,
    ROWS,
    T5,
    VOCABULARY,
    Kind,
    Pair,
    assert_close,
    assert_same_files,
    inputs,
    labels,
    loaded,
    loaded_by_peft,
    output_of,
    pair_of,
    tensors,
    their_output,
    torch_inputs,
)
from tests.interop.test_round_trip import quietly, randomise  # noqa: E402

COUNT = 3
MORE = {
    "gemma 2": Kind(
        lambda: transformers.Gemma2Config(**DECODER, num_key_value_heads=2, head_dim=8, sliding_window=4),
        "Gemma2ForCausalLM",
        "FlaxAutoModelForCausalLM",
        "CAUSAL_LM",
    ),
    "bloom": Kind(
        lambda: transformers.BloomConfig(vocab_size=VOCABULARY, hidden_size=16, n_layer=2, n_head=4, pad_token_id=PAD),
        "BloomForCausalLM",
        "FlaxAutoModelForCausalLM",
        "CAUSAL_LM",
    ),
    "llama, sequences": Kind(
        lambda: transformers.LlamaConfig(**DECODER, num_key_value_heads=2, num_labels=3),
        "LlamaForSequenceClassification",
        "FlaxAutoModelForSequenceClassification",
        "SEQ_CLS",
    ),
    "bart, a deeper encoder": Kind(
        lambda: transformers.BartConfig(**{**BART, "encoder_layers": 3}),
        "BartForConditionalGeneration",
        "FlaxAutoModelForSeq2SeqLM",
        "SEQ_2_SEQ_LM",
    ),
    "roberta, tokens": Kind(
        lambda: transformers.RobertaConfig(**BERT, num_labels=3),
        "RobertaForTokenClassification",
        "FlaxAutoModelForTokenClassification",
        "TOKEN_CLS",
    ),
}
GENERATED = ("gemma", "gpt2", "t5", "bart")
"""And llama, by beams."""


@functools.cache
def _pair(name, root):
    if name in KINDS:
        return pair_of(name, root)
    kind = MORE[name]
    model = randomise(getattr(transformers, kind.theirs)(kind.config()), 0).eval()
    model.save_pretrained(root)
    return Pair(kind, model, getattr(models, kind.ours).from_pretrained(root), root)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("prefixes")


@pytest.fixture
def pair(root):
    return lambda name: _pair(name, root / name.replace(" ", "_"))


def prefix_config(own, **settings):
    return peft.PrefixTuningConfig(task_type=own.kind.task, num_virtual_tokens=COUNT, **settings)


def batch_of(own, *, left=False):
    """Rows with padding, of what PEFT takes beside a prefix; what is hidden is not compared."""
    batch = {name: value for name, value in inputs(own.kind).items() if name != "token_type_ids"}
    if left:
        lengths = batch["attention_mask"].sum(1)
        for name in ("input_ids", "attention_mask"):
            shifted = zip(batch[name], lengths, strict=True)
            batch[name] = np.stack([np.roll(row, LENGTH - length) for row, length in shifted])
    return batch


def labels_of(own):
    return labels(own.kind)


def seen(own, batch):
    return None if own.kind.task in ("SEQ_CLS", "SEQ_2_SEQ_LM") else batch["attention_mask"]


@pytest.mark.parametrize("name", [*KINDS, *MORE])
def test_files_and_outputs_both_ways(pair, name, tmp_path):
    own = pair(name)
    theirs = own.with_peft(prefix_config(own))
    quietly(theirs.save_pretrained, tmp_path / "theirs")
    ours = loaded(own, tmp_path / "theirs")
    for left in (False, True):
        batch = batch_of(own, left=left)
        assert_close(output_of(ours(**batch)), their_output(theirs, batch), seen(own, batch))
    want = their_output(theirs, batch)
    assert np.abs(want - their_output(own.theirs, batch)).max() > 0.02
    ours.save_pretrained(tmp_path / "ours")
    assert_same_files(tmp_path / "theirs", tmp_path / "ours")
    one, other = (json.loads((tmp_path / side / "adapter_config.json").read_text()) for side in ("theirs", "ours"))
    assert one == other
    again = loaded_by_peft(own, tmp_path / "ours")
    assert_close(their_output(again, batch), want, seen(own, batch))
    fresh = quietly(jpeft_interop.get_peft_model, own.ours, jpeft.PrefixTuningConfig(
        task_type=own.kind.task, num_virtual_tokens=COUNT
    ))  # fmt: skip
    fresh.save_pretrained(tmp_path / "fresh")
    one, other = tensors(tmp_path / "theirs"), tensors(tmp_path / "fresh")
    assert {key: array.shape for key, array in one.items()} == {key: array.shape for key, array in other.items()}
    if name in GENERATED:
        check_generation(theirs, ours, batch)


def check_generation(theirs, ours, batch, **settings):
    given = {name: batch[name] for name in ("input_ids", "attention_mask")}
    want = quietly(theirs.generate, **torch_inputs(given), max_new_tokens=5, do_sample=False, **settings).numpy()
    got = np.asarray(ours.generate(**given, max_new_tokens=5, **settings).sequences)
    np.testing.assert_array_equal(got[:, : want.shape[1]], want)
    return got


def test_beams_sampling_and_a_processor(pair, tmp_path):
    own = pair("llama")
    theirs = own.with_peft(prefix_config(own))
    theirs.save_pretrained(tmp_path)
    ours, batch = loaded(own, tmp_path), batch_of(own, left=True)
    check_generation(theirs, ours, batch, num_beams=3, num_return_sequences=2)

    def seven(sequences, logits, end):
        assert sequences.shape == (2 * ROWS, LENGTH + 3)
        return logits.at[:, 7].add(1e4)

    drawn = ours.generate(**batch, max_new_tokens=3, do_sample=True, num_return_sequences=2, logits_processor=seven)
    np.testing.assert_array_equal(drawn.sequences[:, :LENGTH], np.repeat(batch["input_ids"], 2, axis=0))
    assert (np.asarray(drawn.sequences)[:, LENGTH:] == 7).all()


def steps_of(own, theirs, params, batch, rate):
    """(losses of PEFT's ten steps, ours, our parameters after them)."""
    optimizer, want = torch.optim.SGD([p for p in theirs.parameters() if p.requires_grad], lr=rate), []
    for _ in range(10):
        loss = quietly(theirs, **torch_inputs(batch)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        want.append(loss.item())
    apply, tx = jpeft.lift(own.ours.apply), optax.masked(optax.sgd(rate), jpeft.trainable_mask)

    @jax.jit
    def step(params, state):
        def loss(params):
            prepared, given = jpeft_interop.prepare_inputs(own.ours, params, batch)
            return apply(prepared, **given).loss

        value, gradients = jpeft.value_and_grad(loss)(params)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value

    state, got = tx.init(params), []
    for _ in range(10):
        params, state, value = step(params, state)
        got.append(float(value))
    return want, got, params


@pytest.mark.parametrize(("name", "projection"), [("llama", True), ("t5", False)])
def test_ten_steps_of_training(pair, name, projection, tmp_path):
    own = pair(name)
    theirs = own.with_peft(prefix_config(own, prefix_projection=projection, encoder_hidden_size=5))
    config = jpeft.PrefixTuningConfig(
        task_type=own.kind.task, num_virtual_tokens=COUNT, prefix_projection=projection, encoder_hidden_size=5
    )
    ours = quietly(jpeft_interop.get_peft_model, own.ours, config)
    quietly(theirs.save_pretrained, tmp_path / "begun")
    head = loaded(own, tmp_path / "begun").params.adapters["default"].replaced
    adapter = ours.params.adapters["default"]
    encoder = theirs.prompt_encoder["default"].state_dict()
    shared = {name: jnp.asarray(array.numpy()) for name, array in encoder.items()}
    if not projection:
        shared = {"prompt_embeddings": shared["embedding.weight"]}
    assert {name: array.shape for name, array in shared.items()} == {n: a.shape for n, a in adapter.shared.items()}
    ours.params = dataclasses.replace(
        ours.params, adapters={"default": dataclasses.replace(adapter, shared=shared, replaced=dict(head))}
    )
    batch = {k: v for k, v in {**batch_of(own), **labels_of(own)}.items() if k != "decoder_input_ids"}
    want, got, params = steps_of(own, theirs, ours.params, batch, 0.1)
    np.testing.assert_allclose(got, want, atol=1e-3, rtol=1e-3)
    assert want[-1] < want[0]
    ours.params = params
    ours.save_pretrained(tmp_path / "ours")
    quietly(theirs.save_pretrained, tmp_path / "theirs")
    one, other = tensors(tmp_path / "ours"), tensors(tmp_path / "theirs")
    assert one.keys() == other.keys()
    for key in one:
        np.testing.assert_allclose(one[key], other[key], atol=1e-3)

    assert (tmp_path / "ours" / "jpeft_state.safetensors").exists() == projection
    again = loaded(own, tmp_path / "ours", is_trainable=True).params.adapters["default"].shared
    for key, array in params.adapters["default"].shared.items():
        np.testing.assert_array_equal(again[key], array)
    if projection:
        with pytest.raises(ValueError, match="not the encoder that it was made of"):
            loaded(own, tmp_path / "theirs", is_trainable=True)


def test_keys_wider_than_the_model(pair, tmp_path):
    """Of a T5 whose heads are wider than its width says PEFT reads the sizes wrongly; told them, it agrees."""
    kind = KINDS["t5"]
    model = randomise(transformers.T5ForConditionalGeneration(transformers.T5Config(**{**T5, "d_kv": 6})), 0).eval()
    model.save_pretrained(tmp_path / "base")
    ours = models.FlaxAutoModelForSeq2SeqLM.from_pretrained(tmp_path / "base")
    own = Pair(kind, model, ours, tmp_path / "base")
    found = jpeft_interop.get_peft_model(
        ours, jpeft.PrefixTuningConfig(task_type=kind.task, num_virtual_tokens=COUNT)
    ).active_peft_config
    sizes = {name: getattr(found, name) for name in ("token_dim", "num_attention_heads", "num_layers")}
    assert sizes == {"token_dim": 24, "num_attention_heads": 4, "num_layers": 2}
    theirs = own.with_peft(prefix_config(own, **sizes))
    theirs.save_pretrained(tmp_path / "theirs")
    batch = batch_of(own)
    assert_close(output_of(loaded(own, tmp_path / "theirs")(**batch)), their_output(theirs, batch))
    fails = quietly(peft.get_peft_model, copy.deepcopy(model), prefix_config(own))
    with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
        their_output(fails, batch)


def test_rows_of_a_batch_have_prefixes_of_their_own(pair, tmp_path):
    own = pair("gpt2")
    (ours, theirs), names, batch = with_two(own, tmp_path), ["other", "__base__", "default"], batch_of(own, left=True)
    got = np.asarray(ours(**batch, adapter_names=names).logits)
    for row, name in enumerate(names):
        want = their_output(own.theirs if name == "__base__" else theirs[name], batch)
        rows = slice(row, row + 1)
        assert_close(got[rows], want[rows], batch["attention_mask"][rows])


def test_rows_of_a_generated_batch_have_prefixes_of_their_own(pair, tmp_path):
    """Each token is the likeliest one after those before it, of a model that has learned positions."""
    own = pair("bart")
    (ours, theirs), names, batch = with_two(own, tmp_path), ["other", "default", "other"], batch_of(own)
    del batch["decoder_input_ids"]
    tokens = np.asarray(ours.generate(**batch, adapter_names=names, max_new_tokens=4, eos_token_id=[]).sequences)
    logits = np.asarray(ours(**batch, decoder_input_ids=tokens[:, :-1], adapter_names=names).logits)
    np.testing.assert_array_equal(logits.argmax(-1), tokens[:, 1:])
    want = their_output(theirs["default"], {**batch, "decoder_input_ids": tokens[:, :-1]})
    assert_close(logits[1], want[1])


def with_two(own, folder):
    """Our model with two adapters, "default" and "other", of different lengths, and PEFT's with each."""
    theirs = {}
    for name, count, seed in (("default", COUNT, 3), ("other", 2, 4)):
        theirs[name] = own.with_peft(peft.PrefixTuningConfig(task_type=own.kind.task, num_virtual_tokens=count), seed)
        theirs[name].save_pretrained(folder / name)
    ours = loaded(own, folder / "default")
    ours.load_adapter(folder / "other", "other")
    return ours, theirs


def test_lora_is_active_at_the_same_time(pair, tmp_path):
    """As PEFT computes it with LoRA merged into the model that learns the prefix; given positions begin after it."""
    own = pair("llama")
    lora = own.with_peft(peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj"]))
    lora.save_pretrained(tmp_path / "lora")
    prefix = quietly(peft.get_peft_model, lora.merge_and_unload(), prefix_config(own)).eval()
    prefix.save_pretrained(tmp_path / "prefix")
    batch = {**batch_of(own), "position_ids": np.arange(LENGTH)[None].repeat(ROWS, 0) + 2}
    params = jpeft_interop.load_pretrained(own.ours.params, tmp_path / "lora", adapter_name="lora")
    params = jpeft_interop.load_adapter(params, tmp_path / "prefix", "prefix")
    active = jpeft.set_adapter(params, ["lora", "prefix"])
    prepared, given = jpeft_interop.prepare_inputs(own.ours, active, batch)
    got = jax.jit(jpeft.lift(own.ours.apply))(prepared, **given).logits
    assert_close(got, their_output(prefix, batch), batch["attention_mask"])
    assert len(jpeft_interop.PeftModel(own.ours, jpeft.LoraConfig(target_modules=["q_proj"]))(**batch).logits) == ROWS
