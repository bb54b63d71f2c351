"""Train and validation: a split by documents that a corpus's own content decides."""

import dataclasses
import hashlib
import math
from collections import Counter
from collections.abc import Iterator
from typing import Protocol, runtime_checkable

from cla_jax.data.corpora import Corpus, describe, documents_of
from cla_jax.data.records import Document

__all__ = ["ByHash", "Exact", "Given", "SplitRule", "WithoutGiven", "digest_of", "split_of"]

SPLITS = ("train", "validation")
VALIDATION_FRACTION = 0.05
VALIDATION_BYTES = 2**26
MINIMUM_BYTES = 1_000

# Up to here a corpus is read once more, before it is written, and split exactly.
EXACT_BYTES, EXACT_DOCUMENTS = 2**28, 2**20


@runtime_checkable
class SplitRule(Protocol):
    """Which split a document belongs to."""

    @property
    def description(self) -> str:
        """All that decides the split; part of the corpus's fingerprint."""
        ...

    def pieces(self, document: Document, digest: bytes) -> Iterator[tuple[str, Document]]:
        """The document, or its pieces, each with its split. `digest` is that of its text."""
        ...


@dataclasses.dataclass(frozen=True)
class Exact:
    """The rule of a corpus of at most 256 MiB (and a million documents), all read beforehand.

    Documents are grouped by the SHA-256 of their text, so that copies land in the same split. In
    hash order, groups go to validation until it holds 5 % of the bytes; a group that would bring it
    above 10 % is passed over. If that fails (one document, few, or very uneven ones), the
    validation text is instead the tail of the largest document, cut at a line where possible.

    Attributes:
        validation: the hashes of the documents that are validation as a whole.
        cut: the hash of the document that is cut in two, if one is.
        tail_fraction: the share of that document that goes to validation.
    """

    validation: frozenset[bytes]
    cut: bytes | None = None
    tail_fraction: float = 0.0

    @property
    def description(self) -> str:
        """Names the hashes."""
        held_out = hashlib.sha256(b"".join(sorted(self.validation)) + (self.cut or b""))
        return f"5 % of the bytes, in hash order: {held_out.hexdigest()}, {self.tail_fraction:.17g}"

    def pieces(self, document: Document, digest: bytes) -> Iterator[tuple[str, Document]]:
        """The whole document, or both sides of the cut."""
        if digest != self.cut:
            yield SPLITS[digest in self.validation], document
            return
        data = document.text.encode()
        at = _cut_position(data, self.tail_fraction)
        for split, part in zip(SPLITS, (data[:at], data[at:]), strict=True):
            if part:
                yield split, Document(document.key, part.decode())


@dataclasses.dataclass(frozen=True)
class ByHash:
    """The rule of a larger corpus: validation are the lowest hashes, whatever else there is.

    Each document is judged by itself, so the corpus can stream past, and copies agree.

    Attributes:
        fraction: the share of hashes that is validation.
    """

    fraction: float

    @property
    def description(self) -> str:
        """Names the fraction."""
        return f"SHA-256 of the text in the lowest {self.fraction:.17g}"

    def pieces(self, document: Document, digest: bytes) -> Iterator[tuple[str, Document]]:
        """The whole document."""
        yield SPLITS[int.from_bytes(digest[:8]) < self.fraction * 2**64], document


@dataclasses.dataclass(frozen=True)
class Given:
    """Everything is validation: the rule of a corpus that the user gives for it."""

    description = "given for validation"

    def pieces(self, document: Document, digest: bytes) -> Iterator[tuple[str, Document]]:
        """The whole document."""
        yield "validation", document


@dataclasses.dataclass(frozen=True)
class WithoutGiven:
    """The rule of the training corpus beside a given one: copies of validation documents go.

    Attributes:
        validation: the hashes of the validation documents.
    """

    validation: frozenset[bytes]

    @property
    def description(self) -> str:
        """Names the hashes."""
        held_out = hashlib.sha256(b"".join(sorted(self.validation)))
        return f"all but what is given for validation: {held_out.hexdigest()}"

    def pieces(self, document: Document, digest: bytes) -> Iterator[tuple[str, Document]]:
        """The whole document, or nothing."""
        if digest not in self.validation:
            yield "train", document


def split_of(corpus: Corpus) -> SplitRule:
    """The rule by which a corpus is split in two: `Exact` if it is small, else `ByHash`.

    Of a large corpus 5 % is validation, but of more than 1.25 GiB (as it lies on disk) only about
    64 MiB: the share is then a power of two, so that it does not change with every byte.

    Raises:
        ValueError: an empty corpus, or one too short to hold a validation split.
    """
    group_bytes, total = Counter[bytes](), 0
    for document in documents_of(corpus):
        size = len(document.text.encode())
        group_bytes[digest_of(document)] += size
        total += size
        if total > EXACT_BYTES or len(group_bytes) > EXACT_DOCUMENTS:
            share = VALIDATION_BYTES / max(sum(s.num_bytes for s in corpus.sources), 1)
            if share >= VALIDATION_FRACTION:
                return ByHash(VALIDATION_FRACTION)
            return ByHash(2.0 ** round(math.log2(share)))
    if total < MINIMUM_BYTES:
        raise ValueError(
            f"{describe(corpus)} holds {total or 'no'} bytes of text"
            f"{'' if total else ' (only whitespace, or nothing at all)'}; at least "
            f"{MINIMUM_BYTES} bytes are needed for a training and a validation split"
        )
    validation, held, target = set[bytes](), 0, VALIDATION_FRACTION * total
    for digest, size in sorted(group_bytes.items()):
        if held < target and held + size <= 2 * target:
            validation.add(digest)
            held += size
    if held >= target:
        return Exact(frozenset(validation))
    # Every group passed over is larger than the target, so the largest one can spare it.
    cut = max(sorted(group_bytes), key=lambda digest: group_bytes[digest])
    return Exact(frozenset(), cut, target / group_bytes[cut])


def digest_of(document: Document) -> bytes:
    """SHA-256 of a document's text."""
    return hashlib.sha256(document.text.encode()).digest()


def _cut_position(data: bytes, tail_fraction: float) -> int:
    """Where the tail of a UTF-8 text begins: after a newline, else after a space, else anywhere.

    The boundary is looked for up to one more tail earlier. Trailing whitespace does not count.
    """
    end = len(data.rstrip())
    tail = math.ceil(tail_fraction * end)
    low, high = max(0, end - 2 * tail), end - tail
    for boundary in (b"\n", b" "):
        found = data.rfind(boundary, low, high)
        if found >= 0:
            return found + 1
    while high > 0 and data[high] & 0xC0 == 0x80:  # inside a character
        high -= 1
    return high
