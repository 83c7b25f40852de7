"""HRA, OFT, BOFT, MiSS, C3A and PSOFT by the formulas of their papers, in numpy; what they cost; what they refuse."""

import dataclasses
import functools
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft
from tests.harness import random_like, with_derived

IN, OUT, WORDS = 8, 12, 6
WINDOW = (2, 3)
IDS = np.array([0, 3, 5])

# ---- formulas -------------------------------------------------------------------------------------------------------


def blocks_on_diagonal(blocks):
    """The matrix with these blocks on its diagonal."""
    count, size, _ = blocks.shape
    matrix = np.zeros((count * size, count * size))
    for index, block in enumerate(blocks):
        matrix[index * size : (index + 1) * size, index * size : (index + 1) * size] = block
    return matrix


def skew_of(upper, size):
    q = np.zeros((size, size))
    q[np.triu_indices(size, 1)] = upper
    return q - q.T


def hra(w, p, config):
    for u in p["hra_u"].T:
        u = u / np.linalg.norm(u)
        w = (np.eye(len(u)) - 2 * np.outer(u, u)) @ w
    return w


def hra_orthogonal(w, p, config):
    basis = []
    for u in p["hra_u"].T:
        for other in basis:
            u = u - (other @ u) * other
        basis.append(u / np.linalg.norm(u))
    return functools.reduce(lambda w, u: w - 2 * np.outer(u, u @ w), basis, w)


