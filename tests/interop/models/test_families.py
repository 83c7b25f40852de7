"""Laws that hold of every model family, over the table of `cases_*.py`, with transformers' PyTorch as the oracle."""

import copy
import dataclasses
import importlib
import json
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

import jpeft
from jpeft_interop import save_pretrained
from jpeft_interop.models import FAMILIES
from jpeft_interop.models._leaves import flatten, tensors_of
from jpeft_interop.models.auto import AutoModel

pytest.importorskip("torch")
pytest.importorskip("transformers")
oracle = importlib.import_module("tests.interop.models.torch_oracle")
torch, transformers = oracle.torch, oracle.transformers
peft = pytest.importorskip("peft")

CASES = [
    case
    for file in sorted(Path(__file__).parent.glob("cases_*.py"))
    for case in importlib.import_module(f"tests.interop.models.{file.stem}").CASES
]
FULL = [case for case in CASES if case.full]
OUTPUTS = ("logits", "last_hidden_state", "pooler_output", "start_logits", "end_logits", "logits_per_image")


HIDDEN_STATES = [
    *(("", name) for name in ("hidden_states", "encoder_hidden_states", "decoder_hidden_states")),
    *((f"{tower}_model_output", "hidden_states") for tower in ("text", "vision")),
]
"""Where an output holds them: in itself, or in that of a tower."""


def each_task(cases):
    return pytest.mark.parametrize(
        "case, task", [pytest.param(case, task, id=f"{case.name}-{task}") for case in cases for task in case.tasks]
    )


each_case = pytest.mark.parametrize("case", FULL, ids=lambda case: case.name)


@lru_cache(maxsize=2)
def theirs(case, task):
    config = case.config()
    return oracle.random_model(FAMILIES[config.model_type].architectures[task].name, config)


@pytest.fixture
def folder(case, task, tmp_path):
    return oracle.saved(theirs(case, task), tmp_path)


@pytest.fixture
def ours(task, folder):
    return AutoModel(task).from_pretrained(folder)


def torch_outputs(model, inputs, **options):
    with torch.no_grad():
        return model(**{name: torch.tensor(value) for name, value in inputs.items()}, **options)


def assert_same(case, actual, expected, inputs):
    tokens = inputs.get(case.tokens)
    compared = 0
    for name in OUTPUTS:
        ours, reference = getattr(actual, name, None), getattr(expected, name, None)
        if ours is None or reference is None:
            continue
        compared += 1
        assert_close(case, ours, reference.float().numpy(), tokens)
    assert compared


def assert_close(case, actual, expected, tokens):
    actual = np.asarray(actual, np.float32)
    assert actual.shape == expected.shape
    if tokens is not None and expected.shape[:2] == tokens.shape:
        actual, expected = actual[tokens != 0], expected[tokens != 0]
    assert np.isfinite(expected).all()
    assert np.isfinite(actual).all()
    assert np.abs(actual - expected).max() <= case.atol * np.abs(expected).max()


def applied(model, *calls, **options):
    """The outputs of some calls, compiled once for those of the same inputs."""
    apply = jax.jit(lambda params, inputs: model.apply(params, **inputs, **options))
    with jax.numpy_dtype_promotion("strict"):
        return [apply(model.params, dict(inputs)) for inputs in calls]


@each_task(CASES)
def test_outputs(case, task, ours):
    # A head has nothing to do with how the body takes its inputs.
    calls = case.inputs()[0 if task in case.tasks[:2] else -1 :]
    for inputs, output in zip(calls, applied(ours, *calls), strict=True):
        assert_same(case, output, torch_outputs(theirs(case, task), inputs), inputs)


