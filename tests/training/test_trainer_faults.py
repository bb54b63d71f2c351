"""Whole runs that diverge, are sent a signal, or find a damaged file or a full disk."""

import dataclasses
import math
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint._src.checkpointers import async_checkpointer

from cla_jax.training import train, trainer
from cla_jax.training.interruption import Interrupted
from cla_jax.training.metrics import MetricLog
from cla_jax.training.step import TrainState
from tests.training.runs import CONFIG, TRAINING, same_run, unfinished

pytestmark = pytest.mark.usefixtures("compile_once")


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


def test_what_could_not_be_written_behind_is_said_without_a_traceback(
    tmp_path, monkeypatch, caplog
):
    """Orbax writes in a thread of its own, where it logs an error before it raises it."""

    written = async_checkpointer._background_wait_for_commit_futures

    def full(*arguments, **options):
        written(*arguments, **options)
        raise OSError("No space left on device")

    monkeypatch.setattr(async_checkpointer, written.__name__, full)
    state = TrainState(jnp.asarray(0), {"scale": jnp.ones(3)}, ())
    with (
        pytest.raises(OSError, match=r"could not save .*No space left"),
        trainer.Checkpoints(tmp_path, {}) as checkpoints,
    ):
        checkpoints.save(state, {})
    [logged] = [r for r in caplog.records if r.threadName == "async_save"]
    assert "Failed to run" in logged.getMessage()
    assert logged.exc_info is None