def rotation(p, config, features):
    upper = p["oft_embedding_R" if "oft_embedding_R" in p else "oft_R"]
    size = config.oft_block_size or features // config.r
    q = np.stack([skew_of(row, size) for row in upper])
    if config.coft:
        lengths = np.linalg.norm(q, axis=(1, 2), keepdims=True)
        q = q * np.minimum(1, config.eps / np.sqrt(len(q)) / lengths)
    one, powers = np.eye(size), [np.linalg.matrix_power(q, n) for n in range(8)]
    if not config.use_cayley_neumann:
        r = (one - q) @ np.linalg.inv(one + q)
    else:
        last = {1: 0, 2: 1, 3: 3}.get(config.num_cayley_neumann_terms, config.num_cayley_neumann_terms - 1)
        weights = [1] + [2] * (last - 1) + [1] * (last > 1) if last != 1 else [1, 2]
        r = sum(c * powers[n] for n, c in enumerate(weights))
    return blocks_on_diagonal(np.repeat(r, features // size, 0) if config.block_share else r)


def oft(w, p, config):
    if "oft_embedding_R" in p:
        return w @ rotation(p, config, w.shape[1])
    return rotation(p, config, w.shape[0]) @ w


def butterfly(blocks, level):
    """One factor: at each level, features 2^level half blocks apart share a block (figure 2 of the paper)."""
    count, size, _ = blocks.shape
    features, half = count * size, size // 2
    order = []
    for start in range(0, features, size * 2**level):
        for chunk in range(2**level):
            for side in range(2):
                first = start + (side * 2**level + chunk) * half
                order += range(first, first + half)
    if level == 0:
        order = list(range(features))
    matrix = np.zeros((features, features))
    matrix[np.ix_(order, order)] = blocks_on_diagonal(blocks)
    return matrix


def boft(w, p, config):
    for level, own in enumerate(p["boft_R"]):
        q = (own - own.swapaxes(1, 2)) / 2
        one = np.eye(q.shape[-1])
        w = butterfly(np.stack([(one - block) @ np.linalg.inv(one + block) for block in q]), level) @ w
    return w * p["boft_s"].reshape(-1)


def miss(w, p, config):
    r = config.r
    w = w.copy()
    if config.init_weights == "bat":
        for i in range(0, w.shape[0], r):
            for o in range(0, w.shape[1], r):
                c, part = p["miss_block"][o // r].T, w[i : i + r, o : o + r]
                w[i : i + r, o : o + r] = part + c @ part + c
        return w
    for i in range(w.shape[0]):
        for o in range(w.shape[1]):
            w[i, o] += p["miss_block"][i % r, o % p["miss_block"].shape[1]]
    return w


def c3a(w, p, config):
    kernel = p["c3a_kernel"]
    w, b = w.copy(), kernel.shape[-1]
    for i in range(w.shape[0]):
        for o in range(w.shape[1]):
            w[i, o] += kernel[o // b, i // b, (i - o) % b] / w.shape[0]
    return w


def psoft(w, p, config):
    u, s, vh = np.linalg.svd(w.T)
    r, scale = config.r, config.psoft_alpha / config.r
    roots = np.sqrt(s[:r] / scale)
    a, b = (
        (roots[:, None] * vh[:r], u[:, :r] * roots)
        if config.ab_svd_init == "pissa_init"
        else (vh[:r], u[:, :r] * s[:r] / scale)
    )
    signs = np.sign((a * p["psoft_A"]).sum(1))
    if config.psoft_svd == "full":
        np.testing.assert_allclose(signs[:, None] * a, p["psoft_A"], atol=1e-12)
    stored = p["psoft_R.weight"]
    one, q = np.eye(r), skew_of(stored, r) if config.psoft_orth else stored
    if not config.psoft_orth:
        rotation = stored
    elif config.use_cayley_neumann:
        q = q * min(1, (config.cayley_neumann_eps or np.inf) / np.linalg.norm(q))
        rotation = one + 2 * q + 2 * q @ q + 2 * q @ q @ q + q @ q @ q @ q
    else:
        rotation = np.linalg.inv(one - q) @ (one + q)
    rotation = (
        np.diag(p.get("psoft_R.vector_b", np.ones(r))) @ rotation @ np.diag(p.get("psoft_R.vector_a", np.ones(r)))
    )
    return w + scale * (b * signs @ (rotation - one) @ (signs[:, None] * a)).T


HRA, OFT, BOFT, MISS, C3A, PSOFT = (
    jpeft.HRAConfig, jpeft.OFTConfig, jpeft.BOFTConfig, jpeft.MissConfig, jpeft.C3AConfig, jpeft.PsoftConfig
)  # fmt: skip
ALL, FLAT, LAYERS = ("dense", "conv", "embed"), ("dense",), ("dense", "conv")

FORMULAS = {
    "hra": (hra, HRA, {"r": 3, "init_weights": False}, LAYERS),
    "hra, orthogonal": (hra_orthogonal, HRA, {"r": 3, "apply_GS": True}, LAYERS),
    "oft": (oft, OFT, {"oft_block_size": 4}, ALL),
    "oft, exact": (oft, OFT, {"r": 2, "oft_block_size": 0, "use_cayley_neumann": False}, ALL),
    "oft, shared": (oft, OFT, {"oft_block_size": 2, "block_share": True, "num_cayley_neumann_terms": 7}, ALL),
    "oft, constrained": (oft, OFT, {"oft_block_size": 4, "coft": True, "eps": 0.4}, ALL),
    **{
        f"oft, {terms} terms": (oft, OFT, {"oft_block_size": 4, "num_cayley_neumann_terms": terms}, FLAT)
        for terms in (2, 3, 4)
    },
    "boft": (boft, BOFT, {"boft_block_size": 2}, LAYERS),
    "boft, two factors": (boft, BOFT, {"boft_block_size": 2, "boft_n_butterfly_factor": 2}, LAYERS),
    "boft, three factors": (
        boft, BOFT, {"boft_block_size": 0, "boft_block_num": 4, "boft_n_butterfly_factor": 3}, FLAT
    ),
    "miss": (miss, MISS, {"r": 3}, FLAT),
    "miss, mini": (miss, MISS, {"r": 5, "init_weights": "mini", "mini_r": 4}, FLAT),
    "miss, bat": (miss, MISS, {"r": 4, "init_weights": "bat"}, FLAT),
    "c3a": (c3a, C3A, {"block_size": 4}, FLAT),
    "c3a, an odd block": (c3a, C3A, {"block_size": 64, "block_size_pattern": {"dense": 1}}, FLAT),
    "psoft": (psoft, PSOFT, {"r": 3, "psoft_alpha": 6}, FLAT),
    "psoft, roots": (psoft, PSOFT, {"r": 4, "ab_svd_init": "pissa_init", "psoft_mag_a": False}, FLAT),
    "psoft, free": (psoft, PSOFT, {"r": 3, "psoft_alpha": 6, "psoft_orth": False, "psoft_mag_b": False}, FLAT),
    "psoft, series": (psoft, PSOFT, {"r": 3, "psoft_alpha": 6, "use_cayley_neumann": True}, FLAT),
    "psoft, short series": (
        psoft, PSOFT, {"r": 3, "psoft_alpha": 6, "use_cayley_neumann": True, "cayley_neumann_eps": 0.2}, FLAT
    ),
    "psoft, approximate": (
        psoft, PSOFT, {"r": 3, "psoft_alpha": 6, "psoft_svd": "lowrank", "psoft_svd_lowrank_niter": 60}, FLAT
    ),
}  # fmt: skip

SHAPES = {
    "dense": {"kernel": (IN, OUT), "bias": (OUT,)},
    "conv": {"kernel": (2, *WINDOW, OUT)},
    "embed": {"embedding": (WORDS, IN)},
}


def model(params, x):
    """What each layer gives, by its name."""
    image = x.reshape(1, 2, 2, -1).transpose(0, 2, 3, 1)
    numbers = ("NHWC", "IHWO", "NHWC")
    return {
        "dense": x @ params["dense"]["kernel"] + params["dense"]["bias"],
        "conv": jax.lax.conv_general_dilated(
            image, params["conv"]["kernel"], (1, 1), "SAME", dimension_numbers=numbers
        ),
        "embed": params["embed"]["embedding"][IDS],
    }


LAYOUTS = {"conv.kernel": "i..o", "embed.embedding": "vo"}


def wrapped_with(config, targets=FLAT, **settings):
    params = random_like(SHAPES, 7)
    config = config(target_modules=list(targets), **settings)
    with warnings.catch_warnings(action="ignore"):
        wrapped = jpeft.wrap(params, config, layouts=LAYOUTS, dtype=jnp.result_type(float))
    adapter = wrapped.adapters["default"]
    adapter = dataclasses.replace(adapter, weights=random_like(adapter.weights, 100))
    return with_derived(dataclasses.replace(wrapped, adapters={"default": adapter}))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", FORMULAS)
def test_a_method_is_what_its_paper_says(name):
    formula, config, settings, targets = FORMULAS[name]
    wrapped = wrapped_with(config, targets, **settings)
    x = random_like((5, IN), 3, 1.0)
    expected = {path: dict(own) for path, own in wrapped.base.items()}
    for path in targets:
        leaf = "embedding" if path == "embed" else "kernel"
        p = {key: np.asarray(array) for key, array in wrapped.adapters["default"].weights[path].items()}
        w = np.asarray(wrapped.base[path][leaf])
        changed = formula(w.reshape(-1, w.shape[-1]), p, wrapped.adapters["default"].config)
        assert np.abs(changed - w.reshape(changed.shape)).max() > 1e-2
        expected[path][leaf] = jnp.asarray(changed.reshape(w.shape))
    want, lifted = model(expected, x), jax.jit(jpeft.lift(model))(wrapped, x)
    merged = jpeft.merge(wrapped)
    for path in SHAPES:
        np.testing.assert_allclose(lifted[path], want[path], rtol=1e-10, atol=1e-10)
        for leaf, array in expected[path].items():
            np.testing.assert_allclose(merged[path][leaf], array, rtol=1e-10, atol=1e-10)


@pytest.mark.usefixtures("x64")
def test_gram_and_schmidt_are_not_needed():
    """The reflections depend on what the columns span alone."""
    wrapped = wrapped_with(HRA, r=3, apply_GS=True)
    u = wrapped.adapters["default"].weights["dense"]["hra_u"]
    mixed = jnp.linalg.qr(u)[0] @ jnp.array([[2.0, 1, 0], [0, -1, 3], [0, 0, 5]])
    weights = {"dense": {"hra_u": mixed}}
    other = dataclasses.replace(wrapped.adapters["default"], weights=weights)
    other = dataclasses.replace(wrapped, adapters={"default": other})
    one, two = (jpeft.merge(params)["dense"]["kernel"] for params in (wrapped, other))
    np.testing.assert_allclose(one, two, atol=1e-12)


TWICE = {
    name: FORMULAS[name] for name in ("hra", "oft", "boft, two factors", "miss", "miss, bat", "c3a", "psoft, series")
}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", TWICE)
def test_two_adapters_at_once_are_as_if_merged(name):
    _, config, settings, targets = TWICE[name]
    first, second = (wrapped_with(config, targets, **settings) for _ in range(2))
    other = second.adapters["default"]
    drawn = dataclasses.replace(other, weights=random_like(other.weights, 300))
    both = dataclasses.replace(first, adapters={"default": first.adapters["default"], "other": drawn})
    both = with_derived(jpeft.set_adapter(both, ["default", "other"]))
    x = random_like((5, IN), 3, 1.0)
    lifted, merged = jax.jit(jpeft.lift(model))(both, x), model(jpeft.merge(both), x)
    alone = model(jpeft.merge(first), x)
    for path in targets:
        np.testing.assert_allclose(lifted[path], merged[path], rtol=1e-10, atol=1e-10)
        assert np.abs(merged[path] - alone[path]).max() > 1e-2


@pytest.mark.parametrize("name", FORMULAS)
def test_a_model_in_bfloat16_stays_so(name):
    _, config, settings, targets = FORMULAS[name]
    wrapped = wrapped_with(config, targets, **settings)
    narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), wrapped.base)
    x = random_like((5, IN), 3, 1.0)
    wide = jax.jit(jpeft.lift(model))(wrapped, x)
    found = jax.jit(jpeft.lift(model))(dataclasses.replace(wrapped, base=narrow), x.astype(jnp.bfloat16))
    for path in SHAPES:
        assert found[path].dtype == jnp.bfloat16
        np.testing.assert_allclose(found[path].astype(jnp.float32), wide[path], atol=0.05 * np.abs(wide[path]).max())


# ---- noise ----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("config", "settings", "dropped"), [
    (OFT, {"oft_block_size": 2, "module_dropout": 0.6, "init_weights": False}, 2),
    (BOFT, {"boft_block_size": 2, "boft_dropout": 0.6, "init_weights": False}, 2),
])  # fmt: skip
def test_some_blocks_do_nothing_in_training(config, settings, dropped):
    wrapped = wrapped_with(config, **settings)
    if config is BOFT:
        own = wrapped.adapters["default"].weights["dense"]
        own["boft_s"] = jnp.ones_like(own["boft_s"])
    x = jnp.eye(IN)
    wrapped.base["dense"]["kernel"] = jnp.eye(IN, OUT)
    wrapped.base["dense"]["bias"] = jnp.zeros(OUT)
    apply = jax.jit(jpeft.lift(lambda params, x: model(params, x)["dense"][:, :IN]))
    seen = set()
    for seed in range(6):
        matrix = np.asarray(apply(jpeft.with_context(wrapped, rng=jax.random.key(seed)), x))
        idle = tuple(i for i in range(4) if np.allclose(matrix[2 * i : 2 * i + 2, 2 * i : 2 * i + 2], np.eye(2)))
        assert len(idle) == dropped
        seen.add(idle)
    assert len(seen) > 1
    quiet = np.asarray(apply(wrapped, x))
    assert not any(np.allclose(quiet[2 * i : 2 * i + 2, 2 * i : 2 * i + 2], np.eye(2)) for i in range(4))


