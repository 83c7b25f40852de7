"""Prefix tuning and cartridges: how rows hold keys and values, what trains, what a cache makes of them, bad input."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jpeft

SIZES: dict[str, Any] = {"num_virtual_tokens": 3, "token_dim": 6, "num_attention_heads": 2, "num_layers": 4}
BASE = {"query": {"kernel": jnp.eye(6)}}
KEY = jax.random.key(5)


def wrapped_with(config, **options):
    return jpeft.wrap(BASE, config, rng=KEY, **options)


def prefix_tuning(**settings):
    return wrapped_with(jpeft.PrefixTuningConfig(**{**SIZES, **settings}))


def cartridge(**settings):
    return wrapped_with(jpeft.CartridgeConfig(**{**SIZES, **settings}))


def shared(params, name="default"):
    return {key: np.asarray(array) for key, array in params.adapters[name].shared.items()}


def by_layer(rows):
    """Keys and values (layers, n, heads, head_dim) of rows, in numpy."""
    whole = rows.reshape(len(rows), SIZES["num_layers"], 2, 2, 3)
    return whole[:, :, 0].swapaxes(0, 1), whole[:, :, 1].swapaxes(0, 1)


def assert_same(got, want):
    for one, other in zip(got, want, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6)


def test_rows_hold_keys_then_values_layer_by_layer():
    params = prefix_tuning()
    assert_same(jpeft.key_value_prefix(params), by_layer(shared(params)["prompt_embeddings"]))
    params = cartridge(num_frozen_tokens=2)
    own = shared(params)
    rows = np.concatenate([own["frozen_embedding"], own["trainable_embedding"]])
    assert own["frozen_embedding"].shape == (2, 48)
    assert_same(jpeft.key_value_prefix(params), by_layer(rows))


def test_a_projection_makes_the_rows():
    params = prefix_tuning(prefix_projection=True, encoder_hidden_size=5)
    own = shared(params)
    hidden = np.tanh(own["embedding.weight"] @ own["transform.0.weight"].T + own["transform.0.bias"])
    rows = hidden @ own["transform.2.weight"].T + own["transform.2.bias"]
    assert_same(jpeft.key_value_prefix(params), by_layer(rows))
    assert {key: array.shape for key, array in own.items()} == {
        "embedding.weight": (3, 6), "transform.0.weight": (5, 6), "transform.0.bias": (5,),
        "transform.2.weight": (48, 5), "transform.2.bias": (48,),
    }  # fmt: skip
    assert np.abs(own["transform.0.weight"]).max() <= 6**-0.5 and np.abs(own["transform.2.weight"]).max() <= 5**-0.5
    config: Any = prefix_tuning(prefix_projection=True).adapters["default"].config
    assert config.encoder_hidden_size == 6
    for settings in ({}, {"prefix_projection": True}):
        assert not any(array.any() for array in jpeft.key_value_prefix(prefix_tuning(init_weights="zero", **settings)))
    alone = prefix_tuning(prefix_projection=True, inference_mode=True)
    assert list(shared(alone)) == ["prompt_embeddings"]


def test_layers_of_an_encoder_decoder_share_as_in_peft():
    """PEFT's own rows, written down twice and cut into as many pieces as there are layers: 0, 2, 0, 2."""
    settings = {"task_type": "SEQ_2_SEQ_LM"}
    for params in (prefix_tuning(**settings), cartridge(num_frozen_tokens=0, **settings)):
        (rows,) = shared(params).values()
        twice = np.tile(rows.reshape(3, 8, 2, 3), (1, 2, 1, 1)).transpose(1, 2, 0, 3)
        pieces = np.split(twice, SIZES["num_layers"])
        for part, found in enumerate(jpeft.key_value_prefix(params)):
            np.testing.assert_array_equal(found, np.stack([piece[part] for piece in pieces]).swapaxes(1, 2))
        own = dataclasses.replace(params.adapters["default"].config, num_transformer_submodules=1)
        adapter = dataclasses.replace(params.adapters["default"], config=own)
        alone = dataclasses.replace(params, adapters={"default": adapter})
        assert_same(jpeft.key_value_prefix(alone), by_layer(rows))


