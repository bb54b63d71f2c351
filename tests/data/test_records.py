import json

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from cla_jax.data import records
from cla_jax.data.records import Document, JsonLinesFile, TextFile


def lines(*texts: str) -> bytes:
    return b"".join(
        json.dumps({"text": text, "meta": {"n": n}}).encode() + b"\n"
        for n, text in enumerate(texts)
    )


def read(source, start=0):
    return [record.document.text for record in source.records(start)]


@pytest.fixture
def jsonl(tmp_path):
    """A source from bytes, plain or compressed."""

    def make(data: bytes, name: str = "a.jsonl", **options):
        (tmp_path / name).write_bytes(data)
        return JsonLinesFile(tmp_path / name, name, **options)

    return make


@settings(max_examples=50, deadline=None)
@given(
    texts=st.lists(st.text(st.characters(exclude_categories=["Cs"])), max_size=12),
    block=st.integers(1, 40),
    frames=st.integers(1, 4),
    blank=st.booleans(),
)
def test_json_lines_in_any_blocks_and_frames(tmp_path_factory, texts, block, frames, blank):
    data = lines(*texts) + b"\r\n" * blank
    data = data.rstrip(b"\n") if len(texts) % 2 and not blank else data
    step = max(len(data) // frames, 1)
    compressed = b"".join(
        zstandard.compress(data[i : i + step]) for i in range(0, max(len(data), 1), step)
    )
    folder = tmp_path_factory.mktemp("records")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records, "_BLOCK", block)
        for name, content in {"a.jsonl": data, "a.jsonl.zst": compressed}.items():
            (folder / name).write_bytes(content)
            source = JsonLinesFile(folder / name, name)
            found = list(source.records())
            keys = [f"{name}:{i + 1}" for i in range(len(texts))]
            assert [r.document for r in found] == list(map(Document, keys, texts))
            assert not found or 0 < found[-1].read <= source.num_bytes
            for number, record in enumerate(found, 1):
                assert list(source.records(record.next)) == found[number:]


def test_json_lines_with_a_byte_order_mark_and_another_key(jsonl):
    source = jsonl(b'\xef\xbb\xbf{"content": "\\u00e9"}\n\n{"content": "b"}', text_key="content")
    assert [(r.document.key, r.document.text) for r in source.records()] == [
        ("a.jsonl:1", "é"),
        ("a.jsonl:3", "b"),
    ]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b'{"text": "a', r"a\.jsonl, line 3 is not JSON: Unterminated string .* column 10"),
        (b'{"text": "caf\xe9"}', r"a\.jsonl, line 3 is not UTF-8: byte 0xe9 at offset 13"),
        (b'{"txt": "a"}', r"line 3: the record has no 'text'; the nearest key is 'txt'"),
        (b"{}", r"line 3: the record has no 'text'$"),
        (b'{"text": null}', r"line 3: 'text' is null, not text"),
        (b'{"text": 3}', r"line 3: 'text' is int, not text"),
        (b'["text"]', r"line 3 is a JSON list, not an object"),
        (b'{"text": "\\ud800"}', r"line 3: 'text' holds half a surrogate pair at character 0"),
        (b"[" * 200_000, r"line 3 is JSON nested too deeply"),
    ],
)
@pytest.mark.parametrize("suffix", ["", ".zst"])
def test_a_bad_record_is_named(jsonl, line, expected, suffix):
    data = lines("one", "two") + line + b"\n" + lines("four")
    source = jsonl(zstandard.compress(data) if suffix else data, f"a.jsonl{suffix}")
    found = []
    with pytest.raises(ValueError, match=expected.replace(r"a\.jsonl", rf"a\.jsonl{suffix}")):
        found.extend(record.document.text for record in source.records())
    assert read_until_error(source) == ["one", "two"]


def read_until_error(source):
    found = []
    try:
        for record in source.records():
            found.append(record.document.text)
    except ValueError:
        pass
    return found


def test_a_truncated_frame_is_named_wherever_it_ends(jsonl):
    first, second = (zstandard.compress(lines(*"abc" * 20)) for _ in range(2))
    assert len(read(jsonl(first + second, "a.jsonl.zst"))) == 120
    for size in (*range(1, len(first)), *range(len(first) + 1, len(first + second))):
        frame, begin = (1, 0) if size < len(first) else (2, len(first))
        expected = (
            rf"a\.jsonl\.zst is truncated at byte {size}: .* frame {frame}, from byte {begin},"
        )
        with pytest.raises(ValueError, match=expected):
            read(jsonl((first + second)[:size], "a.jsonl.zst"))
    with pytest.raises(ValueError, match=r"truncated at byte 0: empty"):
        read(jsonl(b"", "a.jsonl.zst"))


def test_a_damaged_frame_is_named(jsonl):
    data = bytearray(zstandard.ZstdCompressor(write_checksum=True).compress(lines("text " * 500)))
    data[-2] ^= 1
    with pytest.raises(ValueError, match=r"a\.jsonl\.zst is damaged: its Zstandard frame 1, from"):
        read(jsonl(bytes(data), "a.jsonl.zst"))
    with pytest.raises(ValueError, match=r"is damaged: its Zstandard frame 1"):
        read(jsonl(b'{"text": "not compressed"}\n', "a.jsonl.zst"))


@pytest.mark.parametrize("unit", ["line\n", "word ", "é", "🎉", "é\n🎉 "])
def test_a_large_text_file_is_read_in_pieces(tmp_path, monkeypatch, unit):
    monkeypatch.setattr(records, "LARGE_TEXT_BYTES", 1000)
    monkeypatch.setattr(records, "TEXT_PIECE_BYTES", 101)
    path = tmp_path / "a.txt"
    text = "\ufeff" + unit * 500
    path.write_text(text, "utf-8")
    found = list(TextFile(path, "a.txt").records())
    texts = [record.document.text for record in found]
    assert "".join(texts) == unit * 500
    assert len({record.document.key for record in found}) == len(found) > 3
    assert all(90 <= len(t.encode()) <= 202 for t in texts[:-1])
    if unit.isspace() or " " in unit or "\n" in unit:
        assert all(t[-1].isspace() for t in texts)
    assert found[-1].read == path.stat().st_size
    for number, record in enumerate(found, 1):
        assert list(TextFile(path, "a.txt").records(record.next)) == found[number:]


def test_a_text_file_is_one_document(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffé\r\n\ufeff".encode())
    (record,) = TextFile(path, "a.txt").records()
    assert record.document == Document("a.txt", "é\r\n\ufeff")
    assert list(TextFile(path, "a.txt").records(record.next)) == []


def test_a_compressed_file_of_another_name(tmp_path):
    (tmp_path / "a.zst").write_bytes(zstandard.compress(lines("text")))
    with pytest.raises(ValueError, match=r"a\.zst is compressed .* named \.jsonl\.zst"):
        read(TextFile(tmp_path / "a.zst", "a.zst"))
