"""ShadowPEFT against PyTorch PEFT: each other's files, logits, losses, generation, and ten steps of training."""

import copy
import dataclasses
import json
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import jpeft
from jpeft_interop import PeftModel, get_peft_model, load_pretrained, prepare_inputs, save_pretrained
from jpeft_interop.models import FlaxAutoModelForCausalLM, FlaxAutoModelForSequenceClassification

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
WORDS, TOLERANCE = 31, 1e-4
TINY = {
    "vocab_size": WORDS,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
}
GPT2 = {"vocab_size": WORDS, "n_embd": 16, "n_layer": 3, "n_head": 4, "n_positions": 32, "pad_token_id": 0}
FAMILIES = {
    "llama": ("Llama", TINY),
    "mistral": ("Mistral", {**TINY, "sliding_window": 4}),
    "qwen2": ("Qwen2", TINY),
    "gemma": ("Gemma", {**TINY, "head_dim": 4}),
    "gpt2": ("GPT2", GPT2),
}

rng = np.random.default_rng(0)
IDS = rng.integers(1, WORDS, (2, 7))
LEFT = np.array([[0, 0, 0, 1, 1, 1, 1], [1] * 7])
RIGHT = LEFT[:, ::-1].copy()
LABELS = np.where(RIGHT == 1, IDS, -100)


@dataclasses.dataclass(frozen=True)
class Pair:
    """One base model twice, and the folder that both were read from."""

    theirs: Any
    ours: Any
    folder: Path


def randomise(model: Any, seed: int, name: str = "") -> Any:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if name in key:
                centre = 1.0 if "norm" in key and key.endswith("weight") else 0.0
                parameter.copy_(centre + 0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """{family: pair}, made when asked for."""
    made: dict[str, Pair] = {}

    def pair(family: str, task: str = "CausalLM") -> Pair:
        key = f"{family}-{task}"
        if key not in made:
            name, sizes = FAMILIES[family]
            folder = tmp_path_factory.mktemp(key)
            classes = transformers, name + ("LMHeadModel" if family == "gpt2" else f"For{task}")
            config = getattr(transformers, f"{name}Config")(**sizes, num_labels=3)
            theirs = randomise(getattr(*classes)(config), 0)
            theirs.save_pretrained(folder)
            auto = FlaxAutoModelForCausalLM if task == "CausalLM" else FlaxAutoModelForSequenceClassification
            made[key] = Pair(theirs, auto.from_pretrained(folder), folder)
        return made[key]

    return pair


def in_torch(pair: Pair, seed: int = 1, **fields: Any) -> Any:
    """PEFT's model, of which every trainable number is random."""
    fields = {"r": 3, "task_type": "CAUSAL_LM", "shadow_dropout": 0.0, **fields}
    model = peft.get_peft_model(copy.deepcopy(pair.theirs), peft.ShadowConfig(**fields))
    return randomise(model, seed, name="shadow_")


def saved(model: Any, folder: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)
    return folder


def torch_output(model: Any, mask: Any = RIGHT, labels: Any = LABELS) -> Any:
    with torch.no_grad():
        given = {"input_ids": IDS, "attention_mask": mask, "labels": labels}
        return model(**{name: torch.tensor(value) for name, value in given.items() if value is not None})


CASES = {
    "llama": ("llama", {}, {"num_beams": 2}),
    "narrower": ("llama", {"shadow_hidden_size": 8, "update_hidden_size": 5}, None),
    "own table": ("llama", {"share_embeddings": False, "shadow_num_hidden_layers": 2, "shadow_intermediate_size": 12,
                            "shadow_num_attention_heads": 2, "shadow_alpha": 0.7}, None),
    "the last blocks": ("mistral", {"target_modules": ["model.layers.1", "model.layers.2"],
                                    "shadow_num_hidden_layers": 4}, None),
    "qwen2": ("qwen2", {"target_modules": r".*\.layers\.\d+", "shadow_hidden_size": 8}, None),
    "gemma": ("gemma", {"shadow_hidden_size": 8, "auxiliary_loss_weight": 0.5}, None),
    "gpt2": ("gpt2", {}, None),
    "gpt2, narrower": ("gpt2", {"shadow_hidden_size": 8, "shadow_num_attention_heads": 2}, {}),
}  # fmt: skip
"""The family, the config, and how to write texts; None: not at all."""


@pytest.mark.parametrize(("family", "fields", "texts"), CASES.values(), ids=CASES)
def test_files_losses_and_texts(pairs, family, fields, texts, tmp_path):
    pair = pairs(family)
    theirs = in_torch(pair, **fields)
    saved(theirs, tmp_path / "theirs")
    ours = PeftModel.from_pretrained(pair.ours, tmp_path / "theirs")
    expected, found = torch_output(theirs), ours(IDS, attention_mask=RIGHT, labels=LABELS)
    seen = RIGHT == 1
    np.testing.assert_allclose(found.logits[seen], expected.logits.numpy()[seen], atol=TOLERANCE, rtol=TOLERANCE)
    assert found.loss == pytest.approx(float(expected.loss), rel=TOLERANCE)
    assert found.shadow_loss == pytest.approx(float(expected.shadow_loss), rel=TOLERANCE)
    with torch.no_grad():
        base = pair.theirs(torch.tensor(IDS), attention_mask=torch.tensor(RIGHT)).logits.numpy()
    assert np.abs(found.logits - base)[seen].max() > 0.01

    if texts is not None:
        assert_texts(theirs, ours.generate, **texts)
    save_pretrained(ours.params, tmp_path / "ours")
    assert_same_files(tmp_path)
    again = peft.PeftModel.from_pretrained(copy.deepcopy(pair.theirs), tmp_path / "ours")
    np.testing.assert_array_equal(torch_output(again).logits, expected.logits)


def assert_texts(theirs, ours, **beams):
    """The texts of padded rows, with the caches of both."""
    ids = np.where(LEFT == 1, IDS, 0)
    given = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(LEFT)}
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, **beams}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = theirs.generate(**given, **options).numpy()
    found = ours(ids, attention_mask=LEFT, max_new_tokens=5, pad_token_id=0, eos_token_id=[], **beams)
    np.testing.assert_array_equal(found.sequences, expected)


