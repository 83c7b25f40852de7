"""The familiar face beside PyTorch's PEFT: the same numbers, statuses, keys, files, defaults and outputs."""

import contextlib
import dataclasses
import importlib
import json
import warnings
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

import jpeft
import jpeft_interop
from jpeft._contract import config_classes
from jpeft_interop import models
from jpeft_interop._base_model import base_model
from jpeft_interop._default_targets import FEEDFORWARD, TARGETS, with_default_targets
from jpeft_interop.models.auto import AutoModel
from tests.interop.beside_cases import BESIDE

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
TOLERANCE = 1e-4
SIZES = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
TINY = {**SIZES, "intermediate_size": 24, "max_position_embeddings": 32}
IDS = np.random.default_rng(0).integers(3, 40, (2, 7))

LLAMA = ("LlamaForCausalLM", lambda: transformers.LlamaConfig(**TINY, num_key_value_heads=1))
BERT = ("BertForSequenceClassification", lambda: transformers.BertConfig(**TINY, num_labels=3))
KINDS = {
    "llama": (*LLAMA, models.FlaxAutoModelForCausalLM, "CAUSAL_LM"),
    "bert": (*BERT, models.FlaxAutoModelForSequenceClassification, "SEQ_CLS"),
}


def randomise(model: Any, seed: int, only_adapters: bool = False) -> Any:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad or not only_adapters:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The folder of a random base model of each kind."""
    found = {}
    for kind, (torch_class, config, _, _) in KINDS.items():
        found[kind] = tmp_path_factory.mktemp(kind)
        randomise(getattr(transformers, torch_class)(config()), 0).save_pretrained(found[kind])
    return found


@dataclasses.dataclass
class Pair:
    """The same model with the same adapters, there and here."""

    kind: str
    folder: Path
    theirs: Any
    ours: Any


def their_base(kind: str, folder: Path) -> Any:
    return getattr(transformers, KINDS[kind][0]).from_pretrained(folder).eval()


def pair(kind: str, folder: Path, **fields: Any) -> Pair:
    fields = {"task_type": KINDS[kind][3], "r": 4, **fields}
    theirs = peft.get_peft_model(their_base(kind, folder), peft.LoraConfig(**fields))
    ours = jpeft_interop.get_peft_model(KINDS[kind][2].from_pretrained(folder), jpeft.LoraConfig(**fields))
    return Pair(kind, folder, theirs, ours)


def copied(pair: Pair, adapter_name: str = "default") -> Pair:
    """With random values in PEFT's adapter, and the same ones in ours."""
    randomise(pair.theirs, 5, only_adapters=True)
    state = {k: v.numpy() for k, v in peft.get_peft_model_state_dict(pair.theirs, adapter_name=adapter_name).items()}
    jpeft_interop.set_peft_model_state_dict(pair.ours, state, adapter_name)
    return pair


def their_logits(model: Any) -> np.ndarray:
    with torch.no_grad():
        return model(input_ids=torch.tensor(IDS)).logits.numpy()


def assert_same_logits(ours: Any, theirs: np.ndarray) -> None:
    ours = np.asarray(ours.logits)
    assert np.abs(ours - theirs).max() <= TOLERANCE * np.abs(theirs).max()


# ---- defaults -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", TARGETS)
def test_default_targets_are_those_of_peft(method):
    constants = importlib.import_module("peft.utils.constants")
    name = {"LN_TUNING": "LNTUNING"}.get(method, method)
    table = getattr(constants, f"TRANSFORMERS_MODELS_TO_{name}_TARGET_MODULES_MAPPING")
    assert {model_type: value if isinstance(value, str) else tuple(value) for model_type, value in table.items()} == (
        TARGETS[method]
    )


def test_default_feedforward_modules_are_those_of_peft():
    table = importlib.import_module("peft.utils.constants").TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING
    assert {model_type: tuple(names) for model_type, names in table.items()} == FEEDFORWARD


def selecting() -> dict[Any, Any]:
    """The config classes of methods that select modules; rows of tables train in the input embedding."""
    apart = {jpeft.PeftType.TRAINABLE_TOKENS, *(row.built().peft_type for row in BESIDE)}
    return {kind: own for kind, own in config_classes().items() if kind not in apart}


def test_every_table_of_peft_and_every_method_here_is_known():
    constants = importlib.import_module("peft.utils.constants")
    ending = "_TARGET_MODULES_MAPPING"
    tables = {name.removesuffix(ending).rpartition("_TO_")[2] for name in vars(constants) if name.endswith(ending)}
    assert {"LN_TUNING" if name == "LNTUNING" else name for name in tables} == TARGETS.keys()
    assert {str(kind) for kind in selecting()} <= TARGETS.keys()


