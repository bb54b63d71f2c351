"""Checkpoints with Orbax: the whole training state, with what it belongs to."""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp

from cla_jax.parallel.processes import first_says, loss_of_a_process
from cla_jax.training.step import Params, TrainState

# Batches once depended on the number of processes, and every run recorded it.
_NO_LONGER = {"process_count"}
FORCE_HINT = " (--force goes on with another recipe or other data, not with another model)"


class Restored(NamedTuple):
    """What a checkpoint held.

    Attributes:
        state: parameters, optimizer state and step.
        data: the data iterator's state.
    """

    state: TrainState
    data: dict[str, Any]


def _in_a_line(record: logging.LogRecord) -> bool:
    """Of what Orbax's thread could not write it logs a traceback; the next wait raises it again."""
    if record.threadName == "async_save":
        record.exc_info = None
    return True


class Checkpoints:
    """The checkpoints of one run; a context manager that waits for pending saves.

    A save is written beside the others and appears by a rename, so an interrupted one leaves those
    before it as they were.

    Args:
        directory: of the run's checkpoints.
        identity: what a checkpoint belongs to (architecture, data), as JSON values by section.
            Saved with every checkpoint and compared before one is restored.
        keep: how many of the newest to keep.
        force: restore one though its recipe or data were others.
    """

    def __init__(
        self,
        directory: Path,
        identity: dict[str, dict[str, Any]],
        *,
        keep: int = 2,
        force: bool = False,
    ) -> None:
        self.directory, self.identity, self._force = directory, identity, force
        logging.getLogger("absl").addFilter(_in_a_line)
        self._manager = ocp.CheckpointManager(
            directory.absolute(), options=ocp.CheckpointManagerOptions(max_to_keep=keep)
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # Waits for asynchronous saves; leaving without it ends the process with none on disk.
        if error is not None and loss_of_a_process(error):
            return  # a save waits for all processes
        if error is None:
            self.wait()
        with contextlib.suppress(Exception):  # said before, or less than what ends the run now
            self._manager.close()

    @property
    def latest_step(self) -> int | None:
        """Step of the newest checkpoint."""
        return self._manager.latest_step()

    def save(self, state: TrainState, data: dict[str, Any]) -> None:
        """Start saving; returns as soon as the arrays are copied.

        Raises:
            OSError: this save, or the one before, could not be written.
        """
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            data=ocp.args.JsonSave(data),
            identity=ocp.args.JsonSave(self.identity),
        )
        with self._saving():
            self._manager.save(int(state.step), args=args)

    def wait(self) -> None:
        """Until every save that was started is on disk.

        Raises:
            OSError: one could not be written; names the last whole checkpoint.
        """
        with self._saving():
            self._manager.wait_until_finished()

    def restore(self, like: TrainState) -> Restored | None:
        """The newest checkpoint, or None if there is none.

        Args:
            like: the state to restore into (`abstract_state`, or arrays): shapes, and where it is
                to lie, on any mesh, whichever it was saved from.

        Raises:
            ValueError: the checkpoint belongs to another architecture or other data (names every
                field that differs), or is damaged. Nothing is changed.
        """
        step = first_says(lambda: self.latest_step)
        if step is None:
            return None
        where = f"the checkpoint {self.directory / str(step)}"
        saved = self._items(step, where, identity=ocp.args.JsonRestore())["identity"]
        check_identity(saved, self.identity, where, force=self._force, hint=FORCE_HINT)
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        items = self._items(
            step,
            where,
            state=ocp.args.StandardRestore(abstract),
            data=ocp.args.JsonRestore(),
        )
        return Restored(items["state"], items["data"])

    def _items(self, step: int, where: str, **args: Any) -> Any:
        return _items(self._manager, step, where, **args)

    @contextlib.contextmanager
    def _saving(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            steps = sorted(self._manager.all_steps())
            raise OSError(
                f"could not save a checkpoint: {_first_line(error)} ... The last whole one is "
                f"{'none' if not steps else f'step {steps[-1]}'}; free space in {self.directory}, "
                "and the run goes on from there (--resume)"
            ) from None


def load_params(directory: Path, architecture: dict[str, Any], like: Params) -> tuple[int, Params]:
    """The step and the parameters of the newest checkpoint; nothing else of it is read.

    Args:
        directory: of the run's checkpoints; it is not written to.
        architecture: the checkpoint's, as JSON values.
        like: shapes of the parameters, perhaps with their shardings.

    Returns:
        The parameters lie where `like` says, by default on the first device.

    Raises:
        ValueError: no checkpoint, one of another architecture, or a damaged one.
    """
    options = ocp.CheckpointManagerOptions(create=False)
    nothing = ValueError(
        f"there is no checkpoint in {directory}: a run saves the first some time after its start"
    )
    if not directory.is_dir():
        raise nothing
    with ocp.CheckpointManager(directory.absolute(), options=options) as manager:
        step = manager.latest_step()
        if step is None:
            raise nothing
        where = f"the checkpoint {directory / str(step)}"
        saved = _items(manager, step, where, identity=ocp.args.JsonRestore())["identity"]
        wanted = {"model": architecture}
        check_identity({"model": saved.get("model", {})}, wanted, where)
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        abstract = {
            "params": jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding or here), like
            )
        }
        only = ocp.args.PyTreeRestore(
            abstract,
            restore_args=ocp.checkpoint_utils.construct_restore_args(abstract),
            partial_restore=True,  # the optimizer's state is twice as large
        )
        return step, _items(manager, step, where, state=only)["state"]["params"]


def _items(manager: ocp.CheckpointManager, step: int, where: str, **args: Any) -> Any:
    try:
        return manager.restore(step, args=ocp.args.Composite(**args))
    except Exception as error:  # TensorStore raises whatever it likes
        raise ValueError(
            f"{where} is damaged: {_first_line(error)} ... Move it away, and the one before it "
            "is taken"
        ) from None


def _first_line(error: Exception) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0][:300]


def check_identity(
    saved: dict[str, dict[str, Any]],
    wanted: dict[str, dict[str, Any]],
    where: str,
    *,
    force: bool = False,
    hint: str = "",
) -> None:
    """Compare what was saved with what is wanted.

    Args:
        saved: values by section.
        wanted: values by section.
        where: of what was saved, for the message.
        force: overlook every difference but the architecture's.
        hint: what else the message may advise.

    Raises:
        ValueError: names every field that differs, with both values.
    """
    differences = [
        f"{section}.{field}: {values.get(field)!r} there, {other.get(field)!r} here"
        for section in sorted(saved.keys() | wanted.keys())
        if section == "model" or not force
        for values, other in [(saved.get(section) or {}, wanted.get(section) or {})]
        for field in sorted((values.keys() | other.keys()) - _NO_LONGER)
        if values.get(field) != other.get(field)
    ]
    if differences:
        raise ValueError(
            f"{where} is of another configuration; give this run another directory, or the "
            f"configuration that it was made with{hint}. What differs:\n  "
            + "\n  ".join(differences)
        )
