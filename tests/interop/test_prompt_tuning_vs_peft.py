"""Prompt tuning against PyTorch PEFT, for every kind of model: outputs, generation, files both ways, training."""

import copy
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jpeft
import jpeft_interop

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

from tests.interop.prompt_models import (  # noqa: E402
    EOS,
    KINDS,
    LENGTH,
    PAD,
    ROWS,
    assert_close,
    check_both_ways,
    check_generation,
    inputs,
    labels,
    loaded,
    tensors,
    their_output,
    torch_inputs,
)
from tests.interop.test_round_trip import quietly  # noqa: E402

COUNT = 4
GENERATES = ("CAUSAL_LM", "SEQ_2_SEQ_LM")


@pytest.mark.parametrize("name", KINDS)
def test_files_and_outputs_both_ways(pair, name, tmp_path):
    own = pair(name)
    config = peft.PromptTuningConfig(task_type=own.kind.task, num_virtual_tokens=COUNT)
    theirs, ours = check_both_ways(own, config, tmp_path)
    if own.kind.task in GENERATES:
        check_generation(own, theirs, ours)


@pytest.mark.parametrize("name", ["gemma", "bart"])
def test_rows_of_a_table_that_the_model_scales_are_taken_up_scaled(pair, name):
    own, ids = pair(name), (7, 9)
    config = jpeft.PromptTuningConfig(
        task_type=own.kind.task, num_virtual_tokens=2, num_transformer_submodules=1, prompt_tuning_init="TEXT",
        prompt_tuning_init_ids=ids,
    )  # fmt: skip
    rows = jpeft_interop.get_peft_model(own.ours, config).params.adapters["default"].shared["prompt_embeddings"]
    want = own.theirs.get_input_embeddings()(torch.tensor(ids)).detach().numpy()
    np.testing.assert_allclose(rows, want, rtol=1e-6)
    assert np.abs(want / own.theirs.get_input_embeddings().weight.detach().numpy()[list(ids)] - 4).max() < 1e-5


@pytest.mark.parametrize("name", ["llama", "t5", "bert, sequences"])
def test_ten_steps_of_training(pair, name, tmp_path):
    own = pair(name)
    theirs = own.with_peft(peft.PromptTuningConfig(task_type=own.kind.task, num_virtual_tokens=COUNT))
    theirs.save_pretrained(tmp_path)
    batch = {**inputs(own.kind), **labels(own.kind)}
    batch = {name: value for name, value in batch.items() if name != "decoder_input_ids"}
    optimizer, want = torch.optim.SGD([p for p in theirs.parameters() if p.requires_grad], lr=0.5), []
    for _ in range(10):
        loss = quietly(theirs, **torch_inputs(batch)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        want.append(loss.item())

    ours = loaded(own, tmp_path, is_trainable=True)
    apply, tx = jpeft.lift(own.ours.apply), optax.masked(optax.sgd(0.5), jpeft.trainable_mask)

    @jax.jit
    def step(params, state):
        def loss(params):
            prepared, given = jpeft_interop.prepare_inputs(own.ours, params, batch)
            return apply(prepared, **given).loss

        value, gradients = jpeft.value_and_grad(loss)(params)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value

    params, state, got = ours.params, tx.init(ours.params), []
    for _ in range(10):
        params, state, value = step(params, state)
        got.append(float(value))
    np.testing.assert_allclose(got, want, atol=1e-3, rtol=1e-3)
    assert want[-1] < want[0]
    ours.params = params
    ours.save_pretrained(tmp_path / "ours")
    quietly(theirs.save_pretrained, tmp_path / "theirs")
    one, other = tensors(tmp_path / "ours"), tensors(tmp_path / "theirs")
    assert one.keys() == other.keys()
    for key in one:
        np.testing.assert_allclose(one[key], other[key], atol=1e-3)


def test_the_loss_of_token_classification_and_answers_counts_from_the_text_on(pair):
    """PEFT cannot say: it fails for labels of tokens, and leaves places where they were without a prompt."""
    for name in ("bert, tokens", "bert, answers"):
        own = pair(name)
        config = jpeft.PromptTuningConfig(task_type=own.kind.task, num_virtual_tokens=COUNT)
        model = jpeft_interop.get_peft_model(own.ours, config, rng=jax.random.key(1))
        batch = inputs(own.kind)
        outputs = model(**batch, **labels(own.kind))
        if name == "bert, tokens":
            logits, wanted = np.asarray(outputs.logits)[:, COUNT:], labels(own.kind)["labels"]
            logs = jax.nn.log_softmax(logits)
            want = -np.mean(np.take_along_axis(np.asarray(logs), wanted[..., None], -1))
        else:
            both = []
            for field, wanted in (("start_logits", "start_positions"), ("end_logits", "end_positions")):
                logs = np.asarray(jax.nn.log_softmax(getattr(outputs, field)))
                both.append(-np.mean(logs[np.arange(ROWS), labels(own.kind)[wanted] + COUNT]))
            want = np.mean(both)
        np.testing.assert_allclose(float(outputs.loss), want, rtol=1e-5)


def test_padding_before_a_text_changes_nothing(pair, tmp_path):
    """PEFT counts it as tokens between the prompt and the text; a row by itself is what it means."""
    own = pair("llama")
    theirs = own.with_peft(peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=COUNT))
    theirs.save_pretrained(tmp_path)
    ours = loaded(own, tmp_path)
    batch = inputs(own.kind)
    lengths = batch["attention_mask"].sum(1)
    left = {name: np.stack([np.roll(row, LENGTH - n) for row, n in zip(value, lengths, strict=True)])
            for name, value in batch.items()}  # fmt: skip
    for given in (batch, left):
        got = np.asarray(ours.generate(**given, max_new_tokens=4).sequences)[:, LENGTH:]
        for row, length in enumerate(lengths):
            ids = torch.tensor(batch["input_ids"][row : row + 1, :length])
            want = quietly(theirs.generate, input_ids=ids, max_new_tokens=4, do_sample=False)[0, length:].numpy()
            assert got[row, : len(want)].tolist() == want.tolist()


