"""Token streams: a split's documents, tokenized once, end to end in one flat file.

A stream is a directory of `tokens.bin` (little-endian uint16, or uint32 for a vocabulary above
65,536), `offsets.npy` (int64 `[documents + 1]`: where each document begins) and `stream.json`.
"""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["Streams", "TokenStream"]

FORMAT = 2


@dataclasses.dataclass(frozen=True, eq=False)
class TokenStream:
    """A prepared token stream, memory-mapped.

    Attributes:
        directory: where it lies.
        tokens: `[num_tokens]`, uint16 or uint32; each document ends with `end_of_text`.
        offsets: int64 `[num_documents + 1]`; document i is `tokens[offsets[i]:offsets[i + 1]]`.
        split: `train` or `validation`.
        vocab_size: of the tokenizer.
        end_of_text: the id that ends a document.
        tokenizer: the tokenizer's name.
        tokenizer_fingerprint: the tokenizer's fingerprint.
        corpus_fingerprint: the corpus's fingerprint.
        fingerprint: SHA-256 of the SHA-256s of its parts' tokens, in order.
        text_bytes: UTF-8 bytes of the text that was tokenized.
    """

    directory: Path
    tokens: np.ndarray = dataclasses.field(repr=False)
    offsets: np.ndarray = dataclasses.field(repr=False)
    split: str
    vocab_size: int
    end_of_text: int
    tokenizer: str
    tokenizer_fingerprint: str
    corpus_fingerprint: str
    fingerprint: str
    text_bytes: int

    @property
    def num_tokens(self) -> int:
        """Tokens, end tokens included."""
        return len(self.tokens)

    @property
    def num_documents(self) -> int:
        """Documents."""
        return len(self.offsets) - 1

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of text per token, end tokens included: turns a token loss into bits/byte."""
        return self.text_bytes / self.num_tokens

    @classmethod
    def open(cls, directory: str | os.PathLike[str]) -> "TokenStream":
        """Memory-maps a stream.

        Raises:
            ValueError: no stream there, a file that is damaged or of another size than recorded.
        """
        directory = Path(directory)
        try:
            meta: dict[str, Any] = json.loads((directory / "stream.json").read_text("utf-8"))
            if meta.pop("format") != FORMAT:
                raise ValueError("stream.json is of another format")
            dtype = np.dtype(meta.pop("dtype"))
            num_tokens, num_documents = meta.pop("num_tokens"), meta.pop("num_documents")
            expected = num_tokens * dtype.itemsize
            size = (directory / "tokens.bin").stat().st_size
            if size != expected:
                raise ValueError(f"tokens.bin is {size} bytes, not the {expected} recorded")
            offsets = np.load(directory / "offsets.npy", mmap_mode="r", allow_pickle=False)
            if offsets.shape != (num_documents + 1,) or int(offsets[-1]) != num_tokens:
                raise ValueError(
                    f"offsets.npy does not hold the {num_documents} documents and {num_tokens} "
                    "tokens recorded"
                )
            tokens = np.memmap(directory / "tokens.bin", dtype, mode="r")
            return cls(directory=directory, tokens=tokens, offsets=offsets, **meta)
        except FileNotFoundError as error:
            raise ValueError(
                f"no complete token stream in {directory} ({Path(error.filename).name} is missing);"
                " prepare it with cla_jax.data.prepare_streams"
            ) from None
        except (ValueError, KeyError, TypeError, EOFError) as error:
            raise ValueError(
                f"the token stream in {directory} is damaged: {error}. Delete that directory; it "
                "is made again from the corpus when next needed"
            ) from error


@dataclasses.dataclass(frozen=True)
class Streams:
    """Both splits of a corpus."""

    train: TokenStream
    validation: TokenStream

    @classmethod
    def open(cls, directory: str | os.PathLike[str]) -> "Streams":
        """Opens `directory/train` and `directory/validation`.

        Raises:
            ValueError: as `TokenStream.open`.
        """
        return cls(
            TokenStream.open(Path(directory) / "train"),
            TokenStream.open(Path(directory) / "validation"),
        )
