"""Sampling against numpy, and sampled frequencies against exact probabilities."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from cla_jax.inference.sampling import Sampling, row_keys, sample, step_keys

V, ROWS = 12, 20_000
draw = jax.jit(sample)


def probabilities(logits: np.ndarray, sampling: Sampling) -> tuple[np.ndarray, float]:
    """Exact probabilities of one row `[V]`, and how near top-p came to another choice of tokens."""
    x = np.asarray(logits, np.float64) / sampling.temperature
    kept = np.ones(x.size, bool)
    if sampling.top_k:
        kept &= x >= np.sort(x)[-min(sampling.top_k, x.size)]
    p = np.where(kept, np.exp(x - x.max()), 0)
    p /= p.sum()
    margin = 1.0
    if sampling.top_p < 1:
        # A token stays while those likelier than it hold less than top_p.
        above = np.array([p[p > q].sum() for q in p])
        margin = np.abs(above - sampling.top_p).min()
        p = np.where(above < sampling.top_p, p, 0)
        p /= p.sum()
    return p, margin


@functools.cache
def keys(seed: int = 0):
    return row_keys(seed, range(ROWS))


def frequencies(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    rows = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (ROWS, logits.size))
    tokens = np.asarray(draw(rows, keys(sampling.seed), sampling.arrays()))
    assert tokens.dtype == np.int32
    return np.bincount(tokens, minlength=logits.size) / ROWS


@given(
    # Halves and a few values: equal logits are common, and exact in float32.
    logits=st.lists(st.integers(-8, 8).map(lambda n: n / 2), min_size=V, max_size=V),
    temperature=st.sampled_from([0.5, 1.0, 2.0]),
    top_k=st.integers(0, V + 3),
    top_p=st.floats(0.01, 1.0),
)
def test_draws_the_exact_probabilities(logits, temperature, top_k, top_p):
    sampling = Sampling(temperature, top_k, top_p)
    exact, margin = probabilities(np.array(logits), sampling)
    assume(margin > 1e-4)
    found = frequencies(np.array(logits), sampling)
    assert not found[exact == 0].any()
    # Six standard deviations of each frequency: wrong once in 10**8 times.
    assert np.all(np.abs(found - exact) <= 6 * np.sqrt(exact * (1 - exact) / ROWS) + 1e-9)


@pytest.mark.parametrize(
    ("sampling", "support"),
    [
        (Sampling(1.0), {0, 1, 2, 3}),
        (Sampling(1.0, top_k=1), {1, 3}),  # ties stay
        (Sampling(1.0, top_k=3), {0, 1, 3}),
        (Sampling(1.0, top_k=100), {0, 1, 2, 3}),
        (Sampling(1.0, top_p=1e-30), {1, 3}),
        (Sampling(1.0, top_p=1e-60), {1, 3}),  # 0 in float32
        (Sampling(1e-45), {1, 3}),
        (Sampling(1e-45, top_k=2, top_p=0.5), {1, 3}),
        (Sampling(1e300), {0, 1, 2, 3}),
    ],
)
def test_which_tokens_are_drawn(sampling, support):
    found = frequencies(np.array([1.0, 2.0, 0.0, 2.0]), sampling)
    assert set(np.flatnonzero(found)) == support


def test_top_p_of_one_drops_no_unlikely_token_from_a_large_vocabulary():
    """In float32 the shares of the likelier half sum to 1 or more before the others' turn."""
    from cla_jax.inference.sampling import _kept

    logits = jnp.linspace(0, -40, 50_000, dtype=jnp.float32)[None]
    assert bool(_kept(logits, np.int32(0), np.float32(1.0)).all())
    assert int(_kept(logits, np.int32(40_000), np.float32(1.0)).sum()) == 40_000


def test_greedy_takes_the_lowest_of_the_likeliest():
    logits = jnp.asarray([[0.0, 3.0, 3.0], [-jnp.inf, -1.0, -2.0]])
    tokens = draw(logits, row_keys(0, range(2)), Sampling().arrays())
    assert tokens.tolist() == [1, 1]


@pytest.mark.parametrize(
    "sampling", [Sampling(0.9), Sampling(0.9, top_k=7), Sampling(0.9, top_k=9, top_p=0.8)]
)
def test_a_row_does_not_depend_on_its_neighbours(sampling):
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(6, 40)), jnp.float32)
    together = draw(logits, row_keys(5, range(6)), sampling.arrays())
    alone = [draw(logits[i : i + 1], row_keys(5, [i]), sampling.arrays())[0] for i in range(6)]
    assert together.tolist() == list(map(int, alone))
    swapped = draw(logits[::-1], row_keys(5, np.arange(6)[::-1]), sampling.arrays())
    assert swapped.tolist() == together.tolist()[::-1]


def test_streams_differ_by_seed_row_and_step_and_repeat():
    logits = jnp.zeros((64, 1000), jnp.float32)
    sampling = Sampling(1.0).arrays()

    def tokens(seed, rows, position):
        at = jnp.full((64,), position, jnp.int32)
        return draw(logits, step_keys(row_keys(seed, rows), at), sampling).tolist()

    first = tokens(0, range(64), 7)
    assert first == tokens(0, range(64), 7)
    others = [tokens(1, range(64), 7), tokens(0, range(64, 128), 7), tokens(0, range(64), 8)]
    for other in others:
        assert sum(a == b for a, b in zip(first, other, strict=True)) < 5
    assert len(set(first)) > 50  # 64 rows of the same logits


def test_other_numbers_compile_nothing():
    traced = 0

    @jax.jit
    def counted(logits, keys, sampling):
        nonlocal traced
        traced += 1
        return sample(logits, keys, sampling)

    logits, some = jnp.zeros((2, 8), jnp.float32), row_keys(0, range(2))
    base = Sampling(1.0, top_k=2)
    for changes in (
        {},
        {"temperature": 2.0},
        {"top_k": 5},
        {"top_k": 0, "top_p": 0.5},
        {"seed": 3},
    ):
        counted(logits, some, dataclasses.replace(base, **changes).arrays())
    assert traced == 1
    counted(logits, some, Sampling(1.0).arrays())
    counted(logits, some, Sampling(top_k=5).arrays())
    assert traced == 3


def test_only_truncation_sorts_and_greedy_draws_nothing():
    def program(sampling):
        shapes = (
            jax.ShapeDtypeStruct((2, 8), jnp.float32),
            jax.eval_shape(lambda: row_keys(0, [0, 1])),
        )
        return draw.lower(*shapes, sampling.arrays()).as_text()

    assert "sort" in program(Sampling(1.0, top_p=0.5))
    assert "sort" not in program(Sampling(1.0))
    assert "threefry" in program(Sampling(1.0))
    assert "threefry" not in program(Sampling())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -0.1}, r"temperature=-0.1 must be 0 \(greedy\)"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"temperature": float("inf")}, "temperature=inf"),
        ({"top_k": -1}, "top_k=-1 must be at least 0"),
        ({"top_p": 0.0}, "top_p=0.0 must be above 0 and at most 1"),
        ({"top_p": 1.5}, "the nearest is 1"),
        ({"top_p": float("nan")}, "top_p=nan"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": 2**32}, "seed=4294967296"),
    ],
)
def test_refuses(values, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**values)
