"""Virtual tokens: ids that follow the vocabulary, put before the text of a batch, and what they are looked up in."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ._config import TaskType
from ._context import brought
from ._contract import method_of
from ._mixed import BASE
from ._params import PeftParams
from ._paths import fold_in_name
from ._virtual_labels import have_labels, with_decoder_prompts, with_ignored, with_labels_of_prompts
from ._wrap import checked_params

# Of what a batch holds for each token, what the virtual tokens have.
_FILLED = {"attention_mask": 1, "token_type_ids": 0}
_PER_TOKEN = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "labels", "input_type_mask")
# What a batch holds of places in its text.
_PLACES = ("start_positions", "end_positions")


def with_virtual_tokens(
    batch: Mapping[str, Any],
    wrapped: PeftParams,
    *,
    adapter_names: Sequence[str] | None = None,
    align: str = "left",
) -> dict[str, Any]:
    """The batch with the virtual tokens of the active soft prompts before its text: a pure function, for use under jit.

    batch: by name, of which `input_ids (rows, length)`, int, is needed. `attention_mask` gets ones, `token_type_ids`
    zeros, `labels` of a text's tokens -100, and `position_ids`, `start_positions` and `end_positions` count on from the
    prompt (PEFT drops the first, and leaves the others, and labels of tokens, where they were). Of an encoder-decoder
    the text is the encoder's; a multitask prompt has a part for `decoder_input_ids` and their labels. With CPT the
    labels hold the context's, too, and there is an `input_type_mask (rows, length)`, for `jpeft.cpt_loss`; take it out
    of the batch before the model is called. The rest is left as it is, and so is a batch without soft prompts.
    adapter_names: where several prompts are active, that of each row, "__base__" for none. A row with a shorter one
    gets padding, which the mask hides: after its text (align="left"), which begins earlier then, so that positions are
    what they were, or before the prompt ("right"), as for generation. Outputs have as many places more.
    Raises ValueError for a batch without `input_ids`, names that are not those of active prompts, several prompts
    without names, a decoder's labels without its input, and types that do not fit the labels.

    >>> import jpeft
    >>> params = {"embed_tokens": {"embedding": jnp.ones((9, 4))}}
    >>> wrapped = jpeft.wrap(params, jpeft.PromptTuningConfig(num_virtual_tokens=2))
    >>> batch = with_virtual_tokens({"input_ids": jnp.array([[5, 6]]), "labels": jnp.array([[5, 6]])}, wrapped)
    >>> batch["input_ids"].tolist(), batch["labels"].tolist()
    ([[9, 10, 5, 6]], [[-100, -100, 5, 6]])
    >>> jpeft.lift(lambda params, ids: params["embed_tokens"]["embedding"][ids])(wrapped, batch["input_ids"]).shape
    (1, 4, 4)
    """
    if align not in ("left", "right"):
        raise ValueError(f"align is {align!r}; expected 'left' or 'right', where shorter rows have their text")
    ids = virtual_ids(wrapped)
    if not ids:
        return dict(batch)
    if batch.get("input_ids") is None:
        raise ValueError(
            f"the batch has {', '.join(batch) or 'nothing'}, and no input_ids, before which the virtual tokens of "
            f"{', '.join(map(repr, ids))} would come; expected input_ids (rows, length)"
        )
    given = jnp.asarray(batch["input_ids"])
    if given.ndim != 2 or not jnp.issubdtype(given.dtype, jnp.integer):
        raise ValueError(f"input_ids are {given.dtype} of shape {given.shape}; expected integers of (rows, length)")
    rows, length = given.shape
    adapters = _adapters_of_rows(ids, rows, adapter_names)
    before, visible = _prompts_of_rows(_encoder_parts(wrapped, ids), adapters)
    count, found = before.shape[1], dict(batch)
    found["input_ids"] = jnp.concatenate([before.astype(given.dtype), given], axis=1)
    for name, value in _FILLED.items():
        if found.get(name) is not None:
            own = jnp.asarray(found[name])
            filled = (
                visible.astype(own.dtype) if name == "attention_mask" else jnp.full((rows, count), value, own.dtype)
            )
            found[name] = jnp.concatenate([filled, own], axis=1)
    if found.get("attention_mask") is None and not visible.all():
        found["attention_mask"] = jnp.concatenate([visible, jnp.ones((rows, length), visible.dtype)], axis=1)
    if found.get("position_ids") is not None:
        found["position_ids"] = _positions(jnp.asarray(found["position_ids"]), visible)
    for name in _PLACES:
        if found.get(name) is not None:
            places = jnp.asarray(found[name])
            found[name] = jnp.where(places < 0, places, places + count)
    labels = found.get("labels")
    if labels is not None and _labels_are_of_tokens(wrapped, ids) and jnp.shape(labels) == (rows, length):
        if have_labels(wrapped, adapters):
            found.update(with_labels_of_prompts(found, wrapped, adapters, count))
        else:
            found["labels"] = with_ignored(labels, count)
    if decoded := _decoder_parts(wrapped, ids):
        found.update(with_decoder_prompts(found, decoded, adapters))
    if visible.all() or align == "right":
        return found
    others = () if _labels_are_of_tokens(wrapped, ids) else ("labels",)
    return _left_aligned(found, visible, length, [name for name in _PER_TOKEN if name not in others])


def _left_aligned(batch: dict[str, Any], visible: np.ndarray, length: int, per_token: Sequence[str]) -> dict[str, Any]:
    """The batch with the padding before prompts moved behind the text. visible (rows, n): of what comes before it."""
    rows, count = visible.shape
    padding, total = count - visible.sum(axis=1), count + length
    order = jnp.asarray((np.arange(total)[None] + padding[:, None]) % total)
    arrays = {name: jnp.asarray(batch[name]) for name in per_token if batch.get(name) is not None}
    of_tokens = {name: array for name, array in arrays.items() if array.shape == (rows, total)}
    moved = {name: jnp.take_along_axis(array, order, axis=1) for name, array in of_tokens.items()}
    for name in _PLACES:
        if batch.get(name) is not None:
            moved[name] = jnp.where(batch[name] < 0, batch[name], batch[name] - padding.astype(batch[name].dtype))
    return {**batch, **moved}


def virtual_ids(wrapped: PeftParams) -> dict[str, range]:
    """{adapter: the ids of its prompt} of the active adapters that have one, in turn from the vocabulary on.

    >>> import jpeft
    >>> params = {"embed_tokens": {"embedding": jnp.ones((9, 4))}}
    >>> virtual_ids(jpeft.wrap(params, jpeft.PromptTuningConfig(num_virtual_tokens=2)))
    {'default': range(9, 11)}
    """
    found: dict[str, range] = {}
    for name in checked_params(wrapped).active:
        adapter = wrapped.adapters[name]
        if method_of(adapter.config).prompt is None:
            continue
        (site,) = adapter.sites.values()
        first = max([site.in_features, *(own.stop for own in found.values())])
        found[name] = range(first, first + _length(wrapped, name))
    return found


def prompt_rows(wrapped: PeftParams, name: str) -> jax.Array:
    """What the ids of an adapter's prompt are looked up in: (n, dim), or (rows, n, dim) if each row has its own.

    Raises ValueError if the call does not bring what the prompt depends on.
    """
    adapter = wrapped.adapters[name]
    method = method_of(adapter.config)
    assert method.prompt is not None
    context: dict[str, Any] = dict(brought(wrapped, name))
    rng = wrapped.context.get("rng")
    if rng is not None:
        context["rng"] = fold_in_name(rng.key(), f"{name}/prompt")
    return method.prompt(adapter.shared, adapter.config, context)


def _length(wrapped: PeftParams, name: str) -> int:
    """How many rows a prompt has, those for a decoder among them."""
    config: Any = wrapped.adapters[name].config
    return config.num_virtual_tokens * config.submodules


def _encoder_parts(wrapped: PeftParams, ids: Mapping[str, range]) -> dict[str, range]:
    configs: dict[str, Any] = {name: wrapped.adapters[name].config for name in ids}
    return {name: own[: configs[name].num_virtual_tokens] for name, own in ids.items()}


def _decoder_parts(wrapped: PeftParams, ids: Mapping[str, range]) -> dict[str, range]:
    """Of each prompt the part that comes before the decoder's input, if there is one."""
    configs: dict[str, Any] = {name: wrapped.adapters[name].config for name in ids}
    parts = {name: own[configs[name].num_virtual_tokens :] for name, own in ids.items()}
    return {name: own for name, own in parts.items() if own and method_of(configs[name]).in_decoder}


