"""Noise and verdicts, against NumPy and SciPy, and at their limits."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from cla_jax.reporting.claims import Below, Claim, Sample
from cla_jax.reporting.judging import (
    Noise,
    judge,
    noise_of,
    plausible_rates,
    rate_verdict,
    verdict_of,
)

LOSSES = st.lists(st.floats(1, 5), min_size=1, max_size=4)


@given(st.lists(LOSSES, max_size=6))
def test_noise_is_the_residual_deviation_around_each_models_mean(groups):
    noise = noise_of(groups)
    repeated = [np.array(group) for group in groups if len(group) > 1]
    if not repeated:
        assert noise is None
        return
    residuals = np.concatenate([group - group.mean() for group in repeated])
    degrees = len(residuals) - len(repeated)
    assert noise is not None
    assert (noise.degrees, noise.groups) == (degrees, len(repeated))
    assert noise.deviation == pytest.approx(math.sqrt((residuals**2).sum() / degrees), abs=1e-9)


@pytest.mark.parametrize("degrees", [1, 2, 6, 10, 11, 12, 59, 60, 1000])
def test_the_quantile_is_students_and_never_below_it(degrees):
    exact = stats.t.ppf(0.975, degrees)
    assert exact - 5e-4 < Noise(1.0, degrees, 1).quantile < exact + 0.05
    assert Noise(0.5, degrees, 1).least(1, 4) == pytest.approx(
        Noise(1.0, degrees, 1).quantile * 0.5 * math.sqrt(1.25)
    )


@given(LOSSES, LOSSES, st.floats(0, 0.1), st.floats(0, 0.05))
def test_the_opposite_claim_has_the_opposite_verdict(one, two, deviation, tolerance):
    there = {"a": Sample(tuple(one), 1, 13.0), "b": Sample(tuple(two), 1, 13.0)}
    noise = Noise(deviation, 3, 3)

    def verdict(lower: str, higher: str, tolerance: float = 0.0):
        (judged,) = judge([Claim("0", "", (Below(lower, higher, tolerance),))], there, noise)
        return judged.verdict

    opposite = {"reproduced": "contradicted", "contradicted": "reproduced"}
    first = verdict("a", "b")
    assert verdict("b", "a") == opposite.get(str(first), first)
    if first == "reproduced":
        assert verdict("a", "b", tolerance) == first
    least = noise.least(len(one), len(two))
    difference = np.mean(one) - np.mean(two)
    if abs(abs(difference) - least) > 1e-9:
        expected = "within noise" if abs(difference) < least else (
            "reproduced" if difference < 0 else "contradicted"
        )  # fmt: skip
        assert first == expected


def test_a_claim_of_several_pairs():
    def of(*differences):
        there = {f"a{i}": Sample((3.0 + d,), 1, 13.0) for i, d in enumerate(differences)}
        there["b"] = Sample((3.0,), 1, 13.0)
        claim = Claim("0", "", tuple(Below(f"a{i}", "b") for i in range(len(differences))))
        return verdict_of(judge([claim], there, Noise(0.01, 60, 6)))

    assert of(-0.1, -0.2) == "reproduced"
    assert of(-0.1, 0.001) == "within noise"
    assert of(-0.1, 0.001, 0.1) == "contradicted"
    assert of() is None


def test_plausible_rates():
    noise = Noise(0.01, 60, 6)  # two runs each: 0.02 counts
    losses = {1e-3: (3.1, 3.1), 2e-3: (3.0, 3.0), 3e-3: (3.015, 3.015), 4e-3: (3.022,)}
    assert plausible_rates(losses, noise) == (2e-3, 3e-3, 4e-3)
    assert plausible_rates(losses, Noise(0.0, 1, 1)) == (2e-3,)
    assert rate_verdict((2e-3,), (1e-3, 1.5e-3)) == "reproduced"
    assert rate_verdict((1e-3,), (1e-3, 1.5e-3)) == "contradicted"
    assert rate_verdict((1e-3, 2e-3), (1e-3,)) == "within noise"
