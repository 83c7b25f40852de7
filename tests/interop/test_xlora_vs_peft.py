"""X-LoRA against PyTorch PEFT: logits in every setting, generation, training, and folders, whoever wrote them."""

import copy
import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

import jpeft  # noqa: E402
import jpeft_interop  # noqa: E402
from jpeft._xlora import experts_of  # noqa: E402
from jpeft_interop import load_pretrained, save_pretrained  # noqa: E402
from jpeft_interop.models import (  # noqa: E402
    FlaxAutoModelForCausalLM,
    FlaxAutoModelForSeq2SeqLM,
    FlaxAutoModelForSequenceClassification,
)
from tests.interop.test_round_trip import quietly, randomise  # noqa: E402

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
SIZES = {"vocab_size": 40, "max_position_embeddings": 32, "hidden_size": 16, "intermediate_size": 24,
         "num_hidden_layers": 2, "num_attention_heads": 2}  # fmt: skip
# PEFT refuses a model with a cache, and computes with experts of these names alone.
LLAMA = {**SIZES, "num_key_value_heads": 1, "eos_token_id": 2, "pad_token_id": 1, "use_cache": False}
EXPERTS = {
    "0": {"r": 3, "lora_alpha": 9, "target_modules": ["q_proj", "down_proj"]},
    "1": {"r": 2, "lora_alpha": 5, "target_modules": ["q_proj", "down_proj", "o_proj"]},
    "2": {"r": 1, "use_rslora": True, "target_modules": ["q_proj", "k_proj"]},
}
IDS = np.random.default_rng(0).integers(3, 40, (3, 7))
MASK = np.ones_like(IDS)
IDS[2, :3], MASK[2, :3] = 1, 0
LABELS = np.where(MASK != 0, IDS, -100)
LABELS[2, 3] = -100
TOLERANCE = 1e-4
SETTINGS = {
    "plain": {},
    "deep, by layers": {
        "xlora_depth": 3,
        "xlora_size": 8,
        "layerwise_scalings": True,
        "softmax_temperature": 0.5,
        "global_scaling_weight": 1.7,
    },
    "two of three": {"top_k_lora": 2, "xlora_depth": 2, "xlora_size": 8, "xlora_dropout_p": 0.0},
    "a softmax of two": {"top_k_lora": 2, "enable_softmax": False, "enable_softmax_topk": True},
    "weighed in the first run": {"scaling_pass_value": 0.3, "layerwise_scalings": True, "enable_softmax": False},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of a random base model, and of PEFT's adapters of random values for it."""
    folder = tmp_path_factory.mktemp("xlora")
    base = randomise(transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA)), 0)
    base.save_pretrained(folder / "base")
    for name, settings in EXPERTS.items():
        model = quietly(peft.get_peft_model, copy.deepcopy(base), peft.LoraConfig(task_type="CAUSAL_LM", **settings))
        randomise(model, 10 + int(name), only_trainable=True)
        quietly(model.save_pretrained, folder / f"expert_{name}")
    return folder


def places(folder, names=EXPERTS):
    return {name: str(folder / f"expert_{number}") for number, name in enumerate(names)}


def in_torch(folder, **settings):
    base = transformers.LlamaForCausalLM.from_pretrained(folder / "base")
    config = quietly(
        peft.XLoraConfig, **{"task_type": "CAUSAL_LM", "hidden_size": 16, "adapters": places(folder), **settings}
    )
    model = quietly(peft.get_peft_model, base, config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "xlora_classifier" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def classifier_of(model):
    """PEFT's own names and values, which its files lack some of."""
    state = model.state_dict()
    return {key: tensor.numpy().copy() for key, tensor in state.items() if "xlora_classifier" in key}


def in_jax(folder, theirs=None, names=EXPERTS, *, scan=False, **settings):
    base = FlaxAutoModelForCausalLM.from_pretrained(folder / "base", scan_layers=scan)
    config = jpeft.XLoraConfig(**{"task_type": "CAUSAL_LM", "adapters": places(folder, names), **settings})
    model = jpeft_interop.get_peft_model(base, config)
    return model if theirs is None else jpeft_interop.set_peft_model_state_dict(model, classifier_of(theirs))


def their_logits(model, ids=IDS, mask=MASK):
    with torch.no_grad():
        return model(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask)).logits.numpy()


