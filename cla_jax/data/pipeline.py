"""Batches from token streams, with Grain.

The order of the windows is a function of the seed alone, and an iterator's state is one number:
the batches taken. That number means nothing without the data it counts, so a checkpoint also saves
`data_fingerprint` and a resume compares it.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, cast, runtime_checkable

import grain
import numpy as np

from cla_jax.configs import DataConfig
from cla_jax.data.packing import PackedRows
from cla_jax.data.token_stream import TokenStream

__all__ = [
    "EvaluationWindows",
    "TokenWindows",
    "batch_rows",
    "batches",
    "data_fingerprint",
    "evaluation_batches",
    "training_rows",
]

# Windows are small and made quickly: a few batches ahead hide the page faults.
_READ_OPTIONS = grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)


class TokenWindows:
    """Windows of a stream that overlap by one token: the inputs and, shifted by one, the targets.

    Item i is `{"tokens": int32 [T + 1]}`, the tokens from `i * T`; with `document_ids` also
    `{"documents": int32 [T + 1]}`, the index of the document each token belongs to. The last,
    partial window is dropped.

    Args:
        stream: the tokens.
        sequence_length: `T`.
        document_ids: add `documents`.

    Raises:
        ValueError: a sequence length below 1, or a stream too short for one window.
    """

    def __init__(
        self, stream: TokenStream, sequence_length: int, *, document_ids: bool = False
    ) -> None:
        _check_positive("sequence_length", sequence_length)
        if stream.num_tokens < sequence_length + 1:
            raise ValueError(
                f"the {stream.split} stream has {stream.num_tokens} tokens, too few for one window "
                f"of sequence_length {sequence_length} + 1; the longest sequence_length that works "
                f"is {stream.num_tokens - 1} (or give it more text)"
            )
        self.stream = stream
        self.sequence_length = sequence_length
        self.document_ids = document_ids

    def __len__(self) -> int:
        return (self.stream.num_tokens - 1) // self.sequence_length

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        start = int(index) * self.sequence_length
        stop = start + self.sequence_length + 1
        item = {"tokens": self.stream.tokens[start:stop].astype(np.int32)}
        if self.document_ids:
            item["documents"] = _document_ids(self.stream, start, stop)
        return item

    def __repr__(self) -> str:
        return f"TokenWindows({self.stream.fingerprint}, {self.sequence_length})"


class EvaluationWindows:
    """Every token of a stream after the first exactly once as a target, in order.

    Item i is `{"tokens": int32 [T + 1], "mask": float32 [T]}`; `mask` is 1 where the target
    `tokens[1:][t]` counts and 0 in padding: the end of the last window, and whole rows that make
    the number of windows a multiple of `multiple_of`. With `document_ids`, `documents` as in
    `TokenWindows`, -1 in padding. `limit` keeps the first so many targets; 0 keeps all.
    """

    def __init__(
        self,
        stream: TokenStream,
        sequence_length: int,
        *,
        multiple_of: int = 1,
        document_ids: bool = False,
        limit: int = 0,
    ) -> None:
        _check_positive("sequence_length", sequence_length)
        if stream.num_tokens < 2:
            raise ValueError(f"the {stream.split} stream has no token to predict")
        self.stream = stream
        self.sequence_length = sequence_length
        self.document_ids = document_ids
        self._tokens = min(stream.num_tokens, limit + 1) if limit else stream.num_tokens
        windows = -(-(self._tokens - 1) // sequence_length)
        self._length = -(-windows // multiple_of) * multiple_of

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        T = self.sequence_length
        start = min(int(index) * T, self._tokens)
        stop = min(start + T + 1, self._tokens)
        tokens = np.full(T + 1, self.stream.end_of_text, np.int32)
        tokens[: stop - start] = self.stream.tokens[start:stop]
        mask = (np.arange(1, T + 1) < stop - start).astype(np.float32)
        item = {"tokens": tokens, "mask": mask}
        if self.document_ids:
            item["documents"] = np.full(T + 1, -1, np.int32)
            item["documents"][: stop - start] = _document_ids(self.stream, start, stop)
        return item

    def __repr__(self) -> str:
        return f"EvaluationWindows({self.stream.fingerprint}, {self.sequence_length})"


@runtime_checkable
class Rows(Protocol):
    """Random access to the rows that training batches are made of."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, np.ndarray]: ...


# How documents become rows, by `DataConfig.packing`.
_PACKINGS = {"concat": TokenWindows, "first_fit": PackedRows}


def training_rows(stream: TokenStream, config: DataConfig) -> Rows:
    """The rows of an epoch, in the stream's order; `len()` of it is how many there are.

    Raises:
        ValueError: an unknown packing, a stream shorter than a window (`concat`).
    """
    if config.packing not in _PACKINGS:
        raise ValueError(f"packing={config.packing!r} is unknown; known: {', '.join(_PACKINGS)}")
    return _PACKINGS[config.packing](
        stream, config.sequence_length, document_ids=config.document_mask
    )


