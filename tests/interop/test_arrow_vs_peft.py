"""Arrow against PyTorch PEFT: the same outputs from the same adapters' files, and the router's own files."""

import copy
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

import jpeft  # noqa: E402
import jpeft_interop  # noqa: E402
from jpeft_interop import create_arrow_model, load_adapter, load_pretrained, save_pretrained, verify  # noqa: E402
from jpeft_interop._arrow import _source  # noqa: E402
from jpeft_interop.models import FlaxAutoModelForCausalLM  # noqa: E402
from tests.interop.test_round_trip import CONFIG, WEIGHTS, quietly, randomise, twins  # noqa: E402

ArrowLoraLinearLayer = peft.tuners.lora.arrow.ArrowLoraLinearLayer
TARGETS = ["q_proj", "down_proj"]
ROUTER = "arrow_router"


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return twins("llama", tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def folders(pair, tmp_path_factory):
    """Random adapters of PEFT's, the last two of them general; each with an alpha of its own."""
    found = []
    for index in range(6):
        config = peft.LoraConfig(r=3, lora_alpha=index + 1, target_modules=TARGETS, use_rslora=index == 1)
        model = peft.get_peft_model(copy.deepcopy(pair.torch_model), config)
        randomise(model, 10 + index, only_trainable=True)
        found.append(str(tmp_path_factory.mktemp(f"adapter_{index}")))
        quietly(model.save_pretrained, found[-1])
    return found


@pytest.fixture(autouse=True)
def converged(monkeypatch):
    """PEFT's iteration run to its end, as random adapters have no direction that stands out."""
    monkeypatch.setattr(ArrowLoraLinearLayer.top_right_singular_vec_from_BA, "__defaults__", (3000, 1e-30))


def in_torch(pair, folders, general=None, **settings):
    config = peft.ArrowConfig(use_gks=general is not None, rng_seed=0, **settings)
    return quietly(peft.create_arrow_model, copy.deepcopy(pair.torch_model), folders, config, general).eval()


def base_of(pair):
    return (pair.apply, pair.params)


def in_jax(pair, folders, general=None, **settings):
    config = jpeft.ArrowConfig(use_gks=general is not None, **settings)
    return create_arrow_model(base_of(pair), folders, config, general)


def assert_same(found, expected, rate=1e-4):
    np.testing.assert_allclose(found, expected, rtol=rate, atol=rate)


CASES = {
    "two of four": ({"top_k": 2}, 0),
    "one": ({"top_k": 1}, 0),
    "all, sharp": ({"top_k": 4, "router_temperature": 0.1}, 0),
    "three, flat": ({"top_k": 3, "router_temperature": 5.0}, 0),
    "general knowledge": ({"top_k": 2, "router_temperature": 0.5}, 1),
    "of two": ({"top_k": 3}, 2),
}


@pytest.mark.parametrize(("settings", "generals"), CASES.values(), ids=CASES)
def test_the_outputs(pair, folders, settings, generals):
    general = folders[4 : 4 + generals] or None
    expected = pair.torch_output(in_torch(pair, folders[:4], general, **settings))
    model = in_jax(pair, folders[:4], general, **settings)
    assert_same(model(*pair.inputs), expected)
    assert not np.allclose(expected, pair.torch_output(pair.torch_model), rtol=0.05, atol=0.05)
    names = [f"task_{index}" for index in range(4)] + [f"gks_{index}" for index in range(generals)]
    assert (list(model.peft_config), model.active_adapter) == ([*names, ROUTER], ROUTER)


def test_pefts_few_steps_of_iteration_find_a_direction_that_stands_out(pair, folders, monkeypatch, tmp_path):
    monkeypatch.setattr(ArrowLoraLinearLayer.top_right_singular_vec_from_BA, "__defaults__", (15, 1e-8))
    names = []
    for index in range(3):
        wrapped = load_pretrained(pair.params, folders[index])
        weights = wrapped.adapters["default"].weights
        scale = jnp.array([3.0, 0.5, 0.25])
        for arrays in weights.values():
            arrays["lora_A"] = arrays["lora_A"] * scale[:, None]
        names.append(str(tmp_path / str(index)))
        save_pretrained(wrapped, names[-1])
    expected = pair.torch_output(in_torch(pair, names, top_k=2))
    assert_same(in_jax(pair, names, top_k=2)(*pair.inputs), expected)


def test_what_pytorch_wrote_computes_the_same_and_is_written_back(pair, folders, tmp_path):
    model = in_torch(pair, folders[:3], folders[4:5], top_k=2)
    quietly(model.save_pretrained, tmp_path / "theirs")  # before it runs, which changes its adapters
    expected = pair.torch_output(model)
    wrapped = load_pretrained(pair.params, tmp_path / "theirs" / "task_0", adapter_name="task_0")
    for name in ("task_1", "task_2", "gks_0", ROUTER):
        wrapped = load_adapter(wrapped, tmp_path / "theirs" / name, name)
    wrapped = jpeft.set_adapter(wrapped, ROUTER)
    assert_same(jax.jit(jpeft.lift(pair.apply))(wrapped, *pair.inputs), expected)

    save_pretrained(wrapped, tmp_path / "ours")
    for name in wrapped.adapters:
        theirs, ours = (tmp_path / side / name for side in ("theirs", "ours"))
        assert (theirs / WEIGHTS).read_bytes() == (ours / WEIGHTS).read_bytes()
        first, second = (json.loads((folder / CONFIG).read_text()) for folder in (theirs, ours))
        assert {**first, "target_modules": sorted(first["target_modules"])} == {
            **second,
            "target_modules": sorted(second["target_modules"]),
        }


def test_the_router_is_saved_and_loaded(pair, folders, tmp_path):
    model = in_jax(pair, folders[:3], folders[4:], top_k=2, router_temperature=0.5)
    expected = model(*pair.inputs)
    model.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == sorted(model.peft_config)
    keys = load_file(tmp_path / ROUTER / WEIGHTS)
    assert {key.rpartition(".lora_")[2] for key in keys} == {"A.weight", "B.weight"} and len(keys) == 8
    assert json.loads((tmp_path / ROUTER / CONFIG).read_text())["arrow_config"] == {
        "top_k": 2,
        "router_temperature": 0.5,
        "use_gks": True,
        "task_adapter_names": ["task_0", "task_1", "task_2"],
        "gks_adapter_names": ["gks_0", "gks_1"],
        "rng_seed": None,
    }
    assert verify(tmp_path / ROUTER).modules == 4
    again = jpeft_interop.PeftModel.from_pretrained(base_of(pair), tmp_path / "task_0", adapter_name="task_0")
    for name in ("task_1", "task_2", "gks_0", "gks_1", ROUTER):
        again.load_adapter(tmp_path / name, name)
    again.set_adapter(ROUTER)
    assert_same(again(*pair.inputs), expected, 1e-6)
    assert again.peft_config[ROUTER].arrow_config == model.peft_config[ROUTER].arrow_config


def test_pytorch_computes_the_same_by_a_router_written_here(pair, folders, tmp_path):
    """PEFT forgets the names of a router's adapters when it reads its config, its own too; with them it goes on."""
    model = in_jax(pair, folders[:3], top_k=2)
    model.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(pair.torch_model), tmp_path / "task_0", "task_0")
    for name in ("task_1", "task_2"):
        theirs.load_adapter(tmp_path / name, name)
    config = peft.PeftConfig.from_pretrained(tmp_path / ROUTER)
    assert config.arrow_config.task_adapter_names is None
    config.arrow_config.task_adapter_names = ["task_0", "task_1", "task_2"]
    theirs.add_adapter(ROUTER, config)
    result = peft.set_peft_model_state_dict(theirs, peft.utils.load_peft_weights(tmp_path / ROUTER), ROUTER)
    assert not result.unexpected_keys
    theirs.set_adapter(ROUTER)
    assert_same(model(*pair.inputs), pair.torch_output(theirs.eval()))


