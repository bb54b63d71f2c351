"""Preparation: a corpus becomes documents on disk, and those become token streams.

A prepared directory holds

    prepared.json      the tokenizer, and when all is done a summary
    tokenizer.json     the tokenizer itself, unless it is bytes
    documents/         the documents, as TFDS datasets in ArrayRecord files
    train/             the token stream that a model is trained on
    validation/        and the one on which it is evaluated

To train, `prepared.json`, `tokenizer.json` and the two streams are enough.
"""

import hashlib
import os
import re
from pathlib import Path

from cla_jax.data.corpora import Corpus
from cla_jax.data.documents import CorpusInfo, write_documents
from cla_jax.data.files import byte_progress, locked
from cla_jax.data.prepared import bind_prepared, check_prepared, complete_prepared
from cla_jax.data.splitting import SPLITS
from cla_jax.data.stream_writer import StreamWriter, add_in_batches
from cla_jax.data.token_stream import Streams
from cla_jax.data.tokenizers import Tokenizer

__all__ = ["CorpusInfo", "prepare", "prepare_corpus", "prepare_streams", "write_streams"]


def prepare(
    corpus: Corpus,
    tokenizer: Tokenizer,
    directory: str | os.PathLike[str],
    validation: Corpus | None = None,
) -> tuple[CorpusInfo, Streams]:
    """Makes a prepared directory, goes on with one, or finds it done.

    Killed at any point and called again, it goes on behind the last finished part, of documents
    (256 MiB) as of tokens.

    Args:
        corpus: the text.
        tokenizer: how it becomes tokens.
        directory: the prepared directory.
        validation: text for validation; by default a part of `corpus`, disjoint from training.

    Raises:
        ValueError: a directory that holds something else, or was begun with another tokenizer or
            from other files (by name); what `write_documents` and `StreamWriter` raise.
        OSError: the disk is full; what was written before stays.
    """
    directory = Path(directory)
    check_prepared(directory, tokenizer)
    info = write_documents(corpus, directory / "documents", validation)
    bind_prepared(directory, tokenizer)
    streams = write_streams(info, tokenizer, directory)
    complete_prepared(directory, info, streams)
    return info, streams


def prepare_corpus(corpus: Corpus, data_dir: str | os.PathLike[str]) -> CorpusInfo:
    """Writes a corpus's documents under `data_dir`, or finds them there.

    They are looked up by the corpus's name and by the sizes and times of its files, which are not
    read again.

    Raises:
        ValueError: as `write_documents`.
    """
    stamps = [f"{source.name}\n{source.stamp()}\n" for source in corpus.sources]
    key = hashlib.sha256("".join(stamps).encode()).hexdigest()[:16]
    return write_documents(corpus, Path(data_dir) / "corpora" / f"{corpus.name}-{key}")


def prepare_streams(
    corpus: CorpusInfo, tokenizer: Tokenizer, data_dir: str | os.PathLike[str]
) -> Streams:
    """A prepared corpus as token streams under `data_dir`; what is already there is reused.

    Raises:
        ValueError: a damaged stream.
    """
    tokenizer_name = re.sub(r"[^\w.-]+", "-", tokenizer.name)
    directory = Path(data_dir) / "streams" / corpus.directory.name
    return write_streams(
        corpus, tokenizer, directory / f"{tokenizer_name}-{tokenizer.fingerprint[:16]}"
    )


def write_streams(
    corpus: CorpusInfo, tokenizer: Tokenizer, directory: str | os.PathLike[str]
) -> Streams:
    """Tokenizes a prepared corpus into `directory/train` and `directory/validation`.

    A stream that is complete is left as it is; one that was begun goes on behind its last part.

    Raises:
        ValueError: a damaged stream, a tokenizer whose ids exceed its own vocabulary.
        OSError: the disk is full; what was written before stays.
    """
    directory = Path(directory)
    for split in SPLITS:
        if not (directory / split).exists():
            with locked(directory / split):
                if not (directory / split).exists():
                    _tokenize(corpus, tokenizer, directory / split, split)
    return Streams.open(directory)


def _tokenize(corpus: CorpusInfo, tokenizer: Tokenizer, directory: Path, split: str) -> None:
    total = corpus.split_bytes[split]
    with (
        StreamWriter(
            directory, tokenizer, split=split, corpus_fingerprint=corpus.fingerprint
        ) as writer,
        byte_progress(f"tokenizing {split}", total) as report,
    ):
        for part in range(writer.parts, len(corpus.parts)):
            for done in add_in_batches(writer, corpus.texts(split, part)):
                report(done)
            writer.commit()
        writer.finish()
