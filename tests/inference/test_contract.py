"""The contract: every way of running tokens through a decoder gives the same logits.

Full forward (scanned, unrolled, unstacked) = prefill (of all positions, and fast) = chunked
prefill, however it is cut = token-by-token decoding; and all are the naive float64 reference's.
Batches are ragged, padding holds other tokens, and the cache has no more room than the longest row
needs, so that the padding of a last chunk falls off its end.
"""

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cla_kernels import EIGHT_BIT
from hypothesis import given, settings
from hypothesis import strategies as st

from cla_jax.configs import ComputeDtype, ExecutionConfig, ModelConfig, RopeScaling
from cla_jax.inference.cache import KVCache
from cla_jax.inference.entries import DECODE_QUERIES
from cla_jax.inference.forward import extend, prefill
from cla_jax.models import Decoder
from cla_jax.sharing import KVSharing
from tests.models import reference
from tests.models.test_decoder import ALL, HEADS, QUICK, SHALLOW, config_of, owner_maps

# Of the largest logit. Float32 against float64: measured at most 3.2e-6.
FLOAT32 = 2e-5
# A bfloat16 cache under float32, one way against another: measured 2e-5, where an entry fell to the
# other side of a rounding; 1e-2 if prefill reads its K/V before they are rounded.
ROUNDED = 3e-4
# Bfloat16 throughout against float64, with weights of deviation `SPREAD / sqrt(D)` (with the
# float32 tests' 1.5, each layer doubles what the one before has rounded): measured at most 0.023,
# whether the way be a forward pass or a cache's.
BFLOAT16, SPREAD = 5e-2, 0.7
# What 8-bit K/V cost float32 logits, with the same weights. Measured: at most 8.1e-3 and 4.8e-2.
EIGHT_BITS = {"int8": 2e-2, "float8_e4m3fn": 1e-1}

LENGTH = 12
SHORT, LONG = 4, 10  # chunks on either side of DECODE_QUERIES: the two routes of attention
assert SHORT <= DECODE_QUERIES < LONG <= LENGTH
WIDTHS = np.array([LENGTH, 5, 9])


@functools.cache
def jitted(way, all_logits):
    return jax.jit(
        functools.partial(way, all_logits=all_logits),
        donate_argnums=2,
        compiler_options=reference.QUICK_COMPILE,
    )


@functools.partial(jax.jit, compiler_options=reference.QUICK_COMPILE)
def forward(decoder: Decoder, tokens: Any) -> jax.Array:
    return decoder(tokens)


def made(
    config: ModelConfig, way: str, dtype: ComputeDtype = "float32", seed=0, spread=1.5
) -> Decoder:
    """A decoder of the same parameters however it is run."""
    execution = ExecutionConfig(compute_dtype=dtype, scan=way != "unrolled")
    decoder = reference.decoder(config, execution, seed, spread)
    return decoder.unstacked() if way == "unstacked" else decoder


def truth_of(decoder: Decoder, tokens: np.ndarray) -> np.ndarray:
    """`[B, T, V]` of the naive reference."""
    with reference.double():
        params = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), reference.extract(decoder))
        return np.asarray(reference.logits(decoder.config, params, tokens))


