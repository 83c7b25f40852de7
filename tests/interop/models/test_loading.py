"""Reading, writing, configs and errors of the base models: without torch and without transformers."""

import json
import math
import os
import socket
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
from safetensors.numpy import load_file, save_file

from jpeft_interop.models import (
    FlaxAutoModel,
    FlaxAutoModelForCausalLM,
    FlaxAutoModelForMaskedLM,
    FlaxAutoModelForSequenceClassification,
    _tensors,
)
from jpeft_interop.models._family import Architecture, Family
from jpeft_interop.models._leaves import flatten, initial_value, leaves_of, tensors_of
from jpeft_interop.models._loading import load, match
from jpeft_interop.models._parameters import Piece, normal, parameter, whole
from jpeft_interop.models._saving import write_checkpoint
from jpeft_interop.models._shardings import placement
from jpeft_interop.models._tensors import catalogue

SIZES = {
    "vocab_size": 23,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
    "initializer_range": 0.5,
}
LLAMA = {"model_type": "llama", "num_key_value_heads": 1, "pad_token_id": 0, **SIZES}
MISTRAL = {**LLAMA, "model_type": "mistral"}
BERT = {"model_type": "bert", **SIZES}
IDS = np.array([[1, 2, 3, 4], [5, 6, 7, 8]])


@pytest.fixture(autouse=True)
def _strict():
    with jax.numpy_dtype_promotion("strict"):
        yield


def llama(**changes):
    return FlaxAutoModelForCausalLM.from_config({**LLAMA, **changes})


@pytest.fixture
def folder(tmp_path):
    llama().save_pretrained(tmp_path)
    return tmp_path


def edit_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def assert_same(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for ours, theirs in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(np.asarray(ours, np.float32), np.asarray(theirs, np.float32))


# ---- reading and writing


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("max_shard_bytes", [10**9, 1000])
@pytest.mark.parametrize(
    "auto, config",
    [(FlaxAutoModelForCausalLM, LLAMA), (FlaxAutoModelForSequenceClassification, BERT), (FlaxAutoModel, MISTRAL)],
)
def test_round_trip_is_exact(tmp_path, auto, config, max_shard_bytes, dtype):
    model = auto.from_config(config, param_dtype=dtype, rng=jax.random.key(7))
    model.save_pretrained(tmp_path, max_shard_bytes=max_shard_bytes)
    assert (tmp_path / "model.safetensors.index.json").exists() == (max_shard_bytes == 1000)
    again = auto.from_pretrained(tmp_path)
    assert_same(again.params, model.params)
    assert again.config == model.config
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == jnp.dtype(dtype).name
    assert not list(tmp_path.glob(".*"))


def test_tensors_are_written_in_the_orientation_of_torch(folder):
    tensors = load_file(folder / "model.safetensors")
    layer = llama().params["model"]["layers"]["1"]
    assert tensors["model.layers.1.mlp.up_proj.weight"].shape == (12, 8)
    np.testing.assert_array_equal(tensors["model.layers.1.mlp.up_proj.weight"].T, layer["mlp"]["up_proj"]["kernel"])


def test_saving_again_in_another_form_removes_the_first(folder):
    model = llama()
    changed = jax.tree.map(lambda leaf: leaf + 1.0, model.params)
    model.save_pretrained(folder, changed, max_shard_bytes=1000)
    assert_same(FlaxAutoModelForCausalLM.from_pretrained(folder).params, changed)
    model.save_pretrained(folder)
    assert_same(FlaxAutoModelForCausalLM.from_pretrained(folder).params, model.params)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]


def test_param_dtype_and_dtype(folder):
    model = FlaxAutoModelForCausalLM.from_pretrained(folder, param_dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(model.params)} == {jnp.dtype("bfloat16")}
    assert logits(model, IDS).dtype == jnp.bfloat16
    wide = FlaxAutoModelForCausalLM.from_pretrained(folder, dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(wide.params)} == {jnp.dtype("float32")}
    assert logits(wide, IDS).dtype == jnp.bfloat16
    assert logits(wide, inputs_embeds=jnp.ones((1, 3, 8))).dtype == jnp.bfloat16


def logits(model, *args, **inputs):
    """Their shape and type."""
    return jax.eval_shape(lambda params: model.apply(params, *args, **inputs).logits, model.params)


def test_float64_tensors_become_float32(folder):
    edit_tensors(folder, lambda tensors: tensors.update({k: v.astype(np.float64) for k, v in tensors.items()}))
    assert_same(FlaxAutoModelForCausalLM.from_pretrained(folder).params, llama().params)


def test_harmless_tensors_are_passed_over(folder):
    edit_tensors(
        folder, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)})
    )
    assert_same(FlaxAutoModelForCausalLM.from_pretrained(folder).params, llama().params)


