"""Metrics on disk (JSON lines) and on screen (progress)."""

import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from cla_jax.training.trackers import OpenTracker

_SECONDS_BETWEEN_LINES = 15.0


class MetricLog:
    """`metrics.jsonl`: one JSON object a line, appended and flushed as they come.

    Args:
        path: the file; None: nothing is written, as on every process but the first.
        resume_step: records after this step are dropped first: the run takes up there, and will
            write them again.
        trackers: get every record too.
    """

    def __init__(
        self, path: Path | None, resume_step: int = 0, trackers: Sequence[OpenTracker] = ()
    ) -> None:
        self._trackers = trackers
        self._file: Any = None
        self._last = dict[str, int]()
        if path is None:
            return
        kept = [r for r in read_metrics(path) if r["step"] <= resume_step]
        replacement = path.with_name(path.name + ".new")
        replacement.write_text("".join(json.dumps(r) + "\n" for r in kept), "utf-8")
        os.replace(replacement, path)
        self._file = path.open("a", encoding="utf-8")
        self._last = {name: record["step"] for record in kept for name in record}

    def last_step(self, name: str) -> int | None:
        """Step of the last record that holds a value of this name."""
        return self._last.get(name)

    def write(self, record: dict[str, Any]) -> None:
        """Append a record."""
        self._last |= dict.fromkeys(record, record["step"])
        if self._file is not None:
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
        for tracker in self._trackers:
            tracker.write(record)

    def __enter__(self) -> "MetricLog":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._file is not None:
            self._file.close()
        for tracker in self._trackers:
            tracker.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics file, none if there is no file.

    A last line without its newline, which a kill can leave, is not a record yet.
    """
    if not path.exists():
        return []
    *lines, _ = path.read_text("utf-8").split("\n")
    return [json.loads(line) for line in lines]


class TrainingProgress:
    """Steps, loss, tokens per second and time left; a bar on a terminal, lines elsewhere."""

    def __init__(self, name: str, steps: int, start: int, console: Console | None = None) -> None:
        self._name, self._steps = name, steps
        self._console = console or Console(file=sys.stderr)
        self._last_line, self._started, self._start = time.monotonic(), time.monotonic(), start
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task(name, total=steps, completed=start, status="compiling")

    def __enter__(self) -> "TrainingProgress":
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def update(self, step: int, loss: float, tokens_per_second: float, mfu: float | None) -> None:
        """Show the state after `step`."""
        status = f"loss {loss:.3f}  {_thousands(tokens_per_second)} tokens/s"
        if mfu is not None:
            status += f"  MFU {mfu:.1%}"
        self._bar.update(self._task, completed=step, status=status)
        now = time.monotonic()
        due = now - self._last_line > _SECONDS_BETWEEN_LINES or step == self._steps
        if due and not self._console.is_terminal:
            self._last_line = now
            left = (now - self._started) / max(step - self._start, 1) * (self._steps - step)
            self.say(f"{self._name}: step {step}/{self._steps}  {status}  {left:.0f} s left")

    def say(self, line: str) -> None:
        """Print a line without disturbing the bar."""
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)


def _thousands(value: float) -> str:
    return f"{value / 1000:.1f}k" if value >= 1000 else f"{value:.0f}"