@pytest.mark.parametrize("model_type", ["llama", "mt5", "gpt_neox", "nothing known"])
def test_every_method_here_gets_the_defaults_of_peft(model_type):
    """As the tuner's own class chooses them, and refuses."""
    for kind, own in selecting().items():
        tuner = peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING[peft.PeftType(kind.value)]
        # PEFT's class looks into tables and the config, and no further.
        bare, asked = object.__new__(tuner), peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(kind.value)]
        asked = asked(total_step=1) if kind == jpeft.PeftType.ADALORA else asked()
        settings = {"total_step": 1} if kind == jpeft.PeftType.ADALORA else {}
        try:
            theirs = bare._prepare_adapter_config(asked, {"model_type": model_type})
        except ValueError:
            with pytest.raises(ValueError, match=f"target_modules is None and model_type is '{model_type}'"):
                with_default_targets(own(**settings), model_type)
            continue
        ours = with_default_targets(own(**settings), model_type)
        for name in ("target_modules", "feedforward_modules"):
            expected, found = getattr(theirs, name, None), getattr(ours, name, None)
            as_set = lambda value: value if isinstance(value, str) or value is None else set(value)  # noqa: E731
            assert as_set(found) == as_set(expected), (kind, name)


def family_configs() -> dict[str, Any]:
    """The first tiny config of each family that PEFT has defaults for."""
    folder, found = Path(__file__).parent / "models", {}
    for file in sorted(folder.glob("cases_*.py")):
        for case in importlib.import_module(f"tests.interop.models.{file.stem}").CASES:
            config = case.config()
            if config.model_type in TARGETS["LORA"]:
                found.setdefault(config.model_type, (config, case.tasks[0]))
    return found


FAMILY_CONFIGS = family_configs()


def test_every_family_with_defaults_is_compared():
    wanted = set(
        "bart t5 mt5 gpt2 bloom opt gpt_neox bert roberta xlm-roberta deberta-v2 llama mistral mixtral gemma gemma2 "
        "gemma3_text qwen2 qwen3".split()
    )
    assert set(FAMILY_CONFIGS) == wanted == set(models.FAMILIES) & set(TARGETS["LORA"])


@pytest.mark.parametrize("model_type", sorted(FAMILY_CONFIGS))
def test_defaults_adapt_the_same_modules(model_type):
    config, task = FAMILY_CONFIGS[model_type]
    base = AutoModel(task).from_config(json.loads(config.to_json_string(use_diff=False)), abstract=True)
    ours = jpeft_interop.get_peft_model(base, jpeft.LoraConfig(r=2))
    # With transformers 5 PEFT loses its own default for Mixtral, and then finds no target.
    targets = {"mixtral": ["q_proj", "v_proj"]}.get(model_type)
    theirs = peft.get_peft_model(
        getattr(transformers, base.blueprint.architecture.name)(config),
        peft.LoraConfig(r=2, target_modules=targets, fan_in_fan_out=model_type == "gpt2"),
    )
    assert sorted(ours.params.adapters["default"].sites) == sorted(theirs.base_model.targeted_module_names)
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    assert set(ours.active_peft_config.target_modules) == set(theirs.active_peft_config.target_modules)


@pytest.mark.parametrize("model_type", sorted(models.FAMILIES))
def test_the_module_of_the_class_in_transformers(model_type):
    family = models.FAMILIES[model_type]
    library = importlib.import_module(
        base_model(
            AutoModel(next(iter(family.architectures))).from_config({"model_type": model_type}, abstract=True)
        ).library
    )
    assert all(hasattr(library, architecture.name) for architecture in family.architectures.values())


# ---- what is printed and told ---------------------------------------------------------------------------------------

FIELDS = {
    "plain": {},
    "bias": {"bias": "all"},
    "lora_only": {"bias": "lora_only"},
    "saved": {"modules_to_save": ["embed_tokens", "word_embeddings"]},
    "inference": {"inference_mode": True},
    "all-linear": {"target_modules": "all-linear"},
    "embedding": {"target_modules": ["embed_tokens", "word_embeddings", "v_proj", "value"]},
    "tokens": {"trainable_token_indices": [1, 5]},
}


def statuses(model: Any) -> Any:
    return sorted(
        (dataclasses.asdict(status) for status in model.get_layer_status()), key=lambda status: status["name"]
    )


