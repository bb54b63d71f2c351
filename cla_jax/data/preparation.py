"""Preparation: a corpus becomes a TFDS dataset in ArrayRecord files, and then token streams.

TensorFlow is not needed: TFDS writes and reads ArrayRecord without it.
"""

import contextlib
import dataclasses
import difflib
import io
import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from tensorflow_datasets.core.utils import tqdm_utils

from cla_jax.data.corpora import Corpus
from cla_jax.data.files import progress, staged_directory
from cla_jax.data.splitting import SPLITS, CorpusFingerprint, Survey, describe, documents_of, survey
from cla_jax.data.token_stream import Streams, write_token_stream
from cla_jax.data.tokenizers import Tokenizer

__all__ = ["CorpusInfo", "prepare_corpus", "prepare_streams"]

_INFO_FILE = "corpus.json"


@dataclasses.dataclass(frozen=True)
class CorpusInfo:
    """A prepared corpus on disk.

    Attributes:
        directory: where it lies; its name ends with the fingerprint's first 16 digits.
        name: the corpus's name.
        fingerprint: SHA-256 over the documents' keys and texts.
        num_documents: documents before the split.
        num_bytes: their UTF-8 bytes.
        skipped_files: files left out because they are not UTF-8.
    """

    directory: Path
    name: str
    fingerprint: str
    num_documents: int
    num_bytes: int
    skipped_files: tuple[str, ...]

    def source(self, split: str) -> Sequence[dict[str, Any]]:
        """Random access to a split's records, `{"key": bytes, "text": bytes}`, through TFDS."""
        if split not in SPLITS:
            near = difflib.get_close_matches(split, SPLITS, n=1, cutoff=0.0)[0]
            raise ValueError(f"unknown split {split!r}; the nearest is {near!r}")
        builder = tfds.builder_from_directory(self.directory / "text_corpus" / "1.0.0")
        return builder.as_data_source(split=split)  # pyright: ignore[reportCallIssue]

    def texts(self, split: str) -> Iterator[str]:
        """A split's documents, in their stored (key-hashed) order."""
        source = self.source(split)
        return (source[i]["text"].decode() for i in range(len(source)))


class TextCorpusBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """The TFDS builder of every corpus: records of a key and a text, in ArrayRecord files."""

    name = "text_corpus"
    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, *, corpus: Corpus, found: Survey, data_dir: Path) -> None:
        self._corpus = corpus
        self._found = found
        super().__init__(data_dir=data_dir, file_format="array_record")

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text()
        features = tfds.features.FeaturesDict({"key": text, "text": text})
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[str, dict[str, str]]]]:
        return {split: self._generate_examples(split) for split in SPLITS}

    def _generate_examples(self, split: str) -> Iterator[tuple[str, dict[str, str]]]:
        documents, whole = documents_of(self._corpus), CorpusFingerprint()
        for document in progress(documents, f"writing {split}", self._found.num_documents):
            for piece in self._found.pieces(document, whole.add(document), split):
                yield piece.key, {"key": piece.key, "text": piece.text}
        if whole.hexdigest() != self._found.fingerprint:
            raise ValueError(
                f"{describe(self._corpus)} changed while it was read; prepare it again"
            )


def prepare_corpus(corpus: Corpus, data_dir: str | os.PathLike[str]) -> CorpusInfo:
    """Writes a corpus as a TFDS dataset under `data_dir`, or finds it there.

    The directory is named by the corpus's fingerprint and appears only when it is complete.

    Raises:
        ValueError: an empty or too short corpus, or what the corpus itself raises.
    """
    found = survey(corpus)
    directory = Path(data_dir) / "corpora" / f"{corpus.name}-{found.fingerprint[:16]}"
    info = CorpusInfo(
        directory=directory,
        name=corpus.name,
        fingerprint=found.fingerprint,
        num_documents=found.num_documents,
        num_bytes=found.num_bytes,
        skipped_files=tuple(corpus.skipped_files),
    )
    if not directory.exists():
        with staged_directory(directory) as staging:
            _build(corpus, found, staging)
            record = {**dataclasses.asdict(info), "directory": directory.name}
            (staging / _INFO_FILE).write_text(json.dumps(record, indent=2) + "\n")
    return info


def _build(corpus: Corpus, found: Survey, staging: Path) -> None:
    """Runs the builder without TFDS' own bars and messages: progress is shown by `progress`."""
    builder = TextCorpusBuilder(corpus=corpus, found=found, data_dir=staging)
    downloads = staging / "downloads"
    bars = tqdm_utils._active  # pyright: ignore[reportPrivateUsage]  (there is no public getter)
    tqdm_utils.display_progress_bar(False)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            builder.download_and_prepare(download_dir=downloads)
    finally:
        tqdm_utils.display_progress_bar(bars)
        shutil.rmtree(downloads, ignore_errors=True)


def prepare_streams(
    corpus: CorpusInfo, tokenizer: Tokenizer, data_dir: str | os.PathLike[str]
) -> Streams:
    """A prepared corpus as token streams under `data_dir`; what is already there is reused.

    Raises:
        ValueError: a damaged stream.
    """
    tokenizer_name = re.sub(r"[^\w.-]+", "-", tokenizer.name)
    directory = Path(data_dir) / "streams" / corpus.directory.name
    directory /= f"{tokenizer_name}-{tokenizer.fingerprint[:16]}"
    for split in SPLITS:
        if not (directory / split).exists():
            total = len(corpus.source(split))
            write_token_stream(
                progress(corpus.texts(split), f"tokenizing {split}", total),
                tokenizer,
                directory / split,
                split=split,
                corpus_fingerprint=corpus.fingerprint,
            )
    return Streams.open(directory)
