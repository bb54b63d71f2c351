"""Token streams of a few texts, for the tests that train."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from cla_jax.data import ByteTokenizer, Streams, Tokenizer, write_token_stream


def write_streams(
    directory: Path, texts: Mapping[str, Sequence[str]], tokenizer: Tokenizer | None = None
) -> Streams:
    """Streams of `train` and `validation` texts below a directory; bytes without a tokenizer."""
    return Streams(*(
        write_token_stream(
            texts[split], tokenizer or ByteTokenizer(), directory / split, split=split,
            corpus_fingerprint="c" * 64,
        )
        for split in ("train", "validation")
    ))  # fmt: skip
