"""BART: what the laws over all families do not reach."""

import numpy as np
import pytest

from jpeft_interop.models import FlaxAutoModel, FlaxAutoModelForSeq2SeqLM, FlaxAutoModelForSequenceClassification
from tests.interop.models import seq2seq_laws as laws

TINY = {
    "model_type": "bart",
    "vocab_size": 40,
    "d_model": 24,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 3,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 20,
    "decoder_ffn_dim": 28,
    "max_position_embeddings": 9,
    "scale_embedding": True,
    "init_std": 0.2,
    "pad_token_id": 0,
}
IDS = np.random.default_rng(0).integers(3, 40, (3, 9))
MASK = np.array([[1] * 7, [1] * 5 + [0] * 2, [0] * 3 + [1] * 4])
SOURCE = {"input_ids": np.random.default_rng(1).integers(3, 40, (3, 7)), "attention_mask": MASK}


def tiny(**options):
    return FlaxAutoModelForSeq2SeqLM.from_config(TINY, **options)


@pytest.mark.parametrize("scan_layers", [False, True])
def test_token_by_token(scan_layers):
    laws.token_by_token(tiny(scan_layers=scan_layers), SOURCE, IDS)


def test_encoder_output_in_place_of_its_input():
    laws.encoder_output_in_place_of_its_input(tiny(), SOURCE, IDS)


def test_contradictions_are_refused():
    laws.contradictions_are_refused(tiny(), SOURCE, IDS)


def test_bias_of_the_logits(tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BartConfig(**{key: value for key, value in TINY.items() if key != "model_type"})
    theirs = transformers.BartForConditionalGeneration(config).eval()
    theirs.final_logits_bias.normal_()
    theirs.save_pretrained(tmp_path)
    ours = FlaxAutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    with torch.no_grad():
        expected = theirs(torch.tensor(SOURCE["input_ids"])).logits.numpy()
    actual = ours.apply(ours.params, SOURCE["input_ids"]).logits
    np.testing.assert_allclose(actual, expected, atol=1e-4 * np.abs(expected).max())
    ours.save_pretrained(tmp_path / "saved")
    back = transformers.BartForConditionalGeneration.from_pretrained(tmp_path / "saved")
    np.testing.assert_array_equal(back.final_logits_bias, theirs.final_logits_bias)


def test_heads_take_the_weights_of_the_bare_model(tmp_path):
    base = FlaxAutoModel.from_config(TINY)
    base.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="newly initialised: classification_head.dense"):
        model = FlaxAutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert model.config.num_labels == 3
    np.testing.assert_array_equal(model.params["model"]["shared"]["embedding"], base.params["shared"]["embedding"])
    with pytest.warns(UserWarning, match="newly initialised: final_logits_bias"):
        model = FlaxAutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    assert not model.params["final_logits_bias"].any()


def test_more_tokens_than_positions_are_refused():
    model = tiny()
    with pytest.raises(ValueError, match="10 tokens exceed max_position_embeddings=9"):
        model.apply(model.params, np.full((1, 10), 5))
    with pytest.raises(ValueError, match="10 tokens exceed max_position_embeddings=9"):
        model.apply(model.params, **SOURCE, decoder_input_ids=np.full((3, 10), 5))


@pytest.mark.parametrize(
    "changes, match",
    [
        ({"tie_word_embeddings": False}, "tie_word_embeddings=False"),
        ({"normalize_before": True}, "normalize_before=True"),
        ({"extra_pos_embeddings": 0}, "extra_pos_embeddings=0"),
        ({"num_hidden_layers": 3}, "num_hidden_layers=3 .expected None or 2"),
        ({"decoder_attention_heads": 5}, "d_model 24 is not a multiple of decoder_attention_heads 5"),
        ({"activation_function": "softmax"}, "activation 'softmax' is not known"),
    ],
)
def test_configs_refused(changes, match):
    with pytest.raises(ValueError, match=match):
        FlaxAutoModel.from_config({**TINY, **changes}, abstract=True)


def test_keys_of_the_first_conversions_are_read():
    raw = {
        "add_bias_logits": False,
        "add_final_layer_norm": False,
        "extra_pos_embeddings": 2,
        "normalize_before": False,
        "normalize_embedding": True,
        "static_position_embeddings": False,
        "classif_dropout": 0.0,
        "num_hidden_layers": 2,
        "_num_labels": 3,
        "force_bos_token_to_be_generated": True,
    }
    model = FlaxAutoModel.from_config({**TINY, **raw}, abstract=True)
    assert model.config == FlaxAutoModel.from_config(TINY, abstract=True).config
