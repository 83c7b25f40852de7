"""The rows of `prompts.py` in PyTorch PEFT."""

import contextlib
import copy
import io
import tempfile
import warnings
from pathlib import Path
from typing import Any

import _torch_steps
import peft
import torch
from _models import Shape
from _prompts_table import EXPERTS, TASKS, Method, config_of, expert_of
from _steps import Step


class Peft:
    """Adapters on copies of one Llama."""

    def __init__(self, shape: Shape, tokens: Any) -> None:
        self._base = _torch_steps.llama(shape).train()
        self._shape, self._tokens = shape, torch.tensor(tokens, dtype=torch.int64)

    def floor(self) -> Step:
        return _torch_steps.floor_step(copy.deepcopy(self._base), self._tokens)

    def measured(self, method: Method) -> tuple[Step | None, dict[str, Any]]:
        """(step, {"trains": parameters, "file": bytes}); what PEFT cannot train has no step, and says "why"."""
        base = copy.deepcopy(self._base)
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), contextlib.ExitStack() as quiet:
            warnings.simplefilter("ignore")
            quiet.enter_context(contextlib.redirect_stdout(io.StringIO()))
            model = self._wrapped(base, method, Path(folder)).train()
            facts: dict[str, Any] = {"trains": _trains(model)}
            rows = self._tokens.shape[0]
            inputs = {"task_ids": torch.arange(rows) % TASKS} if method.by_task else {}
            try:
                model.save_pretrained(Path(folder) / "saved")
                facts["file"] = (Path(folder) / "saved" / "adapter_model.safetensors").stat().st_size
                return _torch_steps.step(model, self._tokens, **inputs), facts
            except Exception as error:  # A fault of PEFT's is a result.
                return None, {**facts, "why": f"fails: {type(error).__name__}: {str(error).splitlines()[0][:60]}"}

    def _wrapped(self, base: Any, method: Method, folder: Path) -> Any:
        if method.config != "XLoraConfig":
            return peft.get_peft_model(base, config_of(peft, method))
        for number in range(EXPERTS):
            expert = peft.get_peft_model(copy.deepcopy(base), expert_of(peft))
            expert.save_pretrained(folder / str(number))
        # PEFT computes with experts of these names alone.
        adapters = {str(number): str(folder / str(number)) for number in range(EXPERTS)}
        config = config_of(peft, method, hidden_size=self._shape.hidden, adapters=adapters)
        return peft.get_peft_model(base, config)


def _trains(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