@pytest.mark.parametrize("params", [
    prefix_tuning(), prefix_tuning(prefix_projection=True), cartridge(num_frozen_tokens=1),
], ids=["rows", "projection", "cartridge"])  # fmt: skip
def test_training_moves_what_trains_alone(params):
    """With decay, too, which would shrink frozen rows whose gradient is zero."""
    tx = optax.masked(optax.chain(optax.add_decayed_weights(0.5), optax.sgd(0.1)), jpeft.trainable_mask)

    def loss(params):
        keys, values = jpeft.key_value_prefix(params)
        return (keys * jnp.cos(values)).sum()

    gradients = jax.jit(jpeft.grad(loss))(params)
    updates, _ = tx.update(gradients, tx.init(params), params)
    after = optax.apply_updates(params, updates)
    for name, before in shared(params).items():
        moved = not np.array_equal(before, shared(after)[name])
        assert moved == (name != "frozen_embedding")
        if moved:
            assert np.asarray(gradients.adapters["default"].shared[name]).any()
    if "frozen_embedding" in shared(params):
        return

    def along(step):
        moved = {name: array + step * jnp.sin(array) for name, array in params.adapters["default"].shared.items()}
        adapter = dataclasses.replace(params.adapters["default"], shared=moved)
        return loss(dataclasses.replace(params, adapters={"default": adapter}))

    own = gradients.adapters["default"].shared
    slope = sum(float((own[name] * jnp.sin(array)).sum()) for name, array in params.adapters["default"].shared.items())
    np.testing.assert_allclose((along(1e-2) - along(-1e-2)) / 2e-2, slope, rtol=1e-2)


def test_abstract_bases_and_other_dtypes():
    base = {"query": {"kernel": jax.ShapeDtypeStruct((6, 6), jnp.bfloat16)}}
    for config in (jpeft.PrefixTuningConfig(**SIZES), jpeft.CartridgeConfig(**SIZES)):
        abstract = jpeft.wrap(base, config).adapters["default"].shared
        real = jpeft.wrap(BASE, config, dtype=jnp.bfloat16).adapters["default"].shared
        assert {name: array.shape for name, array in abstract.items()} == {n: a.shape for n, a in real.items()}
        assert all(array.dtype == jnp.bfloat16 for array in real.values())


def test_a_prefix_begins_as_a_cache():
    random = np.random.default_rng(0)
    cache = random.normal(size=(4, 2, 5, 2, 3)).astype(np.float32)
    starts = [prefix_tuning(), cartridge(), cartridge(num_frozen_tokens=0), cartridge(inference_mode=True)]
    for params in starts:
        for given in (cache, (cache[:, 0], cache[:, 1])):
            made = jpeft.initialize_kv_prefix_from_past_key_values(params, given)
            assert_same(jpeft.key_value_prefix(made), (cache[:, 0, :3], cache[:, 1, :3]))
            assert jax.tree.structure(made) == jax.tree.structure(params)
    assert shared(jpeft.initialize_kv_prefix_from_past_key_values(starts[1], cache))["frozen_embedding"].shape[0] == 1


def test_cartridges_follow_one_another():
    params = wrapped_with(jpeft.CartridgeConfig(**SIZES, num_frozen_tokens=2), adapter_name="a")
    other = jpeft.CartridgeConfig(**{**SIZES, "num_virtual_tokens": 4}, num_frozen_tokens=1)
    params = jpeft.wrap(params, other, adapter_name="b")
    both = jpeft.compose_cartridges(params, ["b", "a"], "both")
    parts = [jpeft.key_value_prefix(both, name) for name in ("b", "a")]
    wanted = tuple(np.concatenate(pair, axis=1) for pair in zip(*parts, strict=True))
    assert_same(jpeft.key_value_prefix(both, "both"), wanted)
    assert both.adapters["both"].config == dataclasses.replace(both.adapters["b"].config, num_virtual_tokens=7)
    assert shared(both, "both")["frozen_embedding"].shape[0] == 1 and both.active == ("a",)


CONFIGS = {
    "init_weights": (jpeft.PrefixTuningConfig, {"init_weights": "ones"}, "init_weights is 'ones'; expected None"),
    "encoder": (jpeft.PrefixTuningConfig, {"encoder_hidden_size": 0}, "encoder_hidden_size is 0; expected a whole"),
    "frozen": (jpeft.CartridgeConfig, {"num_frozen_tokens": 4}, "num_frozen_tokens is 4; .* num_virtual_tokens=3"),
    "negative": (jpeft.CartridgeConfig, {"num_frozen_tokens": -1}, "num_frozen_tokens is -1; expected a whole number"),
}


