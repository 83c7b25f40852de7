"""Soft prompts on any model: the batch that they make, lookups written in every way, what acts on the table besides."""

import dataclasses
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, PartitionSpec as P

import jpeft
from jpeft._virtual_tokens import virtual_ids
from tests.harness import random_like

WORDS, FEATURES, COUNT = 9, 6, 3
SHAPES = {"wte": {"embedding": (WORDS, FEATURES)}, "dense": {"kernel": (FEATURES, FEATURES)}}
IDS = np.array([[1, 5, 0, 2], [7, 8, 7, 3]], np.int32)
CONFIG = jpeft.PromptTuningConfig(num_virtual_tokens=COUNT)

pytestmark = pytest.mark.usefixtures("x64")


def fresh(config=CONFIG, params=None, **options):
    wrapped = jpeft.wrap(random_like(SHAPES, 7) if params is None else params, config, dtype=jnp.float64, **options)
    name = options.get("adapter_name", "default")
    adapters = {**wrapped.adapters, name: random_like(wrapped.adapters[name], 50 + len(name))}
    return dataclasses.replace(wrapped, adapters=adapters)


def two(first=COUNT, second=2):
    wrapped = fresh(dataclasses.replace(CONFIG, num_virtual_tokens=first), adapter_name="a")
    wrapped = fresh(dataclasses.replace(CONFIG, num_virtual_tokens=second), wrapped, adapter_name="bb")
    return jpeft.set_adapter(wrapped, ["a", "bb"])


def rows_of(wrapped, name="default"):
    return np.asarray(wrapped.adapters[name].shared["prompt_embeddings"])


def table(wrapped):
    return np.asarray(wrapped.base["wte"]["embedding"])


def expected(wrapped, ids):
    return np.concatenate([table(wrapped), rows_of(wrapped)])[np.asarray(ids)]


def with_prompt(wrapped, ids=IDS):
    return jpeft.with_virtual_tokens({"input_ids": ids}, wrapped)["input_ids"]


# ---- the batch ------------------------------------------------------------------------------------------------------


def test_what_a_batch_gets():
    wrapped = fresh()
    mask, types, labels = np.array([[1, 1, 1, 1], [1, 1, 0, 0]]), np.array([[0, 1, 1, 1], [0, 0, 1, 1]]), IDS + 20
    batch = {
        "input_ids": IDS, "attention_mask": mask, "token_type_ids": types, "labels": labels,
        "position_ids": np.arange(4)[None], "start_positions": np.array([1, -1]), "end_positions": np.array([3, 2]),
        "other": "as it is", "nothing": None,
    }  # fmt: skip
    before = dict(batch)
    found = jpeft.with_virtual_tokens(batch, wrapped)
    assert batch == before and found["other"] == "as it is" and found["nothing"] is None
    virtual = np.arange(WORDS, WORDS + COUNT)
    np.testing.assert_array_equal(found["input_ids"], [[*virtual, *row] for row in IDS])
    np.testing.assert_array_equal(found["attention_mask"], [[1, 1, 1, *row] for row in mask])
    np.testing.assert_array_equal(found["token_type_ids"], [[0, 0, 0, *row] for row in types])
    np.testing.assert_array_equal(found["labels"], [[-100, -100, -100, *row] for row in labels])
    np.testing.assert_array_equal(found["position_ids"], [range(7)] * 2)
    np.testing.assert_array_equal(found["start_positions"], [4, -1])
    np.testing.assert_array_equal(found["end_positions"], [6, 5])


def test_a_batch_for_no_prompt_is_left_alone():
    lora = jpeft.wrap(random_like(SHAPES, 7), jpeft.LoraConfig(target_modules=["dense"]))
    assert jpeft.with_virtual_tokens({"x": 1}, lora) == {"x": 1}
    assert jpeft.with_virtual_tokens({"input_ids": IDS}, jpeft.disable_adapters(fresh()))["input_ids"] is IDS