def _adapters_of_rows(ids: Mapping[str, range], rows: int, names: Sequence[str] | None) -> list[str]:
    if names is None:
        if len(ids) > 1:
            raise ValueError(
                f"the prompts of {', '.join(map(repr, ids))} are active; expected adapter_names, one a row, or one "
                "active prompt: jpeft.set_adapter"
            )
        names = [next(iter(ids))] * rows
    return names_of_rows(names, rows, ids, "the active prompts")


def names_of_rows(names: Sequence[str], rows: int, known: Iterable[str], what: str) -> list[str]:
    """The adapter of each row, "__base__" for none; raises ValueError for others than the known ones, or too few."""
    known = (*known, BASE)
    if isinstance(names, str) or len(names) != rows or any(name not in known for name in names):
        raise ValueError(
            f"adapter_names are {names!r} for {rows} rows; expected one a row, each among {what}: {', '.join(known)}"
        )
    return list(names)


def _prompts_of_rows(ids: Mapping[str, range], names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """(ids, whether there is a token) of what comes before each row, both (rows, n)."""
    widest = max(len(own) for own in ids.values())
    before, visible = np.zeros((len(names), widest), np.int32), np.zeros((len(names), widest), np.int32)
    for row, name in enumerate(names):
        own = ids.get(name, range(0))
        before[row, widest - len(own) :] = own
        visible[row, widest - len(own) :] = 1
    return before, visible


def _positions(given: jax.Array, mask: np.ndarray) -> jax.Array:
    """Positions (rows or 1, length) that count on from those of the prompt."""
    rows, visible = max(given.shape[0], mask.shape[0]), jnp.asarray(mask, given.dtype)
    before = jnp.maximum(jnp.cumsum(visible, axis=1) - 1, 0)
    after = jnp.broadcast_to(given, (rows, given.shape[1])) + visible.sum(axis=1, keepdims=True)
    return jnp.concatenate([jnp.broadcast_to(before, (rows, before.shape[1])), after], axis=1)


def _labels_are_of_tokens(wrapped: PeftParams, ids: Mapping[str, range]) -> bool:
    configs: list[Any] = [wrapped.adapters[name].config for name in ids]
    others = (TaskType.SEQ_2_SEQ_LM, TaskType.SEQ_CLS)
    return all(config.task_type not in others and config.submodules == 1 for config in configs)
