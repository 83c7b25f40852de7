"""Checkpoints: what comes back is what was saved, to the bit and wherever it goes; nothing else is let in."""

import dataclasses
import functools
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import jpeft
from jpeft import LoraConfig
from jpeft._fingerprint import differences, fingerprint

BASE = {
    "embed": {"embedding": np.random.default_rng(0).normal(size=(12, 8)).astype(np.float32)},
    "query": {"kernel": np.random.default_rng(1).normal(size=(8, 16)).astype(np.float32)},
    "value": {
        "kernel": np.random.default_rng(2).normal(size=(8, 16)).astype(np.float32),
        "bias": np.random.default_rng(3).normal(size=16).astype(np.float32),
    },
}
MODULES = ["query", "value"]


def wrapped(config: Any = None, base: Any = BASE, **options: Any) -> jpeft.PeftParams:
    config = LoraConfig(r=4, target_modules=MODULES) if config is None else config
    base = jax.tree.map(lambda leaf: leaf if isinstance(leaf, jax.ShapeDtypeStruct) else jnp.asarray(leaf), base)
    return jpeft.wrap(base, config, **{"rng": jax.random.key(0), **options})


def begun(config: Any = None, tx: Any = None, rng: Any = None, **options: Any) -> jpeft.TrainState:
    return jpeft.train_state(wrapped(config, **options), optax.adam(1e-3) if tx is None else tx, rng=rng)


def filled(state: jpeft.TrainState, seed: int = 0, step: int = 7) -> jpeft.TrainState:
    """The state with other numbers in all that a checkpoint is to hold."""
    draws = np.random.default_rng(seed)

    def one(leaf: Any) -> Any:
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.split(leaf, 3)[2]
        new = draws.normal(size=leaf.shape) if jnp.issubdtype(leaf.dtype, jnp.floating) else draws.integers(
            0, 2, size=leaf.shape
        )  # fmt: skip
        return jax.device_put(jnp.asarray(new, leaf.dtype), leaf.sharding)

    adapters, opt_state, rng = jax.tree.map(one, (state.params.adapters, state.opt_state, state.rng))
    params = dataclasses.replace(state.params, adapters=adapters)
    number = jax.device_put(jnp.int32(step), state.step.sharding)
    return dataclasses.replace(state, params=params, opt_state=opt_state, rng=rng, step=number)


def bits(leaf: Any) -> tuple[Any, ...]:
    if hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return str(leaf.dtype), np.asarray(jax.random.key_data(leaf)).tobytes()
    return str(leaf.dtype), leaf.shape, np.asarray(leaf).tobytes()


def assert_same(got: Any, want: Any) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(want)
    assert [bits(leaf) for leaf in jax.tree.leaves(got)] == [bits(leaf) for leaf in jax.tree.leaves(want)]


def by_parts(factory: Callable[..., Any]) -> optax.GradientTransformation:
    """Two optimizers, by the names of the arrays: the state holds masked nodes."""

    def labels(tree: Any) -> Any:
        return jax.tree_util.tree_map_with_path(lambda path, _: "lora_A" in jax.tree_util.keystr(path), tree)

    return optax.multi_transform({True: factory(1e-3), False: optax.sgd(1e-2)}, labels)


@dataclasses.dataclass(frozen=True)
class Row:
    """A config, an optimizer, and what else the state is made with."""

    name: str
    config: Any
    tx: optax.GradientTransformation
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


NAMED = {"target_modules": MODULES}
WIDE = jax.random.key(5, impl="rbg")