@pytest.mark.parametrize("form", [True, "mini", "bat"])
def test_dropout_acts_on_the_change_alone(form):
    wrapped = wrapped_with(MISS, r=4, init_weights=form, miss_dropout=0.5)
    x = jnp.ones((400, IN))
    apply = jax.jit(jpeft.lift(lambda params, x: model(params, x.reshape(-1, IN))["dense"]))
    base, quiet = model(wrapped.base, x)["dense"], apply(wrapped, x)
    noisy = apply(jpeft.with_context(wrapped, rng=jax.random.key(1)), x)
    assert np.abs(noisy - quiet).max() > 0.1
    np.testing.assert_allclose((noisy - base).mean(0), (quiet - base)[0], atol=0.25 * np.abs(quiet - base).max())


# ---- projection -----------------------------------------------------------------------------------------------------


def test_projected_rotations_are_as_long_as_eps_allows():
    wrapped = wrapped_with(OFT, oft_block_size=4, coft=True, eps=0.1)
    other = jpeft.wrap(wrapped, jpeft.LoraConfig(r=2, target_modules=["embed"]), adapter_name="lora", layouts=LAYOUTS)
    projected = jax.jit(jpeft.oft_projection)(other)
    found = projected.adapters["default"].weights["dense"]["oft_R"]
    np.testing.assert_allclose(np.sqrt(2 * (found**2).sum(1)), 0.1 / np.sqrt(2), rtol=1e-5)
    np.testing.assert_array_equal(
        projected.adapters["lora"].weights["embed"]["lora_embedding_B"],
        other.adapters["lora"].weights["embed"]["lora_embedding_B"],
    )
    again = jpeft.oft_projection(projected).adapters["default"].weights["dense"]["oft_R"]
    np.testing.assert_allclose(again, found, rtol=1e-6)
    free = wrapped_with(OFT, oft_block_size=4)
    assert jpeft.oft_projection(free).adapters["default"] is free.adapters["default"]


