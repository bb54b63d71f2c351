"""Measurements as rows of a CSV file, one for each field of a dataclass, written as they come."""

import csv
import dataclasses
import os
import typing
from pathlib import Path
from typing import Any

__all__ = ["append_record", "read_records"]


def append_record(path: Path, record: Any) -> None:
    """Adds a dataclass's fields as a row, under a heading where the file is new.

    What is written is on the disk when this returns. None becomes an empty cell.
    """
    values = dataclasses.asdict(record)
    new = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if new:
            writer.writerow(values)
        writer.writerow("" if value is None else value for value in values.values())
        file.flush()
        os.fsync(file.fileno())


def read_records[R](path: Path, kind: type[R], what: str = "such measurements") -> list[R]:
    """The rows of a file that `append_record` wrote.

    Args:
        path: the file.
        kind: the dataclass; its fields are `str`, `int`, or `float`, which may be None.
        what: is read, for the message.

    Raises:
        ValueError: no such file, or it holds something else or nothing.
    """
    types = typing.get_type_hints(kind)

    def value(name: str, text: str) -> Any:
        if types[name] in (str, int):
            return types[name](text)
        return float(text) if text else None

    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = [
                kind(**{name: value(name, text) for name, text in record.items()})
                for record in csv.DictReader(file)
            ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} holds no {what}: {error!r}") from None
    if not rows:
        raise ValueError(f"{path} holds no row")
    return rows
