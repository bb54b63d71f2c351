"""Where metrics go beside the run's own log: TensorBoard, Weights & Biases."""

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cla_jax.configs import Tracker

type Track = Callable[[dict[str, Any]], None]

_PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb"}


def open_trackers(names: Sequence[Tracker], directory: Path) -> list[Track]:
    """A function for each tracker, which takes a metrics record.

    Nothing is opened before the first record, so a run that is refused leaves no trace.

    Args:
        names: the trackers.
        directory: of the run.

    Raises:
        ValueError: a tracker whose package is not installed.
    """
    for name in names:
        try:
            importlib.import_module(_PACKAGES[name])
        except ImportError:
            raise ValueError(
                f"tracker {name!r} needs a package that is not installed: "
                f"pip install {_PACKAGES[name]} (or train without it)"
            ) from None
    openers = {"tensorboard": _tensorboard, "wandb": _wandb}
    return [openers[name](directory) for name in names]


def _tensorboard(directory: Path) -> Track:
    writer: Any = None

    def track(record: dict[str, Any]) -> None:
        nonlocal writer
        if writer is None:
            writer = importlib.import_module("tensorboardX").SummaryWriter(
                str(directory / "tensorboard")
            )
        for name, value in _values(record).items():
            writer.add_scalar(name, value, record["step"])
        writer.flush()

    return track


def _wandb(directory: Path) -> Track:
    run: Any = None

    def track(record: dict[str, Any]) -> None:
        nonlocal run
        if run is None:
            # The directory names the run, so a resumed one goes on in the same place.
            run = importlib.import_module("wandb").init(
                project="cla-jax", id=directory.name, name=directory.name, resume="allow"
            )
        run.log(_values(record), step=record["step"])

    return track


def _values(record: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in record.items() if name != "step"}