ROWS = (
    Row("lora, adamw", LoraConfig(r=4, **NAMED), optax.adamw(1e-3)),
    Row("bfloat16, clipped", LoraConfig(r=4, **NAMED),
        optax.chain(optax.clip(1.0), optax.adam(1e-3, mu_dtype="bfloat16")), {"dtype": jnp.bfloat16}),
    Row("dora, no state", LoraConfig(r=4, use_dora=True, **NAMED), optax.sgd(0.1), {"rng": jax.random.key(3)}),
    Row("heads and biases, other key", LoraConfig(r=4, modules_to_save=["value"], bias="all", target_modules=["query"]),
        optax.sgd(0.1, momentum=0.9), {"rng": WIDE}),
    Row("a pattern, masked nodes", LoraConfig(r=4, rank_pattern={"query": 2}, **NAMED), by_parts(optax.adam)),
    Row("shared arrays, micro-batches", jpeft.VeraConfig(r=3, **NAMED), optax.MultiSteps(optax.adam(1e-3), 2)),
    Row("rows, accumulators", jpeft.TrainableTokensConfig(target_modules=["embed"], token_indices=[1, 5]),
        optax.adafactor(1e-3, min_dim_size_to_factor=2)),
    Row("rotations, a key in the state", jpeft.OFTConfig(oft_block_size=4, **NAMED),
        optax.chain(optax.add_noise(0.1, 0.5, jax.random.key(4)), optax.scale(-0.1))),
    Row("indices, injected rates", jpeft.ShiraConfig(r=2, **NAMED), optax.inject_hyperparams(optax.adam)(1e-3)),
)  # fmt: skip


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
@pytest.mark.parametrize("abstract", [False, True], ids=["arrays", "shapes"])
def test_what_comes_back_is_what_was_saved(tmp_path, row, abstract):
    fresh = functools.partial(begun, row.config, row.tx, **{"rng": None, **row.options})
    saved = filled(fresh())
    with jpeft.Checkpointer(tmp_path, asynchronous=not abstract) as checkpoints:
        assert checkpoints.save(saved, {"epoch": 1, "files": ["a", "b"]})
        template = jax.eval_shape(lambda: fresh()) if abstract else fresh()
        state, position = checkpoints.restore(template)
        assert position == {"epoch": 1, "files": ["a", "b"]}
        assert_same(dataclasses.replace(state, params=state.params.adapters),
                    dataclasses.replace(saved, params=saved.params.adapters))  # fmt: skip
        assert jax.tree.structure(state) == jax.tree.structure(saved)
        assert state.params.base is template.params.base
        params = checkpoints.restore_params(template.params)
        assert_same(params.adapters, saved.params.adapters)
        assert params.base is template.params.base


def on_disk(directory: pathlib.Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_the_base_is_not_written(tmp_path):
    large = np.random.default_rng(0).normal(size=(8, 1 << 17)).astype(np.float32)
    base = {**BASE, "query": {"kernel": large}}
    with jpeft.Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(begun(LoraConfig(r=4, target_modules=["value"]), base=base))
    assert sum(map(len, on_disk(tmp_path).values())) < large.nbytes / 50


# ---- meshes


def mesh_of(*sizes: int) -> jax.sharding.Mesh:
    names = ("fsdp", "tp")[: len(sizes)]
    return jax.make_mesh(
        sizes, names, axis_types=(AxisType.Auto,) * len(sizes), devices=jax.devices()[: np.prod(sizes)]
    )


def on_mesh(state: jpeft.TrainState, mesh: jax.sharding.Mesh | None, abstract: bool = False) -> jpeft.TrainState:
    """The state with each array split over the axes of the mesh that divide it, in order, and its base like it."""

    def sharding(leaf: Any) -> Any:
        if mesh is None:
            return jax.sharding.SingleDeviceSharding(jax.devices()[3])
        names, spec = list(mesh.axis_names), []
        for size in leaf.shape:
            spec.append(names.pop(0) if names and size % mesh.shape[names[0]] == 0 else None)
        return NamedSharding(mesh, P(*spec))

    def place(leaf: Any) -> Any:
        own = sharding(leaf)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=own) if abstract else jax.device_put(leaf, own)

    return jax.tree.map(place, state)