def test_beams_sampling_and_a_processor_see_the_text_alone(pair, tmp_path):
    own = pair("llama")
    theirs = own.with_peft(peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=COUNT))
    theirs.save_pretrained(tmp_path)
    ours = loaded(own, tmp_path)
    ids = inputs(own.kind, padded=False)["input_ids"]
    want = quietly(theirs.generate, input_ids=torch.tensor(ids), max_new_tokens=4, num_beams=3, do_sample=False).numpy()
    got = np.asarray(ours.generate(ids, max_new_tokens=4, num_beams=3).sequences)
    np.testing.assert_array_equal(got[:, : want.shape[1]], want)
    seen = []

    def processor(sequences, logits, end):
        seen.append(sequences.shape)
        return jnp.where(jnp.arange(logits.shape[-1]) == sequences[:, 0, None], 100.0, logits)

    got = np.asarray(ours.generate(ids, max_new_tokens=3, logits_processor=processor).sequences)
    assert set(seen) == {(ROWS, LENGTH + 3)}
    np.testing.assert_array_equal(got[:, LENGTH:], np.repeat(ids[:, :1], 3, axis=1))
    drawn = ours.generate(ids, max_new_tokens=3, do_sample=True, num_return_sequences=2, seed=1).sequences
    assert drawn.shape == (2 * ROWS, LENGTH + 3)
    np.testing.assert_array_equal(drawn[:, :LENGTH], np.repeat(ids, 2, axis=0))


def test_rows_of_a_batch_have_prompts_of_their_own(pair, tmp_path):
    own = pair("gpt2")
    for name, count, seed in (("default", COUNT, 3), ("other", 2, 4)):
        theirs = own.with_peft(peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=count), seed)
        theirs.save_pretrained(tmp_path / name)
    ours = loaded(own, tmp_path / "default")
    ours.load_adapter(tmp_path / "other", "other")
    batch, names = inputs(own.kind), ["other", "__base__", "default"]
    got = np.asarray(ours(**batch, adapter_names=names).logits)
    tokens = np.asarray(ours.generate(**batch, adapter_names=names, max_new_tokens=3).sequences)
    for row, name in enumerate(names):
        one = {key: value[row : row + 1] for key, value in batch.items()}
        if name == "__base__":
            with ours.disable_adapter():
                want, sequence = ours(**one).logits, ours.generate(**one, max_new_tokens=3).sequences
        else:
            ours.set_adapter(name)
            want, sequence = ours(**one).logits, ours.generate(**one, max_new_tokens=3).sequences
        want = np.asarray(want)[:, -LENGTH:]
        begins = {"default": COUNT, "other": 2, "__base__": 0}[name]
        assert_close(got[row : row + 1, begins : begins + LENGTH], want, one["attention_mask"])
        np.testing.assert_array_equal(tokens[row], np.asarray(sequence)[0])


