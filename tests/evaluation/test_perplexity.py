"""Perplexity: what is counted, and a stride of one against every token with all its context."""

import math

import numpy as np
import pytest

from cla_jax.evaluation import Perplexity, Scorer, perplexity
from tests.evaluation.models import CONTEXT, Naive, text_model

TEXTS = ["The cat  sat on\nthe mat. " * 2, "", "é"]


@pytest.fixture(scope="module")
def model():
    return text_model()


@pytest.mark.parity
def test_stride_one_gives_every_token_all_the_context_there_is(model):
    scorer = Scorer(model.decoder, batch_size=4)
    found = perplexity(scorer, model.tokenizer, TEXTS, stride=1)
    naive, total = Naive(model.decoder), 0.0
    for text in TEXTS:
        tokens = [256, *text.encode()]
        for end in range(1, len(tokens)):
            seen = np.array(tokens[max(0, end - CONTEXT) : end])
            # The first window is scored in one piece: its tokens see what comes before them.
            total += naive.log_probabilities(seen)[-1, tokens[end]]
    assert found.log_likelihood == pytest.approx(total, rel=2e-5)
    assert perplexity(scorer, model.tokenizer, TEXTS).log_likelihood != found.log_likelihood


@pytest.mark.parity
@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
def test_through_an_8_bit_cache_or_by_prefill(model, dtype):
    by_prefill, by_tokens = (
        perplexity(
            Scorer(model.decoder, batch_size=4, through_cache=through, cache_dtype=dtype),
            model.tokenizer, TEXTS,
        ).log_likelihood
        for through in (False, True)
    )  # fmt: skip
    exact = perplexity(Scorer(model.decoder, batch_size=4), model.tokenizer, TEXTS).log_likelihood
    assert by_prefill == pytest.approx(by_tokens, rel=1e-5)
    assert 1e-5 < abs(by_prefill / exact - 1) < 0.1


def test_an_unknown_cache_dtype_is_refused(model):
    with pytest.raises(ValueError, match=r"cache_dtype='int9': .* nearest is 'int8'"):
        Scorer(model.decoder, cache_dtype="int9")


def test_counts_and_kinds(model):
    found = perplexity(Scorer(model.decoder), model.tokenizer, TEXTS)
    assert (found.tokens, found.bytes) == (52, 52)
    # "".split by the harness's rule is one piece; so is what lies behind a last space.
    assert found.words == 13 + 1 + 1
    assert found.token_perplexity == found.byte_perplexity
    assert found.bits_per_byte == pytest.approx(math.log2(found.byte_perplexity))
    assert found.word_perplexity == pytest.approx(found.byte_perplexity ** (52 / 15))
    assert Perplexity(-1e6, 10, 10, 1).word_perplexity == math.inf


def test_no_text_is_refused(model):
    with pytest.raises(ValueError, match="no text"):
        perplexity(Scorer(model.decoder), model.tokenizer, ["", ""])
