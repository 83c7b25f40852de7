"""GraLoRA, PEANuT, DEFT, OSF and AdaMSS: the papers' formulas in numpy float64, costs, beginnings and refusals."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jpeft
from jpeft.methods._clusters import _without_empty
from tests.harness import random_like, with_derived

IN, OUT = 8, 12
SHAPES = {"w": {"kernel": (IN, OUT), "bias": (OUT,)}}
X = np.random.default_rng(5).normal(size=(5, IN))


def dense(params, x):
    return x @ params["w"]["kernel"] + params["w"]["bias"]


def adapted(config, settings, inputs=IN, outputs=OUT):
    """Random parameters with an adapter of random values."""
    shapes = {"w": {"kernel": (inputs, outputs), "bias": (outputs,)}}
    wrapped = jpeft.wrap(
        random_like(shapes, 1, 1.0), config(target_modules=["w"], **settings), dtype=jnp.result_type(float)
    )
    adapter = wrapped.adapters["default"]
    adapter = dataclasses.replace(adapter, weights=random_like(adapter.weights, 2, 0.5))
    return with_derived(dataclasses.replace(wrapped, adapters={"default": adapter}))


def begun(config, inputs=IN, outputs=OUT, **settings):
    """(the weight, the arrays that a fresh adapter begins with)."""
    shapes = {"w": {"kernel": (inputs, outputs)}}
    wrapped = jpeft.wrap(random_like(shapes, 7), config(target_modules=["w"], **settings))
    return wrapped.base["w"]["kernel"], wrapped.adapters["default"].weights["w"]


# ---- formulas -------------------------------------------------------------------------------------------------------


def gralora(w, p, config):
    """Block by block, as in figure 2 of the paper."""
    k, r = config.gralora_k, config.r
    rows, columns, part = w.shape[0] // k, w.shape[1] // k, r // k
    change = np.zeros_like(w)
    for n in range(k):
        for j in range(k):
            a = p["gralora_A"][n][:, j * part : (j + 1) * part]
            b = p["gralora_B"][j][n * part : (n + 1) * part]
            change[n * rows : (n + 1) * rows, j * columns : (j + 1) * columns] = a @ b
    if config.hybrid_r:
        change += (p["gralora_B_general"] @ p["gralora_A_general"]).T
    return w + config.alpha / (r + config.hybrid_r) * change


NUMPY = {
    "relu": lambda x: np.maximum(x, 0),
    "tanh": np.tanh,
    "silu": lambda x: x / (1 + np.exp(-x)),
    "quick_gelu": lambda x: x / (1 + np.exp(-1.702 * x)),
}


def peanut(w, p, config):
    act = NUMPY[config.act_fn]
    levels = [act(w @ p["peanut_A"].T)]
    for index in range(config.depth):
        levels.append(act(levels[-1] @ p[f"peanut_encoders.{index}"].T))
    h = levels.pop()
    for index in range(config.depth):
        h = act(h @ p[f"peanut_decoders.{index}"].T) + levels[-1 - index]
    return w + config.scaling * h @ p["peanut_B"].T


def deft(w, p, config):
    q = p["deft_P"]
    if config.decomposition_method == "qr":
        # Gram and Schmidt, with the signs of Householder's reflections.
        columns = []
        for u in q.T:
            u = u - sum(((other @ u) * other for other in columns), np.zeros_like(u))
            columns.append(u / np.linalg.norm(u))
        signs = np.sign(np.linalg.qr(q)[0].T @ np.stack(columns, 1)).diagonal()
        q = v = np.stack(columns, 1) * signs
    else:
        v = np.maximum(q, 0)
    projected = (np.eye(len(q)) - q @ v.T) @ w.T
    scale = config.alpha / config.r if config.alpha else 1
    return (projected if config.para else projected + scale * q @ p["deft_R"]).T


def osf(w, p, config):
    u, s, v = np.linalg.svd(w.T, full_matrices=False)
    kept = int(min(w.shape) * config.effective_rank) if config.effective_rank < 1 else config.effective_rank
    high = u[:, :kept] * s[:kept] @ v[:kept]
    return (high + p["osf_svd_params.U_low"] * p["osf_svd_params.S_low"] @ p["osf_svd_params.V_low"]).T


def adamss(w, p, config):
    labels = p["adamss_labels"]
    change, start = np.zeros((w.shape[1], p["adamss_newB"].shape[1])), 0
    for group in range(config.num_subspaces):
        rows = np.flatnonzero(labels == group)
        rank = min(len(rows), config.subspace_rank)
        b = p["adamss_B"][start : start + len(rows), :rank]
        change[rows] = b @ p["adamss_A"][group, :rank] @ p["adamss_newB"]
        start += len(rows)
    assert start == len(labels)
    return w + change[:, :-1].T, change[:, -1]


FORMULAS = {
    "gralora": (gralora, jpeft.GraloraConfig, {"r": 8, "gralora_k": 4, "alpha": 5}),
    "gralora, hybrid": (gralora, jpeft.GraloraConfig, {"r": 6, "hybrid_r": 3, "alpha": 4.5}),
    "peanut": (peanut, jpeft.PeanutConfig, {"r": 3, "scaling": 0.75}),
    "peanut, one layer": (peanut, jpeft.PeanutConfig, {"r": 4, "depth": 1, "act_fn": "tanh"}),
    "peanut, three layers": (peanut, jpeft.PeanutConfig, {"r": 4, "depth": 3, "act_fn": "silu"}),
    "deft": (deft, jpeft.DeftConfig, {"r": 3, "alpha": 6}),
    "deft, orthogonal": (deft, jpeft.DeftConfig, {"r": 4, "decomposition_method": "qr"}),
    "deft, para": (deft, jpeft.DeftConfig, {"r": 4, "decomposition_method": "qr", "para": True}),
    "osf": (osf, jpeft.OSFConfig, {"effective_rank": 3}),
    "adamss": (adamss, jpeft.AdamssConfig, {"r": 4, "num_subspaces": 3, "subspace_rank": 4}),
    "osf, a fraction": (osf, jpeft.OSFConfig, {"effective_rank": 0.7}),
}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", FORMULAS)
def test_a_method_is_what_its_paper_says(name):
    formula, config, settings = FORMULAS[name]
    wrapped = adapted(config, settings)
    p = {key: np.asarray(array) for key, array in wrapped.adapters["default"].weights["w"].items()}
    w, b = (np.asarray(wrapped.base["w"][leaf]) for leaf in ("kernel", "bias"))
    expected = formula(w, p, wrapped.adapters["default"].config)
    if isinstance(expected, tuple):
        expected, change = expected
        assert np.abs(change).max() > 1e-2
        b = b + change
        np.testing.assert_allclose(jpeft.merge(wrapped)["w"]["bias"], b, rtol=1e-10, atol=1e-10)
    assert np.abs(expected - w).max() > 1e-2
    np.testing.assert_allclose(jpeft.merge(wrapped)["w"]["kernel"], expected, rtol=1e-10, atol=1e-10)
    lifted = jax.jit(jpeft.lift(dense))(wrapped, X)
    np.testing.assert_allclose(lifted, X @ expected + b, rtol=1e-10, atol=1e-10)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("method", [jpeft.DeftConfig, jpeft.PeanutConfig])
def test_changes_made_of_the_base_weight_add_up(method):
    settings = {"r": 3, "target_modules": ["w"]}
    one = adapted(method, {"r": 3})
    two = jpeft.wrap(one, method(**settings), adapter_name="two", dtype=jnp.float64)
    own = dataclasses.replace(two.adapters["two"], weights=random_like(two.adapters["two"].weights, 9, 0.5))
    two = dataclasses.replace(two, adapters={**two.adapters, "two": own})
    merged = [jpeft.merge(jpeft.set_adapter(two, names))["w"]["kernel"] for names in ("default", "two")]
    expected = sum(merged) - one.base["w"]["kernel"]
    both = jpeft.set_adapter(two, ["default", "two"])
    np.testing.assert_allclose(jpeft.merge(both)["w"]["kernel"], expected, atol=1e-12)
    lifted = jax.jit(jpeft.lift(dense))(both, X)
    np.testing.assert_allclose(lifted, X @ expected + one.base["w"]["bias"], atol=1e-12)


# ---- noise ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("config", "settings"), [
    (jpeft.GraloraConfig, {"r": 4, "hybrid_r": 2, "gralora_dropout": 0.5}),
    (jpeft.DeftConfig, {"r": 3, "deft_dropout": 0.5}),
])  # fmt: skip
def test_dropout_acts_on_what_is_put_in(config, settings):
    wrapped = adapted(config, settings)
    x = jnp.ones((400, IN))
    apply = jax.jit(jpeft.lift(dense))
    quiet, noisy = apply(wrapped, x), apply(jpeft.with_context(wrapped, rng=jax.random.key(1)), x)
    assert np.abs(noisy - quiet).max() > 0.1
    spread = np.abs(noisy - quiet).std(0).max()
    np.testing.assert_allclose(noisy.mean(0), quiet[0], atol=0.3 * spread)


def test_one_input_is_dropped_from_for_both_parts():
    """Where the grid and the LoRA cancel, they do so in training, too."""
    wrapped = adapted(jpeft.GraloraConfig, {"r": 2, "gralora_k": 1, "hybrid_r": 2, "gralora_dropout": 0.5})
    own = wrapped.adapters["default"].weights["w"]
    own["gralora_A_general"], own["gralora_B_general"] = own["gralora_A"][0].T, -own["gralora_B"][0].T
    noisy = jax.jit(jpeft.lift(dense))(jpeft.with_context(wrapped, rng=jax.random.key(1)), jnp.asarray(X, jnp.float32))
    np.testing.assert_allclose(noisy, dense(wrapped.base, jnp.asarray(X, jnp.float32)), atol=1e-5)


# ---- beginning ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("config", "settings", "deviations"), [
    (jpeft.GraloraConfig, {"r": 16, "gralora_k": 4, "hybrid_r": 8}, {
        "gralora_A": 1 / np.sqrt(3 * 64), "gralora_A_general": 1 / np.sqrt(3 * 256),
        "gralora_B": 0, "gralora_B_general": 0,
    }),
    (jpeft.GraloraConfig, {"r": 16, "gralora_k": 4, "hybrid_r": 8, "init_weights": False}, {
        "gralora_B": 1 / np.sqrt(3 * 16), "gralora_B_general": 1 / np.sqrt(3 * 8),
    }),
    (jpeft.PeanutConfig, {"r": 16, "depth": 1}, {
        "peanut_A": 1 / np.sqrt(3 * 128), "peanut_encoders.0": 1 / np.sqrt(3 * 16),
        "peanut_decoders.0": 1 / np.sqrt(3 * 16), "peanut_B": 0,
    }),
    (jpeft.PeanutConfig, {"r": 16, "init_weights": False}, {"peanut_B": 1 / np.sqrt(3 * 16)}),
    (jpeft.DeftConfig, {"r": 16, "para": True}, {"deft_P": 0.02}),
    (jpeft.DeftConfig, {"r": 16, "init_weights": False, "init_scale": 0.5}, {"deft_P": 0.02, "deft_R": 0.01}),
    (jpeft.OSFConfig, {"init_weights": False}, {"osf_svd_params.U_low": 1, "osf_svd_params.V_low": 1}),
])  # fmt: skip
def test_initial_values_are_spread_as_in_peft(config, settings, deviations):
    _, arrays = begun(config, 256, 128, **settings)
    for name, deviation in deviations.items():
        np.testing.assert_allclose(np.asarray(arrays[name]).std(), deviation, rtol=0.15, err_msg=name)


@pytest.mark.parametrize("form", ["relu", "qr"])
def test_what_is_put_in_begins_as_what_is_taken_out(form):
    w, arrays = begun(jpeft.DeftConfig, r=3, alpha=6, decomposition_method=form)
    left = np.asarray(arrays["deft_P"], np.float64)
    right = np.linalg.qr(left)[0] if form == "qr" else np.maximum(left, 0)
    np.testing.assert_allclose(2 * arrays["deft_R"], right.T @ np.asarray(w).T, atol=1e-5)


def test_ranks_are_counted_as_in_peft():
    for settings, k in (
        ({}, 4), ({"effective_rank": 3}, 5), ({"effective_rank": 0.4}, 5), ({"effective_rank": 1.0}, 0),
        ({"effective_rank": 20}, 0), ({"effective_rank": 2.9}, 6), ({"rank_pattern": {"^.$": 0.99}}, 1),
    ):  # fmt: skip
        _, arrays = begun(jpeft.OSFConfig, **settings)
        assert arrays["osf_svd_params.U_low"].shape == (OUT, k)
    assert begun(jpeft.DeftConfig, 8, 2)[1]["deft_P"].shape == (2, 2)


def test_a_pattern_that_is_found_nowhere_warns():
    with pytest.warns(UserWarning, match=r"rank_pattern keys that match no adapted module and were ignored: \['up'\]"):
        begun(jpeft.OSFConfig, rank_pattern={"up": 2})


# ---- projection of OSF's gradients ----------------------------------------------------------------------------------


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("inputs", "outputs"), [(8, 12), (12, 8), (8, 8)])
def test_what_osf_learns_is_orthogonal_to_what_it_keeps(inputs, outputs):
    wrapped = adapted(jpeft.OSFConfig, {"effective_rank": 3}, inputs, outputs)
    grads = random_like(wrapped, 30)
    tx = optax.chain(jpeft.osf_gradient_projection(), optax.scale(2.0))
    found, _ = jax.jit(tx.update)(grads, tx.init(wrapped), wrapped)
    u, _, v = np.linalg.svd(np.asarray(wrapped.base["w"]["kernel"]).T)
    own, given = (tree.adapters["default"].weights["w"] for tree in (found, grads))
    left, right = (np.eye(len(m)) - h @ h.T for m, h in ((u, u[:, :3]), (v, v[:3].T)))
    np.testing.assert_allclose(own["osf_svd_params.U_low"], 2 * left @ given["osf_svd_params.U_low"], atol=1e-12)
    np.testing.assert_allclose(own["osf_svd_params.V_low"], 2 * given["osf_svd_params.V_low"] @ right, atol=1e-12)
    np.testing.assert_allclose(own["osf_svd_params.S_low"], 2 * given["osf_svd_params.S_low"])


def test_a_stack_of_layers_and_half_a_tree_are_projected():
    params = {"layers": {"0:3": {"up": {"kernel": random_like((3, 6, 4), 1, 1.0)}}}}
    wrapped = jpeft.wrap(params, jpeft.OSFConfig(target_modules=["up"], effective_rank=2))
    lora = jpeft.LoraConfig(r=2, target_modules=["up"])
    wrapped = jpeft.wrap(wrapped, lora, adapter_name="lora")
    grads = jax.tree.map(jnp.ones_like, jpeft.partition(wrapped)[0])
    tx = jpeft.osf_gradient_projection()
    found, _ = tx.update(grads, tx.init(wrapped), wrapped)
    assert jax.tree.structure(found) == jax.tree.structure(grads)
    own = found.adapters["default"].weights["layers.0:3.up"]["osf_svd_params.V_low"]
    for layer in range(3):
        vectors = np.linalg.svd(np.asarray(params["layers"]["0:3"]["up"]["kernel"][layer]).T)[2]
        np.testing.assert_allclose(own[layer] @ vectors[:2].T, np.zeros((2, 2)), atol=1e-5)


def test_projection_needs_the_vectors():
    wrapped = adapted(jpeft.OSFConfig, {})
    half, tx = jpeft.partition(wrapped)[0], jpeft.osf_gradient_projection()
    with pytest.raises(ValueError, match=r"update got no parameters; expected tx.update\(grads, state, params\)"):
        tx.update(half, tx.init(wrapped))
    with pytest.raises(ValueError, match="params hold no osf_U_low_init at 'w': they are the trainable half of a part"):
        tx.update(half, tx.init(wrapped), half)


# ---- groups of AdaMSS -----------------------------------------------------------------------------------------------


def test_groups_gather_outputs_that_use_the_inputs_alike():
    """Outputs in three planes of their own, which k-means has to find whatever it begins from."""
    generator = np.random.default_rng(1)
    planes = np.linalg.qr(generator.normal(size=(24, 3)))[0].T
    of = np.arange(40) % 3
    w = planes[of] * (3 + generator.random((40, 1))) + 0.01 * generator.normal(size=(40, 24))
    params = {"w": {"kernel": jnp.asarray(w.T, jnp.float32)}}
    wrapped = jpeft.wrap(params, jpeft.AdamssConfig(target_modules=["w"], r=3, num_subspaces=3, subspace_rank=2))
    arrays = wrapped.adapters["default"].weights["w"]
    labels = np.asarray(arrays["adamss_labels"])
    assert len({(int(a), int(b)) for a, b in zip(labels, of, strict=True)}) == 3
    assert arrays["adamss_ranks"].tolist() == [2, 2, 2]
    np.testing.assert_allclose(np.einsum("kqr,ksr->kqs", *[arrays["adamss_A"]] * 2), [np.eye(2)] * 3, atol=1e-5)
    basis = np.asarray(arrays["adamss_newB"])
    np.testing.assert_allclose(basis @ basis.T, np.eye(3), atol=1e-5)
    # The first direction of a group is that of its plane.
    for group in range(3):
        along = arrays["adamss_A"][group, 0] @ basis @ planes[of[labels == group][0]]
        np.testing.assert_allclose(abs(along), 1, atol=1e-3)
    dynamic = jpeft.AdamssConfig(
        target_modules=["w"], r=3, num_subspaces=3, subspace_rank=2, use_dynamic_rank=True, init_weights=None
    )
    arrays = jpeft.wrap(params, dynamic).adapters["default"].weights["w"]
    assert arrays["adamss_ranks"].tolist() == [1, 1, 1]
    assert not arrays["adamss_A"][:, 1].any()
    np.testing.assert_allclose(np.asarray(arrays["adamss_B"]).std(), 0.01, rtol=0.3)


def test_a_group_that_is_left_empty_takes_what_is_farthest():
    """As in scikit-learn: of rows far out, the two centres in the middle lose one to them."""
    x = jnp.asarray([[0.0], [0.1], [0.2], [9.0], [30.0]])
    labels = _without_empty(x, jnp.asarray([0, 0, 0, 2, 2], jnp.int32), jnp.asarray([[0.1], [5.0], [12.0]]))
    assert labels.tolist() == [0, 0, 0, 2, 1]


def asa(**settings):
    return jpeft.AdamssConfig(
        **{
            "target_modules": ["up"],
            "r": 4,
            "num_subspaces": 3,
            "use_asa": True,
            "asa_target_subspaces": 2,
            "init_warmup": 1,
            "final_warmup": 6,
            "mask_interval": 1,
            **settings,
        }
    )


def test_groups_of_a_stack_stop_for_good():
    params = {"layers": {"0:2": {"up": {"kernel": random_like((2, 6, 8), 1, 1.0), "bias": random_like((2, 8), 2)}}}}
    wrapped = jpeft.wrap(params, asa())
    tx = jpeft.adamss_allocation(optax.adamw(0.1, weight_decay=0.1))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(16, 6)), jnp.float32)

    def loss(params):
        own = params["layers"]["0:2"]["up"]
        return ((jnp.einsum("bi,lio->lbo", x, own["kernel"]) + own["bias"][:, None] - 1) ** 2).mean()

    @jax.jit
    def step(wrapped, state):
        updates, state = tx.update(jpeft.grad(jpeft.lift(loss))(wrapped), state, wrapped)
        return optax.apply_updates(wrapped, updates), state

    state, counts, path = tx.init(wrapped), [], "layers.0:2.up"
    for _ in range(10):
        # Adam in optax needs the usual promotion.
        with jax.numpy_dtype_promotion("standard"):
            before, (wrapped, state) = wrapped, step(wrapped, state)
        active = np.asarray(state.modules["default"][path].active)
        counts.append(int(active.sum()))
    assert counts == [6, 6, 4, 2, 2, 2, 2, 2, 2, 2]
    own, old = (tree.adapters["default"].weights[path] for tree in (wrapped, before))
    rows = np.take_along_axis(active, np.sort(own["adamss_labels"]), 1)
    for name, mask in (("adamss_A", active), ("adamss_B", rows)):
        moved = np.abs(np.asarray(own[name]) - np.asarray(old[name])).max(-1)
        assert (moved.reshape(*mask.shape, -1).max(-1) > 0).tolist() == mask.tolist()
    assert step._cache_size() == 1


def test_allocation_needs_groups_and_parameters():
    params = {"up": {"kernel": random_like((6, 8), 1, 1.0)}}
    wrapped, plain = jpeft.wrap(params, asa()), jpeft.wrap(params, asa(use_asa=False))
    tx = jpeft.adamss_allocation(optax.sgd(0.1))
    with pytest.raises(
        ValueError, match=r"the adapters are \['default'\], and none has groups to choose among; expected"
    ):
        tx.init(plain)
    with pytest.raises(ValueError, match="params hold no adamss_labels at 'up': they are the trainable half of a part"):
        tx.init(jpeft.partition(wrapped)[0])
    with pytest.raises(ValueError, match=r"update got no parameters; expected tx.update\(grads, state, params\)"):
        tx.update(wrapped, tx.init(wrapped))
    late = jpeft.adamss_allocation(optax.sgd(0.1))
    wrapped = jpeft.wrap(params, asa(init_warmup=3, final_warmup=4, mask_interval=5))
    _, state = late.update(jax.tree.map(jnp.zeros_like, wrapped), late.init(wrapped), wrapped)
    assert state.modules["default"]["up"].active.all()


# ---- cost -----------------------------------------------------------------------------------------------------------


def flops(function, *args):
    return jax.jit(function).lower(*args).compile().cost_analysis()["flops"]


ROWS, N_IN, N_OUT = 256, 64, 96
COSTS = {
    "gralora": (jpeft.GraloraConfig, {"r": 8, "hybrid_r": 4}, 12 * 160, ROWS * 2 * 12 * 160),
    "peanut": (
        jpeft.PeanutConfig,
        {"r": 8, "depth": 2},
        2 * 8 * 96 + 4 * 64,
        ROWS * 2 * 8 * 160 + 2 * 64 * 96 * 8 + 4 * 2 * 64 * 64,
    ),
    "deft": (jpeft.DeftConfig, {"r": 8}, 8 * 160, ROWS * 2 * 8 * (64 + 2 * 96)),
    "deft, para": (jpeft.DeftConfig, {"r": 8, "para": True}, 8 * 96, ROWS * 4 * 8 * 96),
    "osf": (jpeft.OSFConfig, {"effective_rank": 56}, 8 * 161, ROWS * 4 * 8 * 160),
    "adamss": (
        jpeft.AdamssConfig,
        {"r": 16, "num_subspaces": 4, "subspace_rank": 2},
        2 * (4 * 16 + 96),
        ROWS * 2 * 8 * 160 + 2 * 8 * 16 * 65,
    ),
}


@pytest.mark.parametrize("name", COSTS)
def test_a_method_costs_what_its_file_says(name):
    config, settings, parameters, added = COSTS[name]
    wrapped, x = adapted(config, settings, N_IN, N_OUT), jnp.ones((ROWS, N_IN))
    assert jpeft.count_parameters(wrapped)[0] == parameters
    # Besides products there are sums over outputs, a few for each token.
    found = flops(jpeft.lift(dense), wrapped, x) - flops(dense, wrapped.base, x)
    assert added <= found <= 1.02 * added + 4 * ROWS * N_OUT


# ---- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("config", "settings", "message"), [
    (jpeft.GraloraConfig, {"r": 0}, "r is 0; expected an integer of at least 1"),
    (jpeft.GraloraConfig, {"gralora_k": 0}, "gralora_k is 0; expected an integer of at least 1"),
    (jpeft.GraloraConfig, {"hybrid_r": -1}, "hybrid_r is -1; expected an integer of at least 0"),
    (jpeft.GraloraConfig, {"r": 5}, "r is 5 and gralora_k is 2; expected r to be a multiple of it"),
    (jpeft.GraloraConfig, {"gralora_dropout": 1.0}, "gralora_dropout is 1.0; expected a rate in [0, 1)"),
    (jpeft.GraloraConfig, {"bias": "some"}, "bias is 'some'; expected 'none', 'all' or 'gralora_only'"),
    (jpeft.PeanutConfig, {"r": 0.5}, "r is 0.5; expected an integer of at least 1"),
    (jpeft.PeanutConfig, {"depth": -1}, "depth is -1; expected an integer of at least 0"),
    (jpeft.PeanutConfig, {"act_fn": "step"}, "act_fn is 'step'; expected one of gelu, gelu_10, "),
    (jpeft.DeftConfig, {"r": 0}, "r is 0; expected an integer of at least 1"),
    (jpeft.DeftConfig, {"decomposition_method": "svd"}, "decomposition_method is 'svd'; expected 'relu' or 'qr'"),
    (jpeft.DeftConfig, {"deft_dropout": -1}, "deft_dropout is -1; expected a rate in [0, 1)"),
    (jpeft.DeftConfig, {"bias": "some"}, "bias is 'some'; expected 'none', 'all' or 'deft_only'"),
    (jpeft.AdamssConfig, {"num_subspaces": 0}, "num_subspaces is 0; expected an integer of at least 1"),
    (jpeft.AdamssConfig, {"init_weights": "random"}, "init_weights is 'random'; expected 'orthogonal' or None"),
    (jpeft.AdamssConfig, {"use_asa": True, "mask_interval": 0}, "mask_interval is 0 with use_asa=True; expected"),
    (jpeft.AdamssConfig, {"use_asa": True, "asa_importance_beta": 1}, "asa_importance_beta is 1 with use_asa=True; ex"),
    (jpeft.AdamssConfig, {"use_asa": True, "init_warmup": 1000}, "init_warmup is 1000 and final_warmup is 1000 with "),
    (jpeft.OSFConfig, {"effective_rank": 0}, "effective_rank is 0; expected an integer of at least 1, a fraction"),
    (jpeft.OSFConfig, {"rank_pattern": {"q": -1}}, "rank_pattern['q'] is -1; expected an integer of at least 1"),
])  # fmt: skip
def test_settings_out_of_range_are_refused(config, settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        config(**settings)


@pytest.mark.parametrize(("config", "settings", "message"), [
    (jpeft.GraloraConfig, {"r": 6, "gralora_k": 3}, "gralora_k is 3 at 'w'; expected a divisor of its 8 inputs and of"),
    (jpeft.OSFConfig, {"effective_rank": 0.1}, "effective_rank is 0.1 at 'w', which is 0 of its 8 singular values"),
])  # fmt: skip
def test_layers_that_do_not_fit_are_refused(config, settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        begun(config, **settings)
