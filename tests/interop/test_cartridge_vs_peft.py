"""Cartridges against PyTorch PEFT: files both ways, training, beginning as the cache of a text, composition."""

import dataclasses
import json
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import jpeft
import jpeft_interop

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from tests.interop.prompt_models import (  # noqa: E402
    assert_close,
    assert_same_files,
    loaded,
    loaded_by_peft,
    output_of,
    pair_of,
    tensors,
    their_output,
)
from tests.interop.test_prefix_vs_peft import batch_of, labels_of, seen, steps_of  # noqa: E402
from tests.interop.test_round_trip import quietly  # noqa: E402

COUNT = 4
WORDS = {"<unk>": 0, "law": 3, "is": 5, "what": 7, "courts": 11, "say": 13, "it": 17}
TEXT = "law is what courts say it is"


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    return pair_of("llama", tmp_path_factory.mktemp("cartridges"))


def config_of(module=peft, **settings):
    return module.CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=COUNT, **settings)


def same_settings(first, second):
    one, other = (json.loads((folder / "adapter_config.json").read_text()) for folder in (first, second))
    assert one == other


@pytest.mark.parametrize("frozen", [0, 1, COUNT])
def test_files_and_outputs_both_ways(own, frozen, tmp_path):
    theirs = own.with_peft(config_of(num_frozen_tokens=frozen))
    theirs.save_pretrained(tmp_path / "theirs")
    batch = batch_of(own, left=True)
    want = their_output(theirs, batch)
    if frozen == 1:
        assert_close(output_of(loaded(own, tmp_path / "theirs")(**batch)), want, seen(own, batch))
    for index, trainable in enumerate((False, True)):
        again = loaded(own, tmp_path / "theirs", is_trainable=trainable)
        count = sum(array.shape[0] for array in again.params.adapters["default"].shared.values())
        assert count == COUNT and len(again.params.adapters["default"].shared) == 1 + (trainable and frozen > 0)
        again.save_pretrained(tmp_path / str(index))
        assert_same_files(tmp_path / "theirs", tmp_path / str(index))
        same_settings(tmp_path / "theirs", tmp_path / str(index))
        assert not (tmp_path / str(index) / "jpeft_state.safetensors").exists()
    assert_close(their_output(loaded_by_peft(own, tmp_path / "1"), batch), want, seen(own, batch))


def test_ten_steps_of_training(own, tmp_path):
    theirs = own.with_peft(config_of(num_frozen_tokens=2))
    theirs.save_pretrained(tmp_path / "begun")
    begun = tensors(tmp_path / "begun")["prompt_embeddings"]
    want, got, params = steps_of(own, theirs, loaded(own, tmp_path / "begun", is_trainable=True).params,
                                 {**batch_of(own), **labels_of(own)}, 0.5)  # fmt: skip
    np.testing.assert_allclose(got, want, atol=1e-3, rtol=1e-3)
    assert want[-1] < want[0]
    theirs.save_pretrained(tmp_path / "theirs")
    jpeft_interop.save_pretrained(params, tmp_path / "ours")
    one, other = (tensors(tmp_path / side)["prompt_embeddings"] for side in ("ours", "theirs"))
    np.testing.assert_allclose(one, other, atol=1e-3)
    np.testing.assert_array_equal(one[:2], begun[:2])
    assert np.abs(one[2:] - begun[2:]).max() > 0.01


def tokenizer(folder, template=None):
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel(WORDS, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=words)
    made.chat_template = template
    made.save_pretrained(folder)
    return transformers.AutoTokenizer.from_pretrained(folder)


TEMPLATE = "{% for message in messages %}it is {{ message['content'] }}{% endfor %}"


@pytest.mark.parametrize(("kind", "template", "options"), [
    ("CartridgeConfig", TEMPLATE, {}),
    ("CartridgeConfig", TEMPLATE, {"use_chat_template": False, "max_length": 5}),
    ("PrefixTuningConfig", None, {}),
])  # fmt: skip
def test_the_cache_of_a_text_begins_a_prefix(own, kind, template, options, tmp_path):
    words, settings = tokenizer(tmp_path, template), {"task_type": "CAUSAL_LM", "num_virtual_tokens": COUNT}
    theirs = own.with_peft(getattr(peft, kind)(**settings))
    want = quietly(peft.initialize_kv_prefix_from_text, theirs, words, text=TEXT, **options).numpy()
    ours = jpeft_interop.get_peft_model(own.ours, getattr(jpeft, kind)(**settings))
    got = jpeft_interop.initialize_kv_prefix_from_text(ours, words, text=TEXT, **options)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    batch = batch_of(own)
    assert_close(output_of(ours(**batch)), their_output(theirs, batch), seen(own, batch))


def test_a_text_too_short(own, tmp_path):
    ours = jpeft_interop.get_peft_model(own.ours, config_of(jpeft))
    with pytest.raises(ValueError, match=r"of shape \(2, 3, 2, 4\).*num_virtual_tokens=4; expected \(2, at least 4, "):
        jpeft_interop.initialize_kv_prefix_from_text(ours, tokenizer(tmp_path), text="law is what")


def test_composition_is_pefts(own, tmp_path):
    for name, count, frozen, seed in (("law", COUNT, 2, 3), ("price", 3, 1, 4)):
        settings: Any = {"task_type": "CAUSAL_LM", "num_virtual_tokens": count, "num_frozen_tokens": frozen}
        own.with_peft(peft.CartridgeConfig(**settings), seed).save_pretrained(tmp_path / name)
    folders = [tmp_path / "law", tmp_path / "price"]
    peft.compose_cartridge_adapters(folders, output_path=tmp_path / "theirs")
    jpeft_interop.compose_cartridge_adapters(folders, output_path=tmp_path / "ours")
    assert_same_files(tmp_path / "theirs", tmp_path / "ours")
    same_settings(tmp_path / "theirs", tmp_path / "ours")
    params = jpeft_interop.load_pretrained(own.ours.params, folders[0], adapter_name="law", is_trainable=True)
    params = jpeft_interop.load_adapter(params, folders[1], "price")
    params = jpeft.compose_cartridges(params, ["law", "price"], "both")
    assert params.adapters["both"].shared["frozen_embedding"].shape[0] == 2
    jpeft_interop.save_pretrained(params, tmp_path, selected_adapters=["both"])
    assert_same_files(tmp_path / "theirs", tmp_path / "both")
    ours, theirs = loaded(own, tmp_path / "ours"), loaded_by_peft(own, tmp_path / "theirs")
    batch = batch_of(own)
    assert_close(output_of(ours(**batch)), their_output(theirs, batch), seen(own, batch))
    with pytest.raises(ValueError, match="expected the folders of two cartridges or more"):
        jpeft_interop.compose_cartridge_adapters(folders[:1], output_path=tmp_path / "one")
    config = dataclasses.replace(jpeft_interop.load_config(folders[1]), num_layers=5)
    jpeft_interop.save_pretrained(jpeft.wrap({"a": {"kernel": jnp.eye(2)}}, config), tmp_path / "deep")
    with pytest.raises(ValueError, match="num_layers is 5 in .*deep' and 2 in .*; expected cartridges of one model"):
        jpeft_interop.compose_cartridge_adapters([folders[0], tmp_path / "deep"], output_path=tmp_path / "none")
    assert not (tmp_path / "none").exists()