@each_task([dataclasses.replace(case, tasks=case.tasks[:1]) for case in FULL])
def test_hidden_states(case, task, ours):
    inputs = case.inputs()[-1]
    [actual] = applied(ours, inputs, output_hidden_states=True)
    expected = torch_outputs(theirs(case, task), inputs, output_hidden_states=True)
    compared = 0
    for part, name in HIDDEN_STATES:
        tower, other_tower = (getattr(output, part, None) if part else output for output in (actual, expected))
        states, reference = getattr(tower, name, None), getattr(other_tower, name, None)
        assert (states is None) == (reference is None)
        if states is None:
            continue
        compared += 1
        assert len(states) == len(reference)
        tokens = None if name == "decoder_hidden_states" else inputs.get(case.tokens)
        for state, other in zip(states, reference, strict=True):
            assert_close(case, state, other.float().numpy(), tokens)
    assert compared


@each_task([dataclasses.replace(case, tasks=case.tasks[-1:]) for case in FULL])
def test_stacked_layers_with_remat_and_their_gradients(case, task, folder, tmp_path):
    stacked = AutoModel(task).from_pretrained(folder, scan_layers=True, remat="nothing_saveable")
    assert any(":" in path for path in stacked.blueprint.leaves)
    inputs, reference = case.inputs()[-1], theirs(case, task)
    expected = reference(**{name: torch.tensor(value) for name, value in inputs.items()})
    squares(case, expected, inputs, expected).backward()
    compared = {name: value.detach() for name, value in expected.items() if name in OUTPUTS}

    @jax.jit
    def run(params):
        def loss(params):
            output = stacked.apply(params, **inputs)
            return squares(case, output, inputs, compared), output

        return jax.grad(loss, has_aux=True)(params)

    with jax.numpy_dtype_promotion("strict"):
        gradients, output = run(stacked.params)
    assert_same(case, output, SimpleNamespace(**compared), inputs)
    wanted = AutoModel(task).from_pretrained(saved_gradients(reference, tmp_path / "gradients"), scan_layers=True)
    trained = {path for path, leaf in stacked.blueprint.leaves.items() if not is_buffer(reference, leaf)}
    actual, wanted = (dict(flatten(tree)) for tree in (gradients, wanted.params))
    largest = max(np.abs(wanted[path]).max() for path in trained)
    assert largest > 0
    for path in trained:
        np.testing.assert_allclose(actual[path], wanted[path], atol=case.atol * largest, rtol=0, err_msg=path)


def squares(case, output, inputs, compared):
    """The sum of the squares of the outputs in `compared`, without those of positions that hold no token."""
    total, tokens = 0.0, inputs.get(case.tokens)
    for name in OUTPUTS:
        if compared.get(name) is not None and (value := getattr(output, name, None)) is not None:
            counts = tokens is not None and value.shape[:2] == tokens.shape
            total += ((value[np.nonzero(tokens)] if counts else value) ** 2).sum()
    return total


def saved_gradients(model, folder):
    """A checkpoint of the gradients, in the place of the parameters."""
    found = copy.deepcopy(model)
    with torch.no_grad():
        for parameter, source in zip(found.parameters(), model.parameters(), strict=True):
            parameter.copy_(torch.zeros_like(parameter) if source.grad is None else source.grad)
    model.zero_grad()
    return oracle.saved(found, folder)


def is_buffer(model, leaf):
    return {piece.name for piece in leaf.alternatives[0]} <= dict(model.named_buffers()).keys()


@each_task(FULL)
def test_paths_are_those_of_the_torch_modules(case, task, ours):
    reference = theirs(case, task)
    saved = reference.state_dict()
    held = [
        *reference.named_parameters(),
        *((name, value) for name, value in reference.named_buffers() if name in saved),
    ]
    state = {name: tuple(value.shape) for name, value in held}
    tensors = {name: shape for leaf in ours.blueprint.leaves.values() for name, shape in tensors_of(leaf).items()}
    fused = {name for name in state if name not in tensors}
    if not fused:
        assert tensors == state
    modules = {name for name, _ in reference.named_modules()}
    assert {path.rpartition(".")[0] for path in ours.blueprint.leaves} <= modules
    assert sum(np.prod(shape) for shape in tensors.values()) == sum(np.prod(shape) for shape in state.values())


