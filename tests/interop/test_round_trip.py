"""PyTorch PEFT and `jpeft_interop` read each other's files: the same keys, the same bytes, the same outputs."""

import copy
import dataclasses
import functools
import json
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

import jpeft
from jpeft_interop import load_adapter, load_pretrained, save_pretrained, verify
from jpeft_interop.models import (
    FlaxAutoModelForCausalLM,
    FlaxAutoModelForMaskedLM,
    FlaxAutoModelForSequenceClassification,
)
from tests.harness import with_derived

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
TOLERANCE = 1e-4

SIZES = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
TINY = {**SIZES, "intermediate_size": 24, "max_position_embeddings": 32}


# ---- models ---------------------------------------------------------------------------------------------------------


class Convolutions(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = torch.nn.Conv1d(3, 6, 3)
        self.conv2 = torch.nn.Conv2d(1, 5, (2, 3), padding=(0, 1))
        self.head = torch.nn.Linear(6, 4)

    def forward(self, x):
        x = torch.tanh(self.conv2(torch.tanh(self.conv1(x)).unsqueeze(1)))
        return self.head(x.mean(-1).mean(1).repeat(1, 2)[:, :6])


class FlaxConvolutions(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.conv1 = nnx.Conv(3, 6, (3,), padding="VALID", rngs=rngs)
        self.conv2 = nnx.Conv(1, 5, (2, 3), padding=((0, 0), (1, 1)), rngs=rngs)
        self.head = nnx.Linear(6, 4, rngs=rngs)

    def __call__(self, x):
        x = jnp.swapaxes(jnp.tanh(self.conv1(x)), 1, 2)[..., None]
        x = jnp.tanh(self.conv2(x))
        return self.head(jnp.tile(x.mean(2).mean(2), (1, 2))[:, :6])


@dataclasses.dataclass(frozen=True)
class Twins:
    """One model twice, with the same random weights: the PyTorch one, and params and apply of the Flax one."""

    torch_model: Any
    params: Any
    apply: Any
    torch_output: Any
    inputs: tuple[Any, ...]
    layouts: dict[str, str] = dataclasses.field(default_factory=dict)


def randomise(model: Any, seed: int, only_trainable: bool = False) -> Any:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad or not only_trainable:
                centre = 1.0 if "norm" in name.lower() and name.endswith("weight") else 0.0
                parameter.copy_(centre + 0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def language_twins(folder: Path, torch_class: str, config: Any, auto: Any) -> Twins:
    model = randomise(getattr(transformers, torch_class)(config), 0)
    model.save_pretrained(folder)
    flax_model = auto.from_pretrained(folder)
    ids = np.random.default_rng(0).integers(1, TINY["vocab_size"], (2, 7))
    mask = np.ones_like(ids)
    mask[1, 5:] = 0

    def torch_output(model: Any) -> np.ndarray:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask)).logits
        return kept(logits.numpy())

    def apply(params: Any, ids: Any, mask: Any) -> Any:
        return flax_model.apply(params, input_ids=ids, attention_mask=mask).logits

    def kept(logits: np.ndarray) -> np.ndarray:
        return logits if logits.ndim == 2 else logits[mask != 0]

    def masked(params: Any, ids: Any, mask_: Any) -> Any:
        logits = apply(params, ids, mask_)
        return logits if logits.ndim == 2 else logits[np.nonzero(mask)]

    return Twins(model, flax_model.params, masked, torch_output, (jnp.asarray(ids), jnp.asarray(mask)))


@functools.cache
def twins(kind: str, root: Path) -> Twins:
    folder = root / kind
    if kind.startswith("llama"):
        config = transformers.LlamaConfig(**TINY, num_key_value_heads=1, tie_word_embeddings=kind == "llama-tied")
        return language_twins(folder, "LlamaForCausalLM", config, FlaxAutoModelForCausalLM)
    if kind == "bert":
        config = transformers.BertConfig(**TINY, num_labels=3)
        return language_twins(folder, "BertForSequenceClassification", config, FlaxAutoModelForSequenceClassification)
    if kind == "bert-mlm":
        return language_twins(folder, "BertForMaskedLM", transformers.BertConfig(**TINY), FlaxAutoModelForMaskedLM)
    model = randomise(Convolutions(), 0)
    params = {name: {} for name in ("conv1", "conv2", "head")}
    for key, tensor in model.state_dict().items():
        module, name = key.split(".")
        array = jnp.asarray(tensor.numpy())
        axes = (*range(2, array.ndim), 1, 0)
        params[module]["kernel" if name == "weight" else name] = array.transpose(axes) if name == "weight" else array
    graph, _ = nnx.split(FlaxConvolutions())
    x = np.random.default_rng(0).normal(size=(2, 3, 9)).astype(np.float32)

    def torch_output(model: Any) -> np.ndarray:
        with torch.no_grad():
            return model(torch.tensor(x)).numpy()

    def apply(params: Any, x: Any) -> Any:
        return nnx.merge(graph, params)(x)

    inputs = (jnp.asarray(x.swapaxes(1, 2)),)
    return Twins(model, params, apply, torch_output, inputs, {"conv1": ".io"})


@pytest.fixture(scope="session")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("models")


# ---- the options ----------------------------------------------------------------------------------------------------

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "list": ("llama", {"target_modules": ["q_proj", "v_proj"]}),
    "r and alpha": ("llama", {"r": 3, "lora_alpha": 7, "target_modules": ["k_proj", "down_proj"]}),
    "causal-lm": ("llama", {"target_modules": ["o_proj"], "task_type": "CAUSAL_LM"}),
    "rslora": ("llama", {"r": 4, "lora_alpha": 2, "use_rslora": True, "target_modules": ["q_proj"]}),
    "regex": ("llama", {"target_modules": r".*layers\.1\..*(q|k)_proj"}),
    "all-linear": ("llama", {"target_modules": "all-linear"}),
    "all-linear bert": ("bert", {"target_modules": "all-linear", "task_type": "SEQ_CLS"}),
    "all-linear bert, no task": ("bert", {"target_modules": "all-linear"}),
    "exclude list": (
        "llama",
        {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["layers.0.self_attn.q_proj"]},
    ),
    "exclude regex": ("llama", {"target_modules": "all-linear", "exclude_modules": r".*mlp.*"}),
    "one layer": ("llama", {"target_modules": ["q_proj"], "layers_to_transform": 1}),
    "layers and pattern": (
        "bert",
        {"target_modules": ["query", "dense"], "layers_to_transform": [0], "layers_pattern": "layer"},
    ),
    "rank_pattern": (
        "llama",
        {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {r"layers\.1\.self_attn\.q_proj": 5, "v_proj": 2}},
    ),
    "alpha_pattern": (
        "llama",
        {"target_modules": ["q_proj", "v_proj"], "alpha_pattern": {r"layers\.\d\.self_attn\.q_proj": 32}},
    ),
    "init False": ("llama", {"target_modules": ["q_proj"], "init_lora_weights": False}),
    "init gaussian": ("llama", {"target_modules": ["q_proj"], "init_lora_weights": "gaussian"}),
    "init orthogonal": ("llama", {"r": 4, "target_modules": ["q_proj"], "init_lora_weights": "orthogonal"}),
    "dropout": ("llama", {"target_modules": ["q_proj"], "lora_dropout": 0.1}),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "embedding and head": ("llama", {"target_modules": ["embed_tokens", "lm_head"]}),
    "embedding by regex": ("llama", {"target_modules": r".*(embed_tokens|q_proj)"}),
    "embedding by path": ("llama", {"target_modules": ["model.embed_tokens"]}),
    "embedding bert": ("bert", {"target_modules": ["word_embeddings", "position_embeddings"]}),
    "tied": ("llama-tied", {"target_modules": ["q_proj", "down_proj"]}),
    "modules_to_save": (
        "llama",
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm", "embed_tokens"]},
    ),
    "modules_to_save over targets": (
        "bert",
        {"target_modules": ["query", "dense"], "modules_to_save": ["pooler", "classifier"]},
    ),
    "sequence classification": ("bert", {"target_modules": ["query", "value"], "task_type": "SEQ_CLS"}),
    "bias all": ("bert", {"target_modules": ["query"], "bias": "all"}),
    "bias lora_only": ("bert", {"target_modules": ["query", "dense"], "bias": "lora_only"}),
    "bias all, task": ("bert", {"target_modules": ["query"], "bias": "all", "task_type": "SEQ_CLS"}),
    "bias all, modules_to_save": ("bert", {"target_modules": ["key"], "bias": "all", "modules_to_save": ["pooler"]}),
    "bias lora_only, task": ("bert", {"target_modules": ["value"], "bias": "lora_only", "task_type": "SEQ_CLS"}),
    "bias all, masked": ("bert-mlm", {"target_modules": ["query"], "bias": "all"}),
    "conv": ("conv", {"target_modules": ["conv1", "conv2"]}),
    "conv bias": ("conv", {"target_modules": ["conv1"], "bias": "all", "modules_to_save": ["conv2"]}),
    "conv saved": ("conv", {"target_modules": ["head"], "modules_to_save": ["conv1", "conv2"]}),
    "conv rslora": ("conv", {"r": 3, "target_modules": ["conv2", "head"], "use_rslora": True, "bias": "lora_only"}),
}


