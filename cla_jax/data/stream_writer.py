"""Writing token streams, so that a killed process goes on behind the last finished part."""

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cla_jax.data.files import publish
from cla_jax.data.token_stream import FORMAT, TokenStream
from cla_jax.data.tokenizers import Tokenizer

__all__ = ["StreamWriter", "write_token_stream"]

BATCH_BYTES = 2**23


@dataclasses.dataclass(frozen=True)
class _Mark:
    """Where a finished part ends; a line of the journal."""

    tokens: int = 0
    documents: int = 0
    text_bytes: int = 0
    digest: str = ""


class StreamWriter:
    """A token stream in the making, beside the directory that it will be.

    Documents are added to a part; `commit` ends it, with everything so far on disk and a line in a
    journal. A writer that is opened after a failure drops what came after the last commit.

    Args:
        directory: the stream's; it appears in one rename when the stream is finished.
        tokenizer: its `end_of_text` is put after each document.
        split: recorded with the stream.
        corpus_fingerprint: recorded with the stream.
        resume: take up what an earlier writer of the same stream committed.
    """

    def __init__(
        self,
        directory: Path,
        tokenizer: Tokenizer,
        *,
        split: str,
        corpus_fingerprint: str,
        resume: bool = True,
    ) -> None:
        self._directory, self._tokenizer = directory, tokenizer
        self._dtype = np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")
        self._identity = {
            "split": split,
            "vocab_size": tokenizer.vocab_size,
            "end_of_text": tokenizer.end_of_text,
            "tokenizer": tokenizer.name,
            "tokenizer_fingerprint": tokenizer.fingerprint,
            "corpus_fingerprint": corpus_fingerprint,
        }
        self._work = directory.parent / f".{directory.name}.partial"
        self._stream = self._work / "stream"
        self._marks = (self._committed() if resume else None) or self._begin()
        self._now = dataclasses.replace(self._last, digest="")
        self._digest = hashlib.sha256()
        self._tokens = self._open(self._stream / "tokens.bin", self._now.tokens, self._dtype)
        self._ends = self._open(self._work / "ends.bin", self._now.documents, np.dtype("<i8"))
        self._journal = (self._work / "journal.jsonl").open("a", encoding="utf-8")

    def __enter__(self) -> "StreamWriter":
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.ExitStack() as stack:  # on a full disk, closing fails too
            for file in (self._tokens, self._ends, self._journal):
                stack.callback(file.close)

    @property
    def parts(self) -> int:
        """Parts committed."""
        return len(self._marks)

    @property
    def text_bytes(self) -> int:
        """UTF-8 bytes of the text so far."""
        return self._now.text_bytes

    def add(self, texts: Sequence[str]) -> None:
        """Tokenizes documents into the current part.

        Raises:
            ValueError: a tokenizer whose ids exceed its own vocabulary.
        """
        if not texts:
            return
        end = np.array([self._tokenizer.end_of_text], np.int32)
        encoded = self._tokenizer.encode_batch(texts)
        tokens = np.concatenate([part for ids in encoded for part in (ids, end)])
        if tokens.min() < 0 or tokens.max() >= self._tokenizer.vocab_size:
            raise ValueError(
                f"tokenizer {self._tokenizer.name!r} gave ids from {tokens.min()} to "
                f"{tokens.max()}; its vocabulary is 0 to {self._tokenizer.vocab_size - 1}"
            )
        data = tokens.astype(self._dtype).tobytes()
        ends = self._now.tokens + np.cumsum([len(ids) + 1 for ids in encoded], dtype="<i8")
        self._tokens.write(data)
        self._ends.write(ends.tobytes())
        self._digest.update(data)
        self._now = dataclasses.replace(
            self._now,
            tokens=int(ends[-1]),
            documents=self._now.documents + len(texts),
            text_bytes=self._now.text_bytes + sum(len(text.encode()) for text in texts),
        )

    def commit(self) -> None:
        """Ends the current part, which may be empty."""
        for file in (self._tokens, self._ends):
            file.flush()
            os.fsync(file.fileno())
        mark = dataclasses.replace(self._now, digest=self._digest.hexdigest())
        self._journal.write(json.dumps(dataclasses.asdict(mark)) + "\n")
        self._journal.flush()
        os.fsync(self._journal.fileno())
        self._marks.append(mark)
        self._digest = hashlib.sha256()

    def finish(self) -> TokenStream:
        """Publishes the committed parts as a stream.

        Raises:
            ValueError: no documents.
        """
        last, split = self._last, self._identity["split"]
        if not last.documents:
            raise ValueError(
                f"no documents to write to the {split!r} token stream {self._directory}"
            )
        ends = np.fromfile(self._work / "ends.bin", "<i8", last.documents)
        np.save(self._stream / "offsets.npy", np.concatenate([np.zeros(1, "<i8"), ends]))
        digests = "".join(mark.digest for mark in self._marks)
        meta = {
            "format": FORMAT,
            "dtype": self._dtype.str,
            "num_tokens": last.tokens,
            "num_documents": last.documents,
            **self._identity,
            "fingerprint": hashlib.sha256(digests.encode()).hexdigest(),
            "text_bytes": last.text_bytes,
        }
        (self._stream / "stream.json").write_text(json.dumps(meta, indent=2) + "\n", "utf-8")
        publish(self._stream, self._directory, keep_theirs=True)
        self.discard()
        return TokenStream.open(self._directory)

    def discard(self) -> None:
        """Removes what is not published."""
        shutil.rmtree(self._work, ignore_errors=True)

    @property
    def _last(self) -> _Mark:
        return self._marks[-1] if self._marks else _Mark()

    def _committed(self) -> list[_Mark]:
        """The parts that an earlier writer of the same stream committed."""
        journal = self._work / "journal.jsonl"
        try:
            first, *lines = journal.read_text("utf-8").splitlines(keepends=True)
            if json.loads(first) != self._identity:
                return []
            whole = [line for line in lines if line.endswith("\n")]
            if len(whole) < len(lines):  # killed while it wrote a line
                journal.write_text("".join([first, *whole]), "utf-8")
            return [_Mark(**json.loads(line)) for line in whole]
        except (OSError, ValueError, TypeError):
            return []

    def _begin(self) -> list[_Mark]:
        self.discard()
        self._stream.mkdir(parents=True)
        (self._work / "journal.jsonl").write_text(json.dumps(self._identity) + "\n", "utf-8")
        return []

    @staticmethod
    def _open(path: Path, items: int, dtype: np.dtype[Any]) -> io.BufferedRandom:
        """A file to append to, cut behind the items that are known to be good."""
        file = path.open("r+b" if path.exists() else "w+b")
        if file.seek(0, os.SEEK_END) < items * dtype.itemsize:
            file.close()
            raise ValueError(f"{path} is shorter than its journal says; delete {path.parent}")
        file.truncate(items * dtype.itemsize)
        file.seek(0, os.SEEK_END)
        return file


