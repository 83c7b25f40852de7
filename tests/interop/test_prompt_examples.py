"""examples/03_prompt_tuning.py and 04_multitask.py as a user runs them, on a tiny model and for a few steps."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from jpeft_interop import load_config

EXAMPLES = Path(__file__).parents[2] / "examples"
LONGEST = 240
"""Seconds after which a run counts as hanging; one takes about ten where nothing else runs."""


def said(name: str, out: Path, *options: str) -> str:
    """What the example prints; it has to end well, without a warning."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    environment = {
        **inherited,
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_COMPILATION_CACHE_DIR": os.environ.get("JAX_COMPILATION_CACHE_DIR", str(out.parent / "compiled")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    command = [sys.executable, "-W", "error", str(EXAMPLES / name), "--tiny", "--out", str(out), *options]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=LONGEST)
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_prompt_tuning(tmp_path):
    told = said("03_prompt_tuning.py", tmp_path, "--steps", "2", "--tokens", "3")
    # Three rows of 16 numbers.
    assert " 48 of " in told and "held-out accuracy without a prompt: " in told
    for name in ("prompt-tuning", "p-tuning"):
        assert load_config(tmp_path / name).num_virtual_tokens == 3
        assert load_file(tmp_path / name / "adapter_model.safetensors")["prompt_embeddings"].shape == (3, 16)
    assert (tmp_path / "prompt_tuning.png").stat().st_size > 0


def test_multitask(tmp_path):
    told = said("04_multitask.py", tmp_path, "--steps", "2", "--new-steps", "2", "--tokens", "3")
    tensors = load_file(tmp_path / "multitask-prompt-tuning" / "adapter_model.safetensors")
    assert tensors["prefix_task_cols"].shape == (3, 3, 1) and load_config(tmp_path / "poly").n_tasks == 3
    for words in ("always one answer", "Poly, untrained", "(AVERAGE_SOURCE_TASKS)", "(EXACT_SOURCE_TASK)"):
        assert words in told
    assert (tmp_path / "multitask.png").stat().st_size > 0


@pytest.mark.parametrize("name", ["03_prompt_tuning.py", "04_multitask.py"])
def test_wrong_options(name, tmp_path):
    with pytest.raises(AssertionError, match="--tokens is 0; expected at least 1"):
        said(name, tmp_path, "--tokens", "0")
