"""Multitask prompt tuning against PyTorch PEFT: every kind of model, tasks of rows, both halves, sources, training."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import save_file

import jpeft
import jpeft_interop

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

from jpeft.methods.multitask_prompt_tuning import prompt  # noqa: E402
from tests.interop.prompt_models import (  # noqa: E402
    ROWS,
    assert_close,
    assert_same_files,
    check_both_ways,
    check_generation,
    inputs,
    labels,
    loaded,
    loaded_by_peft,
    output_of,
    their_output,
    torch_inputs,
)
from tests.interop.prompt_steps import (  # noqa: E402
    assert_same_way,
    our_steps,
    their_steps,
    with_arrays,
)
from tests.interop.test_round_trip import quietly  # noqa: E402

COUNT, TASKS = 3, np.array([2, 0, 1])
SETTINGS = {"num_virtual_tokens": COUNT, "num_tasks": 3, "num_ranks": 2}
NAMES = ("prompt_embeddings", "prefix_task_cols", "prefix_task_rows")


def arrays_of(theirs):
    module = theirs.prompt_encoder["default"]
    held = (module.embedding.weight, module.prefix_task_cols, module.prefix_task_rows)
    return {name: jnp.asarray(array.detach().numpy().copy()) for name, array in zip(NAMES, held, strict=True)}


def test_the_prompt_of_a_task_and_its_gradient():
    """PEFT multiplies in place; its gradient is that of the product all the same."""
    torch.manual_seed(0)
    config = peft.MultitaskPromptTuningConfig(
        task_type="CAUSAL_LM", token_dim=32, num_transformer_submodules=1, **SETTINGS
    )
    theirs = peft.tuners.multitask_prompt_tuning.MultitaskPromptEmbedding(config, torch.nn.Embedding(9, 32))
    wrapped = jpeft.wrap(
        {"embed_tokens": {"embedding": jnp.ones((9, 32))}}, jpeft.MultitaskPromptTuningConfig(**SETTINGS)
    )
    adapter = wrapped.adapters["default"]
    for name in NAMES:
        one = theirs.embedding.weight if name == NAMES[0] else getattr(theirs, name)
        assert adapter.shared[name].shape == tuple(one.shape)
        np.testing.assert_allclose(adapter.shared[name].std(), one.std().item(), rtol=0.4)
    generator = torch.Generator().manual_seed(0)
    for parameter in theirs.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    factor = torch.randn((ROWS, COUNT, 32), generator=generator)
    want = theirs(torch.arange(COUNT).expand(ROWS, -1), torch.tensor(TASKS))
    (want * factor).sum().backward()
    held = (theirs.embedding.weight, theirs.prefix_task_cols, theirs.prefix_task_rows)
    arrays = {name: jnp.asarray(own.detach().numpy()) for name, own in zip(NAMES, held, strict=True)}

    def product(p):
        found = prompt(p, adapter.config, {"task_ids": jnp.asarray(TASKS)})
        return (found * factor.numpy()).sum(), found

    gradients, found = jax.grad(product, has_aux=True)(arrays)
    np.testing.assert_allclose(found, want.detach().numpy(), atol=1e-5)
    for name, own in zip(NAMES, held, strict=True):
        np.testing.assert_allclose(gradients[name], own.grad.numpy(), atol=1e-4, err_msg=name)


@pytest.mark.parametrize("name", ["llama", "bert, sequences", "bert, tokens"])
def test_files_and_outputs_both_ways(pair, name, tmp_path):
    own = pair(name)
    config = peft.MultitaskPromptTuningConfig(task_type=own.kind.task, **SETTINGS)
    theirs, ours = check_both_ways(own, config, tmp_path, task_ids=TASKS)
    if own.kind.task == "CAUSAL_LM":
        check_generation(own, theirs, ours, task_ids=TASKS)
    if name == "llama":
        # Beams repeat the rows, and what goes with them.
        ids = inputs(own.kind, padded=False)["input_ids"]
        settings = {"max_new_tokens": 4, "num_beams": 3}
        want = quietly(
            theirs.generate, input_ids=torch.tensor(ids), task_ids=torch.tensor(TASKS), do_sample=False, **settings
        )
        got = np.asarray(ours.generate(ids, task_ids=TASKS, **settings).sequences)
        np.testing.assert_array_equal(got[:, : want.shape[1]], want.numpy())


@pytest.mark.parametrize(("name", "submodules"), [("t5", None), ("t5", 1), ("bart", None)])
def test_an_encoder_and_a_decoder(pair, name, submodules, tmp_path):
    """PEFT's forward takes labels alone, and its generate leaves out the decoder's part of the prompt."""
    own = pair(name)
    config = peft.MultitaskPromptTuningConfig(
        task_type="SEQ_2_SEQ_LM", num_transformer_submodules=submodules, **SETTINGS
    )
    theirs = own.with_peft(config)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = loaded(own, tmp_path / "theirs")
    batch = {**inputs(own.kind), **labels(own.kind)}
    batch["labels"] = np.where(np.arange(4) < np.array([[4], [3], [2]]), batch["labels"], -100)
    given = batch.pop("decoder_input_ids")
    with torch.no_grad():
        want = quietly(theirs, **torch_inputs(batch), task_ids=torch.tensor(TASKS))
    got = ours(**batch, task_ids=TASKS)
    assert_close(output_of(got), output_of(want))
    np.testing.assert_allclose(float(got.loss), want.loss.item(), rtol=1e-5)
    ours.save_pretrained(tmp_path / "ours")
    assert_same_files(tmp_path / "theirs", tmp_path / "ours")
    again = loaded_by_peft(own, tmp_path / "ours")
    assert_close(their_output(again, batch, task_ids=torch.tensor(TASKS)), output_of(want))

    # A decoder's input of one's own, which begins as the labels do.
    start = own.ours.config.decoder_start_token_id
    given[:, 0] = start
    logits = output_of(ours(**{**batch, "labels": None}, decoder_input_ids=given, task_ids=TASKS))
    last = given[:, 1:]
    moved = np.concatenate([last, np.full((ROWS, 1), 5)], axis=1)
    assert_close(logits, their_output(theirs, {**batch, "labels": moved}, task_ids=torch.tensor(TASKS)))

    tokens = np.zeros((ROWS, 0), np.int64)
    for _ in range(4):
        unknown = np.concatenate([tokens, np.full((ROWS, 1), 5)], axis=1)
        logits = their_output(theirs, {**batch, "labels": unknown}, task_ids=torch.tensor(TASKS))
        tokens = np.concatenate([tokens, logits[:, -1:].argmax(-1)], axis=1)
    own_inputs = {name: array for name, array in batch.items() if name != "labels"}
    found = np.asarray(ours.generate(**own_inputs, task_ids=TASKS, max_new_tokens=4, eos_token_id=-1).sequences)
    np.testing.assert_array_equal(found, np.concatenate([np.full((ROWS, 1), start), tokens], axis=1))
    if submodules == 1:
        check_generation(own, theirs, ours, task_ids=TASKS)


@pytest.mark.parametrize("name", ["bert, answers", "bert, features"])
def test_tasks_for_which_peft_passes_no_task_ids_on(pair, name, tmp_path):
    """What it would compute is what it computes with the product as a prompt of its own."""
    own = pair(name)
    config = jpeft.MultitaskPromptTuningConfig(task_type=own.kind.task, **SETTINGS)
    ours = jpeft_interop.get_peft_model(own.ours, config, rng=jax.random.key(4))
    random = np.random.default_rng(5)
    arrays = {
        key: jnp.asarray(random.normal(size=array.shape), jnp.float32)
        for key, array in ours.params.adapters["default"].shared.items()
    }
    ours.params = with_arrays(ours.params, arrays)
    got = output_of(ours(**inputs(own.kind), task_ids=TASKS))
    plain = own.with_peft(peft.PromptTuningConfig(task_type=own.kind.task, num_virtual_tokens=COUNT))
    head = ours.params.adapters["default"].replaced
    assert bool(head) == (name == "bert, answers")
    with pytest.raises(ValueError, match="task_ids cannot be None"):
        their_output(own.with_peft(peft.MultitaskPromptTuningConfig(task_type=own.kind.task, **SETTINGS)),
                     inputs(own.kind), task_ids=torch.tensor(TASKS))  # fmt: skip
    for module in plain.modules():
        if hasattr(module, "modules_to_save") and hasattr(module, "original_module"):
            module.modules_to_save["default"].load_state_dict(module.original_module.state_dict())
    for row, task in enumerate(TASKS):
        rows = arrays["prompt_embeddings"] * (arrays["prefix_task_cols"][task] @ arrays["prefix_task_rows"][task])
        plain.prompt_encoder["default"].embedding.weight.data = torch.tensor(np.asarray(rows))
        one = {key: value[row : row + 1] for key, value in inputs(own.kind).items()}
        assert_close(got[row : row + 1], their_output(plain, one), one["attention_mask"])


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_ten_steps_of_training(pair, name):
    own = pair(name)
    theirs = own.with_peft(peft.MultitaskPromptTuningConfig(task_type=own.kind.task, **SETTINGS))
    ours = jpeft_interop.get_peft_model(
        own.ours, jpeft.MultitaskPromptTuningConfig(task_type=own.kind.task, **SETTINGS)
    )
    params = with_arrays(ours.params, arrays_of(theirs))
    batch = {**inputs(own.kind), **labels(own.kind)}
    batch.pop("decoder_input_ids", None)
    want = their_steps(theirs, {**batch, "task_ids": TASKS}, 0.05)
    params, got = our_steps(own, params, batch, 0.05, task_ids=TASKS)
    assert_same_way(got, want)
    for key, array in arrays_of(theirs).items():
        np.testing.assert_allclose(params.adapters["default"].shared[key], array, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("how", ["AVERAGE_SOURCE_TASKS", "EXACT_SOURCE_TASK", "ONLY_SOURCE_SHARED"])
def test_a_prompt_trained_before_begins_another(pair, how, tmp_path):
    own, random = pair("llama"), np.random.default_rng(2)
    shapes = {"prompt_embeddings": (COUNT, 16), "prefix_task_cols": (3, COUNT, 2), "prefix_task_rows": (3, 2, 16)}
    source = {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    save_file(source, tmp_path / "source.safetensors")
    tasks = 4 if how == "ONLY_SOURCE_SHARED" else 1
    settings = {
        "task_type": "CAUSAL_LM", "num_virtual_tokens": COUNT, "num_ranks": 2, "num_tasks": tasks,
        "prompt_tuning_init": how, "prompt_tuning_init_task": 1,
    }  # fmt: skip
    path = {"prompt_tuning_init_state_dict_path": str(tmp_path / "source.safetensors")}
    theirs = quietly(peft.get_peft_model, own.theirs, peft.MultitaskPromptTuningConfig(**settings, **path))
    config = jpeft.MultitaskPromptTuningConfig(**settings, **path)
    ours = jpeft_interop.get_peft_model(own.ours, config)
    held = ours.params.adapters["default"].shared
    for name, array in arrays_of(theirs).items():
        assert held[name].shape == array.shape
        if name == "prompt_embeddings" or how != "ONLY_SOURCE_SHARED":
            np.testing.assert_allclose(held[name], array, atol=1e-6)
    assert ours.params.adapters["default"].config.prompt_tuning_init == how
    ours.save_pretrained(tmp_path / "ours")
    loaded_by_peft(own, tmp_path / "ours")
    # Without the file: here the folder is enough, and arrays given as they are leave nothing that PEFT would look for.
    given = jpeft.MultitaskPromptTuningConfig(**settings, prompt_tuning_init_state_dict=source)
    plain = jpeft_interop.get_peft_model(own.ours, given)
    for name, array in held.items():
        np.testing.assert_array_equal(plain.params.adapters["default"].shared[name], array)
    plain.save_pretrained(tmp_path / "plain")
    loaded_by_peft(own, tmp_path / "plain")
    (tmp_path / "source.safetensors").unlink()
    again = loaded(own, tmp_path / "ours", is_trainable=True)
    np.testing.assert_array_equal(again.params.adapters["default"].shared["prompt_embeddings"], held[NAMES[0]])


def test_sources_that_are_refused(pair, tmp_path):
    own = pair("llama")
    settings = {"num_virtual_tokens": COUNT, "prompt_tuning_init": "EXACT_SOURCE_TASK", "task_type": "CAUSAL_LM"}
    (tmp_path / "source.bin").write_bytes(b"pickle")
    config = jpeft.MultitaskPromptTuningConfig(
        **settings, prompt_tuning_init_state_dict_path=str(tmp_path / "source.bin")
    )
    with pytest.raises(ValueError, match=r"expected a .safetensors file.*pickles can run code"):
        jpeft_interop.get_peft_model(own.ours, config)
    with pytest.raises(FileNotFoundError):
        jpeft_interop.get_peft_model(
            own.ours,
            jpeft.MultitaskPromptTuningConfig(**settings, prompt_tuning_init_state_dict_path="nowhere.safetensors"),
        )


def test_a_row_for_each_task_each_prompt_and_none(pair, tmp_path):
    own = pair("llama")
    config = peft.MultitaskPromptTuningConfig(task_type="CAUSAL_LM", **SETTINGS)
    own.with_peft(config).save_pretrained(tmp_path / "tasks")
    longer = peft.MultitaskPromptTuningConfig(task_type="CAUSAL_LM", **{**SETTINGS, "num_virtual_tokens": 5})
    own.with_peft(longer, seed=8).save_pretrained(tmp_path / "p")
    ours = loaded(own, tmp_path / "tasks")
    ours.load_adapter(tmp_path / "p", "p")
    batch, names = inputs(own.kind), ["p", "default", "__base__"]
    got = np.asarray(ours(**batch, adapter_names=names, task_ids=TASKS).logits)
    ours.set_adapter("default")
    alone = np.asarray(ours(**batch, task_ids=TASKS).logits)
    np.testing.assert_allclose(got[1, : COUNT + 4], alone[1, : COUNT + 4], atol=1e-5)
    with ours.disable_adapter():
        base = np.asarray(ours(**batch).logits)
    np.testing.assert_allclose(got[2, :3], base[2, :3], atol=1e-5)
    ours.set_adapter("p")
    np.testing.assert_allclose(got[0], np.asarray(ours(**batch, task_ids=TASKS).logits)[0], atol=1e-5)


def test_a_decoders_rows_begin_together(pair):
    own = pair("t5")
    config = jpeft.MultitaskPromptTuningConfig(task_type="SEQ_2_SEQ_LM", **SETTINGS)
    wrapped = jpeft.wrap(own.ours.params, config)
    batch = {"input_ids": np.ones((2, 3), int), "decoder_input_ids": np.ones((2, 2), int)}
    with pytest.raises(ValueError, match=r"the rows have \[0, 3\] tokens before the decoder's input"):
        jpeft.with_virtual_tokens(batch, wrapped, adapter_names=["default", "__base__"])
    with pytest.raises(ValueError, match="has labels, but no decoder_input_ids"):
        jpeft.with_virtual_tokens({"input_ids": batch["input_ids"], "labels": batch["input_ids"]}, wrapped)
    masked = jpeft.with_virtual_tokens({**batch, "decoder_attention_mask": np.array([[1, 0], [1, 1]])}, wrapped)
    assert masked["decoder_attention_mask"].tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    assert optax.tree.get(masked, "decoder_input_ids").shape == (2, 5)
