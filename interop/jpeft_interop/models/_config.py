"""Reading a config.json: into a frozen dataclass, refusing by name whatever is not understood.

A key that this code does not know may change the mathematics, and a model that computes something else without a
word is the worst outcome there is. So the keys are an allow-list: the fields of the family's dataclass, keys that the
family reads itself, keys that must hold the one value which is implemented, and the bookkeeping below.
"""

import json
from collections.abc import Collection, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn, TypeVar

Config = TypeVar("Config")

_DESCRIPTION = """
    architectures model_type transformers_version torch_dtype dtype name_or_path finetuning_task task_specific_params
    id2label label2id num_labels problem_type tokenizer_class prefix attn_implementation experts_implementation
    bos_token_id eos_token_id pad_token_id sep_token_id cls_token_id mask_token_id unk_token_id decoder_start_token_id
    torchscript use_bfloat16 tf_legacy_loss gradient_checkpointing output_past output_attentions output_hidden_states
    output_scores return_dict return_dict_in_generate chunk_size_feed_forward tie_encoder_decoder use_return_dict
    sentence_transformers transformers.js_config unsloth_fixed unsloth_version
"""
_DROPOUT = """
    attention_dropout hidden_dropout hidden_dropout_prob attention_probs_dropout_prob classifier_dropout embd_pdrop
    resid_pdrop attn_pdrop summary_first_dropout residual_dropout embedding_dropout dropout activation_dropout
"""
_GENERATION = """
    use_cache do_sample temperature top_k top_p typical_p min_length max_length max_new_tokens num_beams
    num_beam_groups num_return_sequences early_stopping diversity_penalty repetition_penalty length_penalty
    encoder_repetition_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids suppress_tokens
    begin_suppress_tokens forced_bos_token_id forced_eos_token_id remove_invalid_values epsilon_cutoff eta_cutoff
    exponential_decay_length_penalty
"""
_TRAINING = "initializer_range initializer_factor label_smoothing pretraining_tp"

BOOKKEEPING = frozenset(f"{_DESCRIPTION} {_DROPOUT} {_GENERATION} {_TRAINING}".split())
"""Keys that do not change what a model computes: it has no dropout here, and generation is another matter."""

GENERATION_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")

IMPLEMENTED: Mapping[str, tuple[Any, ...]] = {
    "is_decoder": (False,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "cross_attention_hidden_size": (None,),
    "pruned_heads": ({}, None),
}
"""Keys of every family, with the values for which the model is the one implemented."""


def read_fields(
    config: type[Config],
    raw: Mapping[str, Any],
    *,
    implemented: Mapping[str, tuple[Any, ...]] | None = None,
    known: Collection[str] = (),
    ignore: Collection[str] = (),
) -> dict[str, Any]:
    """The values of `config`'s fields found in `raw`, having refused every other key that might matter.

    `config`: a dataclass. `implemented`: keys and the values accepted for them. `known`: keys that the family reads
    by itself, or knows to have no effect. `ignore`: keys that the user vouches for. A key which is not known but
    holds nothing (None, or an empty container), or is private (`_name`), passes. Raises ValueError naming the keys
    refused.
    """
    names = {field.name for field in fields(config)}  # type: ignore[arg-type]
    accepted = {**IMPLEMENTED, **(implemented or {})}
    unknown = {
        key: value
        for key, value in raw.items()
        if key not in names | BOOKKEEPING | accepted.keys() | set(known) | set(ignore)
        and not (key.startswith("_") or value is None or value == {} or value == [])
    }
    if unknown:
        refuse("config.json", unknown, "not known for this family", _vouch(unknown))
    for key, values in accepted.items():
        if key in raw and raw[key] not in values and key not in ignore:
            expected = " or ".join(repr(value) for value in values)
            refuse("config.json", {key: raw[key]}, f"expected {expected}", _vouch((key,)))
    return {key: value for key, value in raw.items() if key in names}


def translated(raw: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """A config with the keys that a family has names of its own for under those that all have.

    Raises ValueError if it holds two values for one of them.

    >>> translated({"n_layer": 2, "n_head": 4}, {"n_layer": "num_hidden_layers"})
    {'n_head': 4, 'num_hidden_layers': 2}
    """
    given = {key: value for key, value in raw.items() if key not in names}
    for theirs, ours in names.items():
        if theirs not in raw:
            continue
        if ours in given and given[ours] != raw[theirs]:
            raise ValueError(
                f"config.json holds {theirs}={raw[theirs]!r} and {ours}={given[ours]!r}, two names of one setting: "
                "remove one of them"
            )
        given[ours] = raw[theirs]
    return given


def check_heads(hidden_size: int, num_attention_heads: int) -> None:
    """Raise ValueError unless the heads of attention divide the features."""
    if hidden_size % num_attention_heads:
        raise ValueError(f"hidden_size {hidden_size} is not a multiple of num_attention_heads {num_attention_heads}")


def refuse(where: str, keys: Mapping[str, Any], reason: str, mend: str) -> NoReturn:
    """Raise the ValueError for settings that may change what the model computes; `mend` tells the way out."""
    shown = ", ".join(f"{key}={value!r}" for key, value in keys.items())
    raise ValueError(
        f"{where} holds what may change the model's output and is not implemented: {shown} ({reason}); {mend}"
    )


def _vouch(keys: Collection[str]) -> str:
    return f"if this has no effect on the model, pass ignore_config_keys={tuple(keys)!r}"


def read_json(source: Mapping[str, Any] | str | Path) -> dict[str, Any]:
    """A config as a dict: given as one, or read from a config.json or from the folder that holds it.

    Raises FileNotFoundError if there is no such file.
    """
    if isinstance(source, Mapping):
        return dict(source)
    path = Path(source)
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"there is no config.json at {path}: give a dict, the file or its folder")
    return json.loads(path.read_text(encoding="utf-8"))


def read_generation_config(folder: Path) -> dict[str, Any]:
    """What a folder's generation_config.json says of tokens: those that begin, end and fill a text, and no more."""
    path = folder / "generation_config.json"
    raw = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return {key: raw[key] for key in GENERATION_TOKENS if raw.get(key) is not None}


def number_of_labels(raw: Mapping[str, Any]) -> int:
    """How many labels a classification head has: `id2label`, else `num_labels`, else 2.

    >>> number_of_labels({"id2label": {"0": "bad", "1": "good", "2": "fair"}})
    3
    """
    return len(raw["id2label"]) if raw.get("id2label") else int(raw.get("num_labels") or 2)


def with_labels(raw: Mapping[str, Any], num_labels: int) -> dict[str, Any]:
    """The config for a head of `num_labels`; the names of the labels are kept if their number is right.

    >>> with_labels({}, 1)
    {'id2label': {'0': 'LABEL_0'}, 'label2id': {'LABEL_0': 0}}
    """
    if num_labels < 1:
        raise ValueError(f"num_labels must be at least 1, got {num_labels}")
    if raw.get("id2label") and len(raw["id2label"]) == num_labels:
        return dict(raw)
    rest = {key: value for key, value in raw.items() if key != "num_labels"}
    names = {str(index): f"LABEL_{index}" for index in range(num_labels)}
    return rest | {"id2label": names, "label2id": {name: int(index) for index, name in names.items()}}