def assert_same_files(folder):
    theirs, ours = (load_file(folder / who / WEIGHTS) for who in ("theirs", "ours"))
    assert theirs.keys() == ours.keys()
    assert all(theirs[key].tobytes() == ours[key].tobytes() for key in theirs)
    theirs, ours = (json.loads((folder / who / CONFIG).read_text()) for who in ("theirs", "ours"))
    for config in (theirs, ours):
        if isinstance(config["target_modules"], list):
            config["target_modules"] = sorted(config["target_modules"])
    assert {**ours, "base_model_name_or_path": None} == {**theirs, "base_model_name_or_path": None}


def test_ten_steps(pairs, tmp_path):
    """SGD on all that trains, from one start: the losses, and the arrays after it."""
    pair = pairs("llama")
    fields = {"shadow_hidden_size": 8, "auxiliary_loss_weight": 0.4, "modules_to_save": ["lm_head"]}
    theirs = in_torch(pair, **fields)
    saved(theirs, tmp_path / "start")
    wrapped = load_pretrained(pair.ours.params, tmp_path / "start", is_trainable=True)

    def loss(wrapped):
        wrapped, batch = prepare_inputs(
            pair.ours, wrapped, {"input_ids": IDS, "attention_mask": RIGHT, "labels": LABELS}
        )
        return jpeft.lift(pair.ours.apply)(wrapped, **batch).loss

    @jax.jit
    def step(wrapped):
        value, grads = jpeft.value_and_grad(loss)(wrapped)
        mask = jpeft.trainable_mask(wrapped)
        return jax.tree.map(lambda t, p, g: p - 0.1 * g if t else p, mask, wrapped, grads), value

    parameters = [parameter for parameter in theirs.train().parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, 0.1)
    ids, mask, labels = map(torch.tensor, (IDS, RIGHT, LABELS))
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        expected = theirs(input_ids=ids, attention_mask=mask, labels=labels).loss
        expected.backward()
        optimizer.step()
        wrapped, value = step(wrapped)
        losses.append((float(value), float(expected.detach())))
    np.testing.assert_allclose(*zip(*losses, strict=True), rtol=1e-3)
    assert losses[-1][0] < losses[0][0] - 0.1
    saved(theirs, tmp_path / "theirs")
    save_pretrained(wrapped, tmp_path / "ours")
    expected, found = (load_file(tmp_path / who / WEIGHTS) for who in ("theirs", "ours"))
    start = load_file(tmp_path / "start" / WEIGHTS)
    assert expected.keys() == found.keys()
    for key, tensor in expected.items():
        np.testing.assert_allclose(found[key], tensor, atol=1e-3, err_msg=key)
    moved = {key for key in start if np.abs(expected[key] - start[key]).max() > 1e-4}
    # What comes after the last block is nobody's input.
    idle = {key for key in start if "layers.2.shadow_update" in key}
    assert start.keys() - moved == idle