def test_labels_of_sequences_and_of_a_decoder_are_left_alone():
    # Those of as many labels for each text as it has tokens, too.
    for labels, task in ((np.array([0, 1]), "SEQ_CLS"), (IDS * 0.5, "SEQ_CLS"), (IDS, "SEQ_2_SEQ_LM")):
        wrapped = fresh(dataclasses.replace(CONFIG, task_type=task))
        found = jpeft.with_virtual_tokens({"input_ids": IDS, "labels": labels}, wrapped)
        np.testing.assert_array_equal(found["labels"], labels)
        assert found["input_ids"].shape == (2, 4 + COUNT)


def test_prompts_of_an_encoder_and_a_decoder_are_both_there_and_the_first_is_used():
    wrapped = fresh(dataclasses.replace(CONFIG, task_type="SEQ_2_SEQ_LM"))
    assert rows_of(wrapped).shape == (2 * COUNT, FEATURES)
    assert virtual_ids(wrapped) == {"default": range(WORDS, WORDS + 2 * COUNT)}
    np.testing.assert_array_equal(with_prompt(wrapped)[0, :COUNT], range(WORDS, WORDS + COUNT))


def test_rows_have_prompts_of_their_own():
    wrapped, names = two(), ["bb", "__base__"]
    batch = {"input_ids": IDS, "labels": IDS, "attention_mask": np.array([[1, 1, 1, 1], [1, 1, 1, 0]])}
    batch["end_positions"] = np.array([3, 3])
    assert virtual_ids(wrapped) == {"a": range(9, 12), "bb": range(12, 14)}
    left = jpeft.with_virtual_tokens(batch, wrapped, adapter_names=names)
    np.testing.assert_array_equal(left["input_ids"], [[12, 13, *IDS[0], 0], [*IDS[1], 0, 0, 0]])
    np.testing.assert_array_equal(left["attention_mask"], [[1] * 6 + [0], [1, 1, 1, 0, 0, 0, 0]])
    np.testing.assert_array_equal(left["labels"], [[-100, -100, *IDS[0], -100], [*IDS[1], -100, -100, -100]])
    np.testing.assert_array_equal(left["end_positions"], [5, 3])
    right = jpeft.with_virtual_tokens({"input_ids": IDS}, wrapped, adapter_names=names, align="right")
    np.testing.assert_array_equal(right["input_ids"], [[0, 12, 13, *IDS[0]], [0, 0, 0, *IDS[1]]])
    np.testing.assert_array_equal(right["attention_mask"], [[0] + [1] * 6, [0, 0, 0, 1, 1, 1, 1]])
    got = jpeft.lift(lambda params, ids: params["wte"]["embedding"][ids])(wrapped, right["input_ids"])
    whole = np.concatenate([table(wrapped), rows_of(wrapped, "a"), rows_of(wrapped, "bb")])
    np.testing.assert_array_equal(got, whole[np.asarray(right["input_ids"])])


# ---- lookups --------------------------------------------------------------------------------------------------------

LOOKUPS = {
    "indexing": lambda table, ids: table[ids],
    "take, filling": lambda table, ids: jnp.take(table, ids, axis=0, mode="fill"),
    "take, clipping": lambda table, ids: jnp.take(table, ids, axis=0, mode="clip"),
    "at": lambda table, ids: table.at[ids].get(mode="promise_in_bounds"),
    "in another dtype": lambda table, ids: jnp.asarray(table, jnp.float32)[ids].astype(float),
    "under jit": jax.jit(lambda table, ids: table[ids]),
    "under remat": jax.checkpoint(lambda table, ids: table[ids]),
    "a row at a time": lambda table, ids: jax.vmap(lambda row: table[row])(ids),
    "a token at a time": lambda table, ids: jax.lax.map(lambda row: jax.vmap(lambda i: table[i])(row), ids),
    "features first": lambda table, ids: jnp.moveaxis(table.T[:, ids], 0, -1),
    "heads": lambda table, ids: table.reshape(WORDS, 2, 3)[ids].reshape(*ids.shape, FEATURES),
    "unsigned ids": lambda table, ids: table[ids.astype(jnp.uint32)],
}