class Run:
    """Feeds rows of tokens to a cache and keeps the logits that come back, by row and position."""

    def __init__(
        self, decoder: Decoder, tokens: np.ndarray, cache_dtype="float32", *, stacked=False
    ) -> None:
        self.decoder, self.tokens = decoder, tokens
        batch, vocab = tokens.shape[0], decoder.config.vocab_size
        self.cache = KVCache.create(
            decoder.config, batch, tokens.shape[1], cache_dtype, stacked=stacked
        )
        self.fed = np.zeros(batch, int)
        self.logits = np.full((*tokens.shape, vocab), np.nan)
        self.known = np.zeros(tokens.shape, bool)

    def __call__(self, way, widths, chunk: int, all_logits: bool, first_row: int | None = None):
        """The next `widths` tokens of each row, padded to `chunk` with tokens of no row's."""
        widths = np.asarray(widths)
        rows = (first_row or 0) + np.arange(len(widths))
        if way is prefill:
            self.fed[rows], self.known[rows] = 0, False
        padded = np.full((len(widths), chunk), self.decoder.config.vocab_size, np.int32)
        for i, row in enumerate(rows):
            padded[i, : widths[i]] = self.tokens[row, self.fed[row] :][: widths[i]]
        where = {} if first_row is None else {"first_row": jnp.int32(first_row)}
        logits, self.cache = jitted(way, all_logits)(
            self.decoder, padded, self.cache, jnp.asarray(widths, jnp.int32), **where
        )
        assert logits.dtype == jnp.float32
        logits = np.asarray(logits)
        for i, row in enumerate(rows):
            for t in range(widths[i]) if all_logits else range(widths[i] - 1, widths[i]):
                if t >= 0:
                    at = self.fed[row] + t
                    self.logits[row, at] = logits[i, t] if all_logits else logits[i]
                    self.known[row, at] = True
            self.fed[row] += widths[i]
        np.testing.assert_array_equal(self.cache.lengths, self.fed)
        return self

    def token_by_token(self, widths) -> "Run":
        """Until each row has `widths` tokens; a row that has all it needs is left alone."""
        while (self.fed < widths).any():
            self(extend, (self.fed < widths).astype(int), 1, all_logits=False)
        return self

    def chunks(self, widths, chunk: int, all_logits: bool) -> "Run":
        """As `token_by_token`, with more at a time, and different widths of the rows."""
        for turn in itertools.count():
            left = widths - self.fed
            if not left.any():
                return self
            most = (chunk, 1, chunk - 1, 0)
            some = np.array([most[(turn + row) % 4] for row in range(len(left))])
            self(extend, np.minimum(left, some), chunk, all_logits)
        raise AssertionError

    def error(self, expected: np.ndarray) -> float:
        """Of the logits that came back."""
        assert self.known.any()
        found, wanted = self.logits[self.known], expected[self.known]
        assert np.isfinite(found).all()
        return float(np.abs(found - wanted).max() / np.abs(expected).max())


def relative(found: jax.Array, expected: np.ndarray) -> float:
    assert found.dtype == jnp.float32
    return float(np.abs(np.asarray(found) - expected).max() / np.abs(expected).max())


def errors(
    config: ModelConfig, turn: int, dtype: ComputeDtype = "float32", *, spread=1.5, ways=1
) -> dict[str, float]:
    """The error of a full forward, and of one, two or all four `ways` of using a cache.

    Those of a way of running the model, or of two ways of using its cache, whose `turn` it is.
    """
    make = functools.cache(lambda way: made(config, way, dtype, turn, spread))
    tokens = reference.tokens_for(config, len(WIDTHS), LENGTH, seed=turn)
    truth = truth_of(make("scanned"), tokens)

    def run(at: int) -> Run:
        # A cache of either layout, under a decoder of either kind.
        decoder = make("unstacked" if (at + turn) % 3 == 2 else "scanned")
        return Run(decoder, tokens, dtype, stacked=(at + turn) % 2 == 0)

    def begun() -> Run:
        return run(0)(prefill, np.minimum(WIDTHS, [3, 4, 1]), LENGTH, all_logits=False)

    def long_chunks() -> Run:
        begun = run(2)(prefill, [LONG, 1, 7], LONG, all_logits=True)
        return begun.chunks(WIDTHS, LONG, all_logits=turn % 4 < 2)

    cached = {
        "fast prefill, short chunks": lambda: begun().chunks(WIDTHS, SHORT, all_logits=False),
        "fast prefill, tokens": lambda: begun().token_by_token(WIDTHS),
        "fast prefill of whole rows": lambda: run(0)(prefill, WIDTHS, LENGTH, all_logits=False),
        "all of a prefill, long chunks": long_chunks,
    }
    chosen = list(cached) if ways == 4 else list(cached)[turn % 2 :: 2][:ways]
    forwards = ("scanned", "unrolled", "unstacked")[turn % 3]
    return {
        forwards: relative(forward(make(forwards), tokens), truth),
        **{way: cached[way]().error(truth) for way in chosen},
    }