def test_classifier(pairs, tmp_path):
    pair = pairs("llama", "SequenceClassification")
    theirs = in_torch(pair, task_type="SEQ_CLS", auxiliary_loss_weight=0.3)
    saved(theirs, tmp_path / "theirs")
    ours = PeftModel.from_pretrained(pair.ours, tmp_path / "theirs")
    labels = np.array([2, 0])
    ids = np.where(RIGHT == 1, IDS, 0)
    given = {"input_ids": ids, "attention_mask": RIGHT, "labels": labels}
    with torch.no_grad():
        expected = theirs(**{name: torch.tensor(value) for name, value in given.items()})
    found = ours(**given)
    np.testing.assert_allclose(found.logits, expected.logits, atol=TOLERANCE, rtol=TOLERANCE)
    assert found.loss == pytest.approx(float(expected.loss), rel=TOLERANCE)
    assert found.shadow_loss == pytest.approx(float(expected.shadow_loss), rel=TOLERANCE)
    save_pretrained(ours.params, tmp_path / "ours")
    assert_same_files(tmp_path)


@pytest.mark.parametrize("fields", [{"shadow_hidden_size": 8, "shadow_num_hidden_layers": 2}, {"task_type": None}])
def test_begins_with_the_keys_of_peft(pairs, fields, tmp_path):
    pair = pairs("llama")
    fields = {"r": 3, "task_type": "CAUSAL_LM", **fields}
    theirs = peft.get_peft_model(copy.deepcopy(pair.theirs), peft.ShadowConfig(**fields))
    ours = get_peft_model(pair.ours, jpeft.ShadowConfig(**fields))
    assert ours.get_nb_trainable_parameters()[0] == theirs.get_nb_trainable_parameters()[0]
    saved(theirs, tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    expected, found = (load_file(tmp_path / who / WEIGHTS) for who in ("theirs", "ours"))
    assert {key: tensor.shape for key, tensor in expected.items()} == {key: t.shape for key, t in found.items()}
    constant = {key: tensor for key, tensor in expected.items() if tensor.std() == 0.0}
    for key, tensor in constant.items():
        np.testing.assert_array_equal(found[key], tensor, err_msg=key)
    for part in ("shadow_backbone", "shadow_update", "shadow_down"):
        keys = [key for key in expected.keys() - constant.keys() if part in key]
        drawn = [np.concatenate([own[key].ravel() for key in keys]) for own in (expected, found)]
        assert drawn[1].std() == pytest.approx(drawn[0].std(), rel=0.15), part


def test_scanned_layers(pairs, tmp_path):
    """Stacked, and with remat, the loss made by chunks: PEFT's loss, the same gradients, the same file and text."""
    pair = pairs("llama")
    theirs = in_torch(pair)
    saved(theirs, tmp_path / "theirs")
    outputs = []
    for options in ({}, {"scan_layers": True, "remat": "nothing_saveable"}):
        model = FlaxAutoModelForCausalLM.from_pretrained(pair.folder, **options)
        wrapped = load_pretrained(model.params, tmp_path / "theirs", is_trainable=True)

        def loss(wrapped, model=model):
            batch = {"input_ids": IDS, "labels": LABELS, "loss_chunk_size": 3}
            wrapped, batch = prepare_inputs(model, wrapped, batch)
            return jpeft.lift(model.apply)(wrapped, **batch).loss

        value, grads = jax.jit(jpeft.value_and_grad(loss))(wrapped)
        adapter = grads.adapters["default"]
        shapes = jax.tree.map(jnp.shape, wrapped.adapters["default"].weights)
        down = [own["shadow_down.default.weight"] for own in adapter.weights.values()]
        outputs.append((value, jnp.stack(down) if len(down) > 1 else down[0], adapter.shared))
        save_pretrained(wrapped, tmp_path / "ours")
        assert_same_files(tmp_path)
    assert list(shapes) == ["model.layers.0:3"]
    assert outputs[0][0] == pytest.approx(float(torch_output(theirs, mask=None).loss), rel=TOLERANCE)
    assert_texts(theirs, partial(model.generate, wrapped))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), *outputs)
