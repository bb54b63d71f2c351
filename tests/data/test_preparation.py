import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds

from cla_jax.data import (
    ByteTokenizer,
    Document,
    TextCorpus,
    TfdsCorpus,
    corpus_at,
    documents,
    open_prepared,
    open_tokenizer,
    prepare,
    stream_writer,
    tokenizer_at,
    train_tokenizer,
)
from cla_jax.data.records import JsonLinesFile


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    """Three files of 30 different records of about 1 kB, and what is prepared from them."""
    folder = tmp_path_factory.mktemp("original")
    (folder / "text").mkdir()
    for name in "abc":
        write_records(folder / "text" / f"{name}.jsonl", [f"{name}{i} " * 300 for i in range(30)])
    with pytest.MonkeyPatch.context() as patch:
        make_parts_small(patch)
        prepare(corpus_at(folder / "text"), ByteTokenizer(), folder / "whole")
    return folder


@pytest.fixture
def corpus(original, tmp_path) -> Path:
    """The files, for one test to change."""
    return shutil.copytree(original / "text", tmp_path / "text")


@pytest.fixture
def whole(original) -> dict[str, str]:
    """The contents of what is prepared from them."""
    return contents(original / "whole")


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    make_parts_small(monkeypatch)


def make_parts_small(patch):
    """Sizes at which the corpus has several parts, each of several batches."""
    patch.setattr(documents, "PART_BYTES", 25_000)
    patch.setattr(stream_writer, "BATCH_BYTES", 6_000)


def write_records(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def texts_of(stream) -> list[str]:
    pairs = zip(stream.offsets[:-1], stream.offsets[1:], strict=True)
    return [ByteTokenizer().decode(stream.tokens[begin:end]) for begin, end in pairs]


def contents(folder: Path) -> dict[str, str]:
    """Digests of the files of a prepared directory, without locks and TFDS' own.

    ArrayRecord's files differ from run to run in how they are compressed; what is in them is in the
    token streams.
    """
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.suffix != ".lock" and "text_corpus" not in path.parts
    }


def test_prepared_directory(corpus, tmp_path, whole):
    info, streams = prepare(corpus_at(corpus), ByteTokenizer(), tmp_path / "out")
    assert len(info.parts) == 4
    train, validation = texts_of(streams.train), texts_of(streams.validation)
    expected = [r.document.text for s in corpus_at(corpus).sources for r in s.records()]
    assert sorted(train + validation) == sorted(expected)
    assert 4 <= len(validation) <= 9
    assert sorted(info.texts("train")) == sorted(train)
    source = info.source("validation")
    assert sorted(source[i]["text"].decode() for i in range(len(source))) == sorted(validation)
    assert {source[i]["key"].decode().split(":")[0][1:] for i in range(len(source))} == {".jsonl"}
    record = json.loads((tmp_path / "out" / "prepared.json").read_text())
    assert record["summary"]["train"]["documents"] == len(train) == info.split_documents["train"]
    assert record["summary"]["train"]["bytes"] == info.split_bytes["train"]
    assert isinstance(open_tokenizer(tmp_path / "out"), ByteTokenizer)

    assert contents(tmp_path / "out") == whole
    shutil.rmtree(tmp_path / "out" / "documents")  # training needs none of it
    again = open_prepared(tmp_path / "out")
    assert again.train.fingerprint == streams.train.fingerprint


def test_nothing_is_read_again(corpus, original, tmp_path, whole, monkeypatch):
    shutil.copytree(original / "whole", tmp_path / "out")
    monkeypatch.setattr(JsonLinesFile, "records", lambda *_: pytest.fail("read"))
    moved = corpus.rename(tmp_path / "moved")
    info, streams = prepare(corpus_at(moved), ByteTokenizer(), tmp_path / "out")
    assert info.num_documents == 90
    assert streams.train.fingerprint == open_prepared(tmp_path / "out").train.fingerprint
    assert contents(tmp_path / "out") == whole


class Stop(BaseException):
    """As sudden as a signal: nothing in the library may catch it."""


