"""Layouts read off a function: what each axis of each weight is for."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

import jpeft

X, IDS = jnp.ones((2, 5, 4)), np.ones((2, 3), np.int32)

FOUND = {
    "in, out": (lambda w, x: x @ w, (4, 6), X, "io"),
    "out, in": (lambda w, x: x @ w.T, (6, 4), X, "oi"),
    "weight on the left": (lambda w, x: w @ x.mT, (6, 4), X, "oi"),
    "heads out": (lambda w, x: jnp.einsum("btd,dnh->bnth", x, w), (4, 2, 3), X, "ioo"),
    "heads in": (lambda w, x: jnp.einsum("btnh,nhd->btd", x.reshape(2, 5, 2, 2), w), (2, 2, 7), X, "iio"),
    "heads first": (lambda w, x: jnp.einsum("btd,ndh->bnth", x, w), (2, 4, 3), X, "oio"),
    "experts": (lambda w, x: jnp.einsum("bti,bio->bto", x, w), (2, 4, 6), X, "bio"),
    "grouped product": (lambda w, x: lax.ragged_dot(x[0], w, jnp.array([2, 3])), (2, 4, 6), X, "bio"),
    "scanned layers": (lambda w, x: lax.scan(lambda c, own: (c @ own, None), x, w)[0], (3, 4, 4), X, "bio"),
    "layers scanned in the middle": (
        lambda w, x: lax.scan(lambda c, own: (jnp.einsum("btd,dh->bth", c, own), None), x, jnp.moveaxis(w, 1, 0))[0],
        (4, 3, 4), X, "ibo",
    ),
    "layers by index": (lambda w, x: x @ w[0] @ w[1], (2, 4, 4), X, "bio"),
    "layers by a traced index": (lambda w, x: lax.fori_loop(0, 3, lambda i, c: c @ w[i], x), (3, 4, 4), X, "bio"),
    "experts by ids": (lambda w, x: jnp.einsum("bti,bio->bto", x, w[np.array([1, 2])]), (3, 4, 6), X, "bio"),
    "lookup": (lambda w, ids: w[ids], (7, 5), IDS, "vo"),
    "a tied lookup": (lambda w, ids: w[ids] @ w.T, (7, 5), IDS, "vo"),
    "product, then a tied lookup": (lambda w, x: (x @ w.T).sum() + w[IDS].sum(), (7, 4), X, "vo"),
    "convolution": (
        lambda w, x: lax.conv_general_dilated(x, w, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")),
        (3, 4, 6), X, ".io",
    ),
    "torch's convolution": (
        lambda w, x: lax.conv_general_dilated(x, w, (1,), "SAME", dimension_numbers=("NCW", "OIW", "NCW")),
        (6, 5, 3), X, "oi.",
    ),
    "reshaped": (lambda w, x: x @ w.reshape(4, 6), (4, 2, 3), X, "ioo"),
    "cast, jitted, rematerialised": (
        lambda w, x: jax.jit(jax.checkpoint(lambda w: x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16)))(w),
        (4, 6), X, "io",
    ),
    "in a branch": (lambda w, x: lax.cond(x.sum() > 0, lambda: x @ w, lambda: x @ w * 2), (4, 6), X, "io"),
    "with a rule of its own": (lambda w, x: nn.activation.relu(x @ w), (4, 6), X, "io"),
}  # fmt: skip


@pytest.mark.parametrize(("function", "shape", "x", "layout"), FOUND.values(), ids=FOUND)
def test_layouts_are_read_off_the_function(function, shape, x, layout):
    found = jpeft.infer_layouts(lambda p, x: function(p["d"]["kernel"], x), {"d": {"kernel": jnp.ones(shape)}}, x)
    assert found == {"d.kernel": layout}


def test_shapes_are_enough():
    params = {"d": {"kernel": jax.ShapeDtypeStruct((4, 2, 3), jnp.bfloat16)}}
    x = jax.ShapeDtypeStruct((2, 4), jnp.bfloat16)
    found = jpeft.infer_layouts(
        lambda p, x, scale: jnp.einsum("td,dnh->tnh", x, p["d"]["kernel"]), params, x, scale=2.0
    )
    assert found == {"d.kernel": "ioo"}


def test_leaves_that_the_function_does_not_tell_are_left_out():
    params = {
        "unused": {"kernel": jnp.ones((4, 6))},
        "added": {"kernel": jnp.ones((5, 4))},
        "norm": {"scale": jnp.ones(4), "bias": jnp.ones((1, 4))},
        "ids": {"kernel": jnp.ones((4, 4), jnp.int32)},
        "used": {"kernel": jnp.ones((4, 6))},
    }

    def function(p, x):
        return (x + p["added"]["kernel"]) * p["norm"]["scale"] @ p["used"]["kernel"] + p["ids"]["kernel"].sum().astype(
            x.dtype
        )

    assert jpeft.infer_layouts(function, params, X) == {"used.kernel": "io"}


def test_a_linen_attention():
    module = nn.MultiHeadDotProductAttention(2)
    params = jax.eval_shape(module.init, jax.random.key(0), X)
    found = jpeft.infer_layouts(module.apply, params, X)
    assert found == {"query.kernel": "ioo", "key.kernel": "ioo", "value.kernel": "ioo", "out.kernel": "iio"}


def test_an_nnx_model_with_keys_in_its_state():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Embed(7, 4, rngs=rngs)
            self.out = nnx.LinearGeneral(4, (2, 3), rngs=rngs)
            self.dropout = nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, ids):
            return self.out(self.dropout(self.embed(ids)))

    graph, state = nnx.split(Model(nnx.Rngs(0)))
    found = jpeft.infer_layouts(lambda state, ids: nnx.merge(graph, state)(ids), state, IDS)
    assert found == {"embed.embedding": "vo", "out.kernel": "ioo"}


def test_what_is_found_is_what_wrap_takes():
    module = nn.DenseGeneral((2, 3))
    params = module.init(jax.random.key(0), X)
    layouts = jpeft.infer_layouts(module.apply, params, X)
    wrapped = jpeft.wrap(params, jpeft.LoraConfig(r=2, target_modules=".*"), layouts=layouts)
    assert jax.tree.map(jnp.shape, wrapped.adapters["default"].weights) == {
        "kernel": {"lora_A": (2, 4), "lora_B": (6, 2)}
    }
