"""Tables 3, 5 and 7 from runs on disk."""

import csv

import pytest

from cla_jax.reporting.learning_rates import format_rate, learning_rates, tuned
from cla_jax.reporting.report import report
from cla_jax.reporting.sweeps import load_sweep

RUNS = {
    "H128-MQA/lr-3e-4": ("1B/H128-MQA", 13.5, 0, 3e-4),
    "H128-MQA/lr-1e-3": ("1B/H128-MQA", 12.5, 0, 1e-3),
    "H128-MQA/lr-1.5e-3": ("1B/H128-MQA", 12.6, 0, 1.5e-3),
    "H64-MQA/lr-3e-4": ("1B/H64-MQA", 13.9, 0, 3e-4),
    "H64-MQA/lr-1e-3": ("1B/H64-MQA", None, 0, 1e-3),
}


@pytest.fixture
def directory(write_sweep, tmp_path):
    return write_sweep(tmp_path / "lr", "cla-learning-rates", RUNS, table=3)


@pytest.mark.parametrize(
    ("rate", "text"),
    [(3e-4, "3e-4"), (4.5e-4, "4.5e-4"), (1e-3, "1e-3"), (2.25e-3, "2.25e-3"), (1.0, "1e0"),
     (0.0338, "3.38e-2"), (9.99e-4, "9.99e-4")],
)  # fmt: skip
def test_format_rate(rate, text):
    assert format_rate(rate) == text


def test_best_and_whether_it_is_bracketed(directory):
    first, second = tuned(load_sweep(directory).members, 3)
    assert (first.best[0], first.best[1].validation_perplexity) == (1e-3, 12.5)
    assert (first.bracketed, second.bracketed) == ("yes", "not yet")
    assert first.paper is not None
    assert (first.paper.learning_rate, first.paper.perplexity) == (1.5e-3, 12.39)
    (directory / "H64-MQA/lr-1e-3/diverged.txt").write_text("diverged")
    _, second = tuned(load_sweep(directory).members, 3)
    assert second.bracketed == "yes"
    assert learning_rates([second]).axes[0].get_lines()  # one point and a cross


def test_the_files(directory, tmp_path):
    [written] = report([directory], tmp_path / "out")
    assert {path.name for path in written.files} == {
        "results.csv", "runs.csv", "results.md", "learning_rates.png", "learning_rates.svg",
        "loss.png", "loss.svg",
    }  # fmt: skip
    rows = list(csv.DictReader((tmp_path / "out/results.csv").read_text().splitlines()))
    assert [(row["best_rate"], row["paper_rate"], row["paper_wikitext"]) for row in rows] == [
        ("1e-3", "1.5e-3", "19.30"), ("3e-4", "2.25e-3", "20.00"),
    ]  # fmt: skip
    assert len((tmp_path / "out/runs.csv").read_text().splitlines()) == 5
    assert "Not finished: H64-MQA/lr-1e-3." in (tmp_path / "out/results.md").read_text()


def test_no_finished_run(write_sweep, tmp_path):
    runs = {"MQA/lr-1e-3": ("tiny/MQA", None, 0, 1e-3)}
    sweep = load_sweep(write_sweep(tmp_path / "s", "cla-learning-rates", runs, table=3))
    with pytest.raises(ValueError, match="no finished runs"):
        tuned(sweep.members, 3)
