"""What the data pipeline feeds and what preparation takes: tokens/s, documents/s, MB/s.

    python experiments/benchmarks/data_pipeline.py
    python experiments/benchmarks/data_pipeline.py --text my.jsonl.zst --tokenizer my_bpe.json

Batches are taken as fast as the machine makes them, with nothing to train. Target: 2 M tokens/s
from two processor cores. Without arguments the text is the
Python standard library, and the tokenizer a byte-level BPE trained on it here. Results of record:
docs/results.md.
"""

import dataclasses
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table

from cla_jax.configs import DataConfig
from cla_jax.data import (
    ByteTokenizer,
    Streams,
    Tokenizer,
    TokenStream,
    batches,
    corpus_at,
    prepare_corpus,
    prepare_streams,
    tokenizer_at,
    train_tokenizer,
)

SECONDS = 3.0
SHAPES = ((2048, 16), (256, 16), (256, 8))


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """Time preparation of a text and batches from the result."""

    text: str | None = None
    """As for `cla-jax prepare-data`. Default: the Python standard library."""
    tokenizer: str | None = None
    """A `tokenizers` JSON file. Default: a BPE trained on the text, which is not timed."""
    cores: int = 2
    """Processor cores to use."""


def tokens_per_second(stream: TokenStream, config: DataConfig) -> float:
    """Inputs that a step consumes, `B * T`, per second."""
    iterator = iter(batches(stream, config))
    for _ in range(50):
        next(iterator)
    count, began = 0, time.perf_counter()
    while time.perf_counter() - began < SECONDS:
        next(iterator)
        count += 1
    seconds = time.perf_counter() - began
    iterator.close()
    return count * config.batch_size * config.sequence_length / seconds


def timed[T](work: Callable[[], T]) -> tuple[T, float]:
    """What `work` returns, and the seconds it took."""
    began = time.perf_counter()
    result = work()
    return result, time.perf_counter() - began


def main(options: Benchmark) -> None:
    """Run it."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.cores])
    os.environ["RAYON_NUM_THREADS"] = str(options.cores)
    console = Console()
    corpus = corpus_at(options.text)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        info, seconds = timed(lambda: prepare_corpus(corpus, place))
        preparation = Table("preparation", "seconds", "documents/s", "MB/s", "tokens/s", box=None)

        def add(name: str, seconds: float, tokens: int | None = None) -> None:
            rates = (info.num_documents / seconds, info.num_bytes / 1e6 / seconds)
            preparation.add_row(
                name, f"{seconds:.1f}", f"{rates[0]:,.0f}", f"{rates[1]:.1f}",
                "" if tokens is None else f"{tokens / seconds:,.0f}",
            )  # fmt: skip

        add("documents", seconds)
        tokenizers: list[Tokenizer] = [
            ByteTokenizer(),
            tokenizer_at(options.tokenizer)
            if options.tokenizer
            else train_tokenizer(corpus, 8192, place / "bpe.json"),
        ]
        feeding = Table("feeding", "packing", "T", "B", "document mask", "tokens/s", box=None)
        for tokenizer in tokenizers:
            streams: Streams
            streams, seconds = timed(lambda t=tokenizer: prepare_streams(info, t, place))
            total = streams.train.num_tokens + streams.validation.num_tokens
            add(f"tokens, {tokenizer.name}", seconds, total)
            for length, batch in SHAPES:
                for packing in ("concat", "first_fit"):
                    for mask in (False, True):
                        config = DataConfig(length, batch, packing=packing, document_mask=mask)
                        rate = tokens_per_second(streams.train, config)
                        feeding.add_row(
                            tokenizer.name, packing, str(length), str(batch),
                            "yes" if mask else "no", f"{rate:,.0f}",
                        )  # fmt: skip
        console.print(f"{info.num_documents:,} documents, {info.num_bytes:,} bytes, "
                      f"{options.cores} cores")  # fmt: skip
        console.print(preparation)
        console.print(feeding)


if __name__ == "__main__":
    main(tyro.cli(Benchmark))