def test_tied_weights(tmp_path):
    model = llama(tie_word_embeddings=True)
    assert "lm_head" not in model.params
    model.save_pretrained(tmp_path)
    table = np.asarray(model.params["model"]["embed_tokens"]["embedding"])
    edit_tensors(tmp_path, lambda tensors: tensors.update({"lm_head.weight": table.copy()}))
    assert_same(FlaxAutoModelForCausalLM.from_pretrained(tmp_path).params, model.params)
    edit_tensors(tmp_path, lambda tensors: tensors.pop("model.embed_tokens.weight"))
    assert_same(FlaxAutoModelForCausalLM.from_pretrained(tmp_path).params, model.params)
    edit_tensors(tmp_path, lambda tensors: tensors.update({"model.embed_tokens.weight": table + 1}))
    with pytest.raises(ValueError, match=r"ties lm_head\.weight to model\.embed_tokens\.weight.*two different tensors"):
        FlaxAutoModelForCausalLM.from_pretrained(tmp_path)


def test_progress_bar_for_shards(tmp_path, capsys):
    pytest.importorskip("tqdm")
    llama().save_pretrained(tmp_path, max_shard_bytes=1000)
    FlaxAutoModelForCausalLM.from_pretrained(tmp_path)
    assert "Reading weights" in capsys.readouterr().err


