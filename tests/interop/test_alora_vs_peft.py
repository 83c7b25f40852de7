"""aLoRA against PyTorch PEFT: offsets, files both ways, logits, generation, training, and adapters by row."""

import copy
import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import jpeft
import jpeft_interop
from jpeft_interop import load_adapter, load_pretrained, save_pretrained, verify
from jpeft_interop.models import FlaxAutoModelForCausalLM
from tests.harness import random_like
from tests.interop.test_round_trip import quietly, randomise

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
TOLERANCE = 1e-4
SIZES = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
TOKENS = [7, 8]
ALORA = {"task_type": "CAUSAL_LM", "alora_invocation_tokens": TOKENS, "r": 3, "lora_alpha": 9}
ADAPTERS = {
    "default": {**ALORA, "target_modules": ["q_proj", "v_proj", "down_proj", "lm_head"]},
    "plain": {"task_type": "CAUSAL_LM", "r": 3, "target_modules": ["q_proj", "o_proj"]},
    "other": {**ALORA, "r": 2, "alora_invocation_tokens": [9], "target_modules": ["k_proj", "v_proj"]},
}
PAD, EOS = 1, 2


def prompts():
    """Rows with padding on the left or none, with an invocation, with two, with none, with one at the very end."""
    ids = np.random.default_rng(0).integers(10, 40, (6, 9))
    mask = np.ones_like(ids)
    ids[0, 4:6] = ids[1, 2:4] = ids[1, 6:8] = ids[2, 7:9] = ids[4, 5:7] = TOKENS
    ids[3, 3], ids[4, 1] = 9, 9
    for row, padding in ((2, 3), (4, 2)):
        ids[row, :padding], mask[row, :padding] = PAD, 0
    ids[4, 2] = 9
    return ids, mask


IDS, MASK = prompts()
OFFSETS = [5, 3, 2, None, 4, None]
ROWS = ["default", "plain", "other", "other", "default", "__base__"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of a random base model and of PEFT's adapters for it."""
    folder = tmp_path_factory.mktemp("alora")
    config = transformers.LlamaConfig(
        **SIZES, num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=32, eos_token_id=EOS,
        pad_token_id=PAD,
    )  # fmt: skip
    base = randomise(transformers.LlamaForCausalLM(config), 0)
    base.save_pretrained(folder / "base")
    model = quietly(peft.get_peft_model, base, peft.LoraConfig(**ADAPTERS["default"]))
    for name in ("plain", "other"):
        quietly(model.add_adapter, name, peft.LoraConfig(**ADAPTERS[name]))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
    quietly(model.save_pretrained, folder)
    return folder


def where(folder, name):
    return folder if name == "default" else folder / name


@pytest.fixture(scope="module")
def theirs(folder):
    model = transformers.LlamaForCausalLM.from_pretrained(folder / "base")
    model = quietly(peft.PeftModel.from_pretrained, model, folder)
    for name in ("plain", "other"):
        quietly(model.load_adapter, folder / name, name)
    return model.eval()


@pytest.fixture(scope="module")
def ours(folder):
    """The familiar face with the same adapters."""
    model = jpeft_interop.PeftModel.from_pretrained(FlaxAutoModelForCausalLM.from_pretrained(folder / "base"), folder)
    for name in ("plain", "other"):
        model.load_adapter(folder / name, name)
    return model


def their_logits(model, ids=IDS, mask=MASK, **options):
    with torch.no_grad():
        return model(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask), **options).logits.numpy()


def assert_same(ours, theirs, mask=MASK):
    assert np.abs(np.asarray(ours) - theirs)[mask != 0].max() <= TOLERANCE * np.abs(theirs).max()


# ---- offsets and logits ---------------------------------------------------------------------------------------------


def test_offsets_are_those_of_peft(theirs):
    def found(ids, **options):
        offsets = peft.tuners.lora.variants.calculate_alora_offsets(
            theirs.peft_config, "default", torch.tensor(ids), **options
        )
        return [offset or 0 for offset in offsets]

    assert found(IDS) == [offset or 0 for offset in OFFSETS] == jpeft.alora_offsets(IDS, TOKENS).tolist()
    random = np.random.default_rng(3).integers(6, 10, (60, 12))
    assert found(random) == jpeft.alora_offsets(random, TOKENS).tolist()
    assert found(IDS[:, :1]) == jpeft.alora_offsets(IDS[:, :1], TOKENS).tolist() == [0] * 6