def assert_same(ours, theirs, tolerance=TOLERANCE):
    assert np.abs(np.asarray(ours) - theirs)[MASK != 0].max() <= tolerance * np.abs(theirs).max()


@pytest.mark.filterwarnings("ignore:enable_softmax_topk")
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_logits_and_scalings(folder, settings):
    theirs = in_torch(folder, **settings)
    ours = in_jax(folder, theirs, **settings)
    want = their_logits(theirs)
    model = ours.get_base_model()

    @jax.jit
    def both_runs(wrapped, batch):
        wrapped, batch = jpeft_interop.prepare_inputs(model, wrapped, batch)
        return jpeft.lift(model.apply)(wrapped, **batch).logits, wrapped.context["xlora_scalings"]

    logits, own = both_runs(ours.params, {"input_ids": IDS, "attention_mask": MASK})
    assert_same(logits, want)
    scalings = theirs.get_latest_scalings().detach().numpy()
    own = np.broadcast_to(own, scalings.shape)
    np.testing.assert_allclose(own[MASK != 0], scalings[MASK != 0], rtol=1e-3, atol=1e-4)
    theirs.base_model.disable_adapter_layers()
    assert np.abs(their_logits(theirs) - want)[MASK != 0].max() > 0.02 * np.abs(want).max()


def test_layers_in_stacks(folder):
    settings = SETTINGS["deep, by layers"]
    theirs = in_torch(folder, **settings)
    ours = in_jax(folder, theirs, scan=True, **settings)
    assert "model.layers.0:2.mlp.down_proj" in ours.params.adapters["default"].sites
    assert_same(ours(input_ids=IDS, attention_mask=MASK).logits, their_logits(theirs))


def test_generation(folder):
    """Two caches here, none there: the same tokens, greedy and by beams."""
    settings = {"layerwise_scalings": True, "top_k_lora": 2}
    theirs = in_torch(folder, **settings)
    ours = in_jax(folder, theirs, **settings)
    found = []
    for beams in (1, 3):
        options = transformers.GenerationConfig(max_new_tokens=6, eos_token_id=2, pad_token_id=1, num_beams=beams)
        with torch.no_grad():
            want = theirs.generate(
                input_ids=torch.tensor(IDS), attention_mask=torch.tensor(MASK), generation_config=options
            ).numpy()
        own = ours.generate(
            IDS, attention_mask=MASK, max_new_tokens=6, eos_token_id=2, pad_token_id=1, num_beams=beams
        ).sequences
        np.testing.assert_array_equal(np.asarray(own)[:, : want.shape[1]], want)
        found.append(np.asarray(own))
    theirs.base_model.disable_adapter_layers()
    options = transformers.GenerationConfig(max_new_tokens=6, eos_token_id=2, pad_token_id=1)
    base = theirs.generate(
        input_ids=torch.tensor(IDS), attention_mask=torch.tensor(MASK), generation_config=options
    ).numpy()
    assert not np.array_equal(base, found[0][:, : base.shape[1]])


def test_a_head_for_sequences(folder, tmp_path):
    """PEFT reads experts of models alone whose modules are all in one called "model"."""
    base = randomise(transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**LLAMA, num_labels=3)), 0)
    base.save_pretrained(tmp_path)
    config = peft.XLoraConfig(task_type="SEQ_CLS", hidden_size=16, adapters=places(folder))
    theirs = quietly(peft.get_peft_model, base, config)
    model = FlaxAutoModelForSequenceClassification.from_pretrained(tmp_path)
    ours = jpeft_interop.get_peft_model(model, jpeft.XLoraConfig(task_type="SEQ_CLS", adapters=places(folder)))
    ours = jpeft_interop.set_peft_model_state_dict(ours, classifier_of(theirs))
    want = their_logits(theirs)
    np.testing.assert_allclose(ours(input_ids=IDS, attention_mask=MASK).logits, want, rtol=1e-3, atol=1e-3)


# ---- training -------------------------------------------------------------------------------------------------------


