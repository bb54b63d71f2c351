"""Whole runs that were interrupted or killed go on exactly."""

import dataclasses
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from cla_jax.training import train, trainer
from cla_jax.training.metrics import MetricLog
from tests.training.runs import CONFIG, TRAINING, contents, numbers, same_run

pytestmark = pytest.mark.usefixtures("compile_once")


def interrupt_call(patch, owner, name, call: int, *, after: bool) -> None:
    """The given call of a function raises KeyboardInterrupt, before or after it does its work."""
    original, calls = getattr(owner, name), 0

    def wrapped(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == call and not after:
            raise KeyboardInterrupt
        result = original(*args, **kwargs)
        if calls == call:
            raise KeyboardInterrupt
        return result

    patch.setattr(owner, name, wrapped)


def tear(log: MetricLog, record: dict) -> None:
    """What a kill in the middle of a write leaves."""
    log._file.write(json.dumps(record)[:20])
    log._file.flush()
    raise KeyboardInterrupt


# With 12 steps, validations at 3, 6, 9, 12 and checkpoints at 4, 8, 12; what is written, in order:
# steps 1-3, validation, step 4, [4], 5, 6, validation, 7, 8, [8], 9, validation, 10-12, validation.
CUTS = {
    "first record": (MetricLog, "write", 1, False),
    "before the first checkpoint": (trainer.Checkpoints, "save", 1, False),
    "after the first checkpoint": (trainer.Checkpoints, "save", 1, True),
    "before the second checkpoint": (trainer.Checkpoints, "save", 2, False),
    "record after a checkpoint": (MetricLog, "write", 6, True),
    "validation": (MetricLog, "write", 12, True),
    "last validation": (MetricLog, "write", 16, True),
    "before the last checkpoint": (trainer.Checkpoints, "save", 3, False),
    "after the last checkpoint": (trainer.Checkpoints, "save", 3, True),
    "before config.json": (trainer, "write_json", 1, False),
    "before result.json": (trainer, "write_json", 2, False),
}


@pytest.mark.parametrize("cut", CUTS)
def test_resume_is_exact(cut, straight, streams, tmp_path):
    owner, name, call, after = CUTS[cut]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_call(patch, owner, name, call, after=after)
        train(CONFIG, TRAINING, streams, tmp_path / "run")
    assert not (tmp_path / "run" / "result.json").exists()
    same_run(train(CONFIG, TRAINING, streams, tmp_path / "run", resume=True), straight)


def test_resume_after_two_interruptions_and_a_torn_line(straight, streams, tmp_path):
    for call in (10, 5):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
            original, calls = MetricLog.write, []

            def write(log, record, call=call, original=original, calls=calls):
                calls.append(record)
                (tear if len(calls) == call else original)(log, record)

            patch.setattr(MetricLog, "write", write)
            train(CONFIG, TRAINING, streams, tmp_path / "run", resume=True)
    same_run(train(CONFIG, TRAINING, streams, tmp_path / "run", resume=True), straight)


def test_resume_between_logged_steps(streams, tmp_path):
    """Neither logs nor validations need to fall on checkpoints."""
    training = dataclasses.replace(TRAINING, log_every=5, eval_every=0, checkpoint_every=3)
    whole = train(CONFIG, training, streams, tmp_path / "whole")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_call(patch, trainer.Checkpoints, "save", 3, after=False)
        train(CONFIG, training, streams, tmp_path / "run")
    resumed = train(CONFIG, training, streams, tmp_path / "run", resume=True)
    same_run(resumed, whole)
    assert [r["step"] for r in numbers(resumed.directory)] == [5, 10, 12, 12]


def test_a_run_that_goes_on_makes_no_state_beside_the_checkpoints(straight, streams, tmp_path):
    """There may be no memory for two."""
    run = tmp_path / "run"
    shutil.copytree(straight.directory, run)
    (run / "result.json").unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "init_state", lambda *_: pytest.fail("made a state"))
        restore = trainer.Checkpoints.restore

        def of_shapes(checkpoints, like):
            assert not any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(like))
            return restore(checkpoints, like)

        patch.setattr(trainer.Checkpoints, "restore", of_shapes)
        same_run(train(CONFIG, TRAINING, streams, run, resume=True), straight)