def test_without_tqdm_shards_load_all_the_same(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    llama().save_pretrained(tmp_path, max_shard_bytes=1000)
    assert_same(FlaxAutoModelForCausalLM.from_pretrained(tmp_path).params, llama().params)


# ---- meshes

RULES = [(r"layers\.0\..*_proj\.kernel", P("x", "y")), (r"kernel$", P(None, "x")), (r"^model\.norm", P("y"))]


def mesh(*sizes):
    return Mesh(np.array(jax.devices()[: math.prod(sizes)]).reshape(sizes), ("x", "y")[: len(sizes)])


def spec_of(rules, path, shape):
    sharding = placement(mesh(2, 2), rules)(path, shape)
    assert sharding is not None
    return sharding.spec


def specs(model):
    return {path: leaf.sharding.spec for path, leaf in flatten(model.params)}


def test_rules_place_what_is_read_and_what_is_new(tmp_path):
    auto, config = FlaxAutoModelForCausalLM, {**LLAMA, "vocab_size": 24}
    whole = auto.from_config(config)
    whole.save_pretrained(tmp_path)
    where = {"mesh": mesh(2, 2), "sharding_rules": RULES}
    split = auto.from_pretrained(tmp_path, **where)
    assert_same(split.params, whole.params)
    # Drawn by a program of its own, whose last bits may differ.
    drawn = auto.from_config(config, **where).params
    jax.tree.map(lambda ours, theirs: np.testing.assert_allclose(ours, theirs, rtol=1e-6), drawn, whole.params)
    abstract = auto.from_config(config, abstract=True, **where)
    assert specs(split) == specs(abstract) == specs(auto.from_config(config, **where))
    given = specs(split)
    assert given["model.layers.0.mlp.up_proj.kernel"] == P("x", "y")
    assert given["model.layers.1.mlp.up_proj.kernel"] == P(None, "x")
    assert given["model.norm.scale"] == P("y") and given["model.embed_tokens.embedding"] == P()
    kernel = split.params["model"]["layers"]["0"]["mlp"]["up_proj"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (4, 6)


def test_rules_by_a_function(folder):
    asked = {}
    model = FlaxAutoModelForCausalLM.from_pretrained(
        folder, mesh=mesh(2), sharding_rules=lambda path, shape: asked.update({path: shape}) or P()
    )
    assert asked == {path: leaf.shape for path, leaf in flatten(model.params)}
    assert_same(model.params, llama().params)


def test_a_new_head_is_placed_by_the_rules(folder):
    where = {"mesh": mesh(4), "sharding_rules": [("score", P("x"))]}
    with pytest.warns(UserWarning, match=r"newly initialised: score\.weight"):
        model = FlaxAutoModelForSequenceClassification.from_pretrained(folder, **where)
    assert model.params["score"]["kernel"].sharding.spec == P("x")
    again = FlaxAutoModelForSequenceClassification.from_config({**LLAMA})
    np.testing.assert_array_equal(model.params["score"]["kernel"], again.params["score"]["kernel"])


def test_rules_for_a_stack_are_those_of_a_layer():
    rules = [(r"^layers\.0\.kernel$", P("x", "y")), (r"^layers\.4:8\.kernel$", P("y")), (r"norm", P())]
    expected = {
        "layers.0:4.kernel": P(None, "x", "y"),
        "layers.4:8.kernel": P(None, "y"),
        "layers.0:4.norm": P(None),
        "layers.0:4.other": P(),
    }
    assert {path: spec_of(rules, path, (4, 6, 8)) for path in expected} == expected
    assert spec_of(lambda path, shape: P("x"), "layers.0:4.kernel", (4, 6, 8)) == P("x")


@pytest.mark.parametrize(
    "path, shape, spec",
    [
        ("kernel", (64, 128), P(None, ("x", "y"))),
        ("kernel", (128, 64), P(("x", "y"))),
        ("kernel", (64, 64), P(("x", "y"))),
        ("kernel", (64, 129), P(("x", "y"))),
        ("kernel", (65, 129), P()),
        ("bias", (4092,), P()),
        ("layers.0:400.kernel", (400, 64, 128), P(None, None, ("x", "y"))),
        ("layers.0:400.bias", (400, 64), P()),
    ],
)
def test_without_rules_the_largest_axis_is_split_over_all_devices(path, shape, spec):
    assert spec_of(None, path, shape) == spec


@pytest.mark.parametrize(
    "spec, error, message",
    [
        (P("z"), ValueError, r"rule of a\.kernel \(6, 8\) gives .*no axis 'z'; its axes are \{'x': 2, 'y': 2\}"),
        (P(None, None, "x"), ValueError, "the parameter has 2 axes: give no more entries"),
        (P(("x", "y")), ValueError, r"axis 0 of size 6 cannot be split into 4 equal parts.*'x': 2, 'y': 2.*Give None"),
        (("x", None), TypeError, r"rule of a\.kernel gives \('x', None\), expected a jax\.sharding\.PartitionSpec"),
    ],
)
def test_specs_that_do_not_fit(spec, error, message):
    for rules in ([("kernel", spec)], lambda path, shape: spec):
        with pytest.raises(error, match=message):
            placement(mesh(2, 2), rules)("a.kernel", (6, 8))


def test_rules_without_a_mesh(folder):
    for make in (FlaxAutoModelForCausalLM.from_config, FlaxAutoModelForCausalLM.from_pretrained):
        with pytest.raises(ValueError, match="sharding_rules were given without a mesh: give mesh="):
            make(folder, sharding_rules=RULES)


PROCESS = """
import math, sys, warnings
import jax, numpy as np
from jax.sharding import Mesh
from safetensors.numpy import load_file
from jpeft_interop.models import FlaxAutoModelForSequenceClassification as Auto, _tensors
from jpeft_interop.models._leaves import flatten

folder, port, process = sys.argv[1:]
jax.config.update("jax_num_cpu_devices", 2)
jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=int(process))
read, original = [], _tensors.Tensor.read
_tensors.Tensor.read = lambda *args: (read.append(block := original(*args)), block)[1]
mesh = Mesh(np.array(jax.devices()), ("x",))
assert mesh.size == 4 and jax.local_device_count() == 2
warnings.simplefilter("ignore")
model = Auto.from_pretrained(folder, mesh=mesh)
params = dict(flatten(model.params))
tensors = load_file(f"{folder}/model.safetensors")
for leaf in model.blueprint.leaves.values():
    if leaf.path != "score.kernel":
        (piece,) = leaf.alternatives[0]
        theirs = tensors[piece.name].transpose(piece.axes)
        for shard in params[leaf.path].addressable_shards:
            np.testing.assert_array_equal(shard.data, theirs[shard.index])
new = Auto.from_config(model.config_dict, mesh=mesh).params["score"]["kernel"].addressable_shards[0].data
np.testing.assert_array_equal(params["score.kernel"].addressable_shards[0].data, new)
print(sum(block.nbytes for block in read), sum(leaf.nbytes for path, leaf in params.items() if "score" not in path))
"""


def test_each_process_reads_its_part(tmp_path):
    sizes = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 256, "num_key_value_heads": 2}
    llama(**sizes).save_pretrained(tmp_path)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    environment = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(sys.path)}
    commands = [[sys.executable, "-c", PROCESS, str(tmp_path), port, process] for process in "01"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment}
    processes = [subprocess.Popen(command, **pipes) for command in commands]
    try:
        results = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for out, err in results:
        assert out, err
        read, total = map(int, out.split())
        assert 0.5 < read / total < 0.51


# ---- parameters in pieces


class Dense(nnx.Module):
    def __init__(self, *stack):
        self.kernel = parameter((*stack, 4, 6), normal, whole("weight", (1, 0)))


class Experts(nnx.Module):
    """Two projections of four experts in one parameter `(4, 3, 2 * 5)`: tensors of each, or one of all."""

    def __init__(self, *stack):
        blocks = (("w1", slice(None, 5)), ("w3", slice(5, None)))
        single = tuple(
            Piece(f"{expert}.{name}.weight", (expert, slice(None), block), (1, 0))
            for expert in range(4)
            for name, block in blocks
        )
        odd_and_even = tuple(
            Piece(name, (slice(None), slice(None), slice(first, None, 2)), (0, 1, 2))
            for first, name in enumerate(("even", "odd"))
        )
        self.gate_up = parameter((*stack, 4, 3, 10), normal, single, whole("fused", (0, 2, 1)), odd_and_even)