def test_ten_steps_of_sgd_go_the_same_way(folder):
    settings = {"use_trainable_adapters": True, "xlora_depth": 2, "xlora_size": 8, "xlora_dropout_p": 0.0}
    theirs, rate = in_torch(folder, **settings), 0.05
    ours = in_jax(folder, theirs, **settings)
    parameters = [p for n, p in theirs.named_parameters() if "xlora_classifier" in n or ".lora_" in n]
    optimizer = torch.optim.SGD(parameters, rate)
    model = ours.get_base_model()

    @jax.jit
    def step(wrapped):
        def loss(wrapped):
            own, batch = jpeft_interop.prepare_inputs(
                model, wrapped, {"input_ids": IDS, "attention_mask": MASK, "labels": LABELS}
            )
            return jpeft.lift(model.apply)(own, **batch).loss

        value, gradient = jpeft.value_and_grad(loss)(wrapped)
        mask = jpeft.trainable_mask(wrapped)
        return value, jax.tree.map(lambda t, p, g: p - rate * g if t else p, mask, wrapped, gradient)

    losses, wrapped = [], ours.params
    for _ in range(10):
        loss = theirs(input_ids=torch.tensor(IDS), attention_mask=torch.tensor(MASK), labels=torch.tensor(LABELS)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        own, wrapped = step(wrapped)
        losses.append((loss.item(), float(own)))
    want, got = np.array(losses).T
    assert want[-1] < 0.99 * want[0]
    np.testing.assert_allclose(got, want, rtol=1e-3)
    ended = classifier_of(theirs)
    for name, array in wrapped.adapters["default"].shared.items():
        np.testing.assert_allclose(array, ended[f"base_model.{name}"], rtol=1e-3, atol=1e-3)
    moved = theirs.state_dict()
    for number, expert in enumerate(experts_of(wrapped.adapters["default"]).values()):
        for path, arrays in expert.weights.items():
            for name, array in arrays.items():
                found = moved[f"base_model.lora_model.model.{path}.{name}.{number}.weight"]
                np.testing.assert_allclose(array, found, rtol=1e-3, atol=1e-3)


# ---- files ----------------------------------------------------------------------------------------------------------


def test_pytorch_loads_what_is_written_here(folder, tmp_path):
    settings = SETTINGS["deep, by layers"]
    ours = in_jax(folder, **settings)
    ours.save_pretrained(tmp_path / "out")
    held = load_file(tmp_path / "out" / WEIGHTS)
    theirs = quietly(
        peft.PeftModel.from_pretrained,
        transformers.LlamaForCausalLM.from_pretrained(folder / "base"),
        tmp_path / "out",
    )
    own = classifier_of(theirs)
    assert own.keys() == held.keys() and all(np.array_equal(own[key], held[key]) for key in own)
    assert_same(ours(input_ids=IDS, attention_mask=MASK).logits, their_logits(theirs.eval()))
    written = json.loads((tmp_path / "out" / CONFIG).read_text())
    config = peft.XLoraConfig(task_type="CAUSAL_LM", hidden_size=16, adapters=written["adapters"], **settings).to_dict()
    expected = {**config, "inference_mode": True, "peft_version": peft.__version__}
    assert {**written, "base_model_name_or_path": None} == json.loads(json.dumps(expected))
    for name in EXPERTS:
        first, second = (where / WEIGHTS for where in (folder / f"expert_{name}", tmp_path / "out" / name))
        assert written["adapters"][name] == str(second.parent)
        before, after = load_file(first), load_file(second)
        assert before.keys() == after.keys() and all(before[k].tobytes() == after[k].tobytes() for k in before)
        configs = [json.loads((where.parent / CONFIG).read_text()) for where in (first, second)]
        assert configs[0] == configs[1]


def test_a_folder_comes_back_wherever_it_is_moved(folder, tmp_path):
    names = ["poems", "law", "code"]
    ours = in_jax(folder, names=names, use_trainable_adapters=True, xlora_depth=2, xlora_size=8)
    with pytest.warns(
        UserWarning, match=r"are called \['poems', 'law', 'code'\]; PyTorch PEFT can use X-LoRA with exp"
    ):
        ours.save_pretrained(tmp_path / "there")
    shutil.move(tmp_path / "there", tmp_path / "here")
    base = FlaxAutoModelForCausalLM.from_pretrained(folder / "base", scan_layers=True)
    again = jpeft_interop.PeftModel.from_pretrained(base, tmp_path / "here", is_trainable=True)
    assert type(again).__name__ == "PeftModelForCausalLM" and list(again.active_peft_config.adapters) == names
    trained = jpeft.trainable_mask(again.params).adapters["default"]
    assert trained.weights["model.layers.0:2.self_attn.o_proj"]["xlora_A"] and all(trained.shared.values())
    frozen = load_pretrained(base.params, tmp_path / "here")
    assert not any(jax.tree.leaves(jpeft.trainable_mask(frozen)))
    # The paths of a config that is given count before what the folder holds.
    config = jpeft_interop.load_config(tmp_path / "here")
    other = dataclasses.replace(config, adapters={name: places(folder)["0"] for name in names})
    same = load_pretrained(base.params, tmp_path / "here", config=other)
    a = same.adapters["default"].weights["model.layers.0:2.mlp.down_proj"]["xlora_A"]
    np.testing.assert_array_equal(a[:, 0], a[:, 1])
    with pytest.warns(UserWarning, match="are called"):
        save_pretrained(again.params, tmp_path / "once more")
    for name in ("", *names):
        assert (tmp_path / "here" / name / WEIGHTS).read_bytes() == (
            tmp_path / "once more" / name / WEIGHTS
        ).read_bytes()


def test_a_router_beside_its_experts(folder, tmp_path):
    """Of pure functions: the router in a folder of its own name, its experts inside."""
    base = FlaxAutoModelForCausalLM.from_pretrained(folder / "base")
    wrapped = load_pretrained(base.params, places(folder)["0"], adapter_name="0")
    wrapped = jpeft_interop.load_adapter(wrapped, places(folder)["1"], "1")
    router = jpeft.create_xlora_adapter(wrapped, ["0", "1"], jpeft.XLoraConfig(hidden_size=16))
    save_pretrained(router, tmp_path)
    found = sorted(str(path.parent.relative_to(tmp_path)) for path in tmp_path.rglob(WEIGHTS))
    assert found == ["0", "1", "xlora", "xlora/0", "xlora/1"]
    assert (tmp_path / "0" / WEIGHTS).read_bytes() == (tmp_path / "xlora" / "0" / WEIGHTS).read_bytes()
    again = jpeft_interop.load_adapter(wrapped, tmp_path / "xlora", "mixture")
    assert list(again.adapters) == ["0", "1", "mixture"] and again.active == ("0",)
    for ours, theirs in zip(
        jax.tree.leaves(again.adapters["mixture"]), jax.tree.leaves(router.adapters["xlora"]), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)
    named = jpeft.create_xlora_adapter(wrapped, ["0", "1"], jpeft.XLoraConfig(hidden_size=16), "default")
    with pytest.raises(
        ValueError, match="adapter '0' and the expert of that name of 'default' would be written to one"
    ):
        save_pretrained(named, tmp_path / "never")
    assert not (tmp_path / "never").exists()


def test_more_than_ten_experts_keep_their_order(folder, tmp_path):
    names = [str(number) for number in range(12)]
    base = FlaxAutoModelForCausalLM.from_pretrained(folder / "base")
    config = jpeft.XLoraConfig(adapters={name: places(folder)[str(int(name) % 3)] for name in names})
    ours = jpeft_interop.get_peft_model(base, config)
    ours.save_pretrained(tmp_path)
    path = tmp_path / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()), sort_keys=True))  # as PEFT writes it
    again = jpeft_interop.PeftModel.from_pretrained(base, tmp_path)
    assert list(again.active_peft_config.adapters) == names
    before, after = (model.params.adapters["default"] for model in (ours, again))
    for first, second in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        np.testing.assert_array_equal(first, second)


