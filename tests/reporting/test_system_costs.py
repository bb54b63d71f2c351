"""Section 2.3's table and figure from measurements on disk."""

import csv
import json

import pytest

from cla_jax import model
from cla_jax.reporting.report import report
from cla_jax.reporting.system_costs import cost_rows


def costs(name: str, seconds: float | None) -> dict:
    config = model(name)
    return {
        "model": name, "kv_bytes_per_token": config.kv_bytes_per_token,
        "parameters": config.parameters, "flops_per_token": config.flops_per_token(),
        "xla_flops_per_token": 1.1 * config.flops_per_token(), "state_bytes": 2**20,
        "temporary_bytes": 2**22, "peak_bytes": None, "step_seconds": seconds,
        "compile_seconds": 1.0, "device": "cpu",
    }  # fmt: skip


@pytest.mark.parametrize("seconds", [0.02, None])
def test_the_files(tmp_path, seconds):
    rows = [costs(name, seconds) for name in ("1B/H128-MQA", "1B/H128-MQA-CLA2")]
    options = {"batch_size": 4, "sequence_length": 32}
    saved = {"options": options, "costs": {row["model"]: row for row in rows}}
    (tmp_path / "costs.json").write_text(json.dumps(saved))
    [written] = report([tmp_path], tmp_path / "out")
    assert {path.name for path in written.files} == {
        "results.csv", "results.md", "system_costs.png", "system_costs.svg",
    }  # fmt: skip
    first, second = csv.DictReader((tmp_path / "out/results.csv").read_text().splitlines())
    assert (second["kv_bytes_per_token_ratio"], second["paper_kv_bytes"]) == ("0.500", "5120")
    assert first["peak_bytes"] == ""
    assert first["tokens_per_second"] == ("" if seconds is None else "6400")
    assert first["temporary_bytes"] == "4.0"


def test_refuses(tmp_path):
    with pytest.raises(ValueError, match="no costs"):
        cost_rows([], 1)
    (tmp_path / "costs.json").write_text('{"options": {}}')
    with pytest.raises(ValueError, match=r"costs\.json is damaged"):
        report([tmp_path])
