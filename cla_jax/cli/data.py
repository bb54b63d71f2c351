"""`cla-jax prepare-data` and `train-tokenizer`: from text to tokens."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from cla_jax.data import Streams


@dataclasses.dataclass(frozen=True)
class PrepareData:
    """Turn text into a prepared directory: documents, token streams, a summary.

    Killed and run again, it goes on where it was. Example: `cla-jax prepare-data slimpajama/
    --tokenizer hf:EleutherAI/pythia-160m --out data/slimpajama`
    """

    corpus: Annotated[str, tyro.conf.Positional]
    """A file, a folder of .txt, .jsonl and .jsonl.zst files, or
    tfds:NAME[/CONFIG][:VERSION][@SPLIT]."""
    out: Path
    """The prepared directory."""
    tokenizer: str = "bytes"
    """`bytes`, a `tokenizers` JSON file, or hf:OWNER/NAME[@REVISION] on the Hugging Face hub."""
    validation: str | None = None
    """Validation text, named like the corpus. Default: about 5 % of the corpus's documents."""
    text_key: str = "text"
    """The key of a JSON record, or feature of a TFDS dataset, that holds the text."""
    end_of_text: str | None = None
    """The token that ends a document. Default: <|endoftext|> or </s>."""
    sequence_length: int = 2048
    """Tokens per sequence, for the row counts of the summary alone."""

    def run(self) -> None:
        """Prepare it."""
        if self.sequence_length < 1:
            raise ValueError(f"--sequence-length {self.sequence_length} must be at least 1")
        from cla_jax.data import corpus_at, prepare, tokenizer_at

        tokenizer = tokenizer_at(self.tokenizer, self.end_of_text)
        corpus = corpus_at(self.corpus, self.text_key)
        given = corpus_at(self.validation, self.text_key) if self.validation else None
        info, streams = prepare(corpus, tokenizer, self.out, given)
        console = Console()
        console.print(_summary(streams, self.sequence_length))
        if info.copies_left_out:
            print(f"{info.copies_left_out:,} training documents left out: copies of validation")
        print(f"{self.out}: tokenizer {tokenizer.name}, {tokenizer.vocab_size:,} ids")


def _summary(streams: "Streams", sequence_length: int) -> Table:
    """Figures of both splits."""
    import numpy as np

    from cla_jax.data import first_fit

    both = (streams.train, streams.validation)
    packings = [first_fit(np.diff(stream.offsets), sequence_length + 1) for stream in both]
    table = Table("", "train", "validation", box=None)
    for column in table.columns[1:]:
        column.justify = "right"

    def add(name: str, *figures: object) -> None:
        table.add_row(name, *(f"{figure:,}" for figure in figures))

    add("documents", *(stream.num_documents for stream in both))
    add("bytes of text", *(stream.text_bytes for stream in both))
    add("tokens", *(stream.num_tokens for stream in both))
    table.add_row("bytes per token", *(f"{stream.bytes_per_token:.4f}" for stream in both))
    add(f"rows of {sequence_length}, concat",
        *((stream.num_tokens - 1) // sequence_length for stream in both))  # fmt: skip
    add(f"rows of {sequence_length}, first_fit", *(packing.rows for packing in packings))
    add("  tokens cut off", *(packing.dropped for packing in packings))
    table.add_row(
        "  padding", *(f"{1 - p.tokens / (p.rows * (sequence_length + 1)):.2%}" for p in packings)
    )
    return table


@dataclasses.dataclass(frozen=True)
class TrainTokenizer:
    """Train a byte-level BPE tokenizer on text and write it as a `tokenizers` JSON file.

    Example: `cla-jax train-tokenizer my_text/ --vocab-size 4096 --out my_tokenizer.json`
    """

    corpus: Annotated[str, tyro.conf.Positional]
    """Text, named as for prepare-data."""
    vocab_size: int
    """Ids: the 256 bytes, the end token and merges."""
    out: Path
    """The JSON file; it must not exist yet."""
    text_key: str = "text"
    """As for prepare-data."""

    def run(self) -> None:
        """Train it."""
        from cla_jax.data import corpus_at, train_tokenizer

        trained = train_tokenizer(corpus_at(self.corpus, self.text_key), self.vocab_size, self.out)
        print(f"wrote {self.out}: {trained.vocab_size} ids, {trained.end_token} ends a document")
        if trained.vocab_size < self.vocab_size:
            print(f"fewer than {self.vocab_size}: this text has no more pairs to merge")
