"""`cla-jax report`: any directory's tables and figures, without training code."""

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cla_jax.reporting.report import report

DESIGN = {"MQA/seed-0": ("tiny/MQA", 6.3, 0, 3e-3), "MHA/seed-0": ("tiny/MHA", 6.0, 0, 3e-3)}


def table(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


def test_runs_are_compared_with_the_first(write_run, tmp_path):
    one = write_run(tmp_path / "one", "tiny/MQA-CLA2", 6.3)
    two = write_run(tmp_path / "two", "tiny/MQA", 6.0)
    [written] = report([one, two], tmp_path / "out")
    rows = list(csv.DictReader((tmp_path / "out/results.csv").read_text().splitlines()))
    assert [row["kv_cache_ratio"] for row in rows] == ["1.000", "2.000"]
    assert all(path.exists() for path in written.files)


def test_sweeps_write_into_themselves_or_into_a_directory_each(write_sweep, tmp_path):
    one = write_sweep(tmp_path / "a", "cla-design-space", DESIGN)
    two = write_sweep(tmp_path / "b", "cla-learning-rates", DESIGN, table=3)
    report([one, two])
    assert (one / "results.csv").exists()
    assert (two / "runs.csv").exists()
    report([one, two], tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["a", "b"]
    report([one], tmp_path / "only")
    assert (tmp_path / "only/results.md").read_text() == (one / "results.md").read_text()


PARTS = (
    {"MQA/seed-0": ("tiny/MQA", 6.3, 0, 3e-3), "MQA-CLA2/seed-0": ("tiny/MQA-CLA2", 6.4, 0, 3e-3)},
    {"MHA/seed-0": ("tiny/MHA", 6.0, 0, 3e-3), "MQA/seed-1": ("tiny/MQA", 6.5, 1, 3e-3),
     "MQA-CLA2/seed-0": ("tiny/MQA-CLA2", None, 0, 3e-3)},  # begun here, finished there
)  # fmt: skip


def test_parts_of_a_sweep_are_reported_as_the_whole_would_be(write_sweep, tmp_path):
    """From `config.json`, `metrics.jsonl` and `result.json` alone: that is all the fixture has."""
    whole = write_sweep(tmp_path / "whole", "cla-design-space", PARTS[1] | PARTS[0])
    parts = [
        write_sweep(tmp_path / name, "cla-design-space", runs)
        for name, runs in zip(("one", "two"), PARTS, strict=True)
    ]
    report([whole], tmp_path / "expected")
    for order in (parts, parts[::-1]):
        [written] = report(order, tmp_path / "out")
        assert {path.name for path in (tmp_path / "out").iterdir()} == {
            path.name for path in written.files
        }
        for name in ("results.csv", "results.md", "runs.csv", "claims.csv", "design_space.png"):
            expected = (tmp_path / "expected" / name).read_bytes()
            assert (tmp_path / "out" / name).read_bytes() == expected, name
    assert not (parts[0] / "results.csv").exists()
    report(parts)  # without a directory for both, each on its own
    assert (parts[0] / "results.csv").read_text() != (parts[1] / "results.csv").read_text()


def test_what_differs_between_parts_is_named(write_sweep, tmp_path):
    one = write_sweep(tmp_path / "one", "cla-design-space", PARTS[0], learning_rate=3e-3)
    two = write_sweep(tmp_path / "two", "cla-design-space", PARTS[1], learning_rate=6e-4)
    record = json.loads((two / "sweep.json").read_text())
    record["options"]["data"]["tokens"] = "c" * 64
    (two / "sweep.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="is no part of the sweep in") as error:
        report([one, two], tmp_path / "out")
    for part in ("data.tokens: 'aaa", "'ccc", "experiment.learning_rate: 0.003 there, 0.0006 here"):
        assert part in str(error.value)
    assert "scale" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_run_that_two_parts_hold_must_be_one(write_sweep, tmp_path):
    one = write_sweep(tmp_path / "one", "cla-design-space", DESIGN)
    copied = shutil.copytree(one, tmp_path / "copied")
    report([one, copied], tmp_path / "out")
    [row] = [r for r in table(tmp_path / "out/results.csv") if r["model"] == "tiny/MQA"]
    assert row["seeds"] == "1"
    other = write_sweep(tmp_path / "two", "cla-design-space",
                        {"MQA/seed-0": ("tiny/MQA", 6.31, 0, 3e-3)})  # fmt: skip
    with pytest.raises(ValueError, match="two finished runs of one model, learning rate and seed"):
        report([one, other], tmp_path / "out")


def test_everything_is_read_before_anything_is_written(write_sweep, write_run, tmp_path):
    good = write_sweep(tmp_path / "a", "cla-design-space", DESIGN)
    strange = write_sweep(tmp_path / "b", "cla-other", DESIGN)
    unfinished = write_run(tmp_path / "c", "tiny/MQA", None)
    many = tmp_path / "many"
    write_run(many / "run", "tiny/MQA", 6.0)
    for bad, message in (
        (strange, "'cla-other' is unknown"),
        (unfinished, "has not finished"),
        (many, "give its runs instead"),
        (tmp_path / "none", "no such directory"),
        (tmp_path, "holds neither"),
    ):
        with pytest.raises(ValueError, match=message):
            report([good, bad], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="no directories"):
        report([])


def test_two_of_one_name_are_refused(write_sweep, tmp_path):
    sweeps = [
        write_sweep(tmp_path / experiment / "s", experiment, DESIGN, table=3)
        for experiment in ("cla-design-space", "cla-learning-rates")
    ]
    with pytest.raises(ValueError, match="one name"):
        report(sweeps, tmp_path / "out")


def test_it_imports_no_training_code():
    code = (
        "import sys, cla_jax.reporting.report\n"
        "loaded = {m.partition('.')[0] for m in sys.modules} & {'jax', 'flax', 'grain'}\n"
        "assert not loaded, loaded"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
