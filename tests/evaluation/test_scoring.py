"""Scores against a naive computation, one request at a time; windows against the harness's own."""

import itertools
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from cla_jax.evaluation import Request, Scorer, rolling_windows
from cla_jax.evaluation.scoring import length_buckets
from tests.evaluation.models import CONTEXT, PATTERNS, Naive
from tests.models import reference
from tests.models.test_decoder import HEADS, config_of


def requests_for(vocabulary: int, naive: Naive, seed: int = 0) -> list[Request]:
    """Of many lengths: short ones, ones as long as the context, and ones that must be cut."""
    random = np.random.default_rng(seed)
    lengths = [(1, 1), (30, 2), (31, 3), (CONTEXT, 1), (1, CONTEXT), (CONTEXT + 9, 4),
               (12, CONTEXT - 5)]  # fmt: skip
    found = [
        Request(random.integers(vocabulary, size=c), random.integers(vocabulary, size=t))
        for c, t in lengths
    ]
    context = random.integers(vocabulary, size=5)
    greedy = list[int]()
    for _ in range(3):
        row = naive.log_probabilities(np.concatenate([context, greedy]).astype(np.int32))[-1]
        greedy.append(int(row.argmax()))
    return [*found, Request(context, greedy), Request(context, [*greedy[:2], (greedy[2] + 1) % 19])]


ALL = set(itertools.product(("llama", "neox"), PATTERNS))
QUICK = [("llama", "none"), ("neox", "CLA2"), ("llama", "MLKV")]


@pytest.mark.parity
@pytest.mark.parametrize(("architecture", "pattern"), QUICK)
def test_scores_are_those_of_one_request_at_a_time(architecture, pattern):
    check(architecture, pattern)


@pytest.mark.slow
@pytest.mark.parity
@pytest.mark.parametrize(("architecture", "pattern"), sorted(ALL - set(QUICK)))
def test_scores_of_the_other_combinations(architecture, pattern):
    check(architecture, pattern)


def check(architecture, pattern):
    """By prefill and through the cache, against the naive decoder in float64."""
    heads = list(HEADS.values())[list(PATTERNS).index(pattern)]
    config = config_of(PATTERNS[pattern], heads, architecture, sequence_length=CONTEXT)
    decoder = reference.decoder(config)
    naive = Naive(decoder)
    requests = requests_for(config.vocab_size, naive)
    expected = [naive.score(request) for request in requests]
    for through_cache in (False, True):
        found = Scorer(decoder, batch_size=2, through_cache=through_cache).score(requests)
        np.testing.assert_allclose(
            [score.log_likelihood for score in found], [e[0] for e in expected],
            rtol=2e-5, atol=2e-5,
        )  # fmt: skip
        assert [score.greedy for score in found] == [e[1] for e in expected]
        assert [score.greedy for score in found[-2:]] == [True, False]
        assert [score.truncated for score in found] == [
            len(r.context) + len(r.continuation) - 1 > CONTEXT for r in requests
        ]
        assert sum(score.truncated for score in found) == 2


@pytest.fixture(scope="module")
def decoder():
    return reference.decoder(config_of(PATTERNS["CLA2"], 1, sequence_length=CONTEXT))


def test_whatever_is_scored_compiles_a_program_for_each_length(decoder):
    scorer = Scorer(decoder, batch_size=3)
    random = np.random.default_rng(0)
    requests = [
        Request(random.integers(19, size=c), random.integers(19, size=t))
        for c, t in random.integers(1, 2 * CONTEXT, (200, 2))
    ]
    done: list[int] = []
    together = scorer.score(requests, done.append)
    assert scorer.shapes == ((3, 40), (3, 32))
    assert sum(done) == len(requests)
    compiled = scorer.compile_seconds
    assert compiled > 0
    one = scorer.score(requests[7:8])[0]
    assert one.log_likelihood == pytest.approx(together[7].log_likelihood, rel=1e-6)
    scorer.score(requests[::-1])
    assert (scorer.compile_seconds, len(scorer.shapes)) == (compiled, 2)
    assert scorer.score([]) == []


def test_shorter_lengths_go_in_larger_batches(decoder):
    assert length_buckets(2048) == (32, 64, 128, 256, 512, 1024, 2048)
    assert length_buckets(20) == (20,)
    scorer = Scorer(decoder)
    scorer.score([Request([1], [2])])
    assert scorer.shapes == ((8192 // 32, 32),)


def test_a_continuation_beyond_the_context_is_scored_whole(decoder):
    tokens = np.random.default_rng(1).integers(19, size=2 * CONTEXT + 7)
    naive = Naive(decoder)
    (found,) = Scorer(decoder, batch_size=1).score([Request([3, 5], tokens)])
    windows = rolling_windows(tokens, 5, CONTEXT)
    assert [len(w.continuation) for w in windows] == [CONTEXT, CONTEXT, 7]
    expected = sum(naive.score(window)[0] for window in windows)
    assert found.log_likelihood == pytest.approx(expected, rel=2e-5)
    assert found.truncated


@given(
    tokens=st.lists(st.integers(0, 18), max_size=60),
    context=st.integers(1, 12),
    data=st.data(),
)
def test_windows_are_the_harness_s(tokens, context, data):
    stride = data.draw(st.integers(1, context))
    expected = [
        make_disjoint_window(window)
        for window in get_rolling_token_windows(
            token_list=tokens, prefix_token=99, max_seq_len=context,
            context_len=context - stride + 1,
        )
    ]  # fmt: skip
    found = rolling_windows(tokens, 99, context, stride)
    assert [(list(w.context), list(w.continuation)) for w in found] == expected
    assert [t for w in found for t in w.continuation] == tokens
    if stride == context:
        default = rolling_windows(tokens, 99, context)
        assert [len(w.context) for w in default] == [len(w.context) for w in found]


def test_refusals(decoder):
    wrong: tuple[tuple[dict[str, Any], str], ...] = (
        ({"context": 0}, "context=0: test reads 1 to 40 tokens"),
        ({"context": CONTEXT + 1}, "context=41"),
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
    )
    for options, message in wrong:
        with pytest.raises(ValueError, match=message):
            Scorer(decoder, **options)
    scorer = Scorer(decoder)
    for request, message in (
        (Request([], [1]), "request 2 has no token of context"),
        (Request([1], []), "request 2 has no token of continuation"),
        (Request([1], [19]), "request 2 has token ids from 19 to 19; test takes 0 to 18"),
        (Request([-1], [1]), "request 2 has token ids from -1"),
    ):
        with pytest.raises(ValueError, match=message):
            scorer.score([Request([1], [2]), request])
    assert scorer.shapes == ()
    with pytest.raises(ValueError, match="stride=6 must be 1 to the context of 5 tokens"):
        rolling_windows([1, 2], 0, 5, 6)


def test_a_model_that_gives_no_numbers_is_refused(decoder):
    broken = jax.tree.map(lambda array: array * np.float32("nan"), decoder)
    with pytest.raises(ValueError, match="test gives request 1 of 1 the log-likelihood nan"):
        Scorer(broken, batch_size=1).score([Request([1], [2])])
