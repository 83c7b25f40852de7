"""Checkpoints that bitsandbytes quantised, and the weights that it computes of them on the CPU."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jpeft
from jpeft_interop.models._bitsandbytes import gathered
from jpeft_interop.models._family import Architecture, Family
from jpeft_interop.models._leaves import leaves_of
from jpeft_interop.models._loading import load, match
from jpeft_interop.models._shardings import placement
from jpeft_interop.models._tensors import catalogue

torch = pytest.importorskip("torch")
functional = pytest.importorskip("bitsandbytes.functional")
save_file = pytest.importorskip("safetensors.torch").save_file

ULP = 2.0**-22
"""Of a scale that two compilers may round otherwise: one fuses a product and a sum. Relative to the largest weight."""

TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
NF4, INT8 = {"load_in_4bit": True}, {"load_in_8bit": True}
TOY = Architecture("Toy", lambda config, options: nnx.Module())


def random_weight(out, size, seed, dtype="float32"):
    """Rows of different sizes, so that a scale in another's place is seen."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.exp(torch.randn(out, 1, generator=generator))
    return (rows * torch.randn(out, size, generator=generator)).to(TYPES[dtype])


def quantised(weight, kind, *, blocksize=64, nested=False, storage=torch.uint8):
    """(tensors of a checkpoint by the ends of their names, the weight in float32 as bitsandbytes dequantises it)."""
    if kind == "int8":
        codes, scales, _ = functional.int8_vectorwise_quant(weight.to(torch.float16))
        layout = torch.tensor(0, dtype=torch.uint8)
        want = functional.int8_vectorwise_dequant(codes, scales)
        return {"weight": codes, "SCB": scales, "weight_format": layout}, want.numpy()
    codes, state = functional.quantize_4bit(
        weight, blocksize=blocksize, compress_statistics=nested, quant_type=kind, quant_storage=storage
    )
    parts = {f"weight.{name}": tensor.clone() for name, tensor in state.as_dict(packed=True).items()}
    # As one row of an even size, for which bitsandbytes has a compiled function; the codes are in that order anyhow.
    wide = weight.numel() + weight.numel() % 2
    state.dtype, state.shape = torch.float32, torch.Size((1, wide))
    want = functional.dequantize_4bit(codes.reshape(-1, 1), state).reshape(-1)[: weight.numel()]
    return {"weight": codes, **parts}, want.reshape(weight.shape).numpy()


def store(folder, modules):
    tensors = {f"{module}.{name}": tensor for module, parts in modules.items() for name, tensor in parts.items()}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")


def toy(**modules):
    return leaves_of(nnx.state(nnx.Dict(modules)))


def read(folder, leaves, *, settings=NF4, config=None, mesh=None, rules=None, param_dtype=None, **fields):
    family = Family("toy", lambda raw, ignore: None, "", (), {"base": TOY}, **fields)
    tensors = gathered(catalogue([folder / "model.safetensors"]), config or {}, settings)
    place = placement(mesh, rules)
    shardings = {path: place(path, leaf.shape) for path, leaf in leaves.items()}
    matched = match(leaves, tensors, family, TOY)
    return load(matched, leaves, param_dtype=param_dtype, shardings=shardings, rng=jax.random.key(0), std=1.0)


def values(leaf):
    """What a leaf stands for, in float32, before it is rounded to its own type."""
    if isinstance(leaf, jpeft.Quantized):
        leaf = jpeft.dequantize(dataclasses.replace(leaf, dtype=jnp.dtype(jnp.float32)))
    return np.asarray(leaf, np.float32)


def bits(leaf):
    """Of each number of a quantised leaf, codes of four bits taking no more than that."""
    sizes = (
        array.size * (4 if array.dtype == jnp.uint4 else 8 * array.dtype.itemsize) for array in jax.tree.leaves(leaf)
    )
    return sum(sizes) / leaf.size


def assert_agrees(leaf, want, *, exact):
    got = values(leaf)
    assert got.shape == want.shape
    if exact:
        np.testing.assert_array_equal(got, want)
    np.testing.assert_allclose(got, want, rtol=0, atol=ULP * np.abs(want).max())