# ---- beginning ------------------------------------------------------------------------------------------------------


def initial(config, targets=FLAT, **settings):
    params = random_like({"dense": {"kernel": (256, 128)}}, 7)
    return jpeft.wrap(params, config(target_modules=list(targets), **settings)).adapters["default"].weights["dense"]


@pytest.mark.parametrize(("config", "settings", "name", "deviation"), [
    (HRA, {"r": 8}, "hra_u", 1 / np.sqrt(3 * 4)),
    (HRA, {"r": 8, "init_weights": False}, "hra_u", 1 / np.sqrt(3 * 8)),
    (OFT, {"init_weights": False}, "oft_R", 0.1),
    (BOFT, {"init_weights": False}, "boft_R", 0.1),
    (BOFT, {"init_weights": False}, "boft_s", 0.1),
    (MISS, {"init_weights": False}, "miss_block", 1 / np.sqrt(3 * 128)),
    (C3A, {"block_size": 32}, "c3a_kernel", np.sqrt(2 / (256 + 128))),
    (C3A, {"block_size": 32, "init_weights": "kaiming_uniform"}, "c3a_kernel", 1 / np.sqrt(3 * 256)),
    (C3A, {"block_size": 32, "init_weights": "gaussian"}, "c3a_kernel", 1),
    (PSOFT, {"init_weights": False}, "psoft_R.weight", 0.1),
    (PSOFT, {"init_weights": False, "psoft_orth": False}, "psoft_R.weight", 0.1),
])  # fmt: skip
def test_initial_values_are_spread_as_in_peft(config, settings, name, deviation):
    array = np.asarray(initial(config, **settings)[name])
    if name == "psoft_R.weight" and array.ndim == 2:
        array = array - np.eye(32)
    np.testing.assert_allclose(array.std(), deviation, rtol=0.15)


