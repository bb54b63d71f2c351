"""Runs and sweeps on disk, as the trainer and the sweep leave them."""

import json
import math
from pathlib import Path

import pytest

from cla_jax import model


@pytest.fixture
def write_run():
    """Writes a run directory; without a perplexity, one that has not finished."""

    def write(
        directory: Path, name: str, perplexity: float | None, seed: int = 0, rate: float = 3e-4
    ) -> Path:
        config = model(name)
        directory.mkdir(parents=True)
        training = {"seed": seed, "steps": 20, "optimizer.learning_rate": rate}
        values = {"model": config.to_dict(), "training": training}
        (directory / "config.json").write_text(json.dumps(values))
        if perplexity is None:
            return directory
        loss = math.log(perplexity)
        sizes = ("name", "parameters", "num_layers", "kv_layers", "kv_heads", "head_dim",
                 "kv_bytes_per_token")  # fmt: skip
        result = {field: getattr(config, field) for field in sizes}
        result |= {
            "model": name, "steps": 20, "tokens": 2000, "seconds": 4.0, "seed": seed,
            "validation_loss": loss, "validation_perplexity": perplexity,
        }  # fmt: skip
        (directory / "result.json").write_text(json.dumps(result))
        lines = [{"step": n, "tokens": 100 * n, "loss": loss + 1 / n} for n in range(1, 21)]
        lines.append({"step": 20, "tokens": 2000, "validation_loss": loss})
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (directory / "metrics.jsonl").write_text(text)
        return directory

    return write


@pytest.fixture
def write_sweep(write_run):
    """Writes a sweep of runs: `{place: (model, perplexity, seed, rate)}`."""

    def write(directory: Path, experiment: str, runs: dict, **options) -> Path:
        for place, (name, perplexity, seed, rate) in runs.items():
            write_run(directory / place, name, perplexity, seed, rate)
        scale = next(iter(runs.values()))[0].partition("/")[0]
        record = {
            "experiment": experiment,
            "options": {
                "experiment": {"scale": scale, "steps": 20, **options},
                "data": {"tokens": "a" * 64, "validation_tokens": "b" * 64, "tokenizer": "bytes"},
            },
        }
        (directory / "sweep.json").write_text(json.dumps(record))
        return directory

    return write
