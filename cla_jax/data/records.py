"""Documents in files: plain text, JSON lines, and JSON lines compressed with Zstandard.

Every reader goes through its file from front to back, holds one document (and a buffer) at a time,
and can take up where an earlier reading left off.
"""

import dataclasses
import difflib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import zstandard

__all__ = ["Document", "JsonLinesFile", "Record", "Source", "TextFile"]

# A text file above the first size is read as documents of about the second.
LARGE_TEXT_BYTES = 16 * 2**20
TEXT_PIECE_BYTES = 2**20

_BLOCK = 2**18
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclasses.dataclass(frozen=True, slots=True)
class Document:
    """One text, with a key that is unique in its corpus (a file's relative name)."""

    key: str
    text: str


class Record(NamedTuple):
    """A document, and where it stands in its source.

    Attributes:
        document: the document.
        next: the `start` from which a later reading goes on behind it.
        read: how many of the source's `num_bytes` have been read.
    """

    document: Document
    next: int
    read: int


@runtime_checkable
class Source(Protocol):
    """Documents that are read from front to back: a file, say."""

    @property
    def name(self) -> str:
        """Unique in its corpus."""
        ...

    @property
    def num_bytes(self) -> int:
        """Its size where it lies (compressed, if it is), for progress."""
        ...

    def stamp(self) -> str:
        """What it looks like now, without reading it; another stamp means it may have changed."""
        ...

    def records(self, start: int = 0) -> Iterator[Record]:
        """Its documents from `start`: 0, or the `next` of the last one already taken."""
        ...


class _File:
    """What files have in common."""

    path: Path

    @property
    def num_bytes(self) -> int:
        """The file's size."""
        return self.path.stat().st_size

    def stamp(self) -> str:
        """Size and time of the last change."""
        status = self.path.stat()
        return f"{status.st_size} bytes, changed at {status.st_mtime_ns}"


@dataclasses.dataclass(frozen=True)
class TextFile(_File):
    """A UTF-8 file of one document; above 16 MiB, of documents of about 1 MiB cut at lines.

    Line endings are kept; a byte order mark is not.
    """

    path: Path
    name: str

    def records(self, start: int = 0) -> Iterator[Record]:
        """The file's text.

        Raises:
            ValueError: it is not UTF-8 (with the offset, and how to convert it).
        """
        size = self.num_bytes
        whole = size <= LARGE_TEXT_BYTES
        if start and (whole or start >= size):
            return
        with self.path.open("rb") as file:
            file.seek(start)
            while data := file.read() if whole else _piece(file):
                offset, start = start, start + len(data)
                text = _decode(data, self.path, offset)
                key = self.name if whole else f"{self.name}@{offset}"
                text = text if offset else text.removeprefix("\ufeff")
                yield Record(Document(key, text), start, min(start, size))


def _piece(file: io.BufferedReader) -> bytes:
    """About `TEXT_PIECE_BYTES`, to the end of a line if lines are no longer than that."""
    data = file.read(TEXT_PIECE_BYTES) + file.readline(TEXT_PIECE_BYTES)
    if len(data) == 2 * TEXT_PIECE_BYTES and not data.endswith(b"\n"):
        end = data.rfind(b" ", TEXT_PIECE_BYTES) + 1 or len(data)
        if end == len(data):  # without a space: before a character that may go on behind it
            end -= next((back for back in range(1, 4) if data[-back] >= 0xC0), 0)
        file.seek(end - len(data), io.SEEK_CUR)
        data = data[:end]
    return data


def _decode(data: bytes, path: Path, offset: int) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        if data.startswith(b"\x28\xb5\x2f\xfd"):
            raise ValueError(
                f"{path} is compressed with Zstandard, which is read of JSON lines only, in files "
                "named .jsonl.zst"
            ) from None
        utf16 = offset == 0 and data.startswith((b"\xff\xfe", b"\xfe\xff"))
        encoding = "UTF-16" if utf16 else "WINDOWS-1252"
        raise ValueError(
            f"{path} is not UTF-8: byte 0x{data[error.start]:02x} at offset {offset + error.start} "
            f"({error.reason}). Convert it, for example (if it is {encoding}) with "
            f"`iconv -f {encoding} -t UTF-8 '{path}' > '{path.stem}-utf8{path.suffix}'`"
        ) from None