@pytest.fixture(params=CASES)
def case(request, root) -> tuple[Twins, dict[str, Any]]:
    kind, settings = CASES[request.param]
    return twins(kind, root), settings


def quietly(function: Any, *args: Any, **kwargs: Any) -> Any:
    """PEFT warns of what it does on purpose, such as writing embeddings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*args, **kwargs)


def from_torch(pair: Twins, settings: dict[str, Any], folder: Path) -> Any:
    """Let PyTorch PEFT write an adapter of random values; return its model."""
    model = quietly(peft.get_peft_model, copy.deepcopy(pair.torch_model), peft.LoraConfig(**settings))
    randomise(model, 1, only_trainable=True)
    quietly(model.save_pretrained, folder)
    return model


def from_jax(pair: Twins, settings: dict[str, Any], folder: Path) -> jpeft.PeftParams:
    """Write an adapter of random values here; return the parameters."""
    wrapped = jpeft.wrap(pair.params, jpeft.LoraConfig(**settings), layouts=pair.layouts)
    adapter = wrapped.adapters["default"]
    leaves, structure = jax.tree.flatten((adapter.weights, adapter.replaced))
    drawn = [0.3 * jax.random.normal(jax.random.key(index), leaf.shape) for index, leaf in enumerate(leaves)]
    weights, replaced = jax.tree.unflatten(structure, drawn)
    adapter = dataclasses.replace(adapter, weights=weights, replaced=replaced)
    wrapped = with_derived(dataclasses.replace(wrapped, adapters={"default": adapter}))
    save_pretrained(wrapped, folder, layouts=pair.layouts)
    return wrapped


def assert_same_outputs(pair: Twins, wrapped: jpeft.PeftParams, model: Any) -> None:
    expected, before = pair.torch_output(model.eval()), pair.torch_output(pair.torch_model)
    scale = np.abs(expected).max()
    assert np.abs(expected - before).max() > 1e-2 * scale, "the adapter changes nothing: the test proves nothing"
    lifted = jax.jit(jpeft.lift(pair.apply))(wrapped, *pair.inputs)
    merged = jax.jit(pair.apply)(jpeft.merge(wrapped), *pair.inputs)
    assert np.abs(np.asarray(lifted) - expected).max() <= TOLERANCE * scale
    assert np.abs(np.asarray(merged) - expected).max() <= TOLERANCE * scale


# ---- the tests ------------------------------------------------------------------------------------------------------


def test_from_torch(case, tmp_path):
    """What PyTorch PEFT wrote computes the same here, and is written back with the same bytes and settings."""
    pair, settings = case
    model = from_torch(pair, settings, tmp_path / "theirs")
    wrapped = load_pretrained(pair.params, tmp_path / "theirs", layouts=pair.layouts)
    assert_same_outputs(pair, wrapped, model)
    save_pretrained(wrapped, tmp_path / "ours", layouts=pair.layouts)
    theirs, ours = (load_file(tmp_path / name / WEIGHTS) for name in ("theirs", "ours"))
    assert theirs.keys() == ours.keys()
    for key, tensor in theirs.items():
        assert (tensor.dtype, tensor.shape, tensor.tobytes()) == (ours[key].dtype, ours[key].shape, ours[key].tobytes())
    theirs, ours = (json.loads((tmp_path / name / CONFIG).read_text()) for name in ("theirs", "ours"))
    assert theirs == ours
    assert verify(tmp_path / "ours", pair.torch_model).torch


def test_to_torch(case, tmp_path):
    """What is written here is loaded by PyTorch PEFT: every key, the same settings, the same outputs."""
    pair, settings = case
    wrapped = from_jax(pair, settings, tmp_path)
    model = quietly(peft.PeftModel.from_pretrained, copy.deepcopy(pair.torch_model), tmp_path)
    result = quietly(peft.set_peft_model_state_dict, model, peft.load_peft_weights(str(tmp_path), device="cpu"))
    assert result.unexpected_keys == []
    state = quietly(peft.get_peft_model_state_dict, model)
    # PEFT repeats such biases under a second key, which it does not expect itself when it reads them.
    assert {key for key in state if ".modules_to_save." not in key} == load_file(tmp_path / WEIGHTS).keys()
    assert_same_outputs(pair, wrapped, model)
    report = verify(tmp_path, pair.torch_model)
    assert report.torch and report.modules == len(wrapped.adapters["default"].sites)
    assert_same_settings(settings, tmp_path)


def assert_same_settings(settings: dict[str, Any], folder: Path) -> None:
    theirs, ours = peft.LoraConfig(**settings).to_dict(), peft.PeftConfig.from_pretrained(folder).to_dict()
    # Made more precise when the adapter meets the model, there as here.
    resolved = {"inference_mode"}
    if settings["target_modules"] == "all-linear":
        resolved.add("target_modules")
    if settings.get("task_type") == "SEQ_CLS":
        resolved.add("modules_to_save")
    assert {k: v for k, v in ours.items() if k not in resolved} == {
        k: v for k, v in theirs.items() if k not in resolved
    }


def test_all_linear_means_the_same_modules(root, tmp_path):
    """In a model of many layers PEFT writes a few endings; so does `save_pretrained`, and they are the same."""
    config = transformers.LlamaConfig(**{**TINY, "num_hidden_layers": 4}, num_key_value_heads=1)
    pair = language_twins(root / "deep", "LlamaForCausalLM", config, FlaxAutoModelForCausalLM)
    settings = {"r": 2, "target_modules": "all-linear"}
    from_torch(pair, settings, tmp_path / "theirs")
    from_jax(pair, settings, tmp_path / "ours")
    theirs, ours = (json.loads((tmp_path / name / CONFIG).read_text()) for name in ("theirs", "ours"))
    assert sorted(theirs["target_modules"]) == ours["target_modules"]
    assert load_file(tmp_path / "theirs" / WEIGHTS).keys() == load_file(tmp_path / "ours" / WEIGHTS).keys()


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    ],
    ids=["adapted", "saved in full"],
)
@pytest.mark.filterwarnings("ignore:.*is the output layer too")
def test_an_embedding_that_is_tied(settings, root, tmp_path):
    """The adapter acts on the lookup alone, as in PEFT; no merged tree can say that."""
    pair = twins("llama-tied", root)
    model = from_torch(pair, settings, tmp_path)
    wrapped = load_pretrained(pair.params, tmp_path)
    expected = pair.torch_output(model)
    lifted = np.asarray(jax.jit(jpeft.lift(pair.apply))(wrapped, *pair.inputs))
    assert np.abs(lifted - expected).max() <= TOLERANCE * np.abs(expected).max()
    save_pretrained(wrapped, tmp_path / "ours")
    assert (tmp_path / WEIGHTS).read_bytes() == (tmp_path / "ours" / WEIGHTS).read_bytes()


def test_auto_model(root, tmp_path):
    pair = twins("llama", root)
    settings = {"target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    wrapped = from_jax(pair, settings, tmp_path)
    save_pretrained(wrapped, tmp_path, base_model_name_or_path=str(root / "llama"))
    model = quietly(peft.AutoPeftModelForCausalLM.from_pretrained, str(tmp_path))
    assert_same_outputs(pair, wrapped, model)


def test_several_adapters(root, tmp_path):
    pair = twins("llama", root)
    model = from_torch(pair, {"target_modules": ["q_proj"]}, tmp_path)
    model.add_adapter("other", peft.LoraConfig(r=3, target_modules=["v_proj", "q_proj"]))
    model.set_adapter("other")
    randomise(model, 2, only_trainable=True)
    quietly(model.save_pretrained, tmp_path)
    wrapped = load_adapter(load_pretrained(pair.params, tmp_path), tmp_path / "other", "other")
    assert_same_outputs(pair, jpeft.set_adapter(wrapped, "other"), model)
    save_pretrained(wrapped, tmp_path / "ours")
    for name in (WEIGHTS, f"other/{WEIGHTS}"):
        assert (tmp_path / name).read_bytes() == (tmp_path / "ours" / name).read_bytes()


def test_bfloat16(root, tmp_path):
    pair = twins("llama", root)
    model = from_torch(pair, {"target_modules": ["q_proj"], "modules_to_save": ["norm"]}, tmp_path)
    quietly(model.bfloat16().save_pretrained, tmp_path)
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), pair.params)
    wrapped = load_pretrained(params, tmp_path)
    assert {leaf.dtype for leaf in jax.tree.leaves(wrapped.adapters["default"].weights)} == {jnp.dtype(jnp.bfloat16)}
    save_pretrained(wrapped, tmp_path / "ours")
    assert (tmp_path / WEIGHTS).read_bytes() == (tmp_path / "ours" / WEIGHTS).read_bytes()


def test_a_resized_embedding(root, tmp_path):
    """PEFT writes both embeddings in full when the vocabulary is another one than that of the base's own config."""
    pair = twins("llama", root)
    bigger = copy.deepcopy(pair.torch_model)
    quietly(bigger.resize_token_embeddings, TINY["vocab_size"] + 3)
    bigger.save_pretrained(tmp_path / "bigger")
    resized = FlaxAutoModelForCausalLM.from_pretrained(tmp_path / "bigger")
    config = peft.LoraConfig(target_modules=["q_proj"], base_model_name_or_path=str(root / "llama"))
    model = quietly(peft.get_peft_model, randomise(bigger, 5), config)
    randomise(model, 1, only_trainable=True)
    model.peft_config["default"].base_model_name_or_path = str(root / "llama")
    quietly(model.save_pretrained, tmp_path / "theirs")
    assert "base_model.model.lm_head.weight" in load_file(tmp_path / "theirs" / WEIGHTS)
    wrapped = load_pretrained(resized.params, tmp_path / "theirs")
    assert set(wrapped.adapters["default"].replaced) == {"lm_head.kernel", "model.embed_tokens.embedding"}
    save_pretrained(wrapped, tmp_path / "ours")
    assert (tmp_path / "theirs" / WEIGHTS).read_bytes() == (tmp_path / "ours" / WEIGHTS).read_bytes()
    with pytest.raises(ValueError, match=r"lm_head.weight is \(43, 16\), expected \(40, 16\)"):
        load_pretrained(pair.params, tmp_path / "theirs")


