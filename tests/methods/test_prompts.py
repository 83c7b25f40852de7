"""Soft prompts made by encoders, tasks and contexts: what they compute on a small model, and what they refuse.

Their laws are in tests/interop/test_laws_beside.py.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jpeft
from jpeft._contract import method_of
from jpeft.methods._cpt_projection import DELTA, radii
from tests.harness import random_like

VOCABULARY, DIM, COUNT = 11, 6, 3
IDS = np.array([[4, 5, 6], [7, 8, 9]])
TYPES = [1, 2, 4]

ROWS = {
    "mlp": (jpeft.PromptEncoderConfig(num_virtual_tokens=COUNT, encoder_hidden_size=4), {}),
    "lstm": (
        jpeft.PromptEncoderConfig(
            num_virtual_tokens=COUNT, encoder_hidden_size=4, encoder_reparameterization_type="LSTM"
        ),
        {},
    ),
    "tasks": (
        jpeft.MultitaskPromptTuningConfig(num_virtual_tokens=COUNT, num_tasks=3, num_ranks=2),
        {"task_ids": np.array([2, 0])},
    ),
    "context": (jpeft.CPTConfig(cpt_token_ids=[1, 2, 3], cpt_tokens_type_mask=TYPES, opt_projection_epsilon=40.0), {}),
}
rows = pytest.mark.parametrize("name", ROWS)


@pytest.fixture(scope="module")
def base():
    shapes = {"embed_tokens": {"embedding": (VOCABULARY, DIM)}, "q": {"kernel": (DIM, DIM)}}
    return random_like(shapes, 1, 1.0)


def apply(params, input_ids):
    x = params["embed_tokens"]["embedding"][input_ids]
    return jnp.tanh(x.cumsum(axis=1) @ params["q"]["kernel"]) @ params["embed_tokens"]["embedding"].T


lifted = jpeft.lift(apply)


def trained(base, name, **options):
    """Parameters with an adapter whose arrays are random, but for the rows that CPT takes from the table."""
    config, context = ROWS[name]
    wrapped = jpeft.wrap(base, config, **options)
    adapter = wrapped.adapters["default"]
    shared = {**random_like(dict(adapter.shared), 5, 0.5)}
    shared.update({key: adapter.shared[key] for key in adapter.shared if not method_of(config).trains(key)})
    wrapped = dataclasses.replace(
        wrapped, adapters={**wrapped.adapters, "default": dataclasses.replace(adapter, shared=shared)}
    )
    return jpeft.with_context(wrapped, **context) if context else wrapped


def prompt_of(wrapped):
    adapter = wrapped.adapters["default"]
    context = {key: jnp.asarray(value) for key, value in wrapped.context.items()}
    return method_of(adapter.config).prompt(adapter.shared, adapter.config, context)


def loss_of(wrapped):
    batch = jpeft.with_virtual_tokens({"input_ids": jnp.asarray(IDS)}, wrapped)
    return (lifted(wrapped, **batch) ** 2).mean()


@rows
def test_it_is_rows_before_the_text(base, name):
    wrapped = trained(base, name)
    given = jpeft.with_virtual_tokens({"input_ids": jnp.asarray(IDS)}, wrapped)["input_ids"]
    assert given[:, :COUNT].tolist() == [list(range(VOCABULARY, VOCABULARY + COUNT))] * 2
    table = base["embed_tokens"]["embedding"]
    before = jnp.broadcast_to(prompt_of(wrapped), (2, COUNT, DIM))
    x = jnp.concatenate([before, table[IDS]], axis=1)
    want = jnp.tanh(x.cumsum(axis=1) @ base["q"]["kernel"]) @ table.T
    np.testing.assert_allclose(jax.jit(lifted)(wrapped, given), want, atol=1e-5)


@rows
def test_for_inference_there_is_the_prompt_alone(base, name):
    config, _ = ROWS[name]
    half = jpeft.wrap(base, config, dtype=jnp.bfloat16).adapters["default"]
    assert half.config.token_dim == DIM
    assert {array.dtype for array in half.shared.values()} == {jnp.dtype(jnp.bfloat16)}
    only = jpeft.wrap(base, dataclasses.replace(config, inference_mode=True)).adapters["default"].shared
    others = {"prefix_task_cols", "prefix_task_rows"} if name == "tasks" else set()
    assert only.keys() == {"prompt_embeddings"} | others
    assert only["prompt_embeddings"].shape == (COUNT, DIM)


@rows
def test_lora_is_active_at_the_same_time(base, name):
    wrapped = trained(base, name)
    lora = jpeft.LoraConfig(r=2, target_modules=["q", "embed_tokens"])
    both = jpeft.wrap(wrapped, lora, adapter_name="lora")
    own = random_like(both.adapters["lora"].weights, 8, 0.5)
    adapters = {**both.adapters, "lora": dataclasses.replace(both.adapters["lora"], weights=own)}
    both = jpeft.set_adapter(dataclasses.replace(both, adapters=adapters), ["default", "lora"])
    given = jpeft.with_virtual_tokens({"input_ids": jnp.asarray(IDS)}, both)["input_ids"]
    alone = jpeft.set_adapter(jpeft.delete_adapter(both, "default"), "lora")
    table, kernel = (jpeft.merge(alone)[path] for path in ("embed_tokens", "q"))
    x = jnp.concatenate([jnp.broadcast_to(prompt_of(wrapped), (2, COUNT, DIM)), table["embedding"][IDS]], axis=1)
    # As in PEFT LoRA of a table is for its lookups.
    want = jnp.tanh(x.cumsum(axis=1) @ kernel["kernel"]) @ base["embed_tokens"]["embedding"].T
    with pytest.warns(UserWarning, match="acts on the lookup alone, as in PEFT"):
        got = lifted(both, given)
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_dropout_acts_between_the_layers_of_an_lstm(base):
    config = dataclasses.replace(ROWS["lstm"][0], encoder_dropout=0.5)
    assert _losses(base, config)[0] != _losses(base, config)[1]
    assert _losses(base, config)[2] == _losses(base, ROWS["lstm"][0])[2]
    for other in (
        dataclasses.replace(config, encoder_num_layers=1),
        dataclasses.replace(config, encoder_reparameterization_type="MLP"),
    ):
        assert len({*_losses(base, other)}) == 1


def _losses(base, config):
    """With two keys, and without one."""
    wrapped = jpeft.wrap(base, config, rng=jax.random.key(3))
    keyed = [jpeft.with_context(wrapped, rng=jax.random.key(seed)) for seed in (0, 1)]
    return [float(loss_of(params)) for params in (*keyed, wrapped)]


def test_an_unknown_task_is_nan_under_jit_and_refused_outside(base):
    wrapped = trained(base, "tasks")
    with pytest.raises(ValueError, match=r"task_ids hold \[3\]; expected 0 to 2, as the adapter knows 3 tasks"):
        jpeft.with_context(wrapped, task_ids=[0, 3])
    found = jax.jit(lambda ids: loss_of(jpeft.with_context(wrapped, task_ids=ids)))(jnp.array([0, 3]))
    assert jnp.isnan(found)
    with pytest.raises(ValueError, match="'default' needs task_ids for each row of the batch"):
        loss_of(dataclasses.replace(wrapped, context={}))
    with pytest.raises(ValueError, match=r"a prompt for each of 3 rows.*ids of shape \(3, length\)"):
        loss_of(jpeft.with_context(wrapped, task_ids=[0, 1, 2]))


@pytest.mark.parametrize("halved", [False, True])
def test_the_projection_after_each_step(base, halved):
    wrapped = trained(base, "context")
    bounds = radii(wrapped.adapters["default"].config)[:, 0]
    np.testing.assert_allclose(bounds, np.array([0.1, 40.0, 0.0]) * np.sqrt(DIM / 2048), atol=1e-9)
    tx = optax.chain(
        optax.sgd(0.5) if halved else optax.masked(optax.sgd(0.5), jpeft.trainable_mask), jpeft.cpt_projection()
    )
    if halved:
        params, _ = jpeft.partition(wrapped)
        gradients = random_like(params, 9, 0.1)
    else:
        params, gradients = wrapped, jpeft.grad(loss_of)(wrapped)
    updates, _ = tx.update(gradients, tx.init(params), params)
    moved = optax.apply_updates(params, updates).adapters["default"].shared[DELTA]
    before = wrapped.adapters["default"].shared[DELTA] - 0.5 * gradients.adapters["default"].shared[DELTA]
    lengths = np.linalg.norm(before, axis=1, keepdims=True)
    want = before * np.minimum(1, bounds[:, None] / lengths)
    assert (lengths[:, 0] > bounds).tolist() == [True, False, True]
    np.testing.assert_allclose(moved, want, atol=1e-6)
    with pytest.raises(ValueError, match="update got no parameters"):
        jpeft.cpt_projection().update(updates, optax.EmptyState())


def test_the_projection_leaves_alone_what_does_not_train(base):
    both = jpeft.wrap(trained(base, "context"), ROWS["mlp"][0], adapter_name="other")
    both = jpeft.set_adapter(both, "other")
    gradients = jpeft.grad(loss_of)(both)
    updates, _ = jpeft.cpt_projection().update(gradients, optax.EmptyState(), both)
    for one, other in zip(jax.tree.leaves(updates), jax.tree.leaves(gradients), strict=True):
        np.testing.assert_array_equal(one, other)


P_TUNING = functools.partial(jpeft.PromptEncoderConfig, num_virtual_tokens=2)
TASKS = functools.partial(jpeft.MultitaskPromptTuningConfig, num_virtual_tokens=2)
CONTEXT = functools.partial(jpeft.CPTConfig, cpt_token_ids=[1, 2])


@pytest.mark.parametrize(
    ("config", "options", "match"),
    [
        (P_TUNING, {"encoder_reparameterization_type": "GRU"}, "is 'GRU'; expected 'MLP' or 'LSTM'"),
        (P_TUNING, {"encoder_hidden_size": 0}, "encoder_hidden_size is 0; expected a whole number of at least 1"),
        (P_TUNING, {"encoder_num_layers": 1.5}, "encoder_num_layers is 1.5; expected a whole number"),
        (P_TUNING, {"encoder_dropout": 1.0}, "encoder_dropout is 1.0; expected a rate of at least 0 and below 1"),
        (TASKS, {"prompt_tuning_init": "ZERO"}, "prompt_tuning_init is 'ZERO'; expected one of RANDOM, TEXT, SAMPLE"),
        (TASKS, {"prompt_tuning_init": "TEXT"}, "expected prompt_tuning_init_text and tokenizer_name_or_path, or"),
        (TASKS, {"num_tasks": 0}, "num_tasks is 0; expected a whole number of at least 1"),
        (TASKS, {"prompt_tuning_init_task": -1}, "prompt_tuning_init_task is -1; expected a whole number of at least"),
        (
            TASKS,
            {"prompt_tuning_init": "EXACT_SOURCE_TASK", "num_tasks": 2},
            "num_tasks is 2 with prompt_tuning_init='EXACT_SOURCE_TASK'; expected 1",
        ),
        (CONTEXT, {"task_type": "SEQ_CLS"}, "task_type is .*SEQ_CLS.*; expected CAUSAL_LM, the one task"),
        (CONTEXT, {"cpt_tokens_type_mask": [1]}, r"the lengths are .*'cpt_tokens_type_mask': 1.*expected one length"),
        (CONTEXT, {"cpt_mask": [1, 1, 1]}, r"the lengths are .*'cpt_mask': 3"),
        (CONTEXT, {"num_virtual_tokens": 3}, r"the lengths are .*'num_virtual_tokens': 3"),
        (CONTEXT, {"opt_weighted_loss_type": "sum"}, "opt_weighted_loss_type is 'sum'; expected 'none' or 'decay'"),
        (CONTEXT, {"opt_projection_epsilon": -1}, "opt_projection_epsilon is -1; expected a number of at least 0"),
    ],
)
def test_configs_that_are_refused(config, options, match):
    with pytest.raises(ValueError, match=match):
        config(**options)


SOURCE = {"prompt_embeddings": (2, DIM), "prefix_task_cols": (3, 2, 1), "prefix_task_rows": (3, 1, DIM)}


@pytest.mark.parametrize(
    ("options", "changed", "match"),
    [
        (
            {},
            None,
            "jpeft reads no files; expected prompt_tuning_init_state_dict, the arrays prompt_embeddings, prefix",
        ),
        ({}, {"prompt_embeddings": (3, DIM)}, r"source have the shapes .*\(3, 6\).*expected .*\(2, 6\)"),
        ({}, {"prefix_task_rows": (2, 1, DIM)}, r"source have the shapes .*expected .*\('tasks', 1, 6\)"),
        ({"num_ranks": 2}, {}, r"source have the shapes .*expected .*\('tasks', 2, 2\)"),
        (
            {"prompt_tuning_init_task": 3},
            {},
            "prompt_tuning_init_task is 3; expected 0 to 2, as the source has 3 tasks",
        ),
    ],
)
def test_sources_that_are_refused(base, options, changed, match):
    arrays = None if changed is None else random_like({**SOURCE, **changed}, 0)
    config = TASKS(prompt_tuning_init="EXACT_SOURCE_TASK", prompt_tuning_init_state_dict=arrays, **options)
    with pytest.raises(ValueError, match=match):
        jpeft.wrap(base, config)


def test_how_a_prompt_began_is_kept_as_far_as_files_can_tell(base):
    """PEFT reads a text, or a source, again whenever it loads the prompt."""
    ids = {"prompt_tuning_init": "TEXT", "prompt_tuning_init_ids": [4, 5]}
    told = {"prompt_tuning_init_text": "one two", "tokenizer_name_or_path": "somewhere"}
    for config in (TASKS, functools.partial(jpeft.PromptTuningConfig, num_virtual_tokens=2)):
        for given, how in ((ids, "RANDOM"), ({**ids, **told}, "TEXT")):
            adapter = jpeft.wrap(base, config(**given)).adapters["default"]
            assert adapter.config.prompt_tuning_init == how
            table = base["embed_tokens"]["embedding"]
            np.testing.assert_array_equal(adapter.shared["prompt_embeddings"], table[jnp.array([4, 5])])


def test_a_context_of_tokens_that_the_table_lacks(base):
    with pytest.raises(ValueError, match=r"begins with the tokens \[1, 11\], but .* has 11 rows"):
        jpeft.wrap(base, jpeft.CPTConfig(cpt_token_ids=[1, 11]))
