"""What a `PeftModel` is at one moment, as a frozen value, and the pure functions from one moment to the next."""

import dataclasses
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jax

import jpeft
from jpeft import PeftParams
from jpeft._adapters import delete_adapter
from jpeft._contract import method_of
from jpeft._convert import check_convertible
from jpeft._paths import last_name
from jpeft._wrap import checked_names

from ._base_model import BaseModel
from ._surplus import EMBEDDINGS

_PROBE = "supports lora conversion"


@dataclass(frozen=True, eq=False)
class Face:
    """A base model, and all adapters beside its parameters.

    wrapped: the base as it was given, and the active adapters, whether or not they are enabled or merged. merged:
    names of adapters that are in merged_base, which is then computed with. mixed: whether methods may differ.
    """

    base: BaseModel
    wrapped: PeftParams
    enabled: bool = True
    merged: tuple[str, ...] = ()
    merged_base: Any = None
    mixed: bool = False


def in_use(face: Face) -> PeftParams:
    """What the model computes with."""
    if not face.enabled:
        return jpeft.disable_adapters(face.wrapped)
    # As in PEFT, what is merged is all that acts then.
    return dataclasses.replace(face.wrapped, base=face.merged_base, active=()) if face.merged else face.wrapped


def in_rows(face: Face, names: Sequence[str] | None) -> PeftParams:
    """What the model computes with if each row of a batch has an adapter of its own.

    names: of each row, or None for what is in use. Raises ValueError for unknown names, and while adapters are merged.
    """
    if names is None:
        return in_use(face)
    if face.merged:
        raise ValueError(f"adapter_names needs unmerged weights, but {', '.join(face.merged)} are merged")
    prompts = rows_by_prompts(face, names)
    if prompts:
        return dataclasses.replace(face.wrapped, active=prompts)
    return jpeft.with_context(jpeft.mixed_batch(face.wrapped), adapter_indices=names)


def rows_by_prompts(face: Face, names: Sequence[str] | None) -> tuple[str, ...]:
    """The adapters that rows name, if all are soft prompts, told apart by ids of their own, or prefixes; else none."""
    named = dict.fromkeys(name for name in names or () if name in face.wrapped.adapters)
    methods = [method_of(face.wrapped.adapters[name].config) for name in named]
    alike = any(all(getattr(method, kind) is not None for method in methods) for kind in ("prompt", "prefix"))
    return tuple(named) if named and alike else ()


def trained(face: Face) -> PeftParams:
    """The parameters of which it is asked what trains: merging freezes nothing, and disabling everything."""
    return face.wrapped if face.enabled else jpeft.disable_adapters(face.wrapped)


def with_parameters(face: Face, params: PeftParams) -> Face:
    """The face with other wrapped parameters, such as a training step returns.

    Raises TypeError if they do not come from `jpeft.wrap`, and ValueError while adapters are merged.
    """
    if not isinstance(params, PeftParams):
        raise TypeError(f"expected the PeftParams that jpeft.wrap returns, not a {type(params).__name__}")
    if face.merged:
        raise ValueError(
            f"adapters are merged ({', '.join(face.merged)}), so that none trains; unmerge_adapter() first"
        )
    if not face.enabled and not params.active:
        return dataclasses.replace(
            face, wrapped=dataclasses.replace(params, active=_known(face.wrapped.active, params))
        )
    return dataclasses.replace(face, wrapped=params, enabled=True)


def _known(names: Iterable[str], params: PeftParams) -> tuple[str, ...]:
    return tuple(name for name in names if name in params.adapters)


def with_enabled(face: Face, enabled: bool) -> Face:
    return dataclasses.replace(face, enabled=enabled)


def activated(face: Face, names: str | Sequence[str], inference_mode: bool) -> Face:
    """Other adapters in use; they train, unless inference_mode. Warns if adapters are merged, which ends then."""
    wrapped = with_training(jpeft.set_adapter(face.wrapped, names), names, not inference_mode)
    if face.merged:
        warnings.warn(f"adapters are merged ({', '.join(face.merged)}); unmerging them first", stacklevel=3)
    return dataclasses.replace(face, wrapped=wrapped, merged=(), merged_base=None)


