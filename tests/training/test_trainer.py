"""Whole runs: what they write, that they resume exactly, and what they refuse."""

import dataclasses
import functools
import json
import math
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cla_jax.configs import DataConfig, ExecutionConfig, ModelConfig, OptimizerConfig, TrainConfig
from cla_jax.reporting import load_run
from cla_jax.sharing import KVSharing
from cla_jax.training import Model, init_state, make_train_step, train, trainer
from cla_jax.training.interruption import Interrupted
from cla_jax.training.metrics import MetricLog, read_metrics
from cla_jax.training.optimizer import make_optimizer
from cla_jax.training.step import make_eval_step
from tests.training.streams import write_streams

CONFIG = ModelConfig(
    name="toy", sharing=KVSharing.cla(2, 2), d_model=16, ffn_dim=32, query_heads=2, kv_heads=1,
    head_dim=8, vocab_size=257, sequence_length=32, separate_kv_norm=True,
)  # fmt: skip
TRAINING = TrainConfig(
    steps=12,
    data=DataConfig(sequence_length=16, batch_size=4),
    optimizer=OptimizerConfig(learning_rate=2e-2),
    execution=ExecutionConfig(compute_dtype="float32"),
    eval_every=3,
    checkpoint_every=4,
)
TEXT = {
    "train": ["the cat sat on the mat. " * 30, "a dog ran to the red cat. " * 30],
    "validation": ["the dog sat on the red mat. " * 4 + "woof"],
}


@pytest.fixture(scope="module")
def streams(tmp_path_factory):
    return write_streams(tmp_path_factory.mktemp("streams"), TEXT)


@pytest.fixture(scope="module", autouse=True)
def _compile_once():
    """Every run of this file shares its compiled steps; nothing else about a run is shared."""
    models, optimizers = functools.cache(Model), functools.cache(make_optimizer)
    initial = functools.cache(init_state)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "Model", models)
        patch.setattr(trainer, "make_optimizer", optimizers)
        patch.setattr(trainer, "make_train_step", functools.cache(make_train_step))
        patch.setattr(trainer, "make_eval_step", functools.cache(make_eval_step))
        # A step donates its state.
        patch.setattr(trainer, "init_state", lambda *a: jax.tree.map(jnp.copy, initial(*a)))
        yield


@pytest.fixture(scope="module")
def straight(streams, tmp_path_factory):
    """The run that every other one is compared with."""
    return train(CONFIG, TRAINING, streams, tmp_path_factory.mktemp("runs") / "straight")


def numbers(directory) -> list[dict]:
    """Metrics without the clock's."""
    records = read_metrics(Path(directory) / "metrics.jsonl")
    return [{k: v for k, v in r.items() if k != "tokens_per_second"} for r in records]


def same_run(found, expected) -> None:
    assert numbers(found.directory) == numbers(expected.directory)
    jax.tree.map(np.testing.assert_array_equal, found.params, expected.params)
    clockless = [{k: v for k, v in r.result.items() if k != "seconds"} for r in (found, expected)]
    assert clockless[0] == clockless[1]


def contents(directory: Path) -> dict[str, bytes | None]:
    return {
        str(p.relative_to(directory)): p.read_bytes() if p.is_file() else None
        for p in sorted(directory.rglob("*"))
    }


# --- a run ----------------------------------------------------------------------------------------


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


# --- resume ---------------------------------------------------------------------------------------


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
        deadline = time.monotonic() + 120
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
        deadline = time.monotonic() + 240
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


# --- refusals -------------------------------------------------------------------------------------


def refused(match, *args, error: type[Exception] = ValueError, **kwargs) -> str:
    """The message of a refusal that left the run's directory and its parent as they were."""
    parent = Path(args[3]).parent
    before = contents(parent)
    with pytest.raises(error, match=match) as caught:
        train(*args, **kwargs)
    assert contents(parent) == before
    return str(caught.value)


