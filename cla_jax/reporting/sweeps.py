"""Sweeps on disk: which experiment, and its runs, found under its directory."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from cla_jax import registry
from cla_jax.reporting.runs import Run, load_run

__all__ = ["Member", "SweepRecord", "load_sweep"]


@dataclasses.dataclass(frozen=True)
class Member:
    """A run of a sweep, finished or not.

    Attributes:
        directory: inside the sweep's.
        model: its name.
        learning_rate: peak.
        seed: of the parameters.
        run: what it left when it finished.
        diverged: it ended because the loss was not finite.
    """

    directory: str
    model: str
    learning_rate: float
    seed: int
    run: Run | None
    diverged: bool


@dataclasses.dataclass(frozen=True)
class SweepRecord:
    """A sweep's directory, read.

    Attributes:
        directory: where it lies.
        experiment: its name.
        options: what all runs share: sections `experiment` and `data`.
        members: in the registry's order of models, then by learning rate and seed.
    """

    directory: Path
    experiment: str
    options: dict[str, dict[str, Any]]
    members: tuple[Member, ...]

    @property
    def runs(self) -> tuple[Run, ...]:
        """The finished ones."""
        return tuple(member.run for member in self.members if member.run is not None)

    @property
    def scale(self) -> str:
        """Of the models."""
        return str(self.options["experiment"]["scale"])


def load_sweep(directory: str | os.PathLike[str]) -> SweepRecord:
    """Reads `sweep.json` and every run in `directory/MODEL/RUN`.

    Raises:
        ValueError: no sweep there, a file that is not as the sweep wrote it.
    """
    directory = Path(directory)
    path = directory / "sweep.json"
    try:
        record = json.loads(path.read_bytes())
        experiment, options = record["experiment"], record["options"]
        members = [
            _member(config.parent, directory) for config in directory.glob("*/*/config.json")
        ]
    except FileNotFoundError:
        raise ValueError(f"no sweep in {directory}: {path.name} is missing") from None
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path}, or a run's config.json, is damaged: {error!r}") from None
    order = {name: place for place, name in enumerate(registry.model_names())}
    members.sort(key=lambda m: (order.get(m.model, len(order)), m.model, m.learning_rate, m.seed))
    return SweepRecord(directory, experiment, options, tuple(members))


def _member(place: Path, directory: Path) -> Member:
    config = json.loads((place / "config.json").read_bytes())
    return Member(
        directory=place.relative_to(directory).as_posix(),
        model=config["model"]["name"],
        learning_rate=config["training"]["optimizer.learning_rate"],
        seed=config["training"]["seed"],
        run=load_run(place) if (place / "result.json").exists() else None,
        diverged=(place / "diverged.txt").exists(),
    )
