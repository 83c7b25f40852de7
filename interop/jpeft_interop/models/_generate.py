"""Text from a model: `generate`, one compiled program for one shape of input."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

import jpeft
from jpeft._activation import OFFSETS, with_offsets
from jpeft._mixed import with_rows

from ._adaption import with_prompts
from ._beam import Beams, beam_search
from ._blueprint import Blueprint, run_network
from ._decoding import SEQ2SEQ, Decoder, LogitsProcessor, causal, right_aligned, trailing
from ._prefix import KeyValuePrefix, prefix_of, spread_rows
from ._sampling import Draw, Warp, greedy, sample
from ._shadow import SHADOW, shadow_of
from ._two_runs import in_two_runs

if TYPE_CHECKING:
    from ._model import FlaxModel

TASKS = {"causal-lm": "input_ids", "seq2seq-lm": "decoder_input_ids", "speech-seq2seq": "decoder_input_ids"}
"""Tasks that generate, and the input that their sequences begin with."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class GenerationOutput:
    """`sequences (rows, length)`: the prompt and what follows it, then padding; a row per returned sequence.

    `scores (rows,)`: of a beam search, the sum of the log-probabilities over the length to the `length_penalty`.
    """

    sequences: jax.Array
    scores: jax.Array | None = None


@dataclass(frozen=True)
class Settings:
    """What a compiled program is made for. `beams` None: greedy search, or sampling if `do_sample`.

    `virtual`: how many tokens before the text are those of a prompt, which nobody sees.
    """

    max_new_tokens: int
    eos: tuple[int, ...]
    pad: int
    do_sample: bool
    top_k: int | None
    beams: Beams | None
    returned: int
    processor: LogitsProcessor | None
    virtual: int = 0


def generate(
    model: "FlaxModel",
    params: Any,
    inputs: Mapping[str, ArrayLike | None],
    *,
    max_new_tokens: int,
    eos_token_id: int | Sequence[int] | None,
    pad_token_id: int | None,
    do_sample: bool,
    temperature: float,
    top_k: int | None,
    top_p: float,
    seed: int,
    num_beams: int,
    length_penalty: float,
    early_stopping: bool | Literal["never"],
    num_return_sequences: int,
    logits_processor: LogitsProcessor | None,
    adapter_names: Sequence[str] | None = None,
) -> GenerationOutput:
    """`FlaxModel.generate`, which says what the arguments mean."""
    task = _task(model)
    _check(
        max_new_tokens=max_new_tokens, num_beams=num_beams, num_return_sequences=num_return_sequences,
        temperature=temperature, top_p=top_p, top_k=top_k, do_sample=do_sample, early_stopping=early_stopping,
    )  # fmt: skip
    arrays = {name: jnp.asarray(value) for name, value in inputs.items() if value is not None}
    prompt, arrays = _prompt(model, arrays, task)
    arrays = {**arrays, TASKS[task]: prompt}
    text, arrays = prompt.shape[1], _with_virtual_tokens(params, arrays, adapter_names, TASKS[task])
    prompt = arrays.pop(TASKS[task])
    if isinstance(params, jpeft.PeftParams):
        prefix = prefix_of(params, model.config, prompt.shape[0], adapter_names)
        arrays = arrays if prefix is None else {**arrays, "past_key_values": prefix}
    eos = _ids(model, "eos_token_id", eos_token_id)
    pad = _ids(model, "pad_token_id", pad_token_id) or eos or (0,)
    settings = Settings(
        max_new_tokens=max_new_tokens,
        eos=eos,
        pad=pad[0],
        do_sample=do_sample,
        top_k=top_k if do_sample else None,
        beams=Beams(num_beams, length_penalty, early_stopping) if num_beams > 1 else None,
        returned=num_return_sequences,
        processor=logits_processor,
        virtual=prompt.shape[1] - text,
    )
    warp = Warp(jnp.asarray(temperature, jnp.float32), jnp.asarray(top_p, jnp.float32))
    return _compiled(model.blueprint, settings, params, arrays, prompt, warp, jax.random.key(seed))


