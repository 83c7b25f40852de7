"""`generate` against that of transformers: the very same tokens at float32, for every family that generates."""

import importlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft
from jpeft_interop.models import FAMILIES, FlaxAutoModel, FlaxAutoModelForCausalLM
from jpeft_interop.models._generate import TASKS, _compiled
from jpeft_interop.models._sampling import Warp, candidates
from jpeft_interop.models.auto import AutoModel

pytest.importorskip("torch")
pytest.importorskip("transformers")
oracle = importlib.import_module("tests.interop.models.torch_oracle")
torch, transformers = oracle.torch, oracle.transformers

CASES = [
    case
    for file in sorted(Path(__file__).parent.glob("cases_*.py"))
    for case in importlib.import_module(f"tests.interop.models.{file.stem}").CASES
    if case.generates
]
FULL = [case for case in CASES if case.full]
STACKED = [case for case in FULL if case.name in ("llama", "gemma2", "bloom", "t5", "whisper")]
"""One of each kind of memory: plain, of layers that alternate, with a bias, with a first layer of its own, encoded."""
NEW = 9
PAD = 1  # With 0, transformers fills what a beam search leaves with the first eos token.
EOS = (2, 5, 7)


def models(case, folder, *, layers=None, **options):
    """Ours and that of transformers. layers: another number of layers."""
    config = case.config()
    if layers is not None:
        config.num_hidden_layers = layers
    task = next(task for task in TASKS if task in case.tasks)
    reference = oracle.random_model(FAMILIES[config.model_type].architectures[task].name, config)
    return AutoModel(task).from_pretrained(oracle.saved(reference, folder), **options), reference


@pytest.fixture(scope="module")
def shallow(tmp_path_factory):
    """The row "llama" with one layer, for what comes after the logits."""
    case = next(case for case in CASES if case.name == "llama")
    return case, *models(case, tmp_path_factory.mktemp("shallow"), layers=1)


def prompts(case):
    """The inputs of the row as generate takes them: rows padded on the left, for so transformers wants them."""
    for inputs in case.inputs():
        mask = inputs.get("attention_mask")
        if "input_ids" in inputs and "decoder_input_ids" not in inputs and mask is not None and mask[-1, -1] == 0:
            continue
        yield {name: value for name, value in inputs.items() if not name.startswith("decoder_")}


def torch_tokens(reference, inputs, eos, **options):
    given = {name: torch.tensor(value) for name, value in inputs.items()}
    if "attention_mask" not in given and "input_ids" in given:
        # Without one, transformers takes the ids that equal pad_token_id for padding.
        given["attention_mask"] = torch.ones_like(given["input_ids"])
    settings = transformers.GenerationConfig(
        max_new_tokens=NEW,
        eos_token_id=list(eos) or None,
        pad_token_id=PAD,
        decoder_start_token_id=getattr(reference.config, "decoder_start_token_id", None),
        bos_token_id=getattr(reference.config, "bos_token_id", None),
        **options,
    )
    reference.generation_config = settings
    with torch.no_grad():
        tokens = reference.generate(**given, generation_config=settings).numpy()
    # That of Whisper leaves out what the text begins with.
    start = settings.decoder_start_token_id
    return np.insert(tokens, 0, start, axis=1) if reference.config.model_type == "whisper" else tokens


def assert_tokens(actual, expected):
    """Equal; ours has room for all new tokens, theirs ends with the longest row."""
    actual = np.asarray(actual)
    np.testing.assert_array_equal(actual[:, : expected.shape[1]], expected)
    assert (actual[:, expected.shape[1] :] == PAD).all()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_greedy(case, tmp_path):
    ours, reference = models(case, tmp_path)
    inputs = list(prompts(case))[-1]
    actual = ours.generate(ours.params, **inputs, max_new_tokens=NEW, eos_token_id=EOS, pad_token_id=PAD)
    assert_tokens(actual.sequences, torch_tokens(reference, inputs, EOS))


