"""`make_train_step`: against loops written out by hand, on one device and on eight."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import jpeft
from jpeft import LoraConfig, TrainState, make_train_step, train_state

KEY = jax.random.key(7)
TX = optax.adamw(1e-2, weight_decay=0.1)


def model(params, x):
    h = jnp.tanh(x.astype(params["up"]["kernel"].dtype) @ params["up"]["kernel"])
    return h @ params["down"]["kernel"]


def mean_square(apply, params, batch):
    return jnp.mean(jnp.square(apply(params, batch["x"]) - batch["y"]))


def wrap(dtype=jnp.float32, base=jnp.float32, size=8, **fields):
    keys = jax.random.split(KEY, 3)
    params = {
        "up": {"kernel": jax.random.normal(keys[0], (6, size), base)},
        "down": {"kernel": jax.random.normal(keys[1], (size, 4), base)},
    }
    config = LoraConfig(r=2, target_modules=["up", "down"], init_lora_weights=False, **fields)
    return jpeft.wrap(params, config, rng=keys[2], dtype=dtype)


def batch(rows=8):
    keys = jax.random.split(KEY, 2)
    return {"x": jax.random.normal(keys[0], (rows, 6)), "y": jax.random.normal(keys[1], (rows, 4))}


def by_hand(loss, tx, clip=None):
    """The loop of the README, over the halves."""

    def step(trainable, frozen, opt_state, batch):
        def of_trainable(trainable):
            return loss(jpeft.lift(model), jpeft.combine(trainable, frozen), batch)

        value, grads = jax.value_and_grad(of_trainable)(trainable)
        norm = jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(grads)))
        if clip is not None:
            grads = jax.tree.map(lambda leaf: leaf * jnp.minimum(1, clip / norm), grads)
        with jax.numpy_dtype_promotion("standard"):
            updates, opt_state = tx.update(grads, opt_state, trainable)
            return optax.apply_updates(trainable, updates), opt_state, value, norm

    return step


def arrays_of(wrapped):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(jpeft.partition(wrapped)[0])]


def assert_close(first, second, **tolerance):
    for x, y in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_allclose(x, y, **{"rtol": 2e-5, "atol": 1e-6, **tolerance})


@pytest.mark.parametrize("clip", [None, 0.5])
def test_steps_are_those_of_a_loop_by_hand_and_compile_once(clip):
    traces = []

    def loss(apply, params, batch):
        traces.append(0)
        return mean_square(apply, params, batch), {
            "rows": batch["x"].shape[0],
            "largest": apply(params, batch["x"]).max(),
        }

    wrapped, reference = wrap(), jax.jit(by_hand(mean_square, TX, clip))
    (trainable, frozen), opt_state = jpeft.partition(wrapped), TX.init(jpeft.partition(wrapped)[0])
    state, step = train_state(wrapped, TX), make_train_step(model, loss, TX, clip_norm=clip, donate=False)
    for number in range(4):
        trainable, opt_state, value, norm = reference(trainable, frozen, opt_state, batch())
        state, metrics = step(state, batch())
        assert_close((metrics["loss"], metrics["grad_norm"]), (value, norm))
        assert int(state.step) == number + 1 and int(metrics["rows"]) == 8 and metrics["largest"].shape == ()
    assert len(traces) == 1
    assert_close(arrays_of(state.params), jax.tree.leaves(trainable))
    assert_close(state.opt_state, opt_state)
    assert all(x is y for x, y in zip(jax.tree.leaves(state.params.base), jax.tree.leaves(wrapped.base), strict=True))


def test_a_lifted_function_and_a_plain_one_are_the_same():
    wrapped = wrap()
    steps = [make_train_step(f, mean_square, TX, donate=False) for f in (model, jpeft.lift(model))]
    (one, own), (two, same) = (step(train_state(wrapped, TX), batch()) for step in steps)
    assert own["loss"] == same["loss"]
    assert all(np.array_equal(x, y) for x, y in zip(arrays_of(one.params), arrays_of(two.params), strict=True))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_accumulated_gradients_are_those_of_the_whole_batch(dtype):
    def loss(apply, params, batch):
        return mean_square(apply, params, batch), {"rows": jnp.int32(batch["x"].shape[0]), "mean": batch["x"].mean()}

    tx, given = optax.sgd(1.0), {**batch(12), "unit": np.float32(1)}
    state = train_state(wrap(dtype), tx)
    whole, of_whole = make_train_step(model, loss, tx, donate=False)(state, given)
    parts, of_parts = make_train_step(model, loss, tx, accumulate=3, donate=False)(state, given)
    close = {"rtol": 2e-5, "atol": 1e-6} if dtype == "float32" else {"rtol": 0.02, "atol": 0.02}
    assert {name: str(leaf.dtype) for name, leaf in of_parts.items()} == {
        "loss": "float32", "grad_norm": "float32", "rows": "int32", "mean": "float32",
    }  # fmt: skip
    assert int(of_parts["rows"]) == 12
    assert_close(of_parts, {**of_whole, "rows": jnp.int32(12)}, **close)
    for x, y in zip(arrays_of(whole.params), arrays_of(parts.params), strict=True):
        assert x.dtype == y.dtype == jnp.dtype(dtype)
        np.testing.assert_allclose(x.astype(np.float32), y.astype(np.float32), **close)


def test_losses_over_tokens_that_count_are_weighed_by_their_number():
    """Against the mean over the whole batch; one part has no token at all, and its mean is NaN."""
    kept = jnp.asarray([1, 0, 1, 0, 1, 0, 0, 0, 1, 0, 1, 0])

    def loss(apply, params, batch):
        errors = jnp.square(apply(params, batch["x"]) - batch["y"]).mean(-1)
        return jnp.sum(jnp.where(batch["kept"] > 0, errors, 0)) / batch["kept"].sum().astype(errors.dtype)

    tx, given = optax.sgd(1.0), {**batch(12), "kept": kept}
    state = train_state(wrap(), tx)
    whole, expected = make_train_step(model, loss, tx, donate=False)(state, given)
    step = make_train_step(model, loss, tx, accumulate=4, weight=lambda batch: batch["kept"].sum(), donate=False)
    parts, found = step(state, given)
    assert np.isnan(loss(jpeft.lift(model), state.params, jax.tree.map(lambda leaf: leaf[1::4], given)))
    assert_close((found, arrays_of(parts.params)), (expected, arrays_of(whole.params)))


def test_dropout_has_a_key_for_each_step_and_micro_batch_and_the_same_after_a_restart():
    seen = []

    def loss(apply, params, batch):
        jax.debug.callback(lambda data: seen.append(tuple(np.asarray(data).tolist())), params.context["rng"].data)
        return mean_square(apply, params, batch)

    wrapped, key = wrap(lora_dropout=0.5), jax.random.key(11)
    step = make_train_step(model, loss, TX, accumulate=2, donate=False)
    first = train_state(wrapped, TX, rng=key)
    states, losses = [first], []
    for _ in range(3):
        state, metrics = step(states[-1], batch())
        states.append(state)
        losses.append(float(metrics["loss"]))
    jax.effects_barrier()
    folded = [jax.random.fold_in(jax.random.fold_in(key, number), part) for number in range(3) for part in range(2)]
    assert sorted(seen) == sorted(tuple(np.asarray(jax.random.key_data(own)).tolist()) for own in folded)
    assert len(set(seen)) == 6
    again = dataclasses.replace(train_state(wrapped, TX, rng=key), step=jnp.int32(2))
    again = dataclasses.replace(again, params=states[2].params, opt_state=states[2].opt_state)
    assert float(step(again, batch())[1]["loss"]) == losses[2]
    elsewhere = dataclasses.replace(again, step=jnp.int32(1))
    assert float(step(elsewhere, batch())[1]["loss"]) != losses[2]


def test_without_a_key_dropout_is_off_and_a_key_in_the_context_becomes_the_states():
    dropped, plain = wrap(lora_dropout=0.5), wrap()
    step = make_train_step(model, mean_square, TX, donate=False)
    off = step(train_state(dropped, TX), batch())[1]["loss"]
    assert float(off) == float(step(train_state(plain, TX), batch())[1]["loss"])
    held = train_state(jpeft.with_context(dropped, rng=KEY), TX)
    assert held.params.context == {} and held.rng is not None
    assert np.array_equal(held.rng.data, jax.random.key_data(KEY))
    assert float(step(held, batch())[1]["loss"]) != float(off)


def test_mixed_precision_computes_in_it_and_keeps_adapters_and_moments():
    seen = []

    def loss(apply, params, batch):
        y = apply(params, batch["x"])
        seen.append({str(leaf.dtype) for leaf in (y, batch["x"], *jax.tree.leaves(params.base))})
        return jnp.mean(jnp.square((y - batch["y"]).astype(jnp.float32)))

    tx = optax.adam(1e-2)
    step = make_train_step(model, loss, tx, compute_dtype="bfloat16", donate=False)
    wrapped = wrap()
    state, metrics = step(train_state(wrapped, tx), batch())
    assert seen == [{"bfloat16"}]
    kept = (state.params.base, arrays_of(state.params), state.opt_state[0].mu, metrics)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(kept)} == {"float32"}
    exact = make_train_step(model, loss, tx, donate=False)(train_state(wrapped, tx), batch())[1]
    np.testing.assert_allclose(metrics["loss"], exact["loss"], rtol=0.05)
    assert float(metrics["loss"]) != float(exact["loss"])


def test_moments_have_the_dtype_of_bfloat16_adapters_and_nothing_else_compiles():
    traces = []

    def loss(apply, params, batch):
        traces.append(0)
        return mean_square(apply, params, batch)

    for tx in (optax.adamw(1e-2), optax.inject_hyperparams(optax.adamw)(learning_rate=1e-2)):
        step = make_train_step(model, loss, tx, donate=False)
        state = train_state(wrap("bfloat16"), tx)
        before = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state)
        traces.clear()
        for _ in range(3):
            state, _ = step(state, batch())
        assert len(traces) == 1
        assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state) == before
        adam = state.opt_state[0] if isinstance(state.opt_state, tuple) and len(state.opt_state) == 3 else None
        adam = state.opt_state.inner_state[0] if adam is None else adam
        assert {str(leaf.dtype) for leaf in jax.tree.leaves((adam.mu, adam.nu))} == {"bfloat16"}


def test_optimizers_of_optax_work_within():
    """Steps over several batches, steps that leave out what is not finite, rates that follow the loss."""
    multi = optax.MultiSteps(optax.sgd(0.1), every_k_schedule=2).gradient_transformation()
    step, state = make_train_step(model, mean_square, multi, donate=False), train_state(wrap(), multi)
    once, _ = step(state, batch())
    twice, _ = step(once, batch())
    assert_close(arrays_of(once.params), arrays_of(state.params), rtol=0, atol=0)
    plain = make_train_step(model, mean_square, optax.sgd(0.1), donate=False)
    assert_close(arrays_of(twice.params), arrays_of(plain(train_state(wrap(), optax.sgd(0.1)), batch())[0].params))

    finite = optax.apply_if_finite(optax.sgd(0.1), max_consecutive_errors=3)
    state = train_state(wrap(), finite)
    bad, metrics = make_train_step(model, mean_square, finite, donate=False)(
        state, {**batch(), "x": jnp.full((8, 6), jnp.nan)}
    )
    assert np.isnan(metrics["loss"]) and np.isnan(metrics["grad_norm"]) and int(bad.opt_state.notfinite_count) == 1
    assert_close(arrays_of(bad.params), arrays_of(state.params), rtol=0, atol=0)

    rates = optax.chain(optax.sgd(0.0), optax.contrib.reduce_on_plateau(factor=0.5, patience=1))
    step, state = make_train_step(model, mean_square, rates, donate=False), train_state(wrap(), rates)
    for _ in range(4):
        state, _ = step(state, batch())
    assert float(state.opt_state[1].scale) < 1


def test_masks_and_optimizers_of_loras_factors_see_what_trains():
    masked = optax.masked(optax.adam(1e-2), jpeft.trainable_mask)
    found, _ = make_train_step(model, mean_square, masked, donate=False)(train_state(wrap(), masked), batch())
    plain = optax.adam(1e-2)
    expected, _ = make_train_step(model, mean_square, plain, donate=False)(train_state(wrap(), plain), batch())
    assert_close(arrays_of(found.params), arrays_of(expected.params), rtol=0, atol=0)
    plus = jpeft.create_loraplus_optimizer(optax.sgd, lr=0.1, loraplus_lr_ratio=4.0)
    state = train_state(wrap(), plus)
    after, _ = make_train_step(model, mean_square, plus, donate=False)(state, batch())
    trainable, frozen = jpeft.partition(state.params)
    grads = jax.grad(lambda half: mean_square(jpeft.lift(model), jpeft.combine(half, frozen), batch()))(trainable)
    for name, rate in (("lora_A", 0.1), ("lora_B", 0.4)):
        own, grad, new = (tree.adapters["default"].weights["up"][name] for tree in (state.params, grads, after.params))
        np.testing.assert_allclose(new, own - rate * grad, rtol=1e-4, atol=1e-5)


def test_quantised_bases_stay_and_dequantise_to_the_dtype_of_the_computation():
    seen = []

    def loss(apply, params, batch):
        seen.append(params.base["up"]["kernel"].dtype)
        return jnp.mean(jnp.square((apply(params, batch["x"]) - batch["y"]).astype(jnp.float32)))

    small, tx = jpeft.quantize(wrap(), "int8"), optax.sgd(0.1)
    step = make_train_step(model, loss, tx, compute_dtype="bfloat16", accumulate=2)
    state, _ = step(train_state(small, tx), batch())
    assert {str(dtype) for dtype in seen} == {"bfloat16"}
    assert str(state.params.base["up"]["kernel"].dtype) == "float32"
    kept, given = jax.tree.leaves(state.params.base), jax.tree.leaves(small.base)
    assert all(x is y for x, y in zip(kept, given, strict=True))


def test_a_step_costs_what_the_loop_by_hand_costs():
    """FLOPs and temporaries of the compiled programs, with donation; the base is neither copied nor returned."""
    wrapped = wrap(size=512)
    trainable, frozen = jpeft.partition(wrapped)
    hand = jax.jit(by_hand(mean_square, TX, 0.5), donate_argnums=(0, 2))
    one = hand.lower(trainable, frozen, TX.init(trainable), batch()).compile()
    state = train_state(wrapped, TX)
    two = make_train_step(model, mean_square, TX, clip_norm=0.5).lower(state, batch()).compile()
    memory, reference = two.memory_analysis(), one.memory_analysis()
    assert two.cost_analysis()["flops"] <= one.cost_analysis()["flops"] + 4
    assert memory.temp_size_in_bytes <= reference.temp_size_in_bytes + 64
    changes = jax.tree.leaves((trainable, state.opt_state, state.step))
    changed = sum(leaf.nbytes for leaf in changes)
    assert memory.alias_size_in_bytes == changed
    assert memory.output_size_in_bytes - changed <= 8 * (len(changes) + 4)  # scalars, and a pointer each
    assert memory.argument_size_in_bytes <= reference.argument_size_in_bytes + 64


def test_donation_takes_what_trains_and_leaves_the_base():
    wrapped = wrap()
    state = train_state(wrapped, TX)
    after, _ = make_train_step(model, mean_square, TX)(state, batch())
    gone = [leaf.is_deleted() for leaf in jax.tree.leaves((jpeft.partition(state.params)[0], state.opt_state))]
    assert all(gone)
    kept = jax.tree.leaves((wrapped.base, after.params.adapters["default"].scaling, after.opt_state))
    assert not any(leaf.is_deleted() for leaf in kept)


def test_abstract_states_compile_to_the_same_program():
    wrapped, step = wrap(), make_train_step(model, mean_square, TX, accumulate=2)
    concrete = train_state(wrapped, TX, rng=KEY)
    abstract = train_state(jax.eval_shape(lambda: wrap()), TX, rng=KEY)
    assert jax.tree.structure(abstract) == jax.tree.structure(concrete)
    for x, y in zip(jax.tree.leaves(abstract), jax.tree.leaves(concrete), strict=True):
        assert isinstance(x, jax.ShapeDtypeStruct) and (x.shape, x.dtype) == (y.shape, y.dtype)
    shapes = jax.eval_shape(batch)
    assert step.lower(abstract, shapes).compile().as_text() == step.lower(concrete, batch()).compile().as_text()


@pytest.mark.parametrize("axes", [AxisType.Auto, AxisType.Explicit])
def test_on_a_mesh_it_is_the_same_step_and_everything_stays_where_it_was(axes):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(axes,) * 2)

    def at(*spec):
        return NamedSharding(mesh, P(*spec))

    def place(path, leaf):
        name = jax.tree_util.keystr(path)
        spec = {"up']['lora_B": ("model",), "base['up']": (None, "model"), "base['down']": ("model",)}
        return jax.device_put(leaf, at(*next((own for part, own in spec.items() if part in name), ())))

    def spread(params, x):
        out = at("data") if axes == AxisType.Explicit else None
        h = jnp.einsum("bi,io->bo", x, params["up"]["kernel"], out_sharding=at("data", "model") if out else None)
        return jnp.einsum("bi,io->bo", jnp.tanh(h), params["down"]["kernel"], out_sharding=out)

    wrapped = wrap()
    one = make_train_step(model, mean_square, TX, accumulate=2, donate=False)
    alone = train_state(wrapped, TX, rng=KEY)
    for _ in range(3):
        alone, expected = one(alone, batch(16))
    placed = jax.tree_util.tree_map_with_path(place, wrapped)
    rows = jax.device_put(batch(16), at("data"))
    traces = []

    def loss(apply, params, batch):
        traces.append(0)
        return mean_square(apply, params, batch)

    with jax.set_mesh(mesh):
        step, state = make_train_step(spread, loss, TX, accumulate=2), train_state(placed, TX, rng=KEY)
        before = jax.tree.map(lambda leaf: leaf.sharding, state)
        trained = state.params.adapters["default"].weights["up"]["lora_B"].sharding
        assert state.opt_state[0].mu.adapters["default"].weights["up"]["lora_B"].sharding == trained == at("model")
        text = step.lower(state, rows).compile().as_text()
        assert "all-to-all" not in text and "collective-permute" not in text
        traces.clear()
        for _ in range(3):
            state, metrics = step(state, rows)
        assert len(traces) <= 1
        assert jax.tree.map(lambda leaf: leaf.sharding, state) == before
    assert_close((metrics, arrays_of(state.params)), (expected, arrays_of(alone.params)), rtol=1e-4)


def test_a_population_takes_a_step_each_with_a_norm_of_its_own():
    first = wrap()
    larger = jax.tree.map(lambda leaf: leaf * jnp.asarray(1.5, leaf.dtype), first.adapters)
    members = [first, dataclasses.replace(first, adapters=larger)]
    population = jpeft.stack_adapters(members)
    axes = TrainState(params=jpeft.population_axes(population), opt_state=0, step=0, rng=None)
    step = make_train_step(model, mean_square, TX, clip_norm=0.5, donate=False)
    state = jax.vmap(lambda params: train_state(params, TX), in_axes=(axes.params,), out_axes=axes)(population)
    mapped = jax.jit(jax.vmap(step, in_axes=(axes, None), out_axes=(axes, 0)))
    for _ in range(2):
        state, metrics = mapped(state, batch())
    for index, member in enumerate(members):
        own = train_state(member, TX)
        for _ in range(2):
            own, expected = step(own, batch())
        found = jpeft.unstack_adapters(state.params)[index]
        assert_close(arrays_of(found), arrays_of(own.params))
        assert_close({name: metric[index] for name, metric in metrics.items()}, expected)


STATE_CASES = [
    ({"accumulate": 0}, ValueError, "accumulate is 0; expected a whole number of micro-batches, at least 1"),
    ({"accumulate": 2.0}, ValueError, "accumulate is 2.0; expected a whole number"),
    ({"clip_norm": -1.0}, ValueError, "clip_norm is -1.0; expected a norm above 0, or None for no bound"),
    ({"compute_dtype": "int8"}, ValueError, "compute_dtype is int8; expected a floating-point dtype, or None"),
]


@pytest.mark.parametrize(("settings", "error", "message"), STATE_CASES)
def test_settings_out_of_range_are_refused(settings, error, message):
    with pytest.raises(error, match=message):
        make_train_step(model, mean_square, TX, **settings)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (
            lambda: jnp.ones(3),
            r"the loss returned float32 \(3,\); expected a floating-point scalar, or that and a",
        ),
        (lambda: jnp.int32(1), r"the loss returned int32 \(\); expected a floating-point scalar"),
        (lambda: (jnp.ones(()), [1.0]), "beside its value the loss returned a list; expected a dict of metrics"),
        (
            lambda: (jnp.ones(()), {"loss": 1.0, "a": 1.0}),
            r"metrics are \['a', 'loss'\]; loss are the step's own",
        ),
        (lambda: (jnp.ones(()), {"ok": jnp.bool_(True)}), "metric 'ok' is bool; expected numbers: floating-point ones"),
    ],
)
def test_losses_of_another_form_are_refused(returned, message):
    step = make_train_step(model, lambda apply, params, batch: returned(), TX)
    with pytest.raises(ValueError, match=message):
        step(train_state(wrap(), TX), batch())


@pytest.mark.parametrize(
    ("given", "weight", "message"),
    [
        (lambda: batch(8), None, "a batch of 8 rows does not split into accumulate=3 equal micro-batches"),
        (lambda: {**batch(9), "y": jnp.ones(3)}, None, r"different numbers of rows: {'x': 9, 'y': 3}; expected one"),
        (lambda: {"x": np.float32(1)}, None, "no array with rows to make 3 micro-batches of; expected accumulate=1"),
        (lambda: batch(9), lambda part: part["x"], r"weight returned float32 \(3, 6\); expected a scalar: how many"),
    ],
)
def test_batches_that_do_not_split_are_refused_with_their_sizes(given, weight, message):
    step = make_train_step(model, mean_square, TX, accumulate=3, weight=weight)
    with pytest.raises(ValueError, match=message):
        step(train_state(wrap(), TX), given())


def test_states_that_are_none_are_refused():
    step = make_train_step(model, mean_square, TX)
    with pytest.raises(TypeError, match="state is a PeftParams; expected the TrainState of jpeft.train_state"):
        step(wrap(), batch())
    with pytest.raises(TypeError, match="expected the PeftParams that jpeft.wrap returns, not a dict"):
        train_state({}, TX)
    with pytest.raises(TypeError, match=r"rng is int 3; expected a key from jax.random.key\(seed\)"):
        train_state(wrap(), TX, rng=3)
    with pytest.raises(ValueError, match="nothing trains: the active adapters are"):
        train_state(jpeft.disable_adapters(wrap()), TX)