def test_refuses_to_start_over_a_run(straight, streams):
    message = refused("already holds this run", CONFIG, TRAINING, streams, straight.directory)
    assert "--resume" in message
    assert str(straight.directory) in message


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize(
    ("config", "training", "fields"),
    [
        (
            dataclasses.replace(CONFIG, sharing=KVSharing.none(2), ffn_dim=40),
            TRAINING,
            ["model.ffn_dim: 32 there, 40 here", "model.sharing_pattern: [0, 0] there, [0, 1]"],
        ),
        (
            CONFIG,
            dataclasses.replace(
                TRAINING, seed=5, steps=24, data=DataConfig(sequence_length=16, batch_size=8),
                optimizer=OptimizerConfig(learning_rate=1e-2),
            ),
            ["training.seed: 0 there, 5 here", "training.steps: 12 there, 24 here",
             "data.batch_size: 4 there, 8 here",
             "training.optimizer.learning_rate: 0.02 there, 0.01 here"],
        ),
    ],
)  # fmt: skip
def test_refuses_a_run_of_another_configuration(
    config, training, fields, resume, straight, streams
):
    message = refused(
        "another configuration", config, training, streams, straight.directory, resume=resume
    )
    assert all(field in message for field in fields)
    assert len(message.splitlines()) == 1 + len(fields)
    again = train(CONFIG, TRAINING, streams, straight.directory, resume=True)
    jax.tree.map(np.testing.assert_array_equal, again.params, straight.params)


def test_refuses_other_data(straight, streams, tmp_path):
    other = write_streams(tmp_path, {**TEXT, "train": ["something else entirely. " * 60]})
    refused(r"data\.tokens", CONFIG, TRAINING, other, straight.directory, resume=True)


def test_refuses_a_checkpoint_of_another_configuration(straight, streams, tmp_path):
    """Although the run's own config.json was lost or replaced."""
    run = tmp_path / "run"
    shutil.copytree(straight.directory, run)
    (run / "result.json").unlink()
    kept = (run / "config.json").read_text()
    wider = dataclasses.replace(CONFIG, ffn_dim=40)
    config = json.loads(kept)
    config["model"]["ffn_dim"] = 40
    (run / "config.json").write_text(json.dumps(config))
    checkpoints = contents(run / "checkpoints")
    with pytest.raises(ValueError, match=r"checkpoint .*/12 (?s:.*)model\.ffn_dim: 32 there, 40"):
        train(wider, TRAINING, streams, run, resume=True)
    assert contents(run / "checkpoints") == checkpoints
    (run / "config.json").write_text(kept)
    same_run(train(CONFIG, TRAINING, streams, run, resume=True), straight)


@pytest.mark.parametrize("resume", [False, True])
def test_refuses_a_foreign_directory(streams, tmp_path, resume):
    foreign = tmp_path / "thesis"
    foreign.mkdir()
    (foreign / "chapter.txt").write_text("do not touch")
    message = refused("not empty", CONFIG, TRAINING, streams, foreign, resume=resume)
    assert str(foreign) in message
    assert "another directory" in message


@pytest.mark.parametrize("text", ["{}", '{"model": "llama"}', "[1]", "{"])
def test_refuses_a_foreign_config(streams, tmp_path, text):
    """Other programs write a config.json too."""
    foreign = tmp_path / "model"
    foreign.mkdir()
    (foreign / "config.json").write_text(text)
    message = refused("config", CONFIG, TRAINING, streams, foreign, resume=True)
    assert str(foreign) in message


def test_refuses_a_tokenizer_larger_than_the_vocabulary(streams, tmp_path):
    small = dataclasses.replace(CONFIG, vocab_size=256)
    message = refused("257 ids", small, TRAINING, streams, tmp_path / "run")
    assert "'bytes'" in message
    assert "vocab_size=256" in message


