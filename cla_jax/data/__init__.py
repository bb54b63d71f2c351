"""The data room: corpora -> prepared token streams -> batches.

info, streams = prepare(corpus_at("my_text/"), tokenizer_at("bytes"), "data/mine")
streams = open_prepared("data/mine")  # from then on
iterator = iter(batches(streams.train, DataConfig(sequence_length=256, batch_size=16)))
"""

import importlib
from typing import TYPE_CHECKING, Any

from cla_jax.data.corpora import Corpus, EmbeddedCorpus, TextCorpus, corpus_at
from cla_jax.data.packing import PackedRows, Packing, first_fit
from cla_jax.data.prepared import open_prepared, open_tokenizer
from cla_jax.data.records import Document, Record, Source
from cla_jax.data.stream_writer import write_token_stream
from cla_jax.data.token_stream import Streams, TokenStream
from cla_jax.data.tokenizers import (
    ByteTokenizer,
    JsonTokenizer,
    Tokenizer,
    tokenizer_at,
    train_tokenizer,
)

if TYPE_CHECKING:
    from cla_jax.data.documents import CorpusInfo
    from cla_jax.data.pipeline import (
        EvaluationWindows,
        TokenWindows,
        batch_rows,
        batches,
        data_fingerprint,
        evaluation_batches,
        training_rows,
    )
    from cla_jax.data.preparation import prepare, prepare_corpus, prepare_streams
    from cla_jax.data.tfds_corpus import TfdsCorpus

# TFDS and Grain take seconds to import, and a run on prepared tokens needs no TFDS at all.
_LAZY = {
    "cla_jax.data.documents": ("CorpusInfo",),
    "cla_jax.data.pipeline": (
        "EvaluationWindows",
        "TokenWindows",
        "batch_rows",
        "batches",
        "data_fingerprint",
        "evaluation_batches",
        "training_rows",
    ),
    "cla_jax.data.preparation": ("prepare", "prepare_corpus", "prepare_streams"),
    "cla_jax.data.tfds_corpus": ("TfdsCorpus",),
}

__all__ = [
    "ByteTokenizer",
    "Corpus",
    "CorpusInfo",
    "Document",
    "EmbeddedCorpus",
    "EvaluationWindows",
    "JsonTokenizer",
    "PackedRows",
    "Packing",
    "Record",
    "Source",
    "Streams",
    "TextCorpus",
    "TfdsCorpus",
    "TokenStream",
    "TokenWindows",
    "Tokenizer",
    "batch_rows",
    "batches",
    "corpus_at",
    "data_fingerprint",
    "evaluation_batches",
    "first_fit",
    "open_prepared",
    "open_tokenizer",
    "prepare",
    "prepare_corpus",
    "prepare_streams",
    "tokenizer_at",
    "train_tokenizer",
    "training_rows",
    "write_token_stream",
]


def __getattr__(name: str) -> Any:
    for module, names in _LAZY.items():
        if name in names:
            return getattr(importlib.import_module(module), name)
    raise AttributeError(f"module 'cla_jax.data' has no attribute {name!r}")