def toy(**modules):
    return leaves_of(nnx.state(nnx.Dict(modules)))


TOY = Architecture("Toy", lambda config, options: nnx.Module())


def family(**fields):
    return Family("toy", lambda raw, ignore: None, "", (), {"base": TOY}, **fields)


def values_of(leaves):
    return {path: initial_value(leaf, jax.random.key(0), jnp.float32, 1.0) for path, leaf in leaves.items()}


def read(folder, leaves, *, param_dtype=None, mesh=None, rules=None, **fields):
    matched = match(leaves, catalogue([folder / "model.safetensors"]), family(**fields), TOY)
    place = placement(mesh, rules)
    shardings = {path: place(path, leaf.shape) for path, leaf in leaves.items()}
    return load(matched, leaves, param_dtype=param_dtype, shardings=shardings, rng=jax.random.key(0), std=1.0)


def store(folder, **tensors):
    save_file(
        {name.replace("_", "."): np.asarray(value) for name, value in tensors.items()}, folder / "model.safetensors"
    )


def stacked():
    return toy(layers=nnx.Dict({"0:5:2": Dense(3), "1:5:2": Dense(2), "5": Dense()}), experts=Experts())


def test_a_stack_is_the_tensors_of_its_layers():
    apart = toy(layers=nnx.Dict({str(i): Dense() for i in range(6)}), experts=Experts())
    tensors = {name: shape for leaf in stacked().values() for name, shape in tensors_of(leaf).items()}
    assert tensors == {name: shape for leaf in apart.values() for name, shape in tensors_of(leaf).items()}
    assert tensors["layers.3.weight"] == (6, 4) and tensors["experts.2.w3.weight"] == (5, 3)


def test_a_stack_has_the_initial_values_of_its_layers():
    together = values_of(stacked())
    for start in (0, 1):
        for place, layer in enumerate(range(start, 5, 2)):
            alone = values_of(toy(layers=nnx.Dict({str(layer): Dense()})))
            np.testing.assert_array_equal(
                together[f"layers.{start}:5:2.kernel"][place], alone[f"layers.{layer}.kernel"]
            )


@pytest.mark.parametrize("rules", [None, [("layers", P(None, "y")), ("experts", P("x", None, "y"))]])
@pytest.mark.parametrize("max_shard_bytes", [10**9, 500])
def test_round_trip_of_pieces(tmp_path, rules, max_shard_bytes):
    leaves = stacked()
    where = {} if rules is None else {"mesh": mesh(2, 2), "rules": rules}
    place = placement(where.get("mesh"), rules)
    values = {path: jax.device_put(value, place(path, value.shape)) for path, value in values_of(leaves).items()}
    write_checkpoint(tmp_path, {}, leaves, values, max_shard_bytes)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert (len(files) > 1) == (max_shard_bytes == 500)
    assert all(file.stat().st_size < max_shard_bytes + 1500 for file in files)
    store(tmp_path, **{name: tensor for file in files for name, tensor in load_file(file).items()})
    again = read(tmp_path, leaves, **where)
    assert_same(again, values)
    assert all(again[path].sharding == value.sharding for path, value in values.items())
    tensors = load_file(tmp_path / "model.safetensors")
    np.testing.assert_array_equal(tensors["layers.3.weight"].T, values["layers.1:5:2.kernel"][1])
    np.testing.assert_array_equal(tensors["experts.2.w3.weight"].T, values["experts.gate_up"][2, :, 5:])


def test_a_stack_within_a_stack(tmp_path):
    leaves = toy(layers=nnx.Dict({"0:2": nnx.Dict({"experts": nnx.Dict({"0:3": Dense(2, 3)})})}))
    values = values_of(leaves)
    write_checkpoint(tmp_path, {}, leaves, values, 10**9)
    assert_same(read(tmp_path, leaves), values)
    tensors = load_file(tmp_path / "model.safetensors")
    np.testing.assert_array_equal(tensors["layers.1.experts.2.weight"].T, values["layers.0:2.experts.0:3.kernel"][1, 2])


def test_alternatives(tmp_path):
    leaves = toy(experts=Experts())
    value = np.asarray(values_of(leaves)["experts.gate_up"])
    store(tmp_path, experts_fused=np.ascontiguousarray(value.transpose(0, 2, 1)))
    np.testing.assert_array_equal(read(tmp_path, leaves)["experts.gate_up"], value)
    halves = {
        "experts_even": np.ascontiguousarray(value[..., ::2]),
        "experts_odd": np.ascontiguousarray(value[..., 1::2]),
    }
    store(tmp_path, **halves)
    np.testing.assert_array_equal(read(tmp_path, leaves)["experts.gate_up"], value)
    split = read(tmp_path, leaves, mesh=mesh(2, 2), rules=[("experts", P("x", None, "y"))], param_dtype=jnp.bfloat16)
    np.testing.assert_array_equal(split["experts.gate_up"], value.astype(jnp.bfloat16))