@pytest.mark.parametrize("name", LOOKUPS)
def test_every_lookup_finds_the_prompt(name):
    wrapped = fresh()
    ids = with_prompt(wrapped)

    def apply(params, ids):
        return LOOKUPS[name](params["wte"]["embedding"], ids)

    for run in (jpeft.lift(apply), jax.jit(jpeft.lift(apply))):
        tolerance = 1e-6 if name == "in another dtype" else 0
        np.testing.assert_allclose(run(wrapped, ids), expected(wrapped, ids), atol=tolerance)
    # The gradient is that of the rows, as often as they were looked up.
    gradient = jpeft.grad(lambda w, ids: jnp.sum(jpeft.lift(apply)(w, ids) * 2.0))(wrapped, ids)
    np.testing.assert_allclose(gradient.adapters["default"].shared["prompt_embeddings"], 4.0, rtol=1e-6)
    (use,) = jpeft.explain(apply, wrapped, ids).uses
    assert (use.module, use.how) == ("wte", "lookup")


def test_ids_that_nobody_has_are_what_they_were():
    wrapped, ids = fresh(), np.array([[WORDS + COUNT, 40]])
    for mode in ("fill", "clip"):

        def apply(params, ids, mode=mode):
            return jnp.take(params["wte"]["embedding"], ids, axis=0, mode=mode)

        np.testing.assert_array_equal(jpeft.lift(apply)(wrapped, ids), apply(wrapped.base, ids))


def test_a_tied_output_layer_does_not_see_the_prompt():
    wrapped = fresh()
    ids = with_prompt(wrapped)

    def apply(params, ids):
        return jnp.tanh(params["wte"]["embedding"][ids] @ params["dense"]["kernel"]) @ params["wte"]["embedding"].T

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = jax.jit(jpeft.lift(apply))(wrapped, ids)
    hidden = np.tanh(expected(wrapped, ids) @ np.asarray(wrapped.base["dense"]["kernel"]))
    np.testing.assert_allclose(got, hidden @ table(wrapped).T, atol=1e-12)


def test_what_else_acts_on_the_table_acts_on_the_text_alone():
    def apply(params, ids):
        return params["wte"]["embedding"][ids]

    others = {
        "lora": jpeft.LoraConfig(r=2, target_modules=["wte"]),
        "rows": jpeft.TrainableTokensConfig(token_indices=[1, 7]),
        "full": jpeft.LoraConfig(r=2, target_modules=["dense"], modules_to_save=["wte"]),
        "bare": jpeft.LoraConfig(r=2, target_modules=["dense"], trainable_token_indices={"wte": [5]}),
    }
    for name, config in others.items():
        wrapped = fresh(config, fresh(), adapter_name=name)
        ids = with_prompt(wrapped)
        for order in ((name, "default"), ("default", name)):
            active = jpeft.set_adapter(wrapped, order)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="the function uses no weight of")
                got = np.asarray(jax.jit(jpeft.lift(apply))(active, ids))
                text = np.asarray(jpeft.lift(apply)(jpeft.set_adapter(wrapped, name), IDS))
            np.testing.assert_allclose(got[:, :COUNT], [rows_of(wrapped)] * 2)
            np.testing.assert_allclose(got[:, COUNT:], text, atol=1e-12)
            assert name == "bare" or np.abs(text - table(wrapped)[IDS]).max() > 0.01


