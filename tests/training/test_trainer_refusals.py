"""What a run refuses, before anything is written, and what --force lets pass."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from cla_jax.configs import DataConfig, OptimizerConfig
from cla_jax.sharing import KVSharing
from cla_jax.training import train
from tests.training.runs import CONFIG, TEXT, TRAINING, contents, refused, same_run, unfinished
from tests.training.streams import write_streams

pytestmark = pytest.mark.usefixtures("compile_once")


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