@pytest.mark.parametrize("abstract", [False, True], ids=["arrays", "shapes"])
@pytest.mark.parametrize(
    ("written_on", "read_on"),
    [((4, 2), (2, 2)), ((2, 4), (8,)), ((4, 2), None), (None, (2, 4))],
    ids=["fewer devices", "another shape", "one device", "from one device"],
)
def test_a_checkpoint_goes_onto_any_mesh(tmp_path, written_on, read_on, abstract):
    from_mesh, to_mesh = (None if sizes is None else mesh_of(*sizes) for sizes in (written_on, read_on))
    config = LoraConfig(r=8, modules_to_save=["value"], target_modules=["query"])
    tx = optax.chain(optax.add_noise(0.1, 0.5, jax.random.key(4)), optax.adam(1e-3))
    saved = filled(on_mesh(begun(config, tx, jax.random.key(1)), from_mesh))
    template = on_mesh(begun(config, tx, jax.random.key(1)), to_mesh, abstract)
    with jpeft.Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(saved)
        state, _ = checkpoints.restore(template)
    assert_same(state.params.adapters, saved.params.adapters)
    assert_same((state.opt_state, state.step, state.rng), (saved.opt_state, saved.step, saved.rng))
    for got, asked in zip(jax.tree.leaves(state), jax.tree.leaves(template), strict=True):
        assert got.sharding.is_equivalent_to(asked.sharding, got.ndim)
    if to_mesh is not None:
        kernel = state.params.adapters["default"].weights["query"]["lora_B"]
        assert len({str(shard.index) for shard in kernel.addressable_shards}) > 1


# ---- which are kept, and when


def at(state: jpeft.TrainState, step: int) -> jpeft.TrainState:
    return dataclasses.replace(state, step=jnp.int32(step))


def test_the_last_ones_stay(tmp_path):
    state = begun()
    with jpeft.Checkpointer(tmp_path / "new", keep=2, every=2) as checkpoints:
        assert checkpoints.latest is None and not (tmp_path / "new").exists()
        due = [checkpoints.save(at(state, step), {"batch": step}) for step in range(1, 8)]
        assert due == [False, True, False, True, False, True, False]
        assert checkpoints.steps == (4, 6) and checkpoints.latest == 6
        assert not checkpoints.save(at(state, 6)), "it is there"
        assert checkpoints.save(at(state, 7), {"batch": 7}, force=True) and checkpoints.steps == (6, 7)
        assert not checkpoints.save(at(state, 7), force=True)
        assert [checkpoints.restore(state, step=step)[1]["batch"] for step in (6, 7)] == [6, 7]
    everything = jpeft.Checkpointer(tmp_path / "new", keep=None)
    for step in range(8, 12):
        everything.save(at(state, step), step=step)
    everything.close()
    assert jpeft.Checkpointer(tmp_path / "new").steps == (6, 7, 8, 9, 10, 11)


def test_a_checkpoint_without_a_position_has_none(tmp_path):
    with jpeft.Checkpointer(tmp_path) as checkpoints:
        state, position = checkpoints.restore(template := begun())
        assert state is template and position is None
        checkpoints.save(at(template, 3))
        state, position = checkpoints.restore(template)
        assert int(state.step) == 3 and position is None


def test_what_is_saved_may_be_donated_at_once(tmp_path):
    base = {"query": {"kernel": jnp.ones((8, 1 << 15))}}
    saved = filled(begun(base=base, config=LoraConfig(r=8, target_modules=["query"])))
    kept = jax.tree.map(np.array, (saved.params.adapters, saved.opt_state))
    spoil = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf * 0 - 1, tree), donate_argnums=0)
    with jpeft.Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(saved)
        spoilt = spoil((saved.params.adapters, saved.opt_state))
        for _ in range(3):
            spoilt = spoil(spoilt)
        state, _ = checkpoints.restore(begun(base=base, config=LoraConfig(r=8, target_modules=["query"])))
    assert_same((state.params.adapters, state.opt_state), kept)


