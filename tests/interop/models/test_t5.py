"""T5 and mT5: what the laws over all families do not reach."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft
from jpeft_interop.models import (
    FlaxAutoModel,
    FlaxAutoModelForQuestionAnswering,
    FlaxAutoModelForSeq2SeqLM,
    FlaxAutoModelForSequenceClassification,
    FlaxAutoModelForTokenClassification,
)
from jpeft_interop.models.t5 import relative_buckets
from tests.interop.models import seq2seq_laws as laws

TINY = {
    "model_type": "t5",
    "vocab_size": 40,
    "d_model": 24,
    "d_kv": 10,
    "d_ff": 20,
    "num_layers": 4,
    "num_heads": 2,
    "relative_attention_num_buckets": 6,
    "relative_attention_max_distance": 9,
    "decoder_start_token_id": 0,
}
IDS = np.random.default_rng(0).integers(3, 40, (3, 9))
MASK = np.array([[1] * 7, [1] * 5 + [0] * 2, [0] * 3 + [1] * 4])
SOURCE = {"input_ids": np.random.default_rng(1).integers(3, 40, (3, 7)), "attention_mask": MASK}
MT0_LARGE = {
    "model_type": "mt5",
    "vocab_size": 250112,
    "d_model": 1024,
    "d_kv": 64,
    "d_ff": 2816,
    "num_layers": 24,
    "num_heads": 16,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
}


def tiny(**options):
    return FlaxAutoModelForSeq2SeqLM.from_config(TINY, **options)


@pytest.mark.parametrize("scan_layers", [False, True])
def test_token_by_token(scan_layers):
    laws.token_by_token(tiny(scan_layers=scan_layers), SOURCE, IDS)


def test_encoder_output_in_place_of_its_input():
    laws.encoder_output_in_place_of_its_input(tiny(), SOURCE, IDS)


def test_contradictions_are_refused():
    laws.contradictions_are_refused(tiny(), SOURCE, IDS)


@pytest.mark.parametrize("count, farthest", [(32, 128), (6, 9), (32, 100), (64, 512), (8, 20)])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_buckets_are_those_of_transformers(count, farthest, bidirectional):
    torch = pytest.importorskip("torch")
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5")
    distance = np.arange(-farthest - 3, farthest + 4)
    expected = t5.T5Attention._relative_position_bucket(torch.tensor(distance), bidirectional, count, farthest)
    actual = relative_buckets(distance, bidirectional=bidirectional, count=count, farthest=farthest)
    np.testing.assert_array_equal(actual, expected.numpy())
    assert (actual[:4] == actual[0]).all() and (actual[-4:] == actual[-1]).all()


def test_untied_logits_are_those_of_transformers(tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {key: value for key, value in TINY.items() if key != "model_type"}
    theirs = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, tie_word_embeddings=False)).eval()
    theirs.lm_head.weight = torch.nn.Parameter(torch.randn(40, 24))
    theirs.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="lm_head.weight.*two different tensors.*tie_word_embeddings to false"):
        FlaxAutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["tie_word_embeddings"] = False
    del config["scale_decoder_outputs"]  # As in the files of T5 v1.1, which are older than this key.
    (tmp_path / "config.json").write_text(json.dumps(config))
    ours = FlaxAutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    actual = ours.apply(ours.params, **SOURCE, decoder_input_ids=IDS).logits
    with torch.no_grad():
        given = {name: torch.tensor(value) for name, value in SOURCE.items()}
        expected = theirs(**given, decoder_input_ids=torch.tensor(IDS)).logits.numpy()
    np.testing.assert_allclose(actual, expected, atol=1e-4 * np.abs(expected).max())
    ours.save_pretrained(tmp_path / "saved")
    back = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path / "saved")
    assert not back.config.scale_decoder_outputs
    np.testing.assert_array_equal(back.lm_head.weight.detach(), theirs.lm_head.weight.detach())
    np.testing.assert_array_equal(back.shared.weight.detach(), theirs.shared.weight.detach())


def test_parameters_of_mt0_large():
    model = FlaxAutoModelForSeq2SeqLM.from_config(MT0_LARGE, abstract=True, scan_layers=True)
    assert sum(leaf.size for leaf in jax.tree.leaves(model.params)) == 1_229_581_312
    wrapped = jpeft.wrap(model.params, jpeft.LoraConfig(r=8, target_modules=["q", "v"]))
    trained, everything = jpeft.count_parameters(wrapped)
    assert (trained, everything) == (2_359_296, 1_231_940_608)


def test_heads_take_the_weights_of_a_language_model(tmp_path):
    base = tiny()
    base.save_pretrained(tmp_path)
    expected = base.apply(base.params, **SOURCE, decoder_input_ids=IDS).encoder_last_hidden_state
    bare = FlaxAutoModel.from_pretrained(tmp_path)
    actual = bare.apply(bare.params, **SOURCE, decoder_input_ids=IDS).encoder_last_hidden_state
    np.testing.assert_array_equal(actual, expected)
    for auto, head in (
        (FlaxAutoModelForSequenceClassification, "classification_head.dense.weight"),
        (FlaxAutoModelForTokenClassification, "classifier.weight"),
        (FlaxAutoModelForQuestionAnswering, "qa_outputs.weight"),
    ):
        with pytest.warns(UserWarning, match=f"newly initialised: .*{head}"):
            model = auto.from_pretrained(tmp_path)
        shared = model.params.get("transformer", model.params)["shared"]["embedding"]
        np.testing.assert_array_equal(shared, base.params["shared"]["embedding"])


def test_the_class_is_told_at_the_last_end():
    model = FlaxAutoModelForSequenceClassification.from_config(TINY)
    ids = np.array([[5, 1, 6, 7], [5, 1, 8, 9], [5, 6, 7, 1], [5, 6, 7, 8]])
    logits = model.apply(model.params, ids, decoder_input_ids=np.array([[0, 5, 1, 6]] * 4)).logits
    assert np.isfinite(logits[:3]).all() and np.isnan(logits[3]).all()
    with pytest.raises(ValueError, match="at the last eos_token_id of input_ids: give input_ids"):
        model.apply(model.params, inputs_embeds=np.zeros((1, 4, 24)), decoder_input_ids=np.zeros((1, 4), int))
    with pytest.raises(ValueError, match="the decoder's input has 2 tokens, input_ids 4"):
        model.apply(model.params, ids, decoder_input_ids=np.zeros((4, 2), int))


def test_what_cannot_be_shifted_is_refused():
    model = FlaxAutoModelForQuestionAnswering.from_config({**TINY, "decoder_start_token_id": None}, abstract=True)

    def shape(**inputs):
        return jax.eval_shape(lambda params: model.apply(params, **inputs), model.params)

    with pytest.raises(ValueError, match="no decoder_start_token_id.*give decoder_input_ids"):
        shape(input_ids=IDS)
    with pytest.raises(ValueError, match="or input_ids to shift for the decoder"):
        shape(inputs_embeds=np.zeros((3, 9, 24), np.float32))
    assert shape(input_ids=IDS, decoder_input_ids=IDS).start_logits.shape == (3, 9)


@pytest.mark.parametrize(
    "changes, match",
    [
        ({"feed_forward_proj": "doubled-gelu"}, "feed_forward_proj is 'doubled-gelu'"),
        ({"feed_forward_proj": "gated-softmax"}, "activation 'softmax' is not known"),
        ({"num_hidden_layers": 3}, "num_hidden_layers=3 .expected None or 4"),
        ({"is_decoder": True}, "is_decoder=True"),
        ({"model_type": "mt5", "scale_decoder_outputs": True}, "scale_decoder_outputs=True"),
    ],
)
def test_configs_refused(changes, match):
    with pytest.raises(ValueError, match=match):
        FlaxAutoModel.from_config({**TINY, **changes}, abstract=True)


def test_the_second_names_of_sizes_are_read():
    renamed = {"num_hidden_layers": 2, "hidden_size": 24, "num_attention_heads": 2}
    rest = {key: TINY[key] for key in TINY if key not in ("num_layers", "d_model", "num_heads")}
    config = FlaxAutoModel.from_config({**rest, **renamed}, abstract=True).config
    assert (config.num_layers, config.num_decoder_layers, config.hidden_size, config.num_heads) == (2, 2, 24, 2)


def test_initial_values_have_the_deviations_of_transformers():
    model = tiny(param_dtype=jnp.float32)
    attention = model.params["encoder"]["block"]["0"]["layer"]["0"]["SelfAttention"]
    deviations = {"q": (24 * 10) ** -0.5, "k": 24**-0.5, "o": 20**-0.5}
    for name, deviation in deviations.items():
        assert abs(float(attention[name]["kernel"].std()) / deviation - 1) < 0.2
    assert abs(float(model.params["shared"]["embedding"].std()) - 1) < 0.1