def check(config: ModelConfig, turn: int, *, ways=1) -> None:
    found = errors(config, turn, ways=ways)
    assert max(found.values()) < FLOAT32, found


@pytest.mark.parity
@pytest.mark.parametrize(("pattern", "architecture", "heads"), QUICK)
def test_every_way_gives_the_references_logits(pattern, architecture, heads):
    turn = list(SHALLOW).index(pattern)
    check(config_of(SHALLOW[pattern], HEADS[heads], architecture), turn)


@pytest.mark.slow
@pytest.mark.parity
@pytest.mark.parametrize(
    ("pattern", "architecture", "heads"), [case for case in ALL if case not in QUICK]
)
def test_every_way_of_every_other_combination(pattern, architecture, heads):
    # Neighbours take turns: a pattern and a number of heads meet all four ways, over architectures.
    turn = ALL.index((pattern, architecture, heads))
    check(config_of(SHALLOW[pattern], HEADS[heads], architecture), turn, ways=2)


@pytest.mark.parity
@settings(max_examples=2)
@given(owner_maps(5), st.sampled_from(["llama", "neox"]))
def test_random_owner_maps(owners, architecture):
    check(config_of(KVSharing(owners), 2, architecture), sum(owners))


@pytest.mark.slow
@pytest.mark.parity
@settings(max_examples=4)
@given(owner_maps(9), st.sampled_from(["llama", "neox"]), st.sampled_from([1, 2, 4]))
def test_many_random_owner_maps(owners, architecture, kv_heads):
    check(config_of(KVSharing(owners), kv_heads, architecture), sum(owners), ways=4)


def test_stretched_rotary_frequencies_reach_the_cache():
    # The naive reference has none; the full forward is held against transformers' elsewhere.
    scaling = RopeScaling(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8
    )
    plain = config_of(KVSharing.cla(4, 2), 2)
    config = dataclasses.replace(plain, rope_scaling=scaling)
    tokens = reference.tokens_for(config, len(WIDTHS), LENGTH, seed=0)
    decoder = made(config, "scanned")
    expected = np.asarray(forward(decoder, tokens))
    assert relative(forward(made(plain, "scanned"), tokens), expected) > 1e-2
    run = Run(decoder, tokens)(prefill, [3, 4, 1], LENGTH, all_logits=False)
    assert run.token_by_token(WIDTHS).error(expected) < FLOAT32


# --- any chunking, any rows -----------------------------------------------------------------------

# Readers that are not their owners' neighbours, and an owner that nobody reads.
OWNERS = KVSharing((0, 1, 0, 3, 1))


@functools.cache
def some_model() -> tuple[Decoder, np.ndarray, np.ndarray]:
    """A decoder, four rows of tokens, and their logits by the reference."""
    config = config_of(OWNERS, 2)
    decoder = reference.decoder(config)
    tokens = reference.tokens_for(config, 4, LENGTH)
    return decoder.unstacked(), tokens, truth_of(decoder, tokens)


@st.composite
def cuts(draw):
    """Chunks' lengths and the widths of each row in each; rows may have none, or nothing at all."""
    chunks = draw(st.lists(st.sampled_from([1, SHORT, LONG]), min_size=1, max_size=6))
    fed, plan = np.zeros(4, int), []
    for chunk in chunks:
        widths = [draw(st.integers(0, min(chunk, LENGTH - int(n)))) for n in fed]
        plan.append((chunk, widths))
        fed += widths
    return plan


@pytest.mark.parity
@settings(max_examples=25)
@given(st.lists(st.integers(1, LONG), min_size=4, max_size=4), st.booleans(), cuts())
def test_any_chunking_gives_the_references_logits(begun, begin, plan):
    decoder, tokens, truth = some_model()
    run = Run(decoder, tokens)
    if begin:
        run(prefill, begun, LONG, all_logits=False)
    for chunk, widths in plan:
        run(extend, np.minimum(widths, LENGTH - run.fed), chunk, all_logits=chunk > 1)
    if run.known.any():
        assert run.error(truth) < FLOAT32