def test_the_nearest_alternative_is_what_is_missing(tmp_path):
    leaves = toy(experts=Experts())
    tensors = tensors_of(leaves["experts.gate_up"])
    lacking = {"experts.0.w1.weight", "experts.3.w3.weight"}
    save_file(
        {name: np.ones(shape, np.float32) for name, shape in tensors.items() if name not in lacking},
        tmp_path / "model.safetensors",
    )
    with pytest.raises(ValueError, match=r"missing \(2\): experts\.0\.w1\.weight, experts\.3\.w3\.weight\nCheck"):
        read(tmp_path, leaves)


def test_pieces_that_do_not_fit(tmp_path):
    store(tmp_path, layers_0_weight=np.ones((6, 4)), layers_1_weight=np.ones((6, 5)), layers_3_weight=np.ones(2))
    leaves = toy(layers=nnx.Dict({"0:3": Dense(3)}))
    with pytest.raises(ValueError) as caught:
        read(tmp_path, leaves)
    assert "missing (1): layers.2.weight" in str(caught.value)
    assert "unexpected (1): layers.3.weight" in str(caught.value)
    assert "misshapen (1): layers.1.weight (6, 5), expected (6, 4)" in str(caught.value)


def test_pieces_that_leave_gaps():
    kernel = parameter((4, 6), normal, (Piece("half", (slice(None), slice(3)), (1, 0)),))
    message = r"a\.kernel \(4, 6\) has 24 elements, but the tensors that `parameter` was given fill 12: a\.half"
    with pytest.raises(ValueError, match=message):
        toy(a=nnx.Dict(kernel=kernel))


def test_pieces_of_several_dtypes(tmp_path):
    leaves = toy(layers=nnx.Dict({"0:2": Dense(2)}))
    first = {"layers_0_weight": np.ones((6, 4), ml_dtypes.bfloat16)}
    for second, common in [(np.float16, np.float32), (np.float64, np.float32), (ml_dtypes.bfloat16, jnp.bfloat16)]:
        store(tmp_path, **first, layers_1_weight=np.full((6, 4), 1 / 3, second))
        value = read(tmp_path, leaves)["layers.0:2.kernel"]
        assert value.dtype == common
        np.testing.assert_array_equal(value[1], np.full((4, 6), np.asarray(1 / 3, second)).astype(common))


def test_old_names_and_tensors_without_use(tmp_path):
    leaves = toy(dense=Dense())
    kernel = np.arange(24, dtype=np.float32).reshape(6, 4)
    renames = ((r"^old\.", "dense."), (r"\.w$", ".weight"))
    store(tmp_path, old_w=kernel, dense_mask=np.ones(3))
    value = read(tmp_path, leaves, renames=renames, unused=(r"\.mask$",))["dense.kernel"]
    np.testing.assert_array_equal(value, kernel.T)
    with pytest.raises(ValueError, match=r"unexpected \(1\): dense\.mask"):
        read(tmp_path, leaves, renames=renames)
    store(tmp_path, old_w=kernel, dense_weight=kernel)
    with pytest.raises(ValueError, match=r"holds both dense\.weight and old\.w, which are two names of dense\.weight"):
        read(tmp_path, leaves, renames=renames)


def test_a_tensor_larger_than_what_is_read_at_a_time(folder, monkeypatch):
    monkeypatch.setattr(_tensors, "SLAB", 100)
    monkeypatch.setattr(_tensors, "BLOCK", 70)
    assert_same(FlaxAutoModelForCausalLM.from_pretrained(folder).params, llama().params)
    split = FlaxAutoModelForCausalLM.from_pretrained(folder, mesh=mesh(4), sharding_rules=[("kernel$", P("x"))])
    assert_same(split.params, llama().params)


# ---- weights that do not fit


def test_all_problems_in_one_error(folder):
    def change(tensors):
        tensors.pop("model.layers.0.mlp.up_proj.weight")
        tensors["model.layers.0.mlp.other.weight"] = np.ones(3, np.float32)
        tensors["model.norm.weight"] = np.ones(9, np.float32)
        tensors["model.layers.1.mlp.up_proj.weight"] = np.zeros((12, 8), ml_dtypes.float8_e4m3fn)

    edit_tensors(folder, change)
    with pytest.raises(ValueError) as caught:
        FlaxAutoModelForCausalLM.from_pretrained(folder)
    message = str(caught.value)
    assert "does not fit LlamaForCausalLM" in message
    assert "missing (1): model.layers.0.mlp.up_proj.weight" in message
    assert "unexpected (1): model.layers.0.mlp.other.weight" in message
    assert "misshapen (1): model.norm.weight (9,), expected (8,)" in message
    assert "model.layers.1.mlp.up_proj.weight is stored as F8_E4M3, expected one of F64, F32, F16, BF16" in message


