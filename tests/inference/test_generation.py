"""Continuations of ragged batches against loops of whole forward passes, one prompt at a time."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cla_jax.configs import ExecutionConfig, ModelConfig
from cla_jax.data import ByteTokenizer
from cla_jax.inference import GenerateConfig, Sampling, check_prompts, generate
from cla_jax.inference import generation as module
from cla_jax.inference.generation import _create, _extend, _prefill, bucket, decode_block
from cla_jax.sharing import KVSharing
from cla_jax.training import Model

CONFIG = ModelConfig(
    name="toy", sharing=KVSharing.cla(3, 2), d_model=16, ffn_dim=32, query_heads=2, kv_heads=1,
    head_dim=8, vocab_size=257, sequence_length=96, separate_kv_norm=True,
)  # fmt: skip
DECODE = ByteTokenizer().decode
NEW = 12
RANDOM = np.random.default_rng(1)
PROMPTS = [RANDOM.integers(0, 257, n) for n in (5, 40, 1, 17, 33, 16, 9)]
EXACT = GenerateConfig(NEW, cache_dtype="float32")


@pytest.fixture(scope="module")
def decoder():
    """Large random parameters: the likeliest token then depends on all that went before."""
    model = Model(CONFIG, ExecutionConfig(compute_dtype="float32"))
    random = np.random.default_rng(0)
    return model(
        jax.tree.map(
            lambda x: x + jnp.asarray(0.5 * random.normal(size=x.shape), jnp.float32), model.init(0)
        )
    ).unstacked()


@pytest.fixture(scope="module")
def naive(decoder):
    """Greedy continuations, by whole forward passes over rows of one length."""
    forward = jax.jit(lambda d, t: d(t))
    found = list[tuple[int, ...]]()
    for prompt in PROMPTS:
        tokens = list(prompt)
        for _ in range(NEW):
            row = np.zeros((1, 64), np.int32)
            row[0, : len(tokens)] = tokens
            tokens.append(int(np.argmax(np.asarray(forward(decoder, row))[0, len(tokens) - 1])))
        found.append(tuple(tokens[len(prompt) :]))
    return found


def test_seven_ragged_prompts_are_seven_single_runs(decoder, naive):
    assert len({token for row in naive for token in row}) > 20
    together = generate(decoder, PROMPTS, EXACT)
    assert [row.tokens for row in together] == naive
    assert {row.finished for row in together} == {"length"}
    assert [row.text for row in together] == [None] * len(PROMPTS)
    for prompt, expected in zip(PROMPTS, naive, strict=True):
        assert generate(decoder, [prompt], EXACT)[0].tokens == expected


@pytest.mark.parametrize("changes", [
    {"prefill_tokens": 8}, {"prefill_tokens": 50}, {"prefill_tokens": 1}, {"block": 1},
    {"block": 5}, {"max_new_tokens": 7},
])  # fmt: skip
def test_how_it_is_cut_changes_nothing(decoder, naive, changes):
    config = dataclasses.replace(EXACT, **changes)
    expected = [row[: config.max_new_tokens] for row in naive]
    assert [row.tokens for row in generate(decoder, PROMPTS, config)] == expected


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
def test_nor_does_it_with_an_8_bit_cache(decoder, naive, dtype):
    config = dataclasses.replace(EXACT, cache_dtype=dtype)
    together = [row.tokens for row in generate(decoder, PROMPTS, config)]
    assert together != naive  # large parameters: the rounding shows
    cut = dataclasses.replace(config, prefill_tokens=8, block=5)
    assert [row.tokens for row in generate(decoder, PROMPTS, cut)] == together


def test_a_bfloat16_cache_begins_alike(decoder, naive):
    found = generate(decoder, PROMPTS, GenerateConfig(NEW))
    same = [
        a == b for x, y in zip(found, naive, strict=True) for a, b in zip(x.tokens, y, strict=True)
    ]
    assert np.mean(same) > 0.5  # a rounded key may turn one token, and then all that follow


def test_nothing_to_add(decoder):
    assert [row.tokens for row in generate(decoder, PROMPTS, GenerateConfig(0))] == [()] * 7


def test_stop_tokens_end_their_row_alone(decoder, naive):
    end = naive[1][4]
    config = dataclasses.replace(EXACT, stop_tokens=(end, naive[3][0]))
    for row, expected in zip(generate(decoder, PROMPTS, config), naive, strict=True):
        stops = [i for i, token in enumerate(expected) if token in config.stop_tokens]
        assert row.tokens == expected[: stops[0] if stops else None]
        assert row.finished == ("stop_token" if stops else "length")


def test_a_stop_token_in_the_prompt_stops_nothing(decoder, naive):
    end = next(t for t in PROMPTS[0].tolist() if t not in naive[0])
    config = dataclasses.replace(EXACT, stop_tokens=(end,))
    assert generate(decoder, PROMPTS[:1], config)[0].tokens == naive[0]


@pytest.mark.parametrize("block", [1, 3, 16])
def test_stop_strings_and_streams(decoder, naive, block):
    stop = DECODE([naive[3][4], naive[3][5]])
    config = dataclasses.replace(EXACT, stop_strings=(stop,), block=block)
    streamed = [""] * len(PROMPTS)
    tokens = [list[int]() for _ in PROMPTS]

    def on_text(row, text):
        assert text
        streamed[row] += text

    rows = generate(
        decoder, PROMPTS, config, decode=DECODE, on_text=on_text,
        on_tokens=lambda row, new: tokens[row].extend(new),
    )  # fmt: skip
    assert "stop_string" in {row.finished for row in rows}
    for row, expected, text, ids in zip(rows, naive, streamed, tokens, strict=True):
        whole = DECODE(list(expected))
        assert row.text == text == whole.partition(stop)[0]
        assert (row.finished == "stop_string") == (stop in whole)
        assert row.tokens == expected[: len(row.tokens)] == tuple(ids[: len(row.tokens)])


def test_stops_when_all_rows_are_done(decoder, naive):
    """Early: the callback sees no block behind the one in which the last row ended."""
    calls = list[int]()
    config = dataclasses.replace(
        EXACT, max_new_tokens=40, block=2, stop_tokens=tuple(row[2] for row in naive)
    )
    generate(decoder, PROMPTS, config, on_tokens=lambda row, new: calls.append(len(new)))
    assert sum(calls) <= 3 * len(PROMPTS)


SAMPLED = dataclasses.replace(EXACT, sampling=Sampling(1.0, top_k=40, top_p=0.95, seed=5))


def test_a_sample_depends_on_its_row_alone(decoder):
    rows = generate(decoder, PROMPTS, SAMPLED)
    assert rows == generate(decoder, PROMPTS, SAMPLED)
    assert generate(decoder, PROMPTS[2:3], SAMPLED, first_row=2) == rows[2:3]
    assert generate(decoder, PROMPTS[5:], SAMPLED, first_row=5) == rows[5:]
    twins = generate(decoder, [PROMPTS[0], PROMPTS[0]], SAMPLED)
    assert twins[0].tokens != twins[1].tokens
    other = dataclasses.replace(SAMPLED, sampling=dataclasses.replace(SAMPLED.sampling, seed=6))
    assert rows != generate(decoder, PROMPTS, other)


def compilations() -> list[int]:
    return [f._cache_size() for f in (_create, _prefill, _extend, decode_block)]  # pyright: ignore


def test_other_prompts_of_like_lengths_compile_nothing(decoder):
    """Nor do other sampling values, stops or fewer steps at the end."""
    generate(decoder, PROMPTS, SAMPLED)
    before = compilations()
    for change in (0, 1, 2):
        prompts = [np.roll(prompt, change)[: max(len(prompt) - change, 1)] for prompt in PROMPTS]
        sampling = Sampling(0.5 + change, top_k=10 + change, top_p=0.5, seed=change)
        generate(decoder, prompts, dataclasses.replace(SAMPLED, sampling=sampling))
    assert compilations() == before


def test_room_makes_batches_of_one_shape(decoder):
    config = dataclasses.replace(EXACT, room=64)
    alone = generate(decoder, PROMPTS[:2], EXACT)
    assert generate(decoder, PROMPTS[:2], config) == alone
    before = decode_block._cache_size()  # pyright: ignore
    generate(decoder, PROMPTS[2:4], config)
    assert decode_block._cache_size() == before  # pyright: ignore


def test_fills_the_sequence_length_exactly(decoder):
    config = GenerateConfig(96 - 40, cache_dtype="float32")
    assert len(generate(decoder, [PROMPTS[1]], config)[0].tokens) == 56


@given(st.integers(1, 10**6))
@settings(max_examples=200)
def test_buckets(length):
    size = bucket(length)
    assert size >= length
    assert size <= max(16, 1.25 * length)
    assert bucket(size) == size
    assert size % 2 == 0
    assert len({bucket(n) for n in range(2 * length, 4 * length)} if length < 500 else {0}) <= 6


@pytest.mark.parametrize(
    ("prompts", "new", "message"),
    [
        ([], 4, "no prompts"),
        ([[]], 4, "the prompt is empty"),
        ([[1], []], 4, "prompt 2 of 2 is empty"),
        ([[1, 257]], 4, r"from 1 to 257; toy takes 0 to 256"),
        ([[-1]], 4, r"from -1 to -1; toy takes 0 to 256"),
        ([[1] * 90], 7, r"90 tokens and 7 new ones exceed toy's .* 96; at most 6"),
        ([[1] * 96], 7, r"at most 0"),
        ([[1] * 97], 0, r"the prompt has 97 tokens; toy's sequence length is 96"),
        ([[1, 2]], -5, r"max_new_tokens=-5"),
        ([np.array(1)] * 3, 4, r"prompt 1 of 3 is int64 of shape \(\): .* \[\[1, 2, 3\]\]"),
        ([np.array([1.7, 2.2])], 4, r"the prompt is float64"),
        ([[2**40]], 4, r"from 1099511627776 to"),
    ],
)
def test_refuses_prompts(decoder, prompts, new, message):
    with pytest.raises(ValueError, match=message):
        generate(decoder, prompts, GenerateConfig(new))
    with pytest.raises(ValueError, match=message):
        check_prompts(CONFIG, prompts, new)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_new_tokens": -1}, "max_new_tokens=-1 must be at least 0"),
        ({"prefill_tokens": 0}, "prefill_tokens=0"),
        ({"block": 0}, "block=0"),
        ({"room": -1}, "room=-1"),
        ({"stop_tokens": (-1,)}, "stop_tokens="),
        ({"stop_strings": ("",)}, "empty string"),
        ({"cache_dtype": "int4"}, "cache_dtype='int4': expected one of"),
    ],
)
def test_refuses_configs(changes, message):
    with pytest.raises(ValueError, match=message):
        GenerateConfig(**changes)


def test_texts_need_decode(decoder):
    with pytest.raises(ValueError, match="stop strings need texts: give decode"):
        generate(decoder, PROMPTS, GenerateConfig(NEW, stop_strings=("x",)))
    with pytest.raises(ValueError, match="on_text need"):
        generate(decoder, PROMPTS, EXACT, on_text=lambda row, text: None)


def test_a_batch_that_does_not_fit_is_refused_before_anything_is_allocated(decoder, monkeypatch):
    monkeypatch.setattr(module, "_free_memory", lambda decoder: 80_000_000)
    monkeypatch.setattr(module.KVCache, "create", None)
    many = [PROMPTS[0]] * 30_000
    with pytest.raises(ValueError, match=r"batch 30000 .* The largest batch that fits .*shares"):
        generate(decoder, many, EXACT)


def test_running_out_of_memory_says_what_helps(decoder, monkeypatch):
    def fail(*arguments, **options):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes")

    monkeypatch.setattr(module, "decode_block", fail)
    with pytest.raises(ValueError, match=r"batch 7 at context .*smaller batch, a shorter context"):
        generate(decoder, PROMPTS, EXACT)
