"""Several processes: each holds a part of the arrays, and one of them writes the files. A single one pays nothing."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

import jpeft
from jpeft import PeftParams
from jpeft._paths import leaves_by_path
from jpeft._stacks import Layer

_SAID = 4096
"""Bytes of an error's text that the processes tell one another."""


def whole(leaf: Any) -> Any:
    """An array of which this process holds a part, as one that it holds itself; any other leaf as it is.

    All processes have to ask for the same leaves in the same order.
    """
    if isinstance(leaf, Layer):
        return dataclasses.replace(leaf, leaf=whole(leaf.leaf))
    if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable:
        return leaf
    if leaf.is_fully_replicated:
        return jnp.asarray(leaf.addressable_data(0))
    from jax.experimental import multihost_utils

    return jnp.asarray(multihost_utils.process_allgather(leaf, tiled=True))


def with_whole_adapters(wrapped: PeftParams, names: Iterable[str]) -> PeftParams:
    """The parameters with the arrays of these adapters in this process; the base stays where it is."""
    own = {name: jax.tree.map(whole, wrapped.adapters[name]) for name in names}
    return dataclasses.replace(wrapped, adapters={**wrapped.adapters, **own})


def by_one_process(write: Callable[[], None]) -> None:
    """Let process 0 write while the others wait; an error of it is raised in all of them."""
    if jax.process_count() == 1:
        write()
        return
    from jax.experimental import multihost_utils

    error = None
    if jax.process_index() == 0:
        try:
            write()
        except Exception as raised:
            error = raised
    said = np.zeros(_SAID, np.uint8)
    if error is not None:
        text = f"{isinstance(error, ValueError):d}{type(error).__name__}: {error}".encode()[:_SAID]
        said[: len(text)] = np.frombuffer(text, np.uint8)
    heard = bytes(np.asarray(multihost_utils.broadcast_one_to_all(said))).rstrip(b"\0").decode(errors="replace")
    if error is not None:
        raise error
    if heard:
        kind = ValueError if heard[0] == "1" else OSError
        raise kind(f"process 0, which writes for all, failed: {heard[1:]}")


def placed(wrapped: PeftParams, name: str) -> PeftParams:
    """The parameters with an adapter that was read from a file put on the mesh of the base, if that is on one."""
    mesh = _mesh(wrapped.base)
    adapter = wrapped.adapters[name]
    if mesh is None or any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(adapter)):
        return wrapped
    adapter = jax.tree.map(_put, adapter, jpeft.shardings(wrapped, mesh).adapters[name])
    return dataclasses.replace(wrapped, adapters={**wrapped.adapters, name: adapter})


def _mesh(base: Any) -> Mesh | None:
    found = (getattr(leaf, "sharding", None) for leaf in leaves_by_path(base).values())
    on_meshes = (sharding.mesh for sharding in found if isinstance(sharding, NamedSharding))
    return next((mesh for mesh in on_meshes if isinstance(mesh, Mesh) and mesh.size > 1), None)


def _put(array: Any, sharding: NamedSharding) -> jax.Array:
    if sharding.is_fully_addressable:
        return jax.device_put(array, sharding)
    # Every process has read the same file: there is nothing to compare or to send.
    values = np.asarray(whole(array))
    return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])
