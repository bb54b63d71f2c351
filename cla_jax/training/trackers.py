"""Where metrics go beside the run's own log: TensorBoard, Weights & Biases."""

import hashlib
import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from cla_jax.configs import Tracker


@runtime_checkable
class OpenTracker(Protocol):
    """Takes metrics records."""

    def write(self, record: dict[str, Any]) -> None:
        """Take one; it has a `step`."""
        ...

    def close(self) -> None:
        """Bring to disk, or to the service, what it took."""
        ...


_PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb"}


def open_trackers(names: Sequence[Tracker], directory: Path) -> list[OpenTracker]:
    """The trackers by these names.

    Nothing is opened before the first record, so a run that is refused leaves no trace.

    Args:
        names: the trackers.
        directory: of the run.

    Raises:
        ValueError: a tracker whose package is not installed.
    """
    check_trackers(names)
    openers = {"tensorboard": _TensorBoard, "wandb": _WeightsAndBiases}
    return [openers[name](directory) for name in names]


def check_trackers(names: Sequence[Tracker]) -> None:
    """Whether their packages are installed.

    Raises:
        ValueError: one is not.
    """
    for name in names:
        try:
            importlib.import_module(_PACKAGES[name])
        except ImportError:
            raise ValueError(
                f"tracker {name!r} needs a package that is not installed: "
                f"pip install {_PACKAGES[name]} (or train without it)"
            ) from None


class Listener:
    """A function that is told every record, as a tracker."""

    def __init__(self, listen: Callable[[dict[str, Any]], None]) -> None:
        self._listen = listen

    def write(self, record: dict[str, Any]) -> None:
        """Tell it."""
        self._listen(record)

    def close(self) -> None:
        """There is nothing to bring to disk."""


class _TensorBoard:
    """Event files in `tensorboard/` of the run's directory."""

    def __init__(self, directory: Path) -> None:
        self._directory, self._writer = directory / "tensorboard", None

    def write(self, record: dict[str, Any]) -> None:
        if self._writer is None:
            module: Any = importlib.import_module("tensorboardX")
            self._writer = module.SummaryWriter(str(self._directory))
        for name, value in _values(record).items():
            self._writer.add_scalar(name, value, record["step"])

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class _WeightsAndBiases:
    """A run of the project cla-jax; its place names it, so a resumed one goes on there."""

    def __init__(self, directory: Path) -> None:
        place = hashlib.sha256(str(directory.absolute()).encode()).hexdigest()[:8]
        self._name, self._id, self._run = directory.name, f"{directory.name}-{place}", None

    def write(self, record: dict[str, Any]) -> None:
        if self._run is None:
            module: Any = importlib.import_module("wandb")
            self._run = module.init(project="cla-jax", id=self._id, name=self._name, resume="allow")
        self._run.log(_values(record), step=record["step"])

    def close(self) -> None:
        if self._run is not None:
            self._run.finish()


def _values(record: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in record.items() if name != "step"}