@each_task([dataclasses.replace(case, tasks=case.tasks[:1]) for case in FULL if case.defaults])
def test_the_defaults_are_those_of_transformers(case, task):
    config = type(case.config())()
    empty = AutoModel(task).from_config({"model_type": config.model_type}, abstract=True)
    written = AutoModel(task).from_config(config.to_dict(), abstract=True)
    assert empty.config == written.config
    assert empty.blueprint.leaves.keys() == written.blueprint.leaves.keys()


@each_task(FULL)
def test_transformers_loads_what_is_saved(case, task, ours, tmp_path):
    changed = jax.tree.map(lambda leaf: 1.25 * leaf, ours.params)
    ours.save_pretrained(tmp_path / "saved", changed)
    back, loading = type(theirs(case, task)).from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"] and not loading["mismatched_keys"]
    for name, value in theirs(case, task).named_parameters():
        np.testing.assert_allclose(back.get_parameter(name).detach(), 1.25 * value.detach(), rtol=1e-6, err_msg=name)


@each_task([dataclasses.replace(case, tasks=case.tasks[:1]) for case in FULL])
def test_an_unknown_key_of_the_config_is_refused(case, task, folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "a_new_invention": 3}))
    with pytest.raises(ValueError, match=r"a_new_invention=3.*ignore_config_keys=\('a_new_invention',\)"):
        AutoModel(task).from_pretrained(folder)
    AutoModel(task).from_pretrained(folder, ignore_config_keys=("a_new_invention",))


@each_task(FULL)
def test_every_linear_layer_can_be_adapted(case, task, ours):
    wrapped = jpeft.wrap(ours.params, jpeft.LoraConfig(target_modules="all-linear"), layouts=ours.layouts)
    inputs = case.inputs()[-1]
    rows = jpeft.explain(lambda params: ours.apply(params, **inputs), wrapped)
    assert "merged" not in str(rows)
    assert len(wrapped.adapters["default"].sites) > 4


@each_task([dataclasses.replace(case, tasks=case.tasks[-1:]) for case in FULL])
@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to")  # PEFT sees for itself which layers are `Conv1D`.
def test_peft_loads_an_adapter(case, task, folder, scan_layers, tmp_path):
    ours = AutoModel(task).from_pretrained(folder, scan_layers=scan_layers)
    config = jpeft.LoraConfig(r=3, target_modules="all-linear")
    wrapped = jpeft.wrap(ours.params, config, layouts=ours.layouts)
    key = jax.random.key(7)
    wrapped = dataclasses.replace(
        wrapped,
        adapters={
            "default": dataclasses.replace(
                wrapped.adapters["default"],
                weights={
                    path: {
                        name: 0.1 * jax.random.normal(jax.random.fold_in(key, hash((path, name)) % 2**31), array.shape)
                        for name, array in arrays.items()
                    }
                    for path, arrays in wrapped.adapters["default"].weights.items()
                },
            )
        },
    )
    save_pretrained(wrapped, tmp_path / "adapter")
    inputs = case.inputs()[-1]
    with jax.numpy_dtype_promotion("strict"):
        actual = jax.jit(jpeft.lift(lambda params: ours.apply(params, **inputs)))(wrapped)
    reference = type(theirs(case, task)).from_pretrained(folder)
    adapted = peft.PeftModel.from_pretrained(reference, str(tmp_path / "adapter")).eval()
    expected = torch_outputs(adapted, inputs)
    assert_same(case, actual, expected, inputs)
    base = torch_outputs(theirs(case, task), inputs)
    assert any(
        np.abs(getattr(base, name).numpy() - getattr(expected, name).numpy()).max() > 1e-3
        for name in OUTPUTS
        if getattr(base, name, None) is not None
    )


def test_every_family_is_in_the_table():
    compared = {case.config().model_type for case in FULL}
    assert compared == set(FAMILIES)