def batches(
    stream: TokenStream, config: DataConfig, *, rows: Sequence[int] | None = None
) -> grain.IterDataset[dict[str, np.ndarray]]:
    """Endless shuffled training batches, or the rows of each that one process reads.

    Rows are shuffled over the whole stream, anew in each epoch, by `config.seed`. Batch k is the
    same rows in the same order, whichever of them are read.

    Args:
        stream: the tokens.
        config: what a batch is.
        rows: of each batch, counted from 0, in the order wanted; default all `B`.

    Returns:
        A dataset of `{"tokens": int32 [rows, T + 1]}`; with `document_mask` also `{"documents":
        int32 [rows, T + 1]}`, with `first_fit` packing also `{"mask": float32 [rows, T]}`, 0 where
        the target is padding. The iterator's `get_state()` is `{"next_index": batches taken}`.

    Raises:
        ValueError: a stream shorter than a window, an unknown packing, a negative seed, rows that a
            batch does not have.
    """
    if config.seed < 0:
        raise ValueError(f"seed={config.seed} must be at least 0")
    source = training_rows(stream, config)
    read = _reader(source, config.batch_size, rows)
    # Batched as a map, not as an iterator, so that the state counts batches.
    order = _order(len(source), config.seed).batch(config.batch_size)
    return order.map(read).to_iter_dataset(_READ_OPTIONS)


def evaluation_batches(
    stream: TokenStream,
    sequence_length: int,
    batch_size: int,
    *,
    document_ids: bool = False,
    limit: int = 0,
    rows: Sequence[int] | None = None,
) -> grain.IterDataset[dict[str, np.ndarray]]:
    """One pass over a stream in order, in which every token after the first is a target once.

    The last batch is padded with rows that count nothing. `limit` stops after so many targets (0:
    all), the same whatever the batch size. `rows` of each batch, as in `batches`.

    Returns:
        A dataset of the items of `EvaluationWindows`, batched: `tokens` int32 `[rows, T + 1]`,
        `mask` float32 `[rows, T]`.

    Raises:
        ValueError: as `batches`; a stream shorter than a window is padded, not refused.
    """
    _check_positive("batch_size", batch_size)
    windows = EvaluationWindows(
        stream, sequence_length, multiple_of=batch_size, document_ids=document_ids, limit=limit
    )
    read = _reader(windows, batch_size, rows)
    order = grain.MapDataset.range(len(windows)).batch(batch_size)
    return order.map(read).to_iter_dataset(_READ_OPTIONS)


def batch_rows(stream: TokenStream, config: DataConfig, index: int) -> list[int]:
    """Which rows batch `index` (counted from 0, over all processes) of `batches` holds."""
    order = _order(len(training_rows(stream, config)), config.seed)
    start = index * config.batch_size
    return [int(cast(int, order[i])) for i in range(start, start + config.batch_size)]


def data_fingerprint(stream: TokenStream, config: DataConfig) -> dict[str, Any]:
    """Everything that decides which tokens batch k holds, in plain JSON values.

    Two equal dictionaries and the same number of batches taken mean the same batch next; compare
    field by field to name what differs.
    """
    return {
        "corpus": stream.corpus_fingerprint,
        "tokenizer": stream.tokenizer_fingerprint,
        "split": stream.split,
        "tokens": stream.fingerprint,
        "packing": config.packing,
        "document_mask": config.document_mask,
        "sequence_length": config.sequence_length,
        "batch_size": config.batch_size,
        "seed": config.seed,
    }


def _document_ids(stream: TokenStream, start: int, stop: int) -> np.ndarray:
    """The documents of tokens `start` to `stop`, int32."""
    positions = np.arange(start, stop)
    return (np.searchsorted(stream.offsets, positions, side="right") - 1).astype(np.int32)


def _check_positive(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name}={value} must be at least 1")


def _order(count: int, seed: int) -> grain.MapDataset[int]:
    """So many rows as training takes them, epoch by epoch."""
    return grain.MapDataset.range(count).seed(seed).shuffle().repeat()


def _reader(
    source: Rows, batch_size: int, rows: Sequence[int] | None
) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
    """From the indices of a whole batch to those of its rows that are read."""
    _check_positive("batch_size", batch_size)
    chosen = range(batch_size) if rows is None else rows
    if not chosen or not all(0 <= row < batch_size for row in chosen):
        raise ValueError(f"rows {list(chosen)} of a batch: expected some of 0 to {batch_size - 1}")

    def read(indices: np.ndarray) -> dict[str, np.ndarray]:
        items = [source[int(indices[row])] for row in chosen]
        return {name: np.stack([item[name] for item in items]) for name in items[0]}

    return read
