"""MLKV Figures 3, 5 and 6 from measurements on disk."""

import csv
import json

import numpy as np
import pytest

from cla_jax import model
from cla_jax.reporting.inference_costs import inference_costs, load_inference, variants
from cla_jax.reporting.report import report

CONTEXT = 2048


def points(name: str, per_row: float, largest: int) -> list[dict]:
    return [
        {
            "model": f"pythia-160m/{name}", "batch": batch, "largest_batch": largest,
            "weight_bytes": 10**8, "held_bytes": round(10**8 + 4096 + per_row * batch),
            "peak_bytes": round(11e7 + per_row * batch), "temporary_bytes": 10**6,
            "step_seconds": 0.01,
        }
        for batch in (largest // 2, 8, largest)
    ]  # fmt: skip


@pytest.fixture
def directory(tmp_path):
    row = model("pythia-160m/MHA").kv_bytes_per_token * CONTEXT
    record = {
        "options": {"length": 2000, "new_tokens": 48, "context": CONTEXT,
                    "cache_dtype": "bfloat16"},
        "device": "a GPU", "counted": "allocator", "memory": 10**10,
        "points": [*points("MLKV-1", 1.05 * row / 144, 900), *points("MHA", row, 100)],
    }  # fmt: skip
    (tmp_path / "inference.json").write_text(json.dumps(record))
    return tmp_path


def test_slopes_beside_the_formula(directory):
    [written] = report([directory])
    assert {p.name for p in written.files} == {
        "results.csv", "points.csv", "results.md", "inference.png", "inference.svg"
    }  # fmt: skip
    mha, mlkv = csv.DictReader((directory / "results.csv").read_text().splitlines())
    assert mha["expected_row_bytes"] == str(36_864 * CONTEXT)
    assert (mha["deviation"], mlkv["deviation"]) == ("-0.000", "5.000") or (
        mha["deviation"], mlkv["deviation"]) == ("0.000", "5.000")  # fmt: skip
    assert (mha["paper_largest"], mlkv["paper_largest"]) == ("48", "1100")
    assert (mha["rate_8"], mlkv["rate_8"]) == ("800", "800")
    assert (mha["best_rate"], mlkv["best_rate"]) == ("10000", "90000")
    assert mha["workspace_mib"] == f"{(10**7 - 4096) / 2**20:.1f}"
    assert len((directory / "points.csv").read_text().splitlines()) == 7


def test_the_figure_draws_both_up_to_the_limit(directory):
    upper, lower = inference_costs(variants(load_inference(directory))).axes
    lines = {line.get_label(): np.asarray(line.get_xdata()).tolist() for line in upper.lines}
    assert lines["MHA"] == [8, 50, 100]
    crosses = [line for line in upper.lines if line.get_marker() == "x"]
    assert [np.asarray(line.get_xdata()).tolist() for line in crosses] == [[100], [900]]
    assert np.asarray(lower.lines[0].get_ydata()).tolist() == [800, 5000, 10_000]


def test_a_single_batch_has_no_slope(directory):
    record = json.loads((directory / "inference.json").read_text())
    record["points"] = record["points"][:1]
    (directory / "inference.json").write_text(json.dumps(record))
    [row] = variants(load_inference(directory))
    assert row.deviation is None
    report([directory])
    assert "deviation" not in (directory / "results.md").read_text()


def test_a_model_that_the_registry_lacks_is_named(directory):
    text = (directory / "inference.json").read_text()
    (directory / "inference.json").write_text(text.replace("/MLKV-1", "/MLKV-7"))
    with pytest.raises(ValueError, match=r"inference\.json holds .*unknown model.*MLKV-7"):
        load_inference(directory)


@pytest.mark.parametrize(
    "text", ["[]", '{"points": 3}', '{"points": [{"model": "x"}]}', "{", '{"points": []}']
)
def test_refuses_what_it_did_not_write(tmp_path, text):
    (tmp_path / "inference.json").write_text(text)
    with pytest.raises(ValueError, match=r"inference\.json holds no measurements"):
        report([tmp_path])