@pytest.mark.parity
def test_rows_in_groups_leave_the_others_alone():
    decoder, tokens, truth = some_model()
    run = Run(decoder, tokens)

    def group(way, widths, chunk, first_row):
        before = jax.tree.map(np.asarray, run.cache)
        run(way, widths, chunk, all_logits=False, first_row=first_row)
        others = [row for row in range(4) if row not in (first_row, first_row + 1)]
        for old, new in zip((*before.k, *before.v), (*run.cache.k, *run.cache.v), strict=True):
            np.testing.assert_array_equal(np.asarray(new)[:, others], old[:, others])

    group(prefill, [7, 3], LONG, 2)
    group(prefill, [1, 10], LONG, 0)
    group(extend, [4, 0], SHORT, 0)
    group(extend, [1, 4], SHORT, 1)
    group(extend, [1, 6], LONG, 2)
    group(prefill, [5, 2], LONG, 1)  # what they held is forgotten
    run.token_by_token(np.full(4, LENGTH))
    assert run.error(truth) < FLOAT32


def test_a_prefill_forgets_what_the_rows_held():
    decoder, tokens, truth = some_model()
    run = Run(decoder, tokens)(prefill, [10, 10, 10, 10], LONG, all_logits=False)
    run(prefill, [2, 3, 1, 10], LONG, all_logits=False).token_by_token(np.full(4, LENGTH))
    assert run.error(truth) < FLOAT32


def test_a_full_row_stays_as_it_is():
    decoder, tokens, truth = some_model()
    run = Run(decoder, tokens)(prefill, [10, 3, 10, 5], LONG, all_logits=False)
    run.token_by_token(np.array([LENGTH, 3, LENGTH, 5]))
    before = jax.tree.map(np.asarray, run.cache)
    one = np.stack([tokens[row, n % LENGTH] for row, n in enumerate(run.fed)])[:, None]
    logits, cache = jitted(extend, False)(decoder, one, run.cache, jnp.ones(4, jnp.int32))
    np.testing.assert_array_equal(cache.lengths, [LENGTH, 4, LENGTH, 6])
    for old, new in zip((*before.k, *before.v), (*cache.k, *cache.v), strict=True):
        np.testing.assert_array_equal(np.asarray(new)[:, ::2], old[:, ::2])
    found, expected = np.asarray(logits)[[1, 3]], truth[[1, 3], [3, 5]]
    np.testing.assert_allclose(found, expected, atol=FLOAT32 * np.abs(truth).max(), rtol=0)


# --- bfloat16 -------------------------------------------------------------------------------------


@pytest.mark.parity
@pytest.mark.parametrize(
    ("pattern", "architecture", "heads"),
    [pytest.param(*case, marks=() if case[0] == "CLA2" else pytest.mark.slow) for case in QUICK],
)
def test_every_way_in_bfloat16(pattern, architecture, heads):
    turn = list(SHALLOW).index(pattern)
    config = config_of(SHALLOW[pattern], HEADS[heads], architecture)
    found = errors(config, turn, "bfloat16", spread=SPREAD)
    assert max(found.values()) < BFLOAT16, found


