"""Decoding steps against the read roofline."""

import dataclasses

import numpy as np
import pytest

from cla_jax.inference.planning import step_reads
from cla_jax.registry import model
from cla_jax.reporting.roofline import columns, roofline
from cla_jax.reporting.tables import csv_text


@dataclasses.dataclass(frozen=True)
class Step:
    model: str
    batch: int
    context: int
    step_seconds: float
    read_bytes: int


def step(name: str, batch: int, context: int, share: float, bandwidth: float = 1e12) -> Step:
    read = step_reads(model(name), batch, context).total
    return Step(name, batch, context, read / bandwidth / share, read)


STEPS = [
    step("1B/H128-MQA", 1, 2048, 0.3),
    step("1B/H128-MQA", 64, 8192, 0.9),
    step("1B/H128-MQA-CLA2", 64, 8192, 0.8),
]


def test_points_lie_above_the_floor_by_their_share():
    figure = roofline(STEPS, 1e12)
    floor, *models = figure.axes[0].lines
    x, y = np.asarray(floor.get_xydata()).T
    np.testing.assert_allclose(y, x)  # GB at 1 TB/s: ms
    drawn = np.concatenate([np.asarray(line.get_xydata()) for line in models])
    np.testing.assert_allclose(drawn[:, 0] / drawn[:, 1], [0.3, 0.9, 0.8])
    assert "30% to 90%" in figure.texts[0].get_text()
    labels = [text.get_text() for text in figure.axes[0].texts if text.get_text()]
    assert labels == ["1 x 2,048", "64 x 8,192", "64 x 8,192"]


def test_table():
    lines = csv_text(STEPS[:1], columns(1e12)).splitlines()
    assert lines[0].startswith("model,batch,context,read_gb,floor_ms,step_ms,of_ceiling")
    assert lines[1].split(",")[6] == "0.30"


def test_nothing_measured():
    with pytest.raises(ValueError, match="no measurement"):
        roofline([], 1e12)
