"""Mixed batches: another adapter, or none, for each row of a batch, in one compiled program.

The adapters are stacked once. A lifted function is mapped over the rows of its inputs (`_lift/_rows.py`): each row
picks its own factors, and the base weights, which all rows share, keep their one product for the whole batch.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from ._config import FrozenMapping, PeftConfig, TunerConfig
from ._contract import Method, RowInput, Site, is_plain, method_of, register
from ._params import Adapter, PeftParams, Rng, Sites
from ._paths import leaves_by_path
from ._quantized import as_dense
from ._ranks import check_zeros_are_nothing, cut, largest, padded
from ._wrap import checked_names, checked_params

BASE, MIXED = "__base__", "mixed"


@dataclasses.dataclass(frozen=True)
class Part:
    """One adapter of a mixture, as it was: arrays is {module path: {name: (shape, dtype)}}."""

    name: str
    config: PeftConfig
    sites: Sites
    arrays: FrozenMapping
    replaced: tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixedConfig(PeftConfig):
    """The config of what `mixed_batch` stacks. row: the config that a row's adapter computes by, whichever it is."""

    parts: tuple[Part, ...] = ()
    row: Any = None

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(part.name for part in self.parts)


def _refused(*args: Any) -> Any:
    raise ValueError(
        "these parameters hold a mixture of adapters, one a row; expected jpeft.unmixed(...) of them, which has the "
        "adapters one by one, to merge or save"
    )


register(Method(config=MixedConfig, init=_refused, merge=_refused, forward=_refused))


def mixed_batch(wrapped: PeftParams, names: Sequence[str] | None = None) -> PeftParams:
    """Parameters whose lifted functions give each row of the batch an adapter of its own, or none.

    names: the adapters to choose from (default: all). They may differ in rank, scaling, modules and `modules_to_save`;
    their arrays are stacked here, once: (adapters, *stack, ...), with zeros up to the largest rank. Say which row gets
    which with `with_context(mixed, adapter_indices=...)`: another choice compiles nothing. Gradients reach the
    adapters of the rows; `unmixed` takes the stack apart again.
    A lifted function then is mapped over the rows of its arguments: arrays whose first axis is as long as the batch
    (the second axis under a name like "0:12", which stacks layers) are cut into rows, everything else is shared, and a
    function sees batches of one. It must not mix rows: a result that does, such as a mean loss, is refused.
    Raises ValueError for unknown names, for adapters that are no product of thin factors (DoRA: PEFT refuses it too),
    for full copies of another shape than the base's, and where some adapters train and others do not.

    >>> import jax, jax.numpy as jnp, jpeft
    >>> params = {"query": {"kernel": jnp.ones((4, 6))}}
    >>> wrapped = jpeft.wrap(params, jpeft.LoraConfig(r=2, target_modules=["query"]), adapter_name="a")
    >>> wrapped = jpeft.wrap(wrapped, jpeft.LoraConfig(r=3, target_modules=["query"]), adapter_name="b")
    >>> mixed = jpeft.mixed_batch(wrapped)
    >>> mixed.adapters["mixed"].weights["query"]["lora_A"].shape
    (2, 3, 4)
    >>> mixed = jpeft.with_context(mixed, adapter_indices=jnp.array([0, 1, -1]))  # -1: no adapter
    >>> jpeft.lift(lambda params, x: x @ params["query"]["kernel"])(mixed, jnp.ones((3, 4))).shape
    (3, 6)
    """
    names = tuple(checked_params(wrapped).adapters) if names is None else tuple(names)
    if MIXED in wrapped.adapters:
        raise ValueError("the parameters hold a mixture already; expected jpeft.unmixed(...) of them")
    if BASE in names:
        raise ValueError(f"names are {list(names)}; expected adapters alone, as every mixture has {BASE!r}: index -1")
    # One after the other, as adapters that replace the same leaf exclude each other within a row only.
    names = tuple(name for each in names for name in checked_names(wrapped, each))
    if not names or len(set(names)) < len(names):
        raise ValueError(f"names are {list(names)}; expected at least one adapter, and each of them once")
    adapters = {name: wrapped.adapters[name] for name in names}
    leaves = leaves_by_path(wrapped.base)
    for name, adapter in adapters.items():
        _check(name, adapter, leaves, adapters)
    sites = _all_sites(adapters)
    parts = tuple(_part(name, adapter) for name, adapter in adapters.items())
    copies = dict.fromkeys(path for adapter in adapters.values() for path in adapter.replaced)
    inference = next(iter(adapters.values())).config.inference_mode
    mixture = Adapter(
        weights={path: _stacked_arrays(path, list(adapters.values())) for path in sites},
        shared={},
        replaced={path: _stacked([_copy_of(a, path, leaves) for a in adapters.values()]) for path in copies},
        scaling={
            path: _stacked([a.scaling.get(path, _zeros(site.stack, jnp.float32, leaves)) for a in adapters.values()])
            for path, site in sites.items()
        },
        config=MixedConfig(parts=parts, row=_row_config(adapters), inference_mode=inference),
        sites=Sites(sites),
    )
    return PeftParams(base=wrapped.base, adapters={MIXED: mixture}, active=(MIXED,))