@pytest.mark.parametrize("reads", [1, 30, 89])
def test_killed_while_writing_documents(corpus, original, tmp_path, whole, monkeypatch, reads):
    taken = 0
    records = JsonLinesFile.records

    def counted(self, start=0, limit: float = reads):
        nonlocal taken
        for record in records(self, start):
            if (taken := taken + 1) > limit:
                raise Stop
            yield record

    rule = documents.split_of(corpus_at(corpus))
    monkeypatch.setattr(documents, "split_of", lambda _: rule)
    monkeypatch.setattr(JsonLinesFile, "records", counted)
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)  # nor is anything cleaned up
    with pytest.raises(Stop):
        prepare(corpus_at(corpus), ByteTokenizer(), tmp_path / "out")
    monkeypatch.undo()
    make_parts_small(monkeypatch)

    def written(path):
        return path.stat().st_mtime_ns  # an inode's number may be given out again

    done = {p: written(p) for p in (tmp_path / "out").rglob("part.json")}
    parts = sorted((original / "whole").rglob("part.json"))
    ends = np.cumsum([json.loads(path.read_text())["read"] for path in parts])
    assert len(done) == np.sum(ends[:-1] <= reads)
    with pytest.raises(ValueError, match=r"not a prepared directory"):
        open_prepared(tmp_path / "out")
    prepare(corpus_at(corpus), ByteTokenizer(), tmp_path / "out")
    assert {p: written(p) for p in done} == done
    assert contents(tmp_path / "out") == whole


@pytest.mark.parametrize("batches", [1, 7, 15])
def test_killed_while_tokenizing(corpus, original, tmp_path, whole, monkeypatch, batches):
    calls = 0

    class Stopping(ByteTokenizer):
        limit: float = batches

        def encode_batch(self, texts):
            nonlocal calls
            if (calls := calls + 1) > self.limit:
                raise Stop
            return super().encode_batch(texts)

    with pytest.raises(Stop):
        prepare(corpus_at(corpus), Stopping(), tmp_path / "out")
    with pytest.raises(ValueError, match=r"out is not finished; run `cla-jax prepare-data`"):
        open_prepared(tmp_path / "out")
    for journal in (tmp_path / "out").glob(".*.partial/journal.jsonl"):
        with journal.open("a") as file:
            file.write('{"tokens": 12')  # as a kill in the middle of a line leaves it
    first, total = calls - 1, 21
    calls, Stopping.limit = 0, float("inf")
    prepare(corpus_at(corpus), Stopping(), tmp_path / "out")
    assert calls <= total - first + 4  # what a finished part held is not done again
    assert contents(tmp_path / "out") == whole


def test_unfinished_parts_follow_a_corpus_that_is_mended(corpus, tmp_path):
    write_records(tmp_path / "valid.jsonl", ["held out " * 200])
    given = corpus_at(tmp_path / "valid.jsonl")
    bad = corpus / "c.jsonl"
    good = bad.read_text()
    bad.write_text(good[:-400])
    with pytest.raises(ValueError, match=r"c\.jsonl, line 30 is not JSON"):
        prepare(corpus_at(corpus), ByteTokenizer(), tmp_path / "out", given)

    def written(path):
        return path.stat().st_mtime_ns  # an inode's number may be given out again

    done = {p: written(p) for p in (tmp_path / "out").rglob("part.json")}
    bad.write_text(good)
    info, streams = prepare(corpus_at(corpus), ByteTokenizer(), tmp_path / "out", given)
    kept = [p for p in sorted(done) if written(p) == done[p]]
    assert kept == sorted(done)[: len(kept)]
    assert 2 == len(kept) < len(done)  # those of a.jsonl and b.jsonl alone
    assert streams.train.num_documents == info.num_documents - 1 == 90


def test_given_validation_text_and_its_copies(corpus, tmp_path):
    held_out = [f"a{i} " * 300 for i in range(5)] + ["new " * 300] * 2
    write_records(tmp_path / "valid.jsonl", held_out)
    info, streams = prepare(
        corpus_at(corpus), ByteTokenizer(), tmp_path / "out", corpus_at(tmp_path / "valid.jsonl")
    )
    assert sorted(texts_of(streams.validation)) == sorted(held_out)
    assert streams.train.num_documents == 85
    assert not set(texts_of(streams.train)) & set(held_out)
    assert info.copies_left_out == 5
    with pytest.raises(ValueError, match=r"valid\.jsonl of .*\(for validation\), .* now not given"):
        prepare(corpus_at(corpus), ByteTokenizer(), tmp_path / "out")


