"""Two processes of four devices each train as one, are killed, and go on: a pod in small, over the loopback."""

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import jpeft
import jpeft_interop
from jpeft_interop.models import FlaxAutoModelForCausalLM
from tests.interop import many_hosts_worker as worker

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

STEPS = 6
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
}
LONGEST = 180
"""Seconds after which a run counts as hanging; one takes about ten where nothing else runs."""


@dataclasses.dataclass(frozen=True)
class Told:
    """What one process told, and what it wrote on its standard output and error."""

    lines: list[dict[str, Any]]
    log: str

    def losses(self) -> dict[int, float]:
        """By step, to the last bit."""
        return {line["step"]: float.fromhex(line["loss"]) for line in self.lines if "loss" in line}

    def said(self, name: str) -> Any:
        found = [line[name] for line in self.lines if name in line]
        assert len(found) == 1, (name, self.lines, self.log)
        return found[0]


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return str(free.getsockname()[1])


def run(
    model: Path, out: Path, *, victim: int | None = None, killed: str = "", at: int = 0, steps: int = STEPS
) -> list[Told]:
    """Start the two processes and wait for them; if one is to kill itself, the other is killed when it has."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    environment = {
        **inherited,
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_COMPILATION_CACHE_DIR": os.environ.get("JAX_COMPILATION_CACHE_DIR", str(model.parent / "compiled")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "XLA_FLAGS": "",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    command = [sys.executable, "-W", "error", worker.__file__, "--port", free_port(), "--steps", str(steps)]
    command += ["--model", str(model), "--out", str(out)]
    facts = [out.with_name(f"{out.name}.{process}.jsonl") for process in range(2)]
    logs = [path.with_suffix(".log") for path in facts]
    both = victim is None or killed == "term"
    processes, late = [], False
    try:
        for process in range(2):
            own = ["--process", str(process), "--facts", str(facts[process])]
            own += ["--killed", killed, "--at", str(at)] if process == victim else []
            # To files, not pipes: nobody reads while a process waits for the other.
            with open(logs[process], "w") as log:
                processes.append(subprocess.Popen([*command, *own], stdout=log, stderr=log, env=environment))
        for process in processes if both else [processes[victim]]:
            process.wait(timeout=LONGEST)
    except subprocess.TimeoutExpired:
        late = True
    finally:
        for process in processes:
            process.kill()
            process.wait()
    errors = [path.read_text() for path in logs]
    codes = [process.returncode for process in processes]
    assert not late, f"not done after {LONGEST} s\n" + "\n".join(errors)
    assert codes == [0, 0] if both else codes[victim] == -signal.SIGKILL, "\n".join(errors)
    lines = [[json.loads(line) for line in path.read_text().splitlines()] for path in facts]
    return [Told(*told) for told in zip(lines, errors, strict=True)]


def single_device(folder: Path) -> tuple[Any, worker.Run, list[float]]:
    model = FlaxAutoModelForCausalLM.from_pretrained(folder)
    trained = worker.begun(model, None)
    state, losses = trained.state, []
    for number in range(STEPS):
        state, metrics = trained.step(state, trained.batch(number))
        losses.append(float(metrics["loss"]))
    return model, worker.begun(model, None), losses


def torch_logits(folder: Path, adapter: Path, ids: np.ndarray) -> np.ndarray:
    model = peft.PeftModel.from_pretrained(transformers.LlamaForCausalLM.from_pretrained(folder), adapter).eval()
    with torch.no_grad():
        return model(torch.from_numpy(ids)).logits.numpy()


def test_two_processes_train_as_one_and_go_on_after_any_death(tmp_path):
    folder = tmp_path / "model"
    FlaxAutoModelForCausalLM.from_config(
        {"model_type": "llama", "tie_word_embeddings": False, "initializer_range": 0.3, **SIZES}
    ).save_pretrained(folder)
    model, begun, losses = single_device(folder)

    # Undisturbed: the single device's losses; each process reads its part alone; one adapter, which PyTorch reads.
    whole = run(folder, tmp_path / "whole")
    undisturbed = whole[0].losses()
    assert whole[1].losses() == undisturbed
    np.testing.assert_allclose([undisturbed[step + 1] for step in range(STEPS)], losses, rtol=1e-5)
    assert losses[-1] < 0.95 * losses[0]
    for process in whole:
        assert process.said("read") == process.said("held") < 0.55 * process.said("whole")
        assert 0 < process.said("gathered") <= process.said("trained"), "the adapter is gathered and nothing else"
        assert process.said("reloaded")
        assert "config.json', which is a file; expected a folder" in process.said("refused")
    assert whole[1].said("refused").startswith("process 0, which writes for all, failed: ValueError: directory is")
    adapter = tmp_path / "whole" / "adapter"
    assert {path.name for path in adapter.iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    ids = np.random.default_rng(5).integers(1, SIZES["vocab_size"], (2, 7))
    loaded = jpeft_interop.load_pretrained(model.params, adapter)
    ours = np.asarray(jpeft.lift(model.apply)(loaded, ids).logits)
    theirs = torch_logits(folder, adapter, ids)
    np.testing.assert_allclose(ours, theirs, atol=1e-4 * np.abs(theirs).max())
    assert np.abs(ours - np.asarray(model.apply(model.params, ids).logits)).max() > 0.1

    # Killed in a step: what was saved before is there, for one device as well.
    out = tmp_path / "killed"
    kept, file = jpeft.Checkpointer(out / "checkpoints"), out / "adapter" / "adapter_model.safetensors"
    run(folder, out, victim=1, killed="step", at=4)
    assert kept.steps == (2,)
    early = file.read_bytes()
    state, position = kept.restore(begun.state)
    assert int(state.step) == 2 and position == {"batch": 1}
    of_file = jpeft_interop.load_pretrained(model.params, out / "adapter").adapters["default"].weights
    jax.tree.map(np.testing.assert_array_equal, of_file, state.params.adapters["default"].weights)
    alone = []
    for number in range(2, STEPS):
        state, metrics = begun.step(state, begun.batch(number))
        alone.append(float(metrics["loss"]))
    np.testing.assert_allclose(alone, losses[2:], rtol=1e-5)

    # Killed in the midst of writing a checkpoint: the one before counts, and leads to the same numbers to the bit.
    again = run(folder, out, victim=0, killed="checkpoint", at=4)
    assert again[0].said("first") == 2
    assert again[0].losses() == {step: undisturbed[step] for step in (3, 4)}
    assert kept.steps == (2,) and len(list((out / "checkpoints").iterdir())) == 2

    # Killed in the midst of writing the adapter: the old one is whole.
    again = run(folder, out, victim=0, killed="save")
    assert again[0].losses() == {step: undisturbed[step] for step in (3, 4, 5, 6)}
    assert kept.steps == (2, 4, 6) and {path.name for path in (out / "checkpoints").iterdir()} == {"2", "4", "6"}
    assert file.read_bytes() == early and len(list((out / "adapter").iterdir())) > 3
    jpeft_interop.load_pretrained(model.params, out / "adapter")

    # A notice to one of them: both save the same step and end, long before the last.
    told = run(folder, tmp_path / "preempted", victim=1, killed="term", at=2, steps=1000)
    step = told[0].said("preempted")
    assert told[1].said("preempted") == step and told[0].losses() == told[1].losses()
    assert max(told[0].losses()) == step == jpeft.Checkpointer(tmp_path / "preempted" / "checkpoints").latest

    # Nothing is left to train: the same adapter as that of the undisturbed run, to the bit.
    last = run(folder, out)
    assert not last[0].losses() and last[0].said("first") == STEPS
    written = {path.name: path.read_bytes() for path in (out / "adapter").iterdir()}
    assert written == {path.name: path.read_bytes() for path in adapter.iterdir()}