def _copy_of(adapter: Adapter, path: str, leaves: dict[str, Any]) -> Any:
    return adapter.replaced[path] if path in adapter.replaced else as_dense(leaves[path])


def unmixed(mixed: PeftParams) -> PeftParams:
    """The adapters of a mixture one by one, with their own ranks and configs and their present values.

    The first is active. Raises ValueError if the parameters do not come from `mixed_batch`.

    >>> import jax.numpy as jnp, jpeft
    >>> params = {"query": {"kernel": jnp.ones((4, 6))}}
    >>> wrapped = jpeft.wrap(params, jpeft.LoraConfig(r=2, target_modules=["query"]))
    >>> jpeft.unmixed(jpeft.mixed_batch(wrapped)).adapters["default"].weights["query"]["lora_A"].shape
    (2, 4)
    """
    mixture = _mixture(mixed)
    if mixture is None:
        raise ValueError(
            f"the parameters hold the adapters {list(checked_params(mixed).adapters)} and no mixture; expected those "
            "of jpeft.mixed_batch"
        )
    found = {part.name: _taken_apart(mixture, index, part) for index, part in enumerate(_config(mixture).parts)}
    return PeftParams(base=mixed.base, adapters=found, active=(next(iter(found)),))


def indices_of(mixed: PeftParams, rows: Any) -> jax.Array:
    """Rows as integers (rows,), from integers or names; what `with_context` keeps."""
    mixture = _mixture(mixed)
    if mixture is None:
        raise ValueError("adapter_indices are given, but the parameters hold no mixture; call jpeft.mixed_batch first")
    names = _config(mixture).names
    if isinstance(rows, Sequence) and rows and all(isinstance(row, str) for row in rows):
        unknown = [name for name in rows if name not in (*names, BASE)]
        if unknown:
            raise ValueError(f"adapter_indices name {unknown}; expected each among: {', '.join((*names, BASE))}")
        return jnp.asarray([-1 if name == BASE else names.index(name) for name in rows], jnp.int32)
    indices = jnp.asarray(rows)
    if indices.ndim != 1 or not indices.size or not jnp.issubdtype(indices.dtype, jnp.integer):
        raise ValueError(
            f"adapter_indices are {indices.dtype} of shape {indices.shape}; expected integers of shape (rows,), or a "
            "list of names, one a row"
        )
    if not isinstance(indices, Tracer):
        wrong = sorted({int(index) for index in np.asarray(indices) if not -1 <= index < len(names)})
        if wrong:
            raise ValueError(
                f"adapter_indices hold {wrong}; expected -1 (no adapter) to {len(names) - 1}, of: {', '.join(names)}"
            )
    return indices.astype(jnp.int32)


def row_inputs_of(wrapped: PeftParams) -> dict[str, RowInput]:
    """What the adapters ask for, besides x, for each row of a batch: {name: how it is read}."""
    configs = [adapter.config for adapter in checked_params(wrapped).adapters.values()]
    found: dict[str, RowInput] = {}
    for config in configs:
        found.update(method_of(config.row if isinstance(config, MixedConfig) else config).row_inputs)
    return found


def is_mixed(wrapped: PeftParams) -> bool:
    return _mixture(wrapped) is not None


def with_rows(wrapped: PeftParams, rows: int) -> PeftParams:
    """Parameters for a batch in which each row was repeated, as beam search does: so is what the context has of rows.

    Raises ValueError if `rows` is no multiple of the rows that the context has.

    >>> import jax.numpy as jnp, jpeft
    >>> wrapped = jpeft.wrap({"q": {"kernel": jnp.ones((4, 6))}}, jpeft.LoraConfig(r=2, target_modules=["q"]))
    >>> mixed = jpeft.with_context(jpeft.mixed_batch(wrapped), adapter_indices=[0, -1])
    >>> with_rows(mixed, 4).context["adapter_indices"].tolist()
    [0, 0, -1, -1]
    """
    context = {
        name: value if name == "rng" else jax.tree.map(functools.partial(_repeated, name, rows), value)
        for name, value in wrapped.context.items()
    }
    return dataclasses.replace(wrapped, context=context)