def test_other_files_or_another_tokenizer_are_refused(corpus, tmp_path):
    out = tmp_path / "out"
    tokenizer = train_tokenizer(TextCorpus(corpus), 300, tmp_path / "bpe.json")
    prepare(corpus_at(corpus), tokenizer, out)
    assert open_tokenizer(out).encode("a1 a1").tolist() == tokenizer.encode("a1 a1").tolist()
    before = contents(out)
    other = tokenizer_at(tmp_path / "bpe.json", "a")
    for changed in (ByteTokenizer(), other):
        with pytest.raises(ValueError) as error:  # noqa: PT011
            prepare(corpus_at(corpus), changed, out)
        for part in ("'bpe'", tokenizer.fingerprint[:16], changed.fingerprint[:16], changed.name):
            assert part in str(error.value)
    changed_at = (corpus / "b.jsonl").stat().st_mtime_ns
    os.utime(corpus / "b.jsonl", ns=(1, 1))
    with pytest.raises(ValueError, match=r"made from b\.jsonl of .*but that is now .* at 1, key"):
        prepare(corpus_at(corpus), tokenizer, out)
    (corpus / "b.jsonl").rename(tmp_path / "b.jsonl")
    with pytest.raises(ValueError, match=r"made from b\.jsonl of .* now not given"):
        prepare(corpus_at(corpus), tokenizer, out)
    (tmp_path / "b.jsonl").rename(corpus / "b.jsonl")
    os.utime(corpus / "b.jsonl", ns=(changed_at, changed_at))
    (corpus / "z.txt").write_text("more")
    with pytest.raises(ValueError, match=r"made without z\.txt"):
        prepare(corpus_at(corpus), tokenizer, out)
    assert contents(out) == before
    (out / "tokenizer.json").write_bytes((tmp_path / "bpe.json").read_bytes() + b"\n")
    with pytest.raises(ValueError, match=r"tokenizer\.json has changed: its fingerprint is"):
        open_tokenizer(out)


def test_other_directories_are_left_alone(corpus, tmp_path):
    (corpus / "notes.md").write_text("mine")
    with pytest.raises(ValueError, match=r"text exists and is not a prepared directory"):
        prepare(corpus_at(corpus), ByteTokenizer(), corpus)
    with pytest.raises(ValueError, match=r"notes\.md exists and is not a prepared directory"):
        prepare(corpus_at(corpus), ByteTokenizer(), corpus / "notes.md")
    with pytest.raises(ValueError, match=r"nowhere is not a prepared directory .* --out"):
        open_prepared(tmp_path / "nowhere")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["text"]


def test_a_corpus_that_changes_while_it_is_read_is_refused(corpus, tmp_path, monkeypatch):
    records = JsonLinesFile.records

    def changing(self, start=0):
        yield from records(self, start)
        os.utime(self.path)

    rule = documents.split_of(corpus_at(corpus))
    monkeypatch.setattr(documents, "split_of", lambda _: rule)
    monkeypatch.setattr(JsonLinesFile, "records", changing)
    with pytest.raises(ValueError, match=r"a\.jsonl changed while it was read"):
        prepare(corpus_at(corpus), ByteTokenizer(), tmp_path / "out")


def test_a_split_without_documents_is_refused(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "split_of", lambda _: documents.WithoutGiven(frozenset()))
    with pytest.raises(ValueError, match=r"has no validation documents; give .*--validation"):
        prepare(corpus_at(corpus), ByteTokenizer(), tmp_path / "out")
    with pytest.raises(ValueError, match=r"text has no train documents$"):
        prepare(corpus_at(corpus), ByteTokenizer(), tmp_path / "copies", corpus_at(corpus))


