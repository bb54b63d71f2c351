"""A finished run is read whole, or refused with the file, line and key that is wrong."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cla_jax.reporting import load_run

RESULT = {
    "model": "tiny/MQA-CLA2",
    "parameters": 1_234_567,
    "kv_layers": 3,
    "kv_heads": 1,
    "head_dim": 32,
    "kv_bytes_per_token": 384,
    "steps": 3,
    "tokens": 300,
    "seconds": 61,
    "validation_loss": 1.85,
    "validation_perplexity": 6.36,
    "seed": 7,
    "a_later_key": [1, 2],
}


def record(step: int, **values: float) -> str:
    return json.dumps({"step": step, "tokens": 100 * step, **values})


METRICS = [
    record(1, loss=5.0, learning_rate=1e-3, gradient_norm=1.0, tokens_per_second=10.0),
    record(2, loss=4.0),
    record(2, validation_loss=4.1, validation_perplexity=60.0),
    record(3, loss=float("nan")),
]


def write(directory: Path, result: object = RESULT, metrics: list[str] | None = METRICS) -> Path:
    (directory / "result.json").write_text(json.dumps(result))
    if metrics is not None:
        (directory / "metrics.jsonl").write_text("\n".join(metrics) + "\n")
    return directory


def test_reads_results_and_curves(tmp_path: Path):
    run = load_run(write(tmp_path))
    assert (run.name, run.parameters, run.seed, run.directory) == (
        "tiny/MQA-CLA2",
        1_234_567,
        7,
        tmp_path,
    )
    assert isinstance(run.seconds, float)
    np.testing.assert_array_equal(run.training.tokens, [100, 200, 300])
    np.testing.assert_array_equal(run.training.loss, [5.0, 4.0, np.nan])
    np.testing.assert_array_equal(run.validation.steps, [2])
    np.testing.assert_array_equal(run.validation.loss, [4.1])


def test_depth_comes_from_the_result_or_the_registry(tmp_path: Path):
    assert load_run(write(tmp_path)).num_layers == 6
    assert load_run(tmp_path).shares_layers
    own = {**RESULT, "model": "mine", "num_layers": 3}
    assert not load_run(write(tmp_path, own)).shares_layers
    with pytest.raises(ValueError, match="missing key 'num_layers'"):
        load_run(write(tmp_path, {**RESULT, "model": "mine"}))


def test_a_step_logged_again_after_a_resume_counts_as_last_written(tmp_path: Path):
    lines = [record(1, loss=3.0), record(2, loss=2.0), record(2, loss=2.5), record(3, loss=1.0)]
    run = load_run(write(tmp_path, metrics=lines))
    np.testing.assert_array_equal(run.training.steps, [1, 2, 3])
    np.testing.assert_array_equal(run.training.loss, [3.0, 2.5, 1.0])


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([METRICS[0], '{"step": 2, "tok'], r"metrics\.jsonl, line 2: not valid JSON"),
        ([METRICS[0], "", "[1]"], r"metrics\.jsonl, line 3: expected a JSON object"),
        (['{"step": 1, "tokens": 2}'], r"line 1: neither 'loss'"),
        (['{"step": 1, "token": 2, "loss": 3}'], r"line 1: missing key 'tokens'.*'token'"),
        (['{"step": 1, "tokens": 2, "loss": "3"}'], r"line 1: loss is '3'; expected float"),
    ],
)
def test_names_the_bad_line(tmp_path: Path, lines: list[str], message: str):
    with pytest.raises(ValueError, match=message):
        load_run(write(tmp_path, metrics=lines))


def test_names_the_missing_file_and_key(tmp_path: Path):
    with pytest.raises(ValueError, match=r"result\.json is missing"):
        load_run(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"metrics\.jsonl is missing"):
        load_run(write(tmp_path, metrics=None))
    without = {key: value for key, value in RESULT.items() if key != "kv_heads"}
    with pytest.raises(ValueError, match=r"result\.json: missing key 'kv_heads'"):
        load_run(write(tmp_path, without))
    with pytest.raises(ValueError, match="steps is True; expected int"):
        load_run(write(tmp_path, {**RESULT, "steps": True}))
    with pytest.raises(ValueError, match="expected one JSON object, found list"):
        load_run(write(tmp_path, []))
    (tmp_path / "result.json").write_bytes(b"\xff{}")
    with pytest.raises(ValueError, match=r"result\.json: not valid JSON"):
        load_run(tmp_path)


def test_reading_runs_needs_no_matplotlib():
    code = "import sys, cla_jax.reporting; sys.exit('matplotlib' in sys.modules)"
    path = os.pathsep.join(filter(None, sys.path))
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": path})