def test_reflections_begin_in_pairs():
    u = initial(HRA, r=4)["hra_u"]
    np.testing.assert_array_equal(u[:, 0::2], u[:, 1::2])
    orthogonal = initial(HRA, r=4, apply_GS=True)["hra_u"]
    assert np.abs(orthogonal[:, 0] - orthogonal[:, 1]).max() > 0.1


def test_approximate_singular_vectors_follow_from_the_seed():
    settings = {"r": 4, "psoft_svd": "lowrank", "psoft_svd_lowrank_niter": 0}
    first, same, other = (initial(PSOFT, random_seed=seed, **settings)["psoft_A"] for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, same)
    assert np.abs(first - other).max() > 1e-3


# ---- warnings and refusals ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("config", "settings", "message", "shape"), [
    (HRA, {"r": 3}, "r is 3, an odd number of reflections", (256, 3)),
    (OFT, {"oft_block_size": 100}, "oft_block_size is 100 at 'dense', which does not divide its 256 f", (2, 8128)),
    (OFT, {"oft_block_size": 6}, "does not divide its 256 features; 4 is taken", (64, 6)),
    (OFT, {"oft_block_size": 0, "r": 300}, "r is 300 at 'dense', .* 256 is taken", (256, 0)),
])  # fmt: skip
def test_what_is_not_as_it_was_asked_for_warns(config, settings, message, shape):
    with pytest.warns(UserWarning, match=message):
        found = initial(config, **settings)
    assert next(iter(found.values())).shape == shape