@dataclasses.dataclass(frozen=True)
class JsonLinesFile(_File):
    """One JSON object a line, the document under `text_key`; compressed if the name ends in .zst.

    SlimPajama's records have this shape: `{"text": str, "meta": {...}}`. Blank lines are passed
    over. A document's key is the file's name and its line, from 1.
    """

    path: Path
    name: str
    text_key: str = "text"

    def stamp(self) -> str:
        """Size, time of the last change, and the key that is read."""
        return f"{super().stamp()}, key {self.text_key!r}"

    def records(self, start: int = 0) -> Iterator[Record]:
        """The documents after line `start`.

        Raises:
            ValueError: a damaged or truncated Zstandard frame (file, frame, byte), a line that is
                not UTF-8 or not JSON, a record without text (file, line).
        """
        with self.path.open("rb") as file:
            compressed = self.path.suffix.lower() == ".zst"
            blocks = _zstandard_blocks(file, self.path) if compressed else _blocks(file)
            for number, (line, read) in enumerate(_lines(blocks, start), start + 1):
                if line.strip():
                    text = self._text(line, number)
                    yield Record(Document(f"{self.name}:{number}", text), number, read)

    def _text(self, line: bytes, number: int) -> str:
        where = f"{self.path}, line {number}"
        try:
            if number == 1:
                line = line.removeprefix(_BYTE_ORDER_MARK)
            record = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{where} is not UTF-8: byte 0x{line[error.start]:02x} at offset {error.start} of "
                f"the line ({error.reason})"
            ) from None
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{where} is not JSON: {error.msg} at column {error.colno}; every line must be one "
                f'record, such as {{"{self.text_key}": "..."}}'
            ) from None
        except RecursionError:
            raise ValueError(f"{where} is JSON nested too deeply to read") from None
        if not isinstance(record, dict):
            raise ValueError(f"{where} is a JSON {type(record).__name__}, not an object with text")
        if self.text_key not in record:
            near = difflib.get_close_matches(self.text_key, list(record), n=1, cutoff=0.0)
            hint = f"; the nearest key is {near[0]!r} (--text-key chooses it)" if near else ""
            raise ValueError(f"{where}: the record has no {self.text_key!r}{hint}")
        text = record[self.text_key]
        if not isinstance(text, str):
            kind = "null" if text is None else type(text).__name__
            raise ValueError(f"{where}: {self.text_key!r} is {kind}, not text")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{where}: {self.text_key!r} holds half a surrogate pair at character "
                f"{error.start}, which is no text"
            ) from None
        return text


def _blocks(file: io.BufferedReader) -> Iterator[tuple[bytes, int]]:
    """A file in blocks, each with the bytes read so far."""
    read = 0
    while data := file.read(_BLOCK):
        read += len(data)
        yield data, read


def _zstandard_blocks(file: io.BufferedReader, path: Path) -> Iterator[tuple[bytes, int]]:
    """A compressed file's text in blocks, each with the compressed bytes read so far.

    The library's own stream reader takes a truncated file for a complete one: frames are followed
    here, so that one without its end is seen.
    """
    context = zstandard.ZstdDecompressor(max_window_size=2**31)
    frame, number, begin, read = None, 0, 0, 0
    for chunk, end in _blocks(file):
        read = end
        while chunk:
            if frame is None:
                frame, number, begin = context.decompressobj(), number + 1, read - len(chunk)
            try:
                data = frame.decompress(chunk)
            except zstandard.ZstdError as error:
                raise ValueError(
                    f"{path} is damaged: its Zstandard frame {number}, from byte {begin}, cannot "
                    f"be decompressed beyond byte {max(read - len(chunk), begin)} ({error})"
                ) from None
            chunk = frame.unused_data if frame.eof else b""
            frame = None if frame.eof else frame
            if data:
                yield data, read
    if frame is not None or not read:
        what = f"its Zstandard frame {number}, from byte {begin}, has no end" if read else "empty"
        raise ValueError(f"{path} is truncated at byte {read}: {what}; fetch or copy it again")


def _lines(blocks: Iterator[tuple[bytes, int]], skip: int) -> Iterator[tuple[bytes, int]]:
    """Lines without their ends, each with the bytes read so far; the first `skip` are left out."""
    rest = list[bytes]()  # of the line that goes on in the next block
    read = 0
    for data, read in blocks:
        if skip and (count := data.count(b"\n")) < skip:
            skip -= count
            rest = [data[data.rfind(b"\n") + 1 :]]
            continue
        *whole, tail = data.split(b"\n")
        if whole:
            whole[0] = b"".join([*rest, whole[0]])
            rest.clear()
        for line in whole[skip:]:
            yield line, read
        skip = 0
        rest.append(tail)
    if not skip and (line := b"".join(rest)):
        yield line, read
