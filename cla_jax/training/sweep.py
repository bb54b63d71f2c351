"""Sweeps: several runs that belong to one experiment, in a directory that can be taken up again.

A sweep's directory holds `sweep.json` (which experiment, with which options) and the runs, each in
a directory of its own. Nothing lists the runs: a report finds them, so a sweep may grow, and
several processes may fill one directory with different runs.
"""

import dataclasses
import gc
import json
import os
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from cla_jax.configs import ModelConfig, TrainConfig
from cla_jax.data.files import write_bytes, write_json
from cla_jax.data.token_stream import Streams
from cla_jax.training.checkpoints import check_identity
from cla_jax.training.initial import InitialParams
from cla_jax.training.trainer import check_run, train

__all__ = ["Entry", "Outcome", "Sweep", "failures"]


@dataclasses.dataclass(frozen=True)
class Entry:
    """One run of a sweep.

    Attributes:
        config: the model.
        training: the recipe.
        directory: of the run, inside the sweep's.
        initial: parameters that it begins with, instead of random ones.
    """

    config: ModelConfig
    training: TrainConfig
    directory: str
    initial: InitialParams | None = None

    @property
    def tokens(self) -> int:
        """Training tokens."""
        data = self.training.data
        return self.training.steps * data.batch_size * data.sequence_length


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of an entry: either a result or an error.

    Attributes:
        entry: the entry.
        result: what its `result.json` holds.
        error: why there is none, in one line.
        diverged: the loss was not finite. It would be so again: such a run is not tried again.
    """

    entry: Entry
    result: dict[str, Any] | None = None
    error: str | None = None
    diverged: bool = False


class Sweep:
    """A directory of runs of one experiment.

    Args:
        directory: the sweep's; made by the first `run`.
        experiment: its name, by which a report knows how to draw it.
        options: what all runs share, as JSON values by section; runs that differ in them would not
            be comparable.
        streams: prepared tokens.

    Raises:
        ValueError: the directory holds another experiment, or this one with other options (names
            every one that differs), or something else.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        experiment: str,
        options: Mapping[str, Mapping[str, Any]],
        streams: Streams,
    ) -> None:
        self.directory, self.streams = Path(directory), streams
        self._record = json.loads(json.dumps({"experiment": experiment, "options": dict(options)}))
        self._console = Console(file=sys.stderr)
        _check_directory(self.directory, self._record)

    def run(self, entries: Sequence[Entry], *, what: str = "model") -> list[Outcome]:
        """Train every entry in order: finished ones are skipped, interrupted ones resumed.

        An entry that fails is reported at once, and in its outcome, and the others still run. An
        interrupt (SIGTERM too, which saves) ends the sweep; the same call goes on where it was.

        Args:
            entries: what to train.
            what: an entry's name in the progress lines: "model 3 of 20".

        Raises:
            Interrupted: a signal stopped a run, which was saved.
            ValueError: an entry that `train` would refuse, or whose directory holds a run of
                another configuration; all are looked at before the first is trained.
        """
        for entry in entries:
            place = self.directory / entry.directory
            check_run(
                entry.config, entry.training, self.streams, place, initial=entry.initial,
                resume=True,
            )  # fmt: skip
        self.directory.mkdir(parents=True, exist_ok=True)
        if not (self.directory / "sweep.json").exists():
            write_json(self.directory / "sweep.json", self._record)

        outcomes, seconds, trained = list[Outcome](), 0.0, 0
        for number, entry in enumerate(entries, start=1):
            count = f" {number} of {len(entries)}" if len(entries) > 1 else ""
            heading = f"{what}{count}: {entry.directory}"
            outcome = self._known(entry)
            if outcome is not None:
                self._say(f"{heading}: {'finished' if outcome.error is None else outcome.error}")
            else:
                rest = [e for e in entries[number - 1 :] if self._known(e) is None]
                if trained:
                    left = sum(e.tokens for e in rest) * seconds / trained
                    heading += f"  (about {_duration(left)} left for {len(rest)})"
                self._say(heading)
                began = time.monotonic()
                outcome = self._train(entry)
                if outcome.error is None:
                    seconds += time.monotonic() - began
                    trained += entry.tokens
                else:
                    self._say(f"{entry.directory}: {outcome.error}")
            outcomes.append(outcome)
        return outcomes

    def _known(self, entry: Entry) -> Outcome | None:
        """The outcome of an entry that is done with."""
        place = self.directory / entry.directory
        if (place / "result.json").exists():
            return Outcome(entry, result=json.loads((place / "result.json").read_text("utf-8")))
        if (place / "diverged.txt").exists():
            error = (place / "diverged.txt").read_text("utf-8").strip()
            return Outcome(entry, error=error, diverged=True)
        return None

    def _train(self, entry: Entry) -> Outcome:
        place = self.directory / entry.directory
        try:
            trained = train(
                entry.config, entry.training, self.streams, place, initial=entry.initial,
                resume=True,
            )  # fmt: skip
            return Outcome(entry, result=trained.result)
        except FloatingPointError as error:
            message = f"diverged: {error}"
            write_bytes(place / "diverged.txt", f"{message}\n".encode())
            return Outcome(entry, error=message, diverged=True)
        except Exception as error:
            # Out of memory, a full disk or a bug: the other runs are not to blame.
            if not isinstance(error, (ValueError, OSError)):
                traceback.print_exc()
            first = (str(error).strip() or repr(error)).splitlines()[0]
            return Outcome(entry, error=f"{type(error).__name__}: {first}")
        finally:
            gc.collect()  # this run's arrays go before the next one's come

    def _say(self, line: str) -> None:
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)


def failures(outcomes: Sequence[Outcome]) -> int:
    """How many entries have no result; says which, on standard error."""
    failed = [outcome for outcome in outcomes if outcome.error is not None]
    if failed:
        print(f"{len(failed)} of {len(outcomes)} failed:", file=sys.stderr)
    for outcome in failed:
        print(f"  {outcome.entry.directory}: {outcome.error}", file=sys.stderr)
    return len(failed)


def _check_directory(directory: Path, record: dict[str, Any]) -> None:
    path = directory / "sweep.json"
    if not path.exists():
        if directory.is_dir() and (directory / "config.json").exists():
            raise ValueError(f"{directory} holds a run, not a sweep: choose another directory")
        return
    try:
        saved = json.loads(path.read_text("utf-8"))
        experiment, options = saved["experiment"], saved["options"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a sweep's: {error!r}") from None
    if experiment != record["experiment"]:
        raise ValueError(
            f"{directory} holds the experiment {experiment!r}, not {record['experiment']!r}: "
            "choose another directory"
        )
    check_identity(options, record["options"], f"the sweep in {directory}")


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