@pytest.mark.parametrize(
    ("length", "batch", "expected"),
    [
        (1_000, 4, r"1502 tokens, 1 rows of 1000: fewer than one batch of 4; .* is 1$"),
        (16, 94, r"93 rows of 16: fewer than one batch of 94; .* is 93$"),
        (2_000, 1, r"1502 tokens: shorter than one window of sequence_length=2000; .* is 1501$"),
    ],
)
def test_refuses_a_short_stream(streams, tmp_path, length, batch, expected):
    assert streams.train.num_tokens == 1502
    training = dataclasses.replace(TRAINING, data=DataConfig(length, batch))
    config = dataclasses.replace(CONFIG, sequence_length=2_000)
    refused(expected, config, training, streams, tmp_path / "run")


def test_refuses_sequences_longer_than_the_model_takes(streams, tmp_path):
    training = dataclasses.replace(TRAINING, data=DataConfig(CONFIG.sequence_length + 1, 1))
    message = refused("sequence_length=", CONFIG, training, streams, tmp_path / "run")
    assert message.endswith(f"is {CONFIG.sequence_length}")


def test_refuses_a_validation_stream_without_a_target(streams, tmp_path):
    short = write_streams(tmp_path / "short", {**TEXT, "validation": [""]})
    refused("validation", CONFIG, TRAINING, short, tmp_path / "run")


# --- divergence -----------------------------------------------------------------------------------

NAN = np.float32(math.nan)


def spoiled(at: int):
    """In place of `make_train_step`: the gradient of one step is not a number."""

    def make(*arguments):
        step = compiled(*arguments)

        def faulty(state, batch):
            new, metrics = step(state, batch)
            if int(new.step) == at:
                new = dataclasses.replace(new, params=jax.tree.map(lambda x: x * NAN, new.params))
                metrics = {**metrics, "gradient_norm": NAN}
            return new, metrics

        return faulty

    compiled = trainer.make_train_step
    return make


@pytest.mark.parametrize("log_every", [1, 12])
@pytest.mark.parametrize("at", [6, 8, 12])
def test_a_run_that_diverges_keeps_its_last_good_checkpoint(
    at, log_every, straight, streams, tmp_path, monkeypatch
):
    """However rarely metrics are logged, also when it happens in a step that is saved."""
    training = dataclasses.replace(TRAINING, log_every=log_every, eval_every=0)
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "make_train_step", spoiled(at))
        with pytest.raises(FloatingPointError, match="learning rate"):
            train(CONFIG, training, streams, tmp_path / "run")
    assert not (tmp_path / "run" / "result.json").exists()
    resumed = train(CONFIG, training, streams, tmp_path / "run", resume=True)
    jax.tree.map(np.testing.assert_array_equal, resumed.params, straight.params)


def test_an_absurd_learning_rate_is_a_clear_error(streams, tmp_path):
    optimizer = dataclasses.replace(TRAINING.optimizer, learning_rate=1e30)
    training = dataclasses.replace(TRAINING, optimizer=optimizer, eval_every=0)
    with pytest.raises(FloatingPointError, match=r"step \d+ .*lower learning rate"):
        train(CONFIG, training, streams, tmp_path / "run")


def test_a_perplexity_beyond_floating_point_is_a_clear_error(straight, streams, tmp_path):
    """A finite loss above 709 nats has no perplexity."""
    state = trainer.init_state(straight.model, trainer.make_optimizer(TRAINING.optimizer, 12), 0)
    params = {**straight.params, "head": straight.params["head"] * jnp.float32(1e6)}
    state = dataclasses.replace(state, params=jax.tree.map(jnp.copy, params))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "init_state", lambda *_: state)
        with pytest.raises(FloatingPointError, match=r"validation loss of step 3 is \d{4}"):
            train(CONFIG, TRAINING, streams, tmp_path / "run")


