"""Sweeps on disk: which experiment, and its runs, found under its directory."""

import dataclasses
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from cla_jax import registry
from cla_jax.reporting.runs import Run, load_run

__all__ = ["Member", "SweepRecord", "load_sweep", "side_by_side"]


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
    """A sweep's directory, read, or several that are parts of one.

    Attributes:
        directories: where it lies.
        experiment: its name.
        options: what all runs share: sections `experiment` and `data`.
        members: in the registry's order of models, then by learning rate and seed.
    """

    directories: tuple[Path, ...]
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
    return SweepRecord((directory,), experiment, options, _in_order(members))


def side_by_side(parts: Sequence[SweepRecord]) -> SweepRecord:
    """Parts of one sweep, trained in directories of their own, as one.

    A run that several parts hold, as when it was begun in one and finished in another, or copied,
    counts once.

    Raises:
        ValueError: they are of several experiments, they differ in what all runs share (names
            every setting that differs), or two finished ones of a run are not the same.
    """
    first, *others = parts
    for part in others:
        differs = [] if part.experiment == first.experiment else ["experiment"]
        for section in sorted({*first.options, *part.options}):
            ours, theirs = first.options.get(section, {}), part.options.get(section, {})
            differs += [
                f"{section}.{key}: {ours.get(key)!r} there, {theirs.get(key)!r} here"
                for key in sorted({*ours, *theirs})
                if ours.get(key) != theirs.get(key)
            ]
        if differs:
            raise ValueError(
                f"{part.directories[0]} is no part of the sweep in {first.directories[0]}: "
                f"{'; '.join(differs)}. Report on each without the other"
            )
    members = dict[str, Member]()
    for member in (member for part in parts for member in part.members):
        known = members.setdefault(member.directory, member)
        if member.run is not None and known.run is not None:
            _check_same(known.run, member.run)
        members[member.directory] = max(known, member, key=_progress)
    directories = tuple(directory for part in parts for directory in part.directories)
    return SweepRecord(directories, first.experiment, first.options, _in_order(members.values()))


def _in_order(members: Iterable[Member]) -> tuple[Member, ...]:
    order = {name: place for place, name in enumerate(registry.model_names())}
    return tuple(
        sorted(
            members,
            key=lambda m: (order.get(m.model, len(order)), m.model, m.learning_rate, m.seed),
        )
    )


def _progress(member: Member) -> tuple[bool, bool]:
    return member.run is not None, member.diverged


def _check_same(one: Run, two: Run) -> None:
    if (one.validation_loss, one.seconds) != (two.validation_loss, two.seconds):
        raise ValueError(
            f"{one.directory} and {two.directory} are two finished runs of one model, learning "
            "rate and seed: leave one out"
        )


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