def test_missing_language_model_head_is_an_error(folder):
    edit_tensors(folder, lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(ValueError, match=r"missing \(1\): lm_head\.weight"):
        FlaxAutoModelForCausalLM.from_pretrained(folder)


def test_head_of_another_size(tmp_path):
    auto = FlaxAutoModelForSequenceClassification
    model = auto.from_config(BERT, num_labels=3)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"misshapen \(2\): classifier\.bias \(3,\), expected \(5,\)(.|\n)*num_labels"):
        auto.from_pretrained(tmp_path, num_labels=5)
    with pytest.warns(UserWarning, match=r"newly initialised: classifier\.bias, classifier\.weight"):
        new = auto.from_pretrained(tmp_path, num_labels=5, ignore_mismatched_sizes=True, param_dtype=jnp.bfloat16)
    assert new.params["classifier"]["kernel"].shape == (8, 5)
    assert new.params["classifier"]["kernel"].dtype == jnp.bfloat16


def test_damaged_file(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-5])
    with pytest.raises(ValueError, match=r"model\.safetensors .* is truncated, damaged.*download it again"):
        FlaxAutoModelForCausalLM.from_pretrained(folder)


def test_pickles_are_refused(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pickled weights only \(pytorch_model\.bin\).*writes model\.safetensors"):
        FlaxAutoModelForCausalLM.from_pretrained(folder)


def test_folder_without_weights_or_shard_or_config(tmp_path):
    llama().save_pretrained(tmp_path, max_shard_bytes=1000)
    first = min(tmp_path.glob("model-*.safetensors"))
    first.unlink()
    with pytest.raises(FileNotFoundError, match=f"names shards that are not in its folder: {first.name}"):
        FlaxAutoModelForCausalLM.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"neither model\.safetensors nor model\.safetensors\.index\.json"):
        FlaxAutoModelForCausalLM.from_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"there is no config\.json at .*: give a dict, the file or its folder"):
        FlaxAutoModelForCausalLM.from_pretrained(tmp_path)


# ---- the Hub


def fake_hub(monkeypatch, download):
    module = types.ModuleType("huggingface_hub")
    vars(module)["snapshot_download"] = download
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)


def test_hub_id(folder, monkeypatch):
    asked = []
    fake_hub(monkeypatch, lambda name, **options: asked.append((name, options)) or str(folder))
    model = FlaxAutoModelForCausalLM.from_pretrained("someone/tiny-llama", revision="abc")
    assert_same(model.params, llama().params)
    assert model.name_or_path == "someone/tiny-llama"
    assert asked[0][0] == "someone/tiny-llama" and asked[0][1]["revision"] == "abc"
    assert "*.bin" not in asked[0][1]["allow_patterns"]


def test_hub_failures(monkeypatch):
    def offline(name, **options):
        raise OSError("offline mode is on")

    fake_hub(monkeypatch, offline)
    with pytest.raises(FileNotFoundError, match="neither a folder here nor a model that the Hub gave: offline mode"):
        FlaxAutoModel.from_pretrained("someone/tiny-llama")
    with pytest.raises(FileNotFoundError, match="there is no folder '/no/such/place', and it cannot be a Hub id"):
        FlaxAutoModel.from_pretrained("/no/such/place")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match="pip install huggingface_hub"):
        FlaxAutoModel.from_pretrained("someone/tiny-llama")


# ---- configs


@pytest.mark.parametrize(
    "config, message",
    [
        (
            {**LLAMA, "alibi": True, "logit_scale": 3},
            r"alibi=True, logit_scale=3 \(not known.*\('alibi', 'logit_scale'\)",
        ),
        ({**LLAMA, "quantization_config": {"bits": 4}}, "quantization_config="),
        ({**LLAMA, "sliding_window": 8}, r"sliding_window=8 \(expected None\)"),
        ({**LLAMA, "rope_interleaved": True}, r"rope_interleaved=True \(expected False\)"),
        ({**MISTRAL, "attention_bias": True}, r"attention_bias=True \(expected False\)"),
        ({**LLAMA, "hidden_act": "relu6"}, "activation 'relu6' is not known; known ones: gelu"),
        ({**LLAMA, "hidden_size": 9}, "hidden_size 9 is not a multiple of num_attention_heads 2, and head_dim"),
        ({**LLAMA, "num_key_value_heads": 3}, "num_attention_heads 2 is not a multiple of num_key_value_heads 3"),
        ({**LLAMA, "rope_parameters": {"rope_type": "su"}}, r"rope_type='su' \(known types: default, linear"),
        ({**LLAMA, "rope_scaling": {"type": "linear", "factor": 2, "bend": 1}}, r"bend=1 \(keys of 'linear': factor\)"),
        ({**LLAMA, "rope_scaling": {"type": "llama3", "factor": 2}}, "must give low_freq_factor, high_freq_factor"),
        ({**LLAMA, "partial_rotary_factor": 0.5}, r"partial_rotary_factor=0\.5 \(expected 1\.0\)"),
        ({**BERT, "hidden_size": 9}, "hidden_size 9 is not a multiple of num_attention_heads 2"),
        ({**BERT, "position_embedding_type": "relative_key"}, r"position_embedding_type='relative_key' \(expected"),
        ({**BERT, "is_decoder": True}, r"is_decoder=True \(expected False\)"),
        ({**BERT, "model_type": "llava"}, "model_type 'llava' is not implemented; families: bart, bert, bloom"),
        (SIZES, "model_type None is not implemented"),
    ],
)
def test_configs_that_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        FlaxAutoModelForSequenceClassification.from_config(config, abstract=True)


