"""Curves that grow while a model trains."""

import dataclasses

import numpy as np
import pytest

from cla_jax.recipes import SCALES, recipe
from cla_jax.registry import model
from cla_jax.reporting.live import LiveCurves

TRAINING = dataclasses.replace(recipe(SCALES["tiny"], tokens=40 * 1024), steps=40)


def test_drawn_at_once_then_when_due_and_at_every_validation():
    shown = []
    curves = LiveCurves(shown.append, seconds=1e9)
    with pytest.raises(ValueError, match="nothing to draw yet"):
        curves.figure()
    take = curves.watch(model("tiny/MQA"), TRAINING)
    for step in range(1, 21):
        take({"step": step, "tokens": 1024 * step, "loss": 5 - 0.1 * step})
    assert len(shown) == 1
    take({"step": 20, "tokens": 20480, "validation_loss": 3.2})
    assert len(shown) == 2
    assert "tiny/MQA: 50% of its tokens" in [text.get_text() for text in shown[-1].texts]

    raw, mean, marks = shown[-1].axes[0].lines
    losses = 5 - 0.1 * np.arange(1, 21)
    np.testing.assert_allclose(raw.get_ydata(), losses)
    expected = [losses[max(0, i - 9) : i + 1].mean() for i in range(20)]
    np.testing.assert_allclose(mean.get_ydata(), expected)
    np.testing.assert_allclose(marks.get_xydata(), [(20480, 3.2)])
    assert shown[-1].axes[0].get_xlim()[1] >= 40 * 1024


def test_several_runs_and_the_end():
    shown = []
    curves = LiveCurves(shown.append, seconds=0.0)
    for name in ("tiny/MQA", "tiny/MQA-CLA2"):
        take = curves.watch(model(name), TRAINING)
        take({"step": 40, "tokens": 40 * 1024, "loss": 2.5})
    assert len(shown) == 2
    texts = [text.get_text() for text in (*shown[-1].texts, *shown[-1].axes[0].texts)]
    assert "Trained to a loss of 2.50 and 2.50" in texts
    assert {"MQA  2.500", "MQA-CLA2  2.500"} <= set(texts)
