"""Rows of the table of cases: the layers of Flax linen, Flax NNX, Equinox and Haiku, used as their users do."""

from collections.abc import Callable, Mapping
from typing import Any

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from tests.harness import Case, Problem, random_like

KEY = np.zeros(2, np.uint32)
X, IMAGE, IDS = (2, 5, 4), (2, 6, 6, 2), np.array([[1, 2, 3], [0, 6, 6]], np.int32)
LOOKUP = {"how": ("lookup",)}
CONV: dict[str, Any] = {}
GROUPED = "merged: conv_general_dilated (grouped convolution)"
ATTENTION = {"query": "ioo", "key": "ioo", "value": "ioo", "out": "iio"}


def filled(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(random_like(arg, 50 + index, 1.0) for index, arg in enumerate(args))


def linen(
    name: str, make: Callable[[], nn.Module], *args: Any, layouts: Mapping[str, str] | None = None, **fields: Any
):
    """A row of `module.apply`. args: shapes to fill with random numbers, or arrays. layouts: None to infer them."""

    def build() -> Problem:
        module, given = make(), filled(args)
        narrow = jax.tree.map(lambda x: x.astype(np.float32) if x.dtype == float else x, given)
        shapes = jax.eval_shape(module.init, KEY, *narrow)
        return Problem(module.apply, random_like(shapes, 7), given, layouts)

    return Case(f"linen {name}", build, **fields)


class LinenTower(nn.Module):
    """Three layers, scanned, and rematerialised or not."""

    remat: bool = False

    @nn.compact
    def __call__(self, x: Any) -> Any:
        layer = nn.remat(LinenLayer) if self.remat else LinenLayer
        layers = nn.scan(layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return layers(name="layers")(x, None)[0]


class LinenLayer(nn.Module):
    @nn.compact
    def __call__(self, x: Any, _: Any) -> Any:
        return nn.tanh(nn.Dense(4)(x)), None


class LinenRemat(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        return nn.remat(nn.Dense)(6)(jnp.tanh(nn.remat(nn.Dense)(5)(x)))


LINEN = (
    linen("Dense", lambda: nn.Dense(6), X, layouts={}),
    linen("Dense without bias", lambda: nn.Dense(6, use_bias=False), X),
    linen("DenseGeneral to heads", lambda: nn.DenseGeneral((2, 3)), X),
    linen("DenseGeneral from heads", lambda: nn.DenseGeneral(7, axis=(-2, -1)), (2, 5, 2, 2)),
    linen("DenseGeneral with a batch axis", lambda: nn.DenseGeneral(3, batch_dims=(0,)), (2, 5, 4)),
    linen("Einsum", lambda: nn.Einsum((4, 2, 3), "bti,ino->btno", use_bias=False), X),
    linen("Embed", lambda: nn.Embed(7, 5), IDS, layouts={}, **LOOKUP),
    linen("Conv, one axis", lambda: nn.Conv(5, (3,), padding="CAUSAL"), (2, 6, 2), layouts={"kernel": ".io"}, **CONV),
    linen("Conv, strides", lambda: nn.Conv(5, (3, 3), strides=(2, 1)), IMAGE, layouts={}, **CONV),
    linen(
        "Conv, dilation", lambda: nn.Conv(5, (3, 2), kernel_dilation=(1, 2), padding=((1, 0), (0, 2))), IMAGE, **CONV
    ),
    linen("Conv, circular padding", lambda: nn.Conv(5, (3, 3), padding="CIRCULAR"), IMAGE, **CONV),
    linen("Conv, groups", lambda: nn.Conv(4, (3, 3), feature_group_count=2), IMAGE, how=(GROUPED,), general=(GROUPED,)),
    linen("ConvTranspose", lambda: nn.ConvTranspose(5, (3, 3), strides=(2, 2)), IMAGE, **CONV),
    linen(
        "attention",
        lambda: nn.MultiHeadDotProductAttention(2),
        X,
        layouts={rf"{name}\.kernel": layout for name, layout in ATTENTION.items()},
    ),
    linen("attention, inferred", lambda: nn.MultiHeadDotProductAttention(2), X),
    linen("scan", LinenTower, X),
    linen("scan of remat", lambda: LinenTower(remat=True), X),
    linen("remat", LinenRemat, X),
)


def nnx_row(
    name: str, make: Callable[[nnx.Rngs], Any], *args: Any, layouts: Mapping[str, str] | None = None, **fields: Any
):
    """A row of a module split into its graph and its state."""

    def build() -> Problem:
        graph, state = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))

        def function(state: Any, *args: Any) -> Any:
            return nnx.merge(graph, state)(*args)

        return Problem(function, random_like(state, 7), filled(args), layouts)

    return Case(f"nnx {name}", build, **fields)


class NnxTower(nnx.Module):
    """Three layers made by nnx.vmap and run by nnx.scan, which hands the layers through as outputs."""

    def __init__(self, rngs: nnx.Rngs, remat: bool = False):
        self.layers = nnx.vmap(lambda rngs: nnx.Linear(4, 4, rngs=rngs))(rngs.split(3))
        self.remat = remat

    def __call__(self, x: Any) -> Any:
        def layer(x: Any, linear: Any) -> Any:
            return nnx.tanh(linear(x))

        body = nnx.remat(layer) if self.remat else layer
        return nnx.scan(body, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.layers)


class NnxCalls(nnx.Module):
    """A layer called through one of NNX's transforms."""

    def __init__(self, rngs: nnx.Rngs, transform: Callable[..., Any]):
        self.linear, self.transform = nnx.Linear(4, 6, rngs=rngs), transform

    def __call__(self, x: Any) -> Any:
        return self.transform(lambda linear, x: jnp.tanh(linear(x)))(self.linear, x)


def nnx_attention(rngs: nnx.Rngs) -> Any:
    def attention(*args: Any, **kwargs: Any) -> Any:
        with jax.numpy_dtype_promotion("standard"):  # JAX's own attention mixes float64 with float32
            return nnx.dot_product_attention(*args, **kwargs)

    return nnx.MultiHeadAttention(2, 4, decode=False, param_dtype=float, attention_fn=attention, rngs=rngs)


NNX = (
    nnx_row("Linear", lambda rngs: nnx.Linear(4, 6, rngs=rngs), X, layouts={}),
    nnx_row("LinearGeneral", lambda rngs: nnx.LinearGeneral(4, (2, 3), rngs=rngs), X),
    nnx_row(
        "LinearGeneral from heads", lambda rngs: nnx.LinearGeneral((2, 2), 7, axis=(-2, -1), rngs=rngs), (2, 5, 2, 2)
    ),
    nnx_row("Einsum", lambda rngs: nnx.Einsum("bti,ino->btno", (4, 2, 3), (2, 3), rngs=rngs), X),
    nnx_row("Embed", lambda rngs: nnx.Embed(7, 5, param_dtype=float, rngs=rngs), IDS, layouts={}, **LOOKUP),
    nnx_row("Conv", lambda rngs: nnx.Conv(2, 5, (3, 3), strides=2, rngs=rngs), IMAGE, layouts={}, **CONV),
    nnx_row("Conv, one axis", lambda rngs: nnx.Conv(2, 5, (3,), kernel_dilation=2, rngs=rngs), (2, 6, 2), **CONV),
    nnx_row("attention", nnx_attention, X, layouts={rf"{name}\.kernel": layout for name, layout in ATTENTION.items()}),
    nnx_row("attention, inferred", nnx_attention, X),
    nnx_row("scan", NnxTower, X),
    nnx_row("scan of remat", lambda rngs: NnxTower(rngs, remat=True), X),
    nnx_row("remat", lambda rngs: NnxCalls(rngs, nnx.remat), X),
    nnx_row("jit", lambda rngs: NnxCalls(rngs, nnx.jit), X),
    nnx_row("vmap", lambda rngs: NnxCalls(rngs, lambda f: nnx.vmap(f, in_axes=(None, 0))), X),
    nnx_row("cond", lambda rngs: NnxCalls(rngs, lambda f: lambda m, x: nnx.cond(x.sum() < 99, f, f, m, x)), X),
)


def equinox(name: str, make: Callable[[Any], Any], call: Callable[..., Any], *args: Any, layouts: Any, **fields: Any):
    """A row of a module split into arrays and the rest."""

    def build() -> Problem:
        shapes, rest = eqx.partition(eqx.filter_eval_shape(make, KEY), lambda leaf: hasattr(leaf, "shape"))

        def function(params: Any, *args: Any) -> Any:
            return call(eqx.combine(params, rest), *args)

        return Problem(function, random_like(shapes, 7), filled(args), layouts)

    return Case(f"equinox {name}", build, **fields)


def equinox_layers(model: Any, x: Any) -> Any:
    arrays, rest = eqx.partition(model, eqx.is_array)
    return lax.scan(lambda x, own: (jnp.tanh(jax.vmap(eqx.combine(own, rest))(x)), None), x, arrays)[0]


EQUINOX = (
    equinox(
        "Linear",
        lambda key: eqx.nn.Linear(4, 6, key=key),
        lambda m, x: jax.vmap(m)(x),
        (5, 4),
        layouts={"weight": "oi"},
    ),
    equinox(
        "Linear, jitted, rematerialised",
        lambda key: eqx.nn.Linear(4, 6, key=key),
        lambda m, x: eqx.filter_jit(eqx.filter_checkpoint(lambda m, x: jnp.tanh(jax.vmap(m)(x))))(m, x),
        (5, 4),
        layouts={"weight": "oi"},
    ),
    equinox(
        "MLP",
        lambda key: eqx.nn.MLP(4, 3, 5, 2, key=key),
        lambda m, x: jax.vmap(m)(x),
        (5, 4),
        layouts={r".*weight": "oi"},
    ),
    equinox(
        "attention",
        lambda key: eqx.nn.MultiheadAttention(2, 4, key=key),
        lambda m, x: m(x, x, x),
        (5, 4),
        layouts={r".*weight": "oi"},
    ),
    equinox(
        "Conv2d",
        lambda key: eqx.nn.Conv2d(2, 5, 3, key=key),
        lambda m, x: m(x),
        (2, 6, 6),
        layouts={"weight": "oi.."},
        **CONV,
    ),
    equinox(
        "Embedding",
        lambda key: eqx.nn.Embedding(7, 5, key=key),
        lambda m, ids: jax.vmap(jax.vmap(m))(ids),
        IDS,
        layouts={"weight": "vo"},
        **LOOKUP,
    ),
    equinox(
        "layers in scan",
        lambda key: eqx.filter_vmap(lambda key: eqx.nn.Linear(4, 4, key=key))(jnp.stack([key] * 3)),
        equinox_layers,
        (5, 4),
        layouts={"weight": "boi"},
    ),
)


def haiku(name: str, call: Callable[[Any], Any], *args: Any, layouts: Any = {}, **fields: Any):
    """A row of a transformed function."""

    def build() -> Problem:
        transformed, given = hk.without_apply_rng(hk.transform(call)), filled(args)
        return Problem(transformed.apply, random_like(jax.eval_shape(transformed.init, KEY, *given), 7), given, layouts)

    return Case(f"haiku {name}", build, **fields)


HAIKU = (
    haiku("Linear", lambda x: hk.Linear(6)(x), X),
    haiku("MLP", lambda x: hk.nets.MLP([5, 3])(x), X),
    haiku("Embed", lambda ids: hk.Embed(7, 5)(ids), IDS, layouts={".*": "vo"}, **LOOKUP),
    haiku("Conv2D", lambda x: hk.Conv2D(5, 3)(x), IMAGE, **CONV),
    haiku("layer_stack", lambda x: hk.layer_stack(3)(lambda x: jnp.tanh(hk.Linear(4)(x)))(x), X, layouts={".*": "bio"}),
    haiku("attention", lambda x: hk.MultiHeadAttention(2, 3, w_init=hk.initializers.Constant(0))(x, x, x), X),
)

FRAMEWORKS = (*LINEN, *NNX, *EQUINOX, *HAIKU)
