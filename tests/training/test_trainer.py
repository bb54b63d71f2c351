"""Whole runs: what they write, and that the seed decides."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cla_jax.configs import ModelConfig
from cla_jax.reporting import load_run
from cla_jax.training import train
from cla_jax.training.metrics import read_metrics
from tests.training.runs import CONFIG, TRAINING, numbers, same_run

pytestmark = pytest.mark.usefixtures("compile_once")


def test_run_directory(straight, streams):
    directory = straight.directory
    assert {p.name for p in directory.iterdir()} == {
        "config.json", "metrics.jsonl", "checkpoints", "result.json",
    }  # fmt: skip
    config = json.loads((directory / "config.json").read_text())
    assert ModelConfig.from_dict(config["model"]) == CONFIG
    assert config["training"]["optimizer.learning_rate"] == 2e-2
    assert config["data"]["tokens"] == streams.train.fingerprint
    assert config["versions"]["jax"] == jax.__version__
    assert config["attention"].startswith("xla: ")
    assert {p.name for p in (directory / "checkpoints").iterdir()} == {"8", "12"}
    assert json.loads((directory / "result.json").read_text()) == straight.result


def test_metrics(straight):
    records = read_metrics(straight.directory / "metrics.jsonl")
    training = [r for r in records if "loss" in r]
    assert [r["step"] for r in training] == list(range(1, 13))
    assert [r["tokens"] for r in training] == [64 * n for n in range(1, 13)]
    assert all(math.isfinite(v) for r in records for v in r.values())
    assert all(r["tokens_per_second"] > 0 and r["gradient_norm"] > 0 for r in training)
    # The rate that the step used: the first of one warm-up step is zero, the next the peak.
    rates = [r["learning_rate"] for r in training]
    assert rates[:2] == pytest.approx([0.0, 2e-2])
    assert rates[1:] == sorted(rates[1:], reverse=True)
    assert [r["step"] for r in records if "validation_loss" in r] == [3, 6, 9, 12]


def test_who_listens_hears_every_record_instead_of_the_progress(streams, tmp_path, capsys):
    heard = []
    training = dataclasses.replace(TRAINING, steps=4)
    train(CONFIG, training, streams, tmp_path / "run", on_record=heard.append)
    assert heard == read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [r["step"] for r in heard if "loss" in r] == [1, 2, 3, 4]
    assert [r["step"] for r in heard if "validation_loss" in r] == [3, 4]
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


def test_loss_falls(straight):
    losses = [r["loss"] for r in numbers(straight.directory) if "loss" in r]
    assert losses[0] == pytest.approx(math.log(257), abs=0.05)
    assert losses[-1] < 0.75 * losses[0]


def test_reporting_reads_the_run(straight):
    run = load_run(straight.directory)
    needed = {
        "model", "parameters", "kv_layers", "kv_heads", "head_dim", "kv_bytes_per_token", "steps",
        "tokens", "seconds", "validation_loss", "validation_perplexity", "seed",
    }  # fmt: skip
    assert needed <= straight.result.keys()
    assert straight.result["parameters"] == sum(x.size for x in jax.tree.leaves(straight.params))
    assert (straight.result["steps"], straight.result["tokens"]) == (12, 12 * 64)
    assert straight.result["seconds"] > 0
    # Not in the registry: its result alone says how deep it is.
    assert (run.num_layers, run.kv_layers) == (2, 1)
    assert (len(run.training), len(run.validation)) == (12, 4)


def test_validation_is_the_mean_over_every_token(straight, streams):
    tokens = streams.validation.tokens.astype(np.int32)
    decoder, T = straight.model(straight.params), 16
    forward = jax.jit(lambda d, x: d(x))
    whole = (len(tokens) - 1) // T
    windows = [tokens[i * T : (i + 1) * T + 1] for i in range(whole)]
    rest = tokens[whole * T :]
    assert 1 < len(rest) <= T  # the last window is a part of one
    losses: list[float] = []
    for rows in (np.stack(windows), rest[None]):
        logits = np.asarray(forward(decoder, jnp.asarray(rows[:, :-1])), np.float64)
        probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        for row, t in np.ndindex(rows[:, 1:].shape):
            losses.append(-math.log(probabilities[row, t, rows[row, t + 1]]))
    assert len(losses) == len(tokens) - 1
    assert straight.result["validation_loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    perplexity = math.exp(straight.result["validation_loss"])
    assert straight.result["validation_perplexity"] == pytest.approx(perplexity)


def test_seed_decides(straight, streams, tmp_path):
    same_run(train(CONFIG, TRAINING, streams, tmp_path / "again"), straight)
    other = train(CONFIG, dataclasses.replace(TRAINING, seed=1), streams, tmp_path / "seed")
    assert other.result["validation_loss"] != straight.result["validation_loss"]
    data = dataclasses.replace(TRAINING.data, seed=1)
    order = train(CONFIG, dataclasses.replace(TRAINING, data=data), streams, tmp_path / "order")
    losses = [[r["loss"] for r in numbers(t.directory) if "loss" in r] for t in (order, straight)]
    assert losses[0] != losses[1]
