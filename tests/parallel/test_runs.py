"""Whole runs: trained on a mesh, resumed on another, loaded on one device or several."""

import dataclasses
import json

import jax
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
from cla_jax.conversion import HuggingFaceCheckpoint, save_huggingface
from cla_jax.data import ByteTokenizer
from cla_jax.loading import load
from cla_jax.sharing import KVSharing
from cla_jax.training import InitialParams, train, trainer
from cla_jax.training.metrics import read_metrics
from tests.training.streams import write_streams

CONFIG = ModelConfig(
    name="toy", sharing=KVSharing.cla(2, 2), d_model=16, ffn_dim=32, query_heads=4, kv_heads=1,
    head_dim=8, vocab_size=ByteTokenizer().vocab_size, sequence_length=32, separate_kv_norm=True,
)  # fmt: skip
TRAINING = TrainConfig(
    steps=6, data=DataConfig(sequence_length=16, batch_size=8),
    optimizer=OptimizerConfig(learning_rate=1e-2),
    execution=ExecutionConfig(compute_dtype="float32"), checkpoint_every=3,
)  # fmt: skip
TEXT = {"train": ["the cat sat on the mat. " * 40], "validation": ["the dog sat on it. " * 5]}


def on(mesh):
    return dataclasses.replace(TRAINING, mesh=MeshConfig.parse(mesh))


def losses(directory):
    return [
        r.get("loss", r.get("validation_loss")) for r in read_metrics(directory / "metrics.jsonl")
    ]


class StopError(Exception):
    pass


@pytest.mark.slow
def test_a_run_goes_on_on_another_mesh(tmp_path, monkeypatch):
    streams = write_streams(tmp_path / "streams", TEXT)
    train(CONFIG, TRAINING, streams, tmp_path / "alone")

    counted = []
    monkeypatch.setattr(trainer, "peak_flops", lambda devices: counted.append(devices))

    def stop(record):
        if record["step"] == 5:
            raise StopError

    run = tmp_path / "run"
    with pytest.raises(StopError):
        train(CONFIG, on("fsdp=4,tensor=2"), streams, run, on_record=stop)
    # On which mesh is no part of what a run is.
    trained = train(CONFIG, on("data=2,tensor=2"), streams, run, resume=True)
    assert losses(run) == pytest.approx(losses(tmp_path / "alone"), rel=1e-5)
    assert counted == [8, 4]
    assert json.loads((run / "config.json").read_text())["mesh"] == "fsdp=4,tensor=2"
    resumed = json.loads((run / "resumes.jsonl").read_text())
    assert (resumed["step"], resumed["mesh"]) == (3, "data=2,tensor=2")
    assert json.loads((tmp_path / "alone/config.json").read_text())["mesh"] == "none"

    prompts = ["the cat", "a"]
    one = load(run)
    assert {d for a in jax.tree.leaves(one.decoder) for d in a.devices()} == {jax.devices()[0]}
    several = load(run, mesh=MeshConfig(tensor=4))
    assert len(jax.tree.leaves(several.decoder)[0].devices()) == 4
    kernel = several.decoder.layer(1).attention.query.kernel[...]
    assert kernel.addressable_shards[0].data.shape == (16, 1, 8)
    texts = [model.generate(prompts, max_new_tokens=6) for model in (one, several)]
    assert texts[0] == texts[1]

    params = jax.tree.map(np.asarray, trained.params)
    save_huggingface(HuggingFaceCheckpoint(CONFIG, params), tmp_path / "exported")
    exported = load(tmp_path / "exported", tokenizer="bytes", mesh=MeshConfig(data=2, tensor=2))
    assert exported.generate(prompts, max_new_tokens=6) == texts[0]

    # Given parameters lie as random ones do, and are copies: a step gives its state away.
    again = train(
        CONFIG, on("fsdp=2"), streams, tmp_path / "again", initial=InitialParams(lambda: params)
    )
    assert losses(tmp_path / "again")[0] == pytest.approx(trained.result["validation_loss"], 1e-5)
    assert len(jax.tree.leaves(again.params)[0].devices()) == 2


def test_a_mesh_of_one_device_is_said_and_recorded_as_none(tmp_path, monkeypatch, capfd):
    """As `--mesh fsdp`, which takes all devices, where there is one."""
    streams, devices = write_streams(tmp_path / "streams", TEXT), jax.devices
    monkeypatch.setattr(jax, "devices", lambda *given: devices(*given)[:1])
    run = tmp_path / "run"
    train(CONFIG, dataclasses.replace(on("fsdp"), steps=1), streams, run)
    note = "mesh fsdp=auto is one device here: nothing is split"
    assert note in capfd.readouterr().err
    assert json.loads((run / "config.json").read_text())["mesh"] == "none"
    load(run, mesh=MeshConfig.parse("tensor"))
    assert note.replace("fsdp", "tensor") in capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("begun", "resumed"), [("stage=2,data=2", "tensor=2"), ("fsdp=2", "stage=2,tensor=2")]
)
def test_a_run_goes_on_in_stages_and_without(begun, resumed, tmp_path):
    config = dataclasses.replace(CONFIG, sharing=KVSharing.cla(4, 2))
    streams = write_streams(tmp_path / "streams", TEXT)
    train(config, TRAINING, streams, tmp_path / "alone")

    def on(mesh):
        count = 2 if "stage" in mesh else 0
        execution = dataclasses.replace(TRAINING.execution, pipeline_microbatches=count)
        return dataclasses.replace(
            TRAINING, mesh=MeshConfig.parse(mesh), execution=execution, micro_batch_size=4
        )

    def stop(record):
        if record["step"] == 5:
            raise StopError

    run = tmp_path / "run"
    with pytest.raises(StopError):
        train(config, on(begun), streams, run, on_record=stop)
    train(config, on(resumed), streams, run, resume=True)
    assert losses(run) == pytest.approx(losses(tmp_path / "alone"), rel=1e-5)
    saved = json.loads((run / "config.json").read_text())
    again = json.loads((run / "resumes.jsonl").read_text())
    assert again["step"] == 3
    meshes = [MeshConfig.parse(r["mesh"]) for r in (saved, again)]
    assert meshes == [MeshConfig.parse(begun), MeshConfig.parse(resumed)]
    counts = [r["execution"]["pipeline_microbatches"] for r in (saved, again)]
    assert counts == [2 * ("stage" in begun), 2 * ("stage" in resumed)]
    assert [r["pass"]["microbatches"] for r in (saved, again)] == [max(n, 1) for n in counts]
    with pytest.raises(ValueError, match="mesh stage=2: stages are for training"):
        load(run, mesh=MeshConfig(stage=2))


@pytest.mark.parametrize(
    ("mesh", "part"),
    [("fsdp=16", "16 devices, and there are 8"), ("tensor=8", "tensor sizes that work: 1, 2, 4"),
     ("data=3", "does not divide a batch of 8 rows; the nearest that works is 9"),
     ("stage=2", "a cut would separate layers that share K/V; stage counts that work: 1")],
)  # fmt: skip
def test_a_mesh_that_does_not_fit_is_refused_before_anything_is_written(mesh, part, tmp_path):
    streams = write_streams(tmp_path / "streams", TEXT)
    with pytest.raises(ValueError, match=part):
        train(CONFIG, on(mesh), streams, tmp_path / "run")
    assert not (tmp_path / "run").exists()