def test_lora_is_active_at_the_same_time(pair, tmp_path):
    """As PEFT computes it with LoRA merged into the model that learns the prompt."""
    own = pair("llama")
    lora = own.with_peft(peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "embed_tokens"]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lora.save_pretrained(tmp_path / "lora")
        merged = lora.merge_and_unload()
    prompt = quietly(
        peft.get_peft_model,
        copy.deepcopy(merged),
        peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=COUNT),
    ).eval()
    prompt.save_pretrained(tmp_path / "prompt")
    batch = inputs(own.kind)
    want = their_output(prompt, batch)
    params = jpeft_interop.load_pretrained(own.ours.params, tmp_path / "lora", adapter_name="lora")
    params = jpeft_interop.load_adapter(params, tmp_path / "prompt", "prompt")
    for names in (["lora", "prompt"], ["prompt", "lora"]):
        active = jpeft.set_adapter(params, names)
        prepared, given = jpeft_interop.prepare_inputs(own.ours, active, batch)
        got = jax.jit(jpeft.lift(own.ours.apply))(prepared, **given).logits
        assert_close(got, want, batch["attention_mask"])


def test_stacked_layers_and_a_quantised_table(pair, tmp_path):
    own = pair("llama")
    config = jpeft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=COUNT)
    stacked = jpeft_interop.models.FlaxAutoModelForCausalLM.from_pretrained(own.folder, scan_layers=True)
    batch = inputs(own.kind)
    want = jpeft_interop.get_peft_model(own.ours, config)(**batch).logits
    assert_close(jpeft_interop.get_peft_model(stacked, config)(**batch).logits, want, batch["attention_mask"])
    quantised = jpeft.quantize(own.ours.params, "int8", include=["embed_tokens"])
    params = jpeft.wrap(quantised, config)
    dense = jpeft.wrap(jpeft.dequantize(quantised), config)
    outputs = []
    for wrapped in (params, dense):
        prepared, given = jpeft_interop.prepare_inputs(own.ours, wrapped, batch)
        outputs.append(jpeft.lift(own.ours.apply)(prepared, **given).logits)
    assert_close(outputs[0], np.asarray(outputs[1]), batch["attention_mask"])


def test_text_begins_the_prompt(pair, tmp_path):
    own = pair("llama")
    vocabulary = {"<unk>": 0, "learn": 7, "this": 9, "well": 11}
    from tokenizers import Tokenizer, models as tokenizer_models, pre_tokenizers

    tokenizer = Tokenizer(tokenizer_models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    import transformers

    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path)
    settings = {
        "task_type": "CAUSAL_LM", "num_virtual_tokens": COUNT, "prompt_tuning_init": "TEXT",
        "prompt_tuning_init_text": "learn this well", "tokenizer_name_or_path": str(tmp_path),
    }  # fmt: skip
    theirs = quietly(peft.get_peft_model, copy.deepcopy(own.theirs), peft.PromptTuningConfig(**settings))
    want = theirs.prompt_encoder["default"].embedding.weight.detach().numpy()
    ours = jpeft_interop.get_peft_model(own.ours, jpeft.PromptTuningConfig(**settings))
    np.testing.assert_array_equal(ours.params.adapters["default"].shared["prompt_embeddings"], want)
    table = np.asarray(own.ours.params["model"]["embed_tokens"]["embedding"])
    np.testing.assert_array_equal(want, table[[7, 9, 11, 7]])
    quietly(ours.save_pretrained, tmp_path / "ours")
    assert "prompt_tuning_init_ids" not in (tmp_path / "ours" / "adapter_config.json").read_text()
    again = loaded(own, tmp_path / "ours", is_trainable=True)
    np.testing.assert_array_equal(again.params.adapters["default"].shared["prompt_embeddings"], want)
    ids = jpeft.PromptTuningConfig(num_virtual_tokens=2, prompt_tuning_init="TEXT", prompt_tuning_init_ids=[5])
    np.testing.assert_array_equal(
        jpeft.wrap(own.ours.params, ids).adapters["default"].shared["prompt_embeddings"], table[[5, 5]]
    )
    sampled = jpeft.PromptTuningConfig(num_virtual_tokens=COUNT, prompt_tuning_init="SAMPLE_VOCAB")
    rows = np.asarray(jpeft.wrap(own.ours.params, sampled).adapters["default"].shared["prompt_embeddings"])
    assert all((row == table).all(1).any() for row in rows)


def test_a_prompt_too_long_for_the_model(pair):
    own = pair("gpt2")
    model = jpeft_interop.get_peft_model(
        own.ours, jpeft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=30)
    )
    with pytest.raises(ValueError, match=r"36.*exceed.*32"):
        model(**inputs(own.kind))
    assert (EOS, PAD) == (2, 1)
