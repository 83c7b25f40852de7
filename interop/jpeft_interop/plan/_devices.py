"""The devices to plan for: those of a TPU topology that only its compiler knows, or those that are installed."""

import importlib.util
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

GIB = 2**30


@dataclass(frozen=True)
class Generation:
    """One kind of TPU. memory: GiB that the compiler lets a device use. axes: of its torus. cores: devices a chip."""

    memory: float
    axes: int
    cores: int = 1


# The memory is what libtpu's compiler says is available when it refuses a program.
TPUS: Mapping[str, Generation] = {
    "v2": Generation(7.48, 2, cores=2),
    "v3": Generation(15.48, 2, cores=2),
    "v4": Generation(15.25, 3, cores=2),
    "v5e": Generation(15.75, 2),
    "v5p": Generation(95.73, 3),
    "v6e": Generation(31.24, 2),
}
EXAMPLES = {"v5e": ("2x2", "2x4", "4x4", "16x16"), "v5p": ("2x2x1", "4x4x4"), "v6e": ("2x4", "16x16"), "v4": ("2x2x2",)}

# Read by libtpu when it is loaded: what it would otherwise ask the TPU's host for. The last lets several processes
# compile at once; without it the first one keeps the others out.
LIBTPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@dataclass(frozen=True)
class Target:
    """Where the step is to run. memory: bytes that one device has for it, None if nothing says so."""

    platform: str
    topology: str | None
    kind: str
    mesh: Mesh
    memory: int | None


def target(platform: str, topology: str | None, axes: Mapping[str, int] | None, memory: float | None = None) -> Target:
    """The mesh of these axes on a TPU topology, or on installed devices of another platform.

    topology: such as "v5e:4x4"; for TPU alone. axes: {name: size}, None for {"fsdp": all devices}. memory: GiB of one
    device, in the place of what is known. Raises ValueError for names and sizes that do not go together, ImportError
    without libtpu.
    """
    if platform not in ("tpu", "gpu", "cpu"):
        raise ValueError(f"platform is {platform!r}; expected 'tpu', 'gpu' or 'cpu'")
    if memory is not None and not memory > 0:
        raise ValueError(f"memory is {memory!r}; expected the GiB of one device, or None for what is known of it")
    if platform == "tpu":
        generation = _checked_topology(topology)
        devices = tpu_devices(str(topology))
        known = TPUS[generation].memory * GIB
    else:
        devices, known = _installed(platform), None
        stats = devices[0].memory_stats() if platform == "gpu" else None
        known = stats.get("bytes_limit") if stats else None
    given = known if memory is None else memory * GIB
    name = str(topology) if platform == "tpu" else None
    on = _mesh(devices, axes, name or f"this machine's {platform}", platform)
    return Target(platform, name, devices[0].device_kind, on, None if given is None else int(given))


def tpu_devices(topology: str) -> list[Any]:
    """The devices of a TPU topology, which can be compiled for and nothing else."""
    if importlib.util.find_spec("libtpu") is None:
        raise ImportError(
            'planning for TPU needs its compiler, which the package libtpu holds: pip install "jpeft[plan]", or pass '
            "platform='cpu' or 'gpu' to plan for the devices that are installed"
        )
    for name, value in LIBTPU.items():
        os.environ.setdefault(name, value)
    _checked_topology(topology)
    sizes = tuple(map(int, topology.partition(":")[2].split("x")))
    # A host has four chips; fewer make a host of their own.
    bounds = {} if math.prod(sizes) >= 4 else {"chips_per_host_bounds": (*sizes, 1, 1)[:3]}
    try:
        found = topologies.get_topology_desc(topology, platform="tpu", **bounds)
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(f"topology {topology!r} is not one of libtpu's: {error}; {_known()}") from error
    return list(found.devices)


def _checked_topology(topology: Any) -> str:
    """The generation in a topology's name."""
    matched = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", topology) if isinstance(topology, str) else None
    if not matched or matched.group(1) not in TPUS:
        raise ValueError(f"topology is {topology!r}; {_known()}")
    generation, sizes = matched.group(1), matched.group(2).split("x")
    axes = TPUS[generation].axes
    if len(sizes) != axes or "0" in sizes:
        raise ValueError(f"topology is {topology!r}, but a {generation} has {axes} axes; {_known()}")
    return generation


def _known() -> str:
    names = "; ".join(f"{name}:{', '.join(sizes)}" for name, sizes in EXAMPLES.items())
    return f"expected the TPU's name, a colon, and its chips along each axis, such as {names}"


def _installed(platform: str) -> list[Any]:
    try:
        return jax.devices(platform)
    except RuntimeError as error:
        raise ValueError(f"platform is {platform!r}, but JAX has no such devices here: {error}") from error


def _mesh(devices: list[Any], axes: Mapping[str, int] | None, where: str, platform: str) -> Mesh:
    axes = {"fsdp": len(devices)} if axes is None else dict(axes)
    wrong = {
        name: size for name, size in axes.items() if isinstance(size, bool) or not isinstance(size, int) or size < 1
    }
    if wrong or not axes:
        raise ValueError(
            f"mesh is {axes!r}; expected the size of each axis, at least 1, such as {{'fsdp': 8, 'tp': 2}}"
        )
    wanted = math.prod(axes.values())
    # A TPU slice is taken whole; of installed devices the first ones will do.
    if wanted != len(devices) and (platform == "tpu" or wanted > len(devices)):
        sizes = " x ".join(f"{name}={size}" for name, size in axes.items())
        raise ValueError(f"mesh {sizes} takes {wanted} devices, but {where} has {len(devices)}")
    if platform != "tpu":
        return Mesh(np.asarray(devices[:wanted]).reshape(tuple(axes.values())), tuple(axes))
    return _along_the_torus(devices, axes)


def _along_the_torus(devices: list[Any], axes: Mapping[str, int]) -> Mesh:
    from jax.experimental import mesh_utils

    try:
        arranged = mesh_utils.create_device_mesh(tuple(axes.values()), devices=devices)
    except (NotImplementedError, ValueError, AssertionError):
        # Axes that cannot be laid along those of the torus.
        arranged = np.asarray(devices).reshape(tuple(axes.values()))
    return Mesh(arranged, tuple(axes))
