import dataclasses
import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cla_jax.configs import DataConfig
from cla_jax.data import (
    ByteTokenizer,
    TokenWindows,
    batch_rows,
    batches,
    data_fingerprint,
    evaluation_batches,
    write_token_stream,
)


@pytest.fixture(scope="module")
def stream(tmp_path_factory):
    """240 documents, 10,000 tokens or so, no two windows alike."""
    rng = np.random.default_rng(0)
    texts = ["".join(chr(c) for c in rng.integers(97, 123, n)) for n in rng.integers(0, 80, 240)]
    return write_token_stream(
        texts,
        ByteTokenizer(),
        tmp_path_factory.mktemp("data") / "stream",
        split="train",
        corpus_fingerprint="c" * 64,
    )


CONFIG = DataConfig(sequence_length=64, batch_size=4, seed=3)


def take(dataset, n):
    iterator = iter(dataset)
    rows = [next(iterator)["tokens"] for _ in range(n)]
    iterator.close()
    return rows


def document_of(stream, position):
    """By counting end tokens: independent of the offsets."""
    return int(np.sum(stream.tokens[:position] == stream.end_of_text))


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.differing_executors])
@given(length=st.integers(1, 300), data=st.data())
def test_windows_overlap_by_one(stream, length, data):
    windows = TokenWindows(stream, length, document_ids=True)
    assert len(windows) * length + 1 <= stream.num_tokens < (len(windows) + 1) * length + 1
    i = data.draw(st.integers(0, len(windows) - 1))
    item = windows[i]
    assert item["tokens"].dtype == item["documents"].dtype == np.int32
    np.testing.assert_array_equal(item["tokens"], stream.tokens[i * length : (i + 1) * length + 1])
    expected = [document_of(stream, i * length + t) for t in range(length + 1)]
    assert item["documents"].tolist() == expected


def test_batches_see_every_window_once_an_epoch_in_a_new_order(stream):
    windows = TokenWindows(stream, 64)
    n = len(windows)
    rows = np.concatenate(take(batches(stream, CONFIG), n))[: 2 * n]
    assert rows.shape == (2 * n, 65)
    assert rows.dtype == np.int32
    expected = sorted(windows[i]["tokens"].tolist() for i in range(n))
    first, second = rows[:n].tolist(), rows[n:].tolist()
    assert sorted(first) == sorted(second) == expected
    assert first != expected
    assert second != expected
    assert first != second


def test_order_follows_the_seed_alone(stream):
    first, again = take(batches(stream, CONFIG), 3), take(batches(stream, CONFIG), 3)
    np.testing.assert_array_equal(first, again)
    other = take(batches(stream, dataclasses.replace(CONFIG, seed=4)), 3)
    assert not np.array_equal(first, other)


def test_processes_share_each_batch(stream):
    whole = take(batches(stream, CONFIG), 60)
    parts = [take(batches(stream, CONFIG, rows=rows), 60) for rows in ((0, 1), (3, 1, 2))]
    for batch, left, right in zip(whole, *parts, strict=True):
        np.testing.assert_array_equal(left, batch[:2])
        np.testing.assert_array_equal(right, batch[[3, 1, 2]])


def test_state_is_one_number_and_resumes_exactly(stream):
    expected = take(batches(stream, CONFIG), 80)
    for taken in (0, 1, 39, 75):
        iterator = iter(batches(stream, CONFIG))
        for _ in range(taken):
            next(iterator)
        state = json.loads(json.dumps(iterator.get_state()))
        iterator.close()
        assert state == {"next_index": taken}
        resumed = iter(batches(stream, CONFIG))
        resumed.set_state(state)
        for batch in expected[taken : taken + 5]:
            np.testing.assert_array_equal(next(resumed)["tokens"], batch)
        resumed.close()


def test_document_mask_adds_documents(stream):
    assert set(next(iter(batches(stream, CONFIG)))) == {"tokens"}
    batch = next(iter(batches(stream, dataclasses.replace(CONFIG, document_mask=True))))
    ended = batch["tokens"][:, :-1] == stream.end_of_text
    np.testing.assert_array_equal(np.diff(batch["documents"], axis=1), ended)


@pytest.mark.parametrize(
    ("length", "batch", "processes"),
    [(64, 4, 1), (64, 4, 2), (1000, 8, 4), (50_000, 2, 2), (1, 64, 1)],
)
def test_evaluation_counts_every_target_once(stream, length, batch, processes):
    length = min(length, stream.num_tokens + 5)
    held = np.split(np.arange(batch), processes)
    parts = [list(evaluation_batches(stream, length, batch, rows=rows.tolist())) for rows in held]
    assert len({len(part) for part in parts}) == 1
    rows = [
        {key: value[i] for key, value in part.items()}
        for group in zip(*parts, strict=True)
        for part in group
        for i in range(batch // processes)
    ]
    assert rows[0]["mask"].dtype == np.float32
    targets = np.concatenate([row["tokens"][1:][row["mask"] > 0] for row in rows])
    inputs = np.concatenate([row["tokens"][:-1][row["mask"] > 0] for row in rows])
    np.testing.assert_array_equal(targets, stream.tokens[1:])
    np.testing.assert_array_equal(inputs, stream.tokens[:-1])


def test_evaluation_documents(stream):
    for batch in evaluation_batches(stream, 128, 8, document_ids=True):
        padding = batch["mask"] == 0
        assert (batch["documents"][:, 1:][padding] == -1).all()
        assert (batch["documents"][:, 1:][~padding] >= 0).all()


def test_clear_errors(stream):
    n = stream.num_tokens
    with pytest.raises(ValueError, match=rf"train stream has {n} tokens.*length {n}.*is {n - 1} "):
        batches(stream, dataclasses.replace(CONFIG, sequence_length=n))
    with pytest.raises(ValueError, match=r"rows \[3, 4\] of a batch: expected some of 0 to 3"):
        batches(stream, CONFIG, rows=(3, 4))
    with pytest.raises(ValueError, match=r"rows \[\] of a batch"):
        evaluation_batches(stream, 64, 4, rows=())
    with pytest.raises(ValueError, match=r"sequence_length=0"):
        TokenWindows(stream, 0)
    with pytest.raises(ValueError, match=r"seed=-1 must be at least 0"):
        batches(stream, dataclasses.replace(CONFIG, seed=-1))
    bad = dataclasses.replace(CONFIG)
    object.__setattr__(bad, "packing", "best_fit")  # past the type, as a saved config might be
    with pytest.raises(
        ValueError, match=r"packing='best_fit' is unknown; known: concat, first_fit"
    ):
        batches(stream, bad)


def test_data_fingerprint_names_what_differs(stream):
    saved = json.loads(json.dumps(data_fingerprint(stream, CONFIG)))
    assert saved == data_fingerprint(stream, CONFIG)
    changes = {"seed": 9, "batch_size": 2, "sequence_length": 32, "document_mask": True}
    for field, value in changes.items():
        other = data_fingerprint(stream, dataclasses.replace(CONFIG, **{field: value}))
        assert [key for key in saved if saved[key] != other[key]] == [field]


def test_batch_rows_are_the_rows_of_the_batch(stream):
    """Also in a second epoch, which is shuffled anew."""
    config = DataConfig(sequence_length=16, batch_size=3, seed=5)
    windows = TokenWindows(stream, 16)
    iterator = iter(batches(stream, config))
    for index in range(2 * len(windows) // 3):
        rows = batch_rows(stream, config, index)
        expected = np.stack([windows[row]["tokens"] for row in rows])
        np.testing.assert_array_equal(next(iterator)["tokens"], expected)