def test_maps_scans_and_meshes():
    wrapped = fresh()
    ids = with_prompt(wrapped)
    apply = jpeft.lift(lambda params, ids: params["wte"]["embedding"][ids] @ params["dense"]["kernel"])
    want = expected(wrapped, ids) @ np.asarray(wrapped.base["dense"]["kernel"])
    np.testing.assert_allclose(jax.vmap(apply, in_axes=(None, 0))(wrapped, ids), want, atol=1e-12)
    _, scanned = jax.lax.scan(lambda carry, row: (carry, apply(wrapped, row)), 0, ids)
    np.testing.assert_allclose(scanned, want, atol=1e-12)
    mesh = Mesh(np.array(jax.devices()[:2]), ("data",))
    placed = jax.device_put(wrapped, jpeft.shardings(wrapped, mesh, base=[(".*", P())]))
    rows = jax.device_put(ids, jax.NamedSharding(mesh, P("data")))
    np.testing.assert_allclose(jax.jit(apply)(placed, rows), want, atol=1e-12)


def test_it_trains_alone_and_compiles_once():
    wrapped, compiled = fresh(), []
    apply = jpeft.lift(lambda params, ids: params["wte"]["embedding"][ids] @ params["dense"]["kernel"])
    tx = optax.masked(optax.sgd(0.1), jpeft.trainable_mask)

    @jax.jit
    def step(wrapped, state):
        compiled.append(None)

        def loss(wrapped):
            return jnp.sum(jnp.tanh(apply(wrapped, with_prompt(wrapped))))

        updates, state = tx.update(jpeft.grad(loss)(wrapped), state, wrapped)
        return optax.apply_updates(wrapped, updates), state

    stepped, state = step(wrapped, tx.init(wrapped))
    stepped, _ = step(stepped, state)
    assert len(compiled) == 1 and jpeft.count_parameters(wrapped)[0] == COUNT * FEATURES
    moved = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), stepped, wrapped)
    assert moved == jpeft.trainable_mask(wrapped)


def test_a_prompt_begins_as_it_is_asked_to():
    params = random_like(SHAPES, 7)
    rows = {}
    for how, options in {"RANDOM": {}, "SAMPLE_VOCAB": {}, "TEXT": {"prompt_tuning_init_ids": [4, 1]}}.items():
        config = dataclasses.replace(CONFIG, prompt_tuning_init=how, **options)
        rows[how] = rows_of(jpeft.wrap(params, config, dtype=jnp.float64))
        again = jpeft.wrap(params, config, dtype=jnp.float64, rng=jax.random.key(4))
        assert (how == "TEXT") == np.array_equal(rows[how], rows_of(again))
        shape = jpeft.wrap(jax.eval_shape(lambda: params), config).adapters["default"].shared["prompt_embeddings"]
        assert (shape.shape, shape.dtype) == ((COUNT, FEATURES), jnp.float32)
    own = np.asarray(params["wte"]["embedding"])
    np.testing.assert_allclose(rows["TEXT"], own[[4, 1, 4]], atol=1e-7)
    assert all(np.abs(row - own).max(1).min() < 1e-7 for row in rows["SAMPLE_VOCAB"])
    assert 0.3 < rows["RANDOM"].std() < 2


# ---- bad input ------------------------------------------------------------------------------------------------------

BAD_CONFIGS = {
    "num_virtual_tokens is None": {"num_virtual_tokens": None},
    r"token_dim is 5, but the rows of 'wte.embedding', the model's table of tokens, have 6": {"token_dim": 5},
    r"begins with the tokens \[9\], but 'wte.embedding' has 9 rows": {
        "prompt_tuning_init": "TEXT", "prompt_tuning_init_ids": [9],
    },
    r"begins with the tokens \[\]": {"prompt_tuning_init": "TEXT", "prompt_tuning_init_ids": []},
    "jpeft reads no tokenizer": {
        "prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "a", "tokenizer_name_or_path": "b",
    },
}  # fmt: skip


@pytest.mark.parametrize("message", BAD_CONFIGS)
def test_configs_that_do_not_fit_the_model(message):
    with pytest.raises(ValueError, match=message):
        fresh(dataclasses.replace(CONFIG, **BAD_CONFIGS[message]))


