"""Checkpoints of a training run, by Orbax: adapters, optimizer, step, key and the place in the data; never the base."""

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ._fingerprint import differences, fingerprint, listed
from ._params import PeftParams
from ._stored_arrays import flat, key_implementations, restored, stored, wanted
from ._train_state import TrainState
from ._wrap import checked_params

_ADAPTERS, _PROGRESS, _FINGERPRINT, _POSITION = "adapters", "progress", "fingerprint", "position"


class Checkpointer:
    """The checkpoints of one training run in a folder, written while training goes on.

    directory: made by the first save; with several processes a place that all of them see. Paths such as `gs://` are
    Orbax's. keep: how many checkpoints stay, the newest ones; None: all. every: `save` does nothing at steps that this
    does not divide. asynchronous: whether `save` returns once the arrays are copied and writes them behind the loop.

    A checkpoint holds the adapters, the optimizer's state, the step, the key and what the loop says of its place in
    the data. The base is not in it: `restore` puts the rest beside the base of the state that it is given, on that
    state's shardings, whatever mesh, number of devices or of processes it was written from. A checkpoint counts once it
    is whole; a run that is killed in the midst of a save finds the one before. All processes make all calls.

    Preemption: with `jax.distributed.initialize` (of one process, too) a SIGTERM, or what the cluster's plugin takes
    for one, is made known to all processes, which agree on the next step. There `save` saves whatever `every` is,
    and `reached_preemption` is true, so that the loop can end:

        for number in range(int(state.step) + 1, steps + 1):
            state, metrics = step(state, next(batches))
            checkpoints.save(state, position={"batch": number}, step=number)
            if checkpoints.reached_preemption(number):
                break

    Raises ImportError if Orbax is not installed, ValueError for numbers below 1 and for a directory that is a file.

    >>> import tempfile, jax.numpy as jnp, jpeft, optax
    >>> wrapped = jpeft.wrap({"query": {"kernel": jnp.ones((4, 6))}}, jpeft.LoraConfig(target_modules=["query"]))
    >>> state = jpeft.train_state(wrapped, optax.adam(1e-3))
    >>> with tempfile.TemporaryDirectory() as directory, Checkpointer(directory) as checkpoints:
    ...     print(checkpoints.restore(state)[1], checkpoints.save(state, position={"batch": 7}))
    ...     checkpoints.wait()
    ...     state, position = checkpoints.restore(state)
    None True
    >>> position
    {'batch': 7}
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        keep: int | None = 3,
        every: int = 1,
        asynchronous: bool = True,
    ) -> None:
        _orbax()
        for name, number in (("keep", keep), ("every", every)):
            if number is not None and number < 1:
                raise ValueError(f"{name} is {number}; expected at least 1" + (", or None" if name == "keep" else ""))
        self._directory = _absolute(directory)
        self._keep, self._every, self._asynchronous = keep, every, asynchronous
        self._manager: Any = None
        self._writes = False

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    @property
    def steps(self) -> tuple[int, ...]:
        """The steps of the checkpoints in the directory, in order; waits for one that is being written."""
        if self._manager is None and not _is_there(self._directory):
            return ()
        self.wait()
        manager = self._opened()
        manager.reload()
        return tuple(sorted(manager.all_steps()))

    @property
    def latest(self) -> int | None:
        """The step of the newest checkpoint; None if there is none."""
        return max(self.steps, default=None)

    def save(
        self,
        state: TrainState,
        position: Mapping[str, Any] | None = None,
        *,
        step: int | None = None,
        force: bool = False,
    ) -> bool:
        """Save a state if its step is due, and say whether; the state may be donated as soon as this returns.

        position: what the loop needs to find its place in the data again, as JSON. step: that of the state, from a loop
        that counts itself and does not want to wait for the device to hear it. force: whether to save in any case.
        A state that is saved already is not saved again. An error in writing a checkpoint is raised by the call after
        it: `save`, `wait` or `close`.
        Raises TypeError if `state` is no TrainState or `position` no JSON, ValueError if the step is not the state's
        or is below that of a checkpoint in the directory.
        """
        _check_state(state)
        written = _as_json(position)
        number = int(state.step) if step is None else step
        manager = self._opened(writes=True)
        latest = manager.latest_step()
        if latest is not None and number < latest:
            raise ValueError(
                f"the state is at step {number}, but {self._directory} holds a checkpoint of step {latest}: restore "
                "it, or give another directory to a run that begins anew"
            )
        due = force or number % self._every == 0 or manager.reached_preemption(number)
        if number == latest or not due:
            return False
        if number != int(state.step):
            raise ValueError(
                f"step is {number}, but the state is at step {int(state.step)}; expected that one, or None"
            )
        groups = {_ADAPTERS: flat(state.params.adapters), _PROGRESS: flat(_progress(state))}
        keys = {name: key_implementations(leaves) for name, leaves in groups.items()}
        described = {**fingerprint(state.params, groups), "keys": keys}
        args, arrays = _orbax().args, {name: stored(leaves) for name, leaves in groups.items()}
        return manager.save(
            number,
            args=args.Composite(
                **{name: args.StandardSave(own) for name, own in arrays.items() if own},
                **{_FINGERPRINT: args.JsonSave(described), _POSITION: args.JsonSave({_POSITION: written})},
            ),
            force=True,
        )

    def restore(self, state: TrainState, *, step: int | None = None) -> tuple[TrainState, Any]:
        """The newest checkpoint, or that of a step, as a state and the position saved with it.

        state: of the same model, config and optimizer, such as `jpeft.train_state` makes at the beginning; its arrays
        say by their shardings where the restored ones go, and may be `jax.ShapeDtypeStruct`s. Its base and context are
        taken over. If there is no checkpoint, the state itself and None are returned. A model is known by the paths,
        shapes and dtypes of its leaves, and by the config's base_model_name_or_path where both name one; not by values.
        Raises TypeError if `state` is no TrainState; ValueError if the checkpoint is of another model, config or
        optimizer, with what differs, or if there is none of that step.
        """
        _check_state(state)
        number = self._found(step)
        if number is None:
            return state, None
        progress = _progress(state)
        groups = {_ADAPTERS: state.params.adapters, _PROGRESS: progress}
        trees, position = self._read(number, state.params, groups)
        params = dataclasses.replace(state.params, adapters=trees[_ADAPTERS])
        return dataclasses.replace(state, params=params, **trees[_PROGRESS]), position

    def restore_params(self, wrapped: PeftParams, *, step: int | None = None) -> PeftParams:
        """The adapters of the newest checkpoint, or of that of a step, without what only training needs.

        wrapped: the base with adapters of the same config beside it, from `jpeft.wrap`; they may be abstract.
        Raises TypeError if it does not come from `wrap`; FileNotFoundError if there is no checkpoint; ValueError if
        the checkpoint is of another model or config, with what differs, or if there is none of that step.
        """
        checked_params(wrapped)
        number = self._found(step)
        if number is None:
            raise FileNotFoundError(f"{self._directory} holds no checkpoint; expected the directory of a Checkpointer")
        trees, _ = self._read(number, wrapped, {_ADAPTERS: wrapped.adapters})
        return dataclasses.replace(wrapped, adapters=trees[_ADAPTERS])

    def reached_preemption(self, step: int) -> bool:
        """Whether the processes are to end after this step. To be asked at every step, by all processes."""
        return self._opened(writes=True).reached_preemption(step)

    def wait(self) -> None:
        """Wait until what `save` began is on the disk; raises the error of a checkpoint that could not be written."""
        if self._manager is not None:
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait, and let go of the threads that write."""
        if self._manager is not None:
            self._manager.close()
        self._manager = None

    def _opened(self, writes: bool = False) -> Any:
        if self._manager is None or (writes and not self._writes):
            self.close()
            self._manager, self._writes = self._made(writes), writes
        return self._manager

    def _made(self, writes: bool) -> Any:
        """Orbax's manager. One that only reads leaves alone what another process may be writing."""
        ocp = _orbax()
        options = ocp.CheckpointManagerOptions(
            preservation_policy=None if self._keep is None else ocp.checkpoint_managers.LatestN(self._keep),
            create=writes,
            cleanup_tmp_directories=writes,
            enable_async_checkpointing=self._asynchronous,
        )
        items = (_ADAPTERS, _PROGRESS, _FINGERPRINT, _POSITION)
        return ocp.CheckpointManager(self._directory, options=options, item_names=items)

    def _found(self, step: int | None) -> int | None:
        steps = self.steps
        if step is not None and step not in steps:
            raise ValueError(f"{self._directory} holds no checkpoint of step {step}; there are those of steps {steps}")
        return max(steps, default=None) if step is None else step

    def _read(self, step: int, params: PeftParams, trees: Mapping[str, Any]) -> tuple[dict[str, Any], Any]:
        args, manager = _orbax().args, self._opened()
        said = args.Composite(**{name: args.JsonRestore() for name in (_FINGERPRINT, _POSITION)})
        found = manager.restore(step, args=said)
        saved = found[_FINGERPRINT]
        groups = {name: flat(tree) for name, tree in trees.items()}
        if differing := differences(saved, fingerprint(params, groups)):
            raise ValueError(
                f"the checkpoint of step {step} in {self._directory} is of another model, config or optimizer:\n"
                f"{listed(differing)}\nExpected a state as it was when the checkpoint was written, or another directory"
            )
        asked = {name: wanted(leaves) for name, leaves in groups.items()}
        asked = {name: args.StandardRestore(leaves) for name, leaves in asked.items() if leaves}
        arrays = manager.restore(step, args=args.Composite(**asked)) if asked else {}
        return {
            name: restored(tree, arrays[name] if name in asked else {}, saved["keys"][name])
            for name, tree in trees.items()
        }, found[_POSITION][_POSITION]


