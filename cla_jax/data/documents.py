"""Documents on disk: a corpus becomes TFDS datasets in ArrayRecord files, part by part.

TensorFlow is not needed: TFDS writes and reads ArrayRecord without it.

A part is about 256 MiB of documents that follow each other in the corpus, as a TFDS dataset of its
own with both splits; it appears in one rename. A preparation that was killed goes on behind the
last part, as long as the files that went into it have not changed.
"""

import contextlib
import dataclasses
import difflib
import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from tensorflow_datasets.core.utils import tqdm_utils

from cla_jax.data.corpora import Corpus, describe, documents_of
from cla_jax.data.files import byte_progress, locked, staged_directory, write_json
from cla_jax.data.records import Source
from cla_jax.data.splitting import (
    SPLITS,
    Given,
    SplitRule,
    WithoutGiven,
    digest_of,
    split_of,
)

__all__ = ["CorpusInfo", "write_documents"]

PART_BYTES = 2**28

_INFO_FILE, _PART_FILE = "corpus.json", "part.json"
# Part of every fingerprint: raise it when the split rule or the record format changes.
_FORMAT = "cla-jax corpus 2"


@dataclasses.dataclass(frozen=True)
class CorpusInfo:
    """A prepared corpus on disk.

    Attributes:
        directory: where it lies.
        name: the corpus's name.
        fingerprint: SHA-256 over the documents' splits, keys and texts.
        num_documents: documents before the split, without those that hold only whitespace.
        num_bytes: their UTF-8 bytes.
        skipped_files: files left out because they are not UTF-8.
        copies_left_out: training documents left out as copies of given validation documents.
        split_documents: documents of each split.
        split_bytes: UTF-8 bytes of each split.
    """

    directory: Path
    name: str
    fingerprint: str
    num_documents: int
    num_bytes: int
    skipped_files: tuple[str, ...]
    copies_left_out: int
    split_documents: dict[str, int]
    split_bytes: dict[str, int]

    @property
    def parts(self) -> list[Path]:
        """The parts' directories, in order."""
        return sorted(path.parent for path in self.directory.glob(f"parts/*/{_PART_FILE}"))

    def source(self, split: str, part: int | None = None) -> Sequence[dict[str, Any]]:
        """Random access to a split's records, `{"key": bytes, "text": bytes}`, through TFDS.

        Args:
            split: `train` or `validation`.
            part: of one part only; a part need not have both splits.
        """
        if split not in SPLITS:
            near = difflib.get_close_matches(split, SPLITS, n=1, cutoff=0.0)[0]
            raise ValueError(f"unknown split {split!r}; the nearest is {near!r}")
        parts = self.parts if part is None else [self.parts[part]]
        found = [d for path in parts if (d := path / "text_corpus" / "1.0.0").exists()]
        builder = tfds.builder_from_directories(found) if found else None
        if builder is None or split not in builder.info.splits:
            return ()
        return builder.as_data_source(split=split)  # pyright: ignore[reportCallIssue]

    def texts(self, split: str, part: int | None = None) -> Iterator[str]:
        """A split's documents, in their stored order: part by part, by their keys' hashes."""
        for index in range(len(self.parts)) if part is None else (part,):
            source = self.source(split, index)
            yield from (source[i]["text"].decode() for i in range(len(source)))


def write_documents(
    corpus: Corpus, directory: str | os.PathLike[str], validation: Corpus | None = None
) -> CorpusInfo:
    """Writes a corpus as TFDS datasets under `directory`, goes on with that, or finds it done.

    Args:
        corpus: the documents.
        directory: where they go. It is complete when it holds `corpus.json`.
        validation: documents for validation; `corpus` is then training alone, without copies of
            them. By default `corpus` is split (see `split_of`).

    Raises:
        ValueError: an empty or too short corpus, a split without documents, files that changed
            since `directory` was completed or while they were read, what the corpus itself raises.
        OSError: the disk is full; what was written before stays.
    """
    directory = Path(directory)
    given = [_Step(source, Given()) for source in validation.sources] if validation else []
    if (info := _finished(directory, corpus, given)) is not None:
        return info
    if validation is None:
        rule = split_of(corpus)
    else:
        rule = WithoutGiven(frozenset(map(digest_of, documents_of(validation))))
    plan = [*given, *(_Step(source, rule) for source in corpus.sources)]
    with locked(directory):
        if (info := _finished(directory, corpus, given)) is not None:
            return info
        parts = _finished_parts(directory / "parts", plan)
        total = sum(step.source.num_bytes for step in plan)
        with byte_progress("writing documents", total) as report:
            while (begin := parts[-1].end if parts else (0, 0)) < (len(plan), 0):
                if (part := _write_part(directory, len(parts), plan, begin, report)) is None:
                    break
                parts.append(part)
        return _complete(directory, corpus, validation, plan, parts)