def test_names_and_sizes_of_every_kind(tmp_path):
    """Names that hold separators, arrays without elements, numbers of numpy's and of Python's, a context."""
    base = {"model/~/query": {"w": jnp.ones((4, 6))}}
    params = jpeft.wrap(base, LoraConfig(r=2, target_modules=["query"]), adapter_name="a/b['c']")
    params = jpeft.with_context(params, rng=jax.random.key(2))
    state = jpeft.train_state(params, optax.sgd(0.1))
    odd = {"empty": jnp.zeros((0, 3)), "host": np.arange(3), "rate": 0.5, "count": np.int32(4), "none": None}
    state = filled(dataclasses.replace(state, opt_state=(odd["empty"], None)))
    state = dataclasses.replace(state, opt_state=odd)
    template = dataclasses.replace(
        state, opt_state={**odd, "host": np.zeros(3, int), "rate": 0.0, "count": np.int32(0)}
    )
    with jpeft.Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(state)
        found, _ = checkpoints.restore(template)
        shapes = dataclasses.replace(template, opt_state={**odd, "empty": jax.ShapeDtypeStruct((0, 3), jnp.float32)})
        assert checkpoints.restore(shapes)[0].opt_state["empty"].shape == (0, 3)
    assert_same(found.params.adapters, state.params.adapters)
    assert found.opt_state.pop("rate") == 0.5 and odd.pop("rate")
    assert_same(found.opt_state, odd)


# ---- what is refused


def other(**changes: Any) -> Callable[[], jpeft.TrainState]:
    config = {"r": 4, "target_modules": MODULES, "base_model_name_or_path": "org/model", **changes.pop("config", {})}
    return lambda: begun(LoraConfig(**config), **changes)


WIDER = {**BASE, "query": {"kernel": np.ones((8, 32), np.float32)}}
HALF = {**BASE, "embed": {"embedding": BASE["embed"]["embedding"].astype(jnp.bfloat16)}}
FEWER = {name: BASE[name] for name in ("query", "value")}

LORA_A = r"adapters array \['default'\].weights\['query'\]\['lora_A'\]"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (other(base=WIDER), r"base leaf 'query.kernel' is float32 \(8, 16\) in the checkpoint, float32 \(8, 32\) here"),
        (other(base=HALF), r"leaf 'embed.embedding' is float32 \(12, 8\) in the checkpoint, bfloat16 \(12, 8\) here"),
        (other(base=FEWER), r"leaf 'embed.embedding' is float32 \(12, 8\) in the checkpoint, and not here"),
        (other(base={**BASE, "head": BASE["query"]}), r"'head.kernel' is not in the checkpoint, and here float32"),
        (other(config={"r": 8}), r"config of adapter 'default', r is 4 in the checkpoint, 8 here"),
        (other(config={"r": 8}), LORA_A + r" is float32 \(4, 8\) in the checkpoint, float32 \(8, 8\) here"),
        (other(config={"lora_alpha": 3}), r"config of adapter 'default', lora_alpha is 8 in the checkpoint, 3 here"),
        (other(config={"alpha_pattern": {"query": 1}}), r"alpha_pattern is \[\] in .*, \[\['query', 1\]\] here"),
        (other(config={"target_modules": ["query"]}), r"site of adapter 'default', value is value.kernel io float32"),
        (other(config={"base_model_name_or_path": "org/other"}), r"is org/model in the checkpoint, org/other here"),
        (other(adapter_name="new"), r"adapter 'default' is there in the checkpoint, and not here"),
        (other(dtype=jnp.bfloat16), LORA_A + r" is float32 \(4, 8\) in the checkpoint, bfloat16 \(4, 8\) here"),
        (other(tx=optax.sgd(0.1)), r"progress array \['opt_state'\]\[0\].count is int32 \(\) in .*, and not here"),
        (other(tx=optax.sgd(0.1)), r"and 1 other differences"),
        (other(rng=jax.random.key(0)), r"progress array \['rng'\].data is not in the checkpoint, and here uint32"),
        (
            lambda: begun(jpeft.VeraConfig(r=3, **NAMED)),
            r"'default', class is LoraConfig in the checkpoint, VeraConfig",
        ),
    ],
)
def test_another_model_config_or_optimizer_is_refused_by_name(tmp_path, given, message):
    with jpeft.Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(filled(other()()), {"batch": 1})
        checkpoints.wait()
        template, before = given(), on_disk(tmp_path)
        values = jax.tree.map(np.array, template)
        with pytest.raises(ValueError, match=message) as refusal:
            checkpoints.restore(template)
        assert f"the checkpoint of step 7 in {tmp_path} is of another model, config or optimizer" in str(refusal.value)
        assert_same(template, jax.tree.map(jnp.asarray, values))
        assert on_disk(tmp_path) == before
        if "progress" not in message and "other diff" not in message:
            with pytest.raises(ValueError, match=message):
                checkpoints.restore_params(template.params)