def test_the_face_finds_the_offsets_itself(theirs, ours):
    want = their_logits(theirs)
    got = ours(input_ids=IDS, attention_mask=MASK).logits
    assert_same(got, want)
    assert_same(ours(IDS, attention_mask=MASK).logits, want)
    with ours.disable_adapter():
        base = ours(input_ids=IDS, attention_mask=MASK).logits
    changed = np.abs(np.asarray(got) - base).max(-1) > 1e-3
    begins = IDS.shape[1] - np.array([offset or 0 for offset in OFFSETS])
    np.testing.assert_array_equal(changed[MASK != 0], (np.arange(9) >= begins[:, None])[MASK != 0])


def test_padding_on_the_right(theirs, ours):
    ids, mask = IDS[:, ::-1].copy(), MASK[:, ::-1].copy()
    ids[0, 2:4] = ids[2, 1:3] = ids[4, 4:6] = TOKENS
    assert_same(ours(input_ids=ids, attention_mask=mask).logits, their_logits(theirs, ids, mask), mask)


def test_offsets_that_are_told(theirs, ours):
    offsets = [1, 2, 30, None, 9, 0]
    assert_same(
        ours(input_ids=IDS, attention_mask=MASK, alora_offsets=offsets).logits,
        their_logits(theirs, alora_offsets=offsets),
    )


@pytest.mark.parametrize("scan_layers", [False, True])
def test_pure_functions(folder, theirs, scan_layers):
    model = FlaxAutoModelForCausalLM.from_pretrained(folder / "base", scan_layers=scan_layers)
    wrapped = load_pretrained(model.params, folder)
    apply = jax.jit(jpeft.lift(lambda params, ids, mask: model.apply(params, ids, attention_mask=mask).logits))
    given = jpeft.with_context(wrapped, alora_offsets=jpeft.alora_offsets(IDS, TOKENS))
    assert_same(apply(given, IDS, MASK), their_logits(theirs))


def test_adapters_by_row(theirs, ours):
    want = their_logits(theirs, adapter_names=ROWS)
    assert_same(ours(input_ids=IDS, attention_mask=MASK, adapter_names=ROWS).logits, want)
    assert np.abs(want - their_logits(theirs)).max() > 0.01


def test_without_ids_it_acts_nowhere(folder):
    """PEFT warns and computes with the base model."""
    params = {"q": {"kernel": jnp.ones((4, 4))}}
    base = (lambda params, input_ids=None, inputs_embeds=None: inputs_embeds @ params["q"]["kernel"], params)
    config = jpeft.LoraConfig(**{**ALORA, "target_modules": ["q"], "init_lora_weights": False})
    model = jpeft_interop.get_peft_model(base, config)
    x = np.ones((2, 3, 4), np.float32)
    with pytest.warns(UserWarning, match="has inputs_embeds alone; they act nowhere. Expected input_ids or alora_off"):
        np.testing.assert_array_equal(model(inputs_embeds=x), x @ np.ones((4, 4)))
    assert np.abs(np.asarray(model(inputs_embeds=x, alora_offsets=[1, 0])) - 4).max(-1).tolist() != [[0] * 3] * 2
    with pytest.raises(ValueError, match="needs alora_offsets for each row"):
        model(None, x)


def test_only_language_models_look_for_invocations(folder, ours):
    wrapped = ours.params
    other = jpeft_interop.PeftModel.from_pretrained(FlaxAutoModelForCausalLM.from_pretrained(folder / "base"), folder)
    assert type(other).__name__ == "PeftModelForCausalLM"
    base = FlaxAutoModelForCausalLM.from_pretrained(folder / "base")
    config = dataclasses.replace(wrapped.adapters["default"].config, inference_mode=False)
    with pytest.warns(UserWarning, match="task_type=None"):
        config = dataclasses.replace(config, task_type=None)
        untyped = jpeft_interop.get_peft_model(base, config)
    with pytest.raises(ValueError, match="adapter 'default' needs alora_offsets"):
        untyped(input_ids=IDS)


# ---- generation -----------------------------------------------------------------------------------------------------


def their_tokens(model, ids, mask, **options):
    settings = transformers.GenerationConfig(
        max_new_tokens=7, eos_token_id=EOS, pad_token_id=PAD, num_beams=options.pop("beams", 1)
    )
    with torch.no_grad():
        return model.generate(
            input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask), generation_config=settings, **options
        ).numpy()


def our_tokens(generate, ids, mask, **options):
    settings = {"max_new_tokens": 7, "eos_token_id": EOS, "pad_token_id": PAD}
    return np.asarray(generate(ids, attention_mask=mask, **settings, **options).sequences)


def assert_same_tokens(ours, theirs):
    np.testing.assert_array_equal(ours[:, : theirs.shape[1]], theirs)


