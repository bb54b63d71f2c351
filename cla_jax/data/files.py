"""Directories that appear complete or not at all, and progress over long work."""

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path

from rich.console import Console
from rich.progress import track


@contextlib.contextmanager
def staged_directory(final: Path) -> Iterator[Path]:
    """A temporary sibling that becomes `final` in one rename if the block succeeds.

    If the block fails nothing is left; if another process made `final` meanwhile, theirs is kept.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    staging = final.parent / f".{final.name}.{uuid.uuid4().hex[:8]}"
    staging.mkdir()
    try:
        yield staging
        for path in staging.rglob("*"):
            if path.is_file():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
        try:
            staging.rename(final)
        except OSError:
            if not final.is_dir():
                raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def progress[T](items: Iterable[T], description: str, total: int) -> Iterator[T]:
    """A bar on standard error while items are consumed; nothing when that is not a terminal."""
    console = Console(stderr=True)
    disable = not console.is_terminal
    yield from track(items, description, total, console=console, transient=True, disable=disable)
