"""Whisper: what the laws over all families do not reach."""

import jax
import numpy as np
import pytest

import jpeft
from jpeft_interop.models import FlaxAutoModel, FlaxAutoModelForSpeechSeq2Seq
from jpeft_interop.models.whisper import sinusoids
from tests.interop.models import seq2seq_laws as laws

TINY = {
    "model_type": "whisper",
    "vocab_size": 40,
    "num_mel_bins": 7,
    "d_model": 24,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 3,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 20,
    "decoder_ffn_dim": 28,
    "max_source_positions": 6,
    "max_target_positions": 9,
    "init_std": 0.2,
}
IDS = np.random.default_rng(0).integers(3, 40, (3, 9))
SOURCE = {"input_features": np.random.default_rng(1).normal(size=(3, 7, 12)).astype(np.float32)}


def tiny(**options):
    return FlaxAutoModelForSpeechSeq2Seq.from_config(TINY, **options)


@pytest.mark.parametrize("scan_layers", [False, True])
def test_token_by_token(scan_layers):
    laws.token_by_token(tiny(scan_layers=scan_layers), SOURCE, IDS)


def test_encoder_output_in_place_of_its_input():
    laws.encoder_output_in_place_of_its_input(tiny(), SOURCE, IDS)


def test_contradictions_are_refused():
    laws.contradictions_are_refused(tiny(), SOURCE, IDS)


def test_positions_are_those_of_transformers():
    torch = pytest.importorskip("torch")
    whisper = pytest.importorskip("transformers.models.whisper.modeling_whisper")
    actual = sinusoids(jax.random.key(0), (50, 24), np.float32, 0.02)
    np.testing.assert_allclose(actual, whisper.sinusoids(50, 24).to(torch.float32), atol=1e-5)


def test_the_encoders_positions_and_no_other_are_not_trained():
    model = tiny()
    gradients = jax.grad(lambda params: model.apply(params, **SOURCE, decoder_input_ids=IDS).logits[..., 3].sum())(
        model.params
    )
    encoder, decoder = gradients["model"]["encoder"], gradients["model"]["decoder"]
    assert not encoder["embed_positions"]["embedding"].any()
    assert decoder["embed_positions"]["embedding"].any() and encoder["conv1"]["kernel"].any()


def test_a_mask_of_the_frames_has_no_effect():
    model = tiny()
    call = {**SOURCE, "decoder_input_ids": IDS}
    masked = model.apply(model.params, **call, attention_mask=np.zeros((3, 12), int))
    np.testing.assert_array_equal(masked.logits, model.apply(model.params, **call).logits)


def test_an_untied_projection():
    model = FlaxAutoModelForSpeechSeq2Seq.from_config({**TINY, "tie_word_embeddings": False})
    output = model.apply(model.params, **SOURCE, decoder_input_ids=IDS)
    tied = tiny()
    rest = {"model": model.params["model"]}
    states = FlaxAutoModel.from_config(TINY, abstract=True).apply(rest["model"], **SOURCE, decoder_input_ids=IDS)
    laws.close(output.logits, states.last_hidden_state @ model.params["proj_out"]["kernel"])
    assert rest.keys() == tied.params.keys()


@pytest.mark.parametrize("scan_layers", [False, True])
def test_convolutions_can_be_adapted(scan_layers):
    model = tiny(scan_layers=scan_layers)
    config = jpeft.LoraConfig(target_modules=["conv1", "conv2", "q_proj"])
    wrapped = jpeft.wrap(model.params, config, layouts=model.layouts)
    rows = jpeft.explain(lambda params: model.apply(params, **SOURCE, decoder_input_ids=IDS), wrapped)
    assert "conv1" in str(rows) and "merged" not in str(rows)


@pytest.mark.parametrize("shape", [(3, 7, 11), (3, 12, 7), (7, 12)])
def test_sound_of_another_length_is_refused(shape):
    model = tiny()
    with pytest.raises(ValueError, match=r"expected input_features \(batch, 7, 12\), padded"):
        model.apply(model.params, input_features=np.zeros(shape, np.float32), decoder_input_ids=IDS)


def test_more_tokens_than_positions_are_refused():
    model = tiny()
    with pytest.raises(ValueError, match="10 tokens exceed max_target_positions=9"):
        model.apply(model.params, **SOURCE, decoder_input_ids=np.full((3, 10), 5))


@pytest.mark.parametrize(
    "changes, match",
    [
        ({"encoder_attention_heads": 5}, "d_model 24 is not a multiple of encoder_attention_heads 5"),
        ({"num_hidden_layers": 3}, "num_hidden_layers=3 .expected None or 2"),
        ({"activation_function": "softmax"}, "activation 'softmax' is not known"),
        ({"is_encoder_decoder": False}, "is_encoder_decoder=False"),
    ],
)
def test_configs_refused(changes, match):
    with pytest.raises(ValueError, match=match):
        FlaxAutoModel.from_config({**TINY, **changes}, abstract=True)
