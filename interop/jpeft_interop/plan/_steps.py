"""The steps that a plan compares: an adapter's, full fine-tuning's, and one in which nothing is adapted."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

import jpeft
from jpeft._paths import leaves_by_path

from ._workload import Workload

Lower = Callable[[int], Any]
"""rows of the batch -> the lowered step, as `jax.stages.Lowered`."""


@dataclasses.dataclass(frozen=True)
class Step:
    """A step to compile: trees of shapes with shardings, how many numbers train, and its lowering."""

    parameters: Any
    adapter: Any
    optimizer: Any
    trainable: int
    lower: Lower


def adapter_step(
    work: Workload, config: jpeft.PeftConfig, tx: optax.GradientTransformation, accumulate: int, quantize: str | None
) -> Step:
    """The step of an adapter, as `jpeft.make_train_step` makes it."""
    placed = jax.tree.map(lambda leaf: leaf.sharding, work.model.params)
    gather = tuple(name for name in ("fsdp",) if name in work.mesh.axis_names)
    params = jpeft.quantize(work.model.params, quantize, gather=gather) if quantize else work.model.params
    # Without values: nothing of the model's size may be made.
    wrapped = jpeft.wrap(params, config, layouts=work.model.blueprint.family.layouts)
    wrapped = on_mesh(wrapped, jpeft.shardings(wrapped, work.mesh, base=placed))
    state = jpeft.train_state(wrapped, tx, rng=jax.random.key(0))
    step = jpeft.make_train_step(work.model.apply, work.loss, tx, accumulate=accumulate)
    trainable, _ = jpeft.count_parameters(wrapped)
    return Step(
        wrapped.base, wrapped.adapters, state.opt_state, trainable, lambda rows: step.lower(state, work.batch(rows))
    )


def floor_step(work: Workload, tx: optax.GradientTransformation, accumulate: int, quantize: str | None) -> Step:
    """The step with nothing adapted but what a token is looked up as, by a vector.

    Its gradient has to go through every layer's activations, and reaches no weight of a product; at rank 1 the vector's
    own work is nothing beside that.
    """
    tables = [path.rpartition(".")[0] for path in leaves_by_path(work.model.params) if is_table_of_tokens(path)]
    return adapter_step(work, jpeft.LoraConfig(r=1, target_modules=tables), tx, accumulate, quantize)


def is_table_of_tokens(path: str) -> bool:
    """Whether a leaf is a lookup table whose rows are added to activations, and not a bias of attention."""
    return path.endswith(".embedding") and "relative_attention_bias" not in path


def full_step(work: Workload, tx: optax.GradientTransformation, accumulate: int) -> Step:
    """The step that trains every parameter; parameters and the optimizer's state are written in place."""
    params = work.model.params
    state = jax.tree.map(_shaped, jax.eval_shape(tx.init, params))
    whole = NamedSharding(work.mesh, PartitionSpec())
    state = optax.tree.map_params(
        tx,
        lambda leaf, like: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=like.sharding),
        state,
        params,
        transform_non_params=lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole),
    )

    def mean_gradient(params: Any, batch: Any) -> tuple[jax.Array, Any]:
        of_one = jax.value_and_grad(lambda params, one: work.loss(work.model.apply, params, one))
        if accumulate == 1:
            return of_one(params, batch)

        def add(total: Any, one: Any) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, of_one(params, one)), None

        # Row i is in micro-batch i mod accumulate, so that each device keeps its rows.
        parts = jax.tree.map(lambda x: jnp.swapaxes(x.reshape(-1, accumulate, *x.shape[1:]), 0, 1), batch)
        zeros = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
        total, _ = jax.lax.scan(add, zeros, parts)
        return jax.tree.map(lambda leaf: leaf / accumulate, total)

    def step(params: Any, state: Any, batch: Any) -> tuple[Any, Any, jax.Array]:
        loss, gradient = mean_gradient(params, batch)
        with jax.numpy_dtype_promotion("standard"):
            updates, state = tx.update(gradient, state, params)
            return optax.apply_updates(params, updates), state, loss

    compiled = jax.jit(step, donate_argnums=(0, 1))
    trainable = sum(leaf.size for leaf in jax.tree.leaves(params))
    return Step(params, {}, state, trainable, lambda rows: compiled.lower(params, state, work.batch(rows)))


def _shaped(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)


def on_mesh(tree: Any, shardings: Any) -> Any:
    """Shapes with their shardings."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree, shardings
    )