def test_nothing_of_a_router_trains_there_either(pair, folders):
    """PEFT marks the router's own factors, which no output depends on."""
    model = in_torch(pair, folders[:2], top_k=1)
    assert {name.split(".")[-2] for name, p in model.named_parameters() if p.requires_grad} == {ROUTER}
    assert not model(input_ids=torch.ones((1, 3), dtype=torch.int64)).logits.requires_grad
    assert in_jax(pair, folders[:2], top_k=1).get_nb_trainable_parameters()[0] == 0


def test_a_model_generates(pair, folders, tmp_path):
    pair.torch_model.save_pretrained(tmp_path)
    model = create_arrow_model(FlaxAutoModelForCausalLM.from_pretrained(tmp_path), folders[:3], jpeft.ArrowConfig())
    ids = np.arange(1, 6)[None]
    found = model.generate(input_ids=ids, max_new_tokens=4)
    theirs = in_torch(pair, folders[:3])
    with torch.no_grad():
        expected = theirs.generate(input_ids=torch.tensor(ids), max_new_tokens=4, do_sample=False)
    np.testing.assert_array_equal(np.asarray(getattr(found, "sequences", found)), expected)


def test_layers_in_stacks(folders, pair, tmp_path):
    pair.torch_model.save_pretrained(tmp_path)
    outputs = []
    for scan in (False, True):
        base = FlaxAutoModelForCausalLM.from_pretrained(tmp_path, scan_layers=scan)
        config = jpeft.ArrowConfig(top_k=2, use_gks=True)
        model = create_arrow_model(base, folders[:3], config, folders[4:])
        outputs.append(model(input_ids=np.arange(1, 6)[None]).logits)
    assert "model.layers.0:2.mlp.down_proj" in model.params.adapters[ROUTER].sites
    assert_same(outputs[1], outputs[0], 1e-5)
    model.save_pretrained(tmp_path / "stacked")
    again = load_pretrained(pair.params, tmp_path / "stacked" / "task_0", adapter_name="task_0")
    for name in ("task_1", "task_2", "gks_0", "gks_1", ROUTER):
        again = load_adapter(again, tmp_path / "stacked" / name, name)
    shapes = {
        name: array.shape for name, array in again.adapters[ROUTER].weights["model.layers.1.mlp.down_proj"].items()
    }
    assert shapes["arrow_prototypes"] == (3, 24) and shapes["arrow_B"] == (3, 16, 3)