class _Step:
    """A source, the rule for its documents, and what it looked like when all began."""

    def __init__(self, source: Source, rule: SplitRule) -> None:
        self.source, self.rule, self.stamp = source, rule, source.stamp()

    @property
    def identity(self) -> list[str]:
        return [self.source.name, self.stamp, self.rule.description]

    def check(self) -> None:
        if (now := self.source.stamp()) != self.stamp:
            raise ValueError(
                f"{self.source.name} changed while it was read ({self.stamp}, now {now}); prepare "
                "it again"
            )


@dataclasses.dataclass(frozen=True)
class _Part:
    """What `part.json` holds.

    Attributes:
        begin: the step of the plan and the `start` in its source where the part begins.
        end: the same, behind it.
        sources: the steps' identities from `begin` to `end`.
        digest: SHA-256 over the documents' splits, keys and texts.
        read: documents, without those that hold only whitespace.
        left_out: those of them in no split.
        documents: of each split.
        text_bytes: of each split.
    """

    begin: tuple[int, int]
    end: tuple[int, int]
    sources: list[list[str]]
    digest: str
    read: int
    left_out: int
    documents: dict[str, int]
    text_bytes: dict[str, int]


class _Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """The TFDS builder of every part: records of a key and a text, in ArrayRecord files."""

    name = "text_corpus"
    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, *, documents: dict[str, list[tuple[str, bytes]]], data_dir: Path) -> None:
        self._documents = {split: found for split, found in documents.items() if found}
        super().__init__(data_dir=data_dir, file_format="array_record")

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text()
        features = tfds.features.FeaturesDict({"key": text, "text": text})
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[str, dict[str, Any]]]]:
        return {split: self._generate_examples(split) for split in self._documents}

    def _generate_examples(self, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
        for key, text in self._documents[split]:
            yield key, {"key": key, "text": text}


def _write_part(
    directory: Path,
    number: int,
    plan: list[_Step],
    begin: tuple[int, int],
    report: Callable[[int], None],
) -> _Part | None:
    """Reads documents from `begin` until a part is full, and writes it; None if there are none."""
    documents: dict[str, list[tuple[str, bytes]]] = {split: [] for split in SPLITS}
    digest, read, left_out, size = hashlib.sha256(), 0, 0, 0
    for place, document, done in _read(plan, begin):
        end = place
        report(done)
        if not document.text.strip():
            continue
        before = size
        text_digest = digest_of(document)
        for split, piece in plan[place[0]].rule.pieces(document, text_digest):
            key, text = piece.key.encode(), piece.text.encode()
            documents[split].append((piece.key, text))
            size += len(text)
            digest.update(split.encode() + len(key).to_bytes(8, "little") + key)
            digest.update(hashlib.sha256(text).digest())
        read += 1
        left_out += size == before
        if size >= PART_BYTES:
            break
    else:
        end = (len(plan), 0)
    if not read:
        return None
    for step in plan[begin[0] : end[0] + 1]:
        step.check()
    part = _Part(
        begin=begin,
        end=end,
        sources=[step.identity for step in plan[begin[0] : end[0] + 1]],
        digest=digest.hexdigest(),
        read=read,
        left_out=left_out,
        documents={split: len(found) for split, found in documents.items()},
        text_bytes={split: sum(len(t) for _, t in found) for split, found in documents.items()},
    )
    with staged_directory(directory / "parts" / f"{number:05d}", keep_theirs=True) as staging:
        if size:
            _build(documents, staging)
        write_json(staging / _PART_FILE, dataclasses.asdict(part))
    return part


def _read(plan: list[_Step], begin: tuple[int, int]) -> Iterator[tuple[tuple[int, int], Any, int]]:
    """The documents from `begin`: where each ends, the document, and the bytes read so far."""
    before = sum(step.source.num_bytes for step in plan[: begin[0]])
    for index in range(begin[0], len(plan)):
        for record in plan[index].source.records(begin[1] if index == begin[0] else 0):
            yield (index, record.next), record.document, before + record.read
        before += plan[index].source.num_bytes


def _build(documents: dict[str, list[tuple[str, bytes]]], staging: Path) -> None:
    """Runs the builder without TFDS' own bars and messages: progress is shown while reading."""
    downloads = staging / "downloads"
    bars = tqdm_utils._active  # pyright: ignore[reportPrivateUsage]  (there is no public getter)
    tqdm_utils.display_progress_bar(False)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            builder = _Builder(documents=documents, data_dir=staging)
            builder.download_and_prepare(download_dir=downloads)
    except RuntimeError as error:  # of the ArrayRecord writer, which is not Python's
        raise OSError(f"could not write {staging}: {error}") from None
    finally:
        tqdm_utils.display_progress_bar(bars)
        shutil.rmtree(downloads, ignore_errors=True)


def _finished_parts(directory: Path, plan: list[_Step]) -> list[_Part]:
    """The parts that still are what the plan would write; the others are removed."""
    parts = list[_Part]()
    for path in sorted(directory.iterdir()) if directory.exists() else ():
        begin = parts[-1].end if parts else (0, 0)
        try:
            part = _load_part(path / _PART_FILE)
            expected = [step.identity for step in plan[begin[0] : part.end[0] + 1]]
            if path.name == f"{len(parts):05d}" and (part.begin, part.sources) == (begin, expected):
                parts.append(part)
                continue
        except (OSError, ValueError, TypeError, KeyError):
            pass
        shutil.rmtree(path)
    return parts


def _load_part(path: Path) -> _Part:
    values = json.loads(path.read_text("utf-8"))
    return _Part(**{**values, "begin": tuple(values["begin"]), "end": tuple(values["end"])})


def _complete(
    directory: Path,
    corpus: Corpus,
    validation: Corpus | None,
    plan: list[_Step],
    parts: list[_Part],
) -> CorpusInfo:
    """Writes `corpus.json`."""
    documents = {s: sum(part.documents[s] for part in parts) for s in SPLITS}
    for split, other in zip(SPLITS, (corpus, validation or corpus), strict=True):
        if not documents[split]:
            hint = "" if validation else "; give validation text of your own (--validation)"
            raise ValueError(f"{describe(other)} has no {split} documents{hint}")
    fingerprint = hashlib.sha256(_FORMAT.encode())
    for part in parts:
        fingerprint.update(part.digest.encode())
    split_bytes = {s: sum(part.text_bytes[s] for part in parts) for s in SPLITS}
    info = CorpusInfo(
        directory=directory,
        name=corpus.name,
        fingerprint=fingerprint.hexdigest(),
        num_documents=sum(part.read for part in parts),
        num_bytes=split_bytes["train"] + split_bytes["validation"],
        skipped_files=tuple(corpus.skipped_files),
        copies_left_out=sum(part.left_out for part in parts),
        split_documents=documents,
        split_bytes=split_bytes,
    )
    record = dataclasses.asdict(info)
    del record["directory"]
    record["sources"] = [
        [step.source.name, step.stamp, isinstance(step.rule, Given)] for step in plan
    ]
    write_json(directory / _INFO_FILE, record)
    return info


def _finished(directory: Path, corpus: Corpus, given: list[_Step]) -> CorpusInfo | None:
    """What `corpus.json` says, if it is there and about these sources."""
    try:
        values = json.loads((directory / _INFO_FILE).read_text("utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{directory / _INFO_FILE} is damaged: {error}") from None
    before = {(name, given): stamp for name, stamp, given in values.pop("sources")}
    now = {(step.source.name, True): step.stamp for step in given}
    now |= {(source.name, False): source.stamp() for source in corpus.sources}
    for (name, held_out), stamp in before.items():
        if now.get((name, held_out)) != stamp:
            raise ValueError(
                f"{directory} was made from {name} of {stamp}"
                + (" (for validation)" if held_out else "")
                + f", but that is now {now.get((name, held_out), 'not given')}; prepare into "
                "another directory. What is there stays as it is"
            )
    if added := [name for name, _ in now.keys() - before.keys()]:
        raise ValueError(
            f"{directory} was made without {min(added)}; prepare into another directory. What is "
            "there stays as it is"
        )
    values["skipped_files"] = tuple(values["skipped_files"])
    return CorpusInfo(directory=directory, **values)