def test_greedy_search(theirs, ours):
    want = their_tokens(theirs, IDS, MASK)
    assert_same_tokens(our_tokens(ours.generate, IDS, MASK), want)
    everywhere = our_tokens(ours.generate, IDS, MASK, alora_offsets=[99] * 6)
    nowhere = our_tokens(ours.generate, IDS, MASK, alora_offsets=[None] * 6)
    width = want.shape[1]
    assert (everywhere[:, :width] != want).any(1).sum() >= 3 and (nowhere[:, :width] != want).any(1).sum() >= 3
    np.testing.assert_array_equal(nowhere[[3, 5], :width], want[[3, 5]])


def test_generation_with_adapters_by_row(theirs, ours):
    want = their_tokens(theirs, IDS, MASK, adapter_names=ROWS)
    assert_same_tokens(our_tokens(ours.generate, IDS, MASK, adapter_names=ROWS), want)


@pytest.mark.parametrize("scan_layers", [False, True])
def test_beam_search(folder, theirs, scan_layers):
    """PEFT refuses it by its argument and has no offsets for the beams; told them, it does what is done here."""
    with pytest.raises(ValueError, match="Beam search not yet supported for aLoRA"):
        their_tokens(theirs, IDS, MASK, num_beams=3)
    want = their_tokens(theirs, IDS, MASK, beams=3, alora_offsets=[offset for offset in OFFSETS for _ in range(3)])
    model = FlaxAutoModelForCausalLM.from_pretrained(folder / "base", scan_layers=scan_layers)
    wrapped = load_pretrained(model.params, folder)
    generate = lambda *args, **options: model.generate(wrapped, *args, **options)  # noqa: E731
    assert_same_tokens(our_tokens(generate, IDS, MASK, num_beams=3), want)


def test_sampling_from_the_likeliest_alone_is_greedy_search(ours):
    drawn = our_tokens(ours.generate, IDS, MASK, do_sample=True, num_return_sequences=2, top_k=1)
    np.testing.assert_array_equal(drawn, np.repeat(our_tokens(ours.generate, IDS, MASK), 2, axis=0))


def test_text_that_is_padded_on_the_right_is_continued_as_if_on_the_left(ours):
    ids, mask = (
        np.stack([np.roll(row, -int((m == 0).sum())) for row, m in zip(a, MASK, strict=True)]) for a in (IDS, MASK)
    )
    assert (mask[[2, 4], -1] == 0).all()
    want = our_tokens(ours.generate, IDS, MASK)[:, 9:]
    np.testing.assert_array_equal(our_tokens(ours.generate, ids, mask)[:, 9:], want)
    offsets = jpeft.alora_offsets(ids, TOKENS)
    assert offsets.tolist() != jpeft.alora_offsets(IDS, TOKENS).tolist()
    np.testing.assert_array_equal(our_tokens(ours.generate, ids, mask, alora_offsets=offsets)[:, 9:], want)


# ---- files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["default", "other"])
def test_files_of_pytorch_are_written_back_as_they_are(folder, theirs, name, tmp_path):
    model = FlaxAutoModelForCausalLM.from_pretrained(folder / "base")
    save_pretrained(load_pretrained(model.params, where(folder, name)), tmp_path)
    configs = [json.loads((path / CONFIG).read_text()) for path in (where(folder, name), tmp_path)]
    assert (
        configs[0] == configs[1] and configs[1]["alora_invocation_tokens"] == ADAPTERS[name]["alora_invocation_tokens"]
    )
    before, after = (load_file(path / WEIGHTS) for path in (where(folder, name), tmp_path))
    assert before.keys() == after.keys() and all(before[key].tobytes() == after[key].tobytes() for key in before)


def test_pytorch_loads_what_is_written_here(folder, tmp_path):
    model = FlaxAutoModelForCausalLM.from_pretrained(folder / "base")
    wrapped = jpeft.wrap(model.params, jpeft.LoraConfig(**ADAPTERS["default"]))
    adapter = wrapped.adapters["default"]
    adapter = dataclasses.replace(adapter, weights=random_like(adapter.weights, 9))
    wrapped = dataclasses.replace(wrapped, adapters={"default": adapter})
    save_pretrained(wrapped, tmp_path)
    base = transformers.LlamaForCausalLM.from_pretrained(folder / "base")
    theirs = quietly(peft.PeftModel.from_pretrained, copy.deepcopy(base), tmp_path).eval()
    apply = jax.jit(jpeft.lift(lambda params, ids, mask: model.apply(params, ids, attention_mask=mask).logits))
    given = jpeft.with_context(wrapped, alora_offsets=jpeft.alora_offsets(IDS, TOKENS))
    assert_same(apply(given, IDS, MASK), their_logits(theirs))
    assert verify(tmp_path, base).torch
    settings = peft.PeftConfig.from_pretrained(tmp_path).to_dict()
    expected = peft.LoraConfig(**ADAPTERS["default"]).to_dict()
    assert {k: v for k, v in settings.items() if k != "inference_mode"} == {
        k: v for k, v in expected.items() if k != "inference_mode"
    }


