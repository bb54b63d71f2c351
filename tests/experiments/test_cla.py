"""The CLA experiments by their paths: smoke runs end to end, killed and taken up, and bad input."""

import json
import math
import shutil
import signal
from pathlib import Path

import pytest

from cla_jax.reporting.report import report
from tests.experiments.processes import (
    check_refused,
    kill_behind_a_checkpoint,
    run,
    start,
    table,
    wait_until,
)


def timeless(path: Path) -> list[dict[str, str]]:
    return [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in table(path)]


@pytest.mark.slow
def test_design_space_killed_and_taken_up_gives_the_same_table(text):
    options = ("--smoke", "--models", "MQA", "*CLA2", "--seeds", "0", "1", "--text", "my.txt")
    code, out, err = run("cla/design_space", *options, "--out", "straight", cwd=text)
    assert code == 0, err
    assert "wrote straight/design_space.svg" in out
    assert "model 4 of 4: MQA-CLA2/seed-1" in err
    rows = timeless(text / "straight/results.csv")
    assert [row["model"] for row in rows] == ["tiny/MQA", "tiny/MQA-CLA2"]
    assert [row["paper_perplexity"] for row in rows] == ["13.54", "13.60"]
    assert [row["seeds"] for row in rows] == ["2", "2"]

    with start("cla/design_space", *options, "--out", "killed", cwd=text) as process:
        # In the middle of the second run: its first checkpoint is there, its result is not.
        place = text / "killed/MQA-CLA2/seed-0"
        kill_behind_a_checkpoint(process, place)
    assert not (text / "killed/results.csv").exists()
    first = (text / "killed/MQA/seed-0/result.json").stat().st_mtime_ns
    code, _, err = run("cla/design_space", *options, "--out", "killed", cwd=text)
    assert code == 0, err
    assert "model 1 of 4: MQA/seed-0: finished" in err
    assert (text / "killed/MQA/seed-0/result.json").stat().st_mtime_ns == first
    assert timeless(text / "killed/results.csv") == rows

    # A part for each seed, and of each run the small files alone: reported as the whole.
    parts = [text / f"parts/{seed}" for seed in (0, 1)]
    for seed, part in enumerate(parts):
        drop = shutil.ignore_patterns("checkpoints", "data", "results.*", f"seed-{1 - seed}")
        shutil.copytree(text / "straight", part, ignore=drop)
    report(parts, text / "whole")
    assert table(text / "whole/results.csv") == table(text / "straight/results.csv")
    assert (text / "whole/results.md").read_text() == (text / "straight/results.md").read_text()
    assert {row["verdict"] for row in table(text / "whole/claims.csv")} != {""}


@pytest.mark.slow
def test_sigterm_saves_and_has_its_own_exit_code(text):
    options = ("--models", "MQA", "--tokens", "1e6", "--text", "my.txt", "--out", "stopped")
    with start("cla/design_space", *options, cwd=text) as process:
        metrics = text / "stopped/MQA/seed-0/metrics.jsonl"
        wait_until(lambda: metrics.exists() and metrics.stat().st_size > 0, process)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=600)
    assert process.returncode == 128 + signal.SIGTERM
    assert "design_space: stopped, SIGTERM: saved at step" in err
    assert "Traceback" not in err
    assert any((text / "stopped/MQA/seed-0/checkpoints").glob("*/commit_success.txt"))


@pytest.mark.slow
def test_learning_rates_climb_until_it_no_longer_improves(text):
    options = ("--smoke", "--models", "MQA", "--start", "0.05", "--seeds", "0", "1",
               "--text", "my.txt", "--out", "lr")  # fmt: skip
    code, _, err = run("cla/learning_rates", *options, cwd=text)
    assert code == 0, err
    rows = table(text / "lr/runs.csv")
    rates = {row["learning_rate"]: list[float]() for row in rows}
    for row in rows:
        rates[row["learning_rate"]].append(math.log(float(row["perplexity"] or "inf")))
    assert all(len(losses) == 2 for losses in rates.values())
    perplexities = [sum(losses) for losses in rates.values()]
    assert len(perplexities) > 1
    assert perplexities[-1] >= perplexities[-2]
    assert perplexities[:-1] == sorted(perplexities[:-1], reverse=True)
    [best] = table(text / "lr/results.csv")
    assert best["bracketed"] == "yes"
    assert best["paper_rate"] == "1.5e-3"


@pytest.mark.slow
def test_system_costs(tmp_path):
    code, out, err = run("cla/system_costs", "--smoke", "--out", "costs", cwd=tmp_path)
    assert code == 0, err
    assert "tiny/MQA-CLA2" in out
    saved = json.loads((tmp_path / "costs-smoke/costs.json").read_text())
    assert list(saved["costs"]) == ["tiny/MQA", "tiny/MQA-CLA2"]
    assert all(costs["step_seconds"] > 0 for costs in saved["costs"].values())


@pytest.mark.parametrize(
    ("experiment", "arguments", "code", "parts"),
    [
        ("design_space", ["--models", "H64-MQA"], 1, ["'H64-MQA'", "MHA, MQA, MQA-CLA2, MQA-CLA3"]),
        ("design_space", ["--scale", "mini"], 1, ["scale mini", "prepare-data", "--data DIR"]),
        ("design_space", ["--scale", "mini", "--text", "x"], 1, ["scale mini", "tiny"]),
        ("design_space", ["--scale", "3B"], 2, ["3B", "mini"]),
        ("design_space", ["--tokens", "100"], 1, ["tokens=100", "1024"]),
        ("design_space", ["--learning-rate", "0"], 1, ["learning_rate=0.0"]),
        ("design_space", ["--text", "none.txt"], 1, ["no such text file", "none.txt"]),
        ("design_space", ["--seeds"], 1, ["no seeds", "--seeds 0 1"]),
        ("learning_rates", ["--seeds", "3", "3"], 1, ["names a seed twice"]),
        ("learning_rates", ["--start", "-1"], 1, ["learning_rate=-1.0"]),
        ("system_costs", ["--models", "tiny/H64"], 1, ["'tiny/H64' names no model"]),
        ("system_costs", ["--repeats", "-1"], 1, ["repeats=-1"]),
    ],
)
def test_bad_options_are_one_line_and_write_nothing(tmp_path, experiment, arguments, code, parts):
    check_refused(f"cla/{experiment}", arguments, code, parts, tmp_path)
