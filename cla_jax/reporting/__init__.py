"""Reporting: every table and figure of every experiment, from finished runs.

`load_run` reads a run, `comparison` sets runs beside a baseline, and `csv_text`, `markdown` and
`terminal_table` render the same columns three ways. Figures are in `cla_jax.reporting.figures`,
which is imported by name: it alone needs matplotlib.
"""

from cla_jax.reporting.runs import Curve, Run, load_run
from cla_jax.reporting.tables import (
    COLUMNS,
    Column,
    Row,
    comparison,
    csv_text,
    markdown,
    terminal_table,
)

__all__ = [
    "COLUMNS",
    "Column",
    "Curve",
    "Row",
    "Run",
    "comparison",
    "csv_text",
    "load_run",
    "markdown",
    "terminal_table",
]
