"""What holds for every method that chooses its own place, over the table BESIDE: a new method is one row there."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jpeft
import jpeft_interop
from jpeft._contract import method_of
from tests.cases import METHODS
from tests.interop.beside_cases import (
    BATCH,
    BESIDE,
    IDS,
    VISIBLE,
    VOCABULARY,
    bare_logits,
    drawn,
    fresh,
    logits_of,
    model,
    outputs,
    running,
)

over_rows = pytest.mark.parametrize("row", BESIDE, ids=lambda row: row.name)


def leaves(wrapped):
    """{path: array} of an adapter."""
    adapter = wrapped.adapters["default"]
    pairs = jax.tree_util.tree_leaves_with_path((adapter.weights, adapter.shared))
    return {jax.tree_util.keystr(path): leaf for path, leaf in pairs}


def test_every_method_of_peft_is_in_a_table():
    parts = {jpeft.PeftType.LN_TUNING, jpeft.PeftType.TRAINABLE_TOKENS}  # tests/methods/test_parts.py
    named = {row.config(**row.options).peft_type for row in METHODS if row.file}
    assert {*named, *(row.built().peft_type for row in BESIDE), *parts} == set(jpeft.PeftType)


@over_rows
def test_a_fresh_adapter_changes_nothing_or_says_so_and_a_random_one_does(row):
    begins = np.abs(logits_of(row, fresh(row)) - bare_logits()).max()
    assert begins <= 1e-6 if row.neutral else begins > 1e-3
    assert np.abs(logits_of(row, drawn(fresh(row))) - bare_logits()).max() > 1e-3


@over_rows
def test_a_disabled_one_asks_for_nothing(row):
    off = jpeft.disable_adapters(fresh(row))
    prepared, given = jpeft_interop.prepare_inputs(model(), off, BATCH)
    assert prepared is off and given.keys() == BATCH.keys() and all(given[name] is BATCH[name] for name in BATCH)


@over_rows
def test_the_gradient_reaches_what_trains_and_training_moves_it_alone_and_compiles_once(row):
    wrapped, compiled = drawn(fresh(row)), []
    tx = optax.masked(optax.sgd(1e-2), jpeft.trainable_mask)

    @jax.jit
    def step(wrapped, state):
        compiled.append(None)
        gradient = jpeft.grad(lambda wrapped: outputs(row, wrapped, model(), BATCH).loss)(wrapped)
        updates, state = tx.update(gradient, state, wrapped)
        return optax.apply_updates(wrapped, updates), state, gradient

    stepped, state, gradient = step(wrapped, tx.init(wrapped))
    again, _, _ = step(stepped, state)
    assert len(compiled) == 1
    mask, reached = leaves(jpeft.trainable_mask(wrapped)), leaves(gradient)
    wanted = {path: trains and not any(part in path for part in row.still) for path, trains in mask.items()}
    assert {path: leaf.ndim > 0 and bool(jnp.any(leaf != 0)) for path, leaf in reached.items()} == wanted
    assert any(wanted.values()) and not any(jnp.any(leaf != 0) for leaf in jax.tree.leaves(gradient.base))
    moved = {path: not np.array_equal(leaf, leaves(again)[path]) for path, leaf in leaves(wrapped).items()}
    assert moved == wanted
    assert all(np.array_equal(*pair) for pair in zip(*map(jax.tree.leaves, (again.base, wrapped.base)), strict=True))


@over_rows
def test_an_abstract_adapter_has_the_same_shapes(row):
    def shapes(wrapped):
        return {path: (leaf.shape, leaf.dtype) for path, leaf in leaves(wrapped).items()}

    abstract = fresh(row, abstract=True)
    assert shapes(abstract) == shapes(fresh(row))
    whole = dataclasses.replace(abstract, base=jax.eval_shape(lambda: model().params))
    logits, loss = jax.eval_shape(running(row.name), whole)
    assert logits.shape == (*IDS.shape, VOCABULARY) and loss.shape == ()


@over_rows
def test_a_row_by_itself_rematerialised_in_a_map_is_what_it_is_in_a_batch(row):
    wrapped = drawn(fresh(row))
    context = {name: jnp.asarray(value) for name, value in row.context.items()}
    batch = {name: jnp.asarray(value) for name, value in BATCH.items() if name != "labels"}

    @jax.checkpoint
    def one(entries):
        batch, context = jax.tree.map(lambda array: array[None], entries)
        alone = dataclasses.replace(row, context=context)
        return outputs(alone, wrapped, model(), batch).logits[0, -IDS.shape[1] :]

    got = np.asarray(jax.jit(lambda: jax.lax.map(one, (batch, context)))())[VISIBLE]
    np.testing.assert_allclose(got, logits_of(row, wrapped), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("row", [row for row in BESIDE if not row.experts], ids=lambda row: row.name)
def test_what_is_saved_comes_back_bit_for_bit_trains_on_and_fits_stacked_layers(row, tmp_path):
    wrapped = drawn(fresh(row))
    jpeft_interop.save_pretrained(wrapped, tmp_path / "first")
    found = jpeft_interop.load_pretrained(model().params, tmp_path / "first", is_trainable=True)
    mine, theirs = leaves(found), leaves(wrapped)
    assert mine.keys() == theirs.keys() and all(np.array_equal(mine[path], theirs[path]) for path in mine)
    assert leaves(jpeft.trainable_mask(found)) == leaves(jpeft.trainable_mask(wrapped))
    fixed = jpeft_interop.load_pretrained(model().params, tmp_path / "first")
    assert not any(jax.tree.leaves(jpeft.trainable_mask(fixed).adapters))
    np.testing.assert_allclose(logits_of(row, fixed), logits_of(row, wrapped), rtol=1e-5, atol=1e-6)
    stacked = jpeft_interop.load_pretrained(model(scan_layers=True).params, tmp_path / "first")
    got = logits_of(row, stacked, scan_layers=True)
    np.testing.assert_allclose(got, logits_of(row, wrapped), rtol=1e-4, atol=1e-5)
    for index, again in enumerate((found, fixed, stacked)):
        jpeft_interop.save_pretrained(again, tmp_path / f"again{index}")
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            first = (tmp_path / "first" / name).read_bytes()
            assert (tmp_path / f"again{index}" / name).read_bytes() == first


@over_rows
def test_it_chooses_its_place_and_has_nothing_to_merge(row):
    method = method_of(row.built())
    assert method.begin is not None and not method.selects
    with pytest.raises(ValueError, match="no merged weight stands for it"):
        jpeft.merge(fresh(row))
