"""Several devices against one: a run at a tiny size, what is refused, ratios of known times."""

import dataclasses

import pytest

from cla_jax.reporting.csv_records import append_record, read_records
from cla_jax.reporting.many_devices import DeviceMeasurement, compared, report
from tests.experiments.processes import run, table
from tests.experiments.test_throughput import experiment

EXPERIMENT = "benchmarks/many_devices"
TINY = (
    "--model", "tiny/MQA", "--rows", "4", "--sequence-length", "32", "--microbatches", "4",
    "--batch", "4", "--context", "64", "--steps", "1", "--out", "found.csv",
)  # fmt: skip


@pytest.mark.slow
def test_measures_and_goes_on(tmp_path):
    code, out, err = run(EXPERIMENT, *TINY, "--only", "decode", "links", cwd=tmp_path)
    assert code == 0, err
    rows = table(tmp_path / "found.csv")
    assert [(row["part"], row["mesh"]) for row in rows] == [
        ("links", "data=2"), ("links", "data=2"), ("decode", "none"), ("decode", "tensor=2"),
        ("decode", "data=2"),
    ]  # fmt: skip
    whole, *halves = [float(row["cache_bytes"]) for row in rows[2:]]
    assert halves == [whole / 2, whole / 2]
    assert max(float(row["logits_error"]) for row in rows[2:]) < 2e-2
    code, out, err = run(EXPERIMENT, *TINY, cwd=tmp_path)
    assert code == 0, err
    assert table(tmp_path / "found.csv")[:5] == rows  # not measured again
    rows = table(tmp_path / "found.csv")[5:]
    assert [(row["part"], row["mesh"], row["rows"]) for row in rows] == [
        ("train", "none", "4"), ("train", "data=2", "8"), ("train", "fsdp=2", "8"),
        ("pipeline", "stage=2", "8"), ("split", "data=2", "4"), ("split", "fsdp=2", "4"),
    ]  # fmt: skip
    _, *same, _, _ = [float(row["loss"] or 0) for row in rows]
    assert same == pytest.approx([same[0]] * 3, rel=1e-3)
    assert (tmp_path / "found.md").read_text() in out
    assert "bubble" in out
    code, out, err = run(EXPERIMENT, *TINY, "--deadline", "0", "--rows", "2", cwd=tmp_path)
    assert code == 0, err
    assert "not begun, the deadline" in out
    assert len(table(tmp_path / "found.csv")) == 11


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"devices": 9}, "--devices 9: there are 8"),
        ({"rows": 3, "microbatches": (3,)}, "mesh data=2 splits rows by 2"),
        ({"rows": 0}, "--rows 0: expected 1 or more"),
        ({"batch": 3}, "--batch 3 .* the nearest is 4"),
        ({"context": 16}, "--context 16: expected more than 32"),
        ({"model": "tiny/MQA-CLA2"}, "stage"),
        ({"microbatches": (3,)}, "pipeline_microbatches=3"),
    ],
)
def test_refuses_before_any_work(changes, message, tmp_path):
    module = experiment(f"{EXPERIMENT}.py")
    given = {"model": "tiny/MQA", "rows": 4, "sequence_length": 32, "microbatches": (4,)}
    with pytest.raises(ValueError, match=message):
        module.main(module.Benchmark(out=tmp_path / "out.csv", **(given | changes)))
    assert not any(tmp_path.iterdir())


def test_another_machines_measurements_are_not_added_to(tmp_path):
    module = experiment(f"{EXPERIMENT}.py")
    append_record(tmp_path / "found.csv", ALONE)
    with pytest.raises(ValueError, match=r"was measured on H200, jax 0\.11\.2, this is cpu"):
        module.Session(module.Benchmark(out=tmp_path / "found.csv"))


ALONE = DeviceMeasurement(
    part="train", model="1B/H128-MQA-CLA2", mesh="none", devices=1, rows=16, length=2048,
    remat="none", seconds=0.5, fastest=0.5, slowest=0.6, rate=1000.0, device="H200", jax="0.11.2",
)  # fmt: skip


def test_ratios_and_ideals_from_known_rates(tmp_path):
    many = dataclasses.replace(ALONE, devices=2, rows=32, mesh="data=2", rate=1950.0)
    stages = dataclasses.replace(many, part="pipeline", mesh="stage=2", microbatches=8, rate=1710.0)
    link = dataclasses.replace(many, part="links", length=2**28, seconds=0.004, rate=2.7e11)
    found = [ALONE, many, dataclasses.replace(stages, remat="full"), stages, link]
    rows = compared(found)
    assert [row.ratio for row in rows] == [None, 1.95, None, 1.71]
    # As docs/architecture.md says; what one device rematerialises too makes the bubble weigh more.
    assert rows[3].ideal == pytest.approx(1.80, abs=0.005)
    assert rows[3].of_ideal == pytest.approx(0.95, abs=0.005)
    assert rows[2].ideal == pytest.approx(1.79, abs=0.005)
    said = report(found)
    assert "bubble 10.1%" in said
    assert "rematerialisation 20.7%" in said
    assert "1,024.00 MiB over 2 devices: 4,000.0 us, 270.0 GB/s" in said
    for one in found:
        append_record(tmp_path / "found.csv", one)
    assert read_records(tmp_path / "found.csv", DeviceMeasurement) == found