# ---- what is refused ------------------------------------------------------------------------------------------------


def test_a_router_before_its_adapters(pair, folders, tmp_path):
    in_jax(pair, folders[:2], top_k=1).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"chooses among the adapters \['task_0', 'task_1'\], but the parameters have"):
        load_pretrained(pair.params, tmp_path / ROUTER)
    wrapped = load_pretrained(pair.params, tmp_path / "task_0", adapter_name="task_0")
    with pytest.raises(ValueError, match=r"but the parameters have \['task_0'\]; expected all of them"):
        load_adapter(wrapped, tmp_path / ROUTER, ROUTER)


def test_it_cannot_be_merged(pair, folders):
    model = in_jax(pair, folders[:2], top_k=1)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="the Arrow router at '.*_proj' .* no merged weight stands for it"):
            merge()
    with pytest.raises(ValueError, match=r"a router has no values of its own"):
        jpeft_interop.set_peft_model_state_dict(model, jpeft_interop.get_peft_model_state_dict(model, ROUTER), ROUTER)
    with pytest.raises(ValueError, match=r"a router has no values of its own"):
        model.add_adapter("more", jpeft.LoraConfig(target_modules=TARGETS, arrow_config=jpeft.ArrowConfig()))


@pytest.mark.parametrize("paths", [[], None, "adapter"])
def test_paths_are_a_list(pair, paths):
    with pytest.raises(
        ValueError, match=f"task_specific_adapter_paths is {paths!r}".replace("[", r"\[") + "; expected a"
    ):
        create_arrow_model(base_of(pair), paths, jpeft.ArrowConfig())


def test_general_adapters_without_their_use(pair, folders):
    with pytest.warns(UserWarning, match="general_adapter_paths are .* but use_gks of the ArrowConfig is False"):
        model = create_arrow_model(base_of(pair), folders[:2], jpeft.ArrowConfig(top_k=1), folders[4:])
    assert list(model.peft_config) == ["task_0", "task_1", ROUTER]
    with pytest.raises(ValueError, match="use_gks is True and general_adapter_names is .*; expected general adapters"):
        create_arrow_model(base_of(pair), folders[:2], jpeft.ArrowConfig(top_k=1, use_gks=True))


def test_what_a_path_means(tmp_path):
    assert _source("owner/name", {}) == {"model_id": "owner/name"}
    assert _source("name", {"revision": "v1"}) == {"model_id": "name", "revision": "v1"}
    assert _source("owner/name/a/b", {}) == {"model_id": "owner/name", "subfolder": "a/b"}
    assert _source("owner/name/a", {"subfolder": "c"}) == {"model_id": "owner/name", "subfolder": "c"}
    assert _source(str(tmp_path), {}) == {"model_id": str(tmp_path)}
    assert _source("/no/such/folder", {}) == {"model_id": "/no/such/folder"}
