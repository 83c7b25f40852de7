"""LoRA's initialisations of the weight and of data: what they compute, what they leave alone, what they refuse."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from safetensors.numpy import load_file

import jpeft
import jpeft_interop
from jpeft._loftq import normal_floats
from tests.harness import random_like

SHAPES = {
    "embed": {"embedding": (9, 6)},
    "query": {"kernel": (6, 6)},
    "layers": {"0:3": {"dense": {"kernel": (3, 6, 6)}}},
    "heads": {"kernel": (6, 2, 4)},
    "experts": {"kernel": (2, 8, 5)},
}
LAYOUTS = {"heads.kernel": "ioo", "experts.kernel": "bio"}
LINEAR = ["query", "dense", "heads", "experts"]
IDS = np.array([[1, 2, 3, 8], [0, 6, 6, 4]], np.int32)


def inputs(params, ids):
    """What goes into each linear layer, and what comes out in the end."""
    x = params["embed"]["embedding"][ids]
    found, y = {"query": x}, jnp.tanh(x @ params["query"]["kernel"])
    for index, w in enumerate(params["layers"]["0:3"]["dense"]["kernel"]):
        found[f"dense {index}"], y = y, jnp.tanh(y @ w)
    found["heads"] = y
    y = jnp.einsum("btd,dnh->btnh", y, params["heads"]["kernel"]).reshape(*y.shape[:2], 8)
    for index in range(2):
        found[f"experts {index}"] = y
    return found, jnp.einsum("bti,eio->ebto", y, params["experts"]["kernel"])


def function(params, ids):
    x = params["embed"]["embedding"][ids]
    y = jnp.tanh(x @ params["query"]["kernel"])
    body = jax.checkpoint(lambda c, w: (jnp.tanh(c @ w), None))
    y, _ = lax.scan(body, y, params["layers"]["0:3"]["dense"]["kernel"])
    y = jnp.einsum("btd,dnh->btnh", y, params["heads"]["kernel"]).reshape(*y.shape[:2], 8)
    return jnp.einsum("bti,eio->ebto", y, params["experts"]["kernel"])


def wrapped_with(how, **fields):
    fields = {"r": 2, "lora_alpha": 3, "target_modules": LINEAR, **fields}
    config = jpeft.LoraConfig(init_lora_weights=how, **fields)
    return jpeft.wrap(random_like(SHAPES, 3, 0.7), config, layouts=LAYOUTS, rng=jax.random.key(1))


def arrays(wrapped):
    return wrapped.adapters["default"].weights


def trained(wrapped):
    """Another adapter: as if it had trained."""
    mask = jpeft.trainable_mask(wrapped)
    return jax.tree.map(lambda leaf, trains: leaf + 0.2 * jnp.cos(leaf) if trains else leaf, wrapped, mask)


# ---- what the weight gives ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["pissa", "pissa_niter_20", "olora"])
def test_what_is_taken_out_of_the_weight(how):
    """The oracle is numpy in float64: the nearest matrix of rank r, or that of the first columns."""
    wrapped = wrapped_with(how)
    kernels = {"query": wrapped.base["query"]["kernel"], "heads": wrapped.base["heads"]["kernel"].reshape(6, 8)}
    for path, kernel in kernels.items():
        w = np.asarray(kernel, np.float64).T
        if how == "olora":
            q, r = np.linalg.qr(w)
            expected = q[:, :2] @ r[:2]
        else:
            u, s, vh = np.linalg.svd(w)
            expected = u[:, :2] * s[:2] @ vh[:2] * 2 / 3
        own = {name: np.asarray(array, np.float64) for name, array in arrays(wrapped)[path].items()}
        np.testing.assert_allclose(own["lora_B"] @ own["lora_A"], expected, atol=1e-4)
        if how != "olora":
            norms = np.linalg.norm(own["lora_A"], axis=1), np.linalg.norm(own["lora_B"], axis=0)
            np.testing.assert_allclose(*norms, rtol=1e-5)
        for name in "AB":
            np.testing.assert_array_equal(own[f"initial_{name}"], own[f"lora_{name}"])


def test_a_lookup_table_in_such_an_adapter_is_adapted_by_plain_lora():
    names = {path: set(own) for path, own in arrays(wrapped_with("pissa", target_modules=["query", "embed"])).items()}
    assert names["embed"] == {"lora_embedding_A", "lora_embedding_B"} and "initial_A" in names["query"]


# ---- conversion -----------------------------------------------------------------------------------------------------

CONVERSIONS = {
    "pissa": ("pissa", {}),
    "patterns": ("olora", {"rank_pattern": {"query": 3}, "alpha_pattern": {"heads": 5}}),
    "rslora": ("pissa", {"use_rslora": True, "rank_pattern": {"query": 3}, "alpha_pattern": {"heads": 5}}),
    "embedding": ("pissa", {"target_modules": ["query", "embed"], "modules_to_save": ["heads"]}),
}


@pytest.mark.parametrize(("how", "fields"), CONVERSIONS.values(), ids=CONVERSIONS)
def test_conversion_keeps_the_function_and_the_scaling(how, fields):
    wrapped = trained(wrapped_with(how, **fields))
    plain = jpeft.convert_to_plain_lora(wrapped)
    adapter = plain.adapters["default"]
    assert adapter.config.init_lora_weights is True and not any("initial_A" in own for own in arrays(plain).values())
    again = jpeft.wrap(plain.base, adapter.config, layouts=LAYOUTS).adapters["default"]
    for path, scaling in again.scaling.items():
        np.testing.assert_allclose(scaling, adapter.scaling[path], rtol=1e-6)
    assert jax.tree.map(jnp.shape, again.weights) == jax.tree.map(jnp.shape, adapter.weights)
    want = jpeft.lift(function)(wrapped, IDS)
    assert float(jnp.abs(want - function(wrapped.base, IDS)).max()) > 0.05
    np.testing.assert_allclose(jpeft.lift(function)(plain, IDS), want, atol=1e-5)
    assert jpeft.convert_to_plain_lora(plain).adapters["default"] is adapter


@pytest.mark.parametrize("how", ["pissa_niter_3", "corda", "lora_ga", "loftq"])
def test_what_no_file_tells_is_saved_as_plain_lora(how, tmp_path):
    wrapped = wrapped_with(how, target_modules=["query", "heads", "dense"])
    if how == "lora_ga":
        wrapped = jpeft.initialize_lora_ga_weights(
            wrapped, jpeft.lora_ga_gradients(wrapped, lambda p, ids: (function(p, ids) ** 2).sum(), [IDS])
        )
    wrapped = trained(wrapped)
    jpeft_interop.save_pretrained(wrapped, tmp_path, layouts=LAYOUTS)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["init_lora_weights"] is True and config["r"] == (2 if how == "loftq" else 4)
    loaded = jpeft_interop.load_pretrained(wrapped.base, tmp_path, layouts=LAYOUTS)
    want = jpeft.lift(function)(wrapped, IDS)
    np.testing.assert_allclose(jpeft.lift(function)(loaded, IDS), want, atol=1e-5)


def test_conversion_with_the_initial_values_of_a_folder(tmp_path):
    fields = {"target_modules": ["query", "dense", "heads"]}
    wrapped = wrapped_with("pissa", **fields)
    save = lambda name, of, **more: jpeft_interop.save_pretrained(of, tmp_path / name, layouts=LAYOUTS, **more)  # noqa: E731
    save("initial", wrapped)
    save("given", trained(wrapped), path_initial_model_for_weight_conversion=tmp_path / "initial")
    save("own", trained(wrapped), path_initial_model_for_weight_conversion=True)
    given, own = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("given", "own"))
    assert given.keys() == own.keys()
    for key, tensor in own.items():
        np.testing.assert_array_equal(tensor, given[key])
    with pytest.warns(UserWarning, match="adapter 'default' acts on the base as it is, and what is written is"):
        save("plain", wrapped_with(True, **fields), path_initial_model_for_weight_conversion=tmp_path / "initial")
    with pytest.raises(ValueError, match=r"heads.lora_A.weight \(2, 6\), expected \(3, 6\)"):
        save(
            "no",
            wrapped_with("pissa", **{**fields, "r": 3}),
            path_initial_model_for_weight_conversion=tmp_path / "initial",
        )


# ---- what goes into layers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", [None, np.array([[1, 1, 0, 1], [1, 0, 0, 0]], bool)], ids=["all", "mask"])
@pytest.mark.parametrize("statistic", ["second_moments", "normalised_moments"])
def test_statistics_of_inputs(mask, statistic):
    wrapped = wrapped_with(True)
    capture = jax.jit(lambda w, ids: jpeft.capture_inputs(function, w, ids, mask=mask, statistic=statistic))
    outputs, found = capture(wrapped, IDS)
    want, expected = inputs(wrapped.base, IDS)[::-1]
    np.testing.assert_allclose(outputs, want, rtol=1e-5, atol=1e-6)
    assert set(found) == {"query", "layers.0:3.dense", "heads", "experts"}
    paths = {"dense": "layers.0:3.dense"}
    for name, x in expected.items():
        path, *index = name.split()
        own = {k: np.asarray(v)[int(index[0])] if index else v for k, v in found[paths.get(path, path)].items()}
        x = np.asarray(x, np.float64)
        if statistic == "normalised_moments":
            # As in PEFT the largest, not the largest absolute one; tokens that do not count are zeros.
            kept = x if mask is None else np.where(mask[..., None], x, 0)
            rows = kept.reshape(-1, x.shape[-1]) / abs(kept.max())
            assert float(own["calls"]) == 1
        else:
            rows = x.reshape(-1, x.shape[-1]) if mask is None else x[mask]
            assert float(own["count"]) == len(rows)
            np.testing.assert_allclose(own["sum"], rows.sum(0), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(own["outer"], rows.T @ rows, rtol=1e-4, atol=1e-4)


# ---- EVA ------------------------------------------------------------------------------------------------------------


def eva_batches():
    return [np.random.default_rng(seed).integers(0, 9, (5, 6)).astype(np.int32) for seed in range(2)]


def test_eva_of_stacks_is_eva_of_their_layers():
    wrapped = wrapped_with("eva", target_modules=[*LINEAR, "embed"], eva_config={"rho": 1.0})
    started = jpeft.initialize_lora_eva_weights(wrapped, function, eva_batches()[:1])
    x, _ = inputs(wrapped.base, eva_batches()[0])
    for name, index in [("dense 0", 0), ("dense 2", 2)]:
        rows = np.asarray(x[name], np.float64).reshape(-1, 6)
        components = np.linalg.svd(rows - rows.mean(0))[2][:2]
        got = arrays(started)["layers.0:3.dense"]["lora_A"][index]
        np.testing.assert_allclose(np.abs(got), np.abs(components), atol=2e-3)
    for name, array in arrays(wrapped)["embed"].items():
        np.testing.assert_array_equal(array, arrays(started)["embed"][name])
    np.testing.assert_array_equal(jpeft.lift(function)(started, IDS), function(wrapped.base, IDS))
    assert started.adapters["default"].config.rank_pattern == {}


def test_layers_with_the_same_inputs_share_their_components():
    params = random_like({name: {"kernel": (6, 5)} for name in ("a", "b", "c")}, 1)
    data = np.random.default_rng(0).normal(size=(2, 40, 6)).astype(np.float32) * np.linspace(
        0.1, 2, 6, dtype=np.float32
    )

    def two(p, x):
        return x @ p["a"]["kernel"], x @ p["b"]["kernel"], (x**3) @ p["c"]["kernel"]

    config = jpeft.LoraConfig(r=2, target_modules=["a", "b", "c"], init_lora_weights="eva")
    started = jpeft.initialize_lora_eva_weights(jpeft.wrap(params, config), two, list(data))
    own = {path: own["lora_A"] for path, own in arrays(started).items()}
    assert sum(len(a) for a in own.values()) == 6
    shared = min(len(own["a"]), len(own["b"]))
    np.testing.assert_array_equal(own["a"][:shared], own["b"][:shared])
    assert set(started.adapters["default"].config.target_modules) == set(own) == set(started.adapters["default"].sites)


# ---- LoftQ ----------------------------------------------------------------------------------------------------------

# Table 4 of https://arxiv.org/abs/2305.14314, to its seven digits.
NF4 = [
    -1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0,
    0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0,
]  # fmt: skip


def quantised(w, bits):
    """An oracle in numpy: the nearest value of the format, by looking at all of them."""
    if bits == 8:
        step = np.abs(w).max(1, keepdims=True) / 127
        return np.round(w / step) * step
    values, flat = np.array(NF4) if bits == 4 else normal_floats(2), w.reshape(-1).copy()
    for start in range(0, flat.size, 64):
        block = flat[start : start + 64]
        largest = np.abs(block).max()
        flat[start : start + 64] = values[np.abs(block[:, None] / largest - values).argmin(1)] * largest
    return flat.reshape(w.shape)


def test_the_numbers_of_the_four_bit_format():
    np.testing.assert_allclose(normal_floats(4), NF4, atol=2e-6)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("rounds", [1, 3])
def test_loftq_alternates(bits, rounds):
    settings = {"loftq_bits": bits, "loftq_iter": rounds}
    wrapped = wrapped_with("loftq", loftq_config=settings)
    before = jax.tree.map(np.array, wrapped.base)
    started = jpeft.initialize_lora_loftq_weights(wrapped)
    np.testing.assert_array_equal(wrapped.base["query"]["kernel"], before["query"]["kernel"])
    for path, kernel, changed in [
        ("query", before["query"]["kernel"], started.base["query"]["kernel"]),
        ("heads", before["heads"]["kernel"].reshape(6, 8), started.base["heads"]["kernel"].reshape(6, 8)),
    ]:
        w = np.asarray(kernel, np.float64).T
        rest = w
        for _ in range(rounds):
            q = quantised(rest, bits)
            u, s, vh = np.linalg.svd(w - q)
            low = u[:, :2] * s[:2] @ vh[:2]
            rest = w - low
        own = arrays(started)[path]
        np.testing.assert_allclose(np.asarray(changed).T, q, atol=1e-5)
        np.testing.assert_allclose(1.5 * np.asarray(own["lora_B"] @ own["lora_A"]), low, atol=1e-4)
    errors = [jnp.abs(jpeft.lift(function)(p, IDS) - function(wrapped.base, IDS)).sum() for p in (
        started, jpeft.disable_adapters(started))]  # fmt: skip
    assert errors[0] < errors[1]
    config = started.adapters["default"].config
    assert config.init_lora_weights is True and config.loftq_config == {}


# ---- what is refused ------------------------------------------------------------------------------------------------

VALUES = {
    "init": ({"init_lora_weights": "pizza"}, ValueError, "init_lora_weights is 'pizza'; expected one of .*pissa_niter"),
    "niter": ({"init_lora_weights": "pissa_niter_x"}, ValueError, "init_lora_weights is 'pissa_niter_x'"),
    "kind": ({"eva_config": 3}, TypeError, "eva_config is 3; expected a EvaConfig, a dict of its fields, or None"),
    "rho": ({"eva_config": {"rho": 0.5}}, ValueError, "rho is 0.5; expected at least 1"),
    "tau": ({"eva_config": {"tau": 2}}, ValueError, r"tau is 2; expected a cosine in \[0, 1\]"),
    "corda": ({"corda_config": {"corda_method": "x"}}, ValueError, "corda_method is 'x'; expected 'ipm' or 'kpm'"),
    "direction": ({"lora_ga_config": {"direction": "x"}}, ValueError, "direction is 'x'; expected one of ArBr"),
    "scale": ({"lora_ga_config": {"scale": "x"}}, ValueError, "scale is 'x'; expected one of stable"),
    "gamma": ({"lora_ga_config": {"stable_gamma": 0}}, ValueError, "stable_gamma is 0; expected a number above 0"),
    "bits": ({"loftq_config": {"loftq_bits": 3}}, ValueError, "loftq_bits is 3; expected 2, 4 or 8"),
    "iter": ({"loftq_config": {"loftq_iter": 0}}, ValueError, "loftq_iter is 0; expected at least 1"),
}


@pytest.mark.parametrize(("fields", "error", "message"), VALUES.values(), ids=VALUES)
def test_settings_out_of_range(fields, error, message):
    with pytest.raises(error, match=message):
        jpeft.LoraConfig(**fields)


def test_settings_appear_where_they_are_needed():
    config = jpeft.LoraConfig(init_lora_weights="eva")
    assert config.eva_config == jpeft.EvaConfig() and config.corda_config is None and config.loftq_config == {}
    assert hash(config) == hash(jpeft.LoraConfig(init_lora_weights="eva", eva_config={"rho": 2.0}))


def started(how, call, **fields):
    return lambda: call(wrapped_with(how, **fields))


def eva(wrapped, batches=(IDS,), fn=function, **more):
    return jpeft.initialize_lora_eva_weights(wrapped, fn, batches, **more)


def corda(wrapped, batches=(IDS,)):
    return jpeft.corda_covariances(wrapped, function, batches)


def corda_from(change):
    return lambda w: jpeft.initialize_lora_corda_weights(w, {"query": change * jnp.eye(6)})


def lora_ga(wrapped, gradients={}):
    return jpeft.initialize_lora_ga_weights(wrapped, gradients)


def unused(params, ids):
    return params["heads"]["kernel"]


ONLY = {"target_modules": ["query"]}
FEW = {"rho": 1.0}
REFUSED = {
    "rank of the weight": (
        started("pissa", id, r=7, **ONLY),
        "r is 7; expected at most 6, the rank of a weight of 6 inputs",
    ),
    "alpha": (
        started("pissa", id, lora_alpha=0, **ONLY),
        "init_lora_weights='pissa' at 'query': expected lora_alpha above 0",
    ),
    "eva, how": (started(True, eva), "adapter 'default' has init_lora_weights=True; expected 'eva'"),
    "eva, no data": (started("eva", lambda w: eva(w, []), **ONLY), "there are no batches; expected at least one"),
    "eva, stack": (started("eva", eva), "rho=2.0, which gives layers ranks of their own, but 'experts'"),
    "eva, narrow": (started("eva", eva, r=4, **ONLY), "r times rho is 8 at 'query', which has 6 inputs"),
    "eva, few": (
        started("eva", lambda w: eva(w, [IDS[:1, :2]]), r=3, eva_config=FEW, **ONLY),
        r"no batch gives 'query' the 3 inputs that its components need \(the last one: 2\)",
    ),
    "eva, unused": (started("eva", lambda w: eva(w, fn=unused), **ONLY), r"no batch gives .* \(the last one: 0\)"),
    "eva, never": (
        started("eva", lambda w: eva(w, [IDS, IDS[:, ::-1] // 2]), r=6, eva_config={"rho": 1.0, "tau": 1.0}, **ONLY),
        "the components of query have not converged after 100 passes",
    ),
    "eva, mask": (
        started("eva", lambda w: eva(w, mask=lambda batch: jnp.ones((2, 3), bool)), **ONLY),
        r"the mask of shape \(2, 3\) has 6 entries, but the input of 'query' has 8 rows",
    ),
    "statistic": (
        started(True, lambda w: jpeft.capture_inputs(function, w, IDS, statistic="x")),
        "statistic is 'x'; expected one of second_moments, normalised_moments",
    ),
    "no output": (
        started(True, lambda w: jpeft.capture_inputs(lambda p, ids: ids, w, IDS)),
        "the function returns no floating-point array",
    ),
    "corda, how": (started(True, corda), "has init_lora_weights=True; expected 'corda'"),
    "corda, no data": (started("corda", lambda w: corda(w, [])), "there are no batches; expected at least one"),
    "corda, unused": (
        started("corda", lambda w: jpeft.corda_covariances(w, unused, [IDS]), **ONLY),
        "the covariance of the inputs of 'query' is not finite",
    ),
    "corda, absent": (
        started("corda", lambda w: jpeft.initialize_lora_corda_weights(w, {}), **ONLY),
        r"the covariance of 'query' has shape None; expected \(6, 6\), of corda_covariances",
    ),
    "corda, rank": (started("corda", corda_from(1.0), r=7, **ONLY), "init_lora_weights='corda' at 'query': r is 7"),
    "corda, singular": (started("corda", corda_from(0.0), **ONLY), "the covariance of 'query' cannot be inverted"),
    "lora_ga, how": (started("pissa", lora_ga), "has init_lora_weights='pissa'; expected 'lora_ga'"),
    "lora_ga, no data": (
        started("lora_ga", lambda w: jpeft.lora_ga_gradients(w, function, [])),
        "there are no batches; expected at least one",
    ),
    "lora_ga, absent": (started("lora_ga", lora_ga, **ONLY), r"the gradient of 'query' has shape None; .* \(6, 6\)"),
    "lora_ga, rank": (
        started("lora_ga", lambda w: lora_ga(w, {"query": jnp.ones((6, 6))}), r=4, **ONLY),
        "r is 4; expected at most half of 6, as A and B take 8 singular vectors",
    ),
    "loftq, how": (started(True, jpeft.initialize_lora_loftq_weights), "expected 'loftq'"),
    "loftq, rank": (
        started("loftq", jpeft.initialize_lora_loftq_weights, r=7, **ONLY),
        "init_lora_weights='loftq' at 'query': r is 7",
    ),
    "unknown name": (
        lambda: jpeft.convert_to_plain_lora(wrapped_with("pissa"), "other"),
        r"adapter names are \['other'\]; expected at least one",
    ),
}


@pytest.mark.parametrize(("call", "message"), REFUSED.values(), ids=REFUSED)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_random_directions_of_lora_ga_are_the_keys():
    def of(seed):
        wrapped = wrapped_with("lora_ga", **ONLY, lora_ga_config={"direction": "random", "scale": "unit"})
        gradient = {"query": jnp.diag(jnp.arange(6.0, 0, -1))}
        return arrays(jpeft.initialize_lora_ga_weights(wrapped, gradient, rng=jax.random.key(seed)))["query"]

    # A and B take the same two of the four first singular vectors, here unit vectors.
    for seed in range(3):
        a, b = np.abs(of(seed)["lora_A"]), np.abs(of(seed)["lora_B"])
        rows = a.argmax(1)
        assert set(rows) <= {0, 1, 2, 3} and len(set(rows)) == 2
        np.testing.assert_allclose(b[rows, [0, 1]], 6.0 - rows, rtol=1e-5)
    assert any(not np.array_equal(of(0)["lora_A"], of(seed)["lora_A"]) for seed in range(1, 6))


def test_an_abstract_adapter_of_the_weight():
    shapes = jax.eval_shape(lambda: random_like(SHAPES, 3))
    config = jpeft.LoraConfig(r=2, target_modules=LINEAR, init_lora_weights="pissa")
    wrapped = jpeft.wrap(shapes, config, layouts=LAYOUTS)
    assert arrays(wrapped)["query"]["initial_A"].shape == (2, 6)
    assert dataclasses.replace(wrapped).active == ("default",)
