"""PyTorch PEFT's own opinion of an adapter's folder; the only file here that imports torch."""

import copy
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ._listed import listed
from ._topk import WEIGHTS as TOPK_WEIGHTS

# PEFT adds these to what it writes with bias="all"; it reports the second kind itself when it reads them.
_COPIES = (".original_module.", ".modules_to_save.")


def problems_in_torch(folder: Path, tensors: Mapping[str, np.ndarray], torch_model: Any) -> list[str]:
    """What goes wrong when PyTorch PEFT loads a folder into a copy of a model: nothing, if the list is empty.

    tensors: what the folder's file holds. Raises ImportError if torch or peft is not installed.
    """
    try:
        import peft
    except ImportError as error:
        raise ImportError("verify(directory, torch_model) needs PyTorch PEFT: pip install peft") from error
    model = copy.deepcopy(torch_model)
    before = _state(model)
    try:
        with warnings.catch_warnings():
            # It warns of missing keys, which are looked for below, and of much else.
            warnings.simplefilter("ignore")
            loaded = peft.PeftModel.from_pretrained(model, str(folder))
            there = peft.get_peft_model_state_dict(loaded, save_embedding_layers=False)
            config: Any = loaded.peft_config["default"]
            if config.peft_type == "ADALORA":
                # By which it would cut the ranks that are left once more.
                config.rank_pattern = None
            result = peft.set_peft_model_state_dict(loaded, peft.load_peft_weights(str(folder), device="cpu"))
    except (KeyError, RuntimeError, ValueError, TypeError) as error:
        return [f"PyTorch PEFT cannot load it: {type(error).__name__}: {error}"]
    return list(_differences(tensors, there, list(result.unexpected_keys), before))


def _arrived(key: str, array: np.ndarray, tensor: np.ndarray) -> bool:
    # PEFT keeps these weights as their logarithms, and rounds when it makes weights of them again.
    return np.allclose(array, tensor, atol=1e-6) if key.endswith(TOPK_WEIGHTS) else np.array_equal(array, tensor)


def _state(model: Any) -> dict[str, np.ndarray]:
    return {f"base_model.model.{name}": _array(tensor) for name, tensor in model.state_dict().items()}


def _array(tensor: Any) -> np.ndarray:
    return tensor.detach().float().cpu().numpy() if tensor.is_floating_point() else tensor.detach().cpu().numpy()


def _differences(
    tensors: Mapping[str, np.ndarray], there: Mapping[str, Any], unexpected: list[str], before: Mapping[str, np.ndarray]
) -> Iterator[str]:
    own = {key: tensor for key, tensor in there.items() if not any(copied in key for copied in _COPIES)}
    if missing := [key for key in own if key not in tensors]:
        yield f"PyTorch PEFT misses {listed(missing)}"
    if unexpected := [key for key in unexpected if ".modules_to_save." not in key]:
        yield f"PyTorch PEFT does not expect {listed(unexpected)}"
    arrived = {key: _array(own[key]) for key in own if key in tensors}
    lost = [key for key, array in arrived.items() if not _arrived(key, array, tensors[key].astype(array.dtype))]
    if lost:
        yield f"these did not arrive in the PyTorch model: {listed(lost)}"
    adapting = [key for key in arrived if ".lora_" in key and "B" in key.rpartition(".lora_")[2]]
    replacing = {key: before.get(key.replace(".base_layer.", ".")) for key in arrived if ".lora_" not in key}
    changed = [key for key, old in replacing.items() if old is None or not np.array_equal(arrived[key], old)]
    if not changed and not any(np.any(arrived[key]) for key in adapting):
        yield "in the PyTorch model the adapter changes nothing"
