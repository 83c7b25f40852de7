"""examples/05_pod_training.py as a user runs it: preempted after some steps, and run again to the end."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jpeft
from jpeft_interop import load_pretrained
from jpeft_interop.models import FlaxAutoModelForCausalLM

EXAMPLE = Path(__file__).parents[2] / "examples" / "05_pod_training.py"
LONGEST = 240
"""Seconds after which a run counts as hanging; one takes about ten where nothing else runs."""


def started(out: Path, log: Path, steps: int) -> subprocess.Popen:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    environment = {
        **inherited,
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_COMPILATION_CACHE_DIR": os.environ.get("JAX_COMPILATION_CACHE_DIR", str(out.parent / "compiled")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "XLA_FLAGS": "",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    command = [sys.executable, "-W", "error", str(EXAMPLE), "--out", str(out), "--steps", str(steps)]
    with open(log, "w") as file:
        return subprocess.Popen([*command, "--every", "1000000"], stdout=file, stderr=file, env=environment)


def ended(process: subprocess.Popen, log: Path) -> str:
    try:
        process.wait(timeout=LONGEST)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0, log.read_text()
    return log.read_text()


def test_preempted_and_run_again(tmp_path):
    out, log = tmp_path / "out", tmp_path / "log"
    process, patience = started(out, log, steps=1_000_000), time.monotonic() + LONGEST
    while "loss=" not in log.read_text() and process.poll() is None and time.monotonic() < patience:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    said = ended(process, log)
    (step,) = jpeft.Checkpointer(out / "checkpoints").steps
    assert f"preempted: saved at step {step}; run again to go on" in said
    assert not (out / "adapter").exists()

    said = ended(started(out, log, steps=step + 2), log)
    assert f"{step}/{step + 2}" in said and f"{step + 2}/{step + 2}" in said
    assert jpeft.Checkpointer(out / "checkpoints").steps == (step, step + 2)
    params = FlaxAutoModelForCausalLM.from_pretrained(out / "base").params
    assert jpeft.count_parameters(load_pretrained(params, out / "adapter", is_trainable=True))[0] > 0