def test_what_pytorch_wrote_is_put_together_again(folder, tmp_path):
    """Its file lacks the layer of the classifier that is called as an expert is; it says where experts were."""
    settings = SETTINGS["deep, by layers"]
    theirs = in_torch(folder, **settings)
    quietly(theirs.save_pretrained, tmp_path / "out")
    assert not [key for key in load_file(tmp_path / "out" / WEIGHTS) if ".layers.0." in key]
    base = FlaxAutoModelForCausalLM.from_pretrained(folder / "base")
    ours = jpeft_interop.PeftModel.from_pretrained(base, tmp_path / "out")
    assert_same(ours(input_ids=IDS, attention_mask=MASK).logits, their_logits(theirs))
    ours.save_pretrained(tmp_path / "whole")
    held, whole = load_file(tmp_path / "whole" / WEIGHTS), classifier_of(theirs)
    assert held.keys() == whole.keys() and all(np.array_equal(held[key], whole[key]) for key in held)
    for name in EXPERTS:
        shutil.rmtree(tmp_path / "out" / name)
    lacks = r"classifier of its config: missing: .*layers\.0\.bias.*layers\.0\.weight"
    with pytest.raises(ValueError, match=lacks):
        jpeft_interop.PeftModel.from_pretrained(base, tmp_path / "out")


