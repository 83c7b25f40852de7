"""Checkpoints whose writing fails, is killed, or is asked for by the machine's owner."""

import os
import signal
import socket
import subprocess
import sys
from typing import Any

import jax.numpy as jnp
import optax
import pytest

import jpeft
from jpeft import LoraConfig
from tests.test_checkpoint import at, begun


def test_an_error_behind_the_loop_is_raised_and_the_checkpoint_before_stays(tmp_path, monkeypatch):
    rename = os.rename

    def full(source: Any, target: Any) -> None:
        if os.path.basename(target) == "2":
            raise OSError("no space left on device")
        rename(source, target)

    checkpoints = jpeft.Checkpointer(tmp_path)
    checkpoints.save(at(begun(), 1), {"batch": 1})
    checkpoints.wait()
    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", full)
        checkpoints.save(at(begun(), 2), {"batch": 2})
        with pytest.raises(OSError, match="no space left on device"):
            checkpoints.wait()
    with jpeft.Checkpointer(tmp_path) as again:
        assert again.steps == (1,) and again.restore(begun())[1] == {"batch": 1}
        assert again.save(at(begun(), 2), {"batch": 3}) and again.steps == (1, 2)


CHILD = """
import os, signal, sys
import jax, jax.numpy as jnp, optax
import jpeft

directory, port = sys.argv[1:]
jax.distributed.initialize(f"localhost:{port}", num_processes=1, process_id=0)
base = {"query": {"kernel": jnp.ones((4, 6))}}
wrapped = jpeft.wrap(base, jpeft.LoraConfig(r=2, target_modules=["query"]), rng=jax.random.key(0))
tx = optax.adam(1e-2)
apply = lambda params, x: x @ params["query"]["kernel"]
step = jpeft.make_train_step(apply, lambda apply, params, x: jnp.mean(apply(params, x) ** 2), tx)
state = jpeft.train_state(wrapped, tx)
checkpoints = jpeft.Checkpointer(directory, every=1000)
for number in range(1, 1000):
    state, _ = step(state, jnp.ones((2, 4)))
    saved = checkpoints.save(state, position={"batch": number}, step=number)
    ended = checkpoints.reached_preemption(number)
    assert saved == ended, (saved, ended, number)
    if ended:
        break
    if number == 3:
        os.kill(os.getpid(), signal.SIGTERM)
    if number > 3:
        import time; time.sleep(0.05)
checkpoints.wait()
print(number, flush=True)

rename = os.rename
def killed(source, target):
    if "tmp" in str(source) and os.path.basename(target) == str(number + 1):
        os.kill(os.getpid(), signal.SIGKILL)
    rename(source, target)
os.rename = killed
state, _ = step(state, jnp.ones((2, 4)))
checkpoints.save(state, force=True)
checkpoints.wait()
print("written", flush=True)
"""


def test_preempted_and_then_killed_in_the_midst_of_a_save(tmp_path):
    """SIGTERM makes the loop save and end at a step that `every` does not divide; SIGKILL leaves that checkpoint."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", CHILD, str(tmp_path), port]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == -signal.SIGKILL, done.stderr
    last = int(done.stdout)
    assert last > 3
    leftover = {path.name for path in tmp_path.iterdir()} - {str(last)}
    assert len(leftover) == 1 and leftover.pop().startswith(str(last + 1))

    base = {"query": {"kernel": jnp.ones((4, 6))}}
    template = begun(LoraConfig(r=2, target_modules=["query"]), optax.adam(1e-2), base=base)
    with jpeft.Checkpointer(tmp_path) as checkpoints:
        assert checkpoints.steps == (last,)
        state, position = checkpoints.restore(template)
        assert position == {"batch": last} and int(state.step) == int(state.opt_state[0].count) == last
        assert len(list(tmp_path.iterdir())) == 2, "what only reads leaves alone what another process may be writing"
        assert checkpoints.save(at(state, last + 2))
        checkpoints.wait()
        assert {path.name for path in tmp_path.iterdir()} == {str(last), str(last + 2)}
