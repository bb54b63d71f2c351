"""The data room: corpora -> prepared token streams -> batches.

corpus = prepare_corpus(EmbeddedCorpus(), "data")
streams = prepare_streams(corpus, ByteTokenizer(), "data")
iterator = iter(batches(streams.train, DataConfig(sequence_length=256, batch_size=16)))
"""

import importlib
from typing import TYPE_CHECKING, Any

from cla_jax.data.corpora import Corpus, Document, EmbeddedCorpus, TextCorpus, corpus_at
from cla_jax.data.token_stream import Streams, TokenStream, write_token_stream
from cla_jax.data.tokenizers import ByteTokenizer, Tokenizer

if TYPE_CHECKING:
    from cla_jax.data.pipeline import (
        EvaluationWindows,
        TokenWindows,
        batch_rows,
        batches,
        data_fingerprint,
        evaluation_batches,
    )
    from cla_jax.data.preparation import CorpusInfo, prepare_corpus, prepare_streams

_PIPELINE = (
    "batch_rows",
    "EvaluationWindows",
    "TokenWindows",
    "batches",
    "data_fingerprint",
    "evaluation_batches",
)
_PREPARATION = ("CorpusInfo", "prepare_corpus", "prepare_streams")

__all__ = [
    "ByteTokenizer",
    "Corpus",
    "CorpusInfo",
    "Document",
    "EmbeddedCorpus",
    "EvaluationWindows",
    "Streams",
    "TextCorpus",
    "TokenStream",
    "TokenWindows",
    "Tokenizer",
    "batch_rows",
    "batches",
    "corpus_at",
    "data_fingerprint",
    "evaluation_batches",
    "prepare_corpus",
    "prepare_streams",
    "write_token_stream",
]


def __getattr__(name: str) -> Any:
    # TFDS and Grain take seconds to import, and a run on prepared tokens needs no TFDS at all.
    if name in _PIPELINE:
        return getattr(importlib.import_module("cla_jax.data.pipeline"), name)
    if name in _PREPARATION:
        return getattr(importlib.import_module("cla_jax.data.preparation"), name)
    raise AttributeError(f"module 'cla_jax.data' has no attribute {name!r}")
