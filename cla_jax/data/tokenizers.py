"""Tokenizers: text to token ids and back."""

import hashlib
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import ArrayLike

__all__ = ["ByteTokenizer", "Tokenizer"]


@runtime_checkable
class Tokenizer(Protocol):
    """What a token stream and a sampler need of a tokenizer."""

    @property
    def name(self) -> str:
        """For people and for directory names."""
        ...

    @property
    def fingerprint(self) -> str:
        """SHA-256 of everything that decides the ids; two tokenizers that share it are the same."""
        ...

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        ...

    @property
    def end_of_text(self) -> int:
        """The id that ends a document."""
        ...

    def encode(self, text: str) -> np.ndarray:
        """Token ids, int32 `[T]`, without an end token."""
        ...

    def decode(self, tokens: ArrayLike) -> str:
        """Text; what is no valid text becomes U+FFFD."""
        ...


class ByteTokenizer:
    """The 256 bytes of UTF-8, and id 256 to end a document."""

    name = "bytes"
    vocab_size = 257
    end_of_text = 256
    fingerprint = hashlib.sha256(b"utf-8 bytes, 256 ends a document").hexdigest()

    def encode(self, text: str) -> np.ndarray:
        """UTF-8 bytes as int32 `[T]`."""
        return np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int32)

    def decode(self, tokens: ArrayLike) -> str:
        """Text of the bytes; end tokens are left out, anything else becomes U+FFFD.

        A model's vocabulary may be padded beyond 257, so a sampler can meet ids that are no byte.
        """
        ids = np.asarray(tokens, np.int64).ravel()
        ids = ids[ids != self.end_of_text]
        # 0xFF occurs in no UTF-8 text, so decoding replaces it.
        return (
            np.where((ids >= 0) & (ids < 256), ids, 0xFF)
            .astype(np.uint8)
            .tobytes()
            .decode("utf-8", errors="replace")
        )
