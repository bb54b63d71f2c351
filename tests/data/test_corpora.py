import json
import sys
import sysconfig
from pathlib import Path

import pytest

from cla_jax.data import EmbeddedCorpus, TextCorpus, prepare_corpus
from cla_jax.data.corpora import documents_of


def write_files(folder: Path, **texts: str) -> Path:
    folder.mkdir(exist_ok=True)
    for name, text in texts.items():
        (folder / f"{name}.txt").write_text(text, "utf-8")
    return folder


def test_prepared_corpus_round_trips_and_is_reused(tmp_path, capfd):
    folder = write_files(tmp_path / "in", a="é\r\n" * 400, b="\ufeffb" * 500, c=" \n")
    (folder / "sub").mkdir()
    (folder / "sub" / "a.TXT").write_text("sub a " * 2000)
    (folder / ".hidden.txt").write_text("hidden")
    (folder / "notes.md").write_text("not read")
    info = prepare_corpus(TextCorpus(folder), tmp_path / "data")
    assert "tensorflow" not in sys.modules
    assert capfd.readouterr() == ("", "")
    texts = {split: list(info.texts(split)) for split in ("train", "validation")}
    joined = sorted("".join(texts["train"] + texts["validation"]))
    expected = "é\r\n" * 400 + "b" + "\ufeffb" * 499 + "sub a " * 2000
    assert joined == sorted(expected)
    assert info.num_documents == 3
    assert info.num_bytes == len(expected.encode())
    assert (
        json.loads((info.directory / "corpus.json").read_text())["fingerprint"] == info.fingerprint
    )
    files = {p: p.stat().st_mtime_ns for p in info.directory.rglob("*")}
    assert prepare_corpus(TextCorpus(folder), tmp_path / "data") == info
    assert {p: p.stat().st_mtime_ns for p in info.directory.rglob("*")} == files
    write_files(folder, c="now there is text")
    assert prepare_corpus(TextCorpus(folder), tmp_path / "data").directory != info.directory
    with pytest.raises(ValueError, match="'validation'"):
        info.source("valid")


def test_missing_path_names_the_nearest(tmp_path):
    (tmp_path / "shakespeare.txt").write_text("text")
    with pytest.raises(ValueError, match=r"shakespere\.txt; the nearest is .*shakespeare\.txt"):
        TextCorpus(tmp_path / "shakespere.txt")
    with pytest.raises(ValueError, match="no such text file or folder"):
        TextCorpus(tmp_path / "nowhere" / "at" / "all.txt")


def test_folder_without_text_files(tmp_path):
    (tmp_path / "a.md").write_text("text")
    with pytest.raises(
        ValueError, match=r"no \.txt, \.jsonl or \.jsonl\.zst files in .*found: 1 \.md"
    ):
        TextCorpus(tmp_path)


@pytest.mark.parametrize(
    ("text", "expected"), [("", "no bytes"), (" \n", "no bytes"), ("hi", "2 byt")]
)
def test_empty_or_short_corpus(tmp_path, text, expected):
    path = tmp_path / "short.txt"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"short\.txt holds {expected}.*at least 1000 bytes"):
        prepare_corpus(TextCorpus(path), tmp_path / "data")
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("encoding", "offset", "hint"), [("latin-1", 2004, "WINDOWS-1252"), ("utf-16", 0, "UTF-16")]
)
def test_file_that_is_not_utf8(tmp_path, encoding, offset, hint):
    path = tmp_path / "old.txt"
    path.write_bytes(("text " * 400 + "naïve café").replace("ï", "i").encode(encoding))
    if encoding == "latin-1":
        offset += len("naive caf") - 4
    with pytest.raises(
        ValueError, match=rf"old\.txt is not UTF-8.*offset {offset} .*iconv -f {hint}"
    ):
        prepare_corpus(TextCorpus(path), tmp_path / "data")


def test_embedded_corpus_is_the_standard_library_capped():
    corpus = EmbeddedCorpus(max_bytes=200_000)
    documents = {d.key: d.text for d in documents_of(corpus)}
    size = sum(len(text.encode()) for text in documents.values())
    assert 150_000 < size <= 200_000
    assert not [key for key in documents if {"test", "site-packages"} & set(key.split("/"))]
    assert len({key[0] for key in documents}) > 3
    assert list(documents) == sorted(documents)
    (source,) = corpus.sources
    assert source.stamp() == EmbeddedCorpus(max_bytes=200_000).sources[0].stamp()
    records = list(source.records())
    assert list(source.records(records[9].next)) == records[10:]
    assert records[-1].read == size


def test_embedded_corpus_skips_and_lists_what_is_not_utf8(tmp_path, monkeypatch):
    for name, data in {"a.py": b"x = 1\n", "b.py": b"# caf\xe9\n", "test/c.py": b"y"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    corpus = EmbeddedCorpus()
    assert [d.key for d in documents_of(corpus)] == ["a.py"]
    assert corpus.skipped_files == ("b.py",)
