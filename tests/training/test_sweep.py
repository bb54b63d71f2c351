"""Sweeps: order, what is skipped, taken up or refused, and that one failure costs one run."""

import dataclasses
import json
import signal
import types

import pytest

from cla_jax.configs import DataConfig, ExecutionConfig, ModelConfig, OptimizerConfig, TrainConfig
from cla_jax.sharing import KVSharing
from cla_jax.training import sweep as sweeps
from cla_jax.training.interruption import Interrupted
from cla_jax.training.sweep import Entry, Sweep, failures
from cla_jax.training.trainer import check_run
from tests.training.streams import write_streams

CONFIG = ModelConfig(
    name="toy", sharing=KVSharing.cla(2, 2), d_model=16, ffn_dim=32, query_heads=2, kv_heads=1,
    head_dim=8, vocab_size=257, sequence_length=32,
)  # fmt: skip
TRAINING = TrainConfig(
    steps=4, data=DataConfig(16, 4), execution=ExecutionConfig("float32"), eval_tokens=64
)
OPTIONS = {"experiment": {"scale": "toy", "steps": 4}, "data": {"tokens": "abc"}}


@pytest.fixture(scope="module")
def streams(tmp_path_factory):
    texts = ["the cat sat on the mat. " * 30]
    return write_streams(tmp_path_factory.mktemp("streams"), {"train": texts, "validation": texts})


@pytest.fixture
def trained(monkeypatch):
    """In place of training: what was trained, and what becomes of it, by directory name."""
    log, fates = [], {}

    def train(config, training, streams, directory, *, initial=None, resume=False):
        assert resume
        log.append(directory.name)
        identity = check_run(config, training, streams, directory, initial=initial, resume=True)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "config.json").write_text(json.dumps(identity))
        if directory.name in fates:
            raise fates[directory.name]
        result = {"validation_perplexity": 5.0}
        (directory / "result.json").write_text(json.dumps(result))
        return types.SimpleNamespace(result=result)

    monkeypatch.setattr(sweeps, "train", train)
    return log, fates


def entries(*names: str, **changes) -> list[Entry]:
    training = dataclasses.replace(TRAINING, **changes)
    return [Entry(CONFIG, training, f"toy/{name}") for name in names]


def make(directory, streams, options=OPTIONS, experiment="x") -> Sweep:
    return Sweep(directory, experiment, options, streams)


def test_in_order_then_skipped(trained, streams, tmp_path, capsys):
    log, _ = trained
    outcomes = make(tmp_path / "s", streams).run(entries("a", "b", "c"))
    assert log == ["a", "b", "c"]
    assert failures(outcomes) == 0
    err = capsys.readouterr().err
    assert "model 2 of 3: toy/b" in err
    assert "left for 2" in err
    record = json.loads((tmp_path / "s/sweep.json").read_text())
    assert record == {"experiment": "x", "options": OPTIONS}
    again = make(tmp_path / "s", streams).run(entries("a", "d", "b"))
    assert log == ["a", "b", "c", "d"]
    assert [o.result for o in again] == [o.result for o in outcomes]
    assert "model 1 of 3: toy/a: finished" in capsys.readouterr().err


def test_one_failure_costs_one_run(trained, streams, tmp_path, capsys):
    log, fates = trained
    fates |= {"b": FloatingPointError("the loss of step 3 is nan"), "c": OSError("disk full"),
              "d": TypeError("a bug\nin two lines")}  # fmt: skip
    outcomes = make(tmp_path / "s", streams).run(entries("a", "b", "c", "d", "e"))
    assert log == ["a", "b", "c", "d", "e"]
    assert [o.diverged for o in outcomes] == [False, True, False, False, False]
    capsys.readouterr()
    assert failures(outcomes) == 3
    err = capsys.readouterr().err
    assert err.splitlines() == [
        "3 of 5 failed:", "  toy/b: diverged: the loss of step 3 is nan",
        "  toy/c: OSError: disk full", "  toy/d: TypeError: a bug",
    ]  # fmt: skip
    # What diverged would diverge again; what failed otherwise may not.
    fates.clear()
    again = make(tmp_path / "s", streams).run(entries("a", "b", "c", "d", "e"))
    assert log[5:] == ["c", "d"]
    assert again[1] == outcomes[1]
    assert failures(again) == 1


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), Interrupted(signal.SIGTERM, 3)])
def test_an_interrupt_ends_it(stop, trained, streams, tmp_path):
    log, fates = trained
    fates["b"] = stop
    with pytest.raises(type(stop)):
        make(tmp_path / "s", streams).run(entries("a", "b", "c"))
    fates.clear()
    make(tmp_path / "s", streams).run(entries("a", "b", "c"))
    assert log == ["a", "b", "b", "c"]


def test_other_options_experiments_and_recipes_are_refused_by_name(trained, streams, tmp_path):
    log, _ = trained
    make(tmp_path / "s", streams).run(entries("a"))
    other = {**OPTIONS, "experiment": {"scale": "toy", "steps": 5}}
    with pytest.raises(ValueError, match=r"experiment\.steps: 4 there, 5 here"):
        make(tmp_path / "s", streams, other)
    with pytest.raises(ValueError, match="holds the experiment 'x', not 'y'"):
        make(tmp_path / "s", streams, experiment="y")
    changed = entries("b", "a", optimizer=OptimizerConfig(1e-2))
    with pytest.raises(ValueError, match=r"optimizer\.learning_rate: 0\.0003 there, 0\.01 here"):
        make(tmp_path / "s", streams).run(changed)
    assert log == ["a"]  # and b was not begun
    with pytest.raises(ValueError, match="holds a run, not a sweep"):
        make(tmp_path / "s/toy/a", streams)
    (tmp_path / "s/sweep.json").write_text("[]")
    with pytest.raises(ValueError, match="is not a sweep's"):
        make(tmp_path / "s", streams)


def test_nothing_is_written_before_all_are_checked(trained, streams, tmp_path):
    long = entries("a", data=DataConfig(16, 1000))
    with pytest.raises(ValueError, match="fewer than one batch of 1000"):
        make(tmp_path / "s", streams).run([*entries("b"), *long])
    assert not (tmp_path / "s").exists()


def test_a_real_run(streams, tmp_path):
    [outcome] = make(tmp_path / "s", streams).run(entries("a"))
    assert outcome.result is not None
    assert 1 < outcome.result["validation_perplexity"] < 400
    assert (tmp_path / "s/toy/a/result.json").exists()