@pytest.mark.parametrize("eos", [(), (3,), EOS], ids=len)
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_greedy_with_and_without_a_mask_and_an_end(name, eos, tmp_path):
    case = next(case for case in CASES if case.name == name)
    ours, reference = models(case, tmp_path)
    for inputs in prompts(case):
        actual = ours.generate(ours.params, **inputs, max_new_tokens=NEW, eos_token_id=eos, pad_token_id=PAD)
        assert_tokens(actual.sequences, torch_tokens(reference, inputs, eos))


BEAMS = [
    {"num_beams": 3},
    {"num_beams": 4, "length_penalty": 2.0, "num_return_sequences": 2},
    {"num_beams": 2, "length_penalty": 0.5, "early_stopping": True},
    {"num_beams": 3, "length_penalty": -1.0, "early_stopping": "never"},
    {"num_beams": 3, "length_penalty": 1.5, "early_stopping": "never", "num_return_sequences": 3},
]


@pytest.mark.parametrize("case", FULL, ids=lambda case: case.name)
def test_beam_search(case, tmp_path):
    ours, reference = models(case, tmp_path)
    inputs = list(prompts(case))[-1]
    actual = ours.generate(ours.params, **inputs, max_new_tokens=NEW, eos_token_id=EOS, pad_token_id=PAD, num_beams=3)
    assert_tokens(actual.sequences, torch_tokens(reference, inputs, EOS, num_beams=3))


@pytest.mark.parametrize("options", BEAMS, ids=lambda options: "-".join(f"{k}={v}" for k, v in options.items()))
@pytest.mark.parametrize("eos", [(), (3,), EOS, tuple(range(2, 22))], ids=len)
def test_settings_of_beam_search(options, eos, shallow):
    case, ours, reference = shallow
    inputs = list(prompts(case))[-1]
    actual = ours.generate(ours.params, **inputs, max_new_tokens=NEW, eos_token_id=eos, pad_token_id=PAD, **options)
    assert_tokens(actual.sequences, torch_tokens(reference, inputs, eos, **options))
    given = {name: torch.tensor(value) for name, value in inputs.items()}
    full = reference.generate(
        **given, generation_config=reference.generation_config, return_dict_in_generate=True, output_scores=True
    )
    np.testing.assert_allclose(actual.scores, full.sequences_scores.numpy(), rtol=1e-4)


@pytest.mark.parametrize("case", STACKED, ids=lambda case: case.name)
def test_stacked_layers_generate_the_same(case, tmp_path):
    ours, _ = models(case, tmp_path)
    stacked, _ = models(case, tmp_path, scan_layers=True)
    inputs = list(prompts(case))[-1]
    expected, actual = (
        model.generate(model.params, **inputs, max_new_tokens=NEW, num_beams=2, pad_token_id=PAD)
        for model in (ours, stacked)
    )
    np.testing.assert_array_equal(expected.sequences, actual.sequences)


def llama(**changes):
    sizes = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = {"model_type": "llama", "intermediate_size": 44, "initializer_range": 0.3, **sizes, **changes}
    return FlaxAutoModelForCausalLM.from_config(config)


def test_padding_on_the_right_is_padding_on_the_left():
    model = llama()
    ids = np.random.default_rng(1).integers(3, 40, (3, 8))
    right, left = np.zeros((3, 8), int), np.zeros((3, 8), int)
    mask_right, mask_left = np.zeros((3, 8), int), np.zeros((3, 8), int)
    for row, length in enumerate((8, 5, 2)):
        right[row, :length], left[row, 8 - length :] = ids[row, :length], ids[row, :length]
        mask_right[row, :length], mask_left[row, 8 - length :] = 1, 1
    for beams in (1, 2):
        options = {"max_new_tokens": 6, "num_beams": beams, "pad_token_id": PAD}
        one = model.generate(model.params, right, attention_mask=mask_right, **options).sequences
        two = model.generate(model.params, left, attention_mask=mask_left, **options).sequences
        np.testing.assert_array_equal(one[:, 8:], two[:, 8:])
        np.testing.assert_array_equal(one[:, :8], right)
        # The first row has no padding on either side.
        for row, length in ((1, 5), (2, 2)):
            alone = model.generate(model.params, ids[row : row + 1, :length], **options).sequences
            np.testing.assert_array_equal(alone[0, length:], one[row, 8:])