def _repeated(name: str, rows: int, array: jax.Array) -> jax.Array:
    count = array.shape[0]
    if rows % count:
        raise ValueError(
            f"{name} are for {count} rows, the batch has {rows}; expected as many, or a multiple of them in which each "
            "row is repeated"
        )
    return array if rows == count else jnp.repeat(array, rows // count, axis=0)


def row_params(mixed: PeftParams, index: jax.Array, row: Any) -> PeftParams:
    """The parameters of one row, with a plain adapter. index: scalar, of the adapter; row: number of the row."""
    mixture = _mixture(mixed)
    assert mixture is not None
    parts = _config(mixture).parts

    def pick(array: jax.Array) -> jax.Array:
        # An index that is too large gives NaN, as it cannot be refused under jit.
        taken = jnp.take(array, index, axis=0, mode="fill")
        return jnp.where(index < 0, jnp.zeros_like(taken), taken)

    leaves = leaves_by_path(mixed.base) if mixture.replaced else {}

    def pick_copy(path: str, copies: jax.Array) -> jax.Array:
        has = jnp.asarray([*(path in part.replaced for part in parts), False])  # the last one, too, for index -1
        taken = jnp.take(copies, index, axis=0, mode="fill")
        return jnp.where(has[index], taken, jnp.asarray(as_dense(leaves[path])).astype(taken.dtype))

    adapter = dataclasses.replace(
        mixture,
        weights=jax.tree.map(pick, mixture.weights),
        replaced={path: pick_copy(path, copies) for path, copies in mixture.replaced.items()},
        scaling=jax.tree.map(pick, mixture.scaling),
        config=_config(mixture).row,
    )
    context: dict[str, Any] = {
        name: _entry_of_row(
            mixed.context[name], index, row, asked, [name in method_of(p.config).row_inputs for p in parts]
        )
        for name, asked in row_inputs_of(mixed).items()
        if name in mixed.context
    }
    if "rng" in mixed.context:
        _check_dropout(parts)
        context["rng"] = Rng.of(jax.random.fold_in(mixed.context["rng"].key(), row))
    return dataclasses.replace(mixed, adapters={MIXED: adapter}, context=context)


def _entry_of_row(given: Any, index: jax.Array, row: Any, asked: RowInput, who: Sequence[bool]) -> Any:
    """What one row has of a row input, as a batch of one. who: which adapters ask for it; the others are plain."""

    def entry(array: jax.Array) -> jax.Array:
        own = jax.lax.dynamic_index_in_dim(array, row, keepdims=True)
        return (
            own if all(who) else jnp.where(jnp.asarray([*who, True])[index], own, jnp.asarray(asked.plain, own.dtype))
        )

    return jax.tree.map(entry, given)


def _mixture(wrapped: PeftParams) -> Adapter | None:
    adapter = checked_params(wrapped).adapters.get(MIXED)
    return adapter if adapter is not None and isinstance(adapter.config, MixedConfig) else None


def _config(mixture: Adapter) -> MixedConfig:
    assert isinstance(mixture.config, MixedConfig)
    return mixture.config


def _check(name: str, adapter: Adapter, leaves: dict[str, Any], adapters: dict[str, Adapter]) -> None:
    if method_of(adapter.config).prompt is not None:
        raise ValueError(
            f"adapter {name!r} is a soft prompt, whose tokens tell it from others, so that no mixture is needed; "
            "expected jpeft.set_adapter(params, names) and jpeft.with_virtual_tokens(batch, params, adapter_names=...)"
        )
    if not _plain_in_some_rows(method_of(adapter.config)):
        check_zeros_are_nothing(name, adapter, "a mixed batch")
    first, config = next(iter(adapters)), _row_config(adapters)
    if type(adapter.config) is not type(config) or not _is_one_of(adapter.config, config):
        raise ValueError(f"adapters {first!r} and {name!r} are of different methods; expected one method in a mixture")
    if adapter.config.inference_mode != adapters[first].config.inference_mode:
        trains = {n: not a.config.inference_mode for n, a in adapters.items()}
        raise ValueError(
            f"some adapters train and others do not: {trains}; expected all alike (load_adapter: is_trainable=...)"
        )
    if adapter.rows:
        raise ValueError(
            f"adapter {name!r} trains single rows of {', '.join(adapter.rows)} (trainable_token_indices), which may be "
            "other rows in each adapter; expected adapters without in a mixed batch"
        )
    tied = {n: getattr(a.config, "ensure_weight_tying", False) for n, a in adapters.items()}
    if len(set(tied.values())) > 1:
        raise ValueError(f"ensure_weight_tying is {tied}; expected one and the same in a mixed batch")
    for path, copy in adapter.replaced.items():
        if tuple(copy.shape) != tuple(leaves[path].shape):
            raise ValueError(
                f"adapter {name!r} replaces {path!r} of shape {tuple(leaves[path].shape)} by one of {copy.shape}; "
                "expected the base's shape, which all rows of a mixed batch share"
            )


def _all_sites(adapters: dict[str, Adapter]) -> dict[str, Site]:
    sites: dict[str, Site] = {}
    for name, adapter in adapters.items():
        for path, site in adapter.sites.items():
            if sites.setdefault(path, site) != site:
                raise ValueError(
                    f"adapter {name!r} acts on {path!r} as {site}, another one as {sites[path]}; expected adapters "
                    "that were wrapped with the same layouts"
                )
    return sites


def _part(name: str, adapter: Adapter) -> Part:
    arrays = {
        path: {key: (tuple(array.shape), str(array.dtype)) for key, array in own.items()}
        for path, own in adapter.weights.items()
    }
    return Part(name, adapter.config, adapter.sites, FrozenMapping(arrays), tuple(adapter.replaced))


def _row_config(adapters: dict[str, Adapter]) -> PeftConfig:
    configs = [adapter.config for adapter in adapters.values()]
    # A variant that can be told row by row to be the plain method stands for the plain ones, too.
    first = next((config for config in configs if _plain_in_some_rows(method_of(config))), configs[0])
    if not isinstance(first, TunerConfig):
        return first
    # It decides which full copies are those of lookup tables.
    saved = dict.fromkeys(name for a in adapters.values() for name in getattr(a.config, "modules_to_save", None) or ())
    return dataclasses.replace(first, modules_to_save=tuple(saved) or None)


def _plain_in_some_rows(method: Method) -> bool:
    return bool(method.row_inputs) and all(asked.plain is not None for asked in method.row_inputs.values())


def _is_one_of(config: PeftConfig, row: PeftConfig) -> bool:
    """Whether an adapter of one config can be a row of a mixture that computes by another."""
    method, other = method_of(config), method_of(row)
    return method is other or (is_plain(method) and _plain_in_some_rows(other))


def _check_dropout(parts: Sequence[Part]) -> None:
    rates = {part.name: method_of(part.config).dropout(part.config) for part in parts}
    if len(set(rates.values())) > 1:
        raise ValueError(f"the adapters of the mixture have the dropout rates {rates}; expected one rate, or no rng")


def _stacked_arrays(path: str, adapters: list[Adapter]) -> dict[str, Any]:
    own = [adapter.weights.get(path, {}) for adapter in adapters]
    names = dict.fromkeys(name for arrays in own for name in arrays)
    found = {}
    for name in names:
        given = [arrays[name] for arrays in own if name in arrays]
        shape = largest(tuple(array.shape) for array in given)
        zeros = _zeros(shape, given[0].dtype, given)
        found[name] = _stacked([padded(arrays[name], shape) if name in arrays else zeros for arrays in own])
    return found


def _is_abstract(tree: Any) -> bool:
    return any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(tree))


