"""LLaMA-Adapter against PyTorch PEFT: files both ways, text, training, and models that take no prompts."""

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

import jpeft  # noqa: E402
import jpeft_interop  # noqa: E402
from jpeft import AdaptionPromptConfig  # noqa: E402
from jpeft_interop import load_pretrained, prepare_inputs, save_pretrained, verify  # noqa: E402
from jpeft_interop.models import FlaxAutoModelForCausalLM, FlaxAutoModelForSequenceClassification  # noqa: E402
from jpeft_interop.models._adaption import TAKERS  # noqa: E402
from tests.harness import random_like  # noqa: E402
from tests.interop.models.torch_oracle import assert_close, padded, random_model, token_ids  # noqa: E402
from tests.interop.test_round_trip import CONFIG, WEIGHTS, quietly  # noqa: E402

LAYERS, SETTINGS = 3, {"adapter_len": 4, "adapter_layers": 2}
SIZES = {
    "vocab_size": 29,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
GPT2 = {"vocab_size": 29, "n_embd": 16, "n_head": 4, "n_layer": LAYERS, "n_positions": 32}
CASES = {
    "llama": ("Llama", {**SIZES, "num_key_value_heads": 4}),
    "llama, grouped": ("Llama", {**SIZES, "num_key_value_heads": 2, "tie_word_embeddings": True}),
    "mistral": ("Mistral", {**SIZES, "num_key_value_heads": 2, "sliding_window": 4}),
    "gpt2": ("GPT2", {**GPT2, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}),
}
IDS, MASK = token_ids((2, 7), 29), padded("left", 2, 7, 3)


@dataclasses.dataclass(frozen=True)
class Pair:
    """One model twice, in PyTorch and in a folder for here, and the folder of PEFT's adapter with random values.

    stacked: whether the layers are, here.
    """

    torch_model: Any
    folder: Path
    adapter: Path
    stacked: bool

    def model(self, **options: Any) -> Any:
        return FlaxAutoModelForCausalLM.from_pretrained(self.folder, scan_layers=self.stacked, **options)

    def torch_adapter(self, folder: Path | None = None, trainable: bool = False) -> Any:
        base = copy.deepcopy(self.torch_model)
        return quietly(peft.PeftModel.from_pretrained, base, folder or self.adapter, is_trainable=trainable)


def base_of(name: str, sizes: Any, kind: str | None = None) -> Any:
    config = getattr(transformers, f"{name}Config")(**sizes)
    return random_model(f"{name}{kind or ('LMHeadModel' if name == 'GPT2' else 'ForCausalLM')}", config)


def with_adapter(base: Any, **fields: Any) -> Any:
    """PEFT's model with random values: gates that are open."""
    model = quietly(peft.get_peft_model, copy.deepcopy(base), peft.AdaptionPromptConfig(**SETTINGS, **fields))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "adaption_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model.eval()


@pytest.fixture(scope="module", params=CASES)
def pair(request, tmp_path_factory):
    return made(tmp_path_factory.mktemp("model"), request.param)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return made(tmp_path_factory.mktemp("model"), "llama, grouped")


def made(folder: Path, case: str) -> Pair:
    base = base_of(*CASES[case])
    base.save_pretrained(folder / "base")
    quietly(with_adapter(base).save_pretrained, folder / "adapter")
    return Pair(base, folder / "base", folder / "adapter", stacked=case in ("llama, grouped", "mistral"))


def torch_logits(model: Any) -> np.ndarray:
    with torch.no_grad():
        return model(input_ids=torch.tensor(IDS), attention_mask=torch.tensor(MASK)).logits.numpy()


def logits(model: Any, wrapped: Any) -> np.ndarray:
    def call(wrapped, batch):
        wrapped, batch = prepare_inputs(model, wrapped, batch)
        return jpeft.lift(model.apply)(wrapped, **batch).logits

    return np.asarray(jax.jit(call)(wrapped, {"input_ids": IDS, "attention_mask": MASK}))


# ---- both ways ------------------------------------------------------------------------------------------------------


def test_what_pytorch_wrote_computes_the_same_and_is_written_back(pair, tmp_path):
    model = pair.model(remat="nothing_saveable" if pair.stacked else None)
    wrapped = load_pretrained(model.params, pair.adapter)
    expected = torch_logits(pair.torch_adapter())
    assert_close(logits(model, wrapped), expected, MASK)
    bare = torch_logits(pair.torch_model)
    assert np.abs(expected - bare)[MASK != 0].max() > 0.1 * np.abs(bare).max()

    save_pretrained(wrapped, tmp_path)
    assert (tmp_path / WEIGHTS).read_bytes() == (pair.adapter / WEIGHTS).read_bytes()
    assert json.loads((tmp_path / CONFIG).read_text()) == json.loads((pair.adapter / CONFIG).read_text())


def test_what_was_written_here_computes_the_same_in_pytorch(pair, tmp_path):
    model = pair.model()
    wrapped = jpeft.wrap(model.params, AdaptionPromptConfig(**SETTINGS))
    adapter = wrapped.adapters["default"]
    adapter = dataclasses.replace(adapter, weights=random_like(adapter.weights, 4, 1.0))
    wrapped = dataclasses.replace(wrapped, adapters={"default": adapter})
    save_pretrained(wrapped, tmp_path)
    ours, theirs = load_file(tmp_path / WEIGHTS), load_file(pair.adapter / WEIGHTS)
    assert {key: tensor.shape for key, tensor in ours.items()} == {key: own.shape for key, own in theirs.items()}
    assert_close(logits(model, wrapped), torch_logits(pair.torch_adapter(tmp_path)), MASK)
    report = quietly(verify, tmp_path, pair.torch_model)
    assert (report.peft_type, report.modules, report.tensors, report.torch) == ("ADAPTION_PROMPT", 2, 4, True)


def torch_text(model: Any, **settings: Any) -> np.ndarray:
    given = {"input_ids": torch.tensor(IDS), "attention_mask": torch.tensor(MASK)}
    return model.generate(**given, **{"max_new_tokens": 6, "do_sample": False, **settings}).numpy()


def test_the_text_is_pefts(pair):
    model = pair.model()
    wrapped = load_pretrained(model.params, pair.adapter)
    expected = torch_text(pair.torch_adapter())
    found = model.generate(wrapped, IDS, attention_mask=MASK, max_new_tokens=6).sequences
    np.testing.assert_array_equal(found, expected)
    assert not np.array_equal(expected, torch_text(pair.torch_model))


@pytest.mark.parametrize(("name", "rate"), [("llama, grouped", 0.3), ("gpt2", 8.0)])
def test_ten_steps_of_training_are_pefts(name, rate, tmp_path):
    pair = made(tmp_path, name)
    torch_model = pair.torch_adapter(trainable=True)
    ids = torch.tensor(IDS)
    optimizer = torch.optim.SGD([p for p in torch_model.parameters() if p.requires_grad], rate)
    expected = []
    for _ in range(10):
        loss = torch_model(input_ids=ids, labels=ids).loss
        expected.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    model = pair.model()
    wrapped = load_pretrained(model.params, pair.adapter, is_trainable=True)

    def loss_of(wrapped):
        wrapped, batch = prepare_inputs(model, wrapped, {"input_ids": IDS, "labels": IDS})
        return jpeft.lift(model.apply)(wrapped, **batch).loss

    @jax.jit
    def step(wrapped):
        loss, grads = jpeft.value_and_grad(loss_of)(wrapped)
        mask = jpeft.trainable_mask(wrapped)
        return jax.tree.map(lambda p, g, trains: p - rate * g if trains else p, wrapped, grads, mask), loss

    found = []
    for _ in range(10):
        wrapped, loss = step(wrapped)
        found.append(float(loss))
    np.testing.assert_allclose(found, expected, rtol=1e-3)
    assert found[-1] < 0.97 * found[0]
    quietly(torch_model.save_pretrained, tmp_path / "trained")
    for key, tensor in load_file(tmp_path / "trained" / WEIGHTS).items():
        path, _, array = key.removeprefix("base_model.model.").rpartition(".")
        np.testing.assert_allclose(wrapped.adapters["default"].weights[path][array], tensor, rtol=1e-3, atol=1e-3)


# ---- what differs ---------------------------------------------------------------------------------------------------


def as_in_the_paper(torch_model: Any, weights: Any) -> Any:
    """The PyTorch model with prompts added before the output projection, by hooks that know the number of key heads."""
    rotate = transformers.models.llama.modeling_llama.rotate_half
    for path, arrays in weights.items():
        attention = torch_model.get_submodule(path)
        prompt, gate = (torch.tensor(np.asarray(arrays[name])) for name in ("adaption_prompt", "adaption_gate"))

        def heads(x, dim=attention.head_dim):
            return x.unflatten(-1, (-1, dim)).swapaxes(1, 2)

        def before(module, args, kwargs, attention=attention, prompt=prompt, heads=heads):
            query, (cos, sin) = heads(attention.q_proj(kwargs["hidden_states"])), kwargs["position_embeddings"]
            query = query * cos[:, None] + rotate(query) * sin[:, None]
            key, value = (heads(layer(prompt)) for layer in (attention.k_proj, attention.v_proj))
            key, value = (part.repeat_interleave(query.shape[1] // part.shape[1], 1) for part in (key, value))
            shares = torch.softmax(query @ key.swapaxes(2, 3) / query.shape[-1] ** 0.5, -1)
            attention.added = (shares @ value).swapaxes(1, 2).flatten(2)

        def add(module, args, attention=attention, gate=gate):
            return (args[0] + gate * attention.added,)

        attention.register_forward_pre_hook(before, with_kwargs=True)
        attention.o_proj.register_forward_pre_hook(add)
    return torch_model


@pytest.mark.parametrize(
    "fields", [{"attention_bias": True}, {"num_key_value_heads": 2, "head_dim": 6}], ids=["bias", "heads"]
)
def test_where_peft_is_wrong_it_is_as_in_the_paper(fields, tmp_path):
    """A bias of the output projection, which PEFT adds twice, and heads whose sizes do not make up the model's."""
    base = base_of("Llama", {**SIZES, **fields})
    base.save_pretrained(tmp_path)
    model = FlaxAutoModelForCausalLM.from_pretrained(tmp_path)
    wrapped = jpeft.wrap(model.params, AdaptionPromptConfig(**SETTINGS))
    adapter = wrapped.adapters["default"]
    adapter = dataclasses.replace(adapter, weights=random_like(adapter.weights, 4, 1.0))
    wrapped = dataclasses.replace(wrapped, adapters={"default": adapter})
    assert_close(logits(model, wrapped), torch_logits(as_in_the_paper(base, adapter.weights)), MASK)


def test_where_peft_is_right_it_is_as_in_the_paper_too(llama):
    weights = load_pretrained(llama.model().params, llama.adapter).adapters["default"].weights
    found = torch_logits(as_in_the_paper(copy.deepcopy(llama.torch_model), weights))
    assert_close(found, torch_logits(llama.torch_adapter()), MASK)


# ---- beside others, and the familiar face ---------------------------------------------------------------------------


def test_prompts_go_through_loras_projections_as_in_peft(llama, tmp_path):
    base = copy.deepcopy(llama.torch_model)
    lora = quietly(peft.get_peft_model, base, peft.LoraConfig(r=2, target_modules=["q_proj", "k_proj", "v_proj"]))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in lora.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    quietly(lora.save_pretrained, tmp_path)
    expected = torch_logits(with_adapter(lora.base_model.model))

    model = llama.model()
    wrapped = jpeft_interop.load_adapter(load_pretrained(model.params, tmp_path), llama.adapter, "prompts")
    assert_close(logits(model, jpeft.set_adapter(wrapped, ["default", "prompts"])), expected, MASK)


def test_beams_search_with_prompts(llama):
    model = llama.model()
    wrapped = load_pretrained(model.params, llama.adapter)
    found = model.generate(wrapped, IDS, attention_mask=MASK, max_new_tokens=4, num_beams=2).sequences
    np.testing.assert_array_equal(found, torch_text(llama.torch_adapter(), max_new_tokens=4, num_beams=2))


def test_the_familiar_face(llama, tmp_path):
    model = jpeft_interop.get_peft_model(llama.model(), AdaptionPromptConfig(**SETTINGS, task_type="CAUSAL_LM"))
    batch = {"input_ids": IDS, "attention_mask": MASK}
    bare = torch_logits(llama.torch_model)
    assert_close(np.asarray(model(**batch).logits), bare, MASK)
    model.load_adapter(llama.adapter, "other")
    model.set_adapter("other")
    expected = torch_logits(llama.torch_adapter())
    assert_close(np.asarray(model(**batch).logits), expected, MASK)
    with model.disable_adapter():
        assert_close(np.asarray(model(**batch).logits), bare, MASK)
    text = torch_text(llama.torch_adapter(), max_new_tokens=3)
    np.testing.assert_array_equal(model.generate(max_new_tokens=3, **batch).sequences, text)
    assert (model.peft_config["default"].target_modules, model.active_adapter) == ("self_attn", "other")
    model.save_pretrained(tmp_path)
    assert load_file(tmp_path / "other" / WEIGHTS).keys() == load_file(llama.adapter / WEIGHTS).keys()
    status = model.get_layer_status()
    assert [(layer.name, layer.module_type, layer.requires_grad) for layer in status] == [
        (f"model.model.layers.{number}.self_attn", "adaption_prompt.AdaptionPrompt", {"default": False, "other": True})
        for number in (1, 2)
    ]
    with pytest.raises(ValueError, match="'default', 'other' have adaption prompts for the same attention"):
        model.set_adapter(["default", "other"])
        model(**batch)
    with pytest.raises(ValueError, match="no change of a weight"):
        model.merge_and_unload()


def test_of_a_classifier_peft_keeps_the_prompts_alone(tmp_path):
    base = base_of("Llama", SIZES, "ForSequenceClassification")
    base.save_pretrained(tmp_path / "base")
    torch_model = with_adapter(base, task_type="SEQ_CLS")
    quietly(torch_model.save_pretrained, tmp_path / "theirs")
    model = FlaxAutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    ours = jpeft_interop.PeftModel.from_pretrained(model, tmp_path / "theirs")
    expected = torch_logits(torch_model)
    assert_close(np.asarray(ours(input_ids=IDS, attention_mask=MASK).logits), expected)
    ours.save_pretrained(tmp_path / "ours")
    assert (tmp_path / "ours" / WEIGHTS).read_bytes() == (tmp_path / "theirs" / WEIGHTS).read_bytes()


@pytest.mark.parametrize("autocast", [True, False])
def test_in_half_precision(llama, autocast):
    """PEFT's prompts have the precision of the base; here they have it without autocast."""
    base = llama.model(param_dtype=jnp.bfloat16)
    config = AdaptionPromptConfig(**SETTINGS)
    model = jpeft_interop.get_peft_model(base, config, autocast_adapter_dtype=autocast)
    dtypes = {str(leaf.dtype) for leaf in jax.tree.leaves(model.params.adapters)}
    assert dtypes == {"float32" if autocast else "bfloat16"}
    model.load_adapter(llama.adapter, "other", autocast_adapter_dtype=autocast)
    model.set_adapter("other")
    found = np.asarray(model(input_ids=IDS, attention_mask=MASK).logits.astype(jnp.float32))
    expected = torch_logits(llama.torch_adapter())
    assert np.abs(found - expected)[MASK != 0].max() < 0.05 * np.abs(expected).max()


def test_the_families_that_take_them_are_pefts():
    assert TAKERS.split(", ") == sorted(peft.tuners.adaption_prompt.config.TRANSFORMERS_MODEL_CONFIG)
