"""Lifted functions on meshes: base weights sharded as users shard them, adapters replicated or sharded along."""

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import jpeft
from tests.cases import METHODS, scanned
from tests.harness import Problem, adapted, assert_close, random_like, results

pytestmark = pytest.mark.usefixtures("x64")


@dataclasses.dataclass(frozen=True)
class Sharded:
    """A function with the partition of each parameter and of x on a mesh of 4 (data) by 2 (model).

    axes: the types of mesh axes that JAX can differentiate the function on.
    """

    function: Callable[..., Any]
    params: Any
    specs: Any
    x: tuple[int, ...]
    x_spec: P
    layouts: Any = dataclasses.field(default_factory=dict)
    how: tuple[str, ...] = ("low-rank",)
    general: tuple[str, ...] = ("transformed",)
    axes: tuple[AxisType, ...] = (AxisType.Auto, AxisType.Explicit)


def mlp(p, x):
    return jnp.tanh(x @ p["up"]["kernel"]) @ p["down"]["kernel"]


def out(*spec):
    """What the user of Explicit axes has to say of a result; with Auto axes nothing may be said."""
    explicit = AxisType.Explicit in jax.sharding.get_abstract_mesh().axis_types
    return P(*spec) if explicit else None


def moved(tree, specs):
    explicit = AxisType.Explicit in jax.sharding.get_abstract_mesh().axis_types
    return (jax.sharding.reshard if explicit else lax.with_sharding_constraint)(tree, specs)


def mlp_whole(p, x):
    return jnp.tanh(x @ p["up"]["kernel"])


def mlp_spread(p, x):
    h = jnp.einsum("btd,df->btf", x, p["up"]["kernel"], out_sharding=out("data", None, "model"))
    return jnp.einsum("btf,fd->btd", jnp.tanh(h), p["down"]["kernel"], out_sharding=out("data", None, None))


def heads(p, x):
    q = jnp.einsum("btd,dnh->btnh", x, p["query"]["kernel"], out_sharding=out("data", None, "model", None))
    return jnp.einsum("btnh,nhd->btd", jnp.tanh(q), p["out"]["kernel"], out_sharding=out("data", None, None))


def experts(p, x):
    return jnp.einsum("btd,edf->betf", x, p["up"]["kernel"], out_sharding=out("data", "model", None, None))


def lookup(p, x):
    ids = jnp.argmax(x, -1)
    return p["embed"]["embedding"].at[ids].get(out_sharding=out("data", None, None))


def constrained(p, x):
    kernel = lax.with_sharding_constraint(p["up"]["kernel"], P(None, "model"))
    return mlp_spread({**p, "up": {"kernel": kernel}}, x)


def gathered(function, specs):
    """A function of weights that are brought together first."""
    return lambda p, x: function(moved(p, specs), x)


MLP = {"up": {"kernel": (8, 16)}, "down": {"kernel": (16, 8)}}
MLP_SPECS = {"up": {"kernel": P("data", "model")}, "down": {"kernel": P("model", "data")}}
HEADS = {"query": {"kernel": (8, 2, 4)}, "out": {"kernel": (2, 4, 8)}}
HEADS_SPECS = {"query": {"kernel": P(None, "model", None)}, "out": {"kernel": P("model", None, None)}}
STACK = {"up": {"kernel": (3, 8, 8)}}
TENSOR_SPECS = {"up": {"kernel": P(None, "model")}, "down": {"kernel": P("model", None)}}
X, BY_DATA = (4, 2, 8), P("data", None, None)
SHARDED = {
    "data parallel": Sharded(mlp, MLP, {"up": {"kernel": P()}, "down": {"kernel": P()}}, X, BY_DATA),
    "fsdp": Sharded(gathered(mlp, P()), MLP, MLP_SPECS, X, BY_DATA),
    "tensor parallel": Sharded(mlp_spread, MLP, TENSOR_SPECS, X, BY_DATA),
    "fsdp and tensor parallel": Sharded(
        gathered(mlp_spread, TENSOR_SPECS), MLP, MLP_SPECS, X, BY_DATA,
    ),
    "heads": Sharded(heads, HEADS, HEADS_SPECS, X, BY_DATA, {"query.kernel": "ioo", "out.kernel": "iio"}),
    "weight on the left": Sharded(
        lambda p, x: p["up"]["kernel"].T @ x, {"up": {"kernel": (8, 16)}}, {"up": {"kernel": P(None, "model")}},
        (4, 8, 3), BY_DATA,
    ),
    "lookup": Sharded(
        lookup, {"embed": {"embedding": (8, 6)}}, {"embed": {"embedding": P("model", None)}}, X, BY_DATA,
        how=("lookup",),
    ),
    "scanned layers": Sharded(
        lambda p, x: scanned(p["up"]["kernel"], x), STACK, {"up": {"kernel": P()}}, X, BY_DATA, {"up.kernel": "bio"}
    ),
    "scanned layers, sharded": Sharded(
        lambda p, x: scanned(p["up"]["kernel"], x, lambda c, w: (jnp.tanh(c @ moved(w, P())), None)),
        STACK, {"up": {"kernel": P(None, "data", "model")}}, X, BY_DATA, {"up.kernel": "bio"},
    ),
    "experts": Sharded(
        experts, {"up": {"kernel": (2, 8, 6)}}, {"up": {"kernel": P("model", None, None)}}, X, BY_DATA,
        {"up.kernel": "bio"},
    ),
    "remat": Sharded(jax.checkpoint(mlp_spread), MLP, TENSOR_SPECS, X, BY_DATA),
    "a constraint on the weight": Sharded(constrained, MLP, TENSOR_SPECS, X, BY_DATA),
    "a merged weight": Sharded(
        lambda p, x: x @ jnp.sin(p["up"]["kernel"]), {"up": {"kernel": (8, 16)}}, {"up": {"kernel": P(None, "model")}},
        X, BY_DATA, how=("merged: sin (no rule)",), general=("merged: sin (no rule)",),
    ),
    "shard_map": Sharded(
        lambda p, x: jax.shard_map(
            lambda x, w: lax.psum(x @ w, "model"), in_specs=(P("data", None, "model"), P("model")), out_specs=P("data")
        )(x, p["up"]["kernel"]),
        {"up": {"kernel": (8, 16)}}, {"up": {"kernel": P("model", None)}}, X, P("data", None, "model"),
        general=("merged: shard_map (shard_map over an axis that a method does not follow)",),
    ),
    "shard_map over one axis": Sharded(
        lambda p, x: jax.shard_map(
            jnp.matmul, in_specs=(P("data"), P()), out_specs=P("data"), axis_names={"data"}
        )(x, p["up"]["kernel"]),
        {"up": {"kernel": (8, 16)}}, {"up": {"kernel": P(None, "model")}}, X, BY_DATA,
        axes=(AxisType.Auto,),  # JAX cannot differentiate auto_axes there, in which the change is computed
    ),
}  # fmt: skip


