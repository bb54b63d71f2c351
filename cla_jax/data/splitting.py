"""Train and validation: a split by documents that a corpus's own content decides."""

import dataclasses
import hashlib
import math
from collections import Counter
from collections.abc import Iterator

from cla_jax.data.corpora import Corpus, Document, TextCorpus

SPLITS = ("train", "validation")
VALIDATION_FRACTION = 0.05
MINIMUM_BYTES = 1_000

# Part of every fingerprint: raise it when the split rule or the record format changes.
_FORMAT = "cla-jax corpus 1"


@dataclasses.dataclass(frozen=True)
class Survey:
    """What one pass over a corpus finds: its identity and its split.

    Documents are grouped by the SHA-256 of their text, so that copies land in the same split. In
    hash order, groups go to validation until it holds 5 % of the bytes; a group that would bring it
    above 10 % is passed over. If that fails (one document, few, or very uneven ones), the
    validation text is instead the tail of the largest document, cut at a line where possible.

    Attributes:
        fingerprint: SHA-256 over keys and texts.
        num_documents: documents, without those that hold only whitespace.
        num_bytes: their UTF-8 bytes.
        validation: the hashes of the documents that are validation as a whole.
        cut: the hash of the document that is cut in two, if one is.
        tail_fraction: the share of that document that goes to validation.
    """

    fingerprint: str
    num_documents: int
    num_bytes: int
    validation: frozenset[bytes]
    cut: bytes | None = None
    tail_fraction: float = 0.0

    def pieces(self, document: Document, digest: bytes, split: str) -> Iterator[Document]:
        """The part of a document that belongs to a split: all, none, or one side of the cut."""
        if digest == self.cut:
            data = document.text.encode()
            at = _cut_position(data, self.tail_fraction)
            if part := data[at:] if split == "validation" else data[:at]:
                yield Document(document.key, part.decode())
        elif (digest in self.validation) == (split == "validation"):
            yield document


def survey(corpus: Corpus) -> Survey:
    """Reads a corpus once, for its fingerprint and its split.

    Raises:
        ValueError: an empty corpus, or one too short to hold a validation split.
    """
    whole = CorpusFingerprint()
    group_bytes = Counter[bytes]()
    num_documents = 0
    for document in documents_of(corpus):
        group_bytes[whole.add(document)] += len(document.text.encode())
        num_documents += 1
    total = group_bytes.total()
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
    counts = (whole.hexdigest(), num_documents, total)
    if held >= target:
        return Survey(*counts, validation=frozenset(validation))
    # Every group passed over is larger than the target, so the largest one can spare it.
    cut = max(sorted(group_bytes), key=lambda digest: group_bytes[digest])
    return Survey(*counts, frozenset(), cut, target / group_bytes[cut])


def documents_of(corpus: Corpus) -> Iterator[Document]:
    """A corpus's documents, without those that hold only whitespace."""
    return (document for document in corpus.documents() if document.text.strip())


class CorpusFingerprint:
    """SHA-256 over documents, in their order."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256(_FORMAT.encode())

    def add(self, document: Document) -> bytes:
        """Takes a document in; returns the hash of its text alone."""
        key, digest = document.key.encode(), hashlib.sha256(document.text.encode()).digest()
        self._hash.update(len(key).to_bytes(8, "little") + key + digest)
        return digest

    def hexdigest(self) -> str:
        """Of the documents so far."""
        return self._hash.hexdigest()


def describe(corpus: Corpus) -> str:
    """A corpus in an error message: the user's path where there is one."""
    return str(corpus.path) if isinstance(corpus, TextCorpus) else f"corpus {corpus.name!r}"


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