def _zeros(shape: tuple[int, ...], dtype: Any, like: Any) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype) if _is_abstract(like) else jnp.zeros(shape, dtype)


def _stacked(arrays: list[Any]) -> Any:
    dtype = arrays[0].dtype
    with jax.numpy_dtype_promotion("standard"):
        for array in arrays[1:]:
            dtype = jnp.promote_types(dtype, array.dtype)
    if _is_abstract(arrays):
        return jax.ShapeDtypeStruct((len(arrays), *arrays[0].shape), dtype)
    return jnp.stack([jnp.asarray(array).astype(dtype) for array in arrays])


def _taken_apart(mixture: Adapter, index: int, part: Part) -> Adapter:
    def at(array: Any) -> Any:
        return jax.ShapeDtypeStruct(array.shape[1:], array.dtype) if _is_abstract(array) else array[index]

    def own(path: str, name: str, shape: tuple[int, ...], dtype: str) -> Any:
        array = cut(at(mixture.weights[path][name]), shape)
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)) if _is_abstract(array) else array.astype(dtype)

    return Adapter(
        weights={p: {n: own(p, n, *spec) for n, spec in arrays.items()} for p, arrays in part.arrays.items()},
        shared={},
        replaced={path: at(mixture.replaced[path]) for path in part.replaced},
        scaling={path: at(mixture.scaling[path]) for path in part.sites},
        config=part.config,
        sites=part.sites,
    )
