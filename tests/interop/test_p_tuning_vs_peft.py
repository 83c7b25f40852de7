"""P-tuning against PyTorch PEFT: the encoders, outputs for every kind of model, files both ways, training and after."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft
import jpeft_interop

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

from jpeft_interop._extra_file import STATE_NAME  # noqa: E402
from jpeft_interop._files import read_tensors  # noqa: E402
from tests.interop.prompt_models import (  # noqa: E402
    assert_close,
    check_both_ways,
    check_generation,
    inputs,
    labels,
    loaded,
    loaded_by_peft,
    tensors,
    their_output,
)
from tests.interop.prompt_steps import (  # noqa: E402
    assert_same_arrays,
    assert_same_way,
    encoder_of,
    our_steps,
    their_steps,
    with_arrays,
)
from tests.interop.test_round_trip import quietly  # noqa: E402

COUNT = 3
MLP = {"num_virtual_tokens": COUNT, "encoder_hidden_size": 5}
LSTM = {**MLP, "encoder_reparameterization_type": "LSTM"}


@pytest.mark.parametrize("settings", [MLP, LSTM, {**LSTM, "encoder_num_layers": 1}, {**LSTM, "encoder_num_layers": 3}])
def test_the_encoder(settings):
    """The same shapes, initial values of the same spread, and from the same arrays the same prompt."""
    theirs = peft.PromptEncoder(
        peft.PromptEncoderConfig(task_type="SEQ_2_SEQ_LM", num_transformer_submodules=2, token_dim=64, **settings)
    )
    config = jpeft.PromptEncoderConfig(task_type="SEQ_2_SEQ_LM", **settings)
    wrapped = jpeft.wrap({"embed_tokens": {"embedding": jnp.ones((9, 64))}}, config, rng=jax.random.key(3))
    adapter, want = wrapped.adapters["default"], {}
    assert {name: array.shape for name, array in adapter.shared.items()} == {
        name: tuple(array.shape) for name, array in theirs.state_dict().items()
    }
    for name, array in theirs.state_dict().items():
        if array.numel() > 100:
            np.testing.assert_allclose(adapter.shared[name].std(), array.std(), rtol=0.25, err_msg=name)
            np.testing.assert_allclose(abs(adapter.shared[name]).max(), array.abs().max(), rtol=0.6, err_msg=name)
        want[name] = 0.7 * torch.randn_like(array)
    theirs.load_state_dict(want)
    prompt = theirs(torch.arange(2 * COUNT)[None])[0].detach().numpy()
    arrays = {name: jnp.asarray(array.numpy()) for name, array in want.items()}
    found = jpeft._folded.folded(with_arrays(wrapped, arrays).adapters["default"]).shared
    assert list(found) == ["prompt_embeddings"]
    np.testing.assert_allclose(found["prompt_embeddings"], prompt, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("llama", MLP),
        ("gpt2", LSTM),
        ("t5", LSTM),
        ("bert, sequences", LSTM),
    ],
)
def test_files_and_outputs_both_ways(pair, name, settings, tmp_path):
    own = pair(name)
    theirs, ours = check_both_ways(own, peft.PromptEncoderConfig(task_type=own.kind.task, **settings), tmp_path)
    assert list(ours.params.adapters["default"].shared) == ["prompt_embeddings"]
    if own.kind.task in ("CAUSAL_LM", "SEQ_2_SEQ_LM"):
        check_generation(own, theirs, ours)


@pytest.mark.parametrize(("name", "settings"), [("llama", LSTM), ("t5", MLP)])
def test_ten_steps_of_training_and_the_file_to_train_on(pair, name, settings, tmp_path):
    own = pair(name)
    theirs = own.with_peft(peft.PromptEncoderConfig(task_type=own.kind.task, **settings))
    ours = jpeft_interop.get_peft_model(
        own.ours, jpeft.PromptEncoderConfig(task_type=own.kind.task, **settings), rng=jax.random.key(2)
    )
    params = with_arrays(ours.params, encoder_of(theirs))
    batch = {**inputs(own.kind), **labels(own.kind)}
    batch.pop("decoder_input_ids", None)
    want = their_steps(theirs, batch, 0.02)
    params, got = our_steps(own, params, batch, 0.02)
    assert_same_way(got, want)
    assert_same_arrays(params, theirs)

    ours.params = params
    ours.save_pretrained(tmp_path / "ours")
    quietly(theirs.save_pretrained, tmp_path / "theirs")
    one, other = tensors(tmp_path / "ours"), tensors(tmp_path / "theirs")
    assert one.keys() == other.keys() == {"prompt_embeddings"}
    np.testing.assert_allclose(one["prompt_embeddings"], other["prompt_embeddings"], atol=1e-3)
    configs = [json.loads((tmp_path / who / "adapter_config.json").read_text()) for who in ("ours", "theirs")]
    different = {key for key in configs[0].keys() | configs[1].keys() if configs[0].get(key) != configs[1].get(key)}
    assert different <= {"base_model_name_or_path", "auto_mapping"}
    assert_close(their_output(loaded_by_peft(own, tmp_path / "ours"), inputs(own.kind)), ours_output(ours, own))

    held = read_tensors(tmp_path / "ours" / STATE_NAME)
    assert held.keys() == params.adapters["default"].shared.keys()
    again = loaded(own, tmp_path / "ours", is_trainable=True).params
    for key, array in params.adapters["default"].shared.items():
        np.testing.assert_array_equal(again.adapters["default"].shared[key], array)
    assert not again.adapters["default"].config.inference_mode
    resumed, whole = our_steps(own, again, batch, 0.02)[1], our_steps(own, params, batch, 0.02)[1]
    np.testing.assert_array_equal(resumed, whole)


def ours_output(ours, own):
    return np.asarray(ours(**inputs(own.kind)).logits)


def test_a_folder_of_pefts_cannot_train_on(pair, tmp_path):
    own = pair("llama")
    theirs = own.with_peft(peft.PromptEncoderConfig(task_type="CAUSAL_LM", **MLP))
    theirs.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds a prompt, and not the encoder that it was made of"):
        loaded(own, tmp_path, is_trainable=True)