def test_what_says_nothing_of_the_training_may_differ(tmp_path):
    with jpeft.Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(saved := filled(other()()))
        silent = {"base_model_name_or_path": None, "inference_mode": True, "extra": {"new": 1}, "revision": "main"}
        config = LoraConfig(r=4, target_modules=MODULES, **silent)
        params = checkpoints.restore_params(wrapped(config))
        assert_same(params.adapters["default"].weights, saved.params.adapters["default"].weights)


def test_fields_that_another_version_does_not_have_may_be_absent_if_they_are_at_their_defaults():
    described = fingerprint(wrapped(), {})
    shorter = fingerprint(wrapped(), {})
    for field in ("use_rslora", "layers_pattern"):
        del shorter["adapters"]["default"]["config"][field]
    assert not differences(shorter, described) and not differences(described, shorter)
    del shorter["adapters"]["default"]["config"]["r"]
    assert differences(shorter, described) == ["config of adapter 'default', r is not in the checkpoint, and here 4"]
    assert differences(described, shorter) == ["config of adapter 'default', r is 4 in the checkpoint, and not here"]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda c, s: c.save(s.params),
            TypeError,
            "expected the TrainState that jpeft.train_state returns, not a Peft",
        ),
        (lambda c, s: c.restore(s.params), TypeError, "expected the TrainState .* not a PeftParams"),
        (
            lambda c, s: c.restore_params(s),
            TypeError,
            "expected the PeftParams that jpeft.wrap returns, not a TrainSta",
        ),
        (lambda c, s: c.save(at(s, 9), {"rows": {1, 2}}), TypeError, r"position is .* which is no JSON .*set is not"),
        (
            lambda c, s: c.save(at(s, 3)),
            ValueError,
            "the state is at step 3, but .* holds a checkpoint of step 5: rest",
        ),
        (lambda c, s: c.save(at(s, 8), step=9), ValueError, "step is 9, but the state is at step 8; expected that one"),
        (lambda c, s: c.restore(s, step=4), ValueError, r"no checkpoint of step 4; there are those of steps \(5,\)"),
        (lambda c, s: c.restore_params(s.params, step=4), ValueError, "holds no checkpoint of step 4"),
    ],
)
def test_bad_calls_are_refused(tmp_path, call, error, message):
    with jpeft.Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(at(begun(), 5), {"batch": 1})
        checkpoints.wait()
        before = on_disk(tmp_path)
        with pytest.raises(error, match=message):
            call(checkpoints, begun())
        assert on_disk(tmp_path) == before


def test_bad_settings_are_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="keep is 0; expected at least 1, or None"):
        jpeft.Checkpointer(tmp_path, keep=0)
    with pytest.raises(ValueError, match="every is 0; expected at least 1$"):
        jpeft.Checkpointer(tmp_path, every=0)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file', which is a file; expected a folder, or a path for a new one"):
        jpeft.Checkpointer(tmp_path / "file")
    with pytest.raises(FileNotFoundError, match="holds no checkpoint; expected the directory of a Checkpointer"):
        jpeft.Checkpointer(tmp_path / "new").restore_params(wrapped())
    monkeypatch.setitem(sys.modules, "orbax.checkpoint", None)
    with pytest.raises(ImportError, match=r"needs Orbax, which is not installed: pip install 'jpeft\[checkpoint\]'"):
        jpeft.Checkpointer(tmp_path)