# ---- what is refused ------------------------------------------------------------------------------------------------


def test_what_does_not_fit(folder, tmp_path):
    base = FlaxAutoModelForCausalLM.from_pretrained(folder / "base")
    get, make = jpeft_interop.get_peft_model, jpeft.XLoraConfig
    with pytest.raises(ValueError, match="hidden_size is 8; expected 16, the size of the model's hidden states"):
        get(base, make(hidden_size=8, adapters=places(folder)))
    with pytest.raises(ValueError, match="adapters is empty; expected the folder of each expert by its name"):
        get(base, make())
    with pytest.raises(FileNotFoundError, match="there is no folder '/no/such/place'"):
        get(base, make(adapters={"0": "/no/such/place"}))
    with pytest.raises(ValueError, match="top_k_lora is 4, but there are 3 experts: 0, 1, 2; expected no more"):
        get(base, make(adapters=places(folder), top_k_lora=4))
    model = get(base, make(adapters=places(folder)))
    with pytest.raises(ValueError, match="there already is an adapter 'default'"):
        model.add_adapter("default", make(adapters=places(folder)))
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="adapter 'default' of XLoraConfig is no change of a weight"):
            merge()
    state = jpeft_interop.get_peft_model_state_dict(model)
    assert list(state) == [f"base_model.internal_xlora_classifier.layers.0.{name}" for name in ("bias", "weight")]
    wrong = {"base_model.internal_xlora_classifier.layers.0.weight": np.zeros((2, 16)), "other": np.zeros(1)}
    match = r"missing: .*layers.0.bias; unexpected: other; misshapen: .*layers.0.weight \(2, 16\), expected \(3, 16\)"
    with pytest.raises(ValueError, match=match):
        jpeft_interop.set_peft_model_state_dict(model, wrong)
    quietly(model.save_pretrained, tmp_path)
    shutil.rmtree(tmp_path / "1")
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        load_pretrained(base.params, tmp_path)


def test_models_that_do_not_tell_their_hidden_states(folder, tmp_path):
    config = transformers.T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2)
    randomise(transformers.T5ForConditionalGeneration(config), 0).save_pretrained(tmp_path)
    base = FlaxAutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    lora = jpeft.LoraConfig(r=2, target_modules=["q"])
    wrapped = jpeft.create_xlora_adapter(
        jpeft.wrap(base.params, lora, adapter_name="law"), ["law"], jpeft.XLoraConfig(hidden_size=16)
    )
    wrapped = jpeft.set_adapter(wrapped, "xlora")
    batch = {"input_ids": jnp.asarray(IDS), "decoder_input_ids": jnp.asarray(IDS)}
    with pytest.raises(
        TypeError, match="T5ForConditionalGeneration gives no hidden_states; expected a decoder or an enc"
    ):
        jpeft_interop.prepare_inputs(base, wrapped, batch)
    with pytest.raises(TypeError, match="T5ForConditionalGeneration gives no hidden_states"):
        base.generate(wrapped, IDS, decoder_input_ids=IDS[:, :1], max_new_tokens=2)
    params = {"up": {"kernel": jnp.ones((4, 4))}}
    function = (lambda params, x: x @ params["up"]["kernel"], params)
    wrapped = jpeft.wrap(params, jpeft.LoraConfig(r=1, target_modules=["up"]), adapter_name="law")
    wrapped = jpeft.create_xlora_adapter(wrapped, ["law"], jpeft.XLoraConfig(hidden_size=4))
    wrapped = jpeft.set_adapter(wrapped, "xlora")
    with pytest.raises(TypeError, match="gives no hidden_states; .*with_xlora_scalings.params, .... before the call"):
        jpeft_interop.prepare_inputs(function, wrapped, {"x": jnp.ones((1, 2, 4))})
    told = jpeft.with_xlora_scalings(wrapped, lambda params: jnp.ones((1, 2, 4)))
    assert jpeft_interop.prepare_inputs(function, told, {"x": jnp.ones((1, 2, 4))})[0] is told