def placed(mesh, tree, specs):
    return jax.tree.map(lambda leaf, spec: jax.device_put(leaf, NamedSharding(mesh, spec)), tree, specs)


def replicated(mesh, tree):
    return jax.tree.map(lambda leaf: jax.device_put(leaf, NamedSharding(mesh, P())), tree)


def off_mesh(tree):
    return jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)), tree)


def reference(row, mesh, wrapped, x):
    """Values and gradients with weights merged off the mesh, and the function run on it."""
    trainable, frozen = jpeft.partition(wrapped)
    merged, pull = jax.vjp(lambda trainable: jpeft.merge(jpeft.combine(trainable, frozen)), trainable)

    def scalar(params, x):
        y = row.function(params, x)
        return jnp.sin(y).sum(), y

    with jax.set_mesh(mesh):
        own = placed(mesh, merged, row.specs), placed(mesh, x, row.x_spec)
        (_, y), (by_params, by_x) = jax.jit(jax.value_and_grad(scalar, (0, 1), has_aux=True))(*own)
    return off_mesh((y, pull(off_mesh(by_params))[0], [by_x]))


@pytest.mark.parametrize("method", [row for row in METHODS if row.thorough], ids=lambda row: row.name)
@pytest.mark.parametrize(
    ("row", "axes"),
    [pytest.param(row, axes, id=f"{name}-{axes.name}") for name, row in SHARDED.items() for axes in row.axes],
)
def test_lifted_equals_merged_on_a_mesh(row, axes, method):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(axes, axes))
    wrapped = adapted(Problem(row.function, random_like(row.params, 7), (), row.layouts), method)
    x = random_like(row.x, 50, 1.0)
    want = reference(row, mesh, wrapped, x)
    with jax.set_mesh(mesh):
        own = dataclasses.replace(replicated(mesh, wrapped), base=placed(mesh, wrapped.base, row.specs))
        given = placed(mesh, x, row.x_spec)
        got = jax.jit(lambda w, x: results(jpeft.lift(row.function), w, (x,)))(own, given)
        uses = jpeft.explain(row.function, own, given).uses
    assert_close(off_mesh(got), want)
    assert {use.how for use in uses} == set(row.how if method.factors else row.general)


@pytest.mark.parametrize("axes", [AxisType.Auto, AxisType.Explicit], ids=lambda axes: axes.name)
@pytest.mark.parametrize("entered", [True, False], ids=["mesh in use", "mesh of the arguments"])
def test_rows_that_are_spread_over_a_mesh_stay_where_they_are(axes, entered):
    # Rows made one axis could only be spread as batch-major ones: a sequence axis would have to be gathered before.
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(axes, axes))
    wrapped = adapted(Problem(mlp_whole, random_like({"up": {"kernel": (8, 16)}}, 7), (), {}), METHODS[0])
    on_mesh = replicated(mesh, wrapped)
    x = jax.device_put(random_like((2, 8, 8), 50, 1.0), NamedSharding(mesh, P(None, "data", None)))

    def step(wrapped, x):
        return jpeft.grad(lambda wrapped, x: jpeft.lift(mlp_whole)(wrapped, x).sum())(wrapped, x).adapters

    with jax.set_mesh(mesh) if entered else contextlib.nullcontext():
        text = jax.jit(step).lower(on_mesh, x).compile().as_text()
    assert "all-reduce" in text and "all-gather" not in text