def add_in_batches(writer: StreamWriter, texts: Iterable[str]) -> Iterator[int]:
    """Adds documents in batches of about 8 MiB; yields the text bytes so far after each."""
    batch, size = list[str](), 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= BATCH_BYTES:
            writer.add(batch)
            yield writer.text_bytes
            batch, size = [], 0
    writer.add(batch)
    yield writer.text_bytes


def write_token_stream(
    documents: Iterable[str],
    tokenizer: Tokenizer,
    directory: str | os.PathLike[str],
    *,
    split: str,
    corpus_fingerprint: str,
) -> TokenStream:
    """Tokenizes documents into a new stream of one part, or leaves nothing.

    Args:
        documents: texts, in the order they are to be stored.
        tokenizer: its `end_of_text` is put after each document.
        directory: the stream's; its parents are made.
        split: recorded with the stream.
        corpus_fingerprint: recorded with the stream.

    Raises:
        ValueError: no documents, or a tokenizer whose ids exceed its own vocabulary.
    """
    directory = Path(directory)
    with StreamWriter(
        directory, tokenizer, split=split, corpus_fingerprint=corpus_fingerprint, resume=False
    ) as writer:
        try:
            for _ in add_in_batches(writer, documents):
                pass
            writer.commit()
            return writer.finish()
        finally:
            writer.discard()
