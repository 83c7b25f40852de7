"""Hot-swapping: the values of another adapter in a compiled function's slot; what is saved then says the truth."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft
import jpeft_interop
from jpeft._params import Sites
from tests.harness import random_like

SHAPES = {
    "embed": {"embedding": (7, 4)},
    "query": {"kernel": (4, 6), "bias": (6,)},
    "conv": {"kernel": (3, 3, 1, 2)},
    "layers": {"0:3": {"mlp": {"kernel": (3, 6, 6)}}},
    "head": {"kernel": (6, 3)},
}
PARAMS = random_like(SHAPES, 7)
IDS = np.array([[1, 2, 3], [0, 6, 6]], np.int32)
EVERY = ["embed", "query", "conv", "mlp", "head"]


def function(params, ids):
    x = params["embed"]["embedding"][ids]
    numbers = ("NHWC", "HWIO", "NHWC")
    image = (x[:, None] + x[:, :, None])[..., :1]
    seen = jax.lax.conv_general_dilated(image, params["conv"]["kernel"], (1, 1), "SAME", dimension_numbers=numbers)
    y = x @ params["query"]["kernel"] + params["query"]["bias"] + seen.sum()
    y, _ = jax.lax.scan(lambda c, w: (jnp.tanh(c @ w), None), y, params["layers"]["0:3"]["mlp"]["kernel"])
    return y @ params["head"]["kernel"]


def adapter(seed=1, params=PARAMS, **options):
    wrapped = jpeft.wrap(params, jpeft.LoraConfig(**{"r": 4, "target_modules": EVERY, **options}))
    own = wrapped.adapters["default"]
    random = {"weights": random_like(own.weights, 50 * seed), "replaced": random_like(own.replaced, seed)}
    return dataclasses.replace(wrapped, adapters={"default": dataclasses.replace(own, **random)})


lifted = jpeft.lift(function)
NEW = {
    "other values": {},
    "another alpha": {"lora_alpha": 32},
    "rank-stabilised": {"lora_alpha": 3, "use_rslora": True},
    "a lower rank": {"r": 2, "lora_alpha": 5},
    "ranks and alphas by pattern": {"r": 3, "rank_pattern": {"mlp": 1}, "alpha_pattern": {"query": 7, "head": 2}},
    "fewer modules": {"r": 3, "target_modules": ["query", "mlp"]},
    "one module, other initial values": {"target_modules": r".*embed", "init_lora_weights": False},
}


@pytest.fixture(scope="module")
def compiled():
    return jax.jit(lifted)


@pytest.mark.parametrize("options", NEW.values(), ids=NEW)
def test_a_swap_computes_the_new_adapter_and_compiles_nothing(options, compiled, tmp_path):
    slot, new = adapter(2), adapter(3, **options)
    before = compiled(slot, IDS)
    swapped = jpeft.hotswap(slot, "default", new)
    got = compiled(swapped, IDS)
    assert compiled._cache_size() == 1
    want = function(jpeft.merge(new), IDS)
    assert np.abs(want - before).max() > 1e-2
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=1e-5)
    assert swapped.base is slot.base and slot.adapters["default"].config == swapped.adapters["default"].config

    exact = jpeft.trimmed(swapped, "default").adapters["default"]
    own = new.adapters["default"]
    assert exact.sites == own.sites and jax.tree.map(jnp.shape, exact.weights) == jax.tree.map(jnp.shape, own.weights)
    jax.tree.map(np.testing.assert_array_equal, (exact.weights, exact.scaling), (own.weights, own.scaling))
    # The config alone says as much: a file, which holds no scaling, gives the adapter back.
    jpeft_interop.save_pretrained(jpeft.trimmed(swapped, "default"), tmp_path)
    back = jpeft_interop.load_pretrained(PARAMS, tmp_path).adapters["default"]
    jax.tree.map(np.testing.assert_array_equal, (back.weights, back.scaling), (own.weights, own.scaling))
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] in {max(1, r) for r in ranks(own)}


def ranks(adapter):
    return {leaf.shape[-1] if "B" in name else 0 for own in adapter.weights.values() for name, leaf in own.items()} | {
        adapter.config.r
    }


def test_there_and_back_again(compiled):
    slot, low = adapter(2), adapter(3, r=2, target_modules=["query"])
    back = jpeft.hotswap(jpeft.hotswap(slot, "default", low), "default", slot.adapters["default"])
    jax.tree.map(np.testing.assert_array_equal, back, slot)


def test_room_for_higher_ranks(tmp_path):
    low, high = adapter(2, r=2, alpha_pattern={"query": 3}), adapter(3, r=6)
    wide = jpeft.prepare_for_hotswap(low, "default", rank=8)
    compiled = jax.jit(jpeft.lift(function))  # one of its own, whose compilations are counted
    np.testing.assert_allclose(compiled(wide, IDS), lifted(low, IDS), rtol=1e-5, atol=1e-6)
    got = compiled(jpeft.hotswap(wide, "default", high), IDS)
    np.testing.assert_allclose(got, function(jpeft.merge(high), IDS), rtol=2e-5, atol=1e-5)
    assert compiled._cache_size() == 1
    # What was made room in can be saved as it is: the file's rank is that of its arrays, its alpha gives the scaling.
    jpeft_interop.save_pretrained(wide, tmp_path)
    back = jpeft_interop.load_pretrained(PARAMS, tmp_path).adapters["default"]
    jax.tree.map(np.testing.assert_array_equal, back.scaling, low.adapters["default"].scaling)
    assert back.config.r == 8


def shapes(wrapped):
    return jax.tree.map(jnp.shape, wrapped.adapters["default"].weights)


def test_room_in_an_abstract_adapter_and_swaps_of_abstract_ones():
    abstract = jax.eval_shape(lambda: PARAMS)
    low, high = (jpeft.wrap(abstract, jpeft.LoraConfig(r=r, target_modules=EVERY)) for r in (2, 4))
    wide = jpeft.prepare_for_hotswap(low, "default", rank=4)
    assert shapes(wide) == shapes(high)
    swapped = jpeft.hotswap(high, "default", adapter(1, r=2, target_modules=["query"]).adapters["default"])
    assert shapes(swapped) == shapes(high)


def test_a_swap_stays_on_the_devices_of_the_slot():
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("x",))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    slot = jax.device_put(adapter(2), everywhere)
    swapped = jpeft.hotswap(slot, "default", adapter(3))
    assert {leaf.sharding for leaf in jax.tree.leaves(swapped.adapters)} == {everywhere}


def test_names_of_modules_that_end_like_others_keep_ranks_of_their_own():
    params = random_like({"q": {"kernel": (4, 4)}, "deep": {"q": {"kernel": (4, 4)}}}, 3)
    slot = adapter(1, params, r=3, target_modules=["q"])
    low = adapter(2, params, r=2, target_modules=["q"], rank_pattern={r"^q": 1}, alpha_pattern={r"deep\.q": 5})
    exact = jpeft.trimmed(jpeft.hotswap(slot, "default", low), "default").adapters["default"]
    again = jpeft.wrap(params, exact.config).adapters["default"]
    assert jax.tree.map(jnp.shape, again.weights) == jax.tree.map(jnp.shape, low.adapters["default"].weights)
    jax.tree.map(np.testing.assert_array_equal, again.scaling, low.adapters["default"].scaling)
    # "q" alone as a target would mean "deep.q" as well, so that the latter stays, at rank 1.
    shallow = adapter(2, params, r=2, target_modules=r"q")
    kept = jpeft.trimmed(jpeft.hotswap(slot, "default", shallow), "default").adapters["default"]
    assert {path: own["lora_A"].shape[0] for path, own in kept.weights.items()} == {"q": 2, "deep.q": 1}


def refusals():
    slot = adapter(2)
    single = slot.adapters["default"]
    two = jpeft.wrap(slot, jpeft.LoraConfig(target_modules=["query"]), adapter_name="other")
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), single)
    narrow = dataclasses.replace(slot, adapters={"default": half})
    uneven = dataclasses.replace(single, scaling={**single.scaling, "layers.0:3.mlp": jnp.arange(3.0)})

    def swap(**options):
        return lambda: jpeft.hotswap(slot, "default", adapter(3, **options))

    return {
        "expected at least one, all of them among": lambda: jpeft.hotswap(slot, "absent", slot),
        "parameters with the adapters \\['default', 'other'\\]": lambda: jpeft.hotswap(slot, "default", two),
        "new is dict": lambda: jpeft.hotswap(slot, "default", {}),
        "prepare_for_hotswap": swap(r=5),
        "'query.lora_A' has the shape \\(5, 4\\), the slot's \\(4, 4\\)": swap(rank_pattern={"query": 5}),
        "acts on head, which the slot does not have": lambda: jpeft.hotswap(
            adapter(1, target_modules=["query"]), "default", adapter(3, target_modules=["query", "head"])
        ),
        "lora_dropout=0.5 instead of 0.0": swap(lora_dropout=0.5),
        "modules_to_save=\\('head',\\) instead of None": swap(target_modules=["query"], modules_to_save=["head"]),
        "use_dora=True instead of False": swap(target_modules=["query"], use_dora=True),
        "expected a dtype no wider": lambda: jpeft.hotswap(narrow, "default", adapter(3)),
        "are higher; expected at least those": lambda: jpeft.prepare_for_hotswap(slot, "default", rank=3),
        "looks at values": lambda: jpeft.trimmed(jax.eval_shape(lambda: slot), "default"),
        "have the scalings \\[0.0, 1.0, 2.0\\]": lambda: jpeft.trimmed(
            dataclasses.replace(slot, adapters={"default": uneven}), "default"
        ),
    }


def test_what_changes_the_mathematics_is_refused(tmp_path):
    for text, call in refusals().items():
        with pytest.raises(ValueError, match=text):
            call()


def test_a_method_without_a_rank_or_of_another_class_is_refused():
    from tests.cases import DenseDeltaConfig

    dense = jpeft.wrap(PARAMS, DenseDeltaConfig(target_modules=["query"]))
    with pytest.raises(ValueError, match="no product of two thin factors"):
        jpeft.hotswap(dense, "default", dense)
    with pytest.raises(ValueError, match="the new one a DenseDeltaConfig"):
        jpeft.hotswap(adapter(1), "default", dense)
    # An adapter of no modules at all empties the slot.
    rankless = dataclasses.replace(adapter(1).adapters["default"], weights={}, scaling={}, sites=Sites({}))
    emptied = jpeft.hotswap(adapter(1), "default", rankless).adapters["default"]
    assert not any(leaf.any() for leaf in jax.tree.leaves(emptied.weights))


def test_other_full_copies_are_refused():
    saved, new = (adapter(seed, target_modules=["query"], modules_to_save=["head"]) for seed in (1, 2))
    swapped = jpeft.hotswap(saved, "default", new)
    np.testing.assert_allclose(lifted(swapped, IDS), lifted(new, IDS), rtol=1e-6)
    rows = adapter(1, target_modules=["query"], modules_to_save=["head"], trainable_token_indices=[1, 2])
    with pytest.raises(ValueError, match="trainable_token_indices=.* instead of None"):
        jpeft.hotswap(saved, "default", rows)
    torn = dataclasses.replace(rows.adapters["default"], config=saved.adapters["default"].config)
    with pytest.raises(ValueError, match="the two train other rows of tables"):
        jpeft.hotswap(saved, "default", torn)
    without = dataclasses.replace(new.adapters["default"], replaced={})
    with pytest.raises(ValueError, match="as nothing stands for a copy that is not there"):
        jpeft.hotswap(saved, "default", without)


def test_a_file_that_would_be_another_adapter_is_not_written(tmp_path):
    swapped = jpeft.hotswap(adapter(1), "default", adapter(2, lora_alpha=32))
    with pytest.raises(ValueError, match="as after jpeft.hotswap; expected jpeft.trimmed"):
        jpeft_interop.save_pretrained(swapped, tmp_path)
    with pytest.raises(ValueError, match="a mixture of adapters has no file of its own"):
        jpeft_interop.save_pretrained(jpeft.mixed_batch(adapter(1)), tmp_path, selected_adapters=["mixed"])
    assert not list(tmp_path.iterdir())