def test_config_keys_without_effect_pass():
    keys = {"_anything": 1, "torch_dtype": "bfloat16", "attention_dropout": 0.1, "new_key": None, "top_k": 50}
    assert llama(**keys).config == llama().config
    vouched = FlaxAutoModelForCausalLM.from_config({**LLAMA, "alibi": 1}, abstract=True, ignore_config_keys=("alibi",))
    assert vouched.config == llama().config


def test_task_that_a_family_lacks():
    with pytest.raises(ValueError, match="'bert' has no model for causal-lm; it has base, sequence-classification"):
        FlaxAutoModelForCausalLM.from_config(BERT)
    with pytest.raises(ValueError, match="'llama' has no model for masked-lm"):
        FlaxAutoModelForMaskedLM.from_config(LLAMA)


def test_number_of_labels():
    auto = FlaxAutoModelForSequenceClassification
    assert auto.from_config(BERT, abstract=True).config.num_labels == 2
    assert auto.from_config({**BERT, "num_labels": 4}, abstract=True).config.num_labels == 4
    named = {**BERT, "id2label": {"0": "bad", "1": "good"}}
    assert auto.from_config(named, abstract=True, num_labels=2).config_dict["id2label"] == named["id2label"]
    assert auto.from_config(named, abstract=True, num_labels=3).config_dict["label2id"]["LABEL_2"] == 2
    with pytest.raises(ValueError, match="num_labels must be at least 1, got 0"):
        auto.from_config(BERT, num_labels=0)


# ---- the pure function


@pytest.mark.parametrize(
    "inputs, error, message",
    [
        ({}, ValueError, "expected one of input_ids and inputs_embeds, got neither"),
        ({"input_ids": IDS, "inputs_embeds": np.ones((2, 4, 8))}, ValueError, "inputs_embeds, got both"),
        ({"input_ids": IDS[0]}, ValueError, r"input_ids must be integers \(batch, length\), got int32 \(4,\)"),
        ({"input_ids": IDS * 1.0}, ValueError, "input_ids must be integers"),
        ({"inputs_embeds": np.ones((2, 4, 9))}, ValueError, r"inputs_embeds must be \(batch, length, 8\)"),
        ({"input_ids": IDS, "attention_mask": np.ones((2, 3))}, ValueError, r"attention_mask must be .* = \(2, 4\)"),
        ({"input_ids": IDS, "position_ids": np.ones((3, 4))}, ValueError, r"position_ids must be \(2, 4\) or \(1, 4\)"),
        ({"input_ids": IDS, "end_positions": IDS[:, 0]}, TypeError, "takes input_ids, .*; got end_positions"),
        (
            {"input_ids": IDS, "labels": IDS[:, 1:]},
            ValueError,
            r"labels have the shape \(2, 3\); expected \(2, 4\) for",
        ),
    ],
)
def test_inputs_that_are_refused(inputs, error, message):
    model = llama()
    with pytest.raises(error, match=message):
        model.apply(model.params, **inputs)


def test_too_long_for_bert():
    model = FlaxAutoModel.from_config(BERT)
    message = "17 tokens exceed the 16 that max_position_embeddings=16 has room for: truncate"
    with pytest.raises(ValueError, match=message):
        model.apply(model.params, np.ones((1, 17), np.int32))


def test_sequence_classification_needs_a_pad_token():
    model = FlaxAutoModelForSequenceClassification.from_config({**LLAMA, "pad_token_id": None})
    assert logits(model, IDS[:1]).shape == (1, 2)
    with pytest.raises(ValueError, match="no pad_token_id, so the ends of 2 sequences cannot be found"):
        logits(model, IDS)


def test_an_id_outside_the_vocabulary_is_not_clamped():
    model = llama()
    found = jax.jit(model.apply)(model.params, np.array([[1, 2], [1, 23]])).logits
    assert np.isfinite(found[0]).all() and np.isnan(found[1, 1]).all()


def test_params_of_another_structure(tmp_path):
    model = llama()
    params = {"model": model.params["model"], "head": {"kernel": jnp.ones((8, 23))}}
    message = r"structure of model\.params: missing lm_head\.kernel; unexpected head\.kernel"
    with pytest.raises(ValueError, match=message):
        model.apply(params, IDS)
    with pytest.raises(ValueError, match=message):
        model.save_pretrained(tmp_path, params)


