"""First-fit packing: documents that are kept whole, several to a row (MLKV section 4.3).

"short documents are first packed with each other, then the long documents are truncated as needed":
documents go, the longest first, into the first row that still has room. What of a document exceeds
a row is dropped; what of a row stays free is padding.
"""

import dataclasses

import numpy as np

from cla_jax.data.token_stream import TokenStream

__all__ = ["PackedRows", "Packing", "first_fit"]


@dataclasses.dataclass(frozen=True, eq=False)
class Packing:
    """Which documents make which row.

    Attributes:
        documents: the documents' indices, row by row, in each row ascending.
        offsets: int64 `[rows + 1]`; row r holds `documents[offsets[r]:offsets[r + 1]]`.
        tokens: tokens in all rows.
        dropped: tokens of documents that exceed a row.
    """

    documents: np.ndarray
    offsets: np.ndarray
    tokens: int
    dropped: int

    @property
    def rows(self) -> int:
        """Rows."""
        return len(self.offsets) - 1


def first_fit(lengths: np.ndarray, capacity: int) -> Packing:
    """Packs documents into rows of `capacity` tokens, first fit, the longest documents first.

    The rows are those of the textbook algorithm, found without a loop over documents: those of one
    length are placed together, in all rows of equal room at once, so that ten million take seconds.

    Args:
        lengths: `[documents]`, each at least 1; documents of one length keep their order.
        capacity: at least 1.
    """
    cut = np.minimum(lengths, capacity)
    counts = np.bincount(cut, minlength=capacity + 1)
    dtype = np.uint16 if capacity < 2**16 else np.int64  # 16-bit integers are sorted by radix
    by_length = np.argsort((capacity - cut).astype(dtype), kind="stable")
    # Groups of rows that follow each other and have equal room: the first row, how many, the room.
    first, count, room = (np.empty(0, np.int64) for _ in range(3))
    rows, placed = 0, list[np.ndarray]()
    for length in range(capacity, 0, -1):
        if not (wanted := int(counts[length])):
            continue
        # New rows are a group too, the last; more than are needed, and the rest are taken off.
        first = np.append(first, rows)
        count = np.append(count, -(-wanted // (capacity // length)))
        room = np.append(room, capacity)
        fits = room // length
        filled = np.minimum(np.cumsum(fits * count), wanted)
        added = np.diff(filled, prepend=0)
        full, rest = np.divmod(added, np.maximum(fits, 1))
        part = (rest > 0).astype(np.int64)
        # A group falls into rows that are full now, one that took some, and those not reached.
        pieces_first = np.stack([first, first + full, first + full + part], 1).ravel()
        pieces_count = np.stack([full, part, count - full - part], 1).ravel()
        taken = np.stack([fits, rest, np.zeros_like(rest)], 1).ravel()
        pieces_room = np.repeat(room, 3) - taken * length
        into = (taken > 0) & (pieces_count > 0)
        placed += _slots(pieces_first[into], pieces_count[into], taken[into])
        rows = max(rows, int(first[-1] + full[-1] + part[-1]))
        pieces_count[-1] = 0  # new rows that were not needed
        keep = (pieces_count > 0) & (pieces_room > 0)
        first, count, room = pieces_first[keep], pieces_count[keep], pieces_room[keep]
    row_of = np.empty(len(cut), np.int64)
    row_of[by_length] = np.concatenate(placed) if placed else np.empty(0, np.int64)
    tokens = int(cut.sum(dtype=np.int64))
    return Packing(
        documents=np.argsort(row_of, kind="stable"),
        offsets=np.concatenate([[0], np.cumsum(np.bincount(row_of, minlength=rows))]),
        tokens=tokens,
        dropped=int(lengths.sum(dtype=np.int64)) - tokens,
    )


def _slots(first: np.ndarray, count: np.ndarray, taken: np.ndarray) -> list[np.ndarray]:
    """The row of each document placed, in the order in which they are taken."""
    starts = np.repeat(first, count)
    within = np.arange(len(starts)) - np.repeat(np.cumsum(count) - count, count)
    return [np.repeat(starts + within, np.repeat(taken, count))]


class PackedRows:
    """Rows of whole documents, padded, and the mask of what counts.

    Item i is `{"tokens": int32 [T + 1], "mask": float32 [T]}`: documents end to end, then end
    tokens as padding; `mask` is 1 where the target `tokens[1:][t]` is a document's. With
    `document_ids` also `{"documents": int32 [T + 1]}`, -1 in padding.

    Args:
        stream: the tokens.
        sequence_length: `T`; a row holds `T + 1` tokens, so that it has `T` targets.
        document_ids: add `documents`.
    """

    def __init__(
        self, stream: TokenStream, sequence_length: int, *, document_ids: bool = False
    ) -> None:
        if sequence_length < 1:
            raise ValueError(f"sequence_length={sequence_length} must be at least 1")
        self.stream = stream
        self.sequence_length = sequence_length
        self.document_ids = document_ids
        self.packing = first_fit(np.diff(stream.offsets), sequence_length + 1)

    def __len__(self) -> int:
        return self.packing.rows

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        size, index = self.sequence_length + 1, int(index)
        tokens = np.full(size, self.stream.end_of_text, np.int32)
        documents = np.full(size, -1, np.int32) if self.document_ids else None
        at = 0
        begin, end = self.packing.offsets[index : index + 2]
        for document in self.packing.documents[begin:end].tolist():
            start, stop = self.stream.offsets[document : document + 2].tolist()
            stop = min(stop, start + size)
            tokens[at : at + stop - start] = self.stream.tokens[start:stop]
            if documents is not None:
                documents[at : at + stop - start] = document
            at += stop - start
        item = {"tokens": tokens, "mask": (np.arange(1, size) < at).astype(np.float32)}
        return item if documents is None else {**item, "documents": documents}

    def __repr__(self) -> str:
        return f"PackedRows({self.stream.fingerprint}, {self.sequence_length})"
