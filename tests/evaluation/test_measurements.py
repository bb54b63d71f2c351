"""What a training step costs, against the formulas; a failing model does not stop the others."""

import json

import pytest

from cla_jax import model
from cla_jax.configs import ExecutionConfig
from cla_jax.evaluation import measure_all, measurements, training_costs

OPTIONS = {"batch_size": 8, "sequence_length": 256, "execution": ExecutionConfig("float32")}


@pytest.mark.slow
def test_costs_of_a_pair():
    names = ("tiny/MQA", "tiny/MQA-CLA2")
    without, shared = (training_costs(model(n), repeats=1, **OPTIONS) for n in names)
    for costs, name in zip((without, shared), names, strict=True):
        config = model(name)
        assert costs.parameters == config.parameters
        # Parameters and two moments in float32; and steps, counts, the batch.
        assert 0 <= costs.state_bytes - 12 * config.parameters < 4 * 8 * 257 + 2000
        assert costs.temporary_bytes > 0
        assert costs.step_seconds is not None
    # Readers leave out a K/V projection and gain nothing: what XLA saves is what the formula saves.
    saved = without.flops_per_token - shared.flops_per_token
    assert without.xla_flops_per_token - shared.xla_flops_per_token == pytest.approx(
        saved, rel=0.02
    )
    assert without.xla_flops_per_token == pytest.approx(without.flops_per_token, rel=0.25)


def test_measured_models_are_skipped_and_failures_reported(tmp_path, monkeypatch, capsys):
    path, calls = tmp_path / "out/costs.json", []

    def fake(config, **options):
        calls.append(config.name)
        if config.name == "tiny/MHA":
            raise RuntimeError("RESOURCE_EXHAUSTED: too large")
        return measurements.Costs(config.name, 1, 1, 1, 1.0, 1, 1, None, None, 0.1, "cpu")

    monkeypatch.setattr(measurements, "training_costs_alone", fake)
    configs = [model(name) for name in ("tiny/MQA", "tiny/MHA", "tiny/MQA-CLA2")]
    failures = measure_all(configs, path, repeats=0, **OPTIONS)
    assert failures == {"tiny/MHA": "RESOURCE_EXHAUSTED: too large"}
    assert list(json.loads(path.read_text())["costs"]) == ["tiny/MQA", "tiny/MQA-CLA2"]
    assert "model 3 of 3: tiny/MQA-CLA2" in capsys.readouterr().err
    measure_all(configs, path, repeats=0, **OPTIONS)
    assert calls == ["tiny/MQA", "tiny/MHA", "tiny/MQA-CLA2", "tiny/MHA"]
    with pytest.raises(ValueError, match="repeats: 0 there, 5 here"):
        measure_all(configs, path, repeats=5, **OPTIONS)
