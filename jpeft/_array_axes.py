"""Which axes of a method's arrays are the inputs and which the outputs of the modules that they belong to.

A method does not say so; it is seen from the shapes. What it makes for modules of twice the inputs, and for modules of
twice the outputs, shows which axes grow with which: an axis is one of inputs if it has as many entries as the module
has inputs, twice as many with twice the inputs, and as many as before with twice the outputs. That tells the two apart
where they are of one size, and leaves out axes that have that size by chance, blocks, and what depends on both.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ._arrays import shared_names, single_sites
from ._contract import INPUT, OUTPUT, VOCABULARY, Site, is_quantised, method_of
from ._mixed import MixedConfig
from ._params import Adapter, Sites
from ._sites import bias_sizes
from ._wrap import abstract_adapter

OTHER = "."
"""An axis that is neither inputs nor outputs."""

_INPUTS, _OUTPUTS = INPUT + VOCABULARY, OUTPUT


def axes_of_weights(adapter: Adapter) -> dict[str, dict[str, str]]:
    """{module path: {array name: letters}} for the last axes of each array, those of one module: 'i', 'o' or '.'.

    >>> import jax.numpy as jnp, jpeft
    >>> wrapped = jpeft.wrap({"query": {"kernel": jnp.ones((4, 4))}}, jpeft.LoraConfig(r=2, target_modules=["query"]))
    >>> axes_of_weights(wrapped.adapters["default"])
    {'query': {'lora_A': '.i', 'lora_B': 'o.'}}
    """
    if _stands_beside(adapter):
        return {
            path: {name: OTHER * array.ndim for name, array in own.items()} for path, own in adapter.weights.items()
        }
    if told := method_of(_config(adapter)).axes:
        return {path: {name: told[name] for name in arrays} for path, arrays in adapter.weights.items()}
    wide, tall = (_grown(adapter, letters).weights for letters in (_INPUTS, _OUTPUTS))
    found: dict[str, dict[str, str]] = {}
    for path, arrays in adapter.weights.items():
        site = adapter.sites[path]
        stacked = len(site.stack)
        before = stacked if _together(adapter) else 0
        pairs = {
            name: (_of_module(wide[path].get(name), before), _of_module(tall[path].get(name), before))
            for name in arrays
        }
        found[path] = {name: _letters(array.shape[stacked:], *pairs[name], [site]) for name, array in arrays.items()}
    return found


def axes_of_shared(adapter: Adapter) -> dict[str, str]:
    """{name of a shared array: letters}, by the modules that use it; an axis has to be the inputs of all of them."""
    if not adapter.shared:
        return {}
    if _stands_beside(adapter):
        return {name: OTHER * array.ndim for name, array in adapter.shared.items()}
    wide, tall = (_grown(adapter, letters).shared for letters in (_INPUTS, _OUTPUTS))
    users = users_of_shared(adapter)
    return {
        name: _letters(array.shape, _of_module(wide.get(name), 0), _of_module(tall.get(name), 0), users[name])
        for name, array in adapter.shared.items()
    }


def users_of_shared(adapter: Adapter) -> dict[str, list[Site]]:
    """The modules that use each shared array."""
    users: dict[str, list[Site]] = {name: [] for name in adapter.shared}
    for path, names in shared_names(adapter).items():
        for name in {name for places in names.values() for name in places}:
            users[name].append(adapter.sites[path])
    return users


def _grown(adapter: Adapter, letters: str) -> Adapter:
    """The shapes of the adapter for modules of which the axes of these letters are together twice as large.

    One module stands for all that a site stacks, unless the method begins with all modules at once.
    """
    one_by_one = not _together(adapter)
    singles = {path: single_sites(site)[0] if one_by_one else site for path, site in adapter.sites.items()}
    sites = Sites({path: _doubled(site, letters) for path, site in singles.items()})
    config = _config(adapter)
    reads_bias = method_of(config).reads_bias
    leaves = {path: (_weight(site), _bias(site)) if reads_bias else _weight(site) for path, site in sites.items()}
    return abstract_adapter(jax.random.key(0), leaves, sites, config, jnp.float32)


def _config(adapter: Adapter) -> Any:
    return adapter.config.row if isinstance(adapter.config, MixedConfig) else adapter.config


def _stands_beside(adapter: Adapter) -> bool:
    """Whether its arrays follow no module, so that every device has all of them: prompts, prefixes."""
    method = method_of(_config(adapter))
    return method.begin is not None and method.together is None


def _together(adapter: Adapter) -> bool:
    return method_of(_config(adapter)).together is not None


def _doubled(site: Site, letters: str) -> Site:
    place = next(place for place, letter in enumerate(site.layout) if letter in letters)
    shape = (*site.shape[:place], 2 * site.shape[place], *site.shape[place + 1 :])
    return dataclasses.replace(site, shape=shape)


def _weight(site: Site) -> jax.ShapeDtypeStruct:
    # The method may read the weight, which it cannot where that is quantised; only shapes matter here.
    dtype = jnp.dtype(site.dtype)
    return jax.ShapeDtypeStruct(site.shape, jnp.float32 if is_quantised(dtype) else dtype)


def _bias(site: Site) -> jax.ShapeDtypeStruct | None:
    return None if site.bias is None else jax.ShapeDtypeStruct(bias_sizes(site), _weight(site).dtype)


def _of_module(array: Any, stacked: int) -> tuple[int, ...] | None:
    return None if array is None else tuple(array.shape[stacked:])


def _letters(
    sizes: Sequence[int], wide: Sequence[int] | None, tall: Sequence[int] | None, users: Sequence[Site]
) -> str:
    """sizes: of an array's axes. wide, tall: of its last ones with twice the inputs, with twice the outputs."""
    if wide is None or tall is None or len(wide) != len(tall) or len(wide) > len(sizes):
        return OTHER * len(sizes)
    own = sizes[len(sizes) - len(wide) :]
    return "".join(_letter(*axis, users) for axis in zip(own, wide, tall, strict=True))


def _letter(size: int, with_inputs: int, with_outputs: int, users: Sequence[Site]) -> str:
    if (with_inputs, with_outputs) == (2 * size, size) and all(site.in_features == size for site in users):
        return INPUT
    if (with_inputs, with_outputs) == (size, 2 * size) and all(site.out_features == size for site in users):
        return OUTPUT
    return OTHER