def test_resume_of_a_finished_run_only_loads_it(straight, streams, monkeypatch):
    before = contents(straight.directory)
    monkeypatch.setattr(trainer._Loop, "run", None)
    again = train(CONFIG, TRAINING, streams, straight.directory, resume=True)
    assert again.result == straight.result
    jax.tree.map(np.testing.assert_array_equal, again.params, straight.params)
    assert contents(straight.directory) == before


def test_finished_run_whose_checkpoints_are_gone_is_not_loaded(straight, streams, tmp_path):
    """Fresh random parameters must never pass for the trained ones."""
    ignored = shutil.ignore_patterns("checkpoints")
    shutil.copytree(straight.directory, tmp_path / "run", ignore=ignored)
    with pytest.raises(ValueError, match="no checkpoint"):
        train(CONFIG, TRAINING, streams, tmp_path / "run", resume=True)


_KILLED = """
import pickle, sys, time
from cla_jax.training import trainer
write = trainer.MetricLog.write
trainer.MetricLog.write = lambda log, record: (write(log, record), time.sleep(0.02))
config, training, data, out = pickle.loads(bytes.fromhex(sys.argv[1]))
trainer.train(config, training, trainer.Streams.open(data), out, resume=True)
"""


def start(config, training, streams, run) -> subprocess.Popen:
    """Begin, or go on with, a run in another process, at most 50 records a second."""
    job = pickle.dumps((config, training, str(streams.train.directory.parent), str(run)))
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", _KILLED, job.hex()]
    return subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)


@pytest.mark.slow
def test_25_kills_at_random_points_change_no_bit(streams, tmp_path):
    """SIGKILL at any time: while starting, compiling, stepping, validating or saving."""
    training = dataclasses.replace(
        TRAINING, steps=3000, eval_every=40, checkpoint_every=7, log_every=1
    )
    run, random = tmp_path / "run", np.random.default_rng(0)
    log, reached = run / "metrics.jsonl", []
    for kill in range(25):
        process = start(CONFIG, training, streams, run)
        size = log.stat().st_size if log.exists() else 0
        deadline = time.monotonic() + 600
        # Every fifth falls somewhere in the start, the others after the log has grown.
        while kill % 5 and (not log.exists() or log.stat().st_size <= size):
            assert process.poll() is None, "it ended by itself"
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(random.uniform(0.0, 8.0 if kill % 5 == 0 else 1.5))
        process.send_signal(signal.SIGKILL)
        process.wait()
        saved = [int(p.name) for p in (run / "checkpoints").glob("*") if p.name.isdigit()]
        reached.append(max(saved, default=0))
    assert not (run / "result.json").exists()
    assert reached == sorted(reached)  # no kill ever lost a checkpoint
    assert reached[-1] > 100
    resumed = train(CONFIG, training, streams, run, resume=True)
    same_run(resumed, train(CONFIG, training, streams, tmp_path / "whole"))


@pytest.mark.slow
def test_resume_after_a_kill_is_exact(streams, tmp_path):
    """SIGKILL, at some moment after a few checkpoints, of another process."""
    training = dataclasses.replace(TRAINING, steps=60, eval_every=10, checkpoint_every=2)
    run = tmp_path / "run"
    process = start(CONFIG, training, streams, run)
    try:
        deadline = time.monotonic() + 900
        while not any((run / "checkpoints" / str(n)).exists() for n in range(6, 61, 2)):
            assert process.poll() is None, "it ended by itself"
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (run / "result.json").exists()
    resumed = train(CONFIG, training, streams, run, resume=True)
    same_run(resumed, train(CONFIG, training, streams, tmp_path / "whole"))
