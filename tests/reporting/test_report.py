"""`cla-jax report`: any directory's tables and figures, without training code."""

import csv
import subprocess
import sys

import pytest

from cla_jax.reporting.report import report

DESIGN = {"MQA/seed-0": ("tiny/MQA", 6.3, 0, 3e-3), "MHA/seed-0": ("tiny/MHA", 6.0, 0, 3e-3)}


def test_runs_are_compared_with_the_first(write_run, tmp_path):
    one = write_run(tmp_path / "one", "tiny/MQA-CLA2", 6.3)
    two = write_run(tmp_path / "two", "tiny/MQA", 6.0)
    [written] = report([one, two], tmp_path / "out")
    rows = list(csv.DictReader((tmp_path / "out/results.csv").read_text().splitlines()))
    assert [row["kv_cache_ratio"] for row in rows] == ["1.000", "2.000"]
    assert all(path.exists() for path in written.files)


def test_sweeps_write_into_themselves_or_side_by_side(write_sweep, tmp_path):
    sweeps = [write_sweep(tmp_path / name, "cla-design-space", DESIGN) for name in ("a", "b")]
    report(sweeps)
    assert (sweeps[0] / "results.csv").exists()
    report(sweeps, tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["a", "b"]
    report(sweeps[:1], tmp_path / "only")
    assert (tmp_path / "only/results.md").read_text() == (sweeps[0] / "results.md").read_text()


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
    sweeps = [write_sweep(tmp_path / n / "s", "cla-design-space", DESIGN) for n in ("a", "b")]
    with pytest.raises(ValueError, match="one name"):
        report(sweeps, tmp_path / "out")


def test_it_imports_no_training_code():
    code = (
        "import sys, cla_jax.reporting.report\n"
        "loaded = {m.partition('.')[0] for m in sys.modules} & {'jax', 'flax', 'grain'}\n"
        "assert not loaded, loaded"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