def _task(model: "FlaxModel") -> str:
    architectures = model.blueprint.family.architectures
    task = next((task for task in TASKS if architectures.get(task) is model.blueprint.architecture), None)
    if task is None:
        raise TypeError(
            f"{model.blueprint.architecture.name} does not generate; load the model with FlaxAutoModelForCausalLM, "
            "FlaxAutoModelForSeq2SeqLM or FlaxAutoModelForSpeechSeq2Seq"
        )
    return task


def _check(
    *,
    max_new_tokens: int,
    num_beams: int,
    num_return_sequences: int,
    temperature: float,
    top_p: float,
    top_k: int | None,
    do_sample: bool,
    early_stopping: bool | str,
) -> None:
    counts = {
        "max_new_tokens": max_new_tokens,
        "num_beams": num_beams,
        "num_return_sequences": num_return_sequences,
        "top_k": 1 if top_k is None else top_k,
    }
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}")
    if not 0.0 < top_p <= 1.0:
        raise ValueError(f"top_p must be above 0 and at most 1, got {top_p}")
    if temperature <= 0.0:
        raise ValueError(f"temperature must be above 0, got {temperature}; do_sample=False takes the likeliest token")
    if do_sample and num_beams > 1:
        raise ValueError(f"expected do_sample=True or num_beams > 1, got both (num_beams={num_beams})")
    if num_return_sequences > 1 and not do_sample and num_return_sequences > num_beams:
        raise ValueError(
            f"num_return_sequences={num_return_sequences} needs do_sample=True, or at least as many beams "
            f"(num_beams={num_beams})"
        )
    if early_stopping not in (True, False, "never"):
        raise ValueError(f"early_stopping must be True, False or 'never', got {early_stopping!r}")


def _ids(model: "FlaxModel", name: str, given: int | Sequence[int] | None) -> tuple[int, ...]:
    value = model.generation_config.get(name, model.config_dict.get(name)) if given is None else given
    if value is None:
        return ()
    return (int(value),) if isinstance(value, int | np.integer) else tuple(int(token) for token in value)


def _with_virtual_tokens(
    params: Any, arrays: dict[str, jax.Array], adapter_names: Sequence[str] | None, goes_on: str
) -> dict[str, jax.Array]:
    """The inputs with the virtual tokens of active soft prompts. goes_on: the name of those that the output goes on."""
    if not isinstance(params, jpeft.PeftParams) or "input_ids" not in arrays:
        return arrays
    align = "right" if goes_on == "input_ids" else "left"
    return jpeft.with_virtual_tokens(arrays, params, adapter_names=adapter_names, align=align)


def _of_text(processor: LogitsProcessor | None, virtual: int) -> LogitsProcessor | None:
    """A processor that sees the text alone, of sequences that begin with virtual tokens."""
    if processor is None or not virtual:
        return processor
    return lambda sequences, logits, end: processor(sequences[:, virtual:], logits, end - virtual)


