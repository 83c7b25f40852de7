"""VB-LoRA's short files: of the logits over the vectors of the bank the largest alone, as their places and weights."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

import jpeft

INDICES, WEIGHTS = "_topk_indices", "_topk_weights"
LOGITS = ("vblora_logits_A", "vblora_logits_B")


def is_short(config: jpeft.PeftConfig) -> bool:
    """Whether files of this config hold the largest logits alone."""
    return isinstance(config, jpeft.VBLoRAConfig) and config.save_only_topk_weights


def shortened(arrays: Mapping[str, Any], config: Any) -> dict[str, Any]:
    """The tensors of a short file: of each array of logits (..., vectors) the places (..., topk) of the largest in the
    narrowest type, and all but the last of their weights (..., topk - 1); of other files themselves."""
    if not is_short(config):
        return dict(arrays)
    found: dict[str, Any] = {}
    for key, array in arrays.items():
        if not key.endswith(LOGITS):
            found[key] = array
            continue
        logits = np.asarray(array)
        places = np.argsort(-logits, axis=-1, stable=True)[..., : config.topk]
        largest = np.take_along_axis(logits, places, -1)
        weights = np.exp(largest - largest[..., :1])
        weights /= weights.sum(-1, keepdims=True)
        found[key + INDICES] = places.astype(_index_type(config.num_vectors))
        found[key + WEIGHTS] = np.ascontiguousarray(weights[..., :-1])
    return found


def lengthened(path: Path, tensors: Mapping[str, np.ndarray], config: Any) -> dict[str, np.ndarray]:
    """The inverse of `shortened`: logits of minus infinity but for the largest, whose weights they give.

    path: the file's, for messages. Raises ValueError if the adapter is to train, if the tensors' shapes are not those
    of the config, or if a place is beyond the bank.
    """
    short = [key.removesuffix(INDICES) for key in tensors if key.endswith(INDICES)]
    if not is_short(config) or not short:
        return dict(tensors)
    if not config.inference_mode:
        raise ValueError(
            f"{path} holds the {config.topk} largest logits of each piece alone (save_only_topk_weights=True), and the "
            "others are lost; expected is_trainable=False, or a file that was saved with save_only_topk_weights=False"
        )
    found = {key: tensor for key, tensor in tensors.items() if not key.endswith((INDICES, WEIGHTS))}
    for key in short:
        places, weights = tensors[key + INDICES].astype(np.int64), tensors.get(key + WEIGHTS)
        lead = places.shape[:-1]
        if weights is None or places.shape != (*lead, config.topk) or weights.shape != (*lead, config.topk - 1):
            given = "none" if weights is None else weights.shape
            raise ValueError(
                f"{path}: {key} has places {places.shape} and weights {given}; expected (..., {config.topk}) and "
                f"(..., {config.topk - 1}), as topk={config.topk}"
            )
        if places.size and not 0 <= places.min() <= places.max() < config.num_vectors:
            raise ValueError(
                f"{path}: {key}{INDICES} has places from {places.min()} to {places.max()}; expected those of a bank of "
                f"num_vectors={config.num_vectors}"
            )
        # The last weight is what is left of one; by rounding it may be less than nothing.
        last = np.maximum(1 - weights.sum(-1, keepdims=True, dtype=weights.dtype), 0)
        with np.errstate(divide="ignore"):
            largest = np.log(np.concatenate([weights, last], -1))
        logits = np.full((*lead, config.num_vectors), -np.inf, largest.dtype)
        np.put_along_axis(logits, places, largest, -1)
        found[key] = logits
    return found


def _index_type(count: int) -> Any:
    bounds = ((2**8, np.uint8), (2**15, np.int16), (2**31, np.int32))
    return next((dtype for bound, dtype in bounds if count < bound), np.int64)