@pytest.mark.parametrize("fields", FIELDS)
@pytest.mark.parametrize("kind", KINDS)
def test_numbers_and_statuses(folders, kind, fields, capsys):
    with no_idle_names():
        both = pair(kind, folders[kind], **FIELDS[fields])
    for model in (both.theirs, both.ours):
        model.print_trainable_parameters()
    theirs, ours = capsys.readouterr().out.splitlines()
    assert ours == theirs
    assert statuses(both.ours) == statuses(both.theirs)
    assert dataclasses.asdict(both.ours.get_model_status()) == dataclasses.asdict(both.theirs.get_model_status())


@contextlib.contextmanager
def no_idle_names():
    """The names of both kinds of models are given to each; that some mean nothing is not what is tested."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(match no module|names no module).*")
        yield


STEPS = {
    "another": lambda model, config: model.add_adapter("other", config),
    "used": lambda model, config: model.set_adapter("other"),
    "for inference": lambda model, config: model.set_adapter("default", inference_mode=True),
    "frozen": lambda model, config: model.set_requires_grad("default", False),
    "merged": lambda model, config: model.merge_adapter(),
    "unmerged": lambda model, config: model.unmerge_adapter(),
}


@pytest.mark.filterwarnings("ignore:Already unmerged")  # PEFT says so of each layer that only the other adapter has.
def test_statuses_through_a_life(folders):
    both = pair("llama", folders["llama"])
    configs = {both.theirs: peft.LoraConfig, both.ours: jpeft.LoraConfig}
    for step, act in STEPS.items():
        for model, config in configs.items():
            act(model, config(task_type="CAUSAL_LM", r=2, target_modules=["up_proj", "q_proj"]))
        assert statuses(both.ours) == statuses(both.theirs), step
        ours, theirs = (dataclasses.asdict(model.get_model_status()) for model in (both.ours, both.theirs))
        assert ours == theirs, step
    for model in configs:
        model.delete_adapter("other")
    # PEFT keeps the layers that the deleted adapter alone had, empty.
    assert statuses(both.ours) == [status for status in statuses(both.theirs) if status["available_adapters"]]
    both = pair("llama", folders["llama"])
    with both.theirs.disable_adapter(), both.ours.disable_adapter():
        assert statuses(both.ours) == statuses(both.theirs)
        assert both.ours.get_nb_trainable_parameters() == both.theirs.get_nb_trainable_parameters()


def test_the_fields_of_a_status():
    for name in ("TunerLayerStatus", "TunerModelStatus"):
        theirs = getattr(importlib.import_module("peft.peft_model"), name)
        assert [field.name for field in dataclasses.fields(getattr(jpeft_interop, name))] == [
            field.name for field in dataclasses.fields(theirs)
        ]


# ---- state dicts and files ------------------------------------------------------------------------------------------

SAVED = {name: FIELDS[name] for name in ("plain", "bias", "saved", "all-linear")}


@pytest.mark.parametrize("fields", SAVED)
@pytest.mark.parametrize("kind", KINDS)
def test_state_dicts_both_ways(folders, kind, fields):
    with no_idle_names():
        both = copied(pair(kind, folders[kind], **SAVED[fields]))
    ours = jpeft_interop.get_peft_model_state_dict(both.ours)
    theirs = peft.get_peft_model_state_dict(both.theirs)
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[key], theirs[key].numpy()) for key in ours)
    assert_same_logits(both.ours(input_ids=IDS), their_logits(both.theirs))
    changed = {key: torch.tensor(tensor + 0.01) for key, tensor in ours.items()}
    own = peft.set_peft_model_state_dict(both.theirs, theirs).unexpected_keys  # Its head's bias, of which it has two.
    assert peft.set_peft_model_state_dict(both.theirs, changed).unexpected_keys == own
    jpeft_interop.set_peft_model_state_dict(both.ours, changed)
    assert_same_logits(both.ours(input_ids=IDS), their_logits(both.theirs))


@pytest.mark.parametrize("kind", KINDS)
def test_files_are_the_same(folders, kind, tmp_path):
    both = copied(pair(kind, folders[kind], lora_alpha=12))
    both.theirs.save_pretrained(tmp_path / "theirs")
    both.ours.save_pretrained(tmp_path / "ours")
    written = [load_file(tmp_path / side / WEIGHTS) for side in ("theirs", "ours")]
    assert written[0].keys() == written[1].keys()
    assert all(np.array_equal(written[0][key], written[1][key]) for key in written[0])
    configs = [json.loads((tmp_path / side / CONFIG).read_text()) for side in ("theirs", "ours")]
    for config in configs:
        config["target_modules"] = sorted(config["target_modules"])
    assert configs[0] == configs[1]
    cards = [
        peft.peft_model.ModelCard.load(tmp_path / side / "README.md").data.to_dict() for side in ("theirs", "ours")
    ]
    assert cards[0] == cards[1]


@pytest.mark.parametrize("kind", KINDS)
def test_auto_models_read_what_peft_wrote(folders, kind, tmp_path):
    both = copied(pair(kind, folders[kind]))
    both.theirs.save_pretrained(tmp_path)
    auto = getattr(jpeft_interop, f"AutoPeftModelFor{KINDS[kind][2].task.title().replace('-', '').replace('Lm', 'LM')}")
    model = auto.from_pretrained(tmp_path, scan_layers=kind == "llama")
    assert type(model).__name__ == type(both.theirs).__name__
    assert_same_logits(model(input_ids=IDS), their_logits(both.theirs))
    assert model.get_nb_trainable_parameters()[0] == 0


def test_auto_model_without_a_task(folders, tmp_path):
    both = copied(pair("llama", folders["llama"], task_type=None))
    both.theirs.save_pretrained(tmp_path / "theirs")
    both.ours.save_pretrained(tmp_path / "ours")
    mappings = [json.loads((tmp_path / side / CONFIG).read_text())["auto_mapping"] for side in ("theirs", "ours")]
    assert mappings[0] == mappings[1]
    model = jpeft_interop.AutoPeftModel.from_pretrained(tmp_path / "theirs")
    assert type(model) is jpeft_interop.PeftModel
    assert_same_logits(model(input_ids=IDS), their_logits(both.theirs))
    theirs = peft.AutoPeftModel.from_pretrained(tmp_path / "ours")
    assert_same_logits(model(input_ids=IDS), their_logits(theirs.eval()))


def test_peft_reads_what_is_saved(folders, tmp_path):
    both = copied(pair("bert", folders["bert"]))
    both.ours.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(their_base("bert", folders["bert"]), tmp_path)
    assert_same_logits(both.ours(input_ids=IDS), their_logits(theirs))


# ---- outputs --------------------------------------------------------------------------------------------------------


def test_generate_as_peft_does(folders):
    both = copied(pair("llama", folders["llama"]))
    theirs = both.theirs.generate(input_ids=torch.tensor(IDS), max_new_tokens=5, do_sample=False, eos_token_id=None)
    ours = both.ours.generate(input_ids=IDS, max_new_tokens=5, eos_token_id=[])
    assert np.array_equal(np.asarray(ours.sequences), theirs.numpy())


def test_outputs_of_several_merged_and_disabled(folders):
    both = copied(pair("llama", folders["llama"]))
    configs = {both.theirs: peft.LoraConfig, both.ours: jpeft.LoraConfig}
    for model, config in configs.items():
        model.add_adapter("other", config(task_type="CAUSAL_LM", r=3, target_modules=["up_proj"]))
    both.theirs.set_requires_grad("other")
    copied(both, "other")
    jpeft_interop.set_peft_model_state_dict(
        both.ours, {k: v.numpy() for k, v in peft.get_peft_model_state_dict(both.theirs).items()}
    )
    for names in ("default", "other", ["default", "other"]):
        both.theirs.base_model.set_adapter(names)
        both.ours.set_adapter(names)
        assert_same_logits(both.ours(input_ids=IDS), their_logits(both.theirs))
    with both.theirs.disable_adapter(), both.ours.disable_adapter():
        assert_same_logits(both.ours(input_ids=IDS), their_logits(both.theirs))
    both.theirs.merge_adapter()
    both.ours.merge_adapter()
    assert_same_logits(both.ours(input_ids=IDS), their_logits(both.theirs))
    both.theirs.unmerge_adapter()
    both.ours.unmerge_adapter()
    assert_same_logits(both.ours(input_ids=IDS), their_logits(both.theirs))
    merged = both.ours.merge_and_unload()
    theirs = both.theirs.merge_and_unload()
    assert_same_logits(jax.jit(merged.apply)(merged.params, input_ids=IDS), their_logits(theirs))


def test_tensors_of_pytorch_are_refused(folders):
    model = jpeft_interop.get_peft_model(KINDS["llama"][2].from_pretrained(folders["llama"]), jpeft.LoraConfig())
    with pytest.raises(TypeError, match="argument 'input_ids' is a PyTorch tensor; give its numbers"):
        model(input_ids=torch.tensor(IDS))