@pytest.mark.parametrize(("config", "settings", "message"), CONFIGS.values(), ids=CONFIGS)
def test_bad_settings(config, settings, message):
    with pytest.raises(ValueError, match=message):
        config(**{**SIZES, **settings})


def test_sizes_that_are_missing_or_do_not_fit():
    with pytest.raises(ValueError, match="lacks token_dim, num_layers; expected the sizes of the model's keys"):
        wrapped_with(jpeft.PrefixTuningConfig(num_virtual_tokens=3, num_attention_heads=2))
    with pytest.raises(ValueError, match="CartridgeConfig lacks num_virtual_tokens;"):
        wrapped_with(jpeft.CartridgeConfig(**{**SIZES, "num_virtual_tokens": None}))
    with pytest.raises(ValueError, match="token_dim is 6, no multiple of num_attention_heads 4"):
        prefix_tuning(num_attention_heads=4)


def test_no_weight_stands_for_a_prefix():
    for params in (prefix_tuning(), cartridge()):
        with pytest.raises(ValueError, match="adapter 'default' of .*Config is no change of a weight"):
            jpeft.merge(params)


def test_adapters_that_have_no_prefix_or_too_many():
    lora = wrapped_with(jpeft.LoraConfig(r=2, target_modules=["query"]))
    with pytest.raises(ValueError, match="0 of the active adapters have a prefix; expected one, or adapter_name"):
        jpeft.key_value_prefix(lora)
    with pytest.raises(ValueError, match="'default' has a LoraConfig, which has no prefix of keys and values"):
        jpeft.key_value_prefix(lora, "default")
    with pytest.raises(ValueError, match="there is no adapter 'law'; expected one of: default"):
        jpeft.key_value_prefix(lora, "law")
    two = jpeft.set_adapter(
        jpeft.wrap(cartridge(), jpeft.PrefixTuningConfig(**SIZES), adapter_name="b"), ["default", "b"]
    )
    with pytest.raises(ValueError, match="2 of the active adapters have a prefix: default, b; expected one"):
        jpeft.key_value_prefix(two)


CACHE = np.zeros((4, 2, 5, 2, 3), np.float32)


@pytest.mark.parametrize(("params", "cache", "message"), [
    (prefix_tuning(prefix_projection=True), CACHE, "'default' has prefix_projection=True: an encoder makes"),
    (prefix_tuning(task_type="SEQ_2_SEQ_LM"), CACHE, "num_transformer_submodules=2, with which layers of the decoder"),
    (cartridge(), CACHE[:, 0], r"are of shape \(4, 5, 2, 3\); expected \(layers, 2, length, kv_heads, head_dim\)"),
    (cartridge(), CACHE[:, :, :2], r"keys of the cache are of shape \(4, 2, 2, 3\).*expected \(4, at least 3, 2, 3\)"),
    (cartridge(), CACHE[:3], r"cache are of shape \(3, 5, 2, 3\), but adapter 'default' has num_layers=4"),
    (cartridge(), (CACHE[:, 0], CACHE[:, 1, :, :1]), r"the values of the cache are of shape \(4, 5, 1, 3\)"),
], ids=["projection", "encoder-decoder", "no pair", "short", "layers", "heads"])  # fmt: skip
def test_caches_that_do_not_fit(params, cache, message):
    with pytest.raises(ValueError, match=message):
        jpeft.initialize_kv_prefix_from_past_key_values(params, cache)


def test_cartridges_that_do_not_follow_one_another():
    params = jpeft.wrap(cartridge(), jpeft.CartridgeConfig(**{**SIZES, "num_layers": 5}), adapter_name="deep")
    params = jpeft.wrap(params, jpeft.PrefixTuningConfig(**SIZES), adapter_name="prefix")
    cases = [
        (["default"], "expected two cartridges or more"),
        (["default", "prefix"], "'prefix' has a PrefixTuningConfig; expected a CartridgeConfig"),
        (["default", "deep"], "num_layers is 5 in 'deep' and 4 in 'default'; expected cartridges of one model"),
        (["default", "law"], "there is no adapter 'law'"),
    ]
    for names, message in cases:
        with pytest.raises(ValueError, match=message):
            jpeft.compose_cartridges(params, names, "both")
    with pytest.raises(ValueError, match="deep"):
        jpeft.compose_cartridges(params, ["default", "default"], "deep")