def test_verify_finds_what_pytorch_peft_does_not_report(root, tmp_path):
    from safetensors.numpy import save_file

    pair = twins("llama", root)
    from_jax(pair, {"r": 2, "target_modules": ["q_proj"]}, tmp_path)
    whole = load_file(tmp_path / WEIGHTS)

    def rewritten(tensors: dict[str, np.ndarray]) -> Path:
        save_file(tensors, tmp_path / WEIGHTS, metadata={"format": "pt"})
        return tmp_path

    prefix = "base_model.model.model.layers."
    missing = {key: value for key, value in whole.items() if not key.startswith(f"{prefix}1.")}
    with pytest.raises(
        ValueError, match=r"PyTorch PEFT misses base_model.model.model.layers.1.self_attn.q_proj.lora_A"
    ):
        verify(rewritten(missing), pair.torch_model)
    with pytest.raises(ValueError, match=r"does not expect .*layers.7.self_attn.q_proj"):
        verify(rewritten({**whole, **{k.replace(".1.", ".7."): v for k, v in whole.items()}}), pair.torch_model)
    wrong = {**whole, f"{prefix}0.self_attn.q_proj.lora_A.weight": np.ones((2, 9), np.float32)}
    with pytest.raises(ValueError, match="(?s)PyTorch PEFT cannot load it: RuntimeError: .*size mismatch"):
        verify(rewritten(wrong), pair.torch_model)
    with pytest.raises(ValueError, match="keys that the config does not account for: model.layers.0"):
        verify(rewritten({key.removeprefix("base_model.model."): value for key, value in whole.items()}))
    before = {key: tensor.clone() for key, tensor in pair.torch_model.state_dict().items()}
    assert verify(rewritten(whole), pair.torch_model).torch
    assert all(torch.equal(before[key], tensor) for key, tensor in pair.torch_model.state_dict().items())