def test_params_of_another_shape_are_not_saved(tmp_path):
    model = llama()
    params = {**model.params, "lm_head": {"kernel": jnp.ones((8, 24))}}
    with pytest.raises(ValueError, match=r"lm_head\.kernel has the shape \(8, 24\), expected \(8, 23\)"):
        model.save_pretrained(tmp_path, params)


@pytest.mark.parametrize("config", [MISTRAL, BERT])
def test_attention_mask_of_any_dtype(config):
    model = FlaxAutoModel.from_config(config, param_dtype=jnp.bfloat16)
    mask, apply = np.array([[1, 1, 1, 1], [1, 1, 0, 0]]), jax.jit(model.apply)
    alone = np.asarray(apply(model.params, IDS[1:, :2]).last_hidden_state, np.float32)
    for dtype in (bool, np.int8, np.float32):
        masked = apply(model.params, IDS, attention_mask=mask.astype(dtype)).last_hidden_state
        np.testing.assert_allclose(np.asarray(masked[1:, :2], np.float32), alone, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("auto, config", [(FlaxAutoModelForCausalLM, LLAMA), (FlaxAutoModelForMaskedLM, BERT)])
def test_transformations(auto, config):
    model = auto.from_config(config)
    traces = []

    @jax.jit
    def loss(params, ids):
        traces.append(1)
        return jnp.square(model.apply(params, ids).logits).mean()

    value, gradient = jax.value_and_grad(loss)(model.params, IDS)
    assert jax.tree.structure(gradient) == jax.tree.structure(model.params)
    silent = {
        jax.tree_util.keystr(path) for path, leaf in jax.tree_util.tree_leaves_with_path(gradient) if not np.any(leaf)
    }
    # Softmax does not see what is added to all scores of a query.
    assert all(path.endswith("['key']['bias']") for path in silent)
    before = len(traces)
    np.testing.assert_allclose(loss(jax.tree.map(lambda leaf: leaf * 1.0, model.params), IDS), value, rtol=1e-6)
    assert len(traces) == before
    one_by_one = jax.vmap(lambda ids: model.apply(model.params, ids[None]).logits[0])(jnp.asarray(IDS))
    np.testing.assert_allclose(one_by_one, jax.jit(model.apply)(model.params, IDS).logits, atol=1e-4)
    two = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), model.params)
    assert jax.vmap(lambda params: model.apply(params, IDS).logits)(two).shape == (2, 2, 4, 23)


def test_abstract_model_allocates_nothing():
    model = FlaxAutoModelForCausalLM.from_config({"model_type": "llama"}, abstract=True, param_dtype=jnp.bfloat16)
    assert all(type(leaf) is jax.ShapeDtypeStruct for leaf in jax.tree.leaves(model.params))
    assert sum(leaf.size for leaf in jax.tree.leaves(model.params)) == 6_738_415_616  # Llama 2 7B
    logits = jax.eval_shape(model.apply, model.params, jax.ShapeDtypeStruct((1, 64), jnp.int32)).logits
    assert logits.shape == (1, 64, 32000) and logits.dtype == jnp.bfloat16


def test_a_linear_layer_is_one_product():
    model = llama()
    text = str(jax.make_jaxpr(model.apply)(model.params, IDS))
    layers, projections, attention, head = 2, 7, 2, 1
    assert text.count("dot_general[") == layers * (projections + attention) + head


def test_initial_values_depend_on_the_path_alone():
    small, deep = llama(), llama(num_hidden_layers=3)
    assert_same(deep.params["model"]["layers"]["1"], small.params["model"]["layers"]["1"])
    first, second = (small.params["model"]["layers"][i]["mlp"]["up_proj"]["kernel"] for i in "01")
    assert np.abs(first - second).max() > 0.1
    assert np.all(small.params["model"]["norm"]["scale"] == 1)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_a_split_model_computes_the_same(folder, axis_type):
    # jax.make_mesh makes explicit axes unless it is told otherwise.
    split_over = jax.make_mesh((2, 2), ("x", "y"), axis_types=(axis_type,) * 2, devices=jax.devices()[:4])
    split = FlaxAutoModelForCausalLM.from_pretrained(folder, mesh=split_over, sharding_rules=[("proj", P("x", "y"))])
    assert any(len(leaf.sharding.device_set) == 4 for leaf in jax.tree.leaves(split.params))
    ids = np.arange(12).reshape(4, 3) % 16
    rows = NamedSharding(mesh(2, 2), P("x"))
    expected = llama().apply(llama().params, ids).logits
    for given in (ids, jax.device_put(ids, rows)):
        np.testing.assert_allclose(jax.jit(split.apply)(split.params, given).logits, expected, atol=1e-5)