@pytest.mark.parametrize("where", ["tokens.bin", "journal.jsonl"])
def test_full_disk_while_tokenizing(corpus, tmp_path, whole, monkeypatch, where):
    """Every commit after the first few fails."""
    fsync, calls = os.fsync, 0

    def full(file):
        nonlocal calls
        if Path(f"/proc/self/fd/{file}").resolve().name == where and (calls := calls + 1) > 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), where)
        fsync(file)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device"):
        prepare(corpus_at(corpus), ByteTokenizer(), tmp_path / "out")
    monkeypatch.setattr(os, "fsync", fsync)
    prepare(corpus_at(corpus), ByteTokenizer(), tmp_path / "out")
    assert contents(tmp_path / "out") == whole


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 4 MiB, where one may be mounted."""
    place = tmp_path / "disk"
    place.mkdir()
    options = ["-t", "tmpfs", "-o", "size=4m", "tmpfs", str(place)]
    if os.geteuid() or subprocess.run(["mount", *options], capture_output=True).returncode:
        pytest.skip("mounting a small file system takes root's rights")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)  # memory maps may be open


def pages(folder: Path) -> int:
    """The space that a folder's files take on that file system."""
    return sum(-(-p.stat().st_size // 4096) * 4096 for p in folder.rglob("*") if p.is_file())


@pytest.mark.parametrize("stage", ["first part", "later part", "tokens"])
def test_full_disk(corpus, original, tmp_path, whole, small_disk, stage):
    """Room runs out somewhere; with more room, the preparation goes on from there."""
    documents_take = pages(original / "whole" / "documents")
    tokens_take = pages(original / "whole" / "train")
    room = {
        "first part": 8192,
        "later part": documents_take // 2,
        "tokens": documents_take + 16384 + tokens_take // 2,
    }[stage]
    (small_disk / "filler").write_bytes(b"x" * (2**22 - room))
    with pytest.raises(OSError, match="No space left on device"):
        prepare(corpus_at(corpus), ByteTokenizer(), small_disk / "out")
    finished = len(list((small_disk / "out").rglob("part.json")))
    assert (finished > 0) == (stage != "first part")
    assert (small_disk / "out" / "documents" / "corpus.json").exists() == (stage == "tokens")
    (small_disk / "filler").unlink()
    prepare(corpus_at(corpus), ByteTokenizer(), small_disk / "out")
    assert contents(small_disk / "out") == whole


_PREPARE = """
import sys
from cla_jax.data import documents, stream_writer, corpus_at, prepare, tokenizer_at
documents.PART_BYTES, stream_writer.BATCH_BYTES = 200_000, 20_000
print("ready", flush=True)
prepare(corpus_at(sys.argv[1]), tokenizer_at("bytes"), sys.argv[2])
"""


@pytest.mark.slow
def test_sigkill_at_random_points(tmp_path):
    texts = [f"document {i} " * 400 for i in range(3000)]
    write_records(tmp_path / "a.jsonl", texts)

    def start(out):
        command = [sys.executable, "-c", _PREPARE, str(tmp_path / "a.jsonl"), str(tmp_path / out)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        with process.stdout as stdout:
            assert stdout.readline() == "ready\n"
        return process, time.monotonic()

    process, began = start("whole")
    assert process.wait() == 0
    duration = time.monotonic() - began
    rng = np.random.default_rng(0)
    kills = 0
    while True:
        process, _ = start("out")
        try:
            code = process.wait(timeout=rng.uniform(0.05, 0.35) * duration)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
            continue
        assert code == 0
        break
    assert kills >= 3
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


class ToyTexts(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Forty sentences and their number."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {"sentence": tfds.features.Text(), "n": tfds.features.Scalar(np.int64)}
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(range(40)), "test": self._generate_examples([40])}

    def _generate_examples(self, numbers):
        for n in numbers:
            yield n, {"sentence": f"Sentence {n} é. " * 9, "n": n}


def test_tfds_dataset(tmp_path, monkeypatch):
    ToyTexts(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    builder = tfds.builder_from_directory(tmp_path / "toy_texts" / "1.0.0")
    monkeypatch.setattr(tfds, "builder", lambda name: {"toy_texts": builder}[name])
    corpus = corpus_at("tfds:toy_texts", "sentence")
    (source,) = corpus.sources
    found = list(source.records())
    assert found[7].document == Document("toy_texts@train:7", "Sentence 7 é. " * 9)
    assert list(source.records(found[7].next)) == found[8:]
    assert found[-1].read == source.num_bytes
    validation = corpus_at("tfds:toy_texts@test", "sentence")
    _, streams = prepare(corpus, ByteTokenizer(), tmp_path / "out", validation)
    assert texts_of(streams.validation) == ["Sentence 40 é. " * 9]
    assert streams.train.num_documents == 40
    assert "tensorflow" not in sys.modules
    with pytest.raises(ValueError, match=r"no feature 'text', but n, sentence; the nearest is"):
        TfdsCorpus("toy_texts")
    with pytest.raises(ValueError, match=r"no split 'tests'; it has .*test"):
        TfdsCorpus("toy_texts@tests", "sentence")
    with pytest.raises(ValueError, match=r"record 0: 'n' is int\d*, not text"):
        next(iter(TfdsCorpus("toy_texts", "n").sources[0].records()))


def test_tfds_dataset_that_is_not_here(tmp_path, monkeypatch):
    builder = tfds.builder
    monkeypatch.setattr(tfds, "builder", lambda name: builder(name, data_dir=tmp_path))
    with pytest.raises(ValueError, match=r"knows no dataset 'lm1c', .* nearest name is 'lm1b'"):
        corpus_at("tfds:lm1c")
    with pytest.raises(ValueError, match=r"'lm1b' is not prepared on this .*download_and_prepare"):
        corpus_at("tfds:lm1b")
    ToyTexts(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    info = tmp_path / "toy_texts" / "1.0.0" / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(ValueError, match=r"'toy_texts' .* cannot be read without TensorFlow"):
        TfdsCorpus("toy_texts", "sentence")
