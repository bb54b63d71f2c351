"""MLKV Table 2 from runs on disk, and its figure."""

import csv
import json
import math
import shutil

import numpy as np
import pytest

from cla_jax.reporting.report import report
from cla_jax.reporting.sweeps import load_sweep
from cla_jax.reporting.uptraining import load_source, uptrained, uptraining

SOURCE = {"name": "pythia-160m", "fingerprint": "f" * 64, "parameters": 162_322_944,
          "kv_heads": 144, "validation_loss": 2.5}  # fmt: skip


@pytest.fixture
def sweep(write_sweep, tmp_path):
    """Three variants, two of them with both merges, and the run of the source."""

    def write(scale="160m", names=("MQA-12", "MLKV-6", "GQA-48")):
        runs = {
            f"{name}/{merge}": (f"pythia-{scale}/{name}", math.exp(2.7 + 0.1 * n + 0.02 * m), 0,
                                6e-4)
            for n, name in enumerate(names)
            for m, merge in enumerate(("mean", "first")[: 1 + (n < 2)])
        }  # fmt: skip
        runs["MHA/source"] = (f"pythia-{scale}/MHA", math.exp(2.5), 0, 6e-4)
        directory = write_sweep(tmp_path / scale, "mlkv-uptrain", runs)
        (directory / "source.json").write_text(json.dumps(SOURCE))
        record = json.loads((directory / "sweep.json").read_text())
        record["options"]["experiment"]["scale"] = scale
        (directory / "sweep.json").write_text(json.dumps(record))
        for place in runs:
            if place != "MHA/source":
                metrics = directory / place / "metrics.jsonl"
                first = json.dumps({"step": 0, "tokens": 0, "validation_loss": 4.0})
                metrics.write_text(first + "\n" + metrics.read_text())
        return directory

    return write


def test_rows_beside_the_papers(sweep):
    directory = sweep()
    [written] = report([directory])
    assert {p.name for p in written.files} == {
        "results.csv", "results.md", "uptraining.png", "uptraining.svg", "loss.png", "loss.svg"
    }  # fmt: skip
    rows = list(csv.DictReader((directory / "results.csv").read_text().splitlines()))
    assert [r["model"] for r in rows] == [
        f"pythia-160m/{n}" for n in ("GQA-48", "MQA-12", "MLKV-6")
    ]
    assert [r["total_kv_heads"] for r in rows] == ["48", "12", "6"]
    assert [r["converted_mean"] for r in rows] == ["4.0000"] * 3
    assert [r["uptrained_mean"] for r in rows] == ["2.9000", "2.7000", "2.8000"]
    assert [r["uptrained_first"] for r in rows] == ["", "2.7200", "2.8200"]
    assert [r["paper_loss"] for r in rows] == ["2.7082", "2.7505", "2.8013"]
    assert [r["paper_accuracy"] for r in rows] == ["50.17", "49.43", "49.06"]
    assert [(r["rank"], r["paper_rank"]) for r in rows] == [("3", "1"), ("1", "2"), ("2", "3")]
    # The fixture's training loss is the last one plus 1 / step; the last 5 % are one of 20 records.
    assert rows[0]["training_mean"] == "2.9500"
    document = (directory / "results.md").read_text()
    assert "fell from its converted value in all 5 runs" in document
    assert "validation loss 2.5000" in document


def test_the_figure_has_our_panels_and_the_papers(sweep):
    rows = uptrained(load_sweep(sweep()))
    source = load_source(rows[0].run.directory.parents[1])
    before, after, papers = uptraining(rows, source).axes
    for axes in (before, after, papers):
        assert axes.get_xscale() == "log"
        assert list(axes.xaxis.get_major_locator()()) == [6, 12, 48, 144]
    ours = {
        tuple(np.asarray(line.get_xdata()).tolist()): np.asarray(line.get_ydata()).tolist()
        for line in after.lines
    }
    assert ours[(12, 48)] == pytest.approx([2.7, 2.9])
    assert [np.asarray(line.get_ydata()).tolist() for line in papers.lines] == [
        [2.7505, 2.7082],
        [2.8013],
    ]


def test_410m_has_accuracies_alone(sweep):
    directory = sweep("410m", ("MQA-24", "MLKV-8"))
    rows = uptrained(load_sweep(directory))
    assert [row.paper and row.paper.accuracy for row in rows] == [54.76, 53.21]
    report([directory])
    assert "paper's loss" not in (directory / "results.md").read_text()
    assert len(uptraining(rows, load_source(directory)).axes) == 2


def test_ranks_are_correlated_with_table_2(sweep):
    directory = sweep("mini", ("MQA-12", "MLKV-6", "GQA-48", "MLKV-4", "MLKV-2"))
    # Converted from means with losses 2.7, 2.8, ... in that order; by the fixture's second merge,
    # the first two have another, which does not count.
    report([directory])
    text = (directory / "results.md").read_text()
    assert "Table 2 (Spearman, 5 variants, heads merged by their mean): 0.70." in text


def test_parts_with_different_sources_are_refused(sweep, tmp_path):
    directory = sweep()
    other = shutil.copytree(directory, tmp_path / "other")
    report([directory, other], tmp_path / "out")
    (other / "source.json").write_text(json.dumps(SOURCE | {"fingerprint": "e" * 64}))
    with pytest.raises(ValueError, match=r"holds variants of pythia-160m .*eeee.* those of .*ffff"):
        report([directory, other], tmp_path / "out")


def test_what_did_not_fall_is_named(sweep):
    directory = sweep()
    for metrics in directory.glob("*/*/metrics.jsonl"):
        metrics.write_text(
            metrics.read_text().replace('"validation_loss": 4.0', '"validation_loss": 2.75')
        )
    report([directory])
    assert (
        "did not fall in 3 of 5 runs: GQA-48 (mean), MLKV-6 (mean), MLKV-6 (first)"
        in (directory / "results.md").read_text()
    )


def test_refusals(sweep):
    directory = sweep()
    metrics = directory / "MLKV-6/mean/metrics.jsonl"
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[1:]))
    with pytest.raises(ValueError, match="MLKV-6/mean was not begun with a converted model"):
        report([directory])
    (directory / "source.json").write_text('{"name": "x"}')
    with pytest.raises(ValueError, match=r"source\.json is no record of a source"):
        report([directory])
    (directory / "source.json").unlink()
    with pytest.raises(ValueError, match=r"source\.json is missing"):
        report([directory])