# --- signals --------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_leaves_with_its_own_code(
    number, straight, streams, tmp_path, monkeypatch
):
    write = MetricLog.write

    def write_and_signal(log, record):
        write(log, record)
        if record["step"] == 5 and "loss" in record:
            signal.raise_signal(number)

    with monkeypatch.context() as patch:
        patch.setattr(MetricLog, "write", write_and_signal)
        with pytest.raises(Interrupted, match=r"saved at step 6; --resume") as caught:
            train(CONFIG, TRAINING, streams, tmp_path / "run")
    assert caught.value.exit_code == 128 + number
    assert (tmp_path / "run" / "checkpoints" / "6").is_dir()
    same_run(train(CONFIG, TRAINING, streams, tmp_path / "run", resume=True), straight)


def test_a_signal_in_the_last_validation_finds_the_run_saved(
    straight, streams, tmp_path, monkeypatch
):
    save = trainer.Checkpoints.save

    def save_and_signal(checkpoints, state, data):
        save(checkpoints, state, data)
        if int(state.step) == 12:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Checkpoints, "save", save_and_signal)
        with pytest.raises(Interrupted, match="saved at step 12"):
            train(CONFIG, TRAINING, streams, tmp_path / "run")
    same_run(train(CONFIG, TRAINING, streams, tmp_path / "run", resume=True), straight)


# --- damage ---------------------------------------------------------------------------------------


def unfinished(straight, tmp_path) -> Path:
    shutil.copytree(straight.directory, tmp_path / "run")
    (tmp_path / "run" / "result.json").unlink()
    return tmp_path / "run"


def test_a_damaged_checkpoint_is_named_in_one_line(straight, streams, tmp_path):
    run = unfinished(straight, tmp_path)
    data = max((run / "checkpoints" / "12" / "state").rglob("*"), key=lambda p: p.stat().st_size)
    data.write_bytes(data.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"checkpoints/12 is damaged: .*Move it away") as caught:
        train(CONFIG, TRAINING, streams, run, resume=True)
    assert "\n" not in str(caught.value)
    shutil.rmtree(run / "checkpoints" / "12")
    same_run(train(CONFIG, TRAINING, streams, run, resume=True), straight)


def test_a_full_disk_while_saving_keeps_the_last_checkpoint(
    straight, streams, tmp_path, monkeypatch
):
    manager = trainer.Checkpoints(tmp_path / "probe", {})._manager.__class__
    save = manager.save

    def full(self, step, **kwargs):
        if step == 8:
            raise ValueError("RESOURCE_EXHAUSTED: No space left on device\nand much more")
        return save(self, step, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(manager, "save", full)
        with pytest.raises(
            OSError, match=r"could not save .*No space left.* is step 4; free space"
        ):
            train(CONFIG, TRAINING, streams, tmp_path / "run")
    same_run(train(CONFIG, TRAINING, streams, tmp_path / "run", resume=True), straight)


# --- force ----------------------------------------------------------------------------------------


def test_force_goes_on_with_another_recipe_and_keeps_what_was_written(straight, streams, tmp_path):
    run = unfinished(straight, tmp_path)
    before = (run / "config.json").read_bytes()
    longer = dataclasses.replace(TRAINING, steps=14)
    refused(r"--force goes on", CONFIG, longer, streams, run, resume=True)
    trained = train(CONFIG, longer, streams, run, resume=True, force=True)
    assert trained.result["steps"] == 14
    assert (run / "config.json").read_bytes() == before
    (resume,) = (json.loads(line) for line in (run / "resumes.jsonl").read_text().splitlines())
    assert (resume["step"], resume["training"]["steps"]) == (12, 14)


def test_force_changes_neither_a_finished_run_nor_the_model(straight, streams, tmp_path):
    longer = dataclasses.replace(TRAINING, steps=14)
    arguments = (streams, straight.directory)
    refused("the finished run", CONFIG, longer, *arguments, resume=True, force=True)
    run = unfinished(straight, tmp_path)
    wider = dataclasses.replace(CONFIG, ffn_dim=64)
    refused(r"ffn_dim: 32 there, 64 here", wider, TRAINING, streams, run, resume=True, force=True)
