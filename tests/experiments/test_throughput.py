"""The curve of tokens/s against the sharing factor, at a size that takes seconds."""

import importlib.util
import json
from pathlib import Path

import pytest

from cla_jax.evaluation.decoding import decode_costs, random_decoder
from cla_jax.inference.planning import step_reads
from cla_jax.registry import model

ROOT = Path(__file__).resolve().parents[2]


def experiment(path: str):
    spec = importlib.util.spec_from_file_location("experiment", ROOT / "experiments" / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def options(module, out, **changes):
    given = dict(model="tiny/MQA", factors=(1, 3), context=(24,), memory="72MiB", out=out)
    return module.Options(**{**given, **changes})


def test_measures_saves_draws_and_goes_on(tmp_path, monkeypatch, capsys):
    module = experiment("throughput.py")
    monkeypatch.setattr(module, "read_bandwidth", lambda: 1e10)
    assert module.main(options(module, tmp_path, factors=(1,))) == 0
    first = json.loads((tmp_path / "throughput.json").read_text())["rows"]
    assert [row["factor"] for row in first] == [1]
    assert module.main(options(module, tmp_path)) == 0
    rows = json.loads((tmp_path / "throughput.json").read_text())["rows"]
    assert rows[0] == first[0]  # not measured again
    assert [row["kv_layers"] for row in rows] == [6, 2]
    assert rows[1]["batch"] > rows[0]["batch"] > 0
    for name in ("throughput.csv", "throughput.png", "throughput.svg"):
        assert (tmp_path / name).stat().st_size > 100
    assert "sharing" in capsys.readouterr().out


def test_refuses_what_it_cannot_go_on_with(tmp_path, monkeypatch):
    module = experiment("throughput.py")
    monkeypatch.setattr(module, "read_bandwidth", lambda: 1e10)
    (tmp_path / "throughput.json").write_text('{"device": "another", "rows": []}')
    with pytest.raises(ValueError, match="was measured on another, this is cpu"):
        module.main(options(module, tmp_path))
    (tmp_path / "throughput.json").write_text("{")
    with pytest.raises(ValueError, match="holds no measurements"):
        module.main(options(module, tmp_path))
    with pytest.raises(ValueError, match="give --memory"):
        module.main(options(module, tmp_path, memory=None))
    with pytest.raises(ValueError, match="nothing was measured"):
        module.main(options(module, tmp_path / "new", memory="1MB"))


def test_costs_of_a_step():
    config = model("tiny/MQA-CLA2")
    costs = decode_costs(random_decoder(config), 2, 24, steps=4, repeats=1)
    assert costs.read_bytes == step_reads(config, 2, 24).total
    assert costs.cache_bytes == 2 * 24 * config.kv_bytes_per_token
    assert costs.tokens_per_second == 2 / costs.step_seconds > 0
    assert costs.attention == "xla"
    with pytest.raises(ValueError, match="context 4 must be longer than the 4 timed steps"):
        decode_costs(random_decoder(config), 2, 4, steps=4)
