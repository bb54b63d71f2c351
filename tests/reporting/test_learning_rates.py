"""Tables 3, 5 and 7 from runs on disk."""

import csv

import pytest

from cla_jax.reporting.learning_rates import learning_rates
from cla_jax.reporting.report import report
from cla_jax.reporting.sweeps import load_sweep
from cla_jax.reporting.tuning import format_rate, tuned

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
    assert (first.best.rate, first.best.perplexity) == (1e-3, pytest.approx(12.5))
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
        "results.csv", "runs.csv", "claims.csv", "results.md", "learning_rates.png",
        "learning_rates.svg", "loss.png", "loss.svg",
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


def climbs(write_sweep, directory, mqa, cla2, seeds=2):
    """Both models on one ladder; seeds 0.2 % apart."""
    runs = {
        f"{name}/lr-{format_rate(rate)}-seed-{seed}": (
            f"mini/{name}", perplexity and perplexity * (1 + 2e-3 * seed), seed, rate
        )
        for name, perplexities in (("H128-MQA", mqa), ("H128-MQA-CLA2", cla2))
        for rate, perplexity in zip((3e-4, 4.5e-4, 6.75e-4, 1e-3), perplexities, strict=False)
        for seed in range(seeds)
    }  # fmt: skip
    return write_sweep(directory, "cla-learning-rates", runs, table=3)


@pytest.mark.parametrize(
    ("mqa", "cla2", "verdict"),
    [
        ((50, 45, 47), (50, 48, 44, 46), "reproduced"),
        ((50, 48, 44, 46), (50, 45, 47), "contradicted"),
        ((50, 45, 47), (50, 45, 47), "contradicted"),
        ((50, 45.0, 44.9, 47), (50, 48, 44, 46), "within noise"),
    ],
)
def test_the_claim_on_rates_counts_every_rate_that_may_be_the_best(
    write_sweep, tmp_path, mqa, cla2, verdict
):
    directory = climbs(write_sweep, tmp_path / "lr", mqa, cla2)
    report([directory])
    text = (directory / "results.md").read_text()
    assert f"(section 3.2.2, 3.3): {verdict}. Best: H128-MQA-CLA2" in text
    assert "(the paper 2.25e-3)" in text
    assert "over all models and rates with several" in text
    assert "no finished run of H64-MQA, so nothing is said on H128-MQA-CLA2 against" in text


def test_seeds_are_averaged_and_one_that_diverged_spoils_its_rate(write_sweep, tmp_path):
    directory = climbs(write_sweep, tmp_path / "lr", (50, 45, 44), (50, 45, 47))
    (directory / "H128-MQA/lr-6.75e-4-seed-1/result.json").unlink()
    (directory / "H128-MQA/lr-6.75e-4-seed-1/diverged.txt").write_text("diverged\n")
    first, _ = tuned(load_sweep(directory).members, 3)
    assert [rung.rate for rung in first.rungs] == [3e-4, 4.5e-4, 6.75e-4]
    assert first.best.rate == 4.5e-4
    assert first.best.perplexity == pytest.approx(45 * 1.002**0.5)
    assert first.bracketed == "yes"


def test_what_keeps_the_claim_on_rates_open(write_sweep, tmp_path):
    one = climbs(write_sweep, tmp_path / "one", (50, 45, 47), (50, 45, 47), seeds=1)
    report([one])
    assert "no verdict, no rate has two seeds" in (one / "results.md").read_text()
    going = climbs(write_sweep, tmp_path / "going", (50, 45), (50, 45, 47))
    report([going])
    text = (going / "results.md").read_text()
    assert "no verdict, no higher rate was tried of H128-MQA." in text
    low = climbs(write_sweep, tmp_path / "low", (45, 47), (45, 47))
    report([low])
    text = (low / "results.md").read_text()
    assert "no verdict, no lower rate was tried of H128-MQA." in text
    alone = climbs(write_sweep, tmp_path / "alone", (), (50, 45, 47))
    report([alone])
    assert "left out, no finished run of H128-MQA." in (alone / "results.md").read_text()