def test_one_compilation_for_one_shape():
    model = llama()
    ids = np.arange(3, 11).reshape(2, 4)
    before = _compiled._cache_size()
    for seed, temperature, top_p in ((0, 1.0, 1.0), (1, 0.7, 0.9), (2, 2.0, 0.5)):
        model.generate(model.params, ids + seed, do_sample=True, seed=seed, temperature=temperature, top_p=top_p)
    assert _compiled._cache_size() == before + 1


@pytest.mark.parametrize(
    "temperature, top_k, top_p", [(1.0, None, 1.0), (0.7, 5, 1.0), (1.5, None, 0.6), (0.8, 7, 0.3), (1.0, 3, 1e-9)]
)
def test_the_distribution_that_is_drawn_from(temperature, top_k, top_p):
    logits = np.random.default_rng(0).normal(size=(4, 40)).astype(np.float32)
    reference = torch.tensor(logits)
    warpers = [transformers.TemperatureLogitsWarper(temperature)]
    warpers += [transformers.TopKLogitsWarper(top_k)] if top_k else []
    warpers += [transformers.TopPLogitsWarper(top_p)] if top_p < 1 else []
    for warper in warpers:
        reference = warper(None, reference)
    values, tokens = candidates(jnp.asarray(logits), top_k, Warp(jnp.float32(temperature), jnp.float32(top_p)))
    actual = np.zeros_like(logits)
    np.put_along_axis(actual, np.asarray(tokens), np.asarray(jax.nn.softmax(values)), axis=1)
    np.testing.assert_allclose(actual, torch.softmax(reference, -1).numpy(), atol=1e-6)


def test_sampling_draws_from_the_distribution():
    model = llama()
    prompt = np.array([[4, 9, 3]])
    output = model.generate(
        model.params, prompt, max_new_tokens=1, do_sample=True, top_k=None, temperature=1.3, num_return_sequences=4000
    )
    drawn = np.bincount(np.asarray(output.sequences[:, -1]), minlength=40) / 4000
    expected = np.asarray(jax.nn.softmax(jax.jit(model.apply)(model.params, prompt).logits[0, -1] / 1.3))
    assert output.sequences.shape == (4000, 4)
    assert np.abs(drawn - expected).max() < 4 * np.sqrt(expected.max() / 4000)


def test_the_seed_decides():
    model = llama()
    draw = [
        np.asarray(model.generate(model.params, [[3, 4]], max_new_tokens=12, do_sample=True, seed=seed).sequences)
        for seed in (0, 0, 1)
    ]
    np.testing.assert_array_equal(draw[0], draw[1])
    assert (draw[0] != draw[2]).any()


