"""Habits of PEFT's users, on both sides: names, losses, weighted adapters, other heads, new tokens, conversions."""

import contextlib
import dataclasses
import inspect
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import jpeft
import jpeft_interop
from jpeft_interop import models
from jpeft_interop._forwarding import INSTEAD
from jpeft_interop.models import auto
from jpeft_interop.models._leaves import tensors_of
from tests.interop.test_face_vs_peft import (
    IDS,
    KINDS,
    assert_same_logits,
    copied,
    pair,
    randomise,
    their_base,
    their_logits,
)

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

SIZES = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
TINY = {**SIZES, "intermediate_size": 24, "max_position_embeddings": 32}


@contextlib.contextmanager
def quiet():
    """PEFT says much of what it does; what is said here is tested elsewhere."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    found = {}
    for kind, (torch_class, config, _, _) in KINDS.items():
        found[kind] = tmp_path_factory.mktemp(kind)
        randomise(getattr(transformers, torch_class)(config()), 0).save_pretrained(found[kind])
    return found


# ---- names ----------------------------------------------------------------------------------------------------------

CLASSES = [name for name in dir(jpeft_interop) if name.startswith("PeftModel")]

MISSING = {
    "base_model_prepare_inputs_for_generation": "a step of PyTorch's generate",
    "base_model_torch_dtype": "PyTorch's dtype",
    "forward": "the model itself, or apply, is called",
    "get_prompt": "no method of virtual tokens",
    "get_prompt_embedding_to_save": "no method of virtual tokens",
    "prepare_inputs_for_generation": "a step of PyTorch's generate",
    "prepare_model_for_gradient_checkpointing": "remat is chosen when a model is loaded",
    "special_peft_forward_args": "signatures say them",
    "training": "no mode",
}


def public_names(cls: Any, instance: Any) -> set[str]:
    """What PEFT itself puts on a model: methods, properties and attributes, not those of torch.nn.Module."""
    own = [base for base in cls.__mro__ if base.__module__.startswith("peft.") or base.__name__ == "PushToHubMixin"]
    methods = {name for base in own for name in vars(base)}
    attributes = {name for name in vars(instance) if name not in vars(torch.nn.Module())} | set(instance._modules)
    return {name for name in methods | attributes if not name.startswith("_")} | {"training"}


@pytest.mark.parametrize("name", CLASSES)
def test_every_public_name_of_peft_is_here_or_says_what_to_do(folders, name):
    theirs, ours = getattr(peft, name), getattr(jpeft_interop, name)
    instance = pair("llama", folders["llama"]).theirs
    absent = {public for public in public_names(theirs, instance) if not hasattr(ours, public)}
    here = {"CausalLM", "Seq2SeqLM"} & {name.removeprefix("PeftModelFor")}
    assert absent == MISSING.keys() - (set() if here else {"prepare_inputs_for_generation"})
    assert MISSING.keys() <= INSTEAD.keys()


@pytest.mark.parametrize(
    "method", ["__init__", "from_pretrained", "load_adapter", "add_adapter", "set_adapter", "save_pretrained"]
)
def test_arguments_come_in_the_order_of_peft(method):
    signatures = [
        [
            parameter.name
            for parameter in inspect.signature(getattr(side.PeftModel, method)).parameters.values()
            if parameter.kind == parameter.POSITIONAL_OR_KEYWORD
        ]
        for side in (peft, jpeft_interop)
    ]
    assert signatures[0] == signatures[1]


def test_get_peft_model_takes_the_arguments_of_peft():
    theirs, ours = (list(inspect.signature(side.get_peft_model).parameters) for side in (peft, jpeft_interop))
    assert theirs == ours[: len(theirs)]


# ---- outputs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_with_adapters(folders, kind):
    both = copied(pair(kind, folders[kind]))
    labels = {"llama": np.where(IDS > 30, -100, IDS), "bert": np.array([2, 0])}[kind]
    theirs = both.theirs(input_ids=torch.tensor(IDS), labels=torch.tensor(labels))
    ours = both.ours(input_ids=IDS, labels=labels)
    np.testing.assert_allclose(ours.loss, theirs.loss.detach().numpy(), rtol=1e-5)
    assert_same_logits(ours, theirs.logits.detach().numpy())


def test_weighted_adapters(folders):
    both = pair("llama", folders["llama"])
    for model, config in ((both.theirs, peft.LoraConfig), (both.ours, jpeft.LoraConfig)):
        model.add_adapter("other", config(task_type="CAUSAL_LM", r=4, lora_alpha=6, target_modules=["up_proj"]))
        model.set_requires_grad("other")
    copied(both)
    copied(both, "other")
    jpeft_interop.set_peft_model_state_dict(
        both.ours, {k: v.numpy() for k, v in peft.get_peft_model_state_dict(both.theirs).items()}
    )
    for name, kind in (("sum", "cat"), ("factors", "linear")):
        for model in (both.theirs, both.ours):
            model.add_weighted_adapter(["default", "other"], [0.7, 0.4], name, combination_type=kind)
            model.base_model.set_adapter(name)
        assert_same_logits(both.ours(input_ids=IDS), their_logits(both.theirs))
    statuses = [dataclasses.asdict(model.get_model_status()) for model in (both.theirs, both.ours)]
    assert statuses[0]["requires_grad"] == statuses[1]["requires_grad"]


def test_a_head_of_another_size(folders, tmp_path):
    both = copied(pair("bert", folders["bert"]))
    both.theirs.save_pretrained(tmp_path / "adapter")
    base = transformers.BertForSequenceClassification(transformers.BertConfig(**TINY, num_labels=5))
    randomise(base, 3).save_pretrained(tmp_path / "base")
    ours = models.FlaxAutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    with quiet():
        theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter", ignore_mismatched_sizes=True)
        ours = jpeft_interop.PeftModel.from_pretrained(ours, tmp_path / "adapter", ignore_mismatched_sizes=True)
    assert_same_logits(ours(input_ids=IDS), their_logits(theirs.eval()))


# ---- vocabularies ---------------------------------------------------------------------------------------------------


def tokenizer(words: int) -> Any:
    vocabulary = {f"w{number}": number for number in range(40)}
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="w0"))
    )
    made.add_tokens([f"w{number}" for number in range(40, words)])
    assert len(made) == words
    return made


def larger(tied: bool, folder: Path) -> Path:
    config = transformers.LlamaConfig(**TINY, num_key_value_heads=1, tie_word_embeddings=tied)
    randomise(transformers.LlamaForCausalLM(config), 2).save_pretrained(folder)
    return folder


NEW = np.array([[41, 3, 42, 5, 40]])


@pytest.mark.parametrize("tied", [False, True])
def test_adapters_with_new_tokens_go_both_ways(tied, tmp_path):
    base = larger(tied, tmp_path / "base")
    fields = {"task_type": "CAUSAL_LM", "r": 2, "init_lora_weights": False}
    theirs = transformers.LlamaForCausalLM.from_pretrained(base).eval()
    theirs.resize_token_embeddings(43)
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(**fields)).eval()
    with torch.no_grad():  # Trained new rows, so that initial ones do not do.
        for layer in {theirs.get_input_embeddings(), theirs.get_output_embeddings()}:
            layer.weight[40:] = torch.randn(3, 16, generator=torch.Generator().manual_seed(1))
    ours = models.FlaxAutoModelForCausalLM.from_pretrained(base)
    ours = jpeft_interop.get_peft_model(models.resize_token_embeddings(ours, 43), jpeft.LoraConfig(**fields))
    with quiet():
        theirs.save_pretrained(tmp_path / "theirs")
        ours.save_pretrained(tmp_path / "ours")
    for side in ("theirs", "ours"):
        tokenizer(43).save_pretrained(tmp_path / side)
    written = [load_file(tmp_path / side / "adapter_model.safetensors") for side in ("theirs", "ours")]
    shapes = [{key: tensor.shape for key, tensor in one.items()} for one in written]
    # Of a tied table PEFT writes its second name, too.
    assert shapes[0] == {**shapes[1], **({"base_model.model.lm_head.weight": (43, 16)} if tied else {})}
    here = jpeft_interop.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "theirs")
    with torch.no_grad():
        assert_same_logits(here(input_ids=NEW), theirs(input_ids=torch.tensor(NEW)).logits.numpy())
    with quiet():
        there = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    with torch.no_grad():
        assert_same_logits(ours(input_ids=NEW), there(input_ids=torch.tensor(NEW)).logits.numpy())


def test_a_vocabulary_that_is_large_enough_stays(tmp_path):
    base = larger(False, tmp_path / "base")
    ours = jpeft_interop.get_peft_model(
        models.FlaxAutoModelForCausalLM.from_pretrained(base), jpeft.LoraConfig(task_type="CAUSAL_LM")
    )
    ours.save_pretrained(tmp_path)
    tokenizer(40).save_pretrained(tmp_path)
    assert jpeft_interop.AutoPeftModelForCausalLM.from_pretrained(tmp_path).config["vocab_size"] == 40
    assert all("lora" in key for key in load_file(tmp_path / "adapter_model.safetensors"))


FAMILIES = {
    "bert": ("masked-lm", transformers.BertConfig(**TINY)),
    "deberta": ("masked-lm", transformers.DebertaV2Config(**TINY)),
    "gpt2": ("causal-lm", transformers.GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2)),
    "opt": ("causal-lm", transformers.OPTConfig(vocab_size=40, hidden_size=16, num_hidden_layers=1, ffn_dim=24,
            num_attention_heads=2, word_embed_proj_dim=16)),
    "gpt_neox": ("causal-lm", transformers.GPTNeoXConfig(**TINY)),
    "t5": ("seq2seq-lm", transformers.T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2)),
    "bart": ("seq2seq-lm", transformers.BartConfig(vocab_size=40, d_model=16, encoder_layers=1, decoder_layers=1,
             encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24)),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_tensors_grow_as_in_transformers(family):
    task, config = FAMILIES[family]
    raw = json.loads(config.to_json_string(use_diff=False))
    ours = models.resize_token_embeddings(auto.AutoModel(task).from_config(raw), 47)
    theirs = getattr(transformers, ours.blueprint.architecture.name)(config).eval()
    old = {name: tensor.shape for name, tensor in theirs.state_dict().items()}
    theirs.resize_token_embeddings(47)
    grown = {name: tuple(tensor.shape) for name, tensor in theirs.state_dict().items() if tensor.shape != old[name]}
    here = {name: shape for leaf in ours.blueprint.leaves.values() for name, shape in tensors_of(leaf).items()}
    assert {name for name, shape in here.items() if 47 in shape} <= grown.keys()
    assert {name: here[name] for name in here.keys() & grown.keys()} == {
        name: grown[name] for name in here.keys() & grown.keys()
    }
    # What is not here by that name is a second name of what is.
    aliases = ours.blueprint.architecture.tied
    assert all(name in here or aliases.get(name) in here for name in grown)
    if family == "bart":
        assert not np.any(ours.params["final_logits_bias"][:, 40:])


# ---- conversions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("first", ["zeros", "others"])
def test_the_change_of_plain_lora_since_an_initial_adapter(folders, first, rslora, tmp_path):
    both = pair("llama", folders["llama"], use_rslora=rslora)
    if first == "others":
        copied(both)
    both.theirs.save_pretrained(tmp_path / "initial")
    copied(both)
    with torch.no_grad():
        for parameter in both.theirs.parameters():
            parameter.mul_(1.5) if parameter.requires_grad else None
    state = {k: v.numpy() for k, v in peft.get_peft_model_state_dict(both.theirs).items()}
    jpeft_interop.set_peft_model_state_dict(both.ours, state)
    said = (
        pytest.warns(UserWarning, match="whose factors are no zeros .*leave path_initial_model_for")
        if first == "others"
        else contextlib.nullcontext()
    )
    with said:
        both.ours.save_pretrained(tmp_path / "ours", path_initial_model_for_weight_conversion=tmp_path / "initial")
    both.theirs.save_pretrained(tmp_path / "theirs", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    written = [load_file(tmp_path / side / "adapter_model.safetensors") for side in ("theirs", "ours")]
    assert written[0].keys() == written[1].keys()
    for key in written[0]:
        np.testing.assert_allclose(written[1][key], written[0][key], rtol=1e-6, atol=1e-7)
    configs = [json.loads((tmp_path / side / "adapter_config.json").read_text()) for side in ("theirs", "ours")]
    assert configs[1]["r"] == configs[0]["r"] == 8
    assert configs[1]["lora_alpha"] == pytest.approx(configs[0]["lora_alpha"])
    if first == "zeros":
        loaded = peft.PeftModel.from_pretrained(their_base("llama", folders["llama"]), tmp_path / "ours")
        assert_same_logits(both.ours(input_ids=IDS), their_logits_of(loaded, IDS))


def their_logits_of(model: Any, ids: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(input_ids=torch.tensor(ids)).logits.numpy()


def test_conversions_of_what_is_no_plain_lora(folders, tmp_path):
    base = models.FlaxAutoModelForCausalLM.from_pretrained(folders["llama"])
    model = jpeft_interop.get_peft_model(base, jpeft.LoraConfig(task_type="CAUSAL_LM", use_dora=True))
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="adapter 'default' of a LoraConfig is no plain LoRA, whose change since then"):
        model.save_pretrained(tmp_path / "b", path_initial_model_for_weight_conversion=tmp_path)
