"""Tables: rows of values, and one description of columns for CSV, Markdown and the terminal.

Numbers are rounded as the papers round them: perplexities to 2 decimals, ratios to 3. Only the
terminal groups thousands. `COLUMNS` are those of `comparison`; a table with one more has
`(*COLUMNS, Column(...))`.
"""

import csv
import dataclasses
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from rich.box import SIMPLE_HEAD
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from cla_jax.reporting.runs import Run

__all__ = [
    "COLUMNS",
    "Column",
    "Row",
    "Written",
    "comparison",
    "csv_text",
    "markdown",
    "terminal_table",
]


class Written(NamedTuple):
    """What a report wrote, and what it shows of it.

    Attributes:
        files: tables and figures.
        table: the table's main columns, and what else is shown on the terminal.
    """

    files: tuple[Path, ...]
    table: RenderableType


@dataclasses.dataclass(frozen=True, eq=False)
class Row:
    """A run beside the baseline.

    Attributes:
        run: the run.
        cache_ratio: its KV bytes per token over the baseline's.
        perplexity_ratio: its validation perplexity over the baseline's.
    """

    run: Run
    cache_ratio: float
    perplexity_ratio: float


@dataclasses.dataclass(frozen=True)
class Column[T]:
    """A column of a table whose rows are `T`.

    Attributes:
        key: heading in CSV.
        heading: heading for readers.
        value: what a row shows; `None` leaves the cell empty.
        spec: format specification of a number (`.2f`, `d`); `None` for text.
    """

    key: str
    heading: str
    value: Callable[[T], str | int | float | None]
    spec: str | None = None

    def cell(self, row: T, *, thousands: bool = False) -> str:
        """The cell's text, with thousands separators if asked."""
        value = self.value(row)
        if value is None:
            return ""
        if self.spec is None:
            return str(value)
        return format(value, f",{self.spec}" if thousands else self.spec)


COLUMNS: tuple[Column[Row], ...] = (
    Column("model", "model", lambda row: row.run.name),
    Column("parameters", "parameters", lambda row: row.run.parameters, "d"),
    Column("kv_layers", "KV layers", lambda row: row.run.kv_layers, "d"),
    Column(
        "kv_bytes_per_token",
        "KV bytes per token (16-bit)",
        lambda row: row.run.kv_bytes_per_token,
        "d",
    ),
    Column("kv_cache_ratio", "cache ratio", lambda row: row.cache_ratio, ".3f"),
    Column(
        "validation_perplexity",
        "validation perplexity",
        lambda row: row.run.validation_perplexity,
        ".2f",
    ),
    Column(
        "validation_perplexity_ratio",
        "perplexity ratio",
        lambda row: row.perplexity_ratio,
        ".3f",
    ),
)


def comparison(runs: Sequence[Run], baseline: Run) -> tuple[Row, ...]:
    """Each run beside `baseline`, in the order given; the baseline is a row only if among `runs`.

    Raises:
        ValueError: no runs.
    """
    if not runs:
        raise ValueError("no runs to compare: expected at least one")
    return tuple(
        Row(
            run,
            cache_ratio=run.kv_bytes_per_token / baseline.kv_bytes_per_token,
            perplexity_ratio=run.validation_perplexity / baseline.validation_perplexity,
        )
        for run in runs
    )


def csv_text[T](rows: Sequence[T], columns: Sequence[Column[T]]) -> str:
    """The table as CSV with a heading line."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([column.key for column in columns])
    writer.writerows([column.cell(row) for column in columns] for row in rows)
    return text.getvalue()


def markdown[T](rows: Sequence[T], columns: Sequence[Column[T]]) -> str:
    """The table as a Markdown table, aligned in its source too."""
    lines = [[column.heading for column in columns]]
    lines += [[column.cell(row).replace("|", r"\|") for column in columns] for row in rows]
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    right = [column.spec is not None for column in columns]
    rule = [
        "-" * (width - 1) + ":" if to_right else "-" * width
        for width, to_right in zip(widths, right, strict=True)
    ]
    padded = [
        [
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(cells, widths, right, strict=True)
        ]
        for cells in lines
    ]
    padded.insert(1, rule)
    return "".join(f"| {' | '.join(cells)} |\n" for cells in padded)


def terminal_table[T](
    rows: Sequence[T], columns: Sequence[Column[T]], *, title: str | None = None
) -> Table:
    """The table for `rich.print`, with thousands separators."""
    table = Table(title=title, box=SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for column in columns:
        if column.spec is None:
            table.add_column(column.heading, overflow="fold")
        else:
            # Headings break at their spaces; a number is never cut: text gives way first.
            cells = [column.cell(row, thousands=True) for row in rows]
            width = max(map(len, [*cells, *column.heading.split()]))
            table.add_column(column.heading, justify="right", width=width)
    for row in rows:
        table.add_row(*(Text(column.cell(row, thousands=True)) for column in columns))
    return table
