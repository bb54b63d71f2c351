"""Files and directories that appear complete or not at all, locks, and progress over long work."""

import contextlib
import json
import os
import shutil
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)


def check_free(directory: Path) -> None:
    """Whether `staged_directory` can make a directory without touching anything.

    Raises:
        ValueError: something is there, or it cannot be made there; names what is in the way.
    """
    for place in (directory, *directory.parents):
        if place.is_symlink() and not place.exists():
            raise ValueError(
                f"{place} is a link to {os.readlink(place)}, which is not there: choose another "
                "directory"
            )
    final = directory.resolve()
    if final.exists() and (not final.is_dir() or any(final.iterdir())):
        raise ValueError(
            f"{directory} exists already; nothing in it was touched: choose another directory"
        )
    # An empty directory is replaced: whoever stands in it would still see the old one.
    if final == Path.cwd():
        raise ValueError(f"{directory} is the working directory: name a new directory in it")
    if final.is_mount():
        raise ValueError(f"{directory} is a mount point: name a new directory in it")
    above = next(parent for parent in final.parents if parent.exists())
    if not above.is_dir():
        raise ValueError(f"{directory} cannot be made: {above} is a file")
    if not os.access(above, os.W_OK | os.X_OK):
        raise ValueError(f"{directory} cannot be made: {above} may not be written to")


@contextlib.contextmanager
def staged_directory(final: Path, *, keep_theirs: bool = False) -> Iterator[Path]:
    """A temporary sibling that becomes `final` in one rename if the block succeeds.

    If the block or the rename fails nothing is left (a process that is killed leaves the sibling).

    Args:
        final: must not exist yet, or be empty.
        keep_theirs: as in `publish`.

    Raises:
        OSError: as `publish`.
    """
    final = final.resolve()
    final.parent.mkdir(parents=True, exist_ok=True)
    staging = final.parent / f".{final.name}.{uuid.uuid4().hex[:8]}"
    staging.mkdir()
    try:
        yield staging
        publish(staging, final, keep_theirs=keep_theirs)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def publish(staging: Path, final: Path, *, keep_theirs: bool = False) -> None:
    """Renames a directory to its final name, all of it on disk first.

    Args:
        staging: the directory.
        final: its name; nothing is there, or an empty directory.
        keep_theirs: if another process made `final` meanwhile, it made the same: that is kept and
            ours removed.

    Raises:
        OSError: the rename failed.
    """
    for path in staging.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    try:
        staging.rename(final)
    except OSError:
        if not (keep_theirs and final.is_dir()):
            raise
        shutil.rmtree(staging, ignore_errors=True)


def write_json(path: Path, value: Any) -> None:
    """Writes a file of JSON in one rename; what stood there before stays if that fails."""
    write_bytes(path, (json.dumps(value, indent=2) + "\n").encode())


def append_json(path: Path, value: Any) -> None:
    """Adds a line of JSON to a file."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(value) + "\n")


def write_bytes(path: Path, data: bytes) -> None:
    """Writes a file in one rename; what stood there before stays if that fails."""
    staging = path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}"
    try:
        with staging.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        staging.replace(path)
    finally:
        staging.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """One process at a time in the block, for a directory; a killed process's lock is free."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(directory.parent / f".{directory.name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"waiting for another process that prepares {directory}", file=sys.stderr)
        lock.acquire()
    except NotImplementedError:
        print(f"{directory} lies where files cannot be locked: prepare it from one process only",
              file=sys.stderr)  # fmt: skip
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def byte_progress(description: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on standard error for work of `total` bytes; nothing when that is not a terminal.

    Yields the function that is told the bytes done so far.
    """
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as progress:
        task = progress.add_task(description, total=total)
        yield lambda done: progress.update(task, completed=done)
