import dataclasses
import json

import numpy as np
import pytest

from cla_jax.data import (
    ByteTokenizer,
    TextCorpus,
    TokenStream,
    prepare_corpus,
    prepare_streams,
    write_token_stream,
)


class WideTokenizer:
    """One id per character, which needs 32 bits."""

    name = "characters / wide"
    vocab_size = 0x110001
    end_of_text = 0x110000
    fingerprint = "f" * 64

    def encode(self, text):
        return np.array([ord(c) for c in text], np.int32)

    def encode_batch(self, texts):
        return [self.encode(text) for text in texts]

    def decode(self, tokens):
        return "".join(chr(t) for t in tokens)


def write(tmp_path, *texts, tokenizer=None):
    return write_token_stream(
        texts,
        tokenizer or ByteTokenizer(),
        tmp_path / "stream",
        split="train",
        corpus_fingerprint="c" * 64,
    )


@pytest.mark.parametrize(
    ("tokenizer", "dtype"), [(ByteTokenizer(), "<u2"), (WideTokenizer(), "<u4")]
)
def test_documents_come_back(tmp_path, tokenizer, dtype):
    texts = ["one", "", "zwölf 🎉", "four\r\n"]
    stream = write(tmp_path, *texts, tokenizer=tokenizer)
    assert stream.tokens.dtype == dtype
    assert stream.num_documents == 4
    assert stream.num_tokens == len(stream.tokens) == stream.offsets[-1]
    for i, text in enumerate(texts):
        *tokens, end = stream.tokens[stream.offsets[i] : stream.offsets[i + 1]]
        assert end == tokenizer.end_of_text
        assert tokenizer.decode(tokens) == text
    assert stream.bytes_per_token == len("".join(texts).encode()) / stream.num_tokens
    assert stream.vocab_size == tokenizer.vocab_size
    assert stream.fingerprint == TokenStream.open(tmp_path / "stream").fingerprint


def test_failure_leaves_nothing(tmp_path):
    def texts():
        yield "text"
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write(tmp_path, *texts())
    with pytest.raises(ValueError, match="no documents"):
        write(tmp_path)
    small = WideTokenizer()
    small.vocab_size, small.end_of_text = 100, 99
    with pytest.raises(ValueError, match=r"ids from 65 to 120; its vocabulary is 0 to 99"):
        write(tmp_path, "Ax", tokenizer=small)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda d: (d / "tokens.bin").write_bytes(b"123"), r"3 bytes, not the 10 recorded"),
        (lambda d: (d / "tokens.bin").unlink(), r"tokens.bin is missing"),
        (lambda d: np.save(d / "offsets.npy", np.arange(7)), r"1 documents and 5 tokens"),
        (lambda d: (d / "offsets.npy").write_bytes(b""), r"is damaged"),
        (lambda d: (d / "stream.json").write_text("{"), r"is damaged"),
        (lambda d: (d / "stream.json").write_text('{"format": 0}'), r"another format"),
        (lambda d: (d / "stream.json").unlink(), r"no complete token stream"),
    ],
)
def test_damage_is_named(tmp_path, damage, expected):
    damage(write(tmp_path, "text").directory)
    with pytest.raises(ValueError, match=expected):
        TokenStream.open(tmp_path / "stream")


def test_prepare_streams(tmp_path, capfd):
    path = tmp_path / "my.txt"
    path.write_text("".join(f"line {i} of my text\n" for i in range(300)))
    corpus = prepare_corpus(TextCorpus(path), tmp_path / "data")
    streams = prepare_streams(corpus, ByteTokenizer(), tmp_path / "data")
    assert capfd.readouterr() == ("", "")
    text = ByteTokenizer().decode(np.concatenate([streams.train.tokens, streams.validation.tokens]))
    assert text == path.read_text()
    assert streams.train.split == "train"
    assert streams.train.corpus_fingerprint == corpus.fingerprint

    inodes = {p: p.stat().st_ino for p in (tmp_path / "data").rglob("*")}
    again = prepare_streams(corpus, ByteTokenizer(), tmp_path / "data")
    assert {p: p.stat().st_ino for p in (tmp_path / "data").rglob("*")} == inodes
    assert again.validation.fingerprint == streams.validation.fingerprint

    wide = prepare_streams(corpus, WideTokenizer(), tmp_path / "data")
    assert wide.train.directory.parent.name == "characters-wide-" + "f" * 16
    assert wide.train.corpus_fingerprint == streams.train.corpus_fingerprint


def test_metadata_is_plain_json(tmp_path):
    stream = write(tmp_path, "text")
    meta = json.loads((stream.directory / "stream.json").read_text())
    shared = {f.name for f in dataclasses.fields(stream)} - {"directory", "tokens", "offsets"}
    assert {key: getattr(stream, key) for key in shared} == {key: meta[key] for key in shared}
