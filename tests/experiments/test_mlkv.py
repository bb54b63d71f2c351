"""The MLKV experiments by their paths: smoke runs, killed and taken up, and bad input."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from cla_jax import model
from cla_jax.configs import ExecutionConfig
from cla_jax.conversion import HuggingFaceCheckpoint, save_huggingface
from cla_jax.training import Model
from cla_jax.training.metrics import read_metrics
from tests.experiments.processes import check_refused, kill_behind_a_checkpoint, run, start, table


def steps(directory: Path) -> list[int]:
    return [r["step"] for r in read_metrics(directory / "metrics.jsonl") if "loss" in r]


def source_at(directory: Path, name: str, seed: int) -> Path:
    """A model with random parameters as a Hugging Face directory."""
    params = Model(model(name), ExecutionConfig("float32")).init(seed)
    save_huggingface(
        HuggingFaceCheckpoint(model(name), jax.tree.map(np.asarray, params)), directory
    )
    return directory


@pytest.mark.slow
def test_uptrain_killed_and_taken_up_trains_its_own_source_once(text):
    options = ("--smoke", "--merge", "mean", "--text", "my.txt", "--out", "out", "--models")
    with start("mlkv/uptrain", *options, "MLKV-6", cwd=text) as process:
        place = text / "out/MLKV-6/mean"
        kill_behind_a_checkpoint(process, place)
    assert not (text / "out/results.csv").exists()
    trained = (text / "out/MHA/source/result.json").stat().st_mtime_ns
    code, out, err = run("mlkv/uptrain", *options, "MLKV-6", "MQA-12", cwd=text)
    assert code == 0, err
    assert "MHA/source: finished" in err
    assert "variant 2 of 2: MLKV-6/mean" in err
    assert (text / "out/MHA/source/result.json").stat().st_mtime_ns == trained
    assert steps(place) == [1, 2, 3, 4, 5, 6]
    assert "wrote out/uptraining.svg" in out
    rows = table(text / "out/results.csv")
    assert [(row["model"], row["total_kv_heads"], row["paper_loss"]) for row in rows] == [
        ("pythia-tiny/MQA-12", "12", "2.7505"), ("pythia-tiny/MLKV-6", "6", "2.8013")
    ]  # fmt: skip
    for row in rows:
        assert float(row["uptrained_mean"]) < float(row["converted_mean"])
        assert row["converted_first"] == ""
    source = json.loads((text / "out/source.json").read_text())
    finished = json.loads((text / "out/MHA/source/result.json").read_text())
    assert source["validation_loss"] == finished["validation_loss"]
    # Another source is another experiment.
    other = source_at(text / "other", "pythia-tiny/MHA", seed=1)
    before = sorted((text / "out").rglob("*"))
    code, _, err = run("mlkv/uptrain", *options, "MLKV-1", "--source", str(other), cwd=text)
    assert code == 1
    assert "holds variants of pythia-tiny/MHA" in err
    assert sorted((text / "out").rglob("*")) == before


@pytest.mark.slow
def test_uptrain_from_a_checkpoint(text):
    source = source_at(text / "pythia", "pythia-tiny/MHA", seed=0)
    (source / "tokenizer.json").write_text("{}")
    (source / "checksums.json").unlink()
    code, _, err = run(
        "mlkv/uptrain", "--smoke", "--source", str(source), "--merge", "first",
        "--models", "MLKV-1", "--text", "my.txt", "--out", "out", cwd=text,
    )  # fmt: skip
    assert code == 0, err
    assert "tokenizer 'bytes', which is not" in err
    assert not (text / "out/MHA").exists()
    assert json.loads((text / "out/source.json").read_text())["name"] == "pythia"
    [row] = table(text / "out/results.csv")
    assert row["parameters"] == str(model("pythia-tiny/MLKV-1").parameters)
    assert row["converted_mean"] == ""
    # A random model's first heads are as good as its others: conversion costs next to nothing.
    loss = json.loads((text / "out/source.json").read_text())["validation_loss"]
    assert float(row["converted_first"]) == pytest.approx(loss, abs=0.05)


@pytest.mark.slow
def test_inference_goes_on_and_its_memory_is_the_formulas(tmp_path):
    options = ("--smoke", "--out", "out", "--models")
    code, _, err = run("mlkv/inference", *options, "MLKV-6", cwd=tmp_path)
    assert code == 0, err
    measured = json.loads((tmp_path / "out/inference.json").read_text())
    dropped = measured["points"].pop()
    (tmp_path / "out/inference.json").write_text(json.dumps(measured))
    code, out, err = run("mlkv/inference", *options, "MLKV-6", cwd=tmp_path)
    assert code == 0, err
    again = json.loads((tmp_path / "out/inference.json").read_text())
    assert again["points"][:-1] == measured["points"]
    assert [p["batch"] for p in again["points"]][-1] == dropped["batch"]
    assert "wrote out/inference.svg" in out
    [row] = table(tmp_path / "out/results.csv")
    assert row["expected_row_bytes"] == str(model("pythia-tiny/MLKV-6").kv_bytes_per_token * 16)
    assert abs(float(row["deviation"])) < 2
    assert float(row["rate_8"]) > 0
    code, _, err = run("mlkv/inference", "--memory", "1MiB", "--out", "out", cwd=tmp_path)
    assert code == 1
    assert "options.context: 16 there, 256 here" in err


@pytest.mark.parametrize(
    ("experiment", "arguments", "code", "parts"),
    [
        ("uptrain", ["--models", "MLKV-7"], 1, ["'MLKV-7'", "nearest", "MLKV-6"]),
        ("uptrain", ["--models", "MHA"], 1, ["pythia-tiny/MHA is the source itself"]),
        ("uptrain", ["--merge", "median"], 2, ["median", "mean", "first"]),
        ("uptrain", ["--merge"], 1, ["--merge mean, first or both"]),
        ("uptrain", ["--scale", "160m"], 1, ["--source", "EleutherAI/pythia-160m-deduped"]),
        ("uptrain", ["--scale", "mini"], 1, ["scale mini", "prepare-data"]),
        ("uptrain", ["--scale", "410m", "--source", "x"], 1, ["scale 410m", "prepare-data"]),
        ("uptrain", ["--learning-rate", "0"], 1, ["learning_rate=0.0"]),
        ("uptrain", ["--tokens", "100"], 1, ["tokens=100", "512"]),
        ("inference", ["--models", "MLKV"], 1, ["'MLKV' names no model"]),
        ("inference", ["--length", "0"], 1, ["length=0"]),
        ("inference", ["--length", "250"], 1, ["more than the 256", "longest cache is 208"]),
        ("inference", ["--shares", "1.5"], 1, ["--shares 1.5"]),
        ("inference", ["--memory", "80Gb"], 1, ["'80Gb'", "GB"]),
    ],
)
def test_bad_options_are_one_line_and_write_nothing(tmp_path, experiment, arguments, code, parts):
    check_refused(f"mlkv/{experiment}", arguments, code, parts, tmp_path)


@pytest.mark.slow
def test_a_source_of_another_model_is_refused(text):
    wrong = source_at(text / "wrong", "pythia-tiny/MLKV-6", seed=0)
    for source, parts in {
        str(wrong): ["the source wrong is no pythia-tiny", "kv_heads=1, expected 12", "ffn_dim="],
        "nowhere": ["no directory nowhere", "OWNER/NAME"],
    }.items():
        code, _, err = run("mlkv/uptrain", "--source", source, "--text", "my.txt", "--out", "out",
                           cwd=text)  # fmt: skip
        assert code == 1
        assert all(part in err for part in parts), err
        assert len(err.splitlines()) == 1
        assert not (text / "out/sweep.json").exists()