# ---- training -------------------------------------------------------------------------------------------------------


def test_ten_steps_of_sgd_go_the_same_way(folder, tmp_path):
    model = FlaxAutoModelForCausalLM.from_pretrained(folder / "base")
    base = transformers.LlamaForCausalLM.from_pretrained(folder / "base")
    theirs = quietly(peft.PeftModel.from_pretrained, base, folder, is_trainable=True).train()
    wrapped = load_pretrained(model.params, folder, is_trainable=True)
    wanted, rate = np.random.default_rng(1).normal(size=(6, 9, 40)).astype(np.float32), 0.03
    optimizer = torch.optim.SGD([p for p in theirs.parameters() if p.requires_grad], rate)
    lifted = jpeft.lift(lambda params, ids, mask: model.apply(params, ids, attention_mask=mask).logits)
    seen = MASK[..., None].astype(np.float32)

    @jax.jit
    def step(wrapped, ids):
        given = jpeft.with_context(wrapped, alora_offsets=jpeft.alora_offsets(ids, TOKENS))
        loss, gradient = jpeft.value_and_grad(lambda w: (seen * (lifted(w, ids, MASK) - wanted) ** 2).mean())(given)
        mask = jpeft.trainable_mask(given)
        stepped = jax.tree.map(lambda t, p, g: p - rate * g if t else p, mask, given, gradient)
        return loss, dataclasses.replace(stepped, context={})

    losses = []
    for _ in range(10):
        logits = theirs(input_ids=torch.tensor(IDS), attention_mask=torch.tensor(MASK)).logits
        loss = (torch.tensor(seen) * (logits - torch.tensor(wanted)) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        own, wrapped = step(wrapped, IDS)
        losses.append((loss.item(), float(own)))
    want, got = np.array(losses).T
    assert want[-1] < 0.995 * want[0]
    np.testing.assert_allclose(got, want, rtol=1e-3)
    state = quietly(peft.get_peft_model_state_dict, theirs)
    for path, arrays in wrapped.adapters["default"].weights.items():
        for name, array in arrays.items():
            found = state[f"base_model.model.{path}.{name}.weight"].detach()
            np.testing.assert_allclose(array, found, rtol=1e-3, atol=1e-3)


# ---- what is refused there as here ----------------------------------------------------------------------------------


def test_it_cannot_be_merged(theirs, ours):
    with pytest.raises(NotImplementedError, match="does not support merging"):
        copy.deepcopy(theirs).merge_adapter(["default"])
    for merge in (ours.merge_adapter, ours.merge_and_unload):
        with pytest.raises(ValueError, match="aLoRA at .* cannot be merged. Expected it beside the weight"):
            merge()


@pytest.mark.parametrize(
    "settings", [{"use_dora": True}, {"target_modules": ["embed_tokens"]}], ids=["another variant", "a lookup table"]
)
def test_what_does_not_go_together(folder, settings):
    settings = {**ADAPTERS["default"], **settings}
    base = transformers.LlamaForCausalLM.from_pretrained(folder / "base")
    with pytest.raises(ValueError, match="Invalid or unsupported variant combination"):
        quietly(peft.get_peft_model, base, peft.LoraConfig(**settings))
    model = FlaxAutoModelForCausalLM.from_pretrained(folder / "base")
    with pytest.raises(ValueError, match="variants of LoRA exclude each other|embed_tokens"):
        jpeft.wrap(model.params, jpeft.LoraConfig(**settings))


def test_other_tasks_are_warned_of_there_as_here():
    for config in (peft.LoraConfig, jpeft.LoraConfig):
        with pytest.warns(UserWarning, match="CAUSAL_LM"):
            config(task_type="SEQ_CLS", alora_invocation_tokens=TOKENS)


def test_adapters_beside_one_another_in_files(folder):
    model = FlaxAutoModelForCausalLM.from_pretrained(folder / "base")
    wrapped = load_adapter(load_pretrained(model.params, folder), folder / "plain", "plain")
    assert wrapped.adapters["default"].config.alora_invocation_tokens == tuple(TOKENS)
    assert wrapped.adapters["plain"].config.alora_invocation_tokens is None
