"""The loss of a model that is given labels: that of the class of the same name in transformers."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jpeft_interop import models
from jpeft_interop.models import auto
from jpeft_interop.models._losses import targets_of
from tests.interop.models.torch_oracle import jax_output, random_model, saved, torch, torch_output, transformers

R = np.random.default_rng(0)
SIZES = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
MOVED = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2}
BART = {**MOVED, "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "vocab_size": 40}
WHISPER = {**BART, "num_mel_bins": 4, "max_source_positions": 6, "max_target_positions": 16, "pad_token_id": 0}
VIT = {name: size for name, size in SIZES.items() if name != "vocab_size"}
CONFIGS = {
    "llama": lambda **own: transformers.LlamaConfig(**SIZES, pad_token_id=0, **own),
    "gpt2": lambda **own: transformers.GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2, pad_token_id=0, **own),
    "bert": lambda **own: transformers.BertConfig(**SIZES, **own),
    "distilbert": lambda **own: transformers.DistilBertConfig(
        vocab_size=40, dim=16, n_layers=1, n_heads=2, hidden_dim=24, **own
    ),
    "deberta": lambda **own: transformers.DebertaV2Config(**SIZES, **own),
    "t5": lambda **own: transformers.T5Config(
        vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, decoder_start_token_id=0, **own
    ),
    "bart": lambda **own: transformers.BartConfig(**BART, **own),
    "whisper": lambda **own: transformers.WhisperConfig(**WHISPER, decoder_start_token_id=3, **own),
    "vit": lambda **own: transformers.ViTConfig(**VIT, image_size=4, patch_size=2, **own),
}
IDS = R.integers(3, 40, (3, 7))
IDS[:, -1] = 2  # where BART and T5, in the config below, tell a sequence's class
TOKENS = np.where(R.random((3, 7)) < 0.4, -100, R.integers(0, 3, (3, 7)))
WORDS = np.where(R.random((3, 7)) < 0.4, -100, IDS)
FRAMES = R.normal(size=(3, 4, 12)).astype(np.float32)
PIXELS = R.normal(size=(3, 3, 4, 4)).astype(np.float32)
KIND, LOGICAL, REAL, ONE = (
    np.array([2, 0, 1]),
    R.integers(0, 2, (3, 3)).astype(np.float32),
    R.normal(size=(3, 3)).astype(np.float32),
    R.normal(size=3).astype(np.float32),
)
SPANS = {"start_positions": np.array([1, 9, -2]), "end_positions": np.array([[3], [6], [7]])}

# (family, task, settings of the config, labels)
CASES = {
    "llama, next token": ("llama", "causal-lm", {}, {"labels": WORDS}),
    "gpt2, next token": ("gpt2", "causal-lm", {}, {"labels": IDS}),
    "llama, tokens": ("llama", "token-classification", {"num_labels": 3}, {"labels": TOKENS}),
    "llama, one label": ("llama", "sequence-classification", {"num_labels": 3}, {"labels": KIND}),
    "llama, answers": ("llama", "question-answering", {}, SPANS),
    "bert, masked": ("bert", "masked-lm", {}, {"labels": WORDS}),
    "bert, tokens": ("bert", "token-classification", {"num_labels": 3}, {"labels": TOKENS}),
    "bert, one label": ("bert", "sequence-classification", {"num_labels": 3}, {"labels": KIND[:, None]}),
    "bert, several": ("bert", "sequence-classification", {"num_labels": 3}, {"labels": LOGICAL}),
    "bert, a number": ("bert", "sequence-classification", {"num_labels": 1}, {"labels": ONE}),
    "bert, numbers": (
        "bert",
        "sequence-classification",
        {"num_labels": 3, "problem_type": "regression"},
        {"labels": REAL},
    ),
    "bert, said to be several": (
        "bert",
        "sequence-classification",
        {"num_labels": 3, "problem_type": "multi_label_classification"},
        {"labels": LOGICAL},
    ),
    "bert, answers": ("bert", "question-answering", {}, SPANS),
    "distilbert, a number": ("distilbert", "sequence-classification", {"num_labels": 1}, {"labels": ONE[:, None]}),
    "deberta, one label": (
        "deberta",
        "sequence-classification",
        {"num_labels": 3},
        {"labels": np.array([2, -100, 1])},
    ),
    "deberta, no label": ("deberta", "sequence-classification", {"num_labels": 3}, {"labels": np.array([-1, -1, -1])}),
    "deberta, weights": ("deberta", "sequence-classification", {"num_labels": 3}, {"labels": LOGICAL}),
    "deberta, a number": ("deberta", "sequence-classification", {"num_labels": 1}, {"labels": ONE}),
    "deberta, said to be several": (
        "deberta",
        "sequence-classification",
        {"num_labels": 3, "problem_type": "multi_label_classification"},
        {"labels": LOGICAL},
    ),
    "t5, answers to a text": ("t5", "seq2seq-lm", {}, {"labels": WORDS}),
    "bart, answers to a text": ("bart", "seq2seq-lm", {}, {"labels": WORDS[:, :5]}),
    "bart, one label": (
        "bart",
        "sequence-classification",
        {"num_labels": 3, "decoder_start_token_id": 2},
        {"labels": KIND},
    ),
    "whisper, what is said": ("whisper", "speech-seq2seq", {}, {"labels": WORDS}),
    "vit, one label": ("vit", "image-classification", {"num_labels": 3}, {"labels": KIND}),
}


def both(case: str, folder):
    kind, task, settings, targets = CASES[case]
    config = CONFIGS[kind](**settings)
    name = auto.FAMILIES[config.model_type].architectures[task].name
    theirs = random_model(name, config)
    given = {"vit": {"pixel_values": PIXELS}, "whisper": {"input_features": FRAMES}}.get(kind, {"input_ids": IDS})
    return theirs, auto.AutoModel(task).from_pretrained(saved(theirs, folder)), {**given, **targets}


@pytest.mark.parametrize("case", CASES)
def test_the_loss_is_that_of_transformers(case, tmp_path):
    theirs, ours, inputs = both(case, tmp_path)
    expected = torch_output(theirs, "loss", **inputs)
    assert np.isfinite(expected)
    np.testing.assert_allclose(jax_output(ours, "loss", **inputs), expected, rtol=2e-5, atol=1e-7)
    assert targets_of(ours.task) == tuple(name for name in inputs if name not in ("input_ids", *_OTHER))


_OTHER = ("pixel_values", "input_features")


def test_the_loss_of_a_batch_is_what_its_gradient_is_of(tmp_path):
    theirs, ours, inputs = both("t5, answers to a text", tmp_path)
    theirs(**{name: torch.tensor(value) for name, value in inputs.items()}).loss.backward()
    gradient = jax.grad(lambda params: ours.apply(params, **inputs).loss)(ours.params)
    expected = theirs.encoder.block[0].layer[1].DenseReluDense.wi.weight.grad.numpy().T
    actual = gradient["encoder"]["block"]["0"]["layer"]["1"]["DenseReluDense"]["wi"]["kernel"]
    np.testing.assert_allclose(actual, expected, atol=1e-5 * np.abs(expected).max(), rtol=1e-4)


def test_no_labels_no_loss():
    model = models.FlaxAutoModelForCausalLM.from_config(json.loads(CONFIGS["llama"]().to_json_string(use_diff=False)))
    assert model.apply(model.params, IDS).loss is None
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), model.params)
    loss = model.apply(half, IDS, labels=IDS).loss
    assert loss is not None and loss.dtype == jnp.float32


def test_labels_that_are_no_classes_are_not_taken_for_others():
    logits = R.normal(size=(2, 3)).astype(np.float32)
    assert np.isnan(models.cross_entropy(logits, np.array([0, 3]))) and np.isnan(
        models.cross_entropy(logits, np.array([0, -1]))
    )
    assert np.isnan(models.cross_entropy(logits, np.array([-100, -100])))
    ignored = models.cross_entropy(logits, np.array([-100, 2]))
    np.testing.assert_allclose(ignored, models.cross_entropy(logits[1:], np.array([2])), rtol=1e-6)
    np.testing.assert_allclose(models.cross_entropy(logits, np.array([7, 2]), ignore_index=7), ignored, rtol=1e-6)


REFUSED = {
    "another shape": (lambda: models.cross_entropy(REAL, KIND[:2]), r"labels are int32 \(2,\); expected whole numbers"),
    "no whole numbers": (lambda: models.cross_entropy(REAL, ONE), r"labels are float32 \(3,\); expected whole numbers"),
    "tokens": (
        lambda: models.causal_lm_loss(REAL[None], KIND[None, :2]),
        r"labels have the shape \(1, 2\); expected \(1, 3\)",
    ),
    "several labels": (
        lambda: models.classification_loss(REAL, ONE),
        r"labels have the shape \(3,\); expected \(3, 3\)",
    ),
    "soft labels": (
        lambda: models.soft_classification_loss(REAL, REAL[:, :2]),
        r"labels have the shape \(3, 2\); expected \(3, 3\)",
    ),
    "another problem": (
        lambda: models.classification_loss(REAL, KIND, "ranking"),
        "problem_type is 'ranking'; expected one of 'regression', 'single_label_classification'",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_labels_that_are_refused(case):
    act, said = REFUSED[case]
    with pytest.raises(ValueError, match=said):
        act()


def test_half_a_span_and_no_start_are_refused():
    config = json.loads(CONFIGS["bert"]().to_json_string(use_diff=False))
    answers = models.FlaxAutoModelForQuestionAnswering.from_config(config)
    with pytest.raises(ValueError, match="got start_positions, but no end_positions; a loss needs both"):
        answers.apply(answers.params, IDS, start_positions=KIND)
    config = json.loads(CONFIGS["t5"]().to_json_string(use_diff=False)) | {"pad_token_id": None}
    speaks = models.FlaxAutoModelForSeq2SeqLM.from_config(config)
    with pytest.raises(ValueError, match="decoder_start_token_id 0 and pad_token_id None, with which labels become"):
        speaks.apply(speaks.params, IDS, labels=IDS)
    given = speaks.apply(speaks.params, IDS, labels=IDS, decoder_input_ids=IDS)
    np.testing.assert_allclose(given.loss, models.cross_entropy(given.logits, IDS), rtol=1e-6)
