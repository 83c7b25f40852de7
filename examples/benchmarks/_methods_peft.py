"""The rows of `methods.py` in PyTorch PEFT."""

import copy
import tempfile
import warnings
from pathlib import Path
from typing import Any

import _torch_steps
import peft
import torch
from _methods_table import Method, config_of
from _models import Shape
from _steps import Step

# PEFT's SHiRA makes sparse tensors, of which PyTorch warns unless it has been told whether to check them.
torch.sparse.check_sparse_tensor_invariants.disable()


class Peft:
    """Adapters on copies of one Llama."""

    def __init__(self, shape: Shape, tokens: Any) -> None:
        self._base = _torch_steps.llama(shape).train()
        self._tokens = torch.tensor(tokens, dtype=torch.int64)

    def floor(self) -> Step:
        return _torch_steps.floor_step(copy.deepcopy(self._base), self._tokens)

    def measured(self, method: Method) -> tuple[Step, dict[str, Any]]:
        """(step, {"trains": parameters, "file": bytes})."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = peft.get_peft_model(copy.deepcopy(self._base), config_of(peft, method)).train()
            facts = {"trains": model.get_nb_trainable_parameters()[0], "file": _file_size(model)}
            name = method.peft_added
            added = None if name is None else lambda model: getattr(model.base_model, name)()
            return _torch_steps.step(model, self._tokens, added), facts


def _file_size(model: Any) -> int:
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return (Path(folder) / "adapter_model.safetensors").stat().st_size


def others(known: set[str]) -> list[str]:
    """The methods that PEFT has besides these."""
    return sorted(kind.value.lower() for kind in peft.PeftType if kind.value not in known)
