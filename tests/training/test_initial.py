"""Runs that begin with given parameters: what they belong to, and what is refused."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cla_jax.configs import (
    DataConfig,
    ExecutionConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
)
from cla_jax.sharing import KVSharing
from cla_jax.training import InitialParams, Model, train, validate, validation
from cla_jax.training.initial import params_fingerprint
from cla_jax.training.metrics import MetricLog, read_metrics
from tests.training.streams import write_streams

CONFIG = ModelConfig(
    name="toy", sharing=KVSharing.cla(2, 2), d_model=16, ffn_dim=32, query_heads=2, kv_heads=1,
    head_dim=8, vocab_size=257, sequence_length=32,
)  # fmt: skip
TRAINING = TrainConfig(
    steps=4, data=DataConfig(16, 4), optimizer=OptimizerConfig(1e-2),
    execution=ExecutionConfig("float32"), checkpoint_every=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def streams(tmp_path_factory):
    texts = ["the cat sat on the mat. " * 30]
    return write_streams(tmp_path_factory.mktemp("streams"), {"train": texts, "validation": texts})


@functools.cache
def params(seed: int):
    """As they come from a checkpoint: host arrays."""
    return jax.tree.map(np.asarray, Model(CONFIG, TRAINING.execution).init(seed))


def losses(directory) -> list[tuple[int, float]]:
    records = read_metrics(directory / "metrics.jsonl")
    return [(r["step"], r["validation_loss"]) for r in records if "validation_loss" in r]


def test_begins_with_them_and_leaves_them_as_they_are(streams, tmp_path):
    given, kept = params(7), jax.tree.map(np.copy, params(7))
    frozen = dataclasses.replace(TRAINING, steps=1)  # whose only update has learning rate 0
    frozen = dataclasses.replace(frozen, optimizer=OptimizerConfig(1e-2, warmup_fraction=1.0))
    run = train(CONFIG, frozen, streams, tmp_path / "run", initial=InitialParams(lambda: given))
    jax.tree.map(np.testing.assert_array_equal, run.params, kept)
    jax.tree.map(np.testing.assert_array_equal, given, kept)
    initial = InitialParams(lambda: given)
    assert validate(CONFIG, frozen, streams, initial) == losses(run.directory)[0][1]
    (first, before), (last, after) = losses(run.directory)
    assert (first, last) == (0, 1)
    assert before == after == run.result["validation_loss"]
    config = json.loads((run.directory / "config.json").read_text())
    assert config["training"]["initial_parameters"] == params_fingerprint(given)
    # The seed's own parameters are the same run, told otherwise.
    seeded = train(CONFIG, dataclasses.replace(frozen, seed=7), streams, tmp_path / "seeded")
    jax.tree.map(np.testing.assert_array_equal, seeded.params, run.params)
    assert losses(seeded.directory) == [(1, after)]


def test_validation_is_on_the_mesh_of_the_recipe(streams, monkeypatch):
    initial, placed, measure = InitialParams(lambda: params(7)), [], validation.mean_loss

    def watched(step, params, *rest):
        placed.append({len(leaf.devices()) for leaf in jax.tree.leaves(params)})
        return measure(step, params, *rest)

    monkeypatch.setattr(validation, "mean_loss", watched)
    alone, on_mesh = (
        validate(CONFIG, dataclasses.replace(TRAINING, mesh=mesh), streams, initial)
        for mesh in (MeshConfig(), MeshConfig(fsdp=2, tensor=2))
    )
    assert on_mesh == pytest.approx(alone, rel=1e-5)
    assert placed == [{1}, {4}]
    with pytest.raises(ValueError, match="a batch of 4 rows; the nearest that works is 3"):
        validate(CONFIG, dataclasses.replace(TRAINING, mesh=MeshConfig(data=3)), streams, initial)


@pytest.mark.parametrize(  # after the first validation, after steps
    "call", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(4, marks=pytest.mark.slow)]
)
def test_an_interrupted_run_goes_on_to_the_same_end(streams, tmp_path, monkeypatch, call):
    initial = InitialParams(lambda: params(7))
    whole = train(CONFIG, TRAINING, streams, tmp_path / "whole", initial=initial)
    assert losses(whole.directory)[0][0] == 0
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        write, calls = MetricLog.write, []

        def cut(log, record):
            write(log, record)
            calls.append(record)
            if len(calls) == call:
                raise KeyboardInterrupt

        patch.setattr(MetricLog, "write", cut)
        train(CONFIG, TRAINING, streams, tmp_path / "cut", initial=initial)
    again = train(CONFIG, TRAINING, streams, tmp_path / "cut", initial=initial, resume=True)
    jax.tree.map(np.testing.assert_array_equal, again.params, whole.params)
    assert losses(again.directory) == losses(whole.directory)


def test_other_parameters_are_another_run(streams, tmp_path):
    run = functools.partial(train, CONFIG, TRAINING, streams, tmp_path / "run", resume=True)
    run(initial=InitialParams(lambda: params(7)))
    for initial in (InitialParams(lambda: params(8)), None):
        with pytest.raises(ValueError, match=r"training\.initial_parameters: '\w{64}' there"):
            run(initial=initial)
    # However they are stored: the values decide.
    on_device = jax.tree.map(jnp.asarray, params(7))
    assert run(initial=InitialParams(lambda: on_device)).result["steps"] == 4


def test_parameters_of_another_model_are_refused_before_anything_is_written(streams, tmp_path):
    wider = dataclasses.replace(CONFIG, ffn_dim=40, use_bias=True)
    for config, message in (
        (wider, r"toy: parameter \S+bias is missing"),
        (dataclasses.replace(CONFIG, ffn_dim=40), r"shape \(1, 32, 16\); expected \(1, 40, 16\)"),
        (dataclasses.replace(CONFIG, tied_embeddings=True), "head does not belong to the model"),
    ):
        initial = InitialParams(lambda: params(7))
        with pytest.raises(ValueError, match=message):
            train(config, TRAINING, streams, tmp_path / "run", initial=initial)
    assert not any(tmp_path.iterdir())


def test_the_fingerprint_is_of_names_shapes_and_values():
    base = {"a": {0: np.zeros((2, 3), np.float32)}, "b": np.ones(3, np.float32)}
    same = {"b": np.ones(3, np.float16), "a": {0: np.zeros((2, 3), np.float32)}}
    assert params_fingerprint(base) == params_fingerprint(same)
    others = [
        {**base, "c": np.zeros(0, np.float32)},
        {"a": base["a"], "d": base["b"]},
        {**base, "b": np.array([1, 1, 2], np.float32)},
        {**base, "a": {0: np.zeros((3, 2), np.float32)}},
    ]
    assert len({params_fingerprint(tree) for tree in (base, *others)}) == 5