def _orbax() -> Any:
    try:
        import orbax.checkpoint
    except ImportError as error:
        raise ImportError(
            "jpeft.Checkpointer needs Orbax, which is not installed: pip install 'jpeft[checkpoint]', or "
            "pip install orbax-checkpoint"
        ) from error
    return orbax.checkpoint


def _absolute(directory: str | os.PathLike[str]) -> str:
    given = os.fspath(directory)
    if "://" in given:
        return given
    path = Path(os.path.abspath(os.path.expanduser(given)))
    if path.exists() and not path.is_dir():
        raise ValueError(f"directory is {given!r}, which is a file; expected a folder, or a path for a new one")
    return str(path)


def _is_there(directory: str) -> bool:
    return "://" in directory or Path(directory).is_dir()


def _progress(state: TrainState) -> dict[str, Any]:
    return {"opt_state": state.opt_state, "step": state.step, "rng": state.rng}


def _check_state(state: Any) -> None:
    if not isinstance(state, TrainState):
        raise TypeError(f"expected the TrainState that jpeft.train_state returns, not a {type(state).__name__}")


def _as_json(position: Any) -> Any:
    try:
        written = json.loads(json.dumps(position))
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"position is {position!r}, which is no JSON ({error}); expected a dict of names with numbers and texts, "
            'such as {"epoch": 1, "batch": 7}'
        ) from error
    return written
