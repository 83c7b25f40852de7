"""Keys and values that an adapter puts before those of a text: taken out for a model, put in from a cache, composed."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ._config import PeftType, PromptLearningConfig
from ._contract import method_of
from ._folded import folded, is_folded, unfolded
from ._params import Adapter, PeftParams
from ._wrap import check_name, checked_params

ROWS = "prompt_embeddings"
"""The array of files, and of an adapter that is made of no others."""

KeysAndValues = tuple[jax.Array, jax.Array]


def key_value_prefix(wrapped: PeftParams, adapter_name: str | None = None) -> KeysAndValues:
    """The keys and the values that come before a text's own, each (layers, n, kv_heads, head_dim).

    adapter_name: of an adapter of prefix tuning or a cartridge; None: the active one. They have the adapter's dtype,
    float32 unless it was made otherwise. Pure and differentiable: taken within a loss, gradients reach the adapter.
    The models of `jpeft_interop` take it by themselves. Any other model takes it by two lines in the attention of each
    layer, which put it before the keys and values that the layer computes, or into the cache that the model begins
    with; every query may see it, and the positions of the text begin at n:

        keys, values = prefix_keys[layer], prefix_values[layer]
        k, v = (jnp.concatenate([own, new]) for own, new in ((keys, k), (values, v)))

    Raises ValueError for an adapter without a prefix, and if there is none or several are active.

    >>> import jpeft
    >>> def attention(params, x, prefix):                       # x (length, features), one layer, one head
    ...     q, k, v = (x @ params[name]["kernel"] for name in ("query", "key", "value"))
    ...     k, v = (jnp.concatenate([own[0, :, 0], new]) for own, new in zip(prefix, (k, v)))
    ...     seen = jnp.tril(jnp.ones((len(x), len(k)), bool), len(k) - len(x))
    ...     return jax.nn.softmax(jnp.where(seen, q @ k.T, -1e9)) @ v
    >>> params = {name: {"kernel": jnp.eye(4)} for name in ("query", "key", "value")}
    >>> config = jpeft.PrefixTuningConfig(num_virtual_tokens=3, token_dim=4, num_attention_heads=1, num_layers=1)
    >>> wrapped = jpeft.wrap(params, config)
    >>> loss = lambda wrapped, x: jpeft.lift(attention)(wrapped, x, jpeft.key_value_prefix(wrapped)).sum()
    >>> gradient = jpeft.grad(loss)(wrapped, jnp.ones((5, 4)))
    >>> gradient.adapters["default"].shared["prompt_embeddings"].shape
    (3, 8)
    """
    name = _named(wrapped, adapter_name)
    adapter = wrapped.adapters[name]
    rows = _prefix_of(adapter, name)(adapter.shared, adapter.config)
    keys, values = (jnp.moveaxis(rows[:, :, part], 0, 1) for part in (0, 1))
    return keys, values


def initialize_kv_prefix_from_past_key_values(
    wrapped: PeftParams, past_key_values: Any, adapter_name: str | None = None
) -> PeftParams:
    """The same parameters, with an adapter's prefix begun as a cache of keys and values that a model has computed.

    past_key_values: keys and values, each (layers, length, kv_heads, head_dim), as a pair or as one array (layers, 2,
    length, kv_heads, head_dim); of the tokens the first num_virtual_tokens are taken. `jpeft_interop.key_value_cache`
    makes them of a text. adapter_name: as for `key_value_prefix`. As PEFT's function of that name.
    Raises ValueError for a cache that is too short, or of other layers or heads, for an adapter whose prefix an encoder
    makes (prefix_projection), and of an encoder-decoder, in which layers share.

    >>> import jpeft
    >>> sizes = dict(num_virtual_tokens=3, token_dim=4, num_attention_heads=2, num_layers=5)
    >>> wrapped = jpeft.wrap({"query": {"kernel": jnp.eye(4)}}, jpeft.CartridgeConfig(**sizes))
    >>> cache = jnp.arange(320.0).reshape(5, 2, 8, 2, 2)
    >>> keys, values = key_value_prefix(initialize_kv_prefix_from_past_key_values(wrapped, cache))
    >>> bool((keys == cache[:, 0, :3]).all() & (values == cache[:, 1, :3]).all())
    True
    """
    name = _named(wrapped, adapter_name)
    adapter = wrapped.adapters[name]
    config = adapter.config
    _prefix_of(adapter, name)
    assert isinstance(config, PromptLearningConfig)
    if getattr(config, "prefix_projection", False):
        raise ValueError(
            f"adapter {name!r} has prefix_projection=True: an encoder makes its keys and values, and none is known "
            "that makes those of a cache; expected prefix_projection=False, or a cartridge"
        )
    if config.submodules != 1:
        raise ValueError(
            f"adapter {name!r} has num_transformer_submodules={config.submodules}, with which layers of the decoder "
            "share keys and values, so that it cannot hold those of every layer; expected 1"
        )
    keys, values = _checked_cache(past_key_values, name, config)
    rows = jnp.stack([keys, values], axis=1)[:, :, : config.num_virtual_tokens]
    rows = jnp.moveaxis(rows, 2, 0).reshape(rows.shape[2], -1)
    dtype = jax.tree.leaves(adapter.shared)[0].dtype
    return _with(wrapped, name, _holding(adapter, rows.astype(dtype)))


def compose_cartridges(wrapped: PeftParams, names: Sequence[str], adapter_name: str) -> PeftParams:
    """The same parameters with one more cartridge: those named, one after another, which waits for `set_adapter`.

    Frozen are as many of its first tokens as of the first cartridge, whose modules_to_save it has, too.
    `jpeft_interop.compose_cartridge_adapters` does it with folders, as PEFT's function of that name.
    Raises ValueError for less than two names, for adapters that are no cartridges, and for cartridges of other models.

    >>> import jpeft
    >>> sizes = dict(token_dim=4, num_attention_heads=2, num_layers=5)
    >>> wrapped = {"query": {"kernel": jnp.eye(4)}}
    >>> for name, n in (("law", 3), ("price", 4)):
    ...     wrapped = jpeft.wrap(wrapped, jpeft.CartridgeConfig(num_virtual_tokens=n, **sizes), adapter_name=name)
    >>> wrapped = compose_cartridges(wrapped, ["law", "price"], "both")
    >>> wrapped.adapters["both"].config.num_virtual_tokens, key_value_prefix(wrapped, "both")[0].shape
    (7, (5, 7, 2, 2))
    """
    checked_params(wrapped)
    check_name(adapter_name, wrapped.adapters)
    if isinstance(names, str) or len(names) < 2:
        raise ValueError(f"names are {names!r}; expected two cartridges or more")
    adapters = [wrapped.adapters[_named(wrapped, name)] for name in names]
    config = composed_config({name: adapter.config for name, adapter in zip(names, adapters, strict=True)})
    rows = jnp.concatenate([folded(adapter).shared[ROWS] for adapter in adapters])
    return _with(wrapped, adapter_name, _holding(dataclasses.replace(adapters[0], config=config), rows))


def composed_config(configs: dict[str, Any]) -> Any:
    """The config of cartridges, by name, that follow one another: the first's, for all their tokens."""
    first_name, first = next(iter(configs.items()))
    for name, config in configs.items():
        if config.peft_type != PeftType.CARTRIDGE:
            raise ValueError(f"{name!r} has a {type(config).__name__}; expected a CartridgeConfig")
        for field in ("task_type", "token_dim", "num_layers", "num_attention_heads", "num_transformer_submodules"):
            own, others = getattr(config, field), getattr(first, field)
            if own != others:
                raise ValueError(
                    f"{field} is {own} in {name!r} and {others} in {first_name!r}; expected cartridges of one model"
                )
    count = sum(config.num_virtual_tokens for config in configs.values())
    return dataclasses.replace(first, num_virtual_tokens=count)


