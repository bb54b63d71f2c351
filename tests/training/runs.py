"""What the tests of whole runs share: a model, a recipe and texts, and how runs are compared."""

import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from cla_jax.configs import DataConfig, ExecutionConfig, ModelConfig, OptimizerConfig, TrainConfig
from cla_jax.sharing import KVSharing
from cla_jax.training import train
from cla_jax.training.metrics import read_metrics

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


def refused(match, *args, error: type[Exception] = ValueError, **kwargs) -> str:
    """The message of a refusal that left the run's directory and its parent as they were."""
    parent = Path(args[3]).parent
    before = contents(parent)
    with pytest.raises(error, match=match) as caught:
        train(*args, **kwargs)
    assert contents(parent) == before
    return str(caught.value)


def unfinished(straight, tmp_path) -> Path:
    shutil.copytree(straight.directory, tmp_path / "run")
    (tmp_path / "run" / "result.json").unlink()
    return tmp_path / "run"
