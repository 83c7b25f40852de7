"""Checkpoints that bitsandbytes quantised: leaves that stand for the weights that bitsandbytes computes on the CPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, PartitionSpec as P

import jpeft
from jpeft_interop.models._bitsandbytes import gathered
from jpeft_interop.models._layers import Conv1D, Linear
from jpeft_interop.models._parameters import Piece, normal, parameter, whole
from jpeft_interop.models._quantised_tensor import Codes
from jpeft_interop.models._tensors import Tensor, catalogue
from tests.interop.models.bitsandbytes_oracle import (
    INT8,
    NF4,
    assert_agrees,
    bits,
    quantised,
    random_weight,
    read,
    store,
    torch,
    toy,
    values,
)

# ---- one weight -----------------------------------------------------------------------------------------------------


# in, out, blocksize, the type of the weights, and the bits that a number then takes, plain and with quantised scales.
SHAPES = {
    "rows of one block": (64, 12, 64, "float32", 4.5, 4.5),
    "rows of several blocks": (256, 12, 64, "bfloat16", 4.5, 4 + 8 / 64 + 32 / 256),
    "rows of more blocks than are scaled at once": (512 * 32, 3, 32, "float16", 5.0, 4 + 8 / 32 + 32 / (256 * 32)),
    "three blocks to a row": (192, 5, 64, "float32", 4.5, 4.5),
    "blocks of several rows": (32, 16, 256, "float32", 5.0, 5.0),
    "blocks across the ends of rows": (96, 6, 64, "float32", 5.0, 5.0),
    "a last block that is not full": (48, 5, 64, "float32", 6.0, 6.0),
    "groups of four": (100, 8, 64, "float32", 12.0, 12.0),
    "rows that begin within a byte": (33, 8, 32, "float32", None, None),
    "groups too small for a 16-bit weight": (50, 8, 64, "bfloat16", None, None),
}


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", SHAPES)
def test_four_bits(tmp_path, shape, kind, nested):
    size, out, blocksize, dtype, *expected = SHAPES[shape]
    weight = random_weight(out, size, len(shape), dtype)
    parts, want = quantised(weight, kind, blocksize=blocksize, nested=nested)
    store(tmp_path, {"a": parts})
    if expected[nested] is None:
        with pytest.warns(UserWarning, match=rf"read as dense weights: a\.kernel \(rows of {size} in blocks of"):
            leaf = read(tmp_path, toy(a=Linear(size, out, bias=False)))["a.kernel"]
        assert not isinstance(leaf, jpeft.Quantized) and leaf.dtype == dtype
        np.testing.assert_array_equal(leaf, want.T.astype(dtype))
        return
    leaf = read(tmp_path, toy(a=Linear(size, out, bias=False)))["a.kernel"]
    assert isinstance(leaf, jpeft.Quantized) and leaf.dtype == dtype and leaf.shape == (size, out)
    doubly = hasattr(leaf.array.scale, "qvalue")
    assert bits(leaf) == expected[nested] + (32 / leaf.size if doubly else 0)  # The one offset.
    assert doubly == (expected[nested] < expected[0])
    assert_agrees(leaf, want.T, exact=not doubly)


@pytest.mark.parametrize(
    "config, dtype", [({"dtype": "bfloat16"}, "bfloat16"), ({"torch_dtype": "float16"}, "float16"), ({}, "float32")]
)
def test_eight_bits(tmp_path, config, dtype):
    parts, want = quantised(random_weight(12, 40, 1), "int8")
    store(tmp_path, {"a": parts | {"bias": torch.randn(12)}})
    leaves = read(tmp_path, toy(a=Linear(40, 12)), settings=INT8, config=config)
    leaf = leaves["a.kernel"]
    assert (leaf.dtype, leaf.array.qvalue.dtype, leaf.array.scale.shape) == (dtype, jnp.int8, (1, 12))
    # bitsandbytes multiplies by the scale and then by 1/127, or, when it trains, by their product as here.
    assert_agrees(leaf, want.T, exact=False)
    trained = parts["weight"].float() * (parts["SCB"][:, None] * (1 / 127))
    np.testing.assert_array_equal(values(leaf), trained.numpy().T)
    assert not isinstance(leaves["a.bias"], jpeft.Quantized)


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32], ids=str)
def test_codes_stored_as_other_types(tmp_path, storage):
    parts, want = quantised(random_weight(6, 64, 2), "nf4", storage=storage)
    store(tmp_path, {"a": parts})
    assert parts["weight"].dtype == storage
    assert_agrees(read(tmp_path, toy(a=Linear(64, 6, bias=False)))["a.kernel"], want.T, exact=True)


# ---- stacks, pieces, orientations, meshes ---------------------------------------------------------------------------


def layers(kind, count=3, out=16, size=512, **options):
    made = [quantised(random_weight(out, size, seed), kind, **options) for seed in range(count)]
    return {f"layers.{i}": parts for i, (parts, _) in enumerate(made)}, np.stack([want.T for _, want in made])


class Stacked(nnx.Module):
    def __init__(self, *shape):
        self.kernel = parameter(shape, normal, whole("weight", (1, 0)))


KINDS = {"nf4": {}, "nested": {"nested": True}, "fp4": {"nested": True, "blocksize": 128}, "int8": {}}
SETTINGS = {"int8": INT8}


@pytest.mark.parametrize("spec", [None, P("x", "y"), P("y"), P(None, ("x", "y"))], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_stacks_on_meshes(tmp_path, kind, spec):
    modules, want = layers("nf4" if kind == "nested" else kind, **KINDS[kind])
    store(tmp_path, modules)
    leaves = toy(layers=nnx.Dict({"0:3": Stacked(3, 512, 16)}))
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("x", "y"))
    where = {} if spec is None else {"mesh": mesh, "rules": [("kernel", spec)]}
    leaf = read(tmp_path, leaves, settings=SETTINGS.get(kind, NF4), **where)["layers.0:3.kernel"]
    assert leaf.shape == (3, 512, 16)
    assert all(array.shape[0] == 3 for array in jax.tree.leaves(leaf))
    assert_agrees(leaf, want, exact=kind == "nf4")
    if spec is not None:
        assert leaf.sharding.spec == P(None, *spec)
        assert all(array.sharding.mesh.shape == mesh.shape for array in jax.tree.leaves(leaf))


class Experts(nnx.Module):
    """Two projections of three experts in one parameter."""

    def __init__(self, size, out):
        blocks = (("w1", slice(None, out)), ("w3", slice(out, None)))
        pieces = [
            Piece(f"{expert}.{name}.weight", (expert, slice(None), block), (1, 0))
            for expert in range(3)
            for name, block in blocks
        ]
        self.gate_up = parameter((3, size, 2 * out), normal, tuple(pieces))


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_of_a_parameter(tmp_path, kind):
    made = {
        f"experts.{expert}.{name}": quantised(
            random_weight(8, 512, 10 * expert + part), "nf4" if kind == "nested" else kind, **KINDS[kind]
        )
        for expert in range(3)
        for part, name in enumerate(("w1", "w3"))
    }
    store(tmp_path, {name: parts for name, (parts, _) in made.items()})
    want = [np.concatenate([made[f"experts.{i}.{name}"][1].T for name in ("w1", "w3")], axis=1) for i in range(3)]
    leaf = read(tmp_path, toy(experts=Experts(512, 8)), settings=SETTINGS.get(kind, NF4))["experts.gate_up"]
    # Scales whose offsets differ within a parameter are dequantised.
    assert isinstance(leaf, jpeft.Quantized) and leaf.offset is None
    assert_agrees(leaf, np.stack(want), exact=kind != "int8")


class Rows(nnx.Module):
    """A parameter that two tensors fill, one after the other along its input."""

    def __init__(self, *parts):
        self.kernel = parameter((sum(size for size, _ in parts), parts[0][1]), normal, self.pieces(parts))

    @staticmethod
    def pieces(parts):
        ends = np.cumsum([0, *(size for size, _ in parts)])
        return tuple(
            Piece(f"{i}.weight", (slice(int(first), int(last)), slice(None)), (1, 0))
            for i, (first, last) in enumerate(zip(ends[:-1], ends[1:], strict=True))
        )


@pytest.mark.parametrize("sizes, group", [((64, 128), 64), ((96, 64), 32), ((64, 208), 16)])
def test_pieces_along_the_input(tmp_path, sizes, group):
    made = [quantised(random_weight(6, size, seed), "nf4") for seed, size in enumerate(sizes)]
    store(tmp_path, {f"a.{i}": parts for i, (parts, _) in enumerate(made)})
    leaf = read(tmp_path, toy(a=Rows(*((size, 6) for size in sizes))))["a.kernel"]
    assert leaf.array.scale.shape == (sum(sizes) // group, 6)
    assert_agrees(leaf, np.concatenate([want.T for _, want in made]), exact=True)


def test_a_conv1d_is_quantised_as_the_linear_layer_that_it_is(tmp_path):
    parts, want = quantised(random_weight(64, 64, 3), "nf4")  # As transformers does it: (out, in).
    store(tmp_path, {"a": parts | {"bias": torch.randn(64)}})
    leaf = read(tmp_path, toy(a=Conv1D(64, 64)))["a.kernel"]
    assert_agrees(leaf, want.T, exact=True)


@pytest.mark.parametrize("size", [64, 33])
def test_one_tensor_for_two_modules(tmp_path, size):
    parts, want = quantised(random_weight(10, size, 4), "nf4", blocksize=32)
    store(tmp_path, {"both": parts})
    leaves = toy(gate=Linear(size, 5, bias=False), up=Linear(size, 5, bias=False))
    splits = (("^both", ("gate", "up")),)
    if size % 2:
        with pytest.warns(UserWarning, match=r"gate\.kernel \(.*up\.kernel \("):
            found = read(tmp_path, leaves, splits=splits)
    else:
        found = read(tmp_path, leaves, splits=splits)
    np.testing.assert_array_equal(values(found["gate.kernel"]), want.T[:, :5])
    np.testing.assert_array_equal(values(found["up.kernel"]), want.T[:, 5:])


def plain(out, size, seed):
    weight = random_weight(out, size, seed)
    return {"weight": weight}, weight.numpy()


DENSE = {
    "a layer that is not quantised": (
        [quantised(random_weight(4, 64, 0), "nf4"), plain(4, 64, 1)],
        "layers.1.weight is not quantised, unlike",
    ),
    "two formats": (
        [quantised(random_weight(4, 64, 0), "nf4"), quantised(random_weight(4, 64, 1), "fp4")],
        r"in several ways, \[\('fp4', 'F32'\), \('nf4', 'F32'\)\]",
    ),
}


@pytest.mark.parametrize("made, text", DENSE.values(), ids=DENSE)
def test_a_stack_that_is_no_quantised_leaf_is_read_dense(tmp_path, made, text):
    store(tmp_path, {f"layers.{i}": parts for i, (parts, _) in enumerate(made)})
    with pytest.warns(UserWarning, match=rf"read as dense weights: layers\.0:2\.kernel \(.*{text}"):
        leaf = read(tmp_path, toy(layers=nnx.Dict({"0:2": Stacked(2, 64, 4)})))["layers.0:2.kernel"]
    np.testing.assert_array_equal(leaf, np.stack([want.T for _, want in made]))


class Crossed(nnx.Module):
    """A parameter of two square tensors, of which the second is turned."""

    def __init__(self):
        every = slice(None)
        self.experts = parameter(
            (2, 64, 64),
            normal,
            (Piece("0.weight", (0, every, every), (1, 0)), Piece("1.weight", (1, every, every), (0, 1))),
        )


class Alternating(nnx.Module):
    def __init__(self):
        self.experts = parameter(
            (128, 64),
            normal,
            tuple(Piece(f"{i}.weight", (slice(i, None, 2), slice(None)), (1, 0)) for i in range(2)),
        )


@pytest.mark.parametrize("module", [Crossed, Alternating])
def test_rows_that_do_not_lie_along_one_axis(tmp_path, module):
    made = [quantised(random_weight(64, 64, seed), "nf4") for seed in range(2)]
    store(tmp_path, {f"a.{i}": parts for i, (parts, _) in enumerate(made)})
    (first, second), leaves = [want for _, want in made], toy(a=module())
    want = np.stack([first.T, second]) if module is Crossed else np.stack([first.T, second.T], 1).reshape(128, 64)
    with pytest.warns(UserWarning, match=r"a\.experts \(the rows of its tensors do not lie along one axis\)"):
        np.testing.assert_array_equal(read(tmp_path, leaves)["a.experts"], want)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_part_of_the_codes_is_read_without_the_rest(tmp_path, kind, monkeypatch):
    parts, _ = quantised(random_weight(16, 256, 5), kind)
    store(tmp_path, {"a": parts})
    weight = gathered(catalogue([tmp_path / "model.safetensors"]), {}, SETTINGS.get(kind, NF4))["a.weight"]
    found, original = [], Tensor.read
    monkeypatch.setattr(Tensor, "read", lambda *args: (found.append(block := original(*args)), block)[1])
    whole = Codes(weight).read((slice(0, 16), slice(0, 256)))
    everything = found.pop().nbytes
    assert everything == 16 * 256 // (1 if kind == "int8" else 2)
    for rows, columns in [
        (slice(4, 8), slice(0, 256)),
        (slice(0, 16), slice(64, 128)),
        (slice(2, 10), slice(128, 256)),
    ]:
        np.testing.assert_array_equal(Codes(weight).read((rows, columns)), whole[rows, columns])
        assert found.pop().nbytes == everything // 4