def _prompt(model: "FlaxModel", arrays: Mapping[str, jax.Array], task: str) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The tokens `(rows, length)` that the sequences begin with, and the other inputs."""
    name = TASKS[task]
    rest = {key: array for key, array in arrays.items() if key != name}
    if name in arrays:
        prompt = arrays[name]
        if prompt.ndim != 2 or not jnp.issubdtype(prompt.dtype, jnp.integer) or 0 in prompt.shape:
            raise ValueError(f"{name} must be integers (batch, length), got {prompt.dtype} {prompt.shape}")
        return prompt.astype(jnp.int32), rest
    if task == "causal-lm" or not rest:
        raise ValueError(f"generate needs {name if task == 'causal-lm' else 'the input of the encoder'}")
    start = _ids(model, "decoder_start_token_id", None) or _ids(model, "bos_token_id", None)
    if not start:
        raise ValueError("the config has neither decoder_start_token_id nor bos_token_id: give decoder_input_ids")
    rows = next(iter(rest.values())).shape[0]
    return jnp.full((rows, 1), start[0], jnp.int32), rest


@partial(jax.jit, static_argnums=(0, 1))
def _compiled(
    blueprint: Blueprint,
    settings: Settings,
    params: Any,
    inputs: Mapping[str, jax.Array],
    prompt: jax.Array,
    warp: Warp,
    key: jax.Array,
) -> GenerationOutput:
    own = with_prompts(jpeft.adaption_prompts(params)) if isinstance(params, jpeft.PeftParams) else {}

    def plain(params: Any, arrays: Mapping[str, Any], static: Mapping[str, Any]) -> Any:
        return run_network(blueprint, params, {**arrays, **static})

    def run(params: Any, **given: Any) -> Any:
        static = {name: value for name, value in given.items() if isinstance(value, int)}
        arrays = {name: value for name, value in given.items() if name not in static}
        call = partial(plain, static=static)
        if not isinstance(params, jpeft.PeftParams):
            return call(params, arrays)
        if (shadow := shadow_of(blueprint, params)) is not None:
            arrays[SHADOW] = shadow
        # Beams and several sequences for a prompt repeat the rows of a mixed batch.
        batch = arrays["decoder_input_ids" if "decoder_input_ids" in arrays else "input_ids"].shape[0]
        with warnings.catch_warnings():
            # The encoder alone, and a step of the decoder, have a use for a part of the adapters each.
            warnings.filterwarnings("ignore", message="the function uses no weight of")
            return jpeft.lift(call)(with_rows(params, batch), {**arrays, **own})

    decoder = _decoder(blueprint)
    if isinstance(params, jpeft.PeftParams) and decoder is not SEQ2SEQ:
        params = _activated(params, prompt, inputs.get("attention_mask"))
    network = in_two_runs(run, params, blueprint.architecture.name)
    rows, length = prompt.shape
    _check_rows(params, rows)
    copies = settings.returned if settings.beams is None else 1
    spread = jnp.repeat(jnp.arange(rows), copies)
    prompt, inputs = prompt[spread], {name: _rows_of(given, spread) for name, given in inputs.items()}
    capacity = length + settings.max_new_tokens
    first = decoder.start(network, inputs, prompt, capacity)
    processor, virtual = _of_text(settings.processor, settings.virtual), settings.virtual
    room = jnp.full((prompt.shape[0], settings.max_new_tokens), settings.pad, prompt.dtype)
    sequences = jnp.concatenate([prompt, room], axis=1)
    if settings.beams is not None:
        found, scores = beam_search(network, decoder, first, sequences, length, settings.eos, processor, settings.beams)
        best = slice(0, settings.returned)
        return GenerationOutput(found[:, best].reshape(-1, capacity)[:, virtual:], scores[:, best].reshape(-1))
    choose = Draw(settings.top_k, warp) if settings.do_sample else greedy
    found = sample(network, decoder, first, sequences, length, settings.eos, settings.pad, processor, choose, key)
    return GenerationOutput(found[:, virtual:])


def _check_rows(params: Any, rows: int) -> None:
    context = params.context if isinstance(params, jpeft.PeftParams) else {}
    for name in context.keys() - {"rng"}:
        counts = {array.shape[0] for array in jax.tree.leaves(context[name])} - {rows}
        if counts:
            raise ValueError(
                f"{name} are for {counts.pop()} rows, the batch has {rows}; expected an entry for each, also where "
                "several sequences continue it"
            )


def _rows_of(given: Any, rows: jax.Array) -> Any:
    return spread_rows(given, rows) if isinstance(given, KeyValuePrefix) else given[rows]


def _activated(params: jpeft.PeftParams, prompt: jax.Array, mask: jax.Array | None) -> jpeft.PeftParams:
    """The parameters with where activated adapters begin, counted from the end of the text, as padding moves left."""
    ids = prompt if mask is None else right_aligned(prompt, mask)[0]
    if mask is not None and OFFSETS in params.context:
        params, moved = with_rows(params, prompt.shape[0]), trailing(mask)
        given = jax.tree.map(lambda offsets: jnp.maximum(offsets - moved, 0), params.context[OFFSETS])
        params = replace(params, context={**params.context, OFFSETS: given})
    return with_offsets(params, ids)


def _decoder(blueprint: Blueprint) -> Decoder:
    architectures = blueprint.family.architectures
    if architectures.get("causal-lm") is blueprint.architecture:
        return causal(takes_positions="position_ids" in blueprint.family.inputs)
    return SEQ2SEQ
