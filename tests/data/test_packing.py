import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cla_jax.configs import DataConfig
from cla_jax.data import ByteTokenizer, PackedRows, batches, first_fit, write_token_stream


def naive_first_fit(lengths: list[int], capacity: int) -> list[list[int]]:
    """By the book: each document, the longest first, into the first row with room."""
    rows: list[list[int]] = []
    rooms: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -min(lengths[i], capacity)):
        length = min(lengths[i], capacity)
        row = next((r for r, room in enumerate(rooms) if room >= length), len(rows))
        if row == len(rows):
            rows.append([])
            rooms.append(capacity)
        rows[row].append(i)
        rooms[row] -= length
    return [sorted(row) for row in rows]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(1, 60), max_size=90), st.integers(1, 45))
def test_first_fit_is_the_textbook_algorithm(lengths, capacity):
    packing = first_fit(np.array(lengths, np.int64), capacity)
    rows = [
        packing.documents[begin:end].tolist()
        for begin, end in zip(packing.offsets[:-1], packing.offsets[1:], strict=True)
    ]
    assert rows == naive_first_fit(lengths, capacity)
    assert packing.rows == len(rows)
    assert packing.tokens + packing.dropped == sum(lengths)
    assert packing.dropped == sum(max(length - capacity, 0) for length in lengths)


def test_a_million_documents_are_packed_densely():
    lengths = np.random.default_rng(0).lognormal(6, 1, 1_000_000).astype(np.int64) + 1
    packing = first_fit(lengths, 2049)
    assert np.array_equal(np.sort(packing.documents), np.arange(1_000_000))
    filled = np.add.reduceat(np.minimum(lengths, 2049)[packing.documents], packing.offsets[:-1])
    assert filled.max() <= 2049
    assert filled.mean() > 0.999 * 2049


@pytest.fixture(scope="module")
def stream(tmp_path_factory):
    rng = np.random.default_rng(0)
    texts = ["".join(map(chr, rng.integers(97, 123, n))) for n in rng.integers(0, 90, 200)]
    return write_token_stream(
        texts,
        ByteTokenizer(),
        tmp_path_factory.mktemp("data") / "stream",
        split="train",
        corpus_fingerprint="c" * 64,
    )


@pytest.mark.parametrize("length", [1, 8, 64, 500])
def test_rows_hold_every_document_once_and_mask_the_rest(stream, length):
    rows = PackedRows(stream, length, document_ids=True)
    seen = {}
    for i in range(len(rows)):
        item = rows[i]
        tokens, documents, mask = item["tokens"], item["documents"], item["mask"]
        assert (tokens.dtype, documents.dtype, mask.dtype) == (np.int32, np.int32, np.float32)
        assert len(tokens) == len(documents) == len(mask) + 1 == length + 1
        np.testing.assert_array_equal(mask, (documents[1:] >= 0).astype(np.float32))
        assert (np.diff(mask) <= 0).all()
        assert (tokens[documents < 0] == stream.end_of_text).all()
        for document in set(documents[documents >= 0].tolist()):
            assert document not in seen
            seen[document] = tokens[documents == document]
    assert sorted(seen) == list(range(stream.num_documents))
    for document, tokens in seen.items():
        whole = stream.tokens[stream.offsets[document] : stream.offsets[document + 1]]
        np.testing.assert_array_equal(tokens, whole[: length + 1])


def test_batches_of_packed_rows(stream):
    config = DataConfig(sequence_length=64, batch_size=4, seed=1, packing="first_fit")
    rows = PackedRows(stream, 64)
    n = len(rows)
    iterator = iter(batches(stream, config))
    taken = [next(iterator) for _ in range(n)]
    assert set(taken[0]) == {"tokens", "mask"}
    assert taken[0]["mask"].shape == (4, 64)
    epoch = np.concatenate([batch["tokens"] for batch in taken])[:n].tolist()
    assert sorted(epoch) == sorted(rows[i]["tokens"].tolist() for i in range(n))
    state = json.loads(json.dumps(iterator.get_state()))
    assert state == {"next_index": n}
    expected = next(iterator)
    iterator.close()
    resumed = iter(batches(stream, config))
    resumed.set_state(state)
    batch = next(resumed)
    resumed.close()
    for key, value in expected.items():
        np.testing.assert_array_equal(batch[key], value)