def prefixed_names(wrapped: PeftParams) -> list[str]:
    """The active adapters that have a prefix."""
    return [name for name in wrapped.active if method_of(wrapped.adapters[name].config).prefix is not None]


def _named(wrapped: PeftParams, name: str | None) -> str:
    known = checked_params(wrapped).adapters
    if name is None:
        active = prefixed_names(wrapped)
        if len(active) != 1:
            raise ValueError(
                f"{len(active)} of the active adapters have a prefix{': ' if active else ''}{', '.join(active)}; "
                "expected one, or adapter_name"
            )
        return active[0]
    if name not in known:
        raise ValueError(f"there is no adapter {name!r}; expected one of: {', '.join(known)}")
    return name


def _prefix_of(adapter: Adapter, name: str) -> Callable[..., jax.Array]:
    prefix = method_of(adapter.config).prefix
    if prefix is None:
        raise ValueError(
            f"adapter {name!r} has a {type(adapter.config).__name__}, which has no prefix of keys and values; expected "
            "prefix tuning or a cartridge"
        )
    return prefix


def _holding(adapter: Adapter, rows: jax.Array) -> Adapter:
    """The adapter with these rows, in the arrays that it has."""
    whole = dataclasses.replace(adapter, shared={ROWS: rows})
    arrays = None if is_folded(adapter) else unfolded(whole)
    return whole if arrays is None else dataclasses.replace(adapter, shared=dict(arrays))


def _with(wrapped: PeftParams, name: str, adapter: Adapter) -> PeftParams:
    return dataclasses.replace(wrapped, adapters={**wrapped.adapters, name: adapter})


def _checked_cache(given: Any, name: str, config: PromptLearningConfig) -> KeysAndValues:
    if not isinstance(given, (tuple, list)):
        whole = jnp.asarray(given)
        if whole.ndim != 5 or whole.shape[1] != 2:
            raise ValueError(
                f"past_key_values are of shape {whole.shape}; expected (layers, 2, length, kv_heads, head_dim), or a "
                "pair of arrays (layers, length, kv_heads, head_dim)"
            )
        given = (whole[:, 0], whole[:, 1])
    keys, values = (jnp.asarray(array) for array in given)
    width, heads, count = config.token_dim, config.num_attention_heads, config.num_virtual_tokens
    assert width is not None and heads is not None and count is not None
    wanted = (config.num_layers, heads, width // heads)
    for part, array in (("keys", keys), ("values", values)):
        if array.ndim != 4 or (array.shape[0], *array.shape[2:]) != wanted or array.shape[1] < count:
            raise ValueError(
                f"the {part} of the cache are of shape {array.shape}, but adapter {name!r} has num_layers={wanted[0]}, "
                f"num_attention_heads={heads}, token_dim={width} and num_virtual_tokens={count}; expected "
                f"({wanted[0]}, at least {count}, {heads}, {wanted[2]})"
            )
    return keys, values
