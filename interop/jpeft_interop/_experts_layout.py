"""Parameters that are adapted by themselves, as PEFT's files have them: their keys, and the shape of stacked experts.

PEFT wraps the module that holds the parameter, once for each parameter, one wrapper in the other; and it has all
experts in one matrix: `lora_A (experts * rank, in)`, `lora_B (out, rank * experts)`. Here they are (experts, rank, in)
and (experts, out, rank).
"""

import dataclasses
import warnings
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jpeft
from jpeft._contract import Site
from jpeft._parameters import is_parameter
from jpeft._paths import last_name, parent
from jpeft._patterns import matches

from ._family import Family
from ._listed import listed

# The order in which `transformers` registers the parameters of a module of experts.
PARAMETERS = ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")


def nesting(sites: Mapping[str, Site], family: Family) -> dict[str, str]:
    """{path: the module's name in a file} of the parameters among the sites: the first to be wrapped is the innermost.

    Raises ValueError for a parameter of the whole model, and for several of one module whose order is not known.

    >>> from ._family import FAMILIES
    >>> sites = {path: Site(path, path, None, "bio", (2, 4, 6), "f4") for path in ("mlp.down_proj", "mlp.gate_up_proj")}
    >>> nesting(sites, FAMILIES["hf"])
    {'mlp.gate_up_proj': 'mlp.base_layer', 'mlp.down_proj': 'mlp'}
    """
    modules: dict[str, list[str]] = {}
    for path, site in sites.items():
        if is_parameter(site):
            modules.setdefault(parent(site.leaf), []).append(path)
    found = {}
    for module, paths in modules.items():
        if not module:
            raise ValueError(
                f"{paths[0]!r} is a parameter of the model itself, which PEFT cannot adapt; expected one of a module"
            )
        unknown = [path for path in paths if last_name(path) not in PARAMETERS]
        if unknown and len(paths) > 1:
            raise ValueError(
                f"several parameters of {module!r} are adapted, and in which order PEFT does it is known for "
                f"{', '.join(PARAMETERS)} alone, not for {listed(unknown)}; expected one of them"
            )
        in_order = paths if unknown else sorted(paths, key=lambda path: PARAMETERS.index(last_name(path)))
        for depth, path in enumerate(reversed(in_order)):
            found[path] = ".".join([family.module(module), *["base_layer"] * depth])
    return dict(reversed(found.items()))


def is_module(site: Site) -> bool:
    """Whether a site is the weight of a module, which PEFT finds by target_modules."""
    return not is_parameter(site)


def with_named_parameters(config: jpeft.PeftConfig, sites: Mapping[str, Site]) -> jpeft.PeftConfig:
    """The config as PEFT needs it: parameters that target_modules means here are in target_parameters there.

    Warns (UserWarning) if their dropout is left out, which PEFT does not have for parameters.

    >>> sites = {"mlp.down_proj": Site("mlp.down_proj", "mlp.down_proj", None, "bio", (2, 4, 6), "f4")}
    >>> with_named_parameters(jpeft.LoraConfig(target_modules=["down_proj", "q_proj"]), sites).target_parameters
    ('down_proj',)
    """
    paths = [path for path, site in sites.items() if is_parameter(site)]
    if not isinstance(config, jpeft.LoraConfig) or not paths:
        return config
    targets, named = config.target_modules, tuple(config.target_parameters or ())
    rest = [path for path in paths if not matches(path, named)]
    if isinstance(targets, str):
        moved, kept = rest, targets
    else:
        others = [path for path, site in sites.items() if is_module(site)]
        moved = [name for name in targets or () if any(matches(path, [name]) for path in rest)]
        kept = tuple(n for n in targets or () if n not in moved or any(matches(path, [n]) for path in others))
    changed: dict[str, Any] = {"target_modules": kept, "target_parameters": (*named, *moved)}
    if rest and config.lora_dropout:
        warnings.warn(
            f"lora_dropout={config.lora_dropout} is written as 0.0: PEFT has none for parameters, such as {rest[0]!r}",
            stacklevel=5,
        )
        changed["lora_dropout"] = 0.0
    return dataclasses.replace(config, **changed)


def experts_to_file(array: Any, name: str) -> np.ndarray:
    """(experts, rank, in) as (experts * rank, in); (experts, out, rank) as (out, rank * experts).

    >>> experts_to_file(np.ones((2, 6, 3)), "lora_B").shape
    (6, 6)
    """
    whole = np.asarray(array)
    if name == "lora_A":
        return whole.reshape(-1, whole.shape[-1])
    return whole.transpose(1, 2, 0).reshape(whole.shape[1], -1)


def experts_from_file(tensor: Any, name: str, experts: int) -> jax.Array:
    """The inverse of `experts_to_file`.

    >>> experts_from_file(np.ones((6, 4)), "lora_A", 2).shape
    (2, 3, 4)
    """
    whole = np.asarray(tensor)
    if name == "lora_A":
        return jnp.array(whole.reshape(experts, -1, whole.shape[-1]))
    return jnp.array(whole.reshape(whole.shape[0], -1, experts).transpose(2, 0, 1))


def experts_shape(shape: tuple[int, ...], name: str) -> tuple[int, ...]:
    """The shape that `experts_to_file` gives.

    >>> experts_shape((2, 3, 4), "lora_A"), experts_shape((2, 6, 3), "lora_B")
    ((6, 4), (6, 6))
    """
    experts, rows, columns = shape
    return (experts * rows, columns) if name == "lora_A" else (rows, columns * experts)