@pytest.mark.parametrize("stacked", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_prompt_is_read_as_it_will_be_cached(stacked):
    """A cache of fewer bits than the activations: prefill must see the rounded K/V too."""
    decoder, tokens, truth = some_model()

    def run():
        return Run(decoder, tokens, "bfloat16", stacked=stacked)

    widths = np.full(4, LENGTH)
    whole = run()(prefill, widths, LENGTH, all_logits=True)
    assert ROUNDED < whole.error(truth) < BFLOAT16
    fast = run()(prefill, widths - 5, LENGTH, all_logits=False).token_by_token(widths)
    assert fast.error(whole.logits) < ROUNDED
    if stacked:
        for chunk in (SHORT, LONG):
            cut = run().chunks(widths, chunk, all_logits=True)
            assert cut.error(whole.logits) < ROUNDED


# --- eight bits -----------------------------------------------------------------------------------


def check_eight_bits(config: ModelConfig, turn: int, dtype: str, *, thorough=False) -> None:
    """All ways with a cache give the same logits, and those are near the float ones."""
    decoder = made(config, "unstacked" if turn % 2 else "scanned", seed=turn, spread=SPREAD)
    tokens = reference.tokens_for(config, len(WIDTHS), LENGTH, seed=turn)

    def begun(all_logits: bool) -> Run:
        run = Run(decoder, tokens, dtype, stacked=turn % 3 == 0)
        return run(prefill, np.minimum(WIDTHS, [3, 4, 1]), LENGTH, all_logits=all_logits)

    whole = Run(decoder, tokens, dtype)(prefill, WIDTHS, LENGTH, all_logits=True)
    found = {"tokens": begun(all_logits=True).token_by_token(WIDTHS)}
    if thorough:
        long = Run(decoder, tokens, dtype)(prefill, [LONG, 1, 7], LONG, all_logits=True)
        found["fast prefill, short chunks"] = begun(False).chunks(WIDTHS, SHORT, all_logits=False)
        found["long chunks"] = long.chunks(WIDTHS, LONG, all_logits=True)
    lost = whole.error(truth_of(decoder, tokens))
    assert FLOAT32 < lost < EIGHT_BITS[dtype]
    for way, run in found.items():
        both = run.known & whole.known
        assert both.any(), way
        each = np.abs(run.logits - whole.logits)[both].max(-1) / np.abs(whole.logits[both]).max()
        # A number that falls to the other side of a rounding shows in the rest of its row; were
        # anything read before it is quantised, all positions would be off by as much as is lost.
        assert np.median(each) < FLOAT32, way
        assert each.max() < lost / 3, way


@pytest.mark.parity
@pytest.mark.parametrize(
    ("pattern", "architecture", "heads"),
    [
        pytest.param(*case, marks=[pytest.mark.slow] * (case[0] not in ("CLA2", "KeepEnds")))
        for case in QUICK
    ],
)
def test_every_way_with_an_8_bit_cache(pattern, architecture, heads):
    turn = list(SHALLOW).index(pattern)
    config = config_of(SHALLOW[pattern], HEADS[heads], architecture)
    check_eight_bits(config, turn, EIGHT_BIT[turn % 2], thorough=pattern == "CLA2")


@pytest.mark.slow
@pytest.mark.parity
@pytest.mark.parametrize(("pattern", "architecture", "heads"), QUICK)
def test_every_way_with_the_other_8_bit_cache(pattern, architecture, heads):
    turn = list(SHALLOW).index(pattern)
    config = config_of(SHALLOW[pattern], HEADS[heads], architecture)
    check_eight_bits(config, turn, EIGHT_BIT[(turn + 1) % 2], thorough=True)


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", [prefill, extend])
def test_refusals(way):
    decoder, tokens, _ = some_model()

    def call(tokens, cache=None):
        cache = KVCache.create(decoder.config, 3, 8) if cache is None else cache
        return way(decoder, jnp.asarray(tokens), cache)

    with pytest.raises(ValueError, match="4 rows of tokens: the cache has 3"):
        call(tokens[:, :2])
    with pytest.raises(ValueError, match=r"0 rows of tokens: .*expected 1 or more"):
        call(tokens[:0, :2])
    with pytest.raises(ValueError, match="12 tokens a row: the cache has room for 8"):
        call(tokens[:3])
    with pytest.raises(ValueError, match=r"0 tokens a row: .*expected 1 or more"):
        call(tokens[:3, :0])
    other = KVCache.create(config_of(KVSharing.none(5), 2), 3, 8)
    with pytest.raises(ValueError, match="cache of another model than test: KV layers 5 there"):
        call(tokens[:3, :2], other)


@pytest.mark.parametrize("way", [prefill, extend])
@pytest.mark.parametrize("first_row", [3, -1])
def test_rows_that_the_cache_does_not_have_are_refused(way, first_row):
    decoder, tokens, _ = some_model()
    cache = KVCache.create(decoder.config, 4, LENGTH)
    with pytest.raises(ValueError, match="row"):
        jax.eval_shape(functools.partial(way, first_row=first_row), decoder, tokens[:2, :2], cache)