def test_configs_that_fit_no_model():
    for options, error, message in (
        ({"num_virtual_tokens": 0}, ValueError, "num_virtual_tokens is 0; expected a whole number of at least 1"),
        ({"num_layers": True}, ValueError, "num_layers is True"),
        ({"modules_to_save": "head"}, TypeError, "modules_to_save is 'head'; expected a list"),
        ({"prompt_tuning_init": "WORDS"}, ValueError, "prompt_tuning_init is 'WORDS'; expected 'RANDOM'"),
        ({"prompt_tuning_init": "TEXT"}, ValueError, "expected prompt_tuning_init_text and tokenizer_name_or_path"),
    ):
        with pytest.raises(error, match=message):
            jpeft.PromptTuningConfig(**options)


def test_models_without_a_lookup():
    with pytest.raises(ValueError, match="the tree has no table: none among dense"):
        fresh(params={"dense": {"kernel": jnp.ones((4, 4))}})
    tables = {"first": {"embedding": jnp.ones((4, 4))}, "second": {"embedding": jnp.ones((4, 4))}}
    with pytest.raises(ValueError, match="which table holds the tokens is not known among: first, second"):
        fresh(params=tables)
    named = fresh(params={"first": {"kernel": jnp.ones((4, 3))}}, layouts={"first": "vo"})
    assert list(named.adapters["default"].sites) == ["first"]
    with pytest.raises(ValueError, match="multiplies 'wte.embedding' with what stands for its tokens"):
        one_hot = jpeft.lift(lambda params, ids: jax.nn.one_hot(ids, WORDS) @ params["wte"]["embedding"])
        one_hot(fresh(), IDS)
    with pytest.raises(ValueError, match=r"'wte.embedding' is no change of a weight.*merged: mul"):
        jpeft.lift(lambda params, ids: (params["wte"]["embedding"] * 2.0)[ids])(fresh(), IDS)


def test_a_prompt_is_not_merged_mixed_or_converted():
    with pytest.raises(ValueError, match="adapter 'a' is a soft prompt, whose tokens tell it from others"):
        jpeft.mixed_batch(two())
    with pytest.raises(TypeError, match="PromptTuningConfig adapts no module that LoRA could"):
        jpeft.convert_to_lora(fresh(), "default", 2, "lora")
    with pytest.raises(ValueError, match="adapter 'default' of PromptTuningConfig is no change of a weight"):
        jpeft.merge(fresh())
    with pytest.raises(ValueError, match="a prompt at 'wte' is no change of a weight"):
        jpeft._contract.method_of(CONFIG).merge({}, None, None, fresh().adapters["default"].sites["wte"])


def test_batches_that_do_not_fit():
    wrapped = two()
    with pytest.raises(ValueError, match="the batch has labels, and no input_ids, before which.*'a', 'bb'"):
        jpeft.with_virtual_tokens({"labels": IDS}, wrapped)
    for ids in (IDS[0], IDS.astype(float)):
        with pytest.raises(ValueError, match=r"input_ids are \w+ of shape .*; expected integers"):
            jpeft.with_virtual_tokens({"input_ids": ids}, fresh())
    with pytest.raises(ValueError, match="the prompts of 'a', 'bb' are active; expected adapter_names"):
        jpeft.with_virtual_tokens({"input_ids": IDS}, wrapped)
    for names in (["a"], ["a", "c"], "ab"):
        with pytest.raises(ValueError, match="expected one a row, each among the active prompts: a, bb, __base__"):
            jpeft.with_virtual_tokens({"input_ids": IDS}, wrapped, adapter_names=names)
    with pytest.raises(ValueError, match="align is 'middle'; expected 'left' or 'right'"):
        jpeft.with_virtual_tokens({"input_ids": IDS}, fresh(), align="middle")