@pytest.mark.parametrize(("config", "settings", "message"), [
    (HRA, {"r": 0}, "r is 0; expected an integer of at least 1"),
    (HRA, {"bias": "lora_only"}, "bias is 'lora_only'; expected 'none', 'all' or 'hra_only'"),
    (OFT, {"r": 4}, "r is 4 and oft_block_size is 32; expected one of them to be 0"),
    (OFT, {"oft_block_size": 0}, "r is 0 and oft_block_size is 0; expected one of them to be 0 and the other"),
    (OFT, {"module_dropout": 1.0}, "module_dropout is 1.0; expected a rate in [0, 1)"),
    (OFT, {"num_cayley_neumann_terms": 0}, "num_cayley_neumann_terms is 0; expected at least 1"),
    (OFT, {"bias": "some"}, "bias is 'some'; expected 'none', 'all' or 'oft_only'"),
    (BOFT, {"boft_block_num": 2}, "boft_block_size is 4 and boft_block_num is 2; expected one of them to be 0"),
    (BOFT, {"boft_n_butterfly_factor": 0}, "boft_n_butterfly_factor is 0; expected at least 1"),
    (BOFT, {"boft_dropout": -0.1}, "boft_dropout is -0.1; expected a rate in [0, 1)"),
    (BOFT, {"bias": "some"}, "bias is 'some'; expected 'none', 'all' or 'boft_only'"),
    (MISS, {"r": 0}, "r is 0; expected an integer of at least 1"),
    (MISS, {"mini_r": -1}, "mini_r is -1; expected an integer of at least 1"),
    (MISS, {"miss_dropout": 2}, "miss_dropout is 2; expected a rate in [0, 1)"),
    (MISS, {"init_weights": "bats"}, "init_weights is 'bats'; expected True, False, 'bat' or 'mini'"),
    (MISS, {"bias": "some"}, "bias is 'some'; expected 'none', 'all' or 'MiSS_only'"),
    (C3A, {"block_size": 0}, "block_size is 0; expected an integer of at least 1"),
    (C3A, {"block_size_pattern": {"q": 0.5}}, "block_size_pattern['q'] is 0.5; expected an integer of at least 1"),
    (C3A, {"init_weights": "xavier"}, "init_weights is 'xavier'; expected 'xavier_uniform', 'kaiming_uniform'"),
    (C3A, {"bias": "some"}, "bias is 'some'; expected 'none', 'all' or 'c3a_only'"),
    (PSOFT, {"r": -1}, "r is -1; expected an integer of at least 1"),
    (PSOFT, {"psoft_alpha": 0}, "psoft_alpha is 0; expected a number above 0"),
    (PSOFT, {"psoft_dropout": 1}, "psoft_dropout is 1; expected a rate in [0, 1)"),
    (PSOFT, {"ab_svd_init": "svd"}, "ab_svd_init is 'svd'; expected 'psoft_init' or 'pissa_init'"),
    (PSOFT, {"psoft_svd": "half"}, "psoft_svd is 'half'; expected 'full' or 'lowrank'"),
    (PSOFT, {"psoft_svd_lowrank_niter": -1}, "psoft_svd_lowrank_niter is -1; expected at least 0"),
    (PSOFT, {"use_cayley_neumann": True, "num_cayley_neumann_terms": 0}, "num_cayley_neumann_terms is 0; expected"),
    (PSOFT, {"use_cayley_neumann": True, "cayley_neumann_eps": 1.5}, "cayley_neumann_eps is 1.5; expected a number in"),
])  # fmt: skip
def test_settings_out_of_range_are_refused(config, settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        config(**settings)


@pytest.mark.parametrize(("config", "settings", "message"), [
    (HRA, {"r": 9, "apply_GS": True}, "apply_GS at 'dense': r is 9; expected at most 8"),
    (BOFT, {"boft_block_size": 3}, "boft_block_size is 3 at 'dense'; expected a divisor of its 8 features"),
    (BOFT, {"boft_block_size": 0, "boft_block_num": 5}, "boft_block_num is 5 at 'dense'; expected a divisor of its 8"),
    (BOFT, {"boft_block_size": 1, "boft_n_butterfly_factor": 2}, "with 8 blocks of 1; expected an even size"),
    (BOFT, {"boft_block_size": 4, "boft_n_butterfly_factor": 3}, "with 2 blocks of 4; expected an even size"),
    (MISS, {"r": 9}, "r is 9 at 'dense'; expected at most its 8 inputs"),
    (MISS, {"r": 3, "init_weights": "bat"}, "r is 3 at 'dense', with init_weights='bat'; expected a divisor of its 8"),
    (MISS, {"r": 4, "init_weights": "mini", "mini_r": 5}, "mini_r is 5 at 'dense'; expected a divisor of its 12"),
    (C3A, {"block_size": 8}, "block_size is 8 at 'dense'; expected a divisor of its 8 inputs and of its 12 outputs"),
    (PSOFT, {"r": 9}, "r is 9 at 'dense'; expected at most 8, the rank of a weight of 8 inputs and 12 outputs"),
])  # fmt: skip
def test_layers_that_do_not_fit_are_refused(config, settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        jpeft.wrap(random_like(SHAPES, 7), config(target_modules=["dense"], **settings), layouts=LAYOUTS)


@pytest.mark.parametrize("config", [HRA, OFT, BOFT])
def test_convolutions_over_one_axis_are_refused(config):
    params = random_like({"conv": {"kernel": (3, 4, 6)}}, 7)
    with pytest.raises(ValueError, match=r"at 'conv': the convolution has a window of \(3,\); expected one over two"):
        jpeft.wrap(params, config(target_modules=["conv"]), layouts={"conv.kernel": ".io"})


# ---- cost -----------------------------------------------------------------------------------------------------------

TOKENS, WIDE = 64, 64


def flops(function, *args):
    analysis = jax.jit(function).lower(*args).compile().cost_analysis()
    assert analysis is not None
    return analysis["flops"]


@pytest.mark.parametrize(("config", "settings", "parameters", "for_each_token", "once"), [
    (HRA, {"r": 2}, 64 * 2, 4 * 64 * 2, 0),
    (HRA, {"r": 8}, 64 * 8, 4 * 64 * 8, 0),
    (OFT, {"oft_block_size": 16}, 64 * 15 / 2, 2 * 64 * 16, 0),
    (BOFT, {"boft_block_size": 8, "boft_n_butterfly_factor": 2}, 2 * 64 * 8 + 64, 2 * 2 * 64 * 8, 0),
    (MISS, {"r": 16}, 16 * 64, 64 + 2 * 16 * 64, 0),
    (MISS, {"r": 16, "init_weights": "mini", "mini_r": 8}, 16 * 8, 64 + 2 * 16 * 8 + 64, 0),
    (MISS, {"r": 16, "init_weights": "bat"}, 16 * 64, 2 * 64 * 64, 2 * 64 * 64 * 16),
    (PSOFT, {"r": 8}, 8 * 7 / 2 + 2 * 8, 2 * 8 * 128, 0),
])  # fmt: skip
def test_costs_are_as_said(config, settings, parameters, for_each_token, once):
    params = {"dense": {"kernel": jnp.ones((WIDE, WIDE))}}
    wrapped = jpeft.wrap(params, config(target_modules=["dense"], **settings))
    apply = lambda params, x: x @ params["dense"]["kernel"]  # noqa: E731
    assert jpeft.count_parameters(wrapped)[0] == parameters
    few, many = (
        flops(jpeft.lift(apply), wrapped, jnp.ones((n, WIDE))) - flops(apply, params, jnp.ones((n, WIDE)))
        for n in (TOKENS, 3 * TOKENS)
    )
    np.testing.assert_allclose((many - few) / (2 * TOKENS), for_each_token, rtol=0.05, atol=2 * WIDE)
    if once:
        np.testing.assert_allclose(few - TOKENS * (many - few) / (2 * TOKENS), once, rtol=0.25)


@pytest.mark.parametrize("block", [16, 64])
def test_a_circulant_product_costs_what_its_transforms_do(block):
    size = 256
    params = {"dense": {"kernel": jnp.ones((size, size))}}
    wrapped = jpeft.wrap(params, C3A(target_modules=["dense"], block_size=block))
    apply = lambda params, x: x @ params["dense"]["kernel"]  # noqa: E731
    few, many = (flops(jpeft.lift(apply), wrapped, jnp.ones((n, size))) for n in (64, 192))
    transforms, entries = 5 * 2 * size * np.log2(block), 7 * 2 * size
    # XLA counts two operations for a complex product and sum, which are eight real ones.
    products = 2 * (size / block) ** 2 * (block / 2 + 1)
    found = (many - few) / 128 - 2 * size * size
    np.testing.assert_allclose(found, transforms + products + entries, rtol=0.1)
    assert found < size * size / 2 and jpeft.count_parameters(wrapped)[0] == size * size / block