def with_training(wrapped: PeftParams, names: str | Sequence[str], trains: bool) -> PeftParams:
    """The same parameters with adapters that train while they are active, or do not.

    Raises ValueError for unknown names.
    """
    chosen = [names] if isinstance(names, str) else list(names)
    unknown = [name for name in chosen if name not in wrapped.adapters]
    if unknown:
        raise ValueError(f"there is no adapter {unknown[0]!r}; expected one of: {', '.join(wrapped.adapters)}")
    adapters = dict(wrapped.adapters)
    for name in chosen:
        config = adapters[name].config
        if config.inference_mode is trains:
            config = dataclasses.replace(config, inference_mode=not trains)
            adapters[name] = dataclasses.replace(adapters[name], config=config)
    return dataclasses.replace(wrapped, adapters=adapters)


def merged_in(face: Face, names: str | Sequence[str] | None, safe: bool) -> Face:
    """The face with adapters in the weights, the active ones by default; warns about those that are there already."""
    asked = face.wrapped.active if names is None else (names,) if isinstance(names, str) else tuple(names)
    fresh = tuple(name for name in asked if name not in face.merged)
    if not fresh:
        warnings.warn(f"the adapters {list(asked)} are merged already; nothing to do", stacklevel=3)
        return face
    if face.merged:
        warnings.warn(f"the adapters {list(face.merged)} are merged already; merging {list(fresh)} too", stacklevel=3)
    together = (*face.merged, *fresh)
    return dataclasses.replace(face, merged=together, merged_base=merged_tree(face, together, safe))


def merged_tree(face: Face, names: str | Sequence[str] | None, safe: bool) -> Any:
    """`jpeft.merge` of the adapters, with a warning where that changes more than the adapters did."""
    chosen = face.wrapped.active if names is None else (names,) if isinstance(names, str) else names
    tree = jpeft.merge(face.wrapped, adapter_names=None if names is None else names, safe=safe)
    adapted = [path for name in chosen for path in face.wrapped.adapters[name].sites if last_name(path) in EMBEDDINGS]
    if adapted and face.base.config.get("tie_word_embeddings"):
        warnings.warn(
            f"the model's output layer is its input embedding, and adapters of {sorted(set(adapted))} are merged: the "
            "merged weight changes both, the adapter changed one",
            stacklevel=4,
        )
    return tree


def taken_out(face: Face) -> Face:
    """The face with nothing merged: its base is the tree that was given. Warns if nothing is merged."""
    if not face.merged:
        warnings.warn("no adapter is merged; nothing to do", stacklevel=3)
    return dataclasses.replace(face, merged=(), merged_base=None)


def modules_to_save(face: Face) -> set[str] | None:
    """The names of all adapters' modules that are trained in full; None if there are none."""
    configs = [adapter.config for adapter in face.wrapped.adapters.values()]
    return {name for config in configs for name in getattr(config, "modules_to_save", None) or ()} or None


def is_convertible(face: Face, name: str) -> bool:
    """Whether `jpeft.convert_to_lora` takes an adapter; raises ValueError for an unknown name."""
    (known,) = checked_names(face.wrapped, name)
    try:
        check_convertible(known, face.wrapped.adapters[known])
        # Some methods say when they are to merge that they cannot; nothing is computed here.
        jax.eval_shape(lambda wrapped: jpeft.convert_to_lora(wrapped, known, 1, _PROBE).adapters[_PROBE], face.wrapped)
    except (TypeError, ValueError):
        return False
    return True


def check_combines(face: Face, name: str, config: jpeft.PeftConfig) -> None:
    """Raise ValueError if a model of one method is to get an adapter of another one."""
    others = {adapter.config.peft_type for adapter in face.wrapped.adapters.values()} - {config.peft_type}
    if others and not face.mixed:
        names = ", ".join(sorted(str(getattr(kind, "value", kind)) for kind in others))
        raise ValueError(
            f"adapter {name!r} is of the method {getattr(config.peft_type, 'value', config.peft_type)}, the others are "
            f"of {names}; expected one method, or a model made by get_peft_model(..., mixed=True)"
        )


def without(face: Face, name: str) -> Face:
    """The face without an adapter; if it was the only active one, the first of the others is in use then.

    Raises ValueError for an unknown adapter and for one that is merged; warns if another one becomes active.
    """
    if name in face.merged:
        raise ValueError(f"adapter {name!r} is merged; unmerge_adapter() first, or merge_and_unload() to keep it")
    wrapped = delete_adapter(face.wrapped, name)
    if not wrapped.active and name in face.wrapped.active and wrapped.adapters:
        wrapped = jpeft.set_adapter(wrapped, next(iter(wrapped.adapters)))
    if set(wrapped.active) - set(face.wrapped.active):
        warnings.warn(f"adapter {name!r} was active and is deleted; {wrapped.active[0]!r} is active now", stacklevel=3)
    return dataclasses.replace(face, wrapped=wrapped)
