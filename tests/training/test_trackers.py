"""Metrics beside the run's own log."""

import pytest

from cla_jax.training.metrics import MetricLog
from cla_jax.training.trackers import open_trackers


def test_tensorboard_gets_every_record(tmp_path):
    trackers = open_trackers(("tensorboard",), tmp_path)
    assert list(tmp_path.iterdir()) == []  # nothing before the first record
    with MetricLog(tmp_path / "metrics.jsonl", trackers=trackers) as log:
        log.write({"step": 1, "loss": 2.5})
        log.write({"step": 2, "loss": 2.25})
    (events,) = (tmp_path / "tensorboard").iterdir()
    data = events.read_bytes()
    assert data.count(b"loss") == 2


def test_a_missing_package_is_named_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)  # as if it were not installed
    with pytest.raises(ValueError, match=r"tracker 'wandb' .* pip install wandb"):
        open_trackers(("tensorboard", "wandb"), tmp_path)
