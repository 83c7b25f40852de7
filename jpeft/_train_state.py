"""What training carries from step to step: parameters, the optimizer's state, the number of the step, a key."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec

from ._params import PeftParams, Rng
from ._train import partition
from ._wrap import checked_key


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """A point of training; `jpeft.train_state` makes the first one, a step of `jpeft.make_train_step` the next.

    params: wrapped parameters. opt_state: of the optimizer, for what trains alone. step: int32, the steps made so far.
    rng: the key that every step's dropout comes from, or None for none; it stays as it is.
    """

    params: PeftParams
    opt_state: Any
    step: Any
    rng: Rng | None


def train_state(params: PeftParams, tx: optax.GradientTransformation, *, rng: jax.Array | None = None) -> TrainState:
    """The state at step 0, with `tx.init` of what trains: in the dtypes of the adapter, nothing for the base.

    params: from `jpeft.wrap`; a key in their context is `rng` if none is given. rng: the key for dropout, without which
    it is off; steps and micro-batches draw their own from it. Shapes without arrays (`jax.ShapeDtypeStruct`) give a
    state of shapes. Where parameters lie on a mesh, the state does: what the optimizer keeps of an array, of its shape
    and at its path, like that array, all else on every device.
    Adapters in bfloat16 (`wrap(dtype=...)`) have moments in bfloat16, where Adam's second one cannot fall with the
    usual b2 of 0.999, as a thousandth rounds away; with 0.99 it does.
    Raises TypeError if `params` do not come from `wrap` or `rng` is no key, and ValueError if nothing trains.

    >>> import jax, jax.numpy as jnp, jpeft, optax
    >>> params = {"query": {"kernel": jnp.ones((4, 6))}}
    >>> wrapped = jpeft.wrap(params, jpeft.LoraConfig(r=2, target_modules=["query"]), rng=jax.random.key(0))
    >>> state = jpeft.train_state(wrapped, optax.adamw(1e-4), rng=jax.random.key(1))
    >>> int(state.step), len(jax.tree.leaves(state.opt_state))
    (0, 5)
    """
    trainable, _ = partition(params)
    key = params.context.get("rng") if rng is None else Rng.of(checked_key(rng))
    bare = dataclasses.replace(params, context={name: own for name, own in params.context.items() if name != "rng"})

    begin = _beginning(tx)
    abstract = any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(params))
    mesh = _mesh(trainable)
    if mesh is None and not abstract:
        return _state(bare, begin(trainable), key)
    shapes = jax.eval_shape(begin, trainable)
    if mesh is None:
        return _state(bare, shapes, jax.tree.map(_shape, key))
    whole = NamedSharding(mesh, PartitionSpec())
    places = _placed(shapes, trainable, whole)
    if abstract:
        key = jax.tree.map(lambda leaf: _shape(leaf, whole), key)
        return _state(bare, jax.tree.map(_shape, shapes, places), key)
    key = None if key is None else dataclasses.replace(key, data=jax.device_put(np.asarray(key.data), whole))
    return _state(bare, jax.jit(begin, out_shardings=places)(trainable), key)


def _state(params: PeftParams, begun: tuple[Any, Any], rng: Rng | None) -> TrainState:
    opt_state, step = begun
    return TrainState(params, opt_state, step, rng)


def _beginning(tx: optax.GradientTransformation) -> Any:
    def begin(trainable: Any) -> tuple[Any, jax.Array]:
        return jax.tree.map(strong, tx.init(trainable)), jnp.zeros((), jnp.int32)

    return begin


def strong(value: Any) -> jax.Array:
    """An array of the same dtype for good: a weak one would be another type, and compile the step again."""
    return lax.convert_element_type(value, jnp.result_type(value))


def mesh_sharding(leaf: Any) -> NamedSharding | None:
    """How a leaf lies on a mesh, or None if it lies on one device or there is nothing to lie."""
    found = None if isinstance(leaf, Tracer) else getattr(leaf, "sharding", None)
    return found if isinstance(found, NamedSharding) else None


def _mesh(tree: Any) -> Any:
    found = (mesh_sharding(leaf) for leaf in jax.tree.leaves(tree))
    return next((sharding.mesh for sharding in found if sharding is not None), None)


def _placed(shapes: Any, trainable: PeftParams, whole: NamedSharding) -> Any:
    """A sharding for each leaf of an optimizer's state, whose trees hold those of the parameters."""
    known = {path: leaf for path, leaf in jax.tree_util.tree_leaves_with_path(trainable)}

    def one(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        like = next((known[path[at:]] for at in range(len(path)) if path[at:] in known), None)
        sharding = None if like is None or like.shape != leaf.shape else mesh_sharding(like)
        return whole if sharding is None else sharding

    return jax.tree_util.tree_map_with_path(one, shapes)


def _shape(leaf: Any, sharding: NamedSharding | None = None) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
