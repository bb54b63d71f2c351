import json
import sys
import sysconfig
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cla_jax.data import Document, EmbeddedCorpus, TextCorpus, prepare_corpus
from cla_jax.data.files import staged_directory
from cla_jax.data.splitting import survey


class Documents:
    """A corpus from a list."""

    name = "list"
    skipped_files = ()

    def __init__(self, *texts: str) -> None:
        self.texts = texts

    def documents(self):
        return (Document(str(i), text) for i, text in enumerate(self.texts))


def split_texts(corpus) -> tuple[list[str], list[str]]:
    """Train and validation texts, by the survey alone."""
    import hashlib

    found, out = survey(corpus), ([], [])
    for document in corpus.documents():
        digest = hashlib.sha256(document.text.encode()).digest()
        for texts, split in zip(out, ("train", "validation"), strict=True):
            texts += [piece.text for piece in found.pieces(document, digest, split)]
    return out


def write_files(folder: Path, **texts: str) -> Path:
    folder.mkdir(exist_ok=True)
    for name, text in texts.items():
        (folder / f"{name}.txt").write_text(text, "utf-8")
    return folder


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abcdeé"), st.integers(1, 3000)), min_size=1))
def test_split_is_disjoint_complete_and_bounded(parts):
    texts = [letter * 300 + "x " * n for letter, n in parts] + ["z\n" * 500]
    train, validation = split_texts(Documents(*texts))
    assert train
    assert validation
    assert not set(train) & set(validation)
    assert sum(map(len, train)) + sum(map(len, validation)) == sum(map(len, texts))
    share = sum(len(t.encode()) for t in validation) / sum(len(t.encode()) for t in texts)
    assert 0.049 <= share <= 0.105


def test_copies_land_in_the_same_split():
    texts = [f"document {i % 40} " * 50 for i in range(80)]
    train, validation = split_texts(Documents(*texts))
    assert len(validation) % 2 == 0
    assert not set(train) & set(validation)


def test_one_document_is_cut_at_a_line():
    text = "".join(f"line {i}\n" for i in range(1000))
    (head,), (tail,) = split_texts(Documents(text))
    assert head + tail == text
    assert tail.startswith("line ")
    assert head.endswith("\n")


def test_one_document_without_lines_is_cut_at_a_space_or_anywhere():
    (head,), (tail,) = split_texts(Documents("word " * 1000))
    assert head.endswith(" ")
    assert tail.startswith("word")
    (head,), (tail,) = split_texts(Documents("é" * 1000))
    assert (len(head), len(tail)) == (950, 50)


def test_one_huge_document_among_small_ones_does_not_become_the_validation_split():
    train, validation = split_texts(Documents("a few words", "word " * 10_000, "and others"))
    assert len(train) == 3
    assert 2400 <= len("".join(validation)) <= 5100


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
    assert json.loads((info.directory / "corpus.json").read_text())["fingerprint"] in str(info)
    files = {p: p.stat().st_mtime_ns for p in info.directory.rglob("*")}
    assert prepare_corpus(TextCorpus(folder), tmp_path / "data") == info
    assert {p: p.stat().st_mtime_ns for p in info.directory.rglob("*")} == files
    write_files(folder, c="now there is text")
    assert prepare_corpus(TextCorpus(folder), tmp_path / "data").directory != info.directory
    with pytest.raises(ValueError, match="'validation'"):
        info.source("valid")


def test_interrupted_preparation_leaves_nothing(tmp_path):
    class Interrupted(Documents):
        reads = 0

        def documents(self):
            self.reads += 1
            yield from super().documents()
            if self.reads > 1:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare_corpus(Interrupted("some text\n" * 500), tmp_path)
    assert list((tmp_path / "corpora").iterdir()) == []


def test_corpus_that_changes_while_read_is_refused(tmp_path):
    class Changing(Documents):
        def documents(self):
            yield from super().documents()
            self.texts = (*self.texts, "new")

    with pytest.raises(ValueError, match=r"'list' changed while it was read"):
        prepare_corpus(Changing("some text\n" * 500), tmp_path)
    assert list((tmp_path / "corpora").iterdir()) == []


def test_staged_directory_keeps_what_another_process_made(tmp_path):
    final = tmp_path / "final"
    with staged_directory(final) as staging:
        (staging / "file").write_text("ours")
        final.mkdir()
        (final / "file").write_text("theirs")
    assert (final / "file").read_text() == "theirs"
    assert list(tmp_path.iterdir()) == [final]


def test_missing_path_names_the_nearest(tmp_path):
    (tmp_path / "shakespeare.txt").write_text("text")
    with pytest.raises(ValueError, match=r"shakespere\.txt; the nearest is .*shakespeare\.txt"):
        TextCorpus(tmp_path / "shakespere.txt")
    with pytest.raises(ValueError, match="no such text file or folder"):
        TextCorpus(tmp_path / "nowhere" / "at" / "all.txt")


def test_folder_without_text_files(tmp_path):
    (tmp_path / "a.md").write_text("text")
    with pytest.raises(ValueError, match=r"no \.txt files in .*found: 1 \.md"):
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
    documents = {d.key: d.text for d in corpus.documents()}
    size = sum(len(text.encode()) for text in documents.values())
    assert 150_000 < size <= 200_000
    assert not [key for key in documents if {"test", "site-packages"} & set(key.split("/"))]
    assert len({key[0] for key in documents}) > 3
    assert list(documents) == sorted(documents)
    again = EmbeddedCorpus(max_bytes=200_000)
    assert survey(corpus).fingerprint == survey(again).fingerprint


def test_embedded_corpus_skips_and_lists_what_is_not_utf8(tmp_path, monkeypatch):
    for name, data in {"a.py": b"x = 1\n", "b.py": b"# caf\xe9\n", "test/c.py": b"y"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    corpus = EmbeddedCorpus()
    assert [d.key for d in corpus.documents()] == ["a.py"]
    assert corpus.skipped_files == ("b.py",)