@pytest.mark.parametrize("beams", [1, 3])
def test_with_an_adapter(beams):
    model = llama()
    wrapped = jpeft.wrap(model.params, jpeft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    options = {"max_new_tokens": NEW, "num_beams": beams}
    merged = model.generate(jpeft.merge(wrapped), [[3, 4, 5]], **options).sequences
    adapted = model.generate(wrapped, [[3, 4, 5]], **options).sequences
    np.testing.assert_array_equal(adapted, merged)
    assert (adapted != model.generate(model.params, [[3, 4, 5]], **options).sequences).any()


def test_a_logits_processor():
    model = llama()

    def rising(sequences, logits, end):
        last = jax.lax.dynamic_index_in_dim(sequences, end - 1, axis=1, keepdims=True)
        return jnp.where(jnp.arange(logits.shape[-1]) > last, logits, -jnp.inf)

    for beams in (1, 2):
        tokens = model.generate(
            model.params, [[3]], max_new_tokens=4, num_beams=beams, logits_processor=rising
        ).sequences
        assert (np.diff(np.asarray(tokens)) > 0).all()


def test_what_ends_a_text_is_read_from_the_files(tmp_path):
    model = llama(eos_token_id=5, pad_token_id=1)
    free = np.asarray(model.generate(model.params, [[3, 4]], max_new_tokens=8, eos_token_id=()).sequences)[0]
    stop = int(free[4])
    model.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(f'{{"eos_token_id": [39, {stop}], "temperature": 0.1}}')
    loaded = FlaxAutoModelForCausalLM.from_pretrained(tmp_path)
    ended = np.asarray(loaded.generate(loaded.params, [[3, 4]], max_new_tokens=8).sequences)[0]
    first = int(np.flatnonzero(free[2:] == stop)[0]) + 3
    np.testing.assert_array_equal(ended[:first], free[:first])
    assert (ended[first:] == 1).all()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"num_beams": 0}, "num_beams must be at least 1, got 0"),
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1, got 0.0"),
        ({"temperature": 0.0}, "temperature must be above 0, got 0.0; do_sample=False"),
        ({"num_beams": 2, "do_sample": True}, "do_sample=True or num_beams > 1, got both"),
        ({"num_return_sequences": 3, "num_beams": 2}, "num_return_sequences=3 needs do_sample=True"),
        ({"num_beams": 2, "early_stopping": "always"}, "early_stopping must be True, False or 'never', got 'always'"),
    ],
)
def test_settings_out_of_range(options, message):
    model = llama()
    with pytest.raises(ValueError, match=message):
        model.generate(model.params, [[3]], **options)


def test_wrong_inputs():
    model = llama()
    with pytest.raises(ValueError, match=r"input_ids must be integers \(batch, length\), got int32 \(3,\)"):
        model.generate(model.params, [3, 4, 5])
    with pytest.raises(ValueError, match="generate needs input_ids"):
        model.generate(model.params)
    with pytest.raises(TypeError, match="takes input_ids.*got pixel_values"):
        model.generate(model.params, [[3]], pixel_values=np.zeros(3))
    bare = FlaxAutoModel.from_config({"model_type": "llama", "num_hidden_layers": 1}, abstract=True)
    with pytest.raises(TypeError, match="LlamaModel does not generate; load the model with FlaxAutoModelForCausalLM"):
        bare.generate(bare.params, [[3]])


def test_calls_that_do_not_fit_the_cache():
    model = llama()
    ids = np.array([[3, 4, 5], [6, 7, 8]])
    cache = model.apply(model.params, ids, cache_length=6).past_key_values
    with pytest.raises(ValueError, match="expected past_key_values or cache_length, got both"):
        model.apply(model.params, ids[:, :1], past_key_values=cache, cache_length=6)
    with pytest.raises(ValueError, match="cache_length is 2, but 3 tokens are to go into the cache"):
        model.apply(model.params, ids, cache_length=2)
    with pytest.raises(ValueError, match="past_key_values has 2 rows, the input 1; expected as many"):
        model.apply(model.params, ids[:1, :1], past_key_values=cache)


def test_a_policy_that_is_not_known():
    with pytest.raises(ValueError, match="remat='everything' is not known; expected None or one of: nothing_saveable"):
        FlaxAutoModelForCausalLM.from_config({"model_type": "llama"}, abstract=True, remat="everything")


def test_an_encoder_without_input_and_a_decoder_without_start():
    sizes = {"vocab_size": 40, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    model = AutoModel("seq2seq-lm").from_config({"model_type": "t5", **sizes})
    with pytest.raises(ValueError, match="generate needs the input of the encoder"):
        model.generate(model.params)
    with pytest.raises(ValueError, match="neither decoder_start_token_id nor bos_token_id: give decoder_input_ids"):
        model.generate(model.params, [[3, 4]])
    given = model.generate(model.params, [[3, 4]], decoder_input_ids=[[0]], max_new_tokens=2)
    assert given.sequences.shape == (1, 3)
