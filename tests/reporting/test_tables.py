"""The three renderings of a comparison against what one would write by hand."""

import csv
import io
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from cla_jax.reporting import (
    COLUMNS,
    Column,
    Curve,
    Row,
    Run,
    comparison,
    csv_text,
    markdown,
    terminal_table,
)


def run(name: str, kv_layers: int, perplexity: float) -> Run:
    nothing = Curve(np.array([], np.int64), np.array([], np.int64), np.array([], np.float64))
    return Run(
        name=name, directory=Path(name), parameters=1_234_567, num_layers=6, kv_layers=kv_layers,
        kv_heads=1, head_dim=256, kv_bytes_per_token=1024 * kv_layers, steps=1, tokens=1,
        seconds=1.0, validation_loss=float(np.log(perplexity)), validation_perplexity=perplexity,
        seed=0, training=nothing, validation=nothing,
    )  # fmt: skip


BASELINE, SHARED = run("tiny/MQA", 6, 6.304), run("tiny/MQA-CLA2", 3, 6.367)
ROWS = comparison([BASELINE, SHARED], BASELINE)


def test_csv():
    assert csv_text(ROWS, COLUMNS) == (
        "model,parameters,kv_layers,kv_bytes_per_token,kv_cache_ratio,"
        "validation_perplexity,validation_perplexity_ratio\n"
        "tiny/MQA,1234567,6,6144,1.000,6.30,1.000\n"
        "tiny/MQA-CLA2,1234567,3,3072,0.500,6.37,1.010\n"
    )


def test_markdown():
    columns = [COLUMNS[0], COLUMNS[1], COLUMNS[5]]
    assert markdown(ROWS, columns) == (
        "| model         | parameters | validation perplexity |\n"
        "| ------------- | ---------: | --------------------: |\n"
        "| tiny/MQA      |    1234567 |                  6.30 |\n"
        "| tiny/MQA-CLA2 |    1234567 |                  6.37 |\n"
    )


def test_terminal_cuts_nothing_at_80_columns():
    console = Console(width=80, file=io.StringIO())
    console.print(terminal_table(ROWS, COLUMNS))
    last = console.file.getvalue().splitlines()[-1]  # type: ignore[attr-defined]
    assert last.split() == ["tiny/MQA-CLA2", "1,234,567", "3", "3,072", "0.500", "6.37", "1.010"]


def test_cells_survive_commas_pipes_and_brackets():
    odd = comparison([run("a,b|c[red]", 6, 6.0)], BASELINE)
    assert list(csv.reader(io.StringIO(csv_text(odd, COLUMNS))))[1][0] == "a,b|c[red]"
    assert r"a,b\|c[red]" in markdown(odd, COLUMNS)
    console = Console(width=120, file=io.StringIO())
    console.print(terminal_table(odd, COLUMNS))
    assert "a,b|c[red]" in console.file.getvalue()  # type: ignore[attr-defined]


def test_a_column_can_be_added_and_may_have_gaps():
    paper = {"tiny/MQA": 13.54}
    more: Column[Row] = Column(
        "paper_perplexity", "paper's", lambda row: paper.get(row.run.name), ".2f"
    )
    text = csv_text(ROWS, (*COLUMNS, more))
    assert [line.rsplit(",", 1)[1] for line in text.splitlines()] == [
        "paper_perplexity",
        "13.54",
        "",
    ]


def test_nothing_to_compare():
    with pytest.raises(ValueError, match="no runs to compare"):
        comparison([], BASELINE)
